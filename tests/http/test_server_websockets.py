"""Websockets through raw ASGI, and their refusal by an app that has none."""

import struct
from typing import Any

import pytest
import trio
from http_server_kit import (
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
from trio_websocket import open_websocket_url

from comfyd.http.server import FRAMES_TOGETHER


async def test_quart_without_websockets_refuses_them_cleanly() -> None:
    async with serving(quart_app()) as server, await server.connect() as stream:
        await stream.send_all(websocket_request())
        answer = await read_all(stream)
        assert status_of(answer) == 404
        assert b"application/problem+json" in answer


async def test_text_and_binary_are_echoed_also_when_empty() -> None:
    async with serving(raw_app()) as server, open_websocket_url(server.url.replace("http", "ws") + "/ws") as client:
        messages: list[str | bytes] = ["text", b"binary", "", b"", "ä" * 1000, b"x" * 1_000_000]
        for message in messages:
            await client.send_message(message)
            assert await client.get_message() == message


async def test_thousands_of_messages_arrive_in_order() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        for number in range(5000):
            await send({"type": "websocket.send", "text": str(number), "bytes": None})
        assert (await receive())["type"] == "websocket.disconnect"

    async with serving(app) as server, open_websocket_url(server.url.replace("http", "ws")) as client:
        assert [int(await client.get_message()) for _ in range(5000)] == list(range(5000))


async def test_a_client_that_only_listens_is_not_taken_for_one_that_uploads_too_slowly() -> None:
    impatient = quick_config(body_timeout_s=0.1, header_timeout_s=0.1, keep_alive_timeout_s=0.1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket", "no lifespan"
        await receive()
        await send({"type": "websocket.accept"})
        await trio.sleep(0.4)  # longer than any of these
        await send({"type": "websocket.send", "text": "still there?"})
        assert (await receive())["type"] == "websocket.disconnect"

    async with (
        serving(app, impatient) as server,
        open_websocket_url(server.url.replace("http", "ws") + "/ws") as client,
    ):
        assert await client.get_message() == "still there?"


async def test_an_app_may_send_several_messages_in_one_write() -> None:
    sent: list[str | bytes] = ["one", b"two", "", "ä" * 70_000]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert FRAMES_TOGETHER in scope["extensions"]
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "frames": sent})
        assert (await receive())["type"] == "websocket.disconnect"

    async with serving(app) as server, open_websocket_url(server.url.replace("http", "ws") + "/ws") as client:
        for message in sent:
            assert await client.get_message() == message


async def test_an_app_that_closes_is_answered_and_the_connection_ends() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 4000, "reason": "enough"})
        farewell.append(await receive())

    farewell: list[Any] = []
    async with serving(app) as server, await server.connect() as stream:
        await stream.send_all(websocket_request())
        await read_until(stream, b"\x88\x08" + struct.pack(">H", 4000) + b"enough")
        await stream.send_all(masked_frame(8, struct.pack(">H", 4000)))
        assert await read_all(stream) == b""
    assert farewell == [{"type": "websocket.disconnect", "code": 1000, "reason": ""}]


async def test_the_handshake_is_as_the_rfc_asks_and_offers_no_compression() -> None:
    async with serving(raw_app()) as server, await server.connect() as stream:
        await stream.send_all(websocket_request(b"/ws", b"Sec-WebSocket-Extensions: permessage-deflate"))
        answer = (await read_until(stream, b"\r\n\r\n")).lower()
        # the accept value that RFC 6455, section 1.3 gives for this key
        assert status_of(answer.upper()) == 101
        assert b"sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in answer
        assert b"extensions" not in answer


