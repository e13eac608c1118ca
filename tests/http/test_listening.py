"""Sockets that systemd opened, Unix sockets, and a second port for the metrics."""

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import trio
from http_server_kit import (
    GOOD_REQUEST,
    TOO_LONG_S,
    ask_hello,
    quart_app,
    quick_config,
    raw_app,
    read_all,
    serving,
    status_of,
)

from comfyd.host.socket_activation import InheritedSocket
from comfyd.http.access import OpenRoutesOnly, guard_app
from comfyd.http.server import HttpServerConfig, TlsFiles, serve_http, sockets

APPS = {"raw": raw_app, "quart": quart_app}
both = pytest.mark.parametrize("kind", APPS)


def listening(family: socket.AddressFamily, address: Any) -> InheritedSocket:
    """A socket as systemd hands it over."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.bind(address)
    sock.listen(64)
    sock.setblocking(False)
    return InheritedSocket(name="http", socket=sock)


@pytest.fixture
def tcp() -> Iterator[InheritedSocket]:
    inherited = listening(socket.AF_INET, ("127.0.0.1", 0))
    yield inherited
    inherited.socket.close()


@pytest.fixture
def unix(tmp_path: Path) -> Iterator[InheritedSocket]:
    inherited = listening(socket.AF_UNIX, str(tmp_path / "comfyd.sock"))
    yield inherited
    inherited.socket.close()


def unix_path_is_there(path: str) -> bool:
    return Path(path).is_socket()


@asynccontextmanager
async def serving_on(
    app: Any, *inherited: InheritedSocket, config: HttpServerConfig | None = None
) -> AsyncIterator[str]:
    """A server on inherited sockets; its URL."""
    stop = trio.Event()
    with trio.fail_after(TOO_LONG_S):
        async with trio.open_nursery() as nursery:

            async def run(**started: Any) -> None:
                await serve_http(
                    app, config or quick_config(host="::", port=3000), stop, inherited=inherited, **started
                )

            yield await nursery.start(run)
            stop.set()


@both
async def test_an_inherited_socket_is_served_in_place_of_host_and_port(kind: str, tcp: InheritedSocket) -> None:
    port = tcp.socket.getsockname()[1]
    async with serving_on(APPS[kind](), tcp) as url:
        assert url == f"http://127.0.0.1:{port}", "where it is bound, not where the configuration says"
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await ask_hello(stream)
    assert tcp.socket.fileno() == -1, "closed with the server"


async def test_who_connected_before_the_start_is_served(tcp: InheritedSocket) -> None:
    """The point of socket activation: clients wait in the backlog while nobody runs."""
    async with await trio.open_tcp_stream(*tcp.socket.getsockname()) as stream:
        await stream.send_all(GOOD_REQUEST)
        async with serving_on(raw_app(), tcp):
            assert status_of(await stream.receive_some(65536)) == 200


async def test_inherited_tcp_sockets_get_the_options_that_find_dead_peers(tcp: InheritedSocket) -> None:
    sockets.adopt_listeners([tcp], quick_config(user_timeout_s=30))
    assert tcp.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
    assert tcp.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


@pytest.mark.parametrize(
    ("family", "bound", "host"),
    [
        (socket.AF_INET, "0.0.0.0", "127.0.0.1"),
        (socket.AF_INET6, "::", "[::1]"),
        (socket.AF_INET6, "::1", "[::1]"),
        (socket.AF_INET, "127.0.0.2", "127.0.0.2"),
    ],
)
async def test_the_url_of_an_inherited_socket_reaches_it(family: socket.AddressFamily, bound: str, host: str) -> None:
    inherited = listening(family, (bound, 0))
    async with serving_on(raw_app(), inherited) as url:
        assert url == f"http://{host}:{inherited.socket.getsockname()[1]}"
        async with await trio.open_tcp_stream(host.strip("[]"), int(url.rpartition(":")[2])) as stream:
            await ask_hello(stream)


@both
async def test_a_unix_socket_is_served(kind: str, unix: InheritedSocket) -> None:
    path = unix.socket.getsockname()
    async with serving_on(APPS[kind](), unix) as url:
        assert unquote(url.removeprefix("http+unix://")) == path
        async with await trio.open_unix_socket(path) as stream:
            for _ in range(2):
                await ask_hello(stream)
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(b"\x00garbage\r\n\r\n")
            assert status_of(await read_all(stream)) == 400
    assert unix_path_is_there(path), "it is systemd's, who goes on listening on it"


async def test_clients_of_a_unix_socket_have_no_address(unix: InheritedSocket) -> None:
    seen: list[Any] = []
    served = raw_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.append((scope["client"], scope["server"]))
        await served(scope, receive, send)

    async with serving_on(app, unix), await trio.open_unix_socket(unix.socket.getsockname()) as stream:
        await ask_hello(stream)
    assert seen == [(None, None)]


async def test_a_unix_socket_without_a_path_has_a_url_too() -> None:
    inherited = listening(socket.AF_UNIX, b"\0comfyd-test-of-listening")
    async with serving_on(raw_app(), inherited) as url:
        assert url == "http+unix://%00comfyd-test-of-listening"


async def test_several_sockets_are_served_and_unix_ones_stay_plain_beside_tls(
    tcp: InheritedSocket, unix: InheritedSocket, tmp_path: Path
) -> None:
    """Who connects by a Unix socket is a proxy on this machine."""
    files = TlsFiles(certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    out = ["-keyout", str(files.key), "-out", str(files.certificate)]
    await trio.run_process([*command.split(), *out], capture_stderr=True)
    path, port = unix.socket.getsockname(), tcp.socket.getsockname()[1]
    async with serving_on(raw_app(), tcp, unix, config=quick_config(tls=files)) as url:
        assert url == f"https://127.0.0.1:{port}"
        async with await trio.open_unix_socket(path) as stream:
            await ask_hello(stream)
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(GOOD_REQUEST)
            assert status_of(await read_all(stream)) == 400


async def test_a_second_port_is_not_filled_by_the_clients_of_the_first() -> None:
    """A probe must be answered when the main port has as many connections as it takes, all busy."""
    served = raw_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/ready":
            scope = {**scope, "path": "/hello"}
        await served(scope, receive, send)

    guarded, full = guard_app(app, metrics_elsewhere=True), quick_config(max_connections=2)
    async with serving(OpenRoutesOnly(app)) as side, serving(guarded, full) as main:
        busy = [await main.connect() for _ in range(3)]
        for stream in busy:
            await stream.send_all(b"GET /wait HTTP/1.1\r\nHost: t\r\n\r\n")
        await main.wait_connections(2)  # the third one waits in the backlog
        async with await side.connect() as stream:
            await stream.send_all(b"GET /ready HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
            assert (await read_all(stream)).endswith(b"hello")
        for stream in busy:
            await stream.aclose()
        await main.wait_at_rest()
