"""What is left after a kill, at any moment."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfyd.journal import Database, JobRow
from comfyd.journal.changes import Unsaved
from comfyd.journal.statements import accept, unfinished_jobs

CHILD = Path(__file__).parent / "journal_child.py"


def ids(database: Database) -> list[str]:
    return [row.id for row in unfinished_jobs(database.connection, Unsaved())]


def test_every_job_that_was_told_durable_is_there_after_sigkill(tmp_path: Path) -> None:
    command = [sys.executable, str(CHILD), "accept", str(tmp_path / "state")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().decode().strip() for _ in range(300)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read().decode().split()
    with Database.open(tmp_path / "state") as database:
        found = ids(database)
    assert told == [f"job-{number}" for number in range(1, len(told) + 1)]
    assert found[: len(told)] == told
    assert found == [f"job-{number}" for number in range(1, len(found) + 1)]  # no gap behind what was told either


def test_a_batch_is_there_wholly_or_not_at_all_wherever_it_is_killed(tmp_path: Path, child: Callable[..., Any]) -> None:
    results = child("crash", tmp_path / "crash")
    before = [["job-1", "failed", 0], ["job-2", "accepted", 1], ["webhook-1", 0]]
    after = [
        ["job-1", "failed", 0],
        ["job-2", "succeeded", 0],
        ["job-3", "accepted", 1],
        ["job-4", "accepted", 1],
        ["webhook-1", 4],
        ["webhook-2", 0],
    ]
    assert len(results) > 15  # statements of the batch, each a place to die at
    assert [result["contents"] for result in results[:-1]] == [before] * (len(results) - 1)
    assert results[-1] == {"killed": False, "contents": after}


def test_a_log_that_is_torn_anywhere_loses_only_whole_batches_from_its_end(
    tmp_path: Path, new_job: Callable[..., JobRow]
) -> None:
    database = Database.open(tmp_path / "state")
    for batch in range(3):
        with database.transaction() as connection:
            for number in (2 * batch + 1, 2 * batch + 2):
                accept(connection, new_job(number, request=b"x" * 3000))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "state", copy)  # as a machine without power leaves it
    database.close()
    wal = (copy / "journal.sqlite3-wal").read_bytes()
    found = []
    for length in range(len(wal), -1, -1500):
        torn = tmp_path / str(length)
        shutil.copytree(copy, torn)
        (torn / "journal.sqlite3-shm").unlink()
        (torn / "journal.sqlite3-wal").write_bytes(wal[:length])
        with Database.open(torn) as database:
            found.append(len(ids(database)))
    assert found == sorted(found, reverse=True)
    assert set(found) == {6, 4, 2, 0}


def test_a_full_disk_refuses_new_jobs_keeps_what_jobs_have_become_and_recovers_by_itself(
    tmp_path: Path, child: Callable[..., Any]
) -> None:
    story = child("full", tmp_path / "state")
    assert story["accepted"] >= 2
    assert story["refused"].startswith("the journal cannot be written: the disk")
    assert str(tmp_path) not in story["refused"]
    assert story["healthy_when_full"] is False
    assert story["unsaved"] == 1
    assert story["told_meanwhile"] == ["failed", True]
    assert story["healthy_again"] is True
    assert story["accepts_again"] is True
    assert story["jobs"] == story["accepted"] + 1
    assert story["states"] == ["failed"]
    assert story["webhooks"] == ["webhook-1"]
    assert story["events"] == ["journal.write_failed", "journal.write_recovered"]
