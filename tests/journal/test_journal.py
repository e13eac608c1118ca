"""The journal as its callers see it."""

import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import LogCapture
from trio.testing import MockClock, wait_all_tasks_blocked

from comfyd.journal import (
    Database,
    JobFilter,
    JobIdTaken,
    JobRow,
    Journal,
    JournalLocked,
    JournalTimes,
    JournalUnavailable,
    WebhookRow,
    serve_journal,
)

NewJob = Callable[..., JobRow]
NewWebhook = Callable[..., WebhookRow]
Opened = Callable[..., AbstractAsyncContextManager[Journal]]
Accept = Callable[[Journal, JobRow], Awaitable[JournalUnavailable | None]]
End = Callable[..., Awaitable[None]]

ALL: dict[str, Any] = {"now": 1e9, "jobs_s": 0.0, "dead_s": 0.0, "max_kept_bytes": 0, "max_jobs": 0}


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "state" if request.param == "disk" else None


# Accepting


async def test_accepted_jobs_are_found_whole(
    folder: Path | None, opened: Opened, accept: Accept, new_job: NewJob
) -> None:
    row = new_job(1, deadline_at=7.5, workflow="portrait", request=b"\x00" * 100_000)
    async with opened(folder) as journal:
        assert await accept(journal, row) is None
        assert await journal.find_job("job-1") == row
        assert await journal.unfinished_jobs() == [row]
        assert await journal.find_job("job-2") is None
        assert await journal.max_job_sequence() == 1
        assert journal.durable is (folder is not None)
        assert journal.healthy


async def test_what_waits_while_a_commit_is_on_its_way_is_one_commit(
    tmp_path: Path, opened: Opened, accept: Accept, new_job: NewJob
) -> None:
    async with opened(tmp_path / "state") as journal:
        async with trio.open_nursery() as nursery:
            for number in range(1, 201):
                nursery.start_soon(accept, journal, new_job(number))
        assert journal.commits <= 2
        assert len(await journal.unfinished_jobs()) == 200


async def test_call_backs_come_in_the_order_of_the_calls_and_after_the_commit(
    tmp_path: Path, opened: Opened, new_job: NewJob
) -> None:
    heard: list[str] = []
    told = trio.Event()
    committed: list[int] = []

    def accepted(number: int, refused: JournalUnavailable | None) -> None:
        assert refused is None
        heard.append(f"accepted {number}")
        with sqlite3.connect(f"file:{tmp_path}/state/journal.sqlite3?mode=ro", uri=True) as reader:
            committed.append(reader.execute("SELECT count(*) FROM jobs WHERE id = ?", (f"job-{number}",)).fetchone()[0])
        reader.close()

    def ended(number: int) -> None:
        heard.append(f"ended {number}")
        if number == 2:
            told.set()

    async with opened(tmp_path / "state") as journal:
        for number in (1, 2):
            journal.accept_nowait(new_job(number), partial(accepted, number))
            journal.job_ended(
                f"job-{number}",
                state="failed",
                outcome=b"{}",
                ended_at=1.0,
                kept_bytes=0,
                webhooks=[],
                done=partial(ended, number),
            )
        assert heard == []
        await told.wait()
    assert heard == ["accepted 1", "ended 1", "accepted 2", "ended 2"]
    assert committed == [1, 1]


async def test_an_id_that_is_taken_is_refused_and_the_rest_of_the_batch_is_not(
    folder: Path | None, opened: Opened, accept: Accept, new_job: NewJob
) -> None:
    answers: dict[str, JournalUnavailable | None] = {}

    async def note(journal: Journal, row: JobRow) -> None:
        answers[row.key] = await accept(journal, row)

    async with opened(folder) as journal:
        assert await accept(journal, new_job(1)) is None
        async with trio.open_nursery() as nursery:
            for row in (
                new_job(2),
                new_job(3, id="job-1"),
                new_job(4, id="half a pair: \ud800"),
                new_job(5, sequence=2**70),
                new_job(6),
            ):
                nursery.start_soon(note, journal, row)
        assert isinstance(answers["key-3"], JobIdTaken)
        assert "cannot be stored (UnicodeEncodeError)" in str(answers["key-4"])
        assert "cannot be stored (OverflowError)" in str(answers["key-5"])
        assert answers["key-2"] is answers["key-6"] is None
        assert [row.id for row in await journal.unfinished_jobs()] == ["job-1", "job-2", "job-6"]
        assert journal.healthy


