"""The body of a request with local files in it, as base64 that is made while it is sent.

A request may be as large as the daemon takes (``MAX_BODY_SIZE_MB``, 100 by default), and several files of that size can
be meant by mistake: so a file is read piece by piece, and its length is known before the first byte is sent.
"""

import base64
import os
import stat
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import attrs
import trio

from comfyd.cli.submit.errors import BadUse
from comfyd.wire import encode_json

MAX_UNSIZED_BYTES: Final = 256 * 1024 * 1024
"""Of a pipe, which has to be read to its end to know its size."""
_PIECE_BYTES: Final = 3 * (1 << 18)
"""A multiple of three, so that the pieces' base64 is that of the whole."""


@attrs.frozen(kw_only=True)
class Attachment:
    """A local file that goes into the request. *data* is its content, where it is a pipe that was read."""

    path: Path
    size_bytes: int
    data: bytes | None = attrs.field(default=None, repr=False)

    @classmethod
    def of(cls, path: Path) -> "Attachment":
        """Look at the file at *path*. Blocks, for a pipe until its other end is closed.

        Raises:
            BadUse: it cannot be read, or is none.
        """
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                if stat.S_ISREG(found.st_mode):
                    return cls(path=path, size_bytes=found.st_size)
                data = file.read(MAX_UNSIZED_BYTES + 1)
        except OSError as exc:
            raise BadUse(f"{path} cannot be read: {exc.strerror}") from exc
        if len(data) > MAX_UNSIZED_BYTES:
            raise BadUse(f"{path} is larger than {MAX_UNSIZED_BYTES >> 20} MB and no regular file")
        return cls(path=path, size_bytes=len(data), data=data)

    @property
    def encoded_bytes(self) -> int:
        """The length of its base64."""
        return (self.size_bytes + 2) // 3 * 4

    def pieces(self) -> Iterator[bytes]:
        """Give its base64. Blocks.

        Raises:
            BadUse: it is not what it was.
        """
        if self.data is not None:
            yield base64.b64encode(self.data)
            return
        try:
            with self.path.open("rb") as file:
                yield from self._pieces_of(file)
        except OSError as exc:
            raise BadUse(f"{self.path} cannot be read: {exc.strerror}") from exc

    def _pieces_of(self, file: BinaryIO) -> Iterator[bytes]:
        left = self.size_bytes
        while left:
            data = file.read(min(left, _PIECE_BYTES))  # buffered: it is short only at the end of the file
            left -= len(data)
            if left and len(data) < _PIECE_BYTES:
                raise BadUse(f"{self.path} became shorter while it was sent")
            yield base64.b64encode(data)


@attrs.define
class Attachments:
    """The files of one request, each under a text that stands in its place until the request is written."""

    _by_text: dict[str, Attachment] = attrs.field(factory=dict)

    def add(self, path: Path) -> str:
        """Take in a file; return the text to put where its base64 is to be.

        Raises:
            BadUse: it cannot be read.
        """
        text = f"@{uuid.uuid4().hex}"
        self._by_text[text] = Attachment.of(path)
        return text

    def body(self, document: Mapping[str, Any]) -> "Body":
        """Write *document* with the files in the place of their texts."""
        rest = encode_json(document)
        parts: list[bytes | Attachment] = []
        places = sorted((rest.find(f'"{text}"'.encode()), text) for text in self._by_text)
        begin = 0
        for place, text in places:
            if place < 0:  # a later --set took its place
                continue
            parts += [rest[begin : place + 1], self._by_text[text]]
            begin = place + 1 + len(text)
        return Body((*parts, rest[begin:]))


@attrs.frozen
class Body:
    """A request's body. It can be sent more than once."""

    parts: tuple[bytes | Attachment, ...]

    @property
    def length(self) -> int:
        """How many bytes it has."""
        return sum(len(part) if isinstance(part, bytes) else part.encoded_bytes for part in self.parts)

    def pieces(self) -> Iterator[bytes]:
        """Give it piece by piece. Blocks.

        Raises:
            BadUse: a file is not what it was.
        """
        for part in self.parts:
            if isinstance(part, bytes):
                yield part
            else:
                yield from part.pieces()


@attrs.define(eq=False)
class Sending(AsyncIterator[bytes]):
    """A :class:`Body` on its way. An object and no async generator: who sends it may leave it in the middle."""

    body: Body
    _pieces: Iterator[bytes] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        """Begin at the beginning."""
        self._pieces = self.body.pieces()

    def __aiter__(self) -> "Sending":
        """Itself, as every iterator."""
        return self

    async def __anext__(self) -> bytes:
        """Read the next piece in a thread."""
        piece = await trio.to_thread.run_sync(next, self._pieces, None)
        if piece is None:
            raise StopAsyncIteration
        return piece
