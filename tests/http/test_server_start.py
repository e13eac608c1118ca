"""Listening: addresses, ports, socket options, and the reasons why it cannot be."""

import errno
import socket
from functools import partial
from typing import Any

import pytest
import trio
from http_server_kit import assert_answers, quart_app, quick_config, raw_app, serving

from comfyd.errors import StartupFailed
from comfyd.http.server import pins, serve_http, sockets


async def start(app: Any, **changes: Any) -> None:
    """Start and stop; what goes wrong is raised bare, as the daemon sees it."""
    stop = trio.Event()
    stop.set()
    with trio.fail_after(5):
        await serve_http(app, quick_config(**changes), stop)


@pytest.mark.parametrize(
    ("host", "url"), [("::", "http://[::1]:"), ("0.0.0.0", "http://127.0.0.1:"), ("localhost", "http://localhost:")]
)
async def test_the_url_is_where_this_machine_reaches_the_server(host: str, url: str) -> None:
    async with serving(raw_app(), quick_config(host=host)) as server:
        assert server.url.startswith(url)
        assert not server.url.endswith(":0")
        await assert_answers(server)


async def test_two_colons_listen_on_both_families() -> None:
    async with serving(raw_app(), quick_config(host="::")) as server:
        for address in ("127.0.0.1", "::1"):
            async with await trio.open_tcp_stream(address, server.port) as stream:
                await stream.send_all(b"GET /hello HTTP/1.1\r\nHost: test\r\n\r\n")
                assert (await stream.receive_some(4096)).startswith(b"HTTP/1.1 200")


async def test_without_ipv6_two_colons_mean_every_ipv4_address(
    monkeypatch: pytest.MonkeyPatch, log_output: Any
) -> None:
    monkeypatch.setattr(sockets, "_has_ipv6", lambda: False)  # this machine has it
    listeners = await sockets.open_listeners(quick_config(host="::"))
    assert [listener.socket.getsockname()[0] for listener in listeners] == ["0.0.0.0"]
    assert sockets.base_url(quick_config(host="::"), listeners[0]).startswith("http://127.0.0.1:")
    assert [entry["event"] for entry in log_output.entries] == ["http.no_ipv6"]
    for listener in listeners:
        await listener.aclose()


def test_ipv6_is_missing_when_no_socket_of_it_can_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    assert sockets._has_ipv6()
    monkeypatch.setattr(socket, "socket", refuse)
    assert not sockets._has_ipv6()


async def test_a_port_in_use_is_named() -> None:
    async with serving(raw_app()) as server:
        with pytest.raises(StartupFailed, match=rf"127\.0\.0\.1:{server.port}: Address already in use"):
            await start(raw_app(), port=server.port)
        await assert_answers(server)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
async def test_an_address_of_another_machine_is_named(host: str) -> None:
    with pytest.raises(StartupFailed, match=f"{host}:0: Cannot assign requested address"):
        await start(raw_app(), host=host)


async def test_a_host_that_does_not_exist_is_named() -> None:
    with pytest.raises(StartupFailed, match=r"no-such-host\.invalid:0: "):
        await start(raw_app(), host="no-such-host.invalid")


async def test_a_port_can_be_taken_again_at_once() -> None:
    async with serving(raw_app()) as server:
        port = server.port
        await assert_answers(server)
    async with serving(raw_app(), quick_config(port=port)) as server:
        await assert_answers(server)


async def test_accepted_sockets_have_the_options_that_find_dead_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    listeners = await sockets.open_listeners(quick_config(user_timeout_s=30))
    async with listeners[0], await trio.open_tcp_stream(*listeners[0].socket.getsockname()):
        stream = await listeners[0].accept()
        async with stream:
            for level, option, wanted in [
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, sockets.KEEPALIVE_IDLE_S),
            ]:
                assert stream.getsockopt(level, option) == wanted


async def test_an_app_that_cannot_start_is_a_startup_failure_and_leaves_no_socket() -> None:
    app = quart_app()

    @app.before_serving
    async def fail() -> None:
        raise LookupError("no such thing")

    with pytest.raises(StartupFailed, match="no such thing"):
        await start(app)


async def test_an_app_that_starts_for_ever_is_given_up() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep_forever()

    with pytest.raises(StartupFailed, match="too long"):
        await start(app, lifespan_startup_timeout_s=0.1)


async def test_connections_see_the_state_of_the_lifespan() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            scope["state"]["pool"] = "a pool"
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        seen.append(scope["state"]["pool"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})

    async with serving(app) as server:
        await assert_answers(server)
    assert seen == ["a pool"]


def test_untested_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "version", lambda package: "9.9.9")
    with pytest.raises(ImportError, match=r"made for hypercorn 0\.18\.0, but 9\.9\.9 is installed"):
        pins.check(["hypercorn"], [])


def test_a_missing_private_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pins.NEEDED_NAMES, "hypercorn.config", ("Config.no_such_thing",))
    with pytest.raises(ImportError, match=r"hypercorn\.config\.Config\.no_such_thing"):
        pins.check([], ["hypercorn.config"])


def test_what_is_installed_passes() -> None:
    partial(pins.check, pins.TESTED_VERSIONS, pins.NEEDED_NAMES)()
