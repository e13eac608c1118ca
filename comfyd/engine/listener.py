"""The websocket to one engine: connected for as long as the engine lives, each frame parsed once.

Sizes are measured (receive buffer 256 KiB: four times the message rate of the default); the fresh client id per
connection avoids a trap of ComfyUI's: the clean-up of an old socket unregisters a newer one with the same id, which
then stays open and receives nothing for ever (ComfyUI 0.3.64, ``server.py``, websocket_handler).
"""

import uuid
from collections.abc import Callable
from typing import Final, Protocol

import attrs
import h11
import structlog
import trio
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection, open_websocket_url
from wsproto.utilities import ProtocolError

from comfyd.engine.messages import EngineEvent, UnreadableFrame, parse_event

log = structlog.get_logger("comfyd.engine")

RECEIVE_BUFFER_BYTES: Final = 256 * 1024
MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024
"""A bound, not an expectation: ``executed`` can carry large texts and previews whole pictures; beyond this a frame is
taken for an attack on our memory and the connection is closed and opened again."""
MESSAGE_QUEUE: Final = 256
"""Frames between the socket's reader and us. We never wait on anything while handling a frame, so it only smooths
bursts; if it is full the socket waits, and nothing is lost."""
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
    async with open_websocket_url(
        url,
        connect_timeout=times.connect_timeout_s,
        disconnect_timeout=1,
        receive_buffer_size=RECEIVE_BUFFER_BYTES,
        max_message_size=MAX_MESSAGE_BYTES,
        message_queue_size=MESSAGE_QUEUE,
    ) as socket:
        await socket.send_message(_FEATURE_FLAGS)
        # ComfyUI registers the client id before its first message, a "status"; only from then on is a prompt that is
        # submitted with this id sure to be heard.
        with trio.fail_after(times.connect_timeout_s):
            first_frame = await socket.get_message()
        receiver.connected(client_id)
        try:
            established()
            _hear(receiver, first_frame)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_keep_pinging, socket, times)
                while True:
                    _hear(receiver, await socket.get_message())
        finally:
            receiver.disconnected()


def _hear(receiver: Receiver, frame: str | bytes) -> None:
    if isinstance(frame, bytes):
        receiver.received_binary(frame)
        return
    try:
        event = parse_event(frame)
    except UnreadableFrame as exc:
        log.warning("engine.frame_ignored", reason=str(exc), size_bytes=len(frame))
        return
    receiver.received(event)


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