async def test_more_requests_than_can_wait_for_the_disk_are_refused(
    tmp_path: Path, opened: Opened, new_job: NewJob
) -> None:
    answers: list[JournalUnavailable | None] = []
    told = trio.Event()

    def done(answer: JournalUnavailable | None) -> None:
        answers.append(answer)
        if len(answers) == 4100:
            told.set()

    async with opened(tmp_path / "state") as journal:
        for number in range(1, 4101):
            journal.accept_nowait(new_job(number), done)
        await told.wait()
        assert answers[:4096] == [None] * 4096
        assert [str(answer) for answer in answers[4096:]] == ["too many requests wait for the journal's disk"] * 4
        assert len(await journal.unfinished_jobs()) == 4096


async def test_a_huge_request_shares_its_commit_with_nothing_that_comes_after_it(
    tmp_path: Path, opened: Opened, accept: Accept, new_job: NewJob
) -> None:
    async with opened(tmp_path / "state") as journal:
        async with trio.open_nursery() as nursery:
            for number in (1, 2, 3):
                nursery.start_soon(accept, journal, new_job(number, request=bytes(17 << 20)))
        assert journal.commits == 3


# What becomes of jobs


async def test_a_job_goes_its_way(
    folder: Path | None, opened: Opened, accept: Accept, end: End, new_job: NewJob, new_webhook: NewWebhook
) -> None:
    async with opened(folder) as journal:
        await accept(journal, new_job(1))

        async def shown() -> tuple[object, ...]:
            row = await journal.find_job("job-1")
            assert row is not None
            return (row.state, row.attempts, row.crashes, row.made, row.outcome, row.ended_at, row.request is None)

        journal.job_started("job-1", 1)
        assert await shown() == ("running", 1, 0, None, None, None, False)
        journal.job_waiting("job-1", 1)
        assert await shown() == ("queued", 1, 1, None, None, None, False)
        journal.job_started("job-1", 2)
        journal.job_made("job-1", b"made")
        assert await shown() == ("delivering", 2, 1, b"made", None, None, False)
        await end(journal, 1, outcome=b"told", ended_at=9.0, kept_bytes=5, webhooks=[new_webhook(1, 1)])
        assert await shown() == ("succeeded", 2, 1, None, b"told", 9.0, True)
        assert await journal.unfinished_jobs() == []
        assert await journal.webhooks_of("job-1") == await journal.pending_webhooks() == [new_webhook(1, 1)]
        assert journal.pending_changes == 0


async def test_a_job_that_has_ended_stays_as_it_ended(
    folder: Path | None, opened: Opened, accept: Accept, end: End, new_job: NewJob, log_output: LogCapture
) -> None:
    async with opened(folder) as journal:
        await accept(journal, new_job(1))
        await end(journal, 1)
        ended = await journal.find_job("job-1")
        journal.job_started("job-1", 9)
        journal.job_started("nobody", 1)
        assert await journal.find_job("job-1") == ended
        assert journal.healthy
    refused = [entry["job_id"] for entry in log_output.entries if entry["event"] == "journal.change_refused"]
    assert refused == ["job-1", "nobody"]


async def test_a_change_that_cannot_be_stored_holds_up_no_other(
    folder: Path | None,
    opened: Opened,
    accept: Accept,
    new_job: NewJob,
    new_webhook: NewWebhook,
    log_output: LogCapture,
) -> None:
    async with opened(folder) as journal:
        await accept(journal, new_job(1))
        await accept(journal, new_job(2))
        unfit = [new_webhook(1, 1), new_webhook(2, 1, url="\ud800")]
        journal.job_ended(
            "job-1", state="failed", outcome=b"{}", ended_at=1.0, kept_bytes=0, webhooks=unfit, done=lambda: None
        )
        journal.job_started("job-2", 1)
        states = {row.id: row.state for row in await journal.unfinished_jobs()}
        assert states == {"job-1": "accepted", "job-2": "running"}  # the unfit end was undone as a whole
        assert await journal.pending_webhooks() == []
        assert (journal.healthy, journal.pending_changes) == (True, 0)
    assert [entry["event"] for entry in log_output.entries] == ["journal.change_refused"]


