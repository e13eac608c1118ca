"""Request bodies: whole, over the limit in every shape, slow, and never read."""

import resource
from pathlib import Path

import pytest
import trio
from http_server_kit import (
    LIMIT_BYTES,
    Server,
    ask_hello,
    quart_app,
    quick_config,
    raw_app,
    read_all,
    read_until,
    serving,
    status_of,
)

APPS = {"raw": raw_app, "quart": quart_app}
both = pytest.mark.parametrize("kind", APPS)
MIB = 1024 * 1024


def head(path: bytes, *lines: bytes) -> bytes:
    return b"\r\n".join([b"POST " + path + b" HTTP/1.1", b"Host: test", *lines, b"", b""])


def chunked(path: bytes) -> bytes:
    return head(path, b"Transfer-Encoding: chunked")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def send_for_ever(stream: trio.SocketStream, piece: bytes, sent: list[int]) -> None:
    """Send until the server closes."""
    try:
        while True:
            await stream.send_all(piece)
            sent[0] += len(piece)
    except trio.BrokenResourceError:
        return


@both
@pytest.mark.parametrize("size", [0, 1, 65_536, LIMIT_BYTES])
async def test_bodies_up_to_the_limit_arrive_whole(kind: str, size: int) -> None:
    body = bytes(i % 251 for i in range(size))
    async with serving(APPS[kind]()) as server, await server.connect() as stream:
        for framing in (
            head(b"/echo", b"Content-Length: %d" % size) + body,
            chunked(b"/echo") + (chunk(body) if size else b"") + chunk(b""),
        ):
            await stream.send_all(framing)
            answer = await read_until(stream, b"\r\n\r\n" + body)
            assert status_of(answer) == 200


@both
async def test_a_length_over_the_limit_is_refused_before_anything_is_read(kind: str) -> None:
    async with serving(APPS[kind]()) as server, await server.connect() as stream:
        await stream.send_all(head(b"/echo", b"Content-Length: %d" % (LIMIT_BYTES + 1)))
        with trio.fail_after(0.2):
            assert status_of(await stream.receive_some(4096)) == 413


@both
async def test_a_client_that_asks_before_sending_too_much_is_told_not_to(kind: str) -> None:
    async with serving(APPS[kind]()) as server, await server.connect() as stream:
        await stream.send_all(head(b"/echo", b"Content-Length: %d" % (LIMIT_BYTES + 1), b"Expect: 100-continue"))
        answer = await read_all(stream)
        assert status_of(answer) == 413, "no 100 before it"


