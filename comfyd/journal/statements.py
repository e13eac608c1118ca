"""The journal's SQL. Functions of an open connection; those that write are called inside a transaction."""

import json
import sqlite3
from collections.abc import Iterable
from typing import Final

import attrs

from comfyd.journal.changes import JobChange, Unsaved, WebhookChange
from comfyd.journal.rows import JobFilter, JobIdTaken, JobRow, WebhookRow

__all__ = [
    "RowRefused",
    "accept",
    "change",
    "count_webhooks",
    "dead_webhooks",
    "find_job",
    "forget_expired",
    "identity",
    "list_jobs",
    "max_job_sequence",
    "max_webhook_sequence",
    "pending_webhooks",
    "probe",
    "resume_interrupted",
    "unfinished_jobs",
    "webhooks_of",
]

_VACUUMED_PAGES: Final = 4096  # given back to the file system at once: 16 MiB, some 20 ms of work
_LAST_SEQUENCE: Final = 2**63 - 1

# What sqlite3 raises when it is the row that does not fit, as opposed to the disk. A str with half a surrogate pair is
# a UnicodeEncodeError (a ValueError), an int beyond 64 bits an OverflowError.
_UNFIT: Final = (
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    OverflowError,
    ValueError,
)


class RowRefused(Exception):
    """One row cannot be written, on any disk. The others of its transaction can."""


def accept(connection: sqlite3.Connection, row: JobRow) -> None:
    """Add a job.

    Raises:
        JobIdTaken: a row has this id or key.
        RowRefused: the row cannot be stored.
    """
    with _savepoint(connection):
        try:
            cursor = connection.execute(
                """
                INSERT INTO jobs (id, key, sequence, accepted_at, deadline_at, digest, workflow, state, attempts,
                    crashes, daemon_deaths, made, outcome, ended_at, kept_bytes)
                VALUES (:id, :key, :sequence, :accepted_at, :deadline_at, :digest, :workflow, :state, :attempts,
                    :crashes, :daemon_deaths, :made, :outcome, :ended_at, :kept_bytes)
                """,
                attrs.asdict(row, recurse=False),
            )
        except sqlite3.IntegrityError as exc:
            if exc.sqlite_errorname == "SQLITE_CONSTRAINT_UNIQUE":
                raise JobIdTaken from exc
            raise
        if row.request is not None:
            connection.execute("INSERT INTO requests VALUES (?, ?)", (cursor.lastrowid, row.request))


def change(connection: sqlite3.Connection, wanted: JobChange | WebhookChange) -> None:
    """Make a row what *wanted* says. A webhook that is not there any more is no fault: the command line drops them.

    Raises:
        RowRefused: there is no such job, or it has ended; or a value cannot be stored.
    """
    with _savepoint(connection):
        if isinstance(wanted, JobChange):
            _change_job(connection, wanted)
        elif wanted.taken:
            connection.execute("DELETE FROM webhooks WHERE id = ?", (wanted.webhook_id,))
        else:
            connection.execute(
                """
                UPDATE webhooks SET attempts = :attempts, next_at = :next_at, dead_at = :dead_at,
                    last_error = :last_error
                WHERE id = :webhook_id
                """,
                attrs.asdict(wanted, recurse=False),
            )


def _change_job(connection: sqlite3.Connection, wanted: JobChange) -> None:
    updated = connection.execute(
        """
        UPDATE jobs SET state = :state, attempts = coalesce(:attempts, attempts), crashes = coalesce(:crashes, crashes),
            made = :made, outcome = :outcome, ended_at = :ended_at, kept_bytes = :kept_bytes
        WHERE id = :job_id AND ended_at IS NULL
        """,
        attrs.asdict(wanted, recurse=False, filter=lambda attribute, _: attribute.name != "webhooks"),
    )
    if updated.rowcount == 0:
        raise RowRefused("there is no such job, or it has ended")
    if wanted.ended_at is not None:
        connection.execute("DELETE FROM requests WHERE row = (SELECT row FROM jobs WHERE id = ?)", (wanted.job_id,))
    connection.executemany(
        """
        INSERT INTO webhooks (id, sequence, job_id, job_key, url, kind, place, created_at, attempts, next_at,
            dead_at, last_error)
        VALUES (:id, :sequence, :job_id, :job_key, :url, :kind, :place, :created_at, :attempts, :next_at,
            :dead_at, :last_error)
        """,
        [attrs.asdict(row, recurse=False) for row in wanted.webhooks],
    )


