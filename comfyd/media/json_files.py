"""JSON with files in it as base64: its length known before the first byte, read piece by piece as it is sent.

What the 200 of ``/prompt`` and webhooks have in common. A video of 1 GB costs a piece of memory, not a gigabyte.
"""

import base64
import errno
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import attrs
import trio

from comfyd.media.collect import OutputFile

PIECE_BYTES: Final = 3 * (1 << 18)
"""Read at once; a multiple of three, so that the pieces' base64 joins to the base64 of the whole."""
_READING_THREADS: Final = 8
"""Reading is bound by the disk; each reader holds one piece."""
_NOT_THERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})

_limiter = trio.CapacityLimiter(_READING_THREADS)


class FileChanged(Exception):
    """An output file is not what it was when it was collected; what holds it cannot be completed.

    *passing*: it could not be read just now (no descriptor was free, the disk had an error), so it may be there still.
    """

    def __init__(self, filename: str, *, passing: bool = False) -> None:
        super().__init__(filename)
        self.filename = filename
        self.passing = passing


Part = bytes | OutputFile


@attrs.frozen
class JsonFiles:
    """A document in *parts*: JSON as it is, and files, each standing for its content in base64 (without quotes)."""

    parts: tuple[Part, ...] = attrs.field(repr=False)

    @classmethod
    def around(cls, before: bytes, outputs: Sequence[OutputFile], after: bytes) -> Self:
        """Put the strings of all *outputs*, separated by commas, between *before* and *after*."""
        if not outputs:
            return cls((before + after,))
        parts: list[Part] = [before + b'"']
        for place, output in enumerate(outputs):
            if place:
                parts.append(b'","')
            parts.append(output)
        return cls((*parts, b'"' + after))

    @property
    def length(self) -> int:
        """Bytes of the whole."""
        return sum(len(part) if isinstance(part, bytes) else _base64_length(part.size_bytes) for part in self.parts)

    @property
    def to_read_bytes(self) -> int:
        """Bytes that have to be read from files; 0 too if all files are empty."""
        return sum(part.size_bytes for part in self.parts if isinstance(part, OutputFile) and part.base64 is None)

    def joined(self) -> bytes | None:
        """Give the whole where nothing has to be read, else None."""
        pieces = [part if isinstance(part, bytes) else part.base64 for part in self.parts]
        known = [piece for piece in pieces if piece is not None]
        return b"".join(known) if len(known) == len(pieces) else None

    async def read_whole(self) -> bytes:
        """Read all of it in one turn of a thread: for small ones.

        Raises:
            FileChanged: a file vanished, or has another size.
        """
        return await trio.to_thread.run_sync(self._read_whole, limiter=_limiter)

    def _read_whole(self) -> bytes:
        return b"".join(part if isinstance(part, bytes) else part.base64 or _read_file(part) for part in self.parts)

    def open(self, piece_bytes: int = PIECE_BYTES) -> "Pieces":
        """Read it piece by piece, in a ``with`` block; *piece_bytes* of a file at once, a multiple of three."""
        return Pieces(self.parts, piece_bytes)


@attrs.define(eq=False)
class Pieces:
    """A :class:`JsonFiles` on its way out, from the first part to the last; leaving the block closes its file.

    An asynchronous iterator and no generator: it may be left in the middle without anybody running it to its end.
    """

    _parts: tuple[Part, ...]
    _piece_bytes: int
    _place: int = 0
    _file: IO[bytes] | None = None
    _left_bytes: int = 0
    _closing: ExitStack = attrs.field(factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Give the next piece.

        Raises:
            FileChanged: a file vanished or shrank; of one that grew, what it had is given.
        """
        while self._file is None:
            if self._place == len(self._parts):
                raise StopAsyncIteration
            part = self._parts[self._place]
            self._place += 1
            if isinstance(part, bytes):
                return part
            if part.base64 is not None:
                return part.base64
            await self._open(part)
        size_bytes = min(self._left_bytes, self._piece_bytes)
        piece = await trio.to_thread.run_sync(_read_piece, self._file, size_bytes, limiter=_limiter)
        self._left_bytes -= size_bytes
        if not self._left_bytes:
            self._file = None
            self._closing.close()
        return piece

    async def _open(self, output: OutputFile) -> None:
        # No checkpoint lies between a file's being opened and its being known here.
        file = await trio.to_thread.run_sync(_open, output.path, limiter=_limiter)
        self._closing.enter_context(file)
        if output.size_bytes:
            self._file, self._left_bytes = file, output.size_bytes
        else:
            self._closing.close()


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb", buffering=0)
    except OSError as exc:
        raise _changed(path.name, exc) from exc


def _read_piece(file: IO[bytes], size_bytes: int) -> bytes:
    """Read exactly so many bytes and encode them."""
    data = bytearray()
    while len(data) < size_bytes:
        try:
            some = file.read(size_bytes - len(data))
        except OSError as exc:
            raise _changed(Path(str(file.name)).name, exc) from exc
        if not some:
            raise FileChanged(Path(str(file.name)).name)
        data += some
    return base64.b64encode(data)


def _read_file(output: OutputFile) -> bytes:
    try:
        data = output.path.read_bytes()
    except OSError as exc:
        raise _changed(output.filename, exc) from exc
    if len(data) != output.size_bytes:
        raise FileChanged(output.filename)
    return base64.b64encode(data)


def _changed(filename: str, error: OSError) -> FileChanged:
    return FileChanged(filename, passing=error.errno not in _NOT_THERE)


def _base64_length(size_bytes: int) -> int:
    return (size_bytes + 2) // 3 * 4