async def test_jobs_are_listed_newest_first_in_pages_without_their_requests(
    folder: Path | None, opened: Opened, accept: Accept, end: End, new_job: NewJob
) -> None:
    async with opened(folder) as journal:
        for number in range(1, 8):
            await accept(journal, new_job(number, workflow="even" if number % 2 == 0 else ""))
        journal.job_made("job-7", b"made")
        await end(journal, 3, outcome=b"three")

        async def listed(**wanted: Any) -> list[int]:
            return [row.sequence for row in await journal.list_jobs(JobFilter(**wanted))]

        assert await listed() == [7, 6, 5, 4, 3, 2, 1]
        assert await listed(limit=2) == [7, 6]
        assert await listed(limit=2, before=6) == [5, 4]
        assert await listed(workflow="even") == [6, 4, 2]
        assert await listed(workflow="") == [7, 5, 3, 1]
        assert await listed(states=frozenset({"succeeded", "delivering"})) == [7, 3]
        rows = await journal.list_jobs(JobFilter(states=frozenset({"succeeded", "delivering"})))
        assert [(row.request, row.made, row.outcome) for row in rows] == [(None, None, None), (None, None, b"three")]


async def test_jobs_that_ran_when_the_daemon_died_are_queued_again_and_the_death_is_counted(
    tmp_path: Path, opened: Opened, accept: Accept, end: End, new_job: NewJob
) -> None:
    async with opened(tmp_path / "state") as journal:
        for number in (1, 2, 3, 4):
            await accept(journal, new_job(number))
        journal.job_started("job-2", 1)
        journal.job_made("job-3", b"made")
        journal.job_started("job-4", 1)
        await end(journal, 4)
    for deaths in (1, 2):
        async with opened(tmp_path / "state") as journal:
            rows = [(row.id, row.state, row.daemon_deaths, row.made) for row in await journal.unfinished_jobs()]
            assert rows == [
                ("job-1", "accepted", 0, None),
                ("job-2", "queued", deaths, None),
                ("job-3", "delivering", 0, b"made"),
            ]
            journal.job_started("job-2", 2)


async def test_the_identity_stays_over_starts_and_differs_between_journals(tmp_path: Path, opened: Opened) -> None:
    seen = []
    for name in ("one", "one", "two", None):
        async with opened(None if name is None else tmp_path / name) as journal:
            seen.append(journal.identity)
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3
    assert all(len(bytes.fromhex(identity)) == 16 for identity in seen)


# Webhooks


async def test_a_webhook_goes_its_way(
    folder: Path | None, opened: Opened, accept: Accept, end: End, new_job: NewJob, new_webhook: NewWebhook
) -> None:
    hooks = [new_webhook(1, 1), new_webhook(2, 1, kind="v1-output", place=0), new_webhook(3, 1, place=1)]
    async with opened(folder) as journal:
        await accept(journal, new_job(1))
        await end(journal, 1, webhooks=hooks)
        journal.webhook_tried("webhook-2", attempts=1, next_at=3000.0, error="503")
        journal.webhook_dead("webhook-3", at=4000.0, attempts=9, error="410")
        journal.webhook_taken("webhook-1")
        journal.webhook_taken("nobody")
        (pending,) = await journal.pending_webhooks()
        (dead,) = await journal.dead_webhooks()
        assert (pending.id, pending.attempts, pending.next_at, pending.last_error) == ("webhook-2", 1, 3000.0, "503")
        assert (pending.kind, pending.place) == ("v1-output", 0)
        assert (dead.id, dead.attempts, dead.dead_at, dead.last_error) == ("webhook-3", 9, 4000.0, "410")
        assert await journal.webhooks_of("job-1") == [pending, dead]
        assert await journal.dead_webhooks(limit=0) == []
        assert await journal.count_webhooks() == (1, 1)


async def test_sequences_of_webhooks_count_on_after_a_start(
    tmp_path: Path, opened: Opened, accept: Accept, end: End, new_job: NewJob, new_webhook: NewWebhook
) -> None:
    async with opened(tmp_path / "state") as journal:
        await accept(journal, new_job(1))
        sequences = [journal.next_webhook_sequence() for _ in range(3)]
        await end(journal, 1, webhooks=[new_webhook(sequence, 1) for sequence in sequences])
    async with opened(tmp_path / "state") as journal:
        assert [*sequences, journal.next_webhook_sequence()] == [1, 2, 3, 4]