@both
@pytest.mark.parametrize("path", [b"/echo", b"/count"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_client_that_sends_far_too_much_sees_the_413_and_costs_no_memory(
    kind: str, path: bytes, framing: str
) -> None:
    """It never stops sending, and looks for an answer only then; a reset would cost it the answer."""
    if kind == "raw":
        path = b"/echo"
    async with serving(APPS[kind]()) as server, await server.connect() as stream:
        before_bytes = resident_bytes()
        sent = [0]
        if framing == "length":
            opening, piece = head(path, b"Content-Length: %d" % 10**12), b"x" * 65536
        else:
            opening, piece = chunked(path), chunk(b"x" * 65536)
        async with trio.open_nursery() as nursery:
            await stream.send_all(opening)
            nursery.start_soon(send_for_ever, stream, piece, sent)
            answer = await stream.receive_some(65536)
            assert status_of(answer) == 413
            await server.wait_connections(0)
            nursery.cancel_scope.cancel()
        assert resident_bytes() - before_bytes < 8 * MIB, f"after {sent[0]} bytes sent"
        await ask_on_new_connection(server)


@both
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_client_that_looks_only_after_sending_all_sees_the_413_too(kind: str, framing: str) -> None:
    """To close with bytes unread would reset the connection, and the answer with it."""
    piece, count = b"x" * 65536, 100
    async with serving(APPS[kind](), quick_config(linger_s=5)) as server, await server.connect() as stream:
        if framing == "length":
            await stream.send_all(head(b"/echo", b"Content-Length: %d" % (len(piece) * count)))
        else:
            await stream.send_all(chunked(b"/echo"))
        for _ in range(count):
            await stream.send_all(piece if framing == "length" else chunk(piece))
            await trio.sleep(0.001)  # the server has its turn, and would close meanwhile
        if framing == "chunked":
            await stream.send_all(chunk(b""))
        assert status_of(await stream.receive_some(65536)) == 413


async def ask_on_new_connection(server: Server) -> None:
    async with await server.connect() as stream:
        await ask_hello(stream)


@both
async def test_one_byte_too_many_in_chunks_is_413(kind: str) -> None:
    async with serving(APPS[kind]()) as server, await server.connect() as stream:
        await stream.send_all(chunked(b"/echo") + chunk(b"x" * LIMIT_BYTES) + chunk(b"y") + chunk(b""))
        assert status_of(await stream.receive_some(65536)) == 413


@both
@pytest.mark.parametrize("size", [10, 70_000, LIMIT_BYTES])
async def test_after_an_answer_without_reading_the_body_the_connection_is_reused(kind: str, size: int) -> None:
    async with serving(APPS[kind]()) as server, await server.connect() as stream:
        for _ in range(3):
            await stream.send_all(head(b"/unread", b"Content-Length: %d" % size) + b"x" * size)
            assert status_of(await read_until(stream, b"not read")) == 403
        await ask_hello(stream)


@both
async def test_a_client_that_never_ends_an_answered_body_is_closed(kind: str) -> None:
    async with serving(APPS[kind](), quick_config(linger_s=0.1)) as server, await server.connect() as stream:
        await stream.send_all(head(b"/unread", b"Content-Length: 1000") + b"x")
        await read_until(stream, b"not read")
        assert await read_all(stream, within_s=2) == b""


@both
async def test_a_slow_body_is_cut_with_408(kind: str) -> None:
    """One byte now and then: each earns a thousandth of a second, so that the time allowed runs out all the same."""
    config = quick_config(body_timeout_s=0.3, min_upload_bytes_per_s=1000)
    async with serving(APPS[kind](), config) as server, await server.connect() as stream:
        await stream.send_all(head(b"/echo", b"Content-Length: 1000"))
        began_at = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                try:
                    while True:
                        await stream.send_all(b"x")
                        await trio.sleep(0.02)
                except trio.BrokenResourceError:
                    return

            nursery.start_soon(drip)
            answer = await stream.receive_some(4096)
            nursery.cancel_scope.cancel()
        assert 0.25 < trio.current_time() - began_at < 1.5
        assert status_of(answer) == 408
        assert b"application/problem+json" in answer
        await server.wait_connections(0)


@both
async def test_an_upload_that_keeps_up_may_take_longer_than_the_timeout(kind: str) -> None:
    config = quick_config(body_timeout_s=0.2, min_upload_bytes_per_s=1000)
    async with serving(APPS[kind](), config) as server, await server.connect() as stream:
        await stream.send_all(head(b"/echo", b"Content-Length: 10000"))
        for _ in range(10):
            await trio.sleep(0.05)
            await stream.send_all(b"x" * 1000)
        answer = await read_until(stream, b"x" * 10000)
        assert status_of(answer) == 200


async def test_an_app_that_reads_slowly_slows_the_client_and_costs_no_memory() -> None:
    """Back-pressure on raw ASGI; the time that the app takes is not held against the client."""
    go_on = trio.Event()
    received = [0]

    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        assert scope["type"] == "http"
        await go_on.wait()
        while True:
            message = await receive()  # type: ignore[operator]
            received[0] += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"done"})  # type: ignore[operator]

    size = 64 * MIB
    config = quick_config(max_body_bytes=size, body_timeout_s=0.2)
    async with serving(app, config) as server, await server.connect() as stream, trio.open_nursery() as nursery:
        before_bytes = resident_bytes()

        async def upload() -> None:
            await stream.send_all(head(b"/", b"Content-Length: %d" % size))
            piece = b"x" * MIB
            for _ in range(size // MIB):
                await stream.send_all(piece)

        nursery.start_soon(upload)
        await trio.sleep(0.5)  # longer than body_timeout_s
        assert resident_bytes() - before_bytes < 8 * MIB
        go_on.set()
        await read_until(stream, b"done\r\n0\r\n\r\n")
        assert received[0] == size
