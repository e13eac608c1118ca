"""A disk that refuses for a while.

``query_only`` makes SQLite itself refuse to write (SQLITE_READONLY), at once and until it is lifted;
``max_page_count`` makes the disk full for what needs new pages (SQLITE_FULL).
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import trio
from structlog.testing import LogCapture
from trio.testing import MockClock

from comfyd.journal import JobFilter, JobRow, Journal, JournalTimes, JournalUnavailable, WebhookRow

NewJob = Callable[..., JobRow]
NewWebhook = Callable[..., WebhookRow]
Opened = Callable[..., AbstractAsyncContextManager[Journal]]
Accept = Callable[[Journal, JobRow], Awaitable[JournalUnavailable | None]]
End = Callable[..., Awaitable[None]]

LATER = JournalTimes(retry_s=3600.0, erase_s=3600.0)  # so that a test decides when it is tried again


async def refuse(journal: Journal) -> None:
    await journal._ask(lambda database, _: database.connection.execute("PRAGMA query_only = ON").fetchall())


async def relent(journal: Journal) -> None:
    # The read's own turn still meets the outage, and its answer lifts it.
    await journal._ask(lambda database, _: database.connection.execute("PRAGMA query_only = OFF").fetchall())


async def limit_pages(journal: Journal, more: int) -> None:
    def limit(connection: Any) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + more}").fetchall()

    await journal._ask(lambda database, _: limit(database.connection))


async def test_nothing_is_left_of_a_job_that_was_refused_even_after_the_outage(
    tmp_path: Path, opened: Opened, accept: Accept, new_job: NewJob
) -> None:
    async with opened(tmp_path / "state", LATER) as journal:
        await refuse(journal)
        answer = await accept(journal, new_job(1))
        assert str(answer) == "the journal cannot be written: it is read-only (SQLITE_READONLY)"
        assert journal.healthy is False
        assert await journal.find_job("job-1") is None
        await relent(journal)
        assert await accept(journal, new_job(2)) is None
        assert [row.id for row in await journal.unfinished_jobs()] == ["job-2"]


async def test_reads_include_what_could_not_be_saved(
    tmp_path: Path, opened: Opened, accept: Accept, end: End, new_job: NewJob, new_webhook: NewWebhook
) -> None:
    async def everything(journal: Journal) -> list[object]:
        return [
            await journal.unfinished_jobs(),
            await journal.find_job("job-1"),
            await journal.find_job("job-2"),
            await journal.list_jobs(JobFilter()),
            await journal.list_jobs(JobFilter(states=frozenset({"succeeded"}))),
            await journal.list_jobs(JobFilter(states=frozenset({"accepted"}), limit=1)),
            await journal.pending_webhooks(),
            await journal.dead_webhooks(),
            await journal.webhooks_of("job-1"),
            await journal.webhooks_of("job-3"),
            await journal.count_webhooks(),
            await journal.max_job_sequence(),
        ]

    async with opened(tmp_path / "state", LATER) as journal:
        for number in (1, 2, 3, 4):
            await accept(journal, new_job(number))
        await end(journal, 3, webhooks=[new_webhook(number, 3) for number in (1, 2, 3)])
        await refuse(journal)
        journal.job_started("job-2", 1)
        journal.job_made("job-2", b"made")
        await end(journal, 1, webhooks=[new_webhook(number, 1) for number in (4, 5, 6)])
        await end(journal, 4)
        journal.webhook_taken("webhook-1")
        journal.webhook_tried("webhook-2", attempts=1, next_at=9.0, error="503")
        journal.webhook_dead("webhook-3", at=9.0, attempts=2, error="410")
        journal.webhook_taken("webhook-4")
        journal.webhook_dead("webhook-5", at=9.0, attempts=2, error="410")
        during = await everything(journal)
        assert journal.pending_changes == 8
        assert await journal.forget_expired(now=1e9, jobs_s=0, dead_s=0, max_kept_bytes=0, max_jobs=0) == []
        assert not await journal.forget_job("job-4")
        await relent(journal)
        after = await everything(journal)
        assert (journal.pending_changes, journal.healthy) == (0, True)
    async with opened(tmp_path / "state") as journal:
        assert during == after == await everything(journal)
        assert [row.id for row in await journal.pending_webhooks()] == ["webhook-2", "webhook-6"]
        assert [row.id for row in await journal.list_jobs(JobFilter(states=frozenset({"succeeded"})))] == [
            "job-4",
            "job-3",
            "job-1",
        ]


async def test_an_outage_is_logged_once_and_its_end_too(
    tmp_path: Path, opened: Opened, accept: Accept, new_job: NewJob, log_output: LogCapture
) -> None:
    async with opened(tmp_path / "state", LATER) as journal:
        await accept(journal, new_job(1))
        await refuse(journal)
        for attempts in range(1, 5):
            journal.job_started("job-1", attempts)
            assert await accept(journal, new_job(attempts + 1)) is not None
        await relent(journal)
        assert await accept(journal, new_job(9)) is None
    (failed, recovered) = log_output.entries
    assert (failed["event"], failed["log_level"], failed["unsaved_changes"]) == ("journal.write_failed", "error", 1)
    assert str(tmp_path) not in failed["reason"]
    assert (recovered["event"], recovered["log_level"]) == ("journal.write_recovered", "info")


async def test_what_is_kept_in_memory_is_one_change_a_job_however_long_it_lasts(
    tmp_path: Path, opened: Opened, accept: Accept, end: End, new_job: NewJob, new_webhook: NewWebhook
) -> None:
    async with opened(tmp_path / "state", LATER) as journal:
        await accept(journal, new_job(1))
        await refuse(journal)
        for attempts in range(1, 500):
            journal.job_started("job-1", attempts)
            journal.job_waiting("job-1", attempts)
        await end(journal, 1, webhooks=[new_webhook(1, 1)])
        for attempts in range(1, 500):
            journal.webhook_tried("webhook-1", attempts=attempts, next_at=1.0, error="x")
        row = await journal.find_job("job-1")
        assert journal.pending_changes == 2
        await relent(journal)
        assert await journal.find_job("job-1") == row
        assert row is not None
        assert (row.state, row.attempts, row.crashes) == ("succeeded", 499, 499)


async def test_an_end_that_could_not_be_saved_is_final_too(
    tmp_path: Path, opened: Opened, accept: Accept, end: End, new_job: NewJob, new_webhook: NewWebhook
) -> None:
    async with opened(tmp_path / "state", LATER) as journal:
        await accept(journal, new_job(1))
        await refuse(journal)
        await end(journal, 1, webhooks=[new_webhook(1, 1)])
        journal.job_started("job-1", 7)
        await end(journal, 1, state="failed", webhooks=[new_webhook(2, 1)])
        await relent(journal)
        row = await journal.find_job("job-1")
        assert row is not None
        assert (row.state, row.attempts) == ("succeeded", 0)
        assert await journal.pending_webhooks() == [new_webhook(1, 1)]


async def test_a_request_that_does_not_fit_any_more_does_not_hold_up_what_has_become_of_jobs(
    tmp_path: Path, opened: Opened, accept: Accept, new_job: NewJob
) -> None:
    async with opened(tmp_path / "state", LATER) as journal:
        await accept(journal, new_job(1))
        await limit_pages(journal, 50)
        journal.job_started("job-1", 3)
        answer = await accept(journal, new_job(2, request=bytes(1 << 20)))
        assert str(answer) == "the journal cannot be written: the disk is full (SQLITE_FULL)"
        assert (journal.pending_changes, journal.healthy) == (0, False)
        (row,) = await journal.unfinished_jobs()
        assert (row.state, row.attempts) == ("running", 3)
        assert await accept(journal, new_job(3)) is None  # a small one fits
        assert journal.healthy


async def test_it_tries_again_by_itself(opened: Opened, accept: Accept, new_job: NewJob, mock_clock: MockClock) -> None:
    async with opened(None, JournalTimes(retry_s=2.0)) as journal:
        await accept(journal, new_job(1))
        await refuse(journal)
        journal.job_started("job-1", 1)
        await journal.max_job_sequence()
        assert (journal.pending_changes, journal.healthy) == (1, False)
        await relent(journal)
        commits = journal.commits
        mock_clock.jump(1.9)
        await trio.testing.wait_all_tasks_blocked()
        assert journal.commits == commits
        mock_clock.jump(0.2)
        await trio.testing.wait_all_tasks_blocked()
        assert (journal.pending_changes, journal.healthy, journal.commits) == (0, True, commits + 1)


async def test_it_finds_out_that_the_disk_is_well_again_when_nobody_writes(
    opened: Opened, accept: Accept, new_job: NewJob, mock_clock: MockClock
) -> None:
    async with opened(None, JournalTimes(retry_s=2.0)) as journal:
        await refuse(journal)
        assert await accept(journal, new_job(1)) is not None
        await relent(journal)
        assert not journal.healthy
        mock_clock.jump(2.1)
        await trio.testing.wait_all_tasks_blocked()
        assert journal.healthy


async def test_what_cannot_be_saved_until_the_end_is_said_to_be_lost(
    tmp_path: Path, opened: Opened, accept: Accept, new_job: NewJob, log_output: LogCapture
) -> None:
    async with opened(tmp_path / "state", LATER) as journal:
        await accept(journal, new_job(1))
        await refuse(journal)
        journal.job_started("job-1", 1)
    assert [(entry["event"], entry.get("changes")) for entry in log_output.entries] == [
        ("journal.write_failed", None),
        ("journal.changes_lost", 1),
    ]


async def test_a_read_that_the_database_refuses_is_an_error_of_ours(tmp_path: Path, opened: Opened) -> None:
    async with opened(tmp_path / "state") as journal:
        await journal._ask(lambda database, _: database.connection.execute("DROP TABLE webhooks").fetchall())
        with trio.fail_after(5):
            try:
                await journal.pending_webhooks()
            except JournalUnavailable as exc:
                assert str(exc).startswith("the journal cannot be read")  # noqa: PT017  both ends are looked at
            else:
                raise AssertionError("a table is missing")
        assert await journal.max_job_sequence() == 0