# Forgetting


async def test_one_job_can_be_forgotten_once_it_has_ended_and_nothing_of_it_is_owed(
    folder: Path | None, opened: Opened, accept: Accept, end: End, new_job: NewJob, new_webhook: NewWebhook
) -> None:
    async with opened(folder) as journal:
        await accept(journal, new_job(1))
        assert not await journal.forget_job("nobody")
        assert not await journal.forget_job("job-1")
        await end(journal, 1, webhooks=[new_webhook(1, 1)])
        assert not await journal.forget_job("job-1")
        journal.webhook_dead("webhook-1", at=1.0, attempts=1, error="")
        assert await journal.known_keys() == {"key-1"}
        assert await journal.forget_job("job-1")
        assert await journal.known_keys() == frozenset()
        assert await journal.count_webhooks() == (0, 0)
        assert await accept(journal, new_job(2, id="job-1")) is None  # its id is free again


# Cancelling


@pytest.mark.parametrize(
    "read",
    [
        Journal.max_job_sequence,
        Journal.unfinished_jobs,
        partial(Journal.find_job, job_id="job-1"),
        partial(Journal.list_jobs, wanted=JobFilter()),
        Journal.pending_webhooks,
        partial(Journal.webhooks_of, job_id="job-1"),
        Journal.dead_webhooks,
        Journal.count_webhooks,
        Journal.known_keys,
        Journal.wait_changed_outside,
    ],
    ids=lambda read: getattr(read, "func", read).__name__,
)
async def test_a_read_that_is_cancelled_harms_nothing(
    tmp_path: Path, opened: Opened, accept: Accept, new_job: NewJob, read: Callable[[Journal], Awaitable[object]]
) -> None:
    async with opened(tmp_path / "state") as journal:
        await accept(journal, new_job(1))
        for steps in range(5):  # cancelled before it is asked, in the queue, in its turn, ...
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, journal)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert [row.id for row in await journal.unfinished_jobs()] == ["job-1"]


