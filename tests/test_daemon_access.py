"""The whole daemon behind keys, with metrics on a port of their own, over TLS, and for browsers."""

import re
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from daemon_support import free_port, picture, problem, running_daemon

KEY = "a-key-of-enough-characters"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    files = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "2"]
    subprocess.run(
        [*command, "-out", files[0], "-keyout", files[1], *names], check=True, capture_output=True, timeout=30
    )
    return files


def test_with_keys_only_who_shows_one_is_served_and_probes_and_metrics_stay_open(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path, environ={"API_KEYS": f"another-key-of-16-characters,{KEY}"}) as daemon,
        httpx.Client(base_url=daemon.url, trust_env=False, timeout=20) as client,
    ):
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200
        for path in ("/jobs", "/models", "/workflows", "/nothing"):
            problem(client.get(path), 401, "unauthorized")
        problem(client.post("/prompt", json={"prompt": picture()}), 401, "unauthorized")
        problem(client.get("/jobs", headers={"x-api-key": "wrong"}), 401, "unauthorized")
        answer = client.post("/prompt", json={"prompt": picture()}, headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200
        assert client.get("/jobs", headers={"x-api-key": KEY}).status_code == 200
    assert KEY not in str(daemon.log)


def test_metrics_on_a_port_of_their_own_are_not_on_the_other(tmp_path: Path) -> None:
    port = free_port()
    with (
        running_daemon(tmp_path, environ={"METRICS_PORT": str(port), "API_KEYS": KEY}) as daemon,
        httpx.Client(trust_env=False, timeout=20) as client,
    ):
        problem(client.get(f"{daemon.url}/metrics", headers={"x-api-key": KEY}), 404, "not-found")
        answer = client.post(
            f"{daemon.url}/prompt", json={"prompt": picture()}, headers={"authorization": f"Bearer {KEY}"}
        )
        assert answer.status_code == 200
        told = client.get(f"http://127.0.0.1:{port}/metrics").text
        assert re.search(r'^comfyd_jobs_ended_total\{outcome="succeeded",workflow=""\} 1', told, re.MULTILINE), told
        assert re.search(r"^comfyd_queue_depth 0", told, re.MULTILINE)
        assert client.get(f"http://127.0.0.1:{port}/ready").status_code == 200
        assert client.get(f"http://127.0.0.1:{port}/jobs").status_code == 404


def test_over_tls_everything_is_the_same(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    environ = {"TLS_CERT_FILE": str(cert), "TLS_KEY_FILE": str(key)}
    with running_daemon(tmp_path, environ=environ, ready=False) as daemon:
        context = ssl.create_default_context(cafile=str(cert))
        url = f"https://localhost:{daemon.port}"
        with httpx.Client(verify=context, trust_env=False, timeout=20) as client:
            daemon.log.wait_for("engine.up")
            while client.get(f"{url}/ready").status_code != 200:
                pass
            answer = client.post(f"{url}/prompt", json={"prompt": picture()})
            assert answer.status_code == 200
            assert len(answer.json()["images"]) == 1
        plain = httpx.get(f"http://localhost:{daemon.port}/ready", trust_env=False)
        assert plain.status_code == 400


def test_a_page_of_an_allowed_origin_may_call_and_another_may_not(tmp_path: Path) -> None:
    environ = {"CORS_ORIGINS": "https://app.example.com", "API_KEYS": KEY}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,x-api-key"}
    with (
        running_daemon(tmp_path, environ=environ) as daemon,
        httpx.Client(base_url=daemon.url, trust_env=False, timeout=20) as client,
    ):
        allowed = client.options("/prompt", headers={"origin": "https://app.example.com", **asked})
        assert allowed.status_code in {200, 204}
        assert allowed.headers["access-control-allow-origin"] == "https://app.example.com"
        refused = client.options("/prompt", headers={"origin": "https://evil.example.com", **asked})
        assert "access-control-allow-origin" not in refused.headers
