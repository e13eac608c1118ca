"""One HTTP/1.1 connection, from accept to close. Its failures end here.

This takes the place of Hypercorn's ``TCPServer``, ``ProtocolWrapper`` and ``H11Protocol``, in which one malformed
request raises into the nursery of the whole server, one client that stops reading holds the shutdown for ever, and each
request starts and cancels tasks. One reader task per connection does all parsing; the app's task only writes.

HTTP/2 is off on purpose. On a plain port nothing but tools speaks it, and nine of the fifteen openings that end stock
Hypercorn (``tests/malformed_openings.py``) are in its HTTP/2 code. An ``Upgrade: h2c`` is ignored, as RFC 9110 section
7.8 allows; a client with prior knowledge gets a GOAWAY that tells it to use HTTP/1.1. TLS offers only HTTP/1.1 (ALPN):
HTTP/2 would need a guarded class of its own, for clients that send one request at a time and wait for a picture.
"""

import json
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import attrs
import h11
import structlog
import trio
from hypercorn.config import Config
from hypercorn.protocol.events import (
    Body,
    Data,
    EndBody,
    Event,
    InformationalResponse,
    Request,
    Response,
    StreamClosed,
)
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework

from comfyd.http.server.certificate import Certificate
from comfyd.http.server.config import HttpServerConfig
from comfyd.http.server.head import RequestHead
from comfyd.http.server.streams import DISCONNECT, FRAMES_TOGETHER, HttpStream, Inbox, WsStream
from comfyd.http.server.tls import HandshakeFailed, Handshakes, TlsLayer
from comfyd.http.server.transport import NEVER, PIECE_BYTES, Transport

log = structlog.get_logger("comfyd.http")

STREAM_ID: Final = 1
#: SETTINGS (empty), then GOAWAY: last stream 0, error HTTP_1_1_REQUIRED (RFC 9113, sections 3.4, 6.8 and 7).
HTTP_1_1_REQUIRED: Final = bytes.fromhex("000000 04 00 00000000  000008 07 00 00000000 00000000 0000000d")
#: Requests that a client sent ahead (pipelining) and bytes of a websocket that is not accepted yet. Up to this much is
#: kept, and the socket still watched for the client's leaving; beyond it we stop reading until the answer is out.
MAX_AHEAD_BYTES: Final = PIECE_BYTES


@attrs.frozen(kw_only=True)
class Service:
    """What the connections of one server have in common."""

    app: ASGIFramework
    config: HttpServerConfig
    hypercorn: Config
    state: dict[str, Any]
    #: The app answers 413 itself, in its own words.
    app_bounds_bodies: bool
    #: None: plain HTTP.
    certificate: Certificate | None
    handshakes: Handshakes


class Connection:
    """One client. :meth:`run` returns when it is served; it raises nothing but a cancellation from outside."""

    def __init__(self, service: Service, stream: trio.SocketStream) -> None:
        self._service = service
        self._config = service.config
        self._transport = Transport(stream, service.config.send_timeout_s)
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=service.config.max_header_bytes)
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery
        self._client: tuple[str, int] | None = None
        self._server: tuple[str, int] | None = None
        self._stream: HttpStream | WsStream | None = None
        self.requests = 0
        self._draining = False
        self._over = False  # we are done with this client; what is left is to close politely
        self._paused = False  # what comes now is for the next request
        self._websocket_bytes: bytearray | None = None  # from the upgrade on, h11 has no part in what comes
        self._body_withheld = False  # the client waits for "100 Continue" before it sends the body, see _invite_body
        self._body_refused = False
        self._body_bytes = 0
        self._patience_s = 0.0  # what is left of the body timeout
        now = trio.current_time()
        self.idle_since = now
        self._head_began_at: float | None = now
        self._discard_until: float | None = None

    # -- the life of a connection

    async def run(self) -> None:
        """Serve the client until either side closes."""
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    if self._learn_addresses() and await self._secure():
                        await self._read()
                    self._close_stream()
                    if self._over and self._may_hear_more:
                        await self._transport.linger(self._config.linger_s)
                    elif self._over:
                        await self._transport.say_farewell(self._config.linger_s)
                    self._transport.cut()
                    # The app was told. One that does not end by itself must not outlive its client for long.
                    self._nursery.cancel_scope.deadline = trio.current_time() + self._config.disconnect_grace_s
        except* Exception as group:
            log.warning("http.connection_failed", client=self._client, exc_info=group)
        finally:
            self._transport.cut()
            self._close_stream()

    def cut(self) -> None:
        """End the connection now, whatever it waits for."""
        self._transport.cut()
        self._scope.cancel("connection cut")

    def drain(self) -> None:
        """Finish what was asked and take nothing more; without anything asked, close."""
        self._draining = True
        if self._transport.gone or self._over:
            return  # leaving already
        if self._discard_until is not None:
            self._finish()  # answered; what is left is to let the client see it
        elif isinstance(self._stream, WsStream):
            self._nursery.start_soon(self._stream.go_away)
        else:
            self.close_if_idle()

    def close_if_idle(self) -> bool:
        """Close the connection if nothing was asked; whether it was closed.

        A request that the kernel has but we have not read yet counts as asked.
        """
        if not self.idle or self._transport.gone or self._transport.readable():
            return False
        self.cut()
        return True

    @property
    def idle(self) -> bool:
        """Whether no request is under way and none has begun to arrive."""
        return self._stream is None and not self._over and not self._h11.trailing_data[0]

    @property
    def _may_hear_more(self) -> bool:
        """Whether the client may be sending still, so that to close at once could cost it the answer."""
        if self._transport.gone:
            return False
        done = self._h11.their_state in {h11.DONE, h11.MUST_CLOSE, h11.CLOSED}
        return not done or bool(self._h11.trailing_data[0])

    def _learn_addresses(self) -> bool:
        """Note client and server; False if the client has left already.

        IPv4 clients of a dual-stack socket are noted in the form that everyone expects. Those of a Unix socket have no
        address, and its path is no host and port: both stay None.
        """
        socket = self._transport.stream.socket
        try:
            peer, own = socket.getpeername(), socket.getsockname()
        except OSError:
            return False
        if not isinstance(own, tuple):
            return True
        self._client = peer[0].removeprefix("::ffff:"), peer[1]
        self._server = own[0].removeprefix("::ffff:"), own[1]
        return True

    async def _secure(self) -> bool:
        """Do the TLS handshake, if it is spoken here; whether the client may ask now."""
        certificate = self._service.certificate
        if certificate is None or self._server is None:  # the latter: a Unix socket
            return True
        failure: HandshakeFailed | None = None
        try:
            with self._service.handshakes.one_more(self.cut):
                await self._transport.secure(
                    TlsLayer(certificate.context), trio.current_time() + self._config.header_timeout_s
                )
        except HandshakeFailed as exc:
            failure = exc
        except trio.TooSlowError:
            failure = HandshakeFailed("too slow")
        if failure is not None:
            # Debug: balancers look whether a port is open, and browsers open connections that they then do not need.
            level = log.info if failure.malformed else log.debug
            level("http.handshake_failed", reason=str(failure), client=self._client)
            if failure.last_words:
                self._transport.hold(failure.last_words)
                await self._transport.flush()
                await self._transport.linger(self._config.linger_s)
            return False
        self._head_began_at = self.idle_since = trio.current_time()
        return not (self._draining and self.close_if_idle())

    # -- reading: only ever in the connection's main task

    async def _read(self) -> None:
        while True:
            await self._take_events()
            if self._over or self._transport.gone:
                return
            began_at = trio.current_time()
            try:
                if self._ahead_bytes() >= MAX_AHEAD_BYTES:
                    await self._transport.wait_woken(NEVER)
                    continue
                data = await self._transport.receive(self._read_deadline(began_at))
            except trio.TooSlowError:
                await self._give_up_waiting()
                return
            if data is None:
                continue
            if not data:
                return
            self._feed(data, waited_s=trio.current_time() - began_at)

    def _read_deadline(self, now: float) -> float:
        if self._discard_until is not None:
            return self._discard_until
        if self._stream is None:
            if self._head_began_at is None:
                return self.idle_since + self._config.keep_alive_timeout_s
            return self._head_began_at + self._config.header_timeout_s
        if self._websocket_bytes is not None:  # a client may listen for ever; h11 would still wait for a body's end
            return NEVER
        wanted = self._h11.their_state is h11.SEND_BODY and not self._body_withheld
        return now + self._patience_s if wanted else NEVER

    def _feed(self, data: bytes, waited_s: float) -> None:
        if self._websocket_bytes is not None:
            self._websocket_bytes += data
            return
        if self._stream is None and self._head_began_at is None:
            self._head_began_at = trio.current_time()
        earned_s = len(data) / self._config.min_upload_bytes_per_s
        self._patience_s = min(self._config.body_timeout_s, self._patience_s - waited_s + earned_s)
        self._h11.receive_data(data)

    def _ahead_bytes(self) -> int:
        """How much the client sent beyond what can be handled now."""
        if self._websocket_bytes is not None:
            return len(self._websocket_bytes)
        return len(self._h11.trailing_data[0]) if self._paused else 0

    async def _take_events(self) -> None:
        """Handle everything that has arrived completely."""
        while not self._over:
            if self._websocket_bytes is not None:
                await self._take_websocket_bytes()
                return
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as exc:
                log.info("http.malformed", reason=str(exc), client=self._client)
                await self._refuse(exc.error_status_hint, "this is not well-formed HTTP/1.1")
                return
            if event is h11.NEED_DATA or event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                self._paused = event is h11.PAUSED
                return
            if isinstance(event, h11.Request):
                await self._begin(event)
            elif isinstance(event, h11.Data):
                await self._take_body(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                if self._stream is not None:
                    await self._stream.handle(EndBody(stream_id=STREAM_ID))
                elif self._discard_until is not None:  # answered long ago; now the next request may come
                    self._recycle()

    async def _take_websocket_bytes(self) -> None:
        if self._stream is not None and self._websocket_bytes and self._stream_accepted:
            data = bytes(self._websocket_bytes)
            self._websocket_bytes.clear()
            await self._stream.handle(Data(stream_id=STREAM_ID, data=data))

    @property
    def _stream_accepted(self) -> bool:
        return isinstance(self._stream, WsStream) and self._stream.handshake.accepted

    async def _take_body(self, data: bytes) -> None:
        self._body_withheld = False  # it did not wait for long, as it may
        if self._stream is None:
            return  # answered before the body ended: dropped, see _end_stream
        self._body_bytes += len(data)
        if not self._service.app_bounds_bodies and self._body_bytes > self._config.max_body_bytes:
            await self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._body_limit())
            return
        await self._stream.handle(Body(stream_id=STREAM_ID, data=data))

    async def _give_up_waiting(self) -> None:
        """The client did not send what it should have, in time."""
        if self._stream is not None:
            await self._refuse(HTTPStatus.REQUEST_TIMEOUT, "the request body came too slowly")
        elif self._discard_until is None and self._head_began_at is not None and self._h11.trailing_data[0]:
            await self._refuse(HTTPStatus.REQUEST_TIMEOUT, "the request header came too slowly")
        else:
            self._over = True

    # -- requests

    async def _begin(self, request: h11.Request) -> None:
        """Start the app on *request*, or refuse it."""
        self._head_began_at = None
        self.requests += 1
        self._body_bytes = 0
        self._patience_s = self._config.body_timeout_s
        if request.method == b"PRI" and request.http_version == b"2.0":
            self._transport.hold(HTTP_1_1_REQUIRED)
            await self._transport.flush()
            self._finish()
            return
        head = RequestHead.of(request)
        refusal = head.refusal(self._config.max_header_bytes)
        if refusal is not None:
            await self._refuse(*refusal)
            return
        self._body_withheld = self._h11.they_are_waiting_for_100_continue
        self._body_refused = head.content_length > self._config.max_body_bytes
        if self._body_refused and not self._service.app_bounds_bodies:
            await self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._body_limit())
            return
        stream = self._open_stream(WsStream if head.websocket else HttpStream)
        if isinstance(stream, WsStream):
            # permessage-deflate is not offered: it costs 2 ms of this thread per 100 KB message, 30 times the plain
            # way, and previews are compressed pictures.
            headers = [(n, v) for n, v in request.headers if n != b"sec-websocket-extensions"]
            self._websocket_bytes = bytearray(self._h11.trailing_data[0])
        else:
            headers = list(request.headers)
        self._stream = stream
        await stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=headers,
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=head.target,
                state=self._service.state,  # type: ignore[arg-type] # a NewType of dict that only Hypercorn makes
            )
        )
        if stream.closed:  # not a valid websocket handshake: Hypercorn answered 400 itself
            self._end_stream()

    def _open_stream(self, kind: type[HttpStream] | type[WsStream]) -> HttpStream | WsStream:
        stream = kind(
            self._service.app,  # type: ignore[arg-type] # only handed back to our spawn_app
            self._service.hypercorn,
            _CONTEXT,
            self,  # type: ignore[arg-type] # Hypercorn's TaskGroup, of which the streams use spawn and spawn_app
            self._transport.secured,
            self._client,
            self._server,
            self._stream_send,
            STREAM_ID,
        )
        if isinstance(stream, HttpStream):
            stream.inbox = Inbox(self._config.max_queued_pieces, {"type": "http.disconnect"})
            stream.send_head = self._hold_head
            stream.send_body = partial(self._send_body, stream)
        else:
            stream.inbox = Inbox(
                self._config.max_queued_pieces, {"type": "websocket.disconnect", "code": 1006, "reason": ""}
            )
            stream.on_accept = self._transport.wake
        return stream

    async def spawn_app(self, app: ASGIFramework, _config: Config, scope: Any, _send: Any) -> Any:
        """Start *app* for the stream being opened, and return where to put its messages (Hypercorn's TaskGroup)."""
        stream = self._stream
        assert stream is not None, "streams are opened by _begin only"  # noqa: S101
        if isinstance(stream, WsStream):
            scope["extensions"][FRAMES_TOGETHER] = {}
        else:
            scope["extensions"][DISCONNECT] = {"on_disconnect": stream.on_disconnect}
        self._nursery.start_soon(self._run_app, app, scope, stream)
        return stream.inbox.put

    def spawn(self, func: Any, *args: Any) -> None:
        """Start a helper task of the connection (Hypercorn's TaskGroup)."""
        self._nursery.start_soon(func, *args)

    async def _run_app(self, app: ASGIFramework, scope: Any, stream: HttpStream | WsStream) -> None:
        receive = partial(self._invite_body, stream) if self._body_withheld else stream.inbox.receive
        try:
            await app(scope, receive, stream.app_send)
        except* ConnectionError as group:
            if stream.closed:
                log.debug("http.client_left", path=scope["path"])
            else:
                log.exception("http.app_failed", path=scope["path"], type=scope["type"], exc_info=group)
        except* Exception as group:
            log.exception("http.app_failed", path=scope["path"], type=scope["type"], exc_info=group)
        await stream.app_send(None)

    async def _invite_body(self, stream: HttpStream | WsStream) -> Any:
        """The ASGI ``receive`` of an app whose client asked whether it should send the body at all.

        It is told to go on when the app wants the body. One that refuses without looking at it (401) gets none.
        """
        if self._body_withheld and not self._body_refused and stream is self._stream:
            self._body_withheld = False
            if self._h11.they_are_waiting_for_100_continue:
                self._hold(h11.InformationalResponse(status_code=100, headers=[]))
                self._transport.wake()  # from now on it must not be slow
                await self._transport.flush()
        return await stream.inbox.receive()

    # -- answers: in the app's task, or in the main task for refusals

    async def _stream_send(self, event: Event) -> None:
        """Write what the stream says (Hypercorn's protocol events)."""
        if isinstance(event, StreamClosed):
            if self._transport.unsent:
                await self._transport.flush()
            self._end_stream()
        elif isinstance(event, (Response, InformationalResponse)):
            if event.status_code < HTTPStatus.OK:
                self._hold(h11.InformationalResponse(status_code=event.status_code, headers=event.headers))
                await self._transport.flush()
                return
            self._hold_head(event.status_code, event.headers)
        elif isinstance(event, Body):
            self._hold(h11.Data(data=event.data))
            await self._transport.flush()
        elif isinstance(event, EndBody):
            self._hold(h11.EndOfMessage())
            await self._transport.flush()
        elif isinstance(event, Data):
            self._transport.hold(event.data)
            await self._transport.flush()

    def _hold_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Keep the head until the first piece of the body, as ASGI asks for, so that both leave in one packet."""
        headers = [*headers, *self._service.hypercorn.response_headers("h11")]
        last = self._draining or self.requests >= self._config.max_requests_per_connection
        if last or self._body_withheld:  # the client may still send the body, or not: nobody could tell
            headers.append((b"connection", b"close"))
        self._hold(h11.Response(status_code=status, headers=headers))

    async def _send_body(self, stream: HttpStream, data: bytes, more: bool) -> None:
        """Send a piece of the body, and the end with it if there is no *more*."""
        if data:
            self._hold(h11.Data(data=data))
        if not more:
            self._hold(h11.EndOfMessage())
        await self._transport.flush()
        if not more and not stream.closed:
            stream.answered()
            self._end_stream()

    def _hold(self, event: h11.Event) -> None:
        pieces = self._h11.send_with_data_passthrough(event)
        if pieces is not None:
            self._transport.hold(*pieces)

    def _end_stream(self) -> None:
        """The answer is out, or will never be. Make ready for the next request, or close.

        Nothing waits in here. The app, which is still inside its last send, may be cancelled at its next wait
        (Quart-Trio cancels itself when it hears of the disconnect), and by then the connection must be in order.
        """
        websocket = isinstance(self._stream, WsStream)
        self._close_stream()
        if websocket or self._draining or self._h11.our_state is not h11.DONE:
            self._finish()
        elif self._h11.their_state is h11.DONE:
            self._recycle()
        elif self._h11.their_state is h11.SEND_BODY and not self._body_withheld:
            self._discard_until = trio.current_time() + self._config.linger_s
            self._transport.wake()
        else:
            self._finish()

    def _recycle(self) -> None:
        self._h11.start_next_cycle()
        self._discard_until = None
        self.idle_since = trio.current_time()
        if self._h11.trailing_data[0]:  # the next request is (partly) here already
            self._head_began_at = self.idle_since
            self._transport.wake()
        else:
            self._transport.read_until(self.idle_since + self._config.keep_alive_timeout_s)

    async def _refuse(self, status: int, detail: str) -> None:
        """Answer what no app will see, if an answer is still possible, and close."""
        log.info("http.refused", status=int(status), detail=detail, client=self._client)
        self._close_stream()
        if self._h11.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            status = HTTPStatus(status)
            body = json.dumps(
                {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": detail}
            ).encode()
            headers = [
                (b"content-type", b"application/problem+json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
                *self._service.hypercorn.response_headers("h11"),
            ]
            with suppress(h11.LocalProtocolError):  # a CONNECT or a HEAD in a state that allows no body
                self._hold(h11.Response(status_code=status.value, headers=headers))
                self._hold(h11.Data(data=body))
                self._hold(h11.EndOfMessage())
            await self._transport.flush()
        self._finish()

    def _close_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _finish(self) -> None:
        self._over = True
        self._transport.wake()

    def _body_limit(self) -> str:
        return f"the request body is larger than {self._config.max_body_bytes} bytes"


#: Hypercorn's streams ask it only for ``sleep`` between websocket pings, which are off.
_CONTEXT: Final = WorkerContext(None)
