"""The tables, and how a journal of an older version becomes one of this version."""

import sqlite3
import uuid
from collections.abc import Callable, Sequence
from typing import Final

from comfyd.errors import StartupFailed

__all__ = ["MIGRATIONS", "NewerJournal", "check_version", "migrate"]

Migration = Callable[[sqlite3.Connection], None]


class NewerJournal(StartupFailed):
    """The journal was written by a later version of comfyd. It has not been changed."""

    def __init__(self, found: int, known: int) -> None:
        super().__init__(
            f"the journal in STATE_DIR has format {found}, and this comfyd knows formats up to {known}: "
            "it was written by a later version. Run that version, or choose another STATE_DIR"
        )
        self.found = found
        self.known = known


# SQLite writes a row anew as a whole when any column changes, with all its overflow pages. A request can have many
# megabytes and never changes, so it has a table of its own; what changes while a job runs is small.
_TABLES: Final = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """
    CREATE TABLE jobs (
        row INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        key TEXT NOT NULL UNIQUE,
        sequence INTEGER NOT NULL,
        accepted_at REAL NOT NULL,
        deadline_at REAL,
        digest BLOB NOT NULL,
        workflow TEXT NOT NULL,
        state TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        crashes INTEGER NOT NULL,
        daemon_deaths INTEGER NOT NULL,
        made BLOB,
        outcome BLOB,
        ended_at REAL,
        kept_bytes INTEGER NOT NULL
    )
    """,
    "CREATE INDEX jobs_by_sequence ON jobs (sequence)",
    "CREATE INDEX jobs_ended ON jobs (ended_at, sequence, kept_bytes) WHERE ended_at IS NOT NULL",
    "CREATE TABLE requests (row INTEGER PRIMARY KEY REFERENCES jobs (row) ON DELETE CASCADE, request BLOB NOT NULL)",
    """
    CREATE TABLE webhooks (
        id TEXT NOT NULL UNIQUE,
        sequence INTEGER NOT NULL,
        job_id TEXT NOT NULL,
        job_key TEXT NOT NULL REFERENCES jobs (key) ON DELETE CASCADE,
        url TEXT NOT NULL,
        kind TEXT NOT NULL,
        place INTEGER,
        created_at REAL NOT NULL,
        attempts INTEGER NOT NULL,
        next_at REAL,
        dead_at REAL,
        last_error TEXT NOT NULL
    )
    """,
    "CREATE INDEX webhooks_by_job ON webhooks (job_key)",
    "CREATE INDEX webhooks_by_sequence ON webhooks (sequence)",
    "CREATE INDEX webhooks_pending ON webhooks (sequence) WHERE dead_at IS NULL",
    "CREATE INDEX webhooks_dead ON webhooks (sequence) WHERE dead_at IS NOT NULL",
)


def _create_tables(connection: sqlite3.Connection) -> None:
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES ('identity', ?)", (uuid.uuid4().hex,))
    connection.execute("INSERT INTO meta VALUES ('probes', '0')")


MIGRATIONS: Final[tuple[Migration, ...]] = (_create_tables,)
"""Step *i* makes format *i* + 1 of format *i*. What was released is never edited; a change is one more step."""


def check_version(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> int:
    """Return the journal's format, 0 for a new file.

    Raises:
        NewerJournal: this version does not know it.
    """
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found > len(migrations):
        raise NewerJournal(found, len(migrations))
    return found


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Take the steps that are missing, each with its version number in one transaction.

    Raises:
        NewerJournal: the journal is of a later version.
        sqlite3.Error: a step failed; the journal is as it was after the one before.
    """
    for version in range(check_version(connection, migrations), len(migrations)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            migrations[version](connection)
            connection.execute(f"PRAGMA user_version = {version + 1:d}")  # a pragma takes no parameters
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
