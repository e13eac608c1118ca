"""The images' recipes, their build script and the compose file: what can be said of them without building anything."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import yaml
from storage_support import Peer

from comfyd import __version__
from comfyd.config import EngineConfig, HttpConfig, JobsConfig
from comfyd.variables import VARIABLES

ROOT: Final = Path(__file__).parent.parent
DOCKER: Final = ROOT / "docker"
DOCKERFILES: Final = sorted(DOCKER.glob("*.dockerfile"))
IMAGES: Final = ("comfyui.dockerfile", "api.dockerfile")
TAG: Final = r"comfy\d+\.\d+\.\d+{api}-torch\d+\.\d+\.\d+-cuda\d+\.\d+-(runtime|devel)"
OF_OTHERS: Final = {"PYTHONUNBUFFERED"}  # variables that are Python's and not ours

Instruction = tuple[str, str]


@attrs.frozen(kw_only=True)
class Dockerfile:
    """A Dockerfile's instructions, continuation lines joined and comments left out, in stages."""

    arguments: Mapping[str, str]
    stages: tuple[tuple[Instruction, ...], ...]

    @property
    def last(self) -> tuple[Instruction, ...]:
        return self.stages[-1]

    def of(self, keyword: str) -> list[str]:
        """The arguments of every such instruction of the last stage."""
        return [rest for word, rest in self.last if word == keyword]

    def environment(self) -> dict[str, str]:
        return dict(word.split("=", 1) for rest in self.of("ENV") for word in shlex.split(rest))

    def resolved(self, text: str) -> str:
        """*text* with the defaults of the arguments before the first FROM in it."""
        return re.sub(r"\$\{(\w+)\}", lambda match: self.arguments[match[1]], text)


def read_dockerfile(path: Path) -> Dockerfile:
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    arguments: dict[str, str] = {}
    stages: list[list[Instruction]] = []
    for line in joined.splitlines():
        word, rest = line.split(None, 1)
        if word == "FROM":
            stages.append([])
        if stages:
            stages[-1].append((word, rest))
        else:
            assert word == "ARG", line
            name, _, value = rest.partition("=")
            arguments[name] = value
    return Dockerfile(arguments=arguments, stages=tuple(map(tuple, stages)))


def seconds(text: str) -> float:
    """A duration as Docker and compose write it."""
    match = re.fullmatch(r"(\d+)s", text)
    assert match is not None, text
    return float(match[1])


