"""One request or websocket as the app sees it: Hypercorn's ASGI translators with their gaps closed.

``HTTPStream`` and ``WSStream`` turn protocol events into ASGI messages and back; that part of Hypercorn is sound. What
is changed here: an app hears of the end of its client at once and as often as it asks, its sends fail from then on,
and what a websocket client can do wrong ends that websocket instead of the server.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import structlog
import trio
from hypercorn.protocol.events import Data, EndData, Event, StreamClosed
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import ASGIWebsocketState, FrameTooLargeError, WSStream
from hypercorn.typing import ASGISendEvent, WebsocketAcceptEvent
from hypercorn.utils import build_and_validate_headers, suppress_body
from wsproto.connection import ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, TextMessage
from wsproto.frame_protocol import CloseReason

log = structlog.get_logger("comfyd.http")


#: An ASGI extension of ours: a ``websocket.send`` may hold ``frames``, several texts and bytes, instead of one message.
FRAMES_TOGETHER: Final = "comfyd.websocket.frames"


#: An ASGI extension of ours: with ``on_disconnect`` an app registers a call for the case that its client leaves, which
#: takes no task that waits for ``http.disconnect``.
DISCONNECT: Final = "comfyd.disconnect"


class ClientGone(ConnectionError):
    """The app sends to a client that left. ASGI 2.4 asks for an ``OSError``, so that apps which never look end too."""


class Inbox:
    """What the app has yet to receive, bounded; once closed it says *farewell* for ever.

    The bound is the back-pressure: when an app does not take its request body, we stop reading the socket. Who finds
    room, or a message, goes on at once: a memory channel gives way to the scheduler each time, 100 us for each request.
    """

    def __init__(self, size: int, farewell: dict[str, Any]) -> None:
        self.farewell = farewell
        self._size = size
        self._messages: deque[Any] = deque()
        self._closed = False
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    async def put(self, message: Any) -> None:
        """Wait for room and leave *message*; without effect once closed."""
        while len(self._messages) >= self._size and not self._closed:
            await self._writers.park()
        if not self._closed:  # else the app answered without reading on, or was told that the client left
            self._messages.append(message)
            self._readers.unpark()

    def close(self) -> None:
        """Tell the app, after what is queued, that nothing more will come."""
        self._closed = True
        self._readers.unpark_all()
        self._writers.unpark_all()

    async def receive(self) -> Any:
        """The ASGI ``receive`` of the app."""
        while not self._messages:
            if self._closed:
                await trio.lowlevel.checkpoint()  # an app may ask for ever
                return dict(self.farewell)
            await self._readers.park()
        self._writers.unpark()
        return self._messages.popleft()


class HttpStream(HTTPStream):
    """One HTTP request and its answer."""

    inbox: Inbox
    #: Holds back the head of the answer; sends a piece of the body, after what is held back, and the end with the last.
    send_head: Callable[[int, list[tuple[bytes, bytes]]], None]
    send_body: Callable[[bytes, bool], Awaitable[None]]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._on_disconnect: list[Callable[[], None]] = []

    async def handle(self, event: Event) -> None:
        """Take a protocol event. Unlike Hypercorn's, the end of the stream is told without waiting."""
        if isinstance(event, StreamClosed):
            self.close()
        else:
            await super().handle(event)

    def close(self) -> None:
        """End the stream: no answer goes out from now on, and the app hears ``http.disconnect``."""
        self.closed = True
        self.inbox.close()
        if self.state is not ASGIHTTPState.CLOSED:  # else the answer is out
            for call in self._on_disconnect:
                call()
        self._on_disconnect.clear()

    def on_disconnect(self, call: Callable[[], None]) -> None:
        """Have *call* called if the client leaves before the answer is out, at once if it has (:data:`DISCONNECT`)."""
        if not self.closed:
            self._on_disconnect.append(call)
        elif self.state is not ASGIHTTPState.CLOSED:
            call()

    async def app_send(self, message: ASGISendEvent | None) -> None:
        """The ASGI ``send`` of the app; None when the app returned or failed.

        The two messages of which answers consist take a way of their own, without Hypercorn's events between here and
        the connection; all that is rare, or wrong, is left to Hypercorn.
        """
        if self.closed and message is not None and self.state is not ASGIHTTPState.CLOSED:
            await trio.lowlevel.checkpoint()  # or an app that swallows the error in a loop would stop the world
            raise ClientGone("the client has left")
        if message is not None and message["type"] == "http.response.start" and self.state is ASGIHTTPState.REQUEST:
            self.response = message
            self.send_head(int(message["status"]), build_and_validate_headers(message.get("headers", [])))
            self.state = ASGIHTTPState.RESPONSE
        elif (
            message is not None
            and message["type"] == "http.response.body"
            and self.state is ASGIHTTPState.RESPONSE
            and not self.response.get("trailers", False)
        ):
            data = bytes(message.get("body", b""))
            if suppress_body(self.scope["method"], int(self.response["status"])):
                data = b""
            more = bool(message.get("more_body", False))
            await self.send_body(data, more)  # an empty first piece means: send the head now (event streams do so)
            if not more:
                self.state = ASGIHTTPState.CLOSED
        else:
            await super().app_send(message)

    def answered(self) -> None:
        """The whole answer is with the kernel."""
        self.state = ASGIHTTPState.CLOSED


class WsStream(WSStream):
    """One websocket over HTTP/1.1."""

    inbox: Inbox
    on_accept: Callable[[], None]

    async def handle(self, event: Event) -> None:
        """Take a protocol event. Unlike Hypercorn's, the end of the stream is told without waiting."""
        if isinstance(event, StreamClosed):
            self.close()
        else:
            await super().handle(event)

    def close(self) -> None:
        """End the websocket: the app hears ``websocket.disconnect`` after the messages it has not received yet."""
        self.closed = True
        if self.state in {ASGIWebsocketState.CLOSED, ASGIWebsocketState.HTTPCLOSED}:
            self.inbox.farewell["code"] = CloseReason.NORMAL_CLOSURE.value
        self.inbox.close()

    @property
    def connected(self) -> bool:
        """Whether the handshake is done and no close was sent by the app."""
        return self.handshake.accepted and self.state is ASGIWebsocketState.CONNECTED

    async def go_away(self) -> None:
        """Say 1001 to the client, as the server is stopping. Its answer ends the websocket, or the grace period."""
        if self.connected and not self.closed:
            await self._send_wsproto_event(CloseConnection(code=CloseReason.GOING_AWAY, reason="server is stopping"))

    async def app_send(self, message: ASGISendEvent | None) -> None:
        """The ASGI ``send`` of the app; None when the app returned or failed."""
        if self.closed:
            await trio.lowlevel.checkpoint()
            if message is not None and message["type"] == "websocket.send":
                raise ClientGone("the client has left")
            return  # accept and close come too late, but an app cannot know
        if message is not None and message["type"] == "websocket.send" and "frames" in message:
            await self._send_together(message["frames"])  # type: ignore[typeddict-item] # our extension
        else:
            await super().app_send(message)

    async def _send_together(self, frames: Iterable[str | bytes]) -> None:
        """Send several messages in one write (:data:`FRAMES_TOGETHER`): written singly, the writes are most of it."""
        if not self.connected:
            raise RuntimeError("frames are sent on a websocket that is accepted and not closed")
        messages = (TextMessage(data=f) if isinstance(f, str) else BytesMessage(data=f) for f in frames)
        data = b"".join(self.connection.send(message) for message in messages)
        await self.send(Data(stream_id=self.stream_id, data=data))

    async def _accept(self, message: WebsocketAcceptEvent) -> None:
        try:
            await super()._accept(message)
        except Exception:
            self.state = ASGIWebsocketState.HANDSHAKE  # the app erred (unknown subprotocol): it can still be told 500
            raise
        self.on_accept()

    async def _handle_events(self) -> None:
        """Take what wsproto parsed. Hypercorn's reads on after a message too large and never says why it closes."""
        for event in self.connection.events():
            if isinstance(event, Message):
                try:
                    self.buffer.extend(event)
                except FrameTooLargeError:
                    await self._end(CloseReason.MESSAGE_TOO_BIG, "message too big")
                    return
                if event.message_finished:
                    await self.inbox.put(self.buffer.to_message())
                    self.buffer.clear()
            elif isinstance(event, Ping):
                await self._send_wsproto_event(event.response())
            elif isinstance(event, CloseConnection):
                if self.connection.state is ConnectionState.REMOTE_CLOSING:
                    self.inbox.farewell["code"] = int(event.code)
                    await self._send_wsproto_event(event.response())
                    await self.send(StreamClosed(stream_id=self.stream_id))
                elif self.connection.state is ConnectionState.CLOSED:  # the answer to our own close
                    self.inbox.farewell["code"] = int(event.code)
                    await self.send(StreamClosed(stream_id=self.stream_id))
                else:  # wsproto's way to report a malformed frame
                    await self._end(event.code, event.reason or "malformed frame")
                return

    async def _end(self, code: int, reason: str) -> None:
        """Close the websocket because of what the client sent."""
        log.info("http.websocket_refused", code=int(code), reason=reason, client=self.client)
        self.inbox.farewell["code"] = int(code)
        await self._send_wsproto_event(CloseConnection(code=code, reason=reason))
        await self.send(EndData(stream_id=self.stream_id))
        await self.send(StreamClosed(stream_id=self.stream_id))

    async def _send_wsproto_event(self, event: Any) -> None:
        if self.closed:
            return
        await super()._send_wsproto_event(event)
