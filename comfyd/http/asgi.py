"""What our plain ASGI endpoints share: bodies in, answers out, and noticing that the client has gone.

``/prompt`` and what streams are plain ASGI beside Quart: a large answer then costs one piece of memory, and everything
that must be let go at the end of an answer is let go in a ``finally`` around it.
"""

from collections.abc import Awaitable, Callable, Iterable

import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, HTTPScope

from comfyd.errors import Failure, RequestRefused
from comfyd.http.problems import CONTENT_TYPE, INTERNAL, body_too_large, problem, unsupported_media_type

log = structlog.get_logger("comfyd.http")

JSON = b"application/json; charset=utf-8"

Headers = Iterable[tuple[bytes, bytes]]


def header(scope: HTTPScope, name: bytes) -> str | None:
    """The first header *name* (lower case) of a request, as text."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), None)


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
    """The client left before the end of its request."""


async def read_body(scope: HTTPScope, receive: ASGIReceiveCallable, max_body_bytes: int) -> bytearray:
    """Receive a whole body.

    Raises:
        RequestRefused: it is, or says that it is, larger than *max_body_bytes*; the rest is not read.
        ClientGone: it did not come to its end.
    """
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdecimal() and int(declared) > max_body_bytes:
        raise RequestRefused(body_too_large(max_body_bytes))
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        body += message["body"]
        if len(body) > max_body_bytes:
            raise RequestRefused(body_too_large(max_body_bytes))
        if not message["more_body"]:
            return body


async def send_whole(
    send: ASGISendCallable, status: int, body: bytes, content_type: bytes = JSON, headers: Headers = ()
) -> None:
    """Send an answer in one piece."""
    await start(send, status, content_type, [(b"content-length", str(len(body)).encode()), *headers])
    await send({"type": "http.response.body", "body": body, "more_body": False})


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


async def guarded(send: ASGISendCallable, endpoint: Callable[[ASGISendCallable], Awaitable[None]]) -> None:
    """Run a plain *endpoint*; a bug in it is logged here, once, and told as a 500 if nothing was sent yet.

    An answer that had begun is cut off short of its stated length, so that the client sees that it is not whole.
    """
    started = False

    async def noted(message: ASGISendEvent) -> None:
        nonlocal started
        started = True
        await send(message)

    try:
        await endpoint(noted)
    except Exception as exc:
        log.exception("http.bug", exc_info=exc, answer_begun=started)
        if started:
            raise
        await send_failure(send, INTERNAL)


async def until_client_gone(receive: ASGIReceiveCallable, work: Callable[[], Awaitable[None]]) -> None:
    """Run *work*, cancelling it when the client leaves. The request's body must have been received."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        nursery.cancel_scope.cancel("the client has gone")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await work()
        nursery.cancel_scope.cancel("answered")