def docker_build(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run docker/build; nothing of this machine's environment but PATH gets to it."""
    return subprocess.run(
        [DOCKER / "build", *argv],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def tag(*argv: str, **environ: str) -> str:
    result = docker_build("tag", *argv, **environ)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def assert_understood(environment: Mapping[str, str]) -> None:
    """Every variable is comfyd's or boto3's, and comfyd's have values that it takes."""
    known = {variable.name: variable for variable in VARIABLES}
    for name, value in environment.items():
        if name.startswith("AWS_") or name in OF_OTHERS:
            continue
        assert name in known, f"comfyd has no variable {name}"
        if value:
            known[name].kind.parse(value)


@pytest.fixture
def api() -> Dockerfile:
    return read_dockerfile(DOCKER / "api.dockerfile")


@pytest.fixture
def comfyui() -> Dockerfile:
    return read_dockerfile(DOCKER / "comfyui.dockerfile")


@pytest.fixture
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return document


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    result = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_base_stands_on_a_pytorch_image_with_its_versions_in_the_tag(comfyui: Dockerfile) -> None:
    (_, base), *_ = comfyui.stages[0]
    assert re.fullmatch(
        r"pytorch/pytorch:\d+\.\d+\.\d+-cuda\d+\.\d+-cudnn\d+-runtime AS comfyui", comfyui.resolved(base)
    )


def test_every_version_of_the_base_is_a_build_argument_with_a_pinned_default(comfyui: Dockerfile) -> None:
    own = dict(rest.split("=", 1) for rest in comfyui.of("ARG"))
    assert re.fullmatch(r"\d+\.\d+\.\d+", own["COMFYUI_VERSION"])
    assert re.fullmatch(r"[0-9a-f]{40}", own["COMFYUI_REF"]), "a commit: a tag can be moved"
    assert re.fullmatch(r"\d+\.\d+\.\d+", own["COMFY_CLI_VERSION"])


def test_the_default_base_is_the_one_that_the_build_script_makes(api: Dockerfile) -> None:
    assert api.arguments == {"BASE_IMAGE": tag("base")}
    assert [rest for stage in api.stages for word, rest in stage if word == "FROM"] == [
        "${BASE_IMAGE} AS build",
        "${BASE_IMAGE} AS api",
    ]


def test_the_version_in_the_label_is_the_version_of_the_code(api: Dockerfile) -> None:
    assert f"API_VERSION={__version__}" in api.of("ARG")


@pytest.mark.parametrize("name", IMAGES)
def test_images_run_as_a_user_that_is_a_number_and_not_root(name: str) -> None:
    user = read_dockerfile(DOCKER / name).of("USER")[-1]
    assert re.fullmatch(r"([1-9]\d*):([1-9]\d*)", user), "Kubernetes' runAsNonRoot does not look names up"


def test_both_images_have_the_same_user(api: Dockerfile, comfyui: Dockerfile) -> None:
    assert api.of("USER")[-1] == comfyui.of("USER")[-1]


def test_only_comfyds_port_is_exposed(api: Dockerfile, comfyui: Dockerfile) -> None:
    assert api.of("EXPOSE") == [str(HttpConfig().port)]
    assert api.environment()["PORT"] == str(HttpConfig().port)
    assert comfyui.of("EXPOSE") == []
    (command,) = comfyui.of("CMD")
    assert '"--listen", "127.0.0.1"' in command


def test_the_healthcheck_is_a_command_that_comfyd_has(api: Dockerfile) -> None:
    (healthcheck,) = api.of("HEALTHCHECK")
    command = yaml.safe_load(healthcheck.split(" CMD ")[1])
    assert command == ["comfyd", "healthcheck"]
    subprocess.run([sys.executable, "-m", *command, "--help"], check=True, capture_output=True, timeout=30)


def test_a_container_that_still_starts_is_not_called_unhealthy(api: Dockerfile) -> None:
    (healthcheck,) = api.of("HEALTHCHECK")
    options = healthcheck.split(" CMD ")[0]
    given = dict(option.removeprefix("--").split("=") for option in options.split())
    environment = api.environment()
    budget = float(environment["STARTUP_CHECK_INTERVAL_S"]) * float(environment["STARTUP_CHECK_MAX_TRIES"])
    assert seconds(given["start-period"]) > budget


def test_variables_of_the_images_are_comfyds_and_have_values_that_it_takes(
    api: Dockerfile, comfyui: Dockerfile
) -> None:
    assert_understood(comfyui.environment())
    assert_understood(api.environment())
    assert api.environment()["BASE"] == ""
    assert api.environment()["COMFY_HOME"] == comfyui.environment()["COMFY_HOME"]


def test_the_state_folder_belongs_to_the_user(api: Dockerfile) -> None:
    state, owner = api.environment()["STATE_DIR"], api.of("USER")[-1]
    assert any(f"chown {owner} {state}" in run for run in api.of("RUN"))


def test_comfyds_python_is_not_on_path_where_comfyui_would_be_started_with_it(api: Dockerfile) -> None:
    assert "PATH" not in api.environment()
    assert any("ln -s /opt/comfyd/bin/comfyd /usr/local/bin/comfyd" in run for run in api.of("RUN"))


def test_packages_are_installed_by_hash_or_from_the_build_itself(api: Dockerfile) -> None:
    installs = [
        command
        for stage in api.stages
        for word, rest in stage
        if word == "RUN"
        for command in rest.split("&&")
        if "pip install" in command or "pip wheel" in command
    ]
    assert len(installs) == 4
    # What builds a package that has no wheel (pyvips) is pinned as well: isolated, pip would fetch the newest.
    assert all("--no-build-isolation" in each for each in installs if "pip wheel" in each)
    assert all("--require-hashes" in each or "--no-deps --no-index" in each for each in installs)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_no_secret_is_an_argument_or_a_variable_of_an_image(path: Path) -> None:
    found = re.findall(r"^\s*(?:ARG|ENV)\s+(\w*(?:SECRET|TOKEN|PASSWORD|_KEY)\w*)", path.read_text(), re.MULTILINE)
    assert found == []


def test_what_the_build_copies_is_let_into_the_context_and_nothing_else_is(api: Dockerfile) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[0] == "*"
    sources = {
        source.split("/")[0]
        for stage in api.stages
        for word, rest in stage
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_what_the_wheel_is_built_from_is_copied(api: Dockerfile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    copied = {word for stage in api.stages for keyword, rest in stage if keyword == "COPY" for word in rest.split()}
    assert {project["readme"], *project["license-files"], "pyproject.toml", "comfyd"} <= copied


def test_bytecode_of_this_machine_stays_out_of_the_context() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    last_let_in = max(index for index, rule in enumerate(rules) if rule.startswith("!"))
    assert {"**/__pycache__", "**/*.pyc"} <= set(rules[last_let_in + 1 :]), "the last rule that fits counts"


@pytest.mark.parametrize("variant", ["runtime", "devel"])
def test_names_follow_the_pattern_of_comfyui_apis_images(variant: str) -> None:
    assert re.fullmatch("comfyd:" + TAG.format(api=""), tag("base", variant))
    assert re.fullmatch("comfyd:" + TAG.format(api=rf"-api{re.escape(__version__)}"), tag("api", variant))
    assert tag("api", variant).endswith("-" + variant)


def test_versions_and_the_registry_come_from_the_environment() -> None:
    chosen = {
        "IMAGE": "registry.example:5000/team/comfyd",
        "COMFYUI_VERSION": "0.4.0",
        "TORCH_VERSION": "2.9.1",
        "CUDA_VERSION": "13.0",
    }
    expected = "registry.example:5000/team/comfyd:comfy0.4.0-torch2.9.1-cuda13.0-devel"
    assert tag("base", "devel", **chosen) == expected
    arguments = docker_build("arguments", "base", "devel", **chosen).stdout.splitlines()
    assert "COMFYUI_REF=v0.4.0" in arguments, "the pinned commit is another version's"


def test_the_pinned_commit_goes_with_the_pinned_version(comfyui: Dockerfile) -> None:
    arguments = docker_build("arguments", "base").stdout.splitlines()
    assert set(comfyui.of("ARG")) >= {line for line in arguments if line.startswith("COMFYUI_")}
    assert sum(line.startswith("COMFYUI_") for line in arguments) == 2


@pytest.mark.parametrize(
    "argv", [[], ["api/api"], ["tag"], ["tag", "all"], ["tag", "api", "runtime", "more"], ["push"]]
)
def test_a_call_that_makes_no_sense_is_answered_with_the_usage(argv: list[str]) -> None:
    result = docker_build(*argv)
    assert result.returncode == 2
    assert "docker/build base|api|all" in result.stderr


@pytest.mark.parametrize("argv", [[], ["rootfs"], ["rootfs", "wheels", "more"]])
def test_the_try_build_asks_for_what_it_needs_before_it_does_anything(argv: list[str]) -> None:
    result = subprocess.run([DOCKER / "try-build", *argv], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2
    assert "docker/try-build ROOTFS WHEELS" in result.stderr


def test_all_builds_the_base_and_then_what_stands_on_it(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    fake = tmp_path / "docker"
    fake.write_text('#!/bin/sh\necho "$@" >> "$CALLS"\n')
    fake.chmod(0o755)
    result = docker_build("all", "devel", "--pull", PATH=f"{tmp_path}:{os.environ['PATH']}", CALLS=str(calls))
    assert result.returncode == 0, result.stderr
    base, api = calls.read_text().splitlines()
    assert f"--file docker/comfyui.dockerfile --tag {tag('base', 'devel')}" in base
    assert "--build-arg VARIANT=devel" in base
    assert f"--file docker/api.dockerfile --tag {tag('api', 'devel')}" in api
    assert f"--build-arg BASE_IMAGE={tag('base', 'devel')}" in api
    assert base.endswith("--pull .")
    assert api.endswith("--pull .")


def test_a_base_that_cannot_be_built_ends_the_build(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    fake = tmp_path / "docker"
    fake.write_text('#!/bin/sh\necho "$@" >> "$CALLS"\nexit 3\n')
    fake.chmod(0o755)
    result = docker_build("all", PATH=f"{tmp_path}:{os.environ['PATH']}", CALLS=str(calls))
    assert result.returncode == 3
    assert len(calls.read_text().splitlines()) == 1


def test_the_example_for_ones_own_image_checks_what_it_downloads() -> None:
    example = read_dockerfile(DOCKER / "own-image.example.dockerfile")
    (add,) = example.of("ADD")
    assert "--checksum=sha256:${COMFYD_SHA256}" in add
    assert "COMFYD_SHA256" in example.of("ARG"), "no default: who builds has to have looked"
    assert f"COMFYD_VERSION={__version__}" in example.of("ARG")
    assert_understood(example.environment())
    assert len(example.last) < 12, "a few lines, as promised"


def test_composes_images_are_those_of_the_build_script(compose: dict[str, Any]) -> None:
    service = compose["services"]["comfyd"]
    assert service["image"] == f"${{COMFYD_IMAGE:-{tag('api')}}}"
    assert service["build"]["args"] == {"BASE_IMAGE": f"${{BASE_IMAGE:-{tag('base')}}}"}
    dockerfile = DOCKER / service["build"]["context"] / service["build"]["dockerfile"]
    assert dockerfile.resolve() == DOCKER / "api.dockerfile"


def test_compose_opens_comfyd_on_loopback_and_nothing_else(compose: dict[str, Any]) -> None:
    published = {name: service.get("ports", []) for name, service in compose["services"].items()}
    port = HttpConfig().port
    assert published == {"comfyd": [f"127.0.0.1:{port}:{port}"], "s3": [], "create-bucket": []}


def test_compose_waits_longer_than_comfyd_drains(compose: dict[str, Any]) -> None:
    service = compose["services"]["comfyd"]
    drain_s = float(service["environment"]["DRAIN_TIMEOUT_S"])
    stop_s = float(service["environment"]["COMFYUI_STOP_GRACE_S"])
    assert drain_s == JobsConfig().drain_timeout_s
    assert stop_s == attrs.fields(EngineConfig).stop_grace_s.default
    assert seconds(service["stop_grace_period"]) > drain_s + stop_s


def test_composes_variables_are_comfyds(compose: dict[str, Any]) -> None:
    assert_understood(compose["services"]["comfyd"]["environment"])


def test_composes_keys_are_chosen_by_who_starts_it(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        keys = {name: value for name, value in service["environment"].items() if name.endswith("_KEY")}
        assert keys
        assert all(re.fullmatch(r"\$\{AWS_\w+:\?.+\}", value) for value in keys.values()), keys


def test_composes_state_is_on_a_volume_that_it_declares(compose: dict[str, Any], api: Dockerfile) -> None:
    mounts = dict(volume.rsplit(":", 1)[::-1] for volume in compose["services"]["comfyd"]["volumes"])
    assert mounts[api.environment()["STATE_DIR"]] in compose["volumes"]


def test_composes_s3_server_is_pinned_and_waited_for(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert re.fullmatch(r"[\w/]+:v\d+\.\d+\.\d+", services["s3"]["image"])
    assert services["create-bucket"]["depends_on"] == {"s3": {"condition": "service_healthy"}}
    assert services["comfyd"]["depends_on"] == {"create-bucket": {"condition": "service_completed_successfully"}}


def test_composes_bucket_is_created_once_and_found_the_next_time(
    compose: dict[str, Any], moto: Peer, bucket: str
) -> None:
    service = compose["services"]["create-bucket"]
    python, *argv = service["command"]
    assert python == "/opt/comfyd/bin/python"
    region = service["environment"]["AWS_REGION"]
    environ = {**os.environ, **moto.environment(AWS_REGION=region, BUCKET=bucket)}
    for _ in range(2):
        subprocess.run([sys.executable, *argv], env=environ, check=True, timeout=60)
    with moto.client() as client:
        assert bucket in {each["Name"] for each in client.list_buckets()["Buckets"]}


@pytest.mark.parametrize("path", [DOCKER / "README.md", DOCKER / "compose.yaml"], ids=lambda path: path.name)
def test_no_name_of_an_image_is_out_of_date(path: Path) -> None:
    named = set(re.findall(r"comfyd:comfy[\w.-]+-(?:runtime|devel)", path.read_text()))
    assert named
    assert named <= {tag(what, variant) for what in ("base", "api") for variant in ("runtime", "devel")}
