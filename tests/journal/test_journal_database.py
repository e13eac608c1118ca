"""The journal's file: who may read it, what is in it, and what becomes of a bad one."""

import os
import sqlite3
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, closing
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from structlog.testing import LogCapture

from comfyd.errors import StartupFailed
from comfyd.journal import (
    Database,
    JobRow,
    Journal,
    JournalLocked,
    JournalTimes,
    JournalUnavailable,
    WebhookRow,
    statements,
)
from comfyd.journal.changes import JobChange, Unsaved
from comfyd.journal.database import _set_aside
from comfyd.journal.schema import MIGRATIONS, NewerJournal, migrate

NewJob = Callable[..., JobRow]
NewWebhook = Callable[..., WebhookRow]
Opened = Callable[..., AbstractAsyncContextManager[Journal]]
Accept = Callable[[Journal, JobRow], Awaitable[JournalUnavailable | None]]
End = Callable[..., Awaitable[None]]

FILE = "journal.sqlite3"


def fill(folder: Path, new_job: NewJob, jobs: int = 50) -> None:
    with Database.open(folder) as database, database.transaction() as connection:
        for number in range(1, jobs + 1):
            statements.accept(connection, new_job(number, request=b"x" * 2000))


def unfinished(database: Database) -> list[str]:
    return [row.id for row in statements.unfinished_jobs(database.connection, Unsaved())]


def raw_text(folder: Path, marker: str) -> list[str]:
    """Find *marker* and what follows in the raw files. In another process: closing a file here drops SQLite's locks."""
    command = ["grep", "--text", "--only-matching", "--no-filename", f"{marker}[0-9]*", *map(str, folder.iterdir())]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()


# Modes and locks


@pytest.fixture(params=[0o000, 0o022, 0o177])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_everything_is_the_owners_only_whatever_the_umask(tmp_path: Path, new_job: NewJob) -> None:
    folder = tmp_path / "state"
    with Database.open(folder) as database:
        with database.transaction() as connection:
            statements.accept(connection, new_job(1))
        modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
        assert modes == {FILE: 0o600, f"{FILE}-wal": 0o600, f"{FILE}-shm": 0o600, "lock": 0o600}
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_there_keeps_its_mode_and_a_file_that_others_could_read_does_not(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    Database.open(tmp_path).close()
    (tmp_path / FILE).chmod(0o644)
    Database.open(tmp_path).close()
    assert tmp_path.stat().st_mode & 0o777 == 0o750
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_a_second_daemon_is_refused_for_as_long_as_the_first_lives(tmp_path: Path, child: Callable[..., Any]) -> None:
    with Database.open(tmp_path):
        assert child("open", tmp_path) == str(JournalLocked())
    assert child("open", tmp_path) == "opened"


def test_closing_leaves_no_log_behind(tmp_path: Path, new_job: NewJob) -> None:
    fill(tmp_path, new_job)
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "lock"]


# Bad files


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)


