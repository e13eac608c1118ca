"""The journal's file: opening, checking, locking, transactions, and the command line's way in. Everything blocks.

SQLite in WAL mode with ``synchronous=FULL``: COMMIT returns once the log is on the disk (sqlite.org/pragma.html). What
is deleted is overwritten (``secure_delete``), and :meth:`Database.erase` empties the log, which holds older pages.
"""

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import attrs
import structlog

from comfyd.errors import StartupFailed
from comfyd.journal import statements
from comfyd.journal.changes import Unsaved
from comfyd.journal.rows import JournalLocked, JournalUnavailable, WebhookRow
from comfyd.journal.schema import MIGRATIONS, check_version, migrate

__all__ = ["FILE_NAME", "Database", "describe"]

log = structlog.get_logger("comfyd.journal")

FILE_NAME: Final = "journal.sqlite3"
_LOCK_NAME: Final = "lock"
_BESIDE: Final = ("-wal", "-shm")  # SQLite's own files next to the database

_BUSY_TIMEOUT_S: Final = 5.0  # the command line holds the write lock for milliseconds
_ERASE_BUSY_MS: Final = 100  # a reader beside us is not worth waiting for: erasing is tried again
_LOG_BYTES: Final = 8 << 20  # to which the log shrinks after a burst; twice what it has between automatic checkpoints

_REASONS: Final = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "it is read-only",
    sqlite3.SQLITE_IOERR: "the disk cannot be read or written",
    sqlite3.SQLITE_BUSY: "another process holds it locked",
    sqlite3.SQLITE_LOCKED: "another process holds it locked",
    sqlite3.SQLITE_CANTOPEN: "its file cannot be opened",
    sqlite3.SQLITE_PERM: "its file cannot be opened",
    sqlite3.SQLITE_CORRUPT: "its file is damaged",
    sqlite3.SQLITE_NOTADB: "its file is damaged",
    sqlite3.SQLITE_NOMEM: "memory is short",
}


class _Corrupt(Exception):
    """The file is no database, or a damaged one."""


def describe(exc: Exception) -> str:
    """Say in a few words, without paths, why the journal cannot be used."""
    if isinstance(exc, OSError):
        return os.strerror(exc.errno) if exc.errno is not None else type(exc).__name__
    code = getattr(exc, "sqlite_errorcode", None)
    if code is None:
        return f"an unexpected {type(exc).__name__}"
    name = getattr(exc, "sqlite_errorname", "")
    return f"{_REASONS.get(code & 0xFF, 'SQLite refuses')} ({name})"


