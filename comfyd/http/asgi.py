"""What our plain ASGI endpoints share: bodies in, answers out, and noticing that the client has gone.

``/prompt`` and what streams are plain ASGI beside Quart: a large answer then costs one piece of memory, and everything
that must be let go at the end of an answer is let go in a ``finally`` around it.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any

import attrs
import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, HTTPScope

from comfyd.errors import Failure, RequestRefused
from comfyd.http.problems import (
    CONTENT_TYPE,
    INTERNAL,
    body_too_large,
    method_not_allowed,
    problem,
    unsupported_media_type,
)
from comfyd.http.server import DISCONNECT
from comfyd.wire import encode_json

log = structlog.get_logger("comfyd.http")

JSON = b"application/json; charset=utf-8"

Headers = Iterable[tuple[bytes, bytes]]


@attrs.frozen
class Exchange:
    """One request with the way back: what a plain endpoint is called with."""

    scope: HTTPScope
    receive: ASGIReceiveCallable
    send: ASGISendCallable


Handler = Callable[[Exchange], Awaitable[None]]


def header(scope: HTTPScope, name: bytes) -> str | None:
    """The first header *name* (lower case) of a request, as text."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), None)


def split_outside_quotes(text: str, separator: str) -> list[str]:
    """Split *text* at each *separator* that is not within a quoted string (RFC 9110, section 5.6.4)."""
    parts: list[str] = []
    begin, quoted, escaped = 0, False, False
    for place, character in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif character == separator and not quoted:
            parts.append(text[begin:place])
            begin = place + 1
    return [*parts, text[begin:]]


def wants_async(scope: HTTPScope) -> bool:
    """Whether the client asks, by ``Prefer: respond-async``, not to be kept waiting (RFC 7240, section 4.1).

    Names are compared without case; of a preference that is given more than once the first one counts (section 2).
    One with a value is another preference than the one that the RFC defines, but for the empty value, which is none.
    """
    given = ",".join(value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"prefer")
    for preference in split_outside_quotes(given, ","):
        name, _, value = split_outside_quotes(preference, ";")[0].partition("=")
        if name.strip().lower() == "respond-async":
            return value.strip() in {"", '""'}
    return False


def check_json_type(scope: HTTPScope) -> None:
    """Make sure that a request does not say that its body is something else than JSON.

    Raises:
        RequestRefused: it does.
    """
    given = header(scope, b"content-type")
    if given is None:
        return
    essence = given.partition(";")[0].strip().lower()
    if essence != "application/json" and not (essence.startswith("application/") and essence.endswith("+json")):
        raise RequestRefused(unsupported_media_type(given))


class ClientGone(Exception):
    """The client left before the end of its request, or of the answer."""


async def read_body(
    scope: HTTPScope, receive: ASGIReceiveCallable, max_body_bytes: int, too_large: Failure | None = None
) -> bytearray:
    """Receive a whole body. *too_large* takes the place of the usual refusal, which names MAX_BODY_SIZE_MB.

    Raises:
        RequestRefused: it is, or says that it is, larger than *max_body_bytes*; the rest is not read.
        ClientGone: it did not come to its end.
    """
    too_large = too_large or body_too_large(max_body_bytes)
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdecimal() and int(declared) > max_body_bytes:
        raise RequestRefused(too_large)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        body += message["body"]
        if len(body) > max_body_bytes:
            raise RequestRefused(too_large)
        if not message["more_body"]:
            return body


async def send_whole(
    send: ASGISendCallable, status: int, body: bytes, content_type: bytes = JSON, headers: Headers = ()
) -> None:
    """Send an answer in one piece."""
    await start(send, status, content_type, [(b"content-length", str(len(body)).encode()), *headers])
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_json(send: ASGISendCallable, status: int, document: Any, headers: Headers = ()) -> None:
    """Send *document*, which is true at this moment only: it is not to be kept by anybody on the way."""
    await send_whole(send, status, encode_json(document), headers=[(b"cache-control", b"no-store"), *headers])


async def send_empty(send: ASGISendCallable, status: int, headers: Headers = ()) -> None:
    """Send an answer that has no body by its status (204, 304), or has none to say."""
    length = [] if status in {204, 304} else [(b"content-length", b"0")]
    await send({"type": "http.response.start", "status": status, "headers": [*length, *headers], "trailers": False})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def start(send: ASGISendCallable, status: int, content_type: bytes, headers: Headers) -> None:
    """Send the beginning of an answer."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", content_type), *headers],
            "trailers": False,
        }
    )


async def send_failure(
    send: ASGISendCallable, failure: Failure, *, job_id: str | None = None, headers: Headers = ()
) -> None:
    """Send *failure* as a problem document."""
    answer = problem(failure, job_id=job_id)
    await send_whole(send, answer.status, answer.body, CONTENT_TYPE.encode(), [*answer.headers, *headers])


async def by_method(exchange: Exchange, handlers: Mapping[str, Handler]) -> None:
    """Answer by the handler of the request's method; HEAD goes to that of GET, as the server drops the body.

    What a handler refuses before it has begun its answer is told as a problem document.
    """
    method = exchange.scope["method"]
    handler = handlers.get("GET" if method == "HEAD" else method)
    if handler is None:
        allowed = ", ".join(
            name for method in handlers for name in ((method, "HEAD") if method == "GET" else (method,))
        )
        await send_failure(exchange.send, method_not_allowed(allowed), headers=[(b"allow", allowed.encode())])
        return
    try:
        await handler(exchange)
    except RequestRefused as exc:
        await send_failure(exchange.send, exc.failure)


async def guarded(send: ASGISendCallable, endpoint: Callable[[ASGISendCallable], Awaitable[None]]) -> None:
    """Run a plain *endpoint*; a bug in it is logged here, once, and told as a 500 if nothing was sent yet.

    An answer that had begun is cut off short of its stated length, so that the client sees that it is not whole. That
    the client has left is no bug: a send may find it out before whoever waits for it does.
    """
    started = False

    async def noted(message: ASGISendEvent) -> None:
        nonlocal started
        started = True
        try:
            await send(message)
        except ConnectionError as exc:  # ASGI 2.4: an OSError, of which our server raises this kind
            raise ClientGone from exc

    try:
        await endpoint(noted)
    except Exception as exc:
        if isinstance(exc, ClientGone) or (isinstance(exc, ExceptionGroup) and exc.split(ClientGone)[1] is None):
            return
        log.exception("http.bug", exc_info=exc, answer_begun=started)
        if started:
            raise
        await send_failure(send, INTERNAL)


async def until_client_gone(exchange: Exchange, work: Callable[[], Awaitable[None]]) -> None:
    """Run *work*, cancelling it when the client leaves. The request's body must have been received.

    Our server calls when that happens; of any other we have to keep asking, which takes a task.
    """
    extension: Any = exchange.scope.get("extensions", {}).get(DISCONNECT)
    if extension is not None:
        with trio.CancelScope() as scope:
            extension["on_disconnect"](partial(scope.cancel, "the client has gone"))
            await work()
        return

    async def watch() -> None:
        while (await exchange.receive())["type"] != "http.disconnect":
            pass
        nursery.cancel_scope.cancel("the client has gone")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await work()
        nursery.cancel_scope.cancel("answered")