def scribble(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(Random(1).randbytes(path.stat().st_size))


def scribble_within(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096 * 4)
        file.write(Random(1).randbytes(4096 * 8))


def keep_the_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(100)


def write_text(path: Path) -> None:
    path.write_text("This is no database, but long enough to be looked at as one.\n" * 200)


@pytest.mark.parametrize("damage", [cut, scribble, scribble_within, keep_the_header, write_text])
def test_a_damaged_journal_is_set_aside_and_a_new_one_begun(
    tmp_path: Path, new_job: NewJob, log_output: LogCapture, damage: Callable[[Path], None]
) -> None:
    fill(tmp_path, new_job)
    damage(tmp_path / FILE)
    damaged = (tmp_path / FILE).read_bytes()
    with Database.open(tmp_path) as database:
        assert unfinished(database) == []
        with database.transaction() as connection:
            statements.accept(connection, new_job(1))
    (entry,) = log_output.entries
    assert (entry["event"], entry["log_level"]) == ("journal.corrupt", "error")
    aside = Path(entry["moved_to"])
    assert aside.name.startswith(f"{FILE}.corrupt-")
    assert aside.read_bytes() == damaged
    assert aside.stat().st_mode & 0o777 == 0o600
    with Database.open(tmp_path) as database:
        assert unfinished(database) == ["job-1"]
    assert len(log_output.entries) == 1


def test_a_second_damaged_journal_does_not_replace_the_first_set_aside(
    tmp_path: Path, new_job: NewJob, log_output: LogCapture
) -> None:
    for _ in range(3):
        fill(tmp_path, new_job)
        write_text(tmp_path / FILE)
        (tmp_path / f"{FILE}-wal").write_bytes(b"its log")
        Database.open(tmp_path).close()
    moved = [Path(entry["moved_to"]) for entry in log_output.entries]
    assert len(set(moved)) == 3
    assert all(path.exists() for path in moved)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([FILE, "lock", *(path.name for path in moved)])


def test_the_log_of_a_damaged_journal_goes_with_it(tmp_path: Path) -> None:
    for name in (FILE, f"{FILE}-wal", f"{FILE}-shm"):
        (tmp_path / name).write_text(name)
    aside = _set_aside(tmp_path / FILE)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == [FILE, f"{FILE}-shm", f"{FILE}-wal"]
    assert sorted(tmp_path.iterdir()) == [aside, Path(f"{aside}-shm"), Path(f"{aside}-wal")]


def test_an_empty_file_is_a_new_journal(tmp_path: Path, log_output: LogCapture) -> None:
    (tmp_path / FILE).touch()
    with Database.open(tmp_path) as database:
        assert unfinished(database) == []
    assert log_output.entries == []


# Versions


def test_a_journal_of_a_later_version_is_refused_and_not_changed(tmp_path: Path, new_job: NewJob) -> None:
    fill(tmp_path, new_job)
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = (tmp_path / FILE).read_bytes()
    for _ in range(2):
        with pytest.raises(NewerJournal, match="written by a later version") as caught:
            Database.open(tmp_path)
        assert (caught.value.found, caught.value.known) == (len(MIGRATIONS) + 1, len(MIGRATIONS))
    with pytest.raises(NewerJournal):
        Database.open_beside(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "lock"]


def add_colour(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE jobs ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue'")


def fail_half_way(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE jobs ADD COLUMN flavour TEXT")
    raise sqlite3.OperationalError("disk full")


def test_an_older_journal_takes_the_steps_that_are_missing_and_keeps_its_rows(tmp_path: Path, new_job: NewJob) -> None:
    fill(tmp_path, new_job, jobs=3)
    with Database.open(tmp_path) as database:
        steps = (*MIGRATIONS, add_colour, fail_half_way)
        with pytest.raises(sqlite3.OperationalError, match="disk full"):
            migrate(database.connection, steps)
        # The step that failed left nothing, the one before it is done and not done again.
        columns = {row["name"] for row in database.connection.execute("PRAGMA table_info(jobs)")}
        assert "colour" in columns
        assert "flavour" not in columns
        migrate(database.connection, steps[:-1])
        assert unfinished(database) == ["job-1", "job-2", "job-3"]
        assert database.connection.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS) + 1


def test_an_older_journal_is_not_touched_from_beside(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("CREATE TABLE something (x)")
    with pytest.raises(StartupFailed, match="start comfyd once"):
        Database.open_beside(tmp_path)


# Settings that a mistake in their order would lose without a word


def test_the_settings_are_in_force(tmp_path: Path) -> None:
    def setting(connection: sqlite3.Connection, name: str) -> object:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]

    for _ in range(2):
        with Database.open(tmp_path) as database:
            names = ("journal_mode", "synchronous", "secure_delete", "foreign_keys", "auto_vacuum", "busy_timeout")
            assert database.erase()
            assert [setting(database.connection, name) for name in names] == ["wal", 2, 1, 1, 2, 5000]


# Secrets


async def test_requests_of_ended_jobs_are_nowhere_in_the_files(tmp_path: Path, opened: Opened, new_job: NewJob) -> None:
    folder, random = tmp_path / "state", Random(7)
    async with opened(folder, JournalTimes(erase_s=0.05)) as journal:
        alive: list[int] = []
        number = 0
        for _ in range(25):  # of many sizes, in and out in any order, so that SQLite moves rows between pages
            for _ in range(random.randrange(1, 30)):
                number += 1
                alive.append(number)
                secret = b"SECRET%06d" % number
                size = random.choice((12, 200, 3000, 30_000))
                journal.accept_nowait(new_job(number, request=secret.ljust(size, b"z")), lambda _: None)
            await journal.max_job_sequence()
            random.shuffle(alive)
            for _ in range(random.randrange(len(alive))):
                journal.job_ended(
                    f"job-{alive.pop()}",
                    state="failed",
                    outcome=b"{}" * random.randrange(300),
                    ended_at=5.0,
                    kept_bytes=0,
                    webhooks=(),
                    done=lambda: None,
                )
            await journal.max_job_sequence()
        expected = sorted(f"SECRET{number:06d}" for number in alive)
        assert len(expected) < number
        while (folder / f"{FILE}-wal").stat().st_size:  # noqa: ASYNC110  a file tells nobody that it was emptied
            await trio.sleep(0.02)
        found = await trio.to_thread.run_sync(raw_text, folder, "SECRET")
    assert sorted(found) == expected


async def test_a_request_that_was_refused_and_a_url_that_was_called_are_erased_too(
    tmp_path: Path, opened: Opened, accept: Accept, end: End, new_job: NewJob, new_webhook: NewWebhook
) -> None:
    folder = tmp_path / "state"
    async with opened(folder, JournalTimes(erase_s=0.05)) as journal:
        await accept(journal, new_job(1))
        await end(journal, 1, webhooks=[new_webhook(1, 1, url="https://user:SECRET1@receiver.example")])
        assert "SECRET1" in await trio.to_thread.run_sync(raw_text, folder, "SECRET")
        journal.webhook_taken("webhook-1")
        await journal._ask(lambda database, _: database.connection.execute("PRAGMA max_page_count = 400").fetchall())
        assert await accept(journal, new_job(2, request=b"SECRET2" * (1 << 20))) is not None
        while (folder / f"{FILE}-wal").stat().st_size:  # noqa: ASYNC110  a file tells nobody that it was emptied
            await trio.sleep(0.02)
        assert await trio.to_thread.run_sync(raw_text, folder, "SECRET") == []


def test_what_a_killed_daemon_had_deleted_is_erased_when_the_next_one_starts(tmp_path: Path, new_job: NewJob) -> None:
    database = Database.open(tmp_path)
    with database.transaction() as connection:
        statements.accept(connection, new_job(1, request=b"SECRET1"))
    with database.transaction() as connection:
        statements.change(connection, JobChange(job_id="job-1", state="failed", ended_at=1.0))
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (FILE, f"{FILE}-wal"):
        subprocess.run(["cp", tmp_path / name, copy / name], check=True)
    database.close()
    assert raw_text(copy, "SECRET") != []
    with Database.open(copy):
        assert raw_text(copy, "SECRET") == []


# The command line's way in


def test_where_there_is_no_journal_the_command_line_makes_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError):
            Database.open_beside(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_journal_is_not_touched_from_beside(tmp_path: Path) -> None:
    write_text(tmp_path / FILE)
    with pytest.raises(JournalUnavailable, match="its file is damaged"):
        Database.open_beside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("daemon_runs", [True, False])
def test_webhooks_are_listed_replayed_and_dropped_from_beside(
    tmp_path: Path, new_job: NewJob, new_webhook: NewWebhook, daemon_runs: bool
) -> None:
    hooks = tuple(new_webhook(number, 1, attempts=5, dead_at=9.0 if number > 1 else None) for number in range(1, 6))
    database = Database.open(tmp_path)
    with database.transaction() as connection:
        statements.accept(connection, new_job(1))
        statements.change(connection, JobChange(job_id="job-1", state="failed", ended_at=1.0, webhooks=hooks))
    if not daemon_runs:
        database.close()
    with Database.open_beside(tmp_path) as beside:
        assert beside.list_webhooks() == list(hooks)
        assert beside.list_webhooks(dead_only=True) == list(hooks[1:])
        assert beside.drop(["webhook-2", "webhook-2", "nobody"]) == 1
        assert beside.replay(["webhook-3", "webhook-3", "nobody"]) == 1
        (row,) = (row for row in beside.list_webhooks() if row.id == "webhook-3")
        assert (row.dead_at, row.attempts) == (None, 0)
        assert row.next_at is not None
        assert beside.replay() == 2
        assert beside.list_webhooks(dead_only=True) == []
        assert beside.replay() == 0
        assert beside.drop([]) == beside.replay([]) == 0
    if daemon_runs:
        assert [row.id for row in database.list_webhooks()] == [f"webhook-{number}" for number in (1, 3, 4, 5)]
        database.close()


def test_while_another_process_holds_the_write_lock_the_command_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Database.open(tmp_path) as database, Database.open_beside(tmp_path) as beside:
        beside.connection.execute("PRAGMA busy_timeout = 1")
        database.connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalUnavailable, match="another process holds it locked"):
            beside.replay()
        database.connection.execute("ROLLBACK")
        assert beside.replay() == 0


# Space


def test_forgotten_jobs_give_their_space_back(tmp_path: Path, new_job: NewJob) -> None:
    fill(tmp_path, new_job, jobs=500)
    with Database.open(tmp_path) as database:
        full = (tmp_path / FILE).stat().st_size
        with database.transaction() as connection:
            for number in range(1, 501):
                statements.change(connection, JobChange(job_id=f"job-{number}", state="failed", ended_at=1.0))
        with database.transaction() as connection:
            forgotten = statements.forget_expired(
                connection, now=10.0, jobs_s=1.0, dead_s=1.0, max_kept_bytes=0, max_jobs=0, limit=1000
            )
        assert len(forgotten) == 500
        assert database.erase()
        assert (tmp_path / FILE).stat().st_size < full / 10
