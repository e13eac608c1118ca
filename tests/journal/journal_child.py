"""A process of its own for the journal's tests: to be killed, to be starved of disk, to stand in the way.

Run as ``journal_child.py COMMAND FOLDER ...``; prints JSON. Not imported by the tests.
"""

import itertools
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import structlog
import trio
from structlog.testing import LogCapture

from comfyd.journal import Database, JobRow, Journal, JournalLocked, JournalTimes, WebhookRow, serve_journal
from comfyd.journal.changes import Change, JobChange, Unsaved, WebhookChange
from comfyd.journal.turn import Acceptance, take_turn


def job(number: int, request: bytes = b"{}") -> JobRow:
    return JobRow(
        id=f"job-{number}",
        key=f"key-{number}",
        sequence=number,
        accepted_at=1.0,
        deadline_at=None,
        digest=b"",
        request=request,
    )


def webhook(number: int, job_number: int) -> WebhookRow:
    return WebhookRow(
        id=f"webhook-{number}",
        sequence=number,
        job_id=f"job-{job_number}",
        job_key=f"key-{job_number}",
        url="https://receiver.example",
        kind="v2",
        created_at=1.0,
    )


async def accept_for_ever(folder: Path) -> None:
    """Accept one job after the other, and print each id once it is durable. Ends by being killed."""
    async with trio.open_nursery() as nursery:
        journal: Journal = await nursery.start(partial(serve_journal, folder))
        for number in itertools.count(1):
            told = trio.Event()

            def done(refused: Exception | None, number: int = number, told: trio.Event = told) -> None:
                assert refused is None
                os.write(1, b"job-%d\n" % number)
                told.set()

            journal.accept_nowait(job(number), done)
            if number % 7 == 0:  # so that batches of several are cut as well
                await told.wait()


def try_to_open(folder: Path) -> str:
    """Say whether the journal could be opened as a daemon does."""
    try:
        Database.open(folder).close()
    except JournalLocked as exc:
        return str(exc)
    return "opened"


def write(
    database: Database, accepted: Sequence[JobRow] = (), changes: Sequence[Change] = ()
) -> tuple[int, str | None]:
    acceptances = [Acceptance(row=row, done=lambda _: None) for row in accepted]
    result = take_turn(
        database,
        unsaved=Unsaved(),
        accepted=acceptances,
        changes=changes,
        questions=(),
        erase=False,
        probe=False,
    )
    return len(result.unsaved), result.failure


def contents(database: Database) -> list[list[Any]]:
    rows = database.connection.execute("SELECT id, state, row IN (SELECT row FROM requests) FROM jobs ORDER BY id")
    hooks = database.connection.execute("SELECT id, attempts FROM webhooks ORDER BY id")
    return [*map(list, rows), *map(list, hooks)]


def crash_everywhere(folder: Path) -> list[dict[str, Any]]:
    """Write the same batch again and again, killed before its first statement, its second, and so on."""
    folder.mkdir()
    before = folder / "before"
    with Database.open(before) as database:
        write(database, [job(1), job(2)])
        ended = JobChange(job_id="job-1", state="failed", ended_at=2.0, outcome=b"{}", webhooks=(webhook(1, 1),))
        write(database, (), [ended])
    results = []
    for point in itertools.count(1):
        here = folder / str(point)
        shutil.copytree(before, here)
        pid = os.fork()
        if pid == 0:
            _write_until(here, point)
        _, status = os.waitpid(pid, 0)
        with Database.open(here) as database:
            results.append({"killed": os.WIFSIGNALED(status), "contents": contents(database)})
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return results
    raise AssertionError


def _write_until(folder: Path, point: int) -> NoReturn:
    code = 1
    try:
        database = Database.open(folder)
        seen = itertools.count(1)

        def count(_: str) -> None:
            if next(seen) == point:
                os.kill(os.getpid(), signal.SIGKILL)

        database.connection.set_trace_callback(count)
        changes = (
            JobChange(job_id="job-2", state="succeeded", ended_at=3.0, outcome=b"{}", webhooks=(webhook(2, 2),)),
            WebhookChange(webhook_id="webhook-1", attempts=4),
        )
        _, failure = write(database, [job(3), job(4)], changes)
        code = 0 if failure is None else 2
    finally:
        os._exit(code)


async def outlive_a_full_disk(folder: Path) -> dict[str, Any]:
    """Have the kernel refuse to let files grow (RLIMIT_FSIZE: EFBIG), then allow it again."""
    capture = LogCapture()
    structlog.configure(processors=[capture])
    story: dict[str, Any] = {"accepted": 0}
    async with trio.open_nursery() as nursery:
        times = JournalTimes(retry_s=0.05, erase_s=3600)
        journal: Journal = await nursery.start(partial(serve_journal, folder, times=times))

        async def accept(number: int) -> Exception | None:
            told = trio.Event()
            answers: list[Exception | None] = []

            def done(answer: Exception | None) -> None:
                answers.append(answer)
                told.set()

            journal.accept_nowait(job(number, b"x" * 30_000), done)
            await told.wait()
            return answers[0]

        assert await accept(1) is None
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (folder / "journal.sqlite3-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100_000, hard))
        number = 1
        while (refused := await accept(number + 1)) is None:
            number += 1
        story["accepted"] = number
        story["refused"] = str(refused)
        story["healthy_when_full"] = journal.healthy
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        told = trio.Event()
        journal.job_ended(
            "job-1", state="failed", outcome=b"{}", ended_at=2.0, kept_bytes=0, webhooks=[webhook(1, 1)], done=told.set
        )
        await told.wait()
        story["unsaved"] = journal.pending_changes
        row = await journal.find_job("job-1")
        assert row is not None
        story["told_meanwhile"] = [row.state, row.request is None]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        while journal.pending_changes:  # noqa: ASYNC110  the journal tells nobody that it has recovered
            await trio.sleep(0.01)
        story["healthy_again"] = journal.healthy
        story["accepts_again"] = await accept(number + 1) is None
        nursery.cancel_scope.cancel()
    with Database.open(folder) as database:
        story["jobs"] = len(database.connection.execute("SELECT id FROM jobs").fetchall())
        story["states"] = [row["state"] for row in database.connection.execute("SELECT state FROM jobs WHERE row = 1")]
        story["webhooks"] = [row.id for row in database.list_webhooks()]
    story["events"] = [entry["event"] for entry in capture.entries]
    return story


def main() -> None:
    command, folder = sys.argv[1], Path(sys.argv[2])
    match command:
        case "accept":
            trio.run(accept_for_ever, folder)
        case "open":
            print(json.dumps(try_to_open(folder)))
        case "crash":
            print(json.dumps(crash_everywhere(folder)))
        case "full":
            print(json.dumps(trio.run(outlive_a_full_disk, folder)))
        case _:
            raise SystemExit(f"no such command: {command}")


if __name__ == "__main__":
    main()
