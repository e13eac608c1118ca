"""What the tests of the HTTP server share: a running server, and clients that speak bytes."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import trio
from quart import request

from comfyd.http.server import HardenedQuart, HttpServerConfig, serve_http

GOOD_REQUEST = b"GET /hello HTTP/1.1\r\nHost: test\r\n\r\n"
LIMIT_BYTES = 100_000
#: No test of this server may take longer; one that does has found a hang.
TOO_LONG_S = 20.0


def quick_config(**changes: Any) -> HttpServerConfig:
    """A server on any port of this host whose patience is short enough for tests."""
    return attrs.evolve(
        HttpServerConfig(host="127.0.0.1", port=0, max_body_bytes=LIMIT_BYTES, stop_grace_s=0.3, linger_s=0.3),
        **changes,
    )


@attrs.define(eq=False)
class Server:
    """A running server, and what this process had open when nobody was connected."""

    port: int
    url: str
    stop: trio.Event
    tasks_at_rest: int
    files_at_rest: int
    #: Set when serve_http has returned.
    ended: trio.Event = attrs.field(factory=trio.Event)
    ended_at: float | None = None

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def wait_at_rest(self) -> None:
        """Return when no task and no descriptor is left of any connection. Fails when that takes seconds.

        Only for a test that holds neither itself.
        """
        found: tuple[int, int] = (-1, -1)
        wanted = (self.tasks_at_rest, self.files_at_rest)
        with trio.move_on_after(3):
            while (found := (tasks_living(), open_files())) != wanted:  # noqa: ASYNC110 -- nothing would set an event
                await trio.sleep(0.002)
        assert found == wanted, f"tasks, files: {found}, but at rest {wanted}"

    async def wait_connections(self, count: int) -> None:
        """Return when the server has *count* connections. Fails when that takes seconds."""
        found = -1
        with trio.move_on_after(3):
            while (found := sockets_of(self.port) - 1) != count:  # noqa: ASYNC110 -- as above; one is the listener
                await trio.sleep(0.002)
        assert found == count


def tasks_living() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@asynccontextmanager
async def serving(app: Any, config: HttpServerConfig | None = None) -> AsyncIterator[Server]:
    """A server in the background, stopped at the end of the block, and all of it within a generous limit."""
    stop = trio.Event()
    tasks_before = tasks_living()
    with trio.fail_after(TOO_LONG_S):
        async with trio.open_nursery() as nursery:
            server: Server | None = None

            async def run(**started: Any) -> None:
                await serve_http(app, config or quick_config(), stop, **started)
                if server is not None:
                    server.ended_at = trio.current_time()
                    server.ended.set()

            url = await nursery.start(run)
            server = Server(
                port=int(url.rpartition(":")[2]),
                url=url,
                stop=stop,
                tasks_at_rest=tasks_living(),
                files_at_rest=open_files(),
            )
            yield server
            stop.set()
    assert tasks_living() == tasks_before
    assert server is not None
    assert sockets_of(server.port) == 0, "listeners or connections are left"


def sockets_of(port: int) -> int:
    """How many sockets of this process are bound to *port*: the listener and the server's ends of connections."""
    inodes = set()
    for entry in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            inodes.add(os.readlink(f"/proc/self/fd/{entry}").removeprefix("socket:[").removesuffix("]"))
    rows = [
        line.split() for name in ("tcp", "tcp6") for line in Path("/proc/self/net", name).read_text().splitlines()[1:]
    ]
    return sum(row[1].endswith(f":{port:04X}") and row[9] in inodes for row in rows)


async def read_all(stream: trio.SocketStream, within_s: float = 5.0) -> bytes:
    """Everything until the server closes; fails if it does not."""
    received = bytearray()
    with trio.fail_after(within_s):
        try:
            async for data in stream:
                received += data
        except trio.BrokenResourceError:
            received += b"<reset>"
    return bytes(received)


async def read_until(stream: trio.SocketStream, ending: bytes, within_s: float = 5.0) -> bytes:
    """What comes up to and with *ending*."""
    received = bytearray()
    with trio.fail_after(within_s):
        while not received.endswith(ending):
            data = await stream.receive_some(65536)
            assert data, f"closed after {bytes(received)!r}"
            received += data
    return bytes(received)


async def ask_hello(stream: trio.SocketStream) -> bytes:
    """A good request on *stream*, which stays open; the answer."""
    await stream.send_all(GOOD_REQUEST)
    answer = await read_until(stream, b"hello")
    assert answer.startswith(b"HTTP/1.1 200 "), answer
    return answer


async def assert_answers(server: Server) -> None:
    """A new client gets its answer."""
    async with await server.connect() as stream:
        await ask_hello(stream)


def status_of(answer: bytes) -> int:
    """The status code of an HTTP/1 answer."""
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer[9:12])


