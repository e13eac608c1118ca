"""Which output files a killed daemon may have left. Everything here is sync.

Of jobs in the journal too: once ended they are not taken up again, and their files are removed only after that.

A line is appended when a job begins to make files, and one when they are gone. There is no fsync: the file has to
survive SIGKILL of the daemon, for which the kernel's page cache is enough, not a power cut. So each call takes
microseconds and is made on the Trio thread. Opened after the journal, whose lock keeps other daemons out.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Self

import attrs
import msgspec
import structlog

__all__ = ["Trace", "Traces"]

log = structlog.get_logger("comfyd.journal")

_FILE_NAME: Final = "traces"
_MAX_BYTES: Final = 1 << 20  # then it is written anew, if most of it has ended; some 5,000 jobs
_MAX_READ_BYTES: Final = 64 << 20  # ours is far smaller; whatever else lies there must not fill the memory


class _Line(msgspec.Struct, omit_defaults=True):
    """One line of the file: with *job_id* something began, without it has ended."""

    key: str
    job_id: str | None = None
    prefixes: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Trace:
    """A job whose files may be on disk: outputs whose names begin with one of *prefixes*. *key* is for ``end``."""

    key: str
    job_id: str
    prefixes: tuple[str, ...]


@attrs.define(eq=False, kw_only=True)
class Traces:
    """The file of traces. *left* is what was begun and not ended when it was opened.

    An entry stays, also over the next start, until ``end`` is called with its key. A disk that refuses is logged once
    and otherwise ignored: a file may then be left after a kill, and nothing else.
    """

    left: tuple[Trace, ...] = ()
    _path: Path | None = None
    _fd: int = -1
    _size: int = 0
    _open: dict[str, bytes] = attrs.field(factory=dict)  # the lines of what has not ended; bounded by the jobs alive
    _open_bytes: int = 0
    _torn: bool = False
    _told: bool = False

    @classmethod
    def open(cls, folder: Path | None) -> Self:
        """Read what *folder*'s file has, and go on with it. None: keep no traces. Never raises for a disk."""
        if folder is None:
            return cls()
        path = folder / _FILE_NAME
        try:
            begun = _read(path)
        except FileNotFoundError:
            begun = {}
        except OSError as exc:
            begun = {}
            log.warning("traces.not_read", reason=exc.strerror)
        left = tuple(
            Trace(key=line.key, job_id=line.job_id, prefixes=line.prefixes)
            for line in begun.values()
            if line.job_id is not None
        )
        traces = cls(left=left, path=path)
        for line in begun.values():
            traces._remember(line.key, _encode(line))
        with traces._ignoring_the_disk():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            traces._write_anew()
        return traces

    def begin(self, key: str, job_id: str, prefixes: Sequence[str]) -> None:
        """Note that job *key* (never used twice) may make files from now on. Call it before it can."""
        if self._path is None:
            return
        line = _encode(_Line(key=key, job_id=job_id, prefixes=tuple(prefixes)))
        self._forget(key)
        self._remember(key, line)
        with self._ignoring_the_disk():
            self._append(line)

    def end(self, key: str) -> None:
        """Note that the job's files are gone."""
        if self._path is None or not self._forget(key):
            return
        with self._ignoring_the_disk():
            if not self._open and self._fd >= 0:
                os.ftruncate(self._fd, 0)
                self._size, self._torn = 0, False
            elif self._size > _MAX_BYTES and self._open_bytes * 2 < self._size:
                self._write_anew()
            else:
                self._append(_encode(_Line(key=key)))

    def close(self) -> None:
        """Close the file. What is open stays in it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _remember(self, key: str, line: bytes) -> None:
        self._open[key] = line
        self._open_bytes += len(line)

    def _forget(self, key: str) -> bool:
        line = self._open.pop(key, None)
        self._open_bytes -= len(line or b"")
        return line is not None

    def _append(self, line: bytes) -> None:
        if self._fd < 0:
            self._write_anew()  # the disk refused before; what is open includes this line, or rightly does not
            return
        # In one write: a kill comes before or after it, not within. Only a full disk takes a part of a line.
        data = b"\n" + line if self._torn else line
        written = os.write(self._fd, data)
        self._size += written
        self._torn = written < len(data)
        if self._torn:
            self._say(os.strerror(errno.ENOSPC))

    def _write_anew(self) -> None:
        """Replace the file by one that has only what is open."""
        if self._path is None:
            return
        fresh = self._path.with_name(self._path.name + ".new")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)  # the umask may have taken more; and it may have been there with another mode
            data = b"".join(self._open.values())
            if os.write(fd, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: TRY301  undone like any other error here
            fresh.replace(self._path)
        except BaseException:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise
        self.close()
        self._fd, self._size, self._torn = fd, len(data), False

    @contextlib.contextmanager
    def _ignoring_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            self._say(os.strerror(exc.errno or 0))

    def _say(self, reason: str) -> None:
        if not self._told:
            self._told = True
            log.warning("traces.not_written", reason=reason)


def _encode(line: _Line) -> bytes:
    return _encoder.encode(line) + b"\n"


def _read(path: Path) -> dict[str, _Line]:
    """Return what has begun and not ended, by key. A torn line, or one that makes no sense, is skipped."""
    with path.open("rb") as file:
        data = file.read(_MAX_READ_BYTES)
    begun: dict[str, _Line] = {}
    for text in data.split(b"\n"):
        try:
            line = _decoder.decode(text)
        except msgspec.DecodeError:
            continue
        begun.pop(line.key, None)
        if line.job_id is not None:
            begun[line.key] = line
    return begun


_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(_Line)
