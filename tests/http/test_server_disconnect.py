"""A client that leaves cancels its handler within 100 ms, however it leaves and whatever the handler does."""

import socket
import struct
from typing import Any

import pytest
import trio
from http_server_kit import (
    GOOD_REQUEST,
    Watched,
    masked_frame,
    open_websocket,
    quart_app,
    quick_config,
    raw_app,
    read_until,
    serving,
)

PROMPT_S = 0.1
WITH_BODY = b"POST /wait HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\nhello"
WITHOUT_BODY = b"GET /wait HTTP/1.1\r\nHost: test\r\n\r\n"
STREAMED = b"GET /drip HTTP/1.1\r\nHost: test\r\n\r\n"


async def leave_by_fin(stream: trio.SocketStream) -> None:
    await stream.send_eof()


async def leave_by_close(stream: trio.SocketStream) -> None:
    await stream.aclose()


async def leave_by_reset(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await stream.aclose()


leaving = pytest.mark.parametrize("leave", [leave_by_fin, leave_by_close, leave_by_reset])


@leaving
@pytest.mark.parametrize("opening", [WITHOUT_BODY, WITH_BODY], ids=["without-body", "body-read"])
async def test_leaving_cancels_a_waiting_quart_handler(leave: Any, opening: bytes) -> None:
    watched = Watched()
    async with serving(quart_app(watched)) as server, await server.connect() as stream:
        await stream.send_all(opening)
        await watched.started.wait()
        await leave(stream)
        with trio.fail_after(PROMPT_S):
            await watched.ended.wait()
        assert watched.cancelled
        await server.wait_connections(0)


@leaving
async def test_leaving_cancels_a_quart_handler_in_the_middle_of_a_streamed_answer(leave: Any) -> None:
    watched = Watched()
    async with serving(quart_app(watched)) as server, await server.connect() as stream:
        await stream.send_all(STREAMED)
        await read_until(stream, b"first\r\n")
        await watched.started.wait()
        await leave(stream)
        with trio.fail_after(PROMPT_S):
            await watched.ended.wait()
        assert watched.cancelled


@leaving
@pytest.mark.parametrize("kind", ["raw", "quart"])
async def test_leaving_ends_a_handler_that_sends_without_end(leave: Any, kind: str) -> None:
    """It is held up by back-pressure, or its sends fail."""
    watched = Watched()
    app = raw_app(watched) if kind == "raw" else quart_app(watched)
    async with serving(app) as server, await server.connect() as stream:
        await stream.send_all(b"GET /flood HTTP/1.1\r\nHost: test\r\n\r\n")
        await stream.receive_some(65536)
        await leave(stream)
        with trio.fail_after(PROMPT_S * 3):  # up to 4 MB may have to go to the kernel first
            await watched.ended.wait()


@leaving
async def test_raw_apps_hear_of_it_as_often_as_they_ask(leave: Any) -> None:
    heard: list[Any] = []
    done = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        assert (await receive())["type"] == "http.request"
        heard.extend([await receive(), await receive(), await receive()])
        done.set()

    async with serving(app) as server, await server.connect() as stream:
        await stream.send_all(GOOD_REQUEST)
        await trio.sleep(0.02)
        await leave(stream)
        with trio.fail_after(PROMPT_S):
            await done.wait()
    assert heard == [{"type": "http.disconnect"}] * 3


async def test_a_raw_app_that_never_asks_is_cancelled_after_a_grace_period() -> None:
    watched = Watched()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await watched.sleep_until_cancelled()

    async with serving(app, quick_config(disconnect_grace_s=0.1)) as server:
        async with await server.connect() as stream:
            await stream.send_all(GOOD_REQUEST)
            await watched.started.wait()
        with trio.fail_after(1):
            await watched.ended.wait()
        await server.wait_at_rest()
    assert watched.cancelled


async def test_pipelined_requests_do_not_hide_that_the_client_left() -> None:
    watched = Watched()
    async with serving(quart_app(watched)) as server, await server.connect() as stream:
        await stream.send_all(WITHOUT_BODY + GOOD_REQUEST * 100)
        await watched.started.wait()
        await trio.sleep(0.02)
        await leave_by_fin(stream)
        with trio.fail_after(PROMPT_S):
            await watched.ended.wait()


@leaving
async def test_leaving_in_the_middle_of_the_body_ends_the_handler(leave: Any, log_output: Any) -> None:
    async with serving(quart_app()) as server:
        stream = await server.connect()
        async with stream:
            await stream.send_all(b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 50\r\n\r\nhello")
            await trio.sleep(0.02)
            await leave(stream)
        await server.wait_at_rest()
    assert not [entry for entry in log_output.entries if entry["log_level"] in {"error", "warning"}]


@leaving
async def test_leaving_a_websocket_is_told_after_the_messages_sent(leave: Any) -> None:
    watched = Watched()
    async with serving(raw_app(watched)) as server, await server.connect() as stream:
        await open_websocket(stream)
        await stream.send_all(masked_frame(1, b"last words"))
        await stream.receive_some(100)
        await leave(stream)
        with trio.fail_after(PROMPT_S):
            await watched.ended.wait()
    assert [message["type"] for message in watched.received] == [
        "websocket.connect",
        "websocket.receive",
        "websocket.disconnect",
    ]
    assert watched.received[-1]["code"] == 1006


async def test_a_websocket_app_that_only_sends_ends_when_the_client_left() -> None:
    """Its sends fail; on stock Hypercorn they return at once, without a checkpoint, and the loop stands still."""
    ended = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "text": "tick", "bytes": None})
        finally:
            ended.set()

    async with serving(app) as server:
        async with await server.connect() as stream:
            await open_websocket(stream)
        with trio.fail_after(1):
            await ended.wait()
        await server.wait_at_rest()


async def test_a_bug_in_a_handler_that_is_being_cancelled_is_logged(log_output: Any) -> None:
    """Quart-Trio goes on with the cancellation alone, and the bug would be lost."""
    app = quart_app()
    ended = trio.Event()

    @app.get("/nursery")
    async def nursery_route() -> str:
        async def fail_when_cancelled() -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.set()
                raise LookupError("the bug")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_when_cancelled)
            nursery.start_soon(trio.sleep_forever)
        return "never"

    async with serving(app) as server:
        async with await server.connect() as stream:
            await stream.send_all(b"GET /nursery HTTP/1.1\r\nHost: test\r\n\r\n")
            await trio.sleep(0.05)
        await ended.wait()
        await server.wait_at_rest()
    events = [entry for entry in log_output.entries if entry["event"] == "http.handler_failed_while_cancelled"]
    assert len(events) == 1
    assert events[0]["exc_info"].subgroup(LookupError) is not None


@pytest.mark.parametrize("sends", [0, 1, 2])
async def test_a_send_that_finds_the_client_gone_is_told_by_quart_as_what_it_is(sends: int) -> None:
    """The last one is for nothing but the end: a client that has all of its answer may have left by then."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        if len(sent) == sends:
            raise ConnectionError("the client has left")
        sent.append(message)

    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Any:
        if not messages:
            await trio.sleep_forever()
        return messages.pop()

    scope: Any = {
        "type": "http", "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.1"}, "method": "GET",
        "scheme": "http", "path": "/hello", "raw_path": b"/hello", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"test")], "client": None, "server": ("test", 80), "state": {}, "extensions": {},
    }  # fmt: skip
    with trio.fail_after(5):
        try:
            await quart_app()(scope, receive, send)
        except* ConnectionError:
            pass
        else:
            pytest.fail("nothing was told")
    assert len(sent) == sends
