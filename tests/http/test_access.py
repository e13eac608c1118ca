"""API keys: who has none gets 401 before a byte of the body is read; which routes are open, and on which port."""

import hashlib
import hmac
import json
from typing import Any

import pytest
import trio
from http_server_kit import (
    Watched,
    assert_answers,
    quart_app,
    quick_config,
    raw_app,
    read_all,
    read_until,
    serving,
    status_of,
    websocket_request,
)

from comfyd.http.access import OPEN_ROUTES, MetricsElsewhere, OpenRoutesOnly, RequireKey, guard_app
from comfyd.http.cors import Cors

KEYS = ("first-key-of-two", "second key, schlüssel")


async def echo_path(scope: Any, receive: Any, send: Any) -> None:
    """Answers every request with its path."""
    if scope["type"] == "lifespan":
        return
    body = scope["path"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def ask(app: Any, path: str, *headers: str, method: str = "GET") -> bytes:
    """The whole answer to one request."""
    async with serving(app) as server, await server.connect() as stream:
        lines = [f"{method} {path} HTTP/1.1", "Host: test", "Connection: close", *headers, "", ""]
        await stream.send_all("\r\n".join(lines).encode())
        return await read_all(stream)


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer first-key-of-two",
        "authorization: bearer first-key-of-two",
        "Authorization: BEARER   first-key-of-two ",
        "X-API-Key: first-key-of-two",
        "x-api-key:first-key-of-two",
        "X-API-Key: second key, schlüssel",
    ],
)
async def test_each_key_opens_in_either_header(header: str) -> None:
    assert (await ask(RequireKey(echo_path, KEYS), "/jobs", header)).endswith(b"\r\n\r\n/jobs")


async def test_a_key_opens_beside_somebody_elses_authorization() -> None:
    """A proxy in front may want Basic for itself; a wrong bearer beside a right key harms nobody."""
    for other in ("Authorization: Basic Zm9vOmJhcg==", "Authorization: Bearer wrong"):
        assert status_of(await ask(RequireKey(echo_path, KEYS), "/jobs", other, f"X-API-Key: {KEYS[0]}")) == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Authorization: "],
        ["Authorization: Bearer"],
        ["Authorization: Bearer "],
        ["Authorization: first-key-of-two"],
        ["Authorization: Basic first-key-of-two"],
        ["Authorization: Bearer first-key-of-tw"],
        ["Authorization: Bearer first-key-of-two2"],
        ["Authorization: Bearer First-Key-Of-Two"],
        ["Authorization: Bearer first-key-of-two,second key, schlüssel"],
        ["Authorization: Bearer " + hashlib.sha256(KEYS[0].encode()).hexdigest()],
        ["X-API-Key: "],
        ["X-API-Key: wrong"],
        ["X-API-Key: wrong", "X-API-Key: first-key-of-two"],
        ["Api-Key: first-key-of-two"],
        ["Cookie: api_key=first-key-of-two"],
    ],
)
async def test_anything_else_is_refused(headers: list[str]) -> None:
    answer = await ask(RequireKey(echo_path, KEYS), "/jobs", *headers)
    assert status_of(answer) == 401
    assert b"/jobs" not in answer


async def test_a_key_in_the_query_is_none() -> None:
    """It would end up in the logs of everything on the way."""
    assert status_of(await ask(RequireKey(echo_path, KEYS), f"/jobs?api_key={KEYS[0]}")) == 401


async def test_the_refusal_is_a_problem_document_with_a_challenge() -> None:
    head, _, body = (await ask(RequireKey(echo_path, KEYS), "/jobs")).partition(b"\r\n\r\n")
    document = json.loads(body)
    assert document["type"] == "unauthorized"
    assert document["status"] == 401
    assert "X-API-Key" in document["detail"]
    lines = head.lower().split(b"\r\n")
    assert b"content-type: application/problem+json" in lines
    assert b"www-authenticate: bearer" in lines
    assert b"cache-control: no-store" in lines
    wrong = await ask(RequireKey(echo_path, KEYS), "/jobs", "X-API-Key: wrong")
    assert b'www-authenticate: bearer error="invalid_token"' in wrong.lower().split(b"\r\n")


