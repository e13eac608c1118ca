"""One connection, many requests: keep-alive, pipelining, closing, and what HTTP/1.1 asks besides."""

import pytest
import trio
from http_server_kit import (
    GOOD_REQUEST,
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


@both
async def test_a_connection_is_kept_for_further_requests(kind: str) -> None:
    async with serving(APPS[kind]()) as server, await server.connect() as stream:
        for _ in range(50):
            await ask_hello(stream)


@both
async def test_an_idle_connection_is_closed_after_its_time_also_after_a_request(kind: str) -> None:
    async with (
        serving(APPS[kind](), quick_config(keep_alive_timeout_s=0.2)) as server,
        await server.connect() as stream,
    ):
        await ask_hello(stream)
        idle_at = trio.current_time()
        assert await read_all(stream) == b""
        assert 0.15 < trio.current_time() - idle_at < 1
        await server.wait_connections(0)


@both
async def test_a_busy_connection_is_not_idle(kind: str) -> None:
    async with (
        serving(APPS[kind](), quick_config(keep_alive_timeout_s=0.3)) as server,
        await server.connect() as stream,
    ):
        for _ in range(5):
            await ask_hello(stream)
            await trio.sleep(0.1)


@both
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_connection_close_and_http_1_0_are_closed_after_the_answer(kind: str, version: bytes) -> None:
    async with serving(APPS[kind]()) as server, await server.connect() as stream:
        asked_at = trio.current_time()
        await stream.send_all(b"GET /hello HTTP/" + version + b"\r\nHost: test\r\nConnection: close\r\n\r\n")
        answer = await read_all(stream)
        assert status_of(answer) == 200
        assert answer.endswith(b"hello")
        assert trio.current_time() - asked_at < 0.5


@both
async def test_pipelined_requests_are_answered_in_order(kind: str) -> None:
    async with serving(APPS[kind]()) as server, await server.connect() as stream:
        posts = b"".join(
            b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 7\r\n\r\n%07d" % number for number in range(200)
        )
        await stream.send_all(posts + b"GET /hello HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        answers = (await read_all(stream)).split(b"HTTP/1.1 200 ")[1:]
        assert [int(answer[-7:]) for answer in answers[:-1]] == list(range(200))
        assert answers[-1].endswith(b"hello")


@both
async def test_more_pipelined_requests_than_are_kept_ahead_are_taken_bit_by_bit(kind: str) -> None:
    """Reading pauses, and goes on."""
    padded = GOOD_REQUEST[:-2] + b"X-Padding: " + b"x" * 2000 + b"\r\n\r\n"
    count = 100_000 // len(padded)
    async with serving(APPS[kind](), quick_config(max_requests_per_connection=10**6)) as server:
        stream = await server.connect()
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, padded * (count - 1))
            received = b""
            with trio.fail_after(15):
                while received.count(b"hello") < count - 1:
                    received += await stream.receive_some(65536)


@both
async def test_after_its_last_request_a_connection_is_closed(kind: str) -> None:
    async with serving(APPS[kind](), quick_config(max_requests_per_connection=3)) as server:
        stream = await server.connect()
        async with stream:
            for _ in range(2):
                assert b"connection: close" not in (await ask_hello(stream)).lower()
            assert b"connection: close" in (await ask_hello(stream)).lower()
            assert await read_all(stream) == b""


@both
async def test_a_request_in_single_bytes_is_understood(kind: str) -> None:
    async with serving(APPS[kind]()) as server, await server.connect() as stream:
        for byte in GOOD_REQUEST:
            await stream.send_all(bytes([byte]))
            await trio.lowlevel.checkpoint()
        assert status_of(await read_until(stream, b"hello")) == 200


@both
async def test_head_has_the_header_without_the_body(kind: str) -> None:
    async with serving(APPS[kind]()) as server, await server.connect() as stream:
        await stream.send_all(b"HEAD /hello HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        answer = await read_all(stream)
        assert status_of(answer) == 200
        assert b"content-length: 5" in answer.lower()
        assert answer.endswith(b"\r\n\r\n")


@both
async def test_continue_is_said_before_the_body(kind: str) -> None:
    async with serving(APPS[kind]()) as server, await server.connect() as stream:
        head = b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
        await stream.send_all(head)
        assert status_of(await read_until(stream, b"\r\n\r\n")) == 100
        await stream.send_all(b"body")
        answer = await read_until(stream, b"body")
        assert status_of(answer) == 200
        await ask_hello(stream)


@both
async def test_an_app_that_fails_answers_500_and_the_next_request_is_served(kind: str) -> None:
    async with serving(APPS[kind]()) as server:
        async with await server.connect() as stream:
            await stream.send_all(b"GET /fails HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            assert status_of(await read_all(stream)) == 500
        async with await server.connect() as stream:
            await ask_hello(stream)


async def test_header_and_first_piece_leave_in_one_packet() -> None:
    async with serving(raw_app()) as server, await server.connect() as stream:
        await stream.send_all(GOOD_REQUEST)
        assert (await stream.receive_some(65536)).endswith(b"hello")


async def test_an_empty_first_piece_sends_the_header_at_once() -> None:
    """As event streams need it: the client sees that it is connected before there is an event."""

    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"", "more_body": True})  # type: ignore[operator]
        await trio.sleep_forever()

    async with serving(app) as server, await server.connect() as stream:
        await stream.send_all(GOOD_REQUEST)
        assert status_of(await read_until(stream, b"\r\n\r\n")) == 200


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ([(b"x", b"a\r\nb: c")], b""),
        ([(b":status", b"200")], b""),
        ([(b"content-length", b"3")], b"four"),
        ([(b"content-length", b"10")], b"four"),
    ],
)
async def test_an_answer_that_is_not_http_ends_its_connection_only(
    headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        assert scope["type"] == "http"
        bad = scope["path"] == "/bad"
        await send({"type": "http.response.start", "status": 200, "headers": headers if bad else []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": body if bad else b"hello"})  # type: ignore[operator]

    async with serving(app) as server:
        async with await server.connect() as stream:
            await stream.send_all(b"GET /bad HTTP/1.1\r\nHost: test\r\n\r\n")
            await read_all(stream)
        await server.wait_at_rest()
        await _ask_chunked(server)


async def _ask_chunked(server: Server) -> None:
    async with await server.connect() as stream:
        await stream.send_all(GOOD_REQUEST)
        await read_until(stream, b"hello\r\n0\r\n\r\n")


@both
async def test_the_client_address_is_known(kind: str) -> None:
    """Also on a dual-stack socket, where the kernel says ::ffff:127.0.0.1."""
    seen: list[str] = []

    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        assert scope["type"] == "http"
        seen.append(scope["client"][0])  # type: ignore[index]
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"hello"})  # type: ignore[operator]

    host = "::" if kind == "raw" else "127.0.0.1"
    async with serving(app, quick_config(host=host)) as server:
        await _ask_chunked(server)
    assert seen == ["127.0.0.1"]