class _savepoint:  # noqa: N801  read as a statement, like contextlib's own
    """Undo what one row did if it is refused, and nothing else of the transaction.

    A class and not a generator: it is entered for each row of a batch, and a generator costs three times as much.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("SAVEPOINT row")

    def __exit__(self, _: object, exc: BaseException | None, __: object) -> None:
        if exc is None:
            self._connection.execute("RELEASE row")
        elif isinstance(exc, (*_UNFIT, RowRefused, JobIdTaken)):
            self._connection.execute("ROLLBACK TO row")
            self._connection.execute("RELEASE row")
            if not isinstance(exc, RowRefused | JobIdTaken):
                raise RowRefused(f"a value cannot be stored ({type(exc).__name__})") from exc


def probe(connection: sqlite3.Connection) -> None:
    """Write something, to find out whether the disk takes it."""
    connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'probes'")


def resume_interrupted(connection: sqlite3.Connection) -> None:
    """Count a death of the daemon for each job that was running, and put the job back into the queue."""
    connection.execute(
        "UPDATE jobs SET state = 'queued', daemon_deaths = daemon_deaths + 1"
        " WHERE state = 'running' AND ended_at IS NULL"
    )


def identity(connection: sqlite3.Connection) -> str:
    """Return the name that the journal was given when it was made, 32 hex digits."""
    return str(_one(connection, "SELECT value FROM meta WHERE name = 'identity'"))


def max_job_sequence(connection: sqlite3.Connection) -> int:
    """Return the greatest sequence of a job, 0 without any."""
    return int(_one(connection, "SELECT coalesce(max(sequence), 0) FROM jobs"))


def max_webhook_sequence(connection: sqlite3.Connection) -> int:
    """Return the greatest sequence of a webhook, 0 without any."""
    return int(_one(connection, "SELECT coalesce(max(sequence), 0) FROM webhooks"))


def unfinished_jobs(connection: sqlite3.Connection, unsaved: Unsaved) -> list[JobRow]:
    """Return the jobs that have not ended, whole, by sequence."""
    rows = connection.execute(
        """
        SELECT id, key, sequence, accepted_at, deadline_at, digest, workflow, request, state, attempts, crashes,
            daemon_deaths, made, outcome, ended_at, kept_bytes
        FROM jobs LEFT JOIN requests USING (row) WHERE ended_at IS NULL ORDER BY sequence, row
        """
    )
    jobs = (unsaved.apply_to_job(JobRow(**dict(row))) for row in rows)
    return [job for job in jobs if job.ended_at is None]


def find_job(connection: sqlite3.Connection, unsaved: Unsaved, job_id: str) -> JobRow | None:
    """Return a whole row."""
    row = connection.execute(
        """
        SELECT id, key, sequence, accepted_at, deadline_at, digest, workflow, request, state, attempts, crashes,
            daemon_deaths, made, outcome, ended_at, kept_bytes
        FROM jobs LEFT JOIN requests USING (row) WHERE id = ?
        """,
        (job_id,),
    ).fetchone()
    return None if row is None else unsaved.apply_to_job(JobRow(**dict(row)))


def list_jobs(connection: sqlite3.Connection, unsaved: Unsaved, wanted: JobFilter) -> list[JobRow]:
    """Return jobs without *request* and *made*, the newest first."""
    # A row whose change is not saved is looked at whatever state it has on disk. It may then turn out not to be
    # wanted, hence the higher limit.
    rows = connection.execute(
        """
        SELECT id, key, sequence, accepted_at, deadline_at, digest, workflow, state, attempts, crashes, daemon_deaths,
            outcome, ended_at, kept_bytes
        FROM jobs
        WHERE sequence < :before AND (:workflow IS NULL OR workflow = :workflow)
            AND (:any_state OR state IN (SELECT value FROM json_each(:states))
                OR id IN (SELECT value FROM json_each(:unsaved)))
        ORDER BY sequence DESC, row DESC LIMIT :limit
        """,
        {
            "before": _LAST_SEQUENCE if wanted.before is None else wanted.before,
            "workflow": wanted.workflow,
            "any_state": not wanted.states,
            "states": json.dumps(sorted(wanted.states)),
            "unsaved": json.dumps(list(unsaved.jobs)),
            "limit": wanted.limit + len(unsaved.jobs),
        },
    )
    jobs = (attrs.evolve(unsaved.apply_to_job(JobRow(**dict(row))), made=None) for row in rows)
    return [job for job in jobs if not wanted.states or job.state in wanted.states][: wanted.limit]


def pending_webhooks(connection: sqlite3.Connection, unsaved: Unsaved) -> list[WebhookRow]:
    """Return the webhooks that are still owed, by sequence."""
    if unsaved:
        return [row for row in _all_webhooks(connection, unsaved) if row.dead_at is None]
    return _webhooks(connection.execute("SELECT * FROM webhooks WHERE dead_at IS NULL ORDER BY sequence"))


def dead_webhooks(connection: sqlite3.Connection, unsaved: Unsaved, limit: int) -> list[WebhookRow]:
    """Return the webhooks that were given up, by sequence."""
    if unsaved:
        return [row for row in _all_webhooks(connection, unsaved) if row.dead_at is not None][:limit]
    return _webhooks(
        connection.execute("SELECT * FROM webhooks WHERE dead_at IS NOT NULL ORDER BY sequence LIMIT ?", (limit,))
    )


def webhooks_of(connection: sqlite3.Connection, unsaved: Unsaved, job_id: str) -> list[WebhookRow]:
    """Return a job's webhooks that are owed or given up, by sequence."""
    if unsaved:
        return [row for row in _all_webhooks(connection, unsaved) if row.job_id == job_id]
    return _webhooks(
        connection.execute(
            "SELECT * FROM webhooks WHERE job_key = (SELECT key FROM jobs WHERE id = ?) ORDER BY sequence", (job_id,)
        )
    )


