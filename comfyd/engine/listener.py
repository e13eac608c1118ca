"""The websocket to one engine: connected for as long as the engine lives, each frame parsed once.

Sizes are measured (receive buffer 256 KiB: four times the message rate of the default); the fresh client id per
connection avoids a trap of ComfyUI's: the clean-up of an old socket unregisters a newer one with the same id, which
then stays open and receives nothing for ever (ComfyUI 0.3.64, ``server.py``, websocket_handler).
"""

import uuid
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, NoReturn, Protocol
from urllib.parse import urlsplit

import attrs
import h11
import structlog
import trio
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection, wrap_client_stream
from wsproto.utilities import ProtocolError

from comfyd.engine.frame_sieve import FrameSieve
from comfyd.engine.messages import EngineEvent, UnreadableFrame, parse_event

log = structlog.get_logger("comfyd.engine")

RECEIVE_BUFFER_BYTES: Final = 256 * 1024
MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024
"""A bound, not an expectation: ``executed`` can carry large texts and previews whole pictures; beyond this a frame is
taken for an attack on our memory and the connection is closed and opened again."""
MESSAGE_QUEUE: Final = 256
"""Messages that come by way of trio-websocket, and wait for us. We never wait on anything while handling one, so it
only smooths bursts; if it is full the socket waits, and nothing is lost."""
PING_INTERVAL_S: Final = 10.0
PING_TIMEOUT_S: Final = 20.0
CONNECT_TIMEOUT_S: Final = 10.0
FIRST_RECONNECT_DELAY_S: Final = 0.05
MAX_RECONNECT_DELAY_S: Final = 2.0

# Announced first, as ComfyUI looks at it only in the first message: previews then come with their prompt's id.
_FEATURE_FLAGS: Final = '{"type":"feature_flags","data":{"supports_preview_metadata":true}}'

# h11.ProtocolError: what answers the handshake is no HTTP; trio-websocket then tries to refuse it, as a server would.
# ProtocolError: closing while a ping is being answered can raise it out of the connection's own block. The two trio
# errors: the socket broke under a send.
_LINK_ERRORS: Final = (
    ConnectionClosed,
    HandshakeError,
    ProtocolError,
    h11.ProtocolError,
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
)


class Receiver(Protocol):
    """Who hears the engine. The methods never wait: they are called between two frames."""

    def connected(self, client_id: str) -> None:
        """Events of prompts submitted with *client_id* arrive from now on."""

    def disconnected(self) -> None:
        """Events may have been missed; every running prompt is in doubt."""

    def received(self, event: EngineEvent) -> None:
        """A text frame has arrived."""

    def received_binary(self, frame: bytes) -> None:
        """A binary frame (a preview) has arrived, unparsed."""


@attrs.frozen(kw_only=True)
class ListenerTimes:
    """How patient the listener is, in seconds."""

    ping_interval_s: float = PING_INTERVAL_S
    ping_timeout_s: float = PING_TIMEOUT_S
    connect_timeout_s: float = CONNECT_TIMEOUT_S


async def serve_listener(
    url: str,
    receiver: Receiver,
    times: ListenerTimes,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen at *url* (``ws://host:port/ws``) until cancelled, connecting again after each loss.

    ``started()`` is called when the first connection stands.
    """
    delay_s = FIRST_RECONNECT_DELAY_S
    first = True

    def established() -> None:
        nonlocal delay_s, first
        delay_s = FIRST_RECONNECT_DELAY_S
        if first:
            first = False
            task_status.started()

    while True:
        client_id = str(uuid.uuid4())
        reason: object = "closed by the engine"
        try:
            await _listen_once(f"{url}?clientId={client_id}", client_id, receiver, times, established)
        except* _LINK_ERRORS as group:
            reason = _first(group)
        except* trio.TooSlowError:
            reason = "no answer in time"
        log.warning("engine.websocket_lost", reason=str(reason), retry_in_s=delay_s)
        await trio.sleep(delay_s)
        delay_s = min(delay_s * 2, MAX_RECONNECT_DELAY_S)


async def _listen_once(
    url: str, client_id: str, receiver: Receiver, times: ListenerTimes, established: Callable[[], None]
) -> None:
    address = urlsplit(url)
    hearing = _Hearing(client_id, receiver, established)
    with ExitStack() as stack:
        stack.callback(hearing.end)
        async with trio.open_nursery() as nursery:
            with trio.fail_after(times.connect_timeout_s):
                tcp = await trio.open_tcp_stream(address.hostname or "", address.port or 80)
                stream = FrameSieve(tcp, hearing, MAX_MESSAGE_BYTES)
                stack.callback(stream.close)  # trio-websocket leaves it open where the handshake comes to nothing
                socket = await wrap_client_stream(
                    nursery,
                    stream,  # type: ignore[arg-type]  # any stream will do, and is handed to the connection as it is
                    address.netloc,
                    f"{address.path}?{address.query}",
                    receive_buffer_size=RECEIVE_BUFFER_BYTES,
                    max_message_size=MAX_MESSAGE_BYTES,
                    message_queue_size=MESSAGE_QUEUE,
                )
                await socket.send_message(_FEATURE_FLAGS)
                nursery.start_soon(_hear_the_rest, socket, hearing)
                await hearing.greeted.wait()
            await _keep_pinging(socket, times)


@attrs.define(eq=False)
class _Hearing:
    """What one connection says, on its way to the receiver."""

    client_id: str
    receiver: Receiver
    established: Callable[[], None]
    greeted: trio.Event = attrs.field(factory=trio.Event)
    """Whether the engine has said its first message, a "status". It registers the client id before, so only from then
    on is a prompt that is submitted with this id sure to be heard."""

    def text(self, message: str | memoryview) -> None:
        """A text message has arrived."""
        self._greet()
        try:
            event = parse_event(message)
        except UnreadableFrame as exc:
            log.warning("engine.frame_ignored", reason=str(exc), size_bytes=len(message))
            return
        self.receiver.received(event)

    def binary(self, message: bytes | memoryview) -> None:
        """A binary message has arrived."""
        self._greet()
        self.receiver.received_binary(bytes(message))

    def _greet(self) -> None:
        if not self.greeted.is_set():
            self.greeted.set()
            self.receiver.connected(self.client_id)
            self.established()

    def end(self) -> None:
        """Nothing more will be heard."""
        if self.greeted.is_set():
            self.receiver.disconnected()


async def _hear_the_rest(socket: WebSocketConnection, hearing: _Hearing) -> NoReturn:
    """Hear the messages that the sieve leaves to trio-websocket, until the connection is closed, which raises."""
    while True:
        message = await socket.get_message()
        if isinstance(message, str):
            hearing.text(message)
        else:
            hearing.binary(message)


async def _keep_pinging(socket: WebSocketConnection, times: ListenerTimes) -> None:
    """ComfyUI sets no heartbeat, so a dead link is found only by asking."""
    while True:
        await trio.sleep(times.ping_interval_s)
        with trio.fail_after(times.ping_timeout_s):
            await socket.ping()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    exc: BaseException = group
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