async def test_messages_sent_before_the_accept_are_delivered() -> None:
    async with serving(raw_app()) as server, await server.connect() as stream:
        await stream.send_all(websocket_request() + masked_frame(1, b"early"))
        answer = await read_until(stream, b"\x81\x05early")
        assert status_of(answer) == 101


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (masked_frame(11, b"x"), 1002),
        (masked_frame(1, b"\xff"), 1007),
        (b"\x81\x05hello", 1002),
        (b"\x82\xfe" + struct.pack(">H", 20_000) + bytes(4) + b"x" * 20_000, 1009),
    ],
    ids=["opcode", "utf-8", "unmasked", "too-large"],
)
async def test_a_client_that_breaks_the_rules_is_told_why_and_the_app_too(frames: bytes, code: int) -> None:
    watched = Watched()
    config = quick_config(max_websocket_message_bytes=10_000)
    async with serving(raw_app(watched), config) as server, await server.connect() as stream:
        await open_websocket(stream)
        await stream.send_all(frames)
        answer = await read_all(stream)
        assert answer[0] == 0x88
        assert struct.unpack(">H", answer[2:4]) == (code,)
        await watched.ended.wait()
    assert watched.received[-1]["code"] == code


async def test_a_ping_is_answered_while_the_app_sends() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        await opened.wait()  # so that the client can tell the handshake from what follows
        for _ in range(200):
            await send({"type": "websocket.send", "text": None, "bytes": b"x" * 100})
            await trio.sleep(0.001)

    opened = trio.Event()
    async with serving(app) as server, await server.connect() as stream:
        await open_websocket(stream)
        opened.set()
        for number in range(50):
            await stream.send_all(masked_frame(9, b"%02d" % number))
            await trio.sleep(0.001)
        received = bytearray()
        while len(pongs := received.split(b"\x8a\x02")[1:]) < 50:
            received += await stream.receive_some(65536)
        assert [int(pong[:2]) for pong in pongs] == list(range(50))


@pytest.mark.parametrize("how", ["raises", "returns", "rejects", "unknown-subprotocol"])
async def test_an_app_that_does_not_accept_answers_http(how: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
            await send({"type": "http.response.body", "body": b"hello"})
            return
        assert scope["type"] == "websocket"
        await receive()
        if how == "raises":
            raise RuntimeError("on purpose")
        if how == "rejects":
            await send({"type": "websocket.close"})
            await receive()
        if how == "unknown-subprotocol":
            await send({"type": "websocket.accept", "subprotocol": "never-offered"})

    async with serving(app) as server:
        async with await server.connect() as stream:
            await stream.send_all(websocket_request())
            answer = await read_until(stream, b"\r\n\r\n")
            assert status_of(answer) == (403 if how == "rejects" else 500)
        async with await server.connect() as stream:
            await ask_hello(stream)


async def test_an_app_that_fails_later_closes_with_1011() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        raise RuntimeError("on purpose")

    async with serving(app) as server, await server.connect() as stream:
        await open_websocket(stream)
        assert (await read_all(stream))[:4] == b"\x88\x02" + struct.pack(">H", 1011)


async def test_an_app_may_give_up_waiting_for_a_client_that_does_not_read() -> None:
    """A send is not shielded; what was cut off is completed before anything else is sent."""
    gave_up = trio.Event()
    go_on = trio.Event()
    message = b"x" * 500_000

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        sent = 0
        with trio.move_on_after(0.3):
            while True:
                sent += 1  # the one that is cut off counts too
                await send({"type": "websocket.send", "text": None, "bytes": message})
        gave_up.set()
        await go_on.wait()
        await send({"type": "websocket.send", "text": str(sent), "bytes": None})
        await receive()

    async with serving(app) as server, open_websocket_url(server.url.replace("http", "ws")) as client:
        with trio.fail_after(2):
            await gave_up.wait()
        go_on.set()
        count = 0
        while isinstance(received := await client.get_message(), bytes):
            assert received == message
            count += 1
        assert int(received) == count


async def test_a_client_that_never_reads_is_cut_when_too_much_is_abandoned() -> None:
    done = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        try:
            while True:
                with trio.move_on_after(0.0001):
                    await send({"type": "websocket.send", "text": None, "bytes": b"x" * 100_000})
        finally:
            done.set()

    async with serving(app) as server, await server.connect() as stream:
        await stream.send_all(websocket_request())
        await done.wait()
        await server.wait_connections(0)