@attrs.define(eq=False)
class Watched:
    """What happened in the handlers of a test's app."""

    started: trio.Event = attrs.field(factory=trio.Event)
    ended: trio.Event = attrs.field(factory=trio.Event)
    cancelled: bool = False
    received: list[Any] = attrs.field(factory=list)

    async def sleep_until_cancelled(self) -> None:
        self.started.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled = True
            raise
        finally:
            self.ended.set()


def quart_app(watched: Watched | None = None, *, max_body_bytes: int = LIMIT_BYTES) -> HardenedQuart:
    """A Quart app with one route for each way to answer."""
    app = HardenedQuart("hardened", max_body_bytes=max_body_bytes)
    watched = watched or Watched()

    @app.get("/hello")
    async def hello() -> str:
        return "hello"

    @app.post("/echo")
    async def echo() -> bytes:
        data = await request.get_data()
        assert isinstance(data, bytes)
        return data

    @app.post("/count")
    async def count() -> str:
        return str(sum([len(piece) async for piece in request.body]))

    @app.post("/unread")
    async def unread() -> tuple[str, int]:
        return "not read", 403

    @app.route("/wait", methods=["GET", "POST"])
    async def wait() -> str:
        await request.get_data()
        await watched.sleep_until_cancelled()
        return "never"

    @app.get("/fails")
    async def fails() -> str:
        raise RuntimeError("on purpose")

    @app.get("/drip")
    async def drip() -> Any:
        async def pieces() -> AsyncIterator[bytes]:  # noqa: ASYNC900 -- the way to stream in Quart
            yield b"first"
            await watched.sleep_until_cancelled()

        return pieces(), 200

    @app.get("/flood")
    async def flood() -> Any:
        async def pieces() -> AsyncIterator[bytes]:  # noqa: ASYNC900 -- the way to stream in Quart
            watched.started.set()
            try:
                while True:
                    yield b"x" * 65536
            finally:
                watched.ended.set()

        return pieces(), 200

    return app


def raw_app(watched: Watched | None = None) -> Callable[..., Awaitable[None]]:
    """A raw ASGI app with the same answers, and websockets at every path."""
    watched = watched or Watched()

    async def answer(send: Any, body: bytes, status: int = 200) -> None:
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": status, "headers": [length]})
        await send({"type": "http.response.body", "body": body})

    async def body_of(receive: Any) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("left")
            body += message["body"]
            if not message["more_body"]:
                return bytes(body)

    async def until_disconnect(receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        watched.cancelled = True

    async def websocket(receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            watched.received.append(message)
            if message["type"] == "websocket.connect":
                await send({"type": "websocket.accept"})
                watched.started.set()
            elif message["type"] == "websocket.receive":
                await send({"type": "websocket.send", "bytes": message["bytes"], "text": message["text"]})
            else:
                watched.ended.set()
                return

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        if scope["type"] == "websocket":
            await websocket(receive, send)
        elif scope["path"] == "/hello":
            await answer(send, b"hello")
        elif scope["path"] == "/echo":
            await answer(send, await body_of(receive))
        elif scope["path"] == "/unread":
            await answer(send, b"not read", 403)
        elif scope["path"] == "/fails":
            raise RuntimeError("on purpose")
        elif scope["path"] == "/wait":
            watched.started.set()
            await until_disconnect(receive)
            watched.ended.set()
        elif scope["path"] == "/flood":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            watched.started.set()
            try:
                while True:
                    await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            finally:
                watched.ended.set()
        else:
            await answer(send, b"not here", 404)

    return app


WEBSOCKET_KEY = b"dGhlIHNhbXBsZSBub25jZQ=="


def websocket_request(path: bytes = b"/ws", *more: bytes) -> bytes:
    """A websocket handshake (RFC 6455, 1.3) with *more* header lines."""
    return b"\r\n".join(
        [
            b"GET " + path + b" HTTP/1.1",
            b"Host: test",
            b"Connection: Upgrade",
            b"Upgrade: websocket",
            b"Sec-WebSocket-Version: 13",
            b"Sec-WebSocket-Key: " + WEBSOCKET_KEY,
            *more,
            b"",
            b"",
        ]
    )


def masked_frame(opcode: int, payload: bytes, *, fin: bool = True, rsv: int = 0) -> bytes:
    """A client's websocket frame of at most 125 bytes, masked with zeros."""
    assert len(payload) <= 125
    return bytes([fin << 7 | rsv << 4 | opcode, 0x80 | len(payload), 0, 0, 0, 0]) + payload


async def open_websocket(stream: trio.SocketStream, path: bytes = b"/ws") -> bytes:
    """Do the handshake; the answer's header. Frames that follow it at once are left for the caller."""
    await stream.send_all(websocket_request(path))
    answer = b""
    with trio.fail_after(5):
        while not answer.endswith(b"\r\n\r\n"):
            byte = await stream.receive_some(1)
            assert byte, f"closed after {answer!r}"
            answer += byte
    assert status_of(answer) == 101
    return answer
