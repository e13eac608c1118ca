"""``GET /metrics``: the format that is asked for, packed where that is taken."""

import gzip
from typing import Any

import pytest
import trio
from metrics_kit import make_scene, samples

from comfyd.http.asgi import Exchange
from comfyd.http.metrics import MetricsEndpoint, prefers_openmetrics, takes_gzip

PROMETHEUS = (  # 3.5's own
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


async def ask(method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message)

    async def receive() -> Any:
        await trio.sleep_forever()

    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope: Any = {"type": "http", "method": method, "path": "/metrics", "headers": fields}
    with trio.fail_after(10):
        await MetricsEndpoint(make_scene().metrics)(Exchange(scope, receive, send))
    start, *bodies = sent
    body = b"".join(message["body"] for message in bodies)
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, body


async def test_by_default_it_is_the_text_format() -> None:
    status, headers, body = await ask()
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert headers["cache-control"] == "no-store"
    assert int(headers["content-length"]) == len(body)
    assert samples(body.decode())["comfyd_ready"] == 1


async def test_prometheus_gets_openmetrics_packed() -> None:
    status, headers, body = await ask(accept=PROMETHEUS, accept_encoding="gzip")
    assert (status, headers["content-encoding"]) == (200, "gzip")
    assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert int(headers["content-length"]) == len(body)
    assert gzip.decompress(body).endswith(b"# EOF\n")


async def test_another_method_is_refused() -> None:
    status, headers, _ = await ask("POST")
    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("text/html,application/xhtml+xml,*/*;q=0.8", False),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; version=1.0.0", True),
        (PROMETHEUS, True),
        ("application/openmetrics-text;q=0.1, text/plain", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=nonsense, */*", False),
        ('application/openmetrics-text;x=",text/plain";q=0.5', True),
    ],
)
def test_the_format_is_the_one_that_ranks_higher(accept: str, wanted: bool) -> None:
    assert prefers_openmetrics(accept) is wanted


@pytest.mark.parametrize(
    ("field", "taken"),
    [("", False), ("identity", False), ("gzip", True), ("br, gzip;q=0.5", True), ("gzip;q=0, *", False), ("*", True)],
)
def test_gzip_is_sent_to_whom_takes_it(field: str, taken: bool) -> None:
    assert takes_gzip(field) is taken