def count_webhooks(connection: sqlite3.Connection, unsaved: Unsaved) -> tuple[int, int]:
    """Return how many webhooks are pending, and how many dead."""
    if unsaved:
        rows = _all_webhooks(connection, unsaved)
        dead = sum(row.dead_at is not None for row in rows)
        return len(rows) - dead, dead
    return (
        int(_one(connection, "SELECT count(*) FROM webhooks WHERE dead_at IS NULL")),
        int(_one(connection, "SELECT count(*) FROM webhooks WHERE dead_at IS NOT NULL")),
    )


def forget_expired(
    connection: sqlite3.Connection,
    *,
    now: float,
    jobs_s: float,
    dead_s: float,
    max_kept_bytes: int,
    max_jobs: int,
    limit: int,
) -> list[tuple[str, str]]:
    """Remove ended jobs that nobody needs, and return the id and key of each, at most *limit*.

    First those that are too old, then the oldest until the rest fits. See :meth:`Journal.forget_expired`.
    """
    aged = connection.execute(
        """
        SELECT id, key FROM (
            SELECT id, key, sequence, ended_at,
                (SELECT max(dead_at) FROM webhooks WHERE job_key = jobs.key) AS last_dead_at
            FROM jobs
            WHERE ended_at < :ended_before
                AND NOT EXISTS (SELECT 1 FROM webhooks WHERE job_key = jobs.key AND dead_at IS NULL)
        )
        WHERE last_dead_at IS NULL OR last_dead_at < :dead_before
        ORDER BY ended_at, sequence LIMIT :limit
        """,
        {"ended_before": now - jobs_s, "dead_before": now - dead_s, "limit": limit},
    )
    forgotten = _remove(connection, aged.fetchall())
    jobs, kept_bytes = connection.execute(
        "SELECT count(*), coalesce(sum(kept_bytes), 0) FROM jobs WHERE ended_at IS NOT NULL"
    ).fetchone()
    excess_jobs, excess_bytes = jobs - max_jobs, kept_bytes - max_kept_bytes
    if (excess_jobs > 0 or excess_bytes > 0) and len(forgotten) < limit:
        chosen: list[sqlite3.Row] = []
        for row in _by_need(connection):
            if (excess_jobs <= 0 and excess_bytes <= 0) or len(forgotten) + len(chosen) >= limit:
                break
            if excess_jobs > 0 or row["kept_bytes"] > 0:  # else forgetting it would make no room where it lacks
                chosen.append(row)
                excess_jobs -= 1
                excess_bytes -= row["kept_bytes"]
        forgotten += _remove(connection, chosen)
    # One page at a time: Python 3.11 takes one step of this pragma, which has steps but no rows, whatever its number.
    for _ in range(min(_VACUUMED_PAGES, int(_one(connection, "PRAGMA freelist_count")))):
        connection.execute("PRAGMA incremental_vacuum(1)").fetchall()
    return forgotten


