"""The little of ASGI that the engine's routes need: requests, answers, and the types of both."""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final
from urllib.parse import parse_qs

import attrs
import msgspec
import trio

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Small enough that the first bytes leave at once, large enough that a thread hop per block costs nothing beside it.
FILE_BLOCK_BYTES: Final = 256 * 1024


class BodyTooLarge(Exception):
    """The request's body is larger than the server takes."""

    def __init__(self, limit_bytes: int, size_bytes: int) -> None:
        super().__init__(f"Maximum request body size {limit_bytes} exceeded, actual body size {size_bytes}")


@attrs.define(eq=False)
class Request:
    """One HTTP request; the body is read on demand."""

    scope: Scope
    receive: Receive
    max_body_bytes: int

    @property
    def query(self) -> Mapping[str, str]:
        """The query's values; of a repeated one the first."""
        raw = self.scope.get("query_string", b"")
        if not raw:
            return {}
        return {key: values[0] for key, values in parse_qs(raw.decode("latin-1"), keep_blank_values=True).items()}

    def header(self, name: bytes) -> str | None:
        """Return the first header of that (lower-case) name."""
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value).decode("latin-1")
        return None

    async def chunks(self, take: Callable[[bytes], None]) -> None:
        """Hand the body over as it arrives.

        Raises:
            BodyTooLarge: it is; what arrives after that is dropped, so that the answer reaches the client.
        """
        size = 0
        more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            data = message.get("body", b"")
            size += len(data)
            more = message.get("more_body", False)
            if size <= self.max_body_bytes:
                take(data)
        if size > self.max_body_bytes:
            raise BodyTooLarge(self.max_body_bytes, size)

    async def body(self) -> bytes:
        """Read the whole body.

        Raises:
            BodyTooLarge: it is.
        """
        parts: list[bytes] = []
        await self.chunks(parts.append)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def json(self) -> Any:
        """Return the body parsed, integers exact.

        Raises:
            msgspec.DecodeError: it is not JSON.
        """
        return msgspec.json.decode(await self.body())


class ClientGone(Exception):
    """The client left before its request was complete; there is nobody to answer."""


@attrs.frozen(kw_only=True)
class Answer:
    """An HTTP answer: a body in memory, or *file* and its size."""

    status: int = 200
    body: bytes = b""
    content_type: bytes = b"application/octet-stream"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    file: trio.Path | None = None
    file_bytes: int = 0

    async def send(self, send: Send) -> None:
        """Send the answer; a file goes out in blocks."""
        length = self.file_bytes if self.file is not None else len(self.body)
        headers = [(b"content-type", self.content_type), (b"content-length", str(length).encode()), *self.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        if self.file is None:
            await send({"type": "http.response.body", "body": self.body})
            return
        left = self.file_bytes
        async with await self.file.open("rb") as file:
            # Not a byte more than announced, should the file grow meanwhile.
            while left > 0 and (block := await file.read(min(left, FILE_BLOCK_BYTES))):
                left -= len(block)
                await send({"type": "http.response.body", "body": block, "more_body": left > 0})
        if self.file_bytes == 0:
            await send({"type": "http.response.body", "body": b""})


def json_answer(data: Any, status: int = 200) -> Answer:
    """Answer with JSON."""
    return Answer(status=status, body=msgspec.json.encode(data), content_type=b"application/json; charset=utf-8")


def text_answer(text: str, status: int = 200) -> Answer:
    """Answer with plain text."""
    return Answer(status=status, body=text.encode(), content_type=b"text/plain; charset=utf-8")


def empty_answer(status: int = 200) -> Answer:
    """Answer with a status alone."""
    return Answer(status=status)