@attrs.define(eq=False, kw_only=True)
class Database:
    """An open journal. One thread at a time may use it. *folder* None is in memory."""

    connection: sqlite3.Connection
    folder: Path | None
    _lock: IO[bytes] | None = None

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open the daemon's journal in *folder*, made if it is not there, and lock it until :meth:`close`.

        A damaged file is set aside, which is logged, and a new one begun.

        Raises:
            JournalLocked: another daemon has it.
            NewerJournal: a later version wrote it; nothing is changed.
            OSError, sqlite3.Error: the folder or the file cannot be written.
        """
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # the umask may have taken more
        lock = _take_lock(folder)
        try:
            path = folder / FILE_NAME
            try:
                connection = _open_checked(path)
            except _Corrupt as exc:
                aside = _set_aside(path)
                log.error("journal.corrupt", reason=str(exc), moved_to=str(aside))  # noqa: TRY400  # a full story
                connection = _open_checked(path)
        except BaseException:
            lock.close()
            raise
        return cls(connection=connection, folder=folder, lock=lock)

    @classmethod
    def open_memory(cls) -> Self:
        """Open a journal that is gone when it is closed."""
        connection = _connect("file::memory:")
        migrate(connection)
        return cls(connection=connection, folder=None)

    @classmethod
    def open_beside(cls, folder: Path) -> Self:
        """Open the journal for the command line, whether or not a daemon has it open.

        Raises:
            FileNotFoundError: there is none.
            JournalUnavailable: it cannot be read.
            StartupFailed: it is of another version.
        """
        path = folder / FILE_NAME
        path.stat()
        with _told():
            connection = _connect(_uri(path))
            try:
                version = check_version(connection)
            except BaseException:
                connection.close()
                raise
        if version < len(MIGRATIONS):
            connection.close()
            raise StartupFailed("the journal is of an earlier version; start comfyd once to bring it up to date")
        return cls(connection=connection, folder=folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write what is written inside, durably, all or nothing.

        Raises:
            sqlite3.Error: it could not be written; nothing is.
        """
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield self.connection
            self.connection.execute("COMMIT")
        except BaseException:
            # SQLite itself has rolled back after a full disk or an I/O error, but not after a lock.
            if self.connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # the first error is the story
                    self.connection.execute("ROLLBACK")
            raise

    def erase(self) -> bool:
        """Empty the log, so that what was deleted is nowhere in the files. False: not now, try again.

        Raises:
            sqlite3.Error: the disk refuses.
        """
        self.connection.execute(f"PRAGMA busy_timeout = {_ERASE_BUSY_MS:d}")
        try:
            busy = self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            self.connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_S * 1000:.0f}")
        return not busy

    def data_version(self) -> int:
        """Return a number that changes when another connection has committed, and not when this one has."""
        return int(self.connection.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Close the file, the daemon's with an empty log if nobody else reads it, and let go of the lock."""
        try:
            if self._lock is not None:
                with contextlib.suppress(sqlite3.Error):  # a full disk; the log is read when the journal is next opened
                    self.erase()
            self.connection.close()
        finally:
            if self._lock is not None:
                self._lock.close()

    def list_webhooks(self, *, dead_only: bool = False) -> list[WebhookRow]:
        """Return the webhooks that are owed or given up, by sequence.

        Raises:
            JournalUnavailable: the journal cannot be read.
        """
        with _told():
            dead = statements.dead_webhooks(self.connection, Unsaved(), limit=-1)
            if dead_only:
                return dead
            both = dead + statements.pending_webhooks(self.connection, Unsaved())
        return sorted(both, key=lambda row: row.sequence)

    def replay(self, ids: Sequence[str] | None = None) -> int:
        """Make webhooks due at once, with all their attempts before them; None: all dead ones. Return how many.

        Raises:
            JournalUnavailable: the journal cannot be written.
        """
        now = time.time()
        with _told(), self.transaction() as connection:
            if ids is None:
                return connection.execute(
                    "UPDATE webhooks SET dead_at = NULL, attempts = 0, next_at = ? WHERE dead_at IS NOT NULL", (now,)
                ).rowcount
            return connection.executemany(
                "UPDATE webhooks SET dead_at = NULL, attempts = 0, next_at = ? WHERE id = ?",
                [(now, webhook_id) for webhook_id in dict.fromkeys(ids)],
            ).rowcount

    def drop(self, ids: Sequence[str]) -> int:
        """Remove webhooks, dead or not, and return how many.

        Raises:
            JournalUnavailable: the journal cannot be written.
        """
        with _told():
            with self.transaction() as connection:
                dropped = connection.executemany(
                    "DELETE FROM webhooks WHERE id = ?", [(webhook_id,) for webhook_id in ids]
                ).rowcount
            with contextlib.suppress(sqlite3.Error):  # a daemon does it too, once it has noticed
                self.erase()  # the URLs may hold tokens
        return dropped


@contextmanager
def _told() -> Iterator[None]:
    """Translate SQLite's errors into ours."""
    try:
        yield
    except sqlite3.Error as exc:
        raise JournalUnavailable(f"the journal cannot be used: {describe(exc)}") from exc


def _uri(path: Path) -> str:
    return path.absolute().as_uri() + "?mode=rw"


def _connect(uri: str) -> sqlite3.Connection:
    # Transactions are written out (isolation_level None); threads take turns, one at a time.
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute(
            "PRAGMA temp_store = MEMORY"
        )  # a sorter's temporary file would hold rows, outside our folder
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES:d}")
    except BaseException:
        connection.close()
        raise
    return connection


def _open_checked(path: Path) -> sqlite3.Connection:
    """Open the file, made if it is not there, with the tables of this version."""
    _make_private(path)
    try:
        connection = _connect(_uri(path))
        try:
            check_version(connection)
            _check(connection)
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # heard only before there are tables, and before WAL
            connection.execute("PRAGMA journal_mode = WAL")
            migrate(connection)
            with contextlib.suppress(
                sqlite3.OperationalError
            ):  # a command line reads just now; the next erasure does it
                # A daemon that was killed may have left in the log what it had deleted.
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except BaseException:
            connection.close()
            raise
    except sqlite3.DatabaseError as exc:
        if getattr(exc, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise _Corrupt(str(exc)) from exc
        raise
    return connection


def _check(connection: sqlite3.Connection) -> None:
    faults = [str(row[0]) for row in connection.execute("PRAGMA quick_check(1)")]
    if faults != ["ok"]:
        raise _Corrupt("; ".join(faults))


def _make_private(path: Path) -> None:
    """Create the file for its owner only, whatever the umask. SQLite gives its files beside it the same mode.

    Not while SQLite has the file open in this process: closing any descriptor of a file drops the process's POSIX
    locks on it (fcntl(2)), SQLite's among them. Nobody has it open here, as the lock on the folder is taken first.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
    finally:
        os.close(fd)


def _take_lock(folder: Path) -> IO[bytes]:
    path = folder / _LOCK_NAME
    _make_private(path)
    lock = path.open("r+b")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise JournalLocked from None
    except BaseException:
        lock.close()
        raise
    return lock


def _set_aside(path: Path) -> Path:
    """Rename a damaged journal, with what belongs to it, so that SQLite's tools can still look at it."""
    name = f"{path.name}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    aside = path.with_name(name)
    count = 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{name}-{count}")
    path.rename(aside)
    for suffix in _BESIDE:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside
