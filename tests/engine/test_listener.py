"""The websocket to an engine, against real servers that behave and that do not."""

import gc
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from hashlib import sha1
from urllib.parse import parse_qs, urlsplit

import attrs
import pytest
import trio
from jobs_kit import wait_until
from structlog.testing import capture_logs
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, WebSocketServer, serve_websocket

from comfyd.engine.listener import ListenerTimes, serve_listener
from comfyd.engine.messages import EngineEvent

# trio-websocket 0.12.2 leaves the socket of a connection that failed to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:.*<socket.socket:pytest.PytestUnraisableExceptionWarning")

TIMES = ListenerTimes(ping_interval_s=5.0, ping_timeout_s=5.0, connect_timeout_s=5.0)
IMPATIENT = ListenerTimes(ping_interval_s=0.05, ping_timeout_s=0.1, connect_timeout_s=0.15)
STATUS = '{"type":"status","data":{"status":{"exec_info":{"queue_remaining":0}},"sid":"x"}}'


@pytest.fixture(autouse=True)
def _collect_sockets() -> Iterator[None]:
    """Let the collector find those sockets here, and not under another module's filters."""
    yield
    gc.collect()


@attrs.define(eq=False)
class Heard:
    """A receiver that notes what it is told, in order, and can be waited for."""

    notes: list[tuple[str, object]] = attrs.field(factory=list)
    _more: trio.Event = attrs.field(factory=trio.Event)

    def connected(self, client_id: str) -> None:
        self._note("connected", client_id)

    def disconnected(self) -> None:
        self._note("disconnected", None)

    def received(self, event: EngineEvent) -> None:
        self._note("event", event)

    def received_binary(self, frame: bytes) -> None:
        self._note("binary", frame)

    def all(self, kind: str) -> list[object]:
        return [value for one, value in self.notes if one == kind]

    async def wait_for(self, kind: str, count: int) -> None:
        while len(self.all(kind)) < count:
            await self._more.wait()

    def _note(self, kind: str, value: object) -> None:
        self.notes.append((kind, value))
        self._more.set()
        self._more = trio.Event()


Handler = Callable[[WebSocketConnection, str], Awaitable[None]]


@asynccontextmanager
async def listening(
    handler: Handler, times: ListenerTimes = TIMES, *, wait_started: bool = True
) -> AsyncIterator[Heard]:
    """Listen to a server whose every connection is handed to *handler* with its client id."""

    async def accept(request: WebSocketRequest) -> None:
        (client_id,) = parse_qs(urlsplit(request.path).query)["clientId"]
        socket = await request.accept()
        with suppress(ConnectionClosed):  # the listener left, which is how most of these tests end
            await handler(socket, client_id)

    serve = partial(serve_websocket, accept, "127.0.0.1", 0, ssl_context=None, max_message_size=1 << 26)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            server: WebSocketServer = await nursery.start(serve)
            url = f"ws://127.0.0.1:{server.port}/ws"
            heard = Heard()
            if wait_started:
                await nursery.start(serve_listener, url, heard, times)
            else:
                nursery.start_soon(serve_listener, url, heard, times)  # noqa: ASYNC113  # it never gets so far
            yield heard
            nursery.cancel_scope.cancel("the test is over")


def saying(*frames: str | bytes) -> Handler:
    """A handler that greets, says *frames*, and stays."""

    async def handler(socket: WebSocketConnection, _: str) -> None:
        for frame in (STATUS, *frames):
            await socket.send_message(frame)
        while True:
            await socket.get_message()

    return handler


async def test_the_feature_flags_go_first_and_started_means_that_the_engine_has_greeted() -> None:
    first: list[str | bytes] = []

    async def handler(socket: WebSocketConnection, client_id: str) -> None:
        first.append(await socket.get_message())
        await socket.send_message(STATUS)
        await socket.get_message()

    async with listening(handler) as heard:
        assert first == ['{"type":"feature_flags","data":{"supports_preview_metadata":true}}']
        await heard.wait_for("event", 1)
        assert [kind for kind, _ in heard.notes] == ["connected", "event"]


async def test_frames_arrive_in_order_and_junk_is_logged_and_passed_over() -> None:
    executing = '{"type":"executing","data":{"node":"3","prompt_id":"p"}}'
    frames: list[str | bytes] = ["junk", b"\0\0\0\1preview", "[]", '{"type":"x"}', executing]
    with capture_logs() as logs:
        async with listening(saying(*frames)) as heard:
            await heard.wait_for("event", 2)
    assert [kind for kind, _ in heard.notes[:4]] == ["connected", "event", "binary", "event"]
    assert heard.all("binary") == [b"\0\0\0\1preview"]
    event = heard.all("event")[1]
    assert isinstance(event, EngineEvent)
    assert (event.type, event.prompt_id) == ("executing", "p")
    ignored = [entry for entry in logs if entry["event"] == "engine.frame_ignored"]
    assert [entry["size_bytes"] for entry in ignored] == [4, 2, 12]


async def test_frames_of_eight_megabytes_arrive_whole() -> None:
    size = 8 << 20
    text = '{"type":"executed","data":{"prompt_id":"p","text":"' + "x" * size + '"}}'
    async with listening(saying(text, bytes(size))) as heard:
        await heard.wait_for("binary", 1)
        event = heard.all("event")[1]
        assert isinstance(event, EngineEvent)
        assert len(event.data["text"]) == size
        assert heard.all("binary") == [bytes(size)]


async def test_after_a_loss_it_connects_again_with_a_client_id_never_used_before() -> None:
    ids = []

    async def handler(socket: WebSocketConnection, client_id: str) -> None:
        ids.append(client_id)
        await socket.send_message(STATUS)

    async with listening(handler) as heard:  # the server closes after each greeting
        await heard.wait_for("connected", 3)
    assert len(set(ids)) == len(ids) >= 3
    assert heard.all("connected") == ids[: len(heard.all("connected"))]
    kinds = [kind for kind, _ in heard.notes]
    assert kinds[:6] == ["connected", "event", "disconnected"] * 2


async def test_a_server_that_answers_no_ping_is_found_dead_and_left() -> None:
    """A link that died without a word: the socket is open, and nothing comes back."""
    connections = []

    async def deaf(stream: trio.SocketStream) -> None:
        connections.append(stream)
        request = b""
        while b"\r\n\r\n" not in request:
            request += await stream.receive_some()
        key = next(line for line in request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
        answer = sha1(key.split(b": ")[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11")  # noqa: S324  # RFC 6455 says so
        accept = b64encode(answer.digest())
        head = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
        greeting = STATUS.encode()
        await stream.send_all(head + b"sec-websocket-accept: " + accept + b"\r\n\r\n")
        await stream.send_all(bytes([0x81, len(greeting)]) + greeting)
        await trio.sleep_forever()

    with trio.fail_after(20), capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(trio.serve_tcp, deaf, 0, host="127.0.0.1"))
            port = listener.socket.getsockname()[1]
            heard = Heard()
            await nursery.start(serve_listener, f"ws://127.0.0.1:{port}/ws", heard, IMPATIENT)
            await heard.wait_for("connected", 2)
            nursery.cancel_scope.cancel("the test is over")
    assert [kind for kind, _ in heard.notes][:4] == ["connected", "event", "disconnected", "connected"]
    assert len(connections) == 2
    assert "engine.websocket_lost" in [entry["event"] for entry in logs]


async def test_a_server_that_never_greets_is_left_and_tried_again_and_nobody_is_told_of_a_connection() -> None:
    came = trio.Event()
    connections: list[str] = []

    async def handler(socket: WebSocketConnection, client_id: str) -> None:
        connections.append(client_id)
        if len(connections) == 2:
            came.set()
        await socket.get_message()
        await socket.get_message()

    async with listening(handler, IMPATIENT, wait_started=False) as heard:
        await came.wait()
        assert heard.notes == []


async def test_a_server_that_closes_at_once_is_tried_again_until_it_greets() -> None:
    connections: list[str] = []

    async def handler(socket: WebSocketConnection, client_id: str) -> None:
        connections.append(client_id)
        if len(connections) <= 2:
            return
        await socket.send_message(STATUS)
        await socket.get_message()
        await socket.get_message()

    async with listening(handler) as heard:
        assert len(connections) == 3
        assert heard.all("connected") == [connections[2]]


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 500 Oh no\r\ncontent-length: 0\r\n\r\n", b"junk\r\n\r\n"])
async def test_a_server_that_is_no_websocket_is_tried_again_with_growing_pauses(answer: bytes) -> None:
    attempts: list[float] = []

    async def handler(stream: trio.SocketStream) -> None:
        attempts.append(trio.current_time())
        await stream.receive_some()
        if answer:
            await stream.send_all(answer)
        await stream.aclose()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
            port = listener.socket.getsockname()[1]
            with capture_logs() as logs:
                heard = Heard()
                nursery.start_soon(serve_listener, f"ws://127.0.0.1:{port}/ws", heard, IMPATIENT)
                await wait_until(lambda: len(attempts) >= 4)  # the server's end is all that can be seen
            nursery.cancel_scope.cancel("the test is over")
    assert heard.notes == []
    delays = [entry["retry_in_s"] for entry in logs if entry["event"] == "engine.websocket_lost"]
    assert delays[:3] == [0.05, 0.1, 0.2]


async def test_nobody_there_is_tried_again_until_somebody_is() -> None:
    with trio.fail_after(20):
        (probe,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = probe.socket.getsockname()[1]
        await probe.aclose()
        heard = Heard()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_listener, f"ws://127.0.0.1:{port}/ws", heard, TIMES)
            await trio.sleep(0.1)  # two refused connections or so

            async def accept(request: WebSocketRequest) -> None:
                await saying()(await request.accept(), "")

            nursery.start_soon(partial(serve_websocket, accept, "127.0.0.1", port, ssl_context=None))
            await heard.wait_for("connected", 1)
            nursery.cancel_scope.cancel("the test is over")


async def test_being_cancelled_closes_the_connection_and_says_so() -> None:
    left = trio.Event()

    async def handler(socket: WebSocketConnection, client_id: str) -> None:
        await socket.send_message(STATUS)
        try:
            while True:
                await socket.get_message()
        except ConnectionClosed:
            left.set()

    with trio.fail_after(20):
        async with trio.open_nursery() as servers:
            heard = Heard()

            async def accept(request: WebSocketRequest) -> None:
                await handler(await request.accept(), "")

            server = await servers.start(partial(serve_websocket, accept, "127.0.0.1", 0, ssl_context=None))
            async with trio.open_nursery() as nursery:
                url = f"ws://127.0.0.1:{server.port}/ws"
                await nursery.start(serve_listener, url, heard, TIMES)
                nursery.cancel_scope.cancel("enough")
            await left.wait()
            assert [kind for kind, _ in heard.notes][-1] == "disconnected"
            servers.cancel_scope.cancel("the test is over")
