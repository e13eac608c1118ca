"""Cross-origin requests: named origins may read, all others are answered without the permission."""

from typing import Any

import pytest
from http_server_kit import raw_app, read_all, serving, status_of, websocket_request

from comfyd.http.cors import Cors, parse_origin

APP = "https://app.example"


async def answered(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        headers = [(b"content-length", b"2"), (b"vary", b"Accept"), (b"location", b"/jobs/1")]
        await send({"type": "http.response.start", "status": 202, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})


async def ask(origins: list[str], *headers: str, method: str = "GET") -> tuple[int, list[tuple[str, str]]]:
    """Status and headers of the answer, names in lower case."""
    async with serving(Cors(answered, origins)) as server, await server.connect() as stream:
        lines = [f"{method} /jobs HTTP/1.1", "Host: test", "Connection: close", *headers, "", ""]
        await stream.send_all("\r\n".join(lines).encode())
        answer = await read_all(stream)
    head = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return status_of(answer), [(line.partition(": ")[0].lower(), line.partition(": ")[2]) for line in head]


def cors_of(headers: list[tuple[str, str]]) -> dict[str, str]:
    return {name: value for name, value in headers if name.startswith("access-control-")}


def vary_of(headers: list[tuple[str, str]]) -> list[str]:
    return [value for name, value in headers if name == "vary"]


PREFLIGHT = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type, x-api-key")


async def test_a_named_origin_may_read_and_use_the_browsers_credentials() -> None:
    status, headers = await ask(["https://other.example", APP], f"Origin: {APP}")
    assert status == 202
    cors = cors_of(headers)
    exposed = cors.pop("access-control-expose-headers").split(", ")
    assert cors == {"access-control-allow-origin": APP, "access-control-allow-credentials": "true"}
    wanted = {"Location", "Retry-After", "Preference-Applied", "Link", "ETag", "Content-Range"}
    assert wanted <= set(exposed)
    assert vary_of(headers) == ["Accept", "Origin"]


@pytest.mark.parametrize(
    "origin",
    [
        "https://app.example.evil",
        "http://app.example",
        "https://app.example:444",
        "https://APP.example",
        "null",
        "*",
        "https://app.example, https://evil.example",
        "https://evil.example?https://app.example",
        "",
    ],
)
async def test_another_origin_gets_the_answer_without_the_permission(origin: str) -> None:
    status, headers = await ask([APP], f"Origin: {origin}")
    assert status == 202
    assert cors_of(headers) == {}
    assert vary_of(headers) == ["Accept", "Origin"], "a cache must not give this answer to the named one"


async def test_without_an_origin_caches_are_told_all_the_same() -> None:
    _, headers = await ask([APP])
    assert cors_of(headers) == {}
    assert vary_of(headers) == ["Accept", "Origin"]


@pytest.mark.parametrize("origins", [["*"], ["*", APP]])
async def test_any_origin_may_read_but_never_with_credentials(origins: list[str]) -> None:
    _, headers = await ask(origins, f"Origin: {APP}")
    cors = cors_of(headers)
    assert cors["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in cors
    assert "Location" in cors["access-control-expose-headers"]
    assert vary_of(headers) == ["Accept"], "the answer is the same for all"
    _, headers = await ask(origins, f"Origin: {APP}", *PREFLIGHT, method="OPTIONS")
    assert "access-control-allow-credentials" not in cors_of(headers)


async def test_a_preflight_is_answered_without_the_app() -> None:
    status, headers = await ask([APP], f"Origin: {APP}", *PREFLIGHT, method="OPTIONS")
    assert status == 204
    assert cors_of(headers) == {
        "access-control-allow-origin": APP,
        "access-control-allow-credentials": "true",
        "access-control-allow-methods": "GET, HEAD, POST, DELETE",
        "access-control-allow-headers": "content-type, x-api-key",
        "access-control-max-age": "7200",
    }
    assert vary_of(headers) == ["Origin"]


async def test_a_preflight_of_another_origin_is_answered_with_nothing_and_logged(log_output: Any) -> None:
    status, headers = await ask([APP], "Origin: https://evil.example", *PREFLIGHT, method="OPTIONS")
    assert status == 204
    assert cors_of(headers) == {}
    refused = [entry for entry in log_output.entries if entry["event"] == "http.cors_refused"]
    assert [entry["origin"] for entry in refused] == ["https://evil.example"]


@pytest.mark.parametrize(
    "names", ["x\x01y", "a b", "a,,b", ",", "a;b", '"a"', "x" * 5000 + " y"], ids=lambda names: repr(names)[:10]
)
async def test_header_names_that_are_none_are_not_echoed(names: str) -> None:
    status, headers = await ask(
        [APP],
        f"Origin: {APP}",
        "Access-Control-Request-Method: POST",
        f"Access-Control-Request-Headers: {names}",
        method="OPTIONS",
    )
    assert status in {204, 400}
    assert "access-control-allow-headers" not in cors_of(headers)


async def test_options_that_is_no_preflight_goes_to_the_app() -> None:
    assert (await ask([APP], f"Origin: {APP}", method="OPTIONS"))[0] == 202
    assert (await ask([APP], *PREFLIGHT, method="OPTIONS"))[0] == 202


async def test_websockets_pass() -> None:
    async with serving(Cors(raw_app(), [APP])) as server, await server.connect() as stream:
        await stream.send_all(websocket_request(b"/ws", b"Origin: https://evil.example"))
        assert status_of(await stream.receive_some(65536)) == 101


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://app.example", APP),
        (" HTTPS://App.Example/ ", APP),
        ("https://app.example:443", APP),
        ("http://app.example:80", "http://app.example"),
        ("http://app.example:443", "http://app.example:443"),
        ("http://localhost:5173", "http://localhost:5173"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("*", "*"),
    ],
)
def test_origins_are_read_into_the_form_that_browsers_send(text: str, origin: str) -> None:
    assert parse_origin(text) == origin


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "app.example",
        "//app.example",
        "ftp://app.example",
        "https://",
        "https://app.example/path",
        "**",
        "https://*.example",
        "https://a b.example",
        "https://user@app.example",
        "https://app.example?x",
        "https://app#x",
        "https://app.example:port",
        "https://app.example:99999",
        "https://[::1",
        "https://app.example\\x",
    ],
)
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an origin such as"):
        parse_origin(text)


def test_no_origins_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="origins must be given"):
        Cors(answered, [])
