"""The Kubernetes manifests: that they fit together, and fit comfyd's own numbers."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import yaml

from comfyd.config import EngineConfig, HttpConfig, JobsConfig
from comfyd.services import HTTP_STOP_GRACE_S
from comfyd.storage.s3_config import S3Config
from comfyd.variables import VARIABLES

ROOT: Final = Path(__file__).parent.parent
KUBERNETES: Final = ROOT / "deploy/kubernetes"
COMPONENTS: Final = KUBERNETES / "components"
NOT_MANIFESTS: Final = {"kustomization.yaml", "prometheus-adapter-values.yaml"}
KNOWN: Final = {variable.name: variable for variable in VARIABLES}

Manifest = dict[str, Any]


def load(path: str) -> Manifest:
    document: Manifest = yaml.safe_load((KUBERNETES / path).read_text())
    return document


def parsed(name: str, text: str) -> Any:
    """What comfyd reads in that text of a variable."""
    return KNOWN[name].kind.parse(text)


def default(name: str) -> Any:
    text = KNOWN[name].default
    assert text is not None
    return parsed(name, text)


def bytes_of(quantity: str) -> int:
    match = re.fullmatch(r"(\d+)(Mi|Gi)", quantity)
    assert match is not None, quantity
    return int(match[1]) << {"Mi": 20, "Gi": 30}[match[2]]


@pytest.fixture
def deployment() -> Manifest:
    return load("base/deployment.yaml")


@pytest.fixture
def pod(deployment: Manifest) -> Manifest:
    template: Manifest = deployment["spec"]["template"]["spec"]
    return template


@pytest.fixture
def container(pod: Manifest) -> Manifest:
    (only,) = pod["containers"]
    found: Manifest = only
    return found


@pytest.fixture
def environment(container: Manifest) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"]}


def image_environment() -> dict[str, str]:
    """The variables that the image itself sets, as far as these tests need them."""
    text = (ROOT / "docker/api.dockerfile").read_text()
    return dict(re.findall(r"^\s*(?:ENV )?(\w+)=([^\s\"\\]+) ?\\?$", text, re.MULTILINE))


def test_every_manifest_is_named_in_a_kustomization() -> None:
    for folder in (KUBERNETES / "base", *sorted(COMPONENTS.iterdir())):
        there = {path.name for path in folder.glob("*.yaml")} - NOT_MANIFESTS
        assert there == set(yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]), folder.name


def test_the_components_that_are_chosen_or_offered_are_those_that_exist() -> None:
    named = re.findall(r"^  (?:# )?- components/(\w+)", (KUBERNETES / "kustomization.yaml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in COMPONENTS.iterdir())
    assert named[-1] == "durable", "it patches what the others bring"


def test_selectors_find_the_pods(deployment: Manifest) -> None:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = {
        "deployment": deployment["spec"]["selector"]["matchLabels"],
        "service": load("base/service.yaml")["spec"]["selector"],
        "headless": load("components/durable/headless.yaml")["spec"]["selector"],
        "budget": load("base/poddisruptionbudget.yaml")["spec"]["selector"]["matchLabels"],
        "network": load("base/networkpolicy.yaml")["spec"]["podSelector"]["matchLabels"],
        "monitor": load("components/podmonitor/podmonitor.yaml")["spec"]["selector"]["matchLabels"],
    }
    assert {name: selector for name, selector in selectors.items() if selector != labels} == {}


def test_everything_speaks_of_the_one_port(container: Manifest, environment: dict[str, str]) -> None:
    assert container["ports"] == [{"name": "http", "containerPort": HttpConfig().port}]
    assert environment["PORT"] == str(HttpConfig().port)
    probes = [container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "liveness", "readiness")]
    services = [load(path)["spec"]["ports"] for path in ("base/service.yaml", "components/durable/headless.yaml")]
    monitored = load("components/podmonitor/podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    allowed = load("base/networkpolicy.yaml")["spec"]["ingress"][0]["ports"]
    assert {*probes, *(port["targetPort"] for (port,) in services)} == {"http"}
    assert {each["port"] for each in (*monitored, *allowed)} == {"http"}


def test_probes_ask_for_life_and_readiness_where_comfyd_tells_of_them(container: Manifest) -> None:
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}


def test_comfyd_gives_up_starting_before_the_kubelet_does(container: Manifest, environment: dict[str, str]) -> None:
    probe = container["startupProbe"]
    interval_s = parsed("STARTUP_CHECK_INTERVAL_S", environment["STARTUP_CHECK_INTERVAL_S"])
    tries = parsed("STARTUP_CHECK_MAX_TRIES", environment["STARTUP_CHECK_MAX_TRIES"])
    assert probe["periodSeconds"] * probe["failureThreshold"] > interval_s * tries


def test_the_grace_period_covers_the_whole_way_down(
    pod: Manifest, container: Manifest, environment: dict[str, str]
) -> None:
    drain_s = parsed("DRAIN_TIMEOUT_S", environment["DRAIN_TIMEOUT_S"])
    stop_s = parsed("COMFYUI_STOP_GRACE_S", environment["COMFYUI_STOP_GRACE_S"])
    assert drain_s == JobsConfig().drain_timeout_s
    assert stop_s == attrs.fields(EngineConfig).stop_grace_s.default
    way_down_s = (
        container["lifecycle"]["preStop"]["sleep"]["seconds"]
        + drain_s
        + S3Config().stop_grace_s
        + HTTP_STOP_GRACE_S
        + stop_s
    )
    assert way_down_s < pod["terminationGracePeriodSeconds"] <= way_down_s + 30, "and ends within reason"


def test_variables_are_comfyds_and_have_values_that_it_takes(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        assert name in KNOWN, f"comfyd has no variable {name}"
        parsed(name, value)


def test_what_the_restricted_profile_of_pod_security_asks_for_is_there(pod: Manifest, container: Manifest) -> None:
    """As the namespace demands: https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted."""
    assert load("base/namespace.yaml")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers"} & pod.keys()
    assert all("hostPath" not in volume for volume in pod["volumes"])


def test_pods_have_no_token_and_a_root_file_system_that_nobody_writes(pod: Manifest, container: Manifest) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_pods_run_as_the_images_user(pod: Manifest) -> None:
    user = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "docker/api.dockerfile").read_text(), re.MULTILINE)[-1]
    context = pod["securityContext"]
    assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user
    assert context["fsGroup"] == context["runAsGroup"], "or the volumes are not writable"


def test_what_comfyd_and_comfyui_write_is_on_a_volume(
    pod: Manifest, container: Manifest, environment: dict[str, str]
) -> None:
    image = image_environment()
    home = image["COMFY_HOME"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert environment["STATE_DIR"] == image["STATE_DIR"]
    written = {environment["STATE_DIR"], "/tmp", *(f"{home}/{name}" for name in ("input", "output", "temp", "user"))}
    assert written <= mounts
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_state_volumes_hold_the_outputs_that_are_kept(pod: Manifest) -> None:
    (kept,) = (volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "state")
    patch = yaml.safe_load(load("components/durable/kustomization.yaml")["patches"][0]["patch"])
    (claims,) = (each["value"] for each in patch if each.get("path") == "/spec/volumeClaimTemplates")
    claimed = claims[0]["spec"]["resources"]["requests"]["storage"]
    assert bytes_of(kept) > default("JOB_RETENTION_MB")
    assert bytes_of(claimed) > default("JOB_RETENTION_MB")


def test_a_pod_has_a_gpu_of_its_own(container: Manifest) -> None:
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert bytes_of(container["resources"]["limits"]["memory"]) >= bytes_of(
        container["resources"]["requests"]["memory"]
    )


def test_the_image_is_the_one_that_the_build_script_makes() -> None:
    made = subprocess.run(
        [ROOT / "docker/build", "tag", "api"], check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()
    (image,) = load("base/kustomization.yaml")["images"]
    assert f"{image['newName']}:{image['newTag']}" == made


def test_a_single_replica_can_be_moved() -> None:
    budget = load("base/poddisruptionbudget.yaml")["spec"]
    assert budget["maxUnavailable"] == 1
    assert "minAvailable" not in budget


def test_both_autoscalers_count_jobs_alike(deployment: Manifest, environment: dict[str, str]) -> None:
    keda = load("components/keda/scaledobject.yaml")["spec"]
    hpa = load("components/hpa/horizontalpodautoscaler.yaml")["spec"]
    adapter = load("components/hpa/prometheus-adapter-values.yaml")["rules"]["custom"][0]["seriesQuery"]
    (trigger,), (metric,) = keda["triggers"], hpa["metrics"]
    namespace = load("kustomization.yaml")["namespace"]
    assert trigger["metadata"]["query"] == f'sum(comfyd_queue_depth{{namespace="{namespace}"}})'
    assert metric["pods"]["metric"]["name"] == "comfyd_queue_depth"
    assert adapter.startswith("comfyd_queue_depth{")
    assert trigger["metadata"]["threshold"] == metric["pods"]["target"]["averageValue"]
    assert 1 <= float(trigger["metadata"]["threshold"]) < int(environment["MAX_QUEUE_DEPTH"]), "pods before refusals"
    assert keda["minReplicaCount"] == hpa["minReplicas"] == 1, "at 0 nobody would tell of work"
    assert keda["maxReplicaCount"] == hpa["maxReplicas"]
    for target in (keda["scaleTargetRef"], hpa["scaleTargetRef"]):
        assert target == {
            "apiVersion": deployment["apiVersion"],
            "kind": deployment["kind"],
            "name": deployment["metadata"]["name"],
        }


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A copy of the manifests, for a kustomization of the test's own."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which brings kustomize, is not installed")
    copy = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, copy)
    yield copy
    shutil.rmtree(copy)


def render(folder: Path, components: list[str]) -> dict[str, Manifest]:
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    kustomization["components"] = [f"components/{name}" for name in components]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    result = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    manifests = [each for each in yaml.safe_load_all(result.stdout) if each]
    named = {f"{each['kind']}/{each['metadata']['name']}": each for each in manifests}
    assert len(named) == len(manifests)
    return named


def test_the_kustomization_as_it_is_renders(overlay: Path) -> None:
    named = render(overlay, [])
    assert {key.split("/")[0] for key in named} == {
        "Namespace",
        "Deployment",
        "Service",
        "PodDisruptionBudget",
        "NetworkPolicy",
    }
    (image,) = (each["image"] for each in named["Deployment/comfyd"]["spec"]["template"]["spec"]["containers"])
    assert ":comfy" in image


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize(("component", "kind"), [("keda", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler")])
def test_an_autoscaler_owns_the_replicas_of_what_there_is(
    overlay: Path, component: str, kind: str, durable: bool
) -> None:
    named = render(overlay, ["podmonitor", component, "models", *["durable"] * durable])
    workload = "StatefulSet" if durable else "Deployment"
    assert named[f"{kind}/comfyd"]["spec"]["scaleTargetRef"]["kind"] == workload
    assert "replicas" not in named[f"{workload}/comfyd"]["spec"]
    assert not {"StatefulSet/comfyd", "Deployment/comfyd"} - {f"{workload}/comfyd"} & named.keys()


def test_durable_pods_keep_their_state_on_a_claim_and_are_otherwise_the_same(overlay: Path) -> None:
    plain = render(overlay, [])["Deployment/comfyd"]["spec"]
    named = render(overlay, ["durable"])
    durable = named["StatefulSet/comfyd"]["spec"]
    (claim,) = durable["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "state"
    assert durable["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    assert f"Service/{durable['serviceName']}" in named
    volumes = plain["template"]["spec"].pop("volumes")
    assert durable["template"]["spec"].pop("volumes") == [each for each in volumes if each["name"] != "state"]
    assert durable["template"] == plain["template"]
    assert durable["selector"] == plain["selector"]


def test_shared_models_are_read_and_not_written(overlay: Path) -> None:
    named = render(overlay, ["models"])
    pod = named["Deployment/comfyd"]["spec"]["template"]["spec"]
    (mount,) = (each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "models")
    assert mount == {
        "name": "models",
        "mountPath": image_environment()["COMFY_HOME"] + "/models",
        "readOnly": True,
    }
    claims = {each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each}
    assert {f"PersistentVolumeClaim/{name}" for name in claims} <= named.keys()
    assert claims
