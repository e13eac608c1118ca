"""serve_http returns in time, whatever clients do, and leaves nothing."""

import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
import trio.testing
from http_server_kit import (
    GOOD_REQUEST,
    Server,
    Watched,
    ask_hello,
    masked_frame,
    open_websocket,
    quart_app,
    quick_config,
    raw_app,
    read_all,
    read_until,
    serving,
    status_of,
    websocket_request,
)
from malformed_openings import PREFACE, SETTINGS

from comfyd.http.server import serve_http

GRACE_S = 0.4
#: What the stop may take beyond the grace period: only our own work, on a busy machine.
SLACK_S = 0.6
APPS = {"raw": raw_app, "quart": quart_app}


async def idle_keep_alive(stream: trio.SocketStream) -> None:
    await ask_hello(stream)


async def silent(stream: trio.SocketStream) -> None:
    pass


async def half_a_header(stream: trio.SocketStream) -> None:
    await stream.send_all(b"GET /hello HTTP/1.1\r\nHo")


async def half_a_body(stream: trio.SocketStream) -> None:
    await stream.send_all(b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\nabc")


async def half_closed(stream: trio.SocketStream) -> None:
    await stream.send_all(b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n")
    await stream.send_eof()


async def waiting_for_ever(stream: trio.SocketStream) -> None:
    await stream.send_all(b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n")


async def never_reading(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await stream.send_all(b"GET /flood HTTP/1.1\r\nHost: test\r\n\r\n")


async def pipelining_without_end(stream: trio.SocketStream) -> None:
    await stream.send_all(b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n" + GOOD_REQUEST * 1000)


async def answered_before_the_body_ended(stream: trio.SocketStream) -> None:
    await stream.send_all(b"POST /unread HTTP/1.1\r\nHost: test\r\nContent-Length: 100000\r\n\r\nabc")
    await read_until(stream, b"not read")


async def open_to_websocket(stream: trio.SocketStream) -> None:
    await stream.send_all(websocket_request())
    await stream.receive_some(4096)  # Quart's is a refusal, after which this client stays all the same


async def half_a_websocket_frame(stream: trio.SocketStream) -> None:
    await open_to_websocket(stream)
    await stream.send_all(masked_frame(1, b"hello")[:-2])


async def http2_client(stream: trio.SocketStream) -> None:
    await stream.send_all(PREFACE + SETTINGS)


CLIENTS: dict[str, Callable[[trio.SocketStream], Awaitable[None]]] = {
    function.__name__: function
    for function in (
        idle_keep_alive,
        silent,
        half_a_header,
        half_a_body,
        half_closed,
        waiting_for_ever,
        never_reading,
        pipelining_without_end,
        answered_before_the_body_ended,
        open_to_websocket,
        half_a_websocket_frame,
        http2_client,
    )
}


async def settle(server: Server) -> None:
    """Let the server see what was sent: it is done when it has read all, which only the kernel could tell."""
    await trio.sleep(0.05)


@pytest.mark.parametrize("kind", APPS)
@pytest.mark.parametrize("client", CLIENTS)
async def test_stop_is_bounded_and_leaves_nothing(kind: str, client: str) -> None:
    async with serving(APPS[kind](), quick_config(stop_grace_s=GRACE_S, linger_s=60, send_timeout_s=60)) as server:
        stream = await server.connect()
        async with stream:
            await CLIENTS[client](stream)
            await settle(server)
            stopped_at = trio.current_time()
            server.stop.set()
            with trio.fail_after(GRACE_S + SLACK_S):
                await server.ended.wait()
            took_s = trio.current_time() - stopped_at
            if client in {"idle_keep_alive", "silent", "half_closed"}:
                assert took_s < GRACE_S, "nothing was under way, so there was nothing to wait for"


@pytest.mark.parametrize("kind", APPS)
async def test_all_these_clients_at_once_do_not_add_up(kind: str) -> None:
    async with (
        serving(APPS[kind](), quick_config(stop_grace_s=GRACE_S, linger_s=60)) as server,
        AsyncExitStack() as stack,
    ):
        for client in CLIENTS.values():
            for _ in range(3):
                stream = await stack.enter_async_context(await server.connect())
                await client(stream)
        await settle(server)
        server.stop.set()
        with trio.fail_after(GRACE_S + SLACK_S):
            await server.ended.wait()


@pytest.mark.parametrize("kind", APPS)
@pytest.mark.parametrize("client", CLIENTS)
async def test_cancelling_ends_at_once(kind: str, client: str) -> None:
    """The second signal: no grace, not even for a write that is shielded."""
    scope = trio.CancelScope()
    stop, ended = trio.Event(), trio.Event()
    config = quick_config(stop_grace_s=60, linger_s=60, send_timeout_s=60)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def run(**started: Any) -> None:
                with scope:
                    await serve_http(APPS[kind](), config, stop, **started)
                ended.set()

            url = await nursery.start(run)
            stream = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
            async with stream:
                await CLIENTS[client](stream)
                await trio.sleep(0.05)
                scope.cancel()
                with trio.fail_after(SLACK_S):
                    await ended.wait()
    assert scope.cancelled_caught


@pytest.mark.parametrize("kind", APPS)
async def test_what_is_under_way_is_answered_and_then_closed(kind: str) -> None:
    release = trio.Event()

    async def late(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"  # no lifespan, which an app says by raising
        started.set()
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"late"})

    started = trio.Event()
    app: object = late
    if kind == "quart":
        app = quart = quart_app()

        @quart.get("/late")
        async def late_route() -> str:
            started.set()
            await release.wait()
            return "late"

    async with serving(app, quick_config(stop_grace_s=5)) as server, await server.connect() as stream:
        await stream.send_all(b"GET /late HTTP/1.1\r\nHost: test\r\n\r\n")
        await started.wait()
        server.stop.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(OSError, match="all attempts to connect"):
            await server.connect()
        assert not server.ended.is_set()
        release.set()
        answer = await read_all(stream)
        assert status_of(answer) == 200
        assert answer.endswith(b"late")
        assert b"connection: close" in answer.lower()
        with trio.fail_after(SLACK_S):
            await server.ended.wait()


async def test_a_request_that_came_just_before_the_stop_is_answered() -> None:
    async with serving(raw_app(), quick_config(stop_grace_s=5)) as server, await server.connect() as stream:
        await ask_hello(stream)
        # Both happen before the server's task runs again: the bytes are in the kernel when it drains.
        assert await stream.socket.send(GOOD_REQUEST) == len(GOOD_REQUEST)
        server.stop.set()
        assert status_of(await read_all(stream)) == 200


async def test_stop_tells_websockets_that_the_server_is_going_away() -> None:
    watched = Watched()
    async with serving(raw_app(watched), quick_config(stop_grace_s=5)) as server, await server.connect() as stream:
        await open_websocket(stream)
        server.stop.set()
        close = await stream.receive_some(100)
        assert close[0] == 0x88
        assert struct.unpack(">H", close[2:4]) == (1001,)
        await stream.send_all(masked_frame(8, struct.pack(">H", 1001)))
        with trio.fail_after(SLACK_S):
            await server.ended.wait()
    assert watched.received[-1] == {"type": "websocket.disconnect", "code": 1001, "reason": ""}


async def test_the_lifespan_ends_after_the_last_request() -> None:
    order: list[str] = []
    app = quart_app()

    @app.before_serving
    async def start() -> None:
        order.append("start")

    @app.after_serving
    async def end() -> None:
        order.append("end")

    @app.after_request
    async def note(response: object) -> object:
        order.append("request")
        return response

    async with serving(app) as server, await server.connect() as stream:
        await ask_hello(stream)
    assert order == ["start", "request", "end"]


async def test_a_lifespan_that_does_not_end_is_cut() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await trio.sleep_forever()

    async with serving(app, quick_config(lifespan_shutdown_timeout_s=0.1)) as server:
        server.stop.set()
        with trio.fail_after(0.1 + SLACK_S):
            await server.ended.wait()