@pytest.mark.parametrize("path", sorted(OPEN_ROUTES))
async def test_probes_and_metrics_are_open(path: str) -> None:
    assert status_of(await ask(RequireKey(echo_path, KEYS), path)) == 200
    assert status_of(await ask(RequireKey(echo_path, KEYS), path + "?x=1", "Authorization: Bearer wrong")) == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs/json",
        "/openapi.json",
        "/prompt",
        "/health/",
        "//health",
        "/Health",
        "/health%2f..%2fjobs",
        "/ready/../jobs",
        "/metrics/x",
        "/metrics;/jobs",
        "/health%00",
        "/jobs?/health",
        "http://host/jobs",
    ],
)
async def test_nothing_else_is(path: str) -> None:
    assert status_of(await ask(RequireKey(echo_path, KEYS), path)) == 401


@pytest.mark.parametrize("method", ["POST", "DELETE", "HEAD", "OPTIONS", "PATCH", "BREW"])
async def test_every_method_needs_a_key(method: str) -> None:
    assert status_of(await ask(RequireKey(echo_path, KEYS), "/jobs", method=method)) == 401


@pytest.mark.parametrize("kind", ["raw", "quart"])
async def test_who_asks_before_sending_a_body_never_sends_it(kind: str) -> None:
    inner: Any = raw_app() if kind == "raw" else quart_app()
    async with serving(RequireKey(inner, KEYS)) as server, await server.connect() as stream:
        await stream.send_all(
            b"POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 90000\r\nExpect: 100-continue\r\n\r\n"
        )
        answer = await read_all(stream)
        assert status_of(answer) == 401, "no 100 before it"
        assert b"connection: close" in answer.lower(), "nobody could tell whether the body follows"


async def test_who_sends_the_body_at_once_is_refused_and_may_go_on() -> None:
    key = f"X-API-Key: {KEYS[0]}".encode()
    async with serving(RequireKey(raw_app(), KEYS)) as server, await server.connect() as stream:
        for _ in range(2):
            body = b"x" * 90_000
            await stream.send_all(b"POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 90000\r\n\r\n" + body)
            assert status_of(await read_until(stream, b"}")) == 401
        await stream.send_all(b"POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n" + key + b"\r\n\r\nok")
        assert status_of(await read_until(stream, b"ok")) == 200


async def test_the_app_behind_hears_nothing_of_who_is_refused() -> None:
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append(scope["type"])

    await ask(RequireKey(app, KEYS), "/jobs")
    assert heard == ["lifespan"]


async def test_websockets_need_a_key_too() -> None:
    watched = Watched()
    async with serving(RequireKey(raw_app(watched), KEYS)) as server:
        async with await server.connect() as stream:
            await stream.send_all(websocket_request())
            answer = await read_all(stream)
            assert status_of(answer) == 401
            assert b'"unauthorized"' in answer
        async with await server.connect() as stream:
            await stream.send_all(websocket_request(b"/ws", f"X-API-Key: {KEYS[0]}".encode()))
            assert status_of(await read_until(stream, b"\r\n\r\n")) == 101
    assert watched.received[0]["type"] == "websocket.connect"


async def test_no_key_is_ever_logged(log_output: Any) -> None:
    await ask(RequireKey(echo_path, KEYS), "/jobs", f"X-API-Key: {KEYS[0]}")
    await ask(RequireKey(echo_path, KEYS), f"/jobs?api_key={KEYS[0]}", f"Authorization: Bearer {KEYS[0]}x")
    refused = [entry for entry in log_output.entries if entry["event"] == "http.unauthorized"]
    assert [(entry["path"], entry["key_shown"]) for entry in refused] == [("/jobs", True)]
    assert KEYS[0] not in repr(log_output.entries)


@pytest.mark.parametrize("keys", [[], [""], ["key", ""]])
def test_no_key_or_an_empty_one_is_a_mistake(keys: list[str]) -> None:
    with pytest.raises(ValueError, match="keys must be given"):
        RequireKey(echo_path, keys)