async def test_forgetting_that_is_cancelled_before_its_turn_removes_nothing_and_in_its_turn_tells_all(
    tmp_path: Path, opened: Opened, accept: Accept, end: End, new_job: NewJob
) -> None:
    told: list[tuple[str, str]] = []

    async def forget(journal: Journal) -> None:
        told.extend(await journal.forget_expired(**ALL))

    removed_by_step = []
    for steps in range(6):
        told.clear()
        async with opened(tmp_path / str(steps)) as journal:
            await accept(journal, new_job(1))
            await end(journal, 1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(forget, journal)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            removed = await journal.find_job("job-1") is None
            assert told == ([("job-1", "key-1")] if removed else [])
            removed_by_step.append(removed)
    assert removed_by_step[0] is False
    assert removed_by_step[-1] is True


async def test_what_waits_when_the_journal_is_cancelled_is_written_and_told(
    tmp_path: Path, opened: Opened, new_job: NewJob
) -> None:
    heard: list[object] = []
    async with opened(tmp_path / "state") as journal:
        for number in range(1, 1001):  # two batches
            journal.accept_nowait(new_job(number), heard.append)
        journal.job_started("job-1", 1)
    assert heard == [None] * 1000
    async with opened(tmp_path / "state") as journal:
        rows = await journal.unfinished_jobs()
        assert (len(rows), rows[0].state, rows[0].attempts) == (1000, "queued", 1)


async def test_after_its_end_a_journal_answers_that_it_is_closed(
    tmp_path: Path, opened: Opened, new_job: NewJob, log_output: LogCapture
) -> None:
    heard: list[object] = []
    async with opened(tmp_path / "state") as journal:
        pass
    with pytest.raises(JournalUnavailable, match="closed"):
        await journal.find_job("job-1")
    journal.accept_nowait(new_job(1), lambda refused: heard.append(str(refused)))
    journal.job_ended(
        "job-1",
        state="failed",
        outcome=b"",
        ended_at=1.0,
        kept_bytes=0,
        webhooks=[],
        done=lambda: heard.append("told"),
    )
    assert heard == ["the journal is closed", "told"]
    assert [entry["event"] for entry in log_output.entries] == ["journal.changes_lost"]


async def test_a_call_back_that_raises_ends_the_journal_and_leaves_nobody_waiting(
    tmp_path: Path, new_job: NewJob
) -> None:
    async def read(journal: Journal) -> None:
        with pytest.raises(JournalUnavailable):
            await journal.find_job("job-1")

    def fail(_: object) -> None:
        raise KeyError("a bug")

    with trio.fail_after(25), pytest.RaisesGroup(pytest.RaisesExc(KeyError, match="a bug"), flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            journal = await nursery.start(serve_journal, tmp_path / "state")
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as readers:
                    journal.accept_nowait(new_job(1), fail)
                    readers.start_soon(read, journal)
    with Database.open(tmp_path / "state") as database:
        assert len(database.connection.execute("SELECT * FROM jobs").fetchall()) == 1


# Time


async def test_in_memory_it_is_in_step_with_a_virtual_clock(
    opened: Opened, accept: Accept, new_job: NewJob, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        journal = await nursery.start(serve_journal, None)
        before = trio.current_time()
        assert await accept(journal, new_job(1)) is None
        assert await journal.find_job("job-1") is not None
        assert trio.current_time() == before
        with trio.move_on_after(1e6) as scope:
            await journal.wait_changed_outside()
        assert scope.cancelled_caught
        nursery.cancel_scope.cancel()


# Beside it


async def test_a_commit_of_another_process_is_noticed_once_and_our_own_are_not(
    tmp_path: Path, opened: Opened, accept: Accept, end: End, new_job: NewJob, new_webhook: NewWebhook
) -> None:
    folder = tmp_path / "state"
    noticed = 0
    notice = trio.Event()

    async def count(journal: Journal) -> None:
        nonlocal noticed
        while True:
            await journal.wait_changed_outside()
            noticed += 1
            notice.set()

    def replay() -> int:
        with Database.open_beside(folder) as database:
            return database.replay()

    async with opened(folder, JournalTimes(look_s=0.01)) as journal, trio.open_nursery() as nursery:
        await accept(journal, new_job(1))
        await end(journal, 1, webhooks=[new_webhook(1, 1)])
        journal.webhook_dead("webhook-1", at=1.0, attempts=3, error="gone")
        await journal.max_job_sequence()
        assert await trio.to_thread.run_sync(replay) == 1  # before anybody waits: it must not be missed
        await journal.wait_changed_outside()
        (row,) = await journal.pending_webhooks()
        assert (row.attempts, row.dead_at) == (0, None)
        nursery.start_soon(count, journal)
        for number in range(2, 20):
            await accept(journal, new_job(number))
            await trio.sleep(0.005)  # so that it is looked at between our commits
        assert noticed == 0
        journal.webhook_dead("webhook-1", at=1.0, attempts=3, error="gone")
        await journal.max_job_sequence()
        assert await trio.to_thread.run_sync(replay) == 1
        await notice.wait()
        assert noticed == 1
        nursery.cancel_scope.cancel()


# Starting where it cannot write


async def test_a_folder_that_cannot_be_written_makes_a_journal_that_takes_no_jobs(
    tmp_path: Path, opened: Opened, accept: Accept, new_job: NewJob, log_output: LogCapture
) -> None:
    (tmp_path / "file").write_text("in the way")
    async with opened(tmp_path / "file" / "state") as journal:
        assert (journal.durable, journal.healthy) == (False, False)
        refused = await accept(journal, new_job(1))
        assert "Not a directory" in str(refused)
        assert str(tmp_path) not in str(refused)
        assert await journal.unfinished_jobs() == []
        assert await journal.list_jobs(JobFilter()) == []
        assert await journal.forget_expired(**ALL) == []
    (entry,) = log_output.entries
    assert (entry["event"], entry["log_level"]) == ("journal.not_writable", "error")


async def test_a_second_daemon_is_told_that_the_folder_is_in_use(tmp_path: Path, opened: Opened) -> None:
    async with opened(tmp_path / "state"):
        with pytest.raises(JournalLocked, match="another comfyd runs on the same STATE_DIR"):
            await serve_journal(tmp_path / "state")
    async with opened(tmp_path / "state") as journal:
        await wait_all_tasks_blocked()
        assert journal.healthy
