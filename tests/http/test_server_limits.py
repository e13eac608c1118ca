"""What many clients, slow clients and stalled clients may cost."""

import errno
import resource
import socket
from typing import Any

import pytest
import trio
import trio.testing
from http_server_kit import (
    GOOD_REQUEST,
    Watched,
    ask_hello,
    quart_app,
    quick_config,
    raw_app,
    read_all,
    serving,
    status_of,
)

APPS = {"raw": raw_app, "quart": quart_app}
both = pytest.mark.parametrize("kind", APPS)


@both
async def test_500_connections_are_held_and_answered(kind: str) -> None:
    gate = trio.Event()
    waiting = trio.Semaphore(0)

    async def raw(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        if scope["path"] == "/held":
            waiting.release()
            await gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})

    app: Any = raw
    if kind == "quart":
        app = quart_app()

        @app.get("/held")  # type: ignore[untyped-decorator] # app is Any here
        async def held() -> str:
            waiting.release()
            await gate.wait()
            return "hello"

    answers: list[bytes] = []
    async with serving(app) as server, trio.open_nursery() as nursery:

        async def client() -> None:
            async with await server.connect() as stream:
                await stream.send_all(b"GET /held HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
                answers.append(await read_all(stream, within_s=15))

        for _ in range(500):
            nursery.start_soon(client)
        for _ in range(500):
            await waiting.acquire()
        async with await server.connect() as stream:
            await ask_hello(stream)  # one more is served meanwhile
        gate.set()
    assert len(answers) == 500
    assert all(status_of(answer) == 200 for answer in answers)


@both
async def test_slow_loris_headers_are_cut_with_408(kind: str) -> None:
    """Bytes keep coming, which does not help: the time is for the whole header."""
    async with serving(APPS[kind](), quick_config(header_timeout_s=0.3)) as server, await server.connect() as stream:
        began_at = trio.current_time()
        answers: list[bytes] = []

        async def drip() -> None:
            try:
                await stream.send_all(b"GET /hello HTTP/1.1\r\n")
                while True:
                    await stream.send_all(b"X-A: b\r\n")
                    await trio.sleep(0.02)
            except trio.BrokenResourceError:
                return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            answers.append(await stream.receive_some(4096))
            nursery.cancel_scope.cancel()
        assert status_of(answers[0]) == 408
        assert 0.25 < trio.current_time() - began_at < 1.5
        await server.wait_connections(0)


async def test_slow_loris_headers_are_cut_on_a_kept_connection_too() -> None:
    async with serving(raw_app(), quick_config(header_timeout_s=0.2)) as server, await server.connect() as stream:
        await ask_hello(stream)
        await stream.send_all(b"GET /hello")
        assert status_of(await read_all(stream)) == 408


async def test_a_client_that_says_nothing_is_closed_without_a_word() -> None:
    async with serving(raw_app(), quick_config(header_timeout_s=0.1)) as server, await server.connect() as stream:
        assert await read_all(stream) == b""


@both
async def test_a_client_that_stops_reading_is_cut_after_the_send_timeout(kind: str, log_output: Any) -> None:
    watched = Watched()
    app = raw_app(watched) if kind == "raw" else quart_app(watched)
    async with serving(app, quick_config(send_timeout_s=0.3)) as server, await server.connect() as stream:
        await stream.send_all(b"GET /flood HTTP/1.1\r\nHost: test\r\n\r\n")
        await watched.started.wait()
        with trio.fail_after(3):
            await watched.ended.wait()
        await server.wait_connections(0)
    assert [entry["waited_s"] for entry in log_output.entries if entry["event"] == "http.client_stalled"] == [0.3]


async def test_a_client_that_reads_slowly_is_not_cut() -> None:
    """The timeout is for a standstill, not for the answer."""
    body = b"x" * 12_000_000

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})

    async with serving(app, quick_config(send_timeout_s=0.25)) as server, await server.connect() as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        received, began_at = 0, trio.current_time()
        while data := await stream.receive_some(400_000):
            received += len(data)
            await trio.sleep(0.01)
        assert received > len(body)
        assert trio.current_time() - began_at > 0.25


async def test_at_the_limit_the_longest_idle_connection_gives_way() -> None:
    async with serving(raw_app(), quick_config(max_connections=3)) as server:
        streams = [await server.connect() for _ in range(3)]
        for stream in streams:
            await ask_hello(stream)
        await ask_hello(streams[0])  # which makes streams[1] the longest idle
        await trio.testing.wait_all_tasks_blocked(0.05)
        async with await server.connect() as fourth:
            await ask_hello(fourth)
            assert await read_all(streams[1]) == b""
            await ask_hello(streams[0])
            await ask_hello(streams[2])
        for stream in streams:
            await stream.aclose()


async def test_at_the_limit_with_all_busy_a_further_client_waits_its_turn() -> None:
    gate = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})

    async with serving(app, quick_config(max_connections=2)) as server, trio.open_nursery() as nursery:
        answered: list[bytes] = []

        async def client() -> None:
            async with await server.connect() as stream:
                answered.append(await ask_hello(stream))

        for _ in range(3):
            nursery.start_soon(client)
        await server.wait_connections(2)
        assert not answered
        gate.set()
    assert len(answered) == 3


async def test_without_descriptors_accepting_pauses_and_goes_on(log_output: Any) -> None:
    """EMFILE: the limit of this process is lowered to what is open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serving(raw_app()) as server:
        clients = [socket.socket() for _ in range(5)]
        highest = max(client.fileno() for client in clients)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        try:
            with pytest.raises(OSError, match="Too many open files") as caught:
                socket.socket()
            assert caught.value.errno == errno.EMFILE
            for client in clients:
                client.setblocking(False)
                with pytest.raises(BlockingIOError):
                    client.connect(("127.0.0.1", server.port))
            await trio.sleep(0.25)  # some rounds of trying in vain
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for client in clients:
            async with trio.SocketStream(trio.socket.from_stdlib_socket(client)) as stream:
                await stream.send_all(GOOD_REQUEST)
                assert status_of(await stream.receive_some(4096)) == 200
    assert len([entry for entry in log_output.entries if entry["event"] == "http.accept_failed"]) == 1