def forget_job(connection: sqlite3.Connection, job_id: str) -> bool:
    """Remove one ended job, if no webhook of it is pending."""
    rows = connection.execute(
        "SELECT id, key FROM jobs WHERE id = ? AND ended_at IS NOT NULL"
        " AND NOT EXISTS (SELECT 1 FROM webhooks WHERE job_key = jobs.key AND dead_at IS NULL)",
        (job_id,),
    ).fetchall()
    return bool(_remove(connection, rows))


def known_keys(connection: sqlite3.Connection) -> frozenset[str]:
    """Return the keys of all jobs."""
    return frozenset(row["key"] for row in connection.execute("SELECT key FROM jobs"))


def _by_need(connection: sqlite3.Connection) -> Iterable[sqlite3.Row]:
    """Yield the ended jobs without pending webhooks: the oldest first, but those with dead letters last."""
    yield from connection.execute(
        """
        SELECT id, key, kept_bytes FROM jobs
        WHERE ended_at IS NOT NULL AND NOT EXISTS (SELECT 1 FROM webhooks WHERE job_key = jobs.key)
        ORDER BY ended_at, sequence
        """
    )
    yield from connection.execute(
        """
        SELECT id, key, kept_bytes FROM jobs
        WHERE ended_at IS NOT NULL AND key IN (SELECT job_key FROM webhooks WHERE dead_at IS NOT NULL)
            AND NOT EXISTS (SELECT 1 FROM webhooks WHERE job_key = jobs.key AND dead_at IS NULL)
        ORDER BY ended_at, sequence
        """
    )


def _remove(connection: sqlite3.Connection, rows: list[sqlite3.Row]) -> list[tuple[str, str]]:
    connection.executemany("DELETE FROM jobs WHERE key = ?", [(row["key"],) for row in rows])
    return [(row["id"], row["key"]) for row in rows]


def _all_webhooks(connection: sqlite3.Connection, unsaved: Unsaved) -> list[WebhookRow]:
    # Only in an outage: the whole table, as what is not saved may move any row to the other side of a condition.
    alive = {row["id"] for row in connection.execute("SELECT id FROM jobs WHERE ended_at IS NULL")}
    return unsaved.apply_to_webhooks(_webhooks(connection.execute("SELECT * FROM webhooks")), alive)


def _webhooks(rows: Iterable[sqlite3.Row]) -> list[WebhookRow]:
    return [WebhookRow(**dict(row)) for row in rows]


def _one(connection: sqlite3.Connection, query: str) -> str | int:
    value: str | int = connection.execute(query).fetchone()[0]
    return value
