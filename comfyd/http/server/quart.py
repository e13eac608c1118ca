"""Quart-Trio with bounded bodies and without surprising timeouts.

Two generations of Quart are in use: 0.22 (Python 3.11, 3.12) fills a request's body with ``append()``, 0.23 (3.13)
with ``await put()``. The body class here serves both.
"""

from collections.abc import Generator
from typing import Any, NoReturn

import quart.wrappers.base
import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, WebsocketScope
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioRequest, TrioResponse
from quart_trio.wrappers.request import TrioBody
from quart_trio.wrappers.response import TrioFileBody
from werkzeug.exceptions import RequestEntityTooLarge

from comfyd.http.server import pins
from comfyd.http.server.streams import ClientGone

pins.check(("quart", "quart-trio"), pins.QUART_MODULES)

log = structlog.get_logger("comfyd.http")

#: Quart's 8 KiB costs two thread hops per piece: 200 MB in 6.3 s instead of 0.15 s.
FILE_PIECE_BYTES = 1024 * 1024


_CLIENT_GONE: type[Exception] = getattr(quart.wrappers.base, "ClientDisconnectedError", ClientGone)


class BoundedBody(TrioBody):
    """A request body of at most *max_content_length* bytes, to be awaited as a whole or iterated over.

    Quart 0.22 does not count what was iterated away, 0.23 counts only after all has been received. Here every byte
    counts when it arrives; what comes after the limit is dropped at once, with all that came before.
    """

    def __init__(self, expected_content_length: int | None, max_content_length: int | None) -> None:
        super().__init__(expected_content_length, max_content_length)
        self._pieces: list[bytes] = []  # bounded by max_content_length
        self._received_bytes = 0
        self._whole: bytes | None = None
        self._ended = False
        self._news = trio.Event()

    def append(self, data: bytes) -> None:
        """Take a piece from the connection (Quart 0.22)."""
        if not data or self._must_raise is not None:
            return
        self._received_bytes += len(data)
        if self._max_content_length is not None and self._received_bytes > self._max_content_length:
            self._must_raise = RequestEntityTooLarge()
            self._pieces.clear()
        else:
            self._pieces.append(data)
        self._tell()

    async def put(self, data: bytes) -> None:
        """Take a piece from the connection (Quart 0.23)."""
        self.append(data)

    def set_complete(self) -> None:
        """Take note that the body has arrived completely."""
        self._ended = True
        self._tell()

    def disconnect(self) -> None:
        """The client left (Quart 0.23). Nothing to do: the handler is being cancelled, which ends its wait."""

    def set_result(self, data: bytes) -> None:
        """Be *data*, completely (Quart's test client)."""
        self.append(data)
        self.set_complete()

    def clear(self) -> None:
        """Forget what was read."""
        self._pieces.clear()
        self._whole = b""

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def get(self) -> bytes:
        """Wait for the next piece; empty at the end.

        Raises:
            RequestEntityTooLarge: the body is over its limit.
        """
        while True:
            if self._must_raise is not None:
                raise self._must_raise
            if self._pieces:
                data = b"".join(self._pieces)
                self._pieces.clear()
                return data
            if self._ended:
                return b""
            await self._news.wait()

    def __aiter__(self) -> "BoundedBody":
        return self

    async def __anext__(self) -> bytes:
        data = await self.get()
        if not data:
            raise StopAsyncIteration
        return data

    def __await__(self) -> Generator[Any, None, bytes]:
        return self._all().__await__()

    async def _all(self) -> bytes:
        while not self._ended or self._must_raise is not None:
            if self._must_raise is not None:
                raise self._must_raise
            await self._news.wait()
        if self._whole is None:
            self._whole = b"".join(self._pieces)
            self._pieces.clear()
        return self._whole


class BoundedRequest(TrioRequest):
    """A request with a :class:`BoundedBody`."""

    body_class = BoundedBody


class FileBody(TrioFileBody):
    """A file sent in pieces worth a thread hop each."""

    buffer_size = FILE_PIECE_BYTES


class Response(TrioResponse):
    """A response whose files are sent in large pieces."""

    file_body_class = FileBody


class NoWebsocket:
    """Refuses websockets: there is none in this app, and no handler of ours would know its failure modes."""

    def __init__(self, _app: QuartTrio, _scope: WebsocketScope) -> None:
        pass

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Answer 404."""
        body = b'{"type":"not-found","title":"Not Found","status":404,"detail":"there is no websocket here"}'
        await receive()
        await send(
            {
                "type": "websocket.http.response.start",
                "status": 404,
                "headers": [
                    (b"content-type", b"application/problem+json"),
                    (b"content-length", b"%d" % len(body)),
                    (b"connection", b"close"),
                ],
            }
        )
        await send({"type": "websocket.http.response.body", "body": body, "more_body": False})


class HardenedQuart(QuartTrio):
    """The app class for ``serve_http``.

    Args:
        import_name: as for Quart.
        max_body_bytes: larger request bodies raise ``RequestEntityTooLarge`` (413) where the handler reads them.
        options: further options of Quart; there is no static folder unless one is named.
    """

    #: Tells ``serve_http`` to leave the 413 to this app, for whose error handlers it is.
    bounds_bodies = True
    request_class = BoundedRequest
    response_class = Response
    asgi_websocket_class = NoWebsocket  # type: ignore[assignment] # Quart only constructs and calls it

    def __init__(self, import_name: str, *, max_body_bytes: int, **options: Any) -> None:
        options.setdefault("static_folder", None)
        super().__init__(import_name, **options)
        self.config.update(
            MAX_CONTENT_LENGTH=max_body_bytes,
            MAX_FORM_MEMORY_SIZE=max_body_bytes,  # forms are bodies like others; the default refuses 500 KB
            MAX_FORM_PARTS=1000,
            BODY_TIMEOUT=None,  # the server cuts slow uploads by their progress; a total would cut honest ones
            RESPONSE_TIMEOUT=None,  # the default of 60 s silently truncates downloads and event streams
            BACKGROUND_TASK_SHUTDOWN_TIMEOUT=0.5,  # there should be none; the stop must not wait for them
        )

    async def asgi_app(self, scope: Any, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve one request.

        Raises (in an exception group):
            ClientGone: the client has left. Quart 0.23 makes an error of its own of it, which nobody would know.
        """
        try:
            await super().asgi_app(scope, receive, send)
        except* _CLIENT_GONE as group:
            raise ClientGone("the client has left") from group

    async def full_dispatch_request(self, *args: Any) -> Any:
        """Dispatch, and keep what Quart-Trio would lose.

        When a handler's nursery ends with both a failure and a cancellation, Quart-Trio goes on with the cancellation
        only. The failure is a bug that someone must hear of.
        """
        try:
            return await super().full_dispatch_request(*args)
        except BaseExceptionGroup as group:
            _log_failures_beside_cancel(group)
            raise

    def run(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: Quart's own development server has none of the hardening."""
        raise NotImplementedError("serve this app with comfyd.http.server.serve_http")


def _log_failures_beside_cancel(group: BaseExceptionGroup[BaseException]) -> None:
    cancelled, failures = group.split(trio.Cancelled)
    if cancelled is not None and failures is not None:
        log.error("http.handler_failed_while_cancelled", exc_info=failures)