async def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that it takes must not tell which one it was, nor how much of it was right."""
    compared: list[tuple[bytes, bytes]] = []

    def note(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", note)
    for key in (*KEYS, "wrong"):
        compared.clear()
        await ask(RequireKey(echo_path, KEYS), "/jobs", f"X-API-Key: {key}")
        assert len(compared) == 2
        assert {len(digest) for pair in compared for digest in pair} == {32}, "digests, not keys"


# -- ports


async def test_with_a_port_of_their_own_the_metrics_are_not_on_the_main_one() -> None:
    app = MetricsElsewhere(echo_path)
    assert status_of(await ask(app, "/metrics")) == 404
    for path in ("/health", "/ready", "/jobs"):
        assert status_of(await ask(app, path)) == 200


async def test_the_port_of_the_metrics_has_them_and_the_probes_only() -> None:
    app = OpenRoutesOnly(echo_path)
    for path in sorted(OPEN_ROUTES):
        assert (await ask(app, path)).endswith(path.encode())
    for path in ("/", "/jobs", "/prompt", "/docs", "/metrics/"):
        answer = await ask(app, path, f"X-API-Key: {KEYS[0]}")
        assert status_of(answer) == 404
        assert b'"not-found"' in answer
    async with serving(app) as server, await server.connect() as stream:
        await stream.send_all(websocket_request(b"/metrics"))
        assert status_of(await read_all(stream)) == 404


async def test_the_app_lives_on_its_main_port_only() -> None:
    lives: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            lives.append("began")
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            lives.append("ended")
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await echo_path(scope, receive, send)

    guarded = guard_app(app, api_keys=KEYS, cors_origins=["*"], metrics_elsewhere=True)
    async with serving(guarded), serving(OpenRoutesOnly(app)):
        assert lives == ["began"]
    assert lives == ["began", "ended"]


# -- together


def test_without_configuration_nothing_is_put_around_the_app() -> None:
    app = raw_app()
    assert guard_app(app) is app


def test_bodies_are_bounded_by_who_says_so() -> None:
    quart, raw = quart_app(), raw_app()
    for wrap in (
        lambda app: guard_app(app, api_keys=KEYS),
        lambda app: guard_app(app, cors_origins=["*"]),
        lambda app: guard_app(app, metrics_elsewhere=True),
        lambda app: guard_app(app, api_keys=KEYS, cors_origins=["*"], metrics_elsewhere=True),
        OpenRoutesOnly,
    ):
        assert getattr(wrap(quart), "bounds_bodies") is True  # noqa: B009 -- ASGI apps need not have it
        assert getattr(wrap(raw), "bounds_bodies") is False  # noqa: B009


async def test_a_page_may_ask_without_a_key_and_read_that_it_needs_one() -> None:
    app = guard_app(echo_path, api_keys=KEYS, cors_origins=["https://app.example"], metrics_elsewhere=True)
    assert isinstance(app, Cors)
    origin = "Origin: https://app.example"
    preflight = await ask(app, "/jobs", origin, "Access-Control-Request-Method: GET", method="OPTIONS")
    assert status_of(preflight) == 204
    refused = await ask(app, "/jobs", origin)
    assert status_of(refused) == 401
    assert b"access-control-allow-origin: https://app.example" in refused.lower()
    assert status_of(await ask(app, "/jobs", origin, method="OPTIONS")) == 401, "no preflight"
    assert status_of(await ask(app, "/metrics")) == 404
    assert status_of(await ask(app, "/jobs", origin, f"X-API-Key: {KEYS[1]}")) == 200


# -- what the server does for it


async def test_an_app_that_takes_its_time_does_not_cost_its_client_the_request() -> None:
    """A client that waits to be told to send the body is not slow; the body's time limit begins when it is told."""
    gate = trio.Event()
    served = raw_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/echo":
            await gate.wait()
        await served(scope, receive, send)

    config = quick_config(body_timeout_s=0.2)
    async with serving(app, config) as server, await server.connect() as stream:
        await stream.send_all(b"POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        with trio.move_on_after(0.5) as silence:
            await stream.receive_some(1)
        assert silence.cancelled_caught, "neither 100 nor 408"
        gate.set()
        assert status_of(await read_until(stream, b"\r\n\r\n")) == 100
        await stream.send_all(b"body")
        assert status_of(await read_until(stream, b"body")) == 200
        await stream.send_all(b"POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert status_of(await read_until(stream, b"\r\n\r\n")) == 100
        assert status_of(await read_all(stream)) == 408, "told, and then silent"
        await assert_answers(server)


async def test_a_body_that_comes_unasked_is_taken() -> None:
    async with serving(raw_app()) as server, await server.connect() as stream:
        for _ in range(2):
            head = b"POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
            await stream.send_all(head + b"body")
            assert b"HTTP/1.1 200 " in await read_until(stream, b"body")
