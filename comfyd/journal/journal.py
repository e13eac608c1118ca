"""The journal: what must outlive the daemon. Accepted jobs, and webhooks that are owed or were given up.

One task owns the file. It takes everything that waits, writes it in one transaction in a thread (group commit: while
one COMMIT is on its way to the disk, the next batch gathers), and then calls back. Reads go through the same task,
after the writes that came before them.

A job is accepted or it is not. Changes of accepted jobs never fail towards the caller: what the disk refuses is kept
in memory and tried again, and reads include it.
"""

import math
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import attrs
import structlog
import trio

from comfyd.journal import statements
from comfyd.journal.changes import Change, JobChange, Unsaved, WebhookChange
from comfyd.journal.database import Database, describe
from comfyd.journal.rows import JobFilter, JobRow, JournalUnavailable, WebhookRow
from comfyd.journal.turn import Acceptance, ChangeOrder, Question, TurnResult, subject, take_turn

__all__ = ["Journal", "JournalTimes", "serve_journal"]

log = structlog.get_logger("comfyd.journal")

T = TypeVar("T")

_BATCH_ITEMS: Final = 512  # some 10 ms of work: what a read waits for behind a burst
_BATCH_BYTES: Final = 16 << 20  # as long to write as a commit takes; a larger request makes a batch alone

# Requests that wait for the disk. The job service's queue is shorter; this is for a disk that stalls for minutes while
# large requests arrive. Refused at once is better than out of memory later.
_WAITING_ITEMS: Final = 4096
_WAITING_BYTES: Final = 512 << 20


@attrs.frozen(kw_only=True)
class JournalTimes:
    """When the journal does what nobody asks for.

    *retry_s*: until what a disk refused is tried again. *erase_s*: until what was deleted is out of the log too.
    *look_s*: between two looks for commits of other processes. *close_s*: for writing what waits at the end.
    """

    retry_s: float = 2.0
    erase_s: float = 1.0
    look_s: float = 2.0
    close_s: float = 5.0


async def serve_journal(
    folder: Path | None,
    *,
    times: JournalTimes | None = None,
    task_status: trio.TaskStatus["Journal"] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep the journal in *folder* until cancelled, then write what waits and close it. None: in memory.

    In memory everything happens on the Trio thread, so that it is in step with a virtual clock.
    A folder that cannot be written does not stop the daemon: it is logged, nothing is durable, no job is accepted.

    Raises:
        StartupFailed: another daemon uses the folder, or a later version wrote the journal.
    """
    limiter = trio.CapacityLimiter(1)  # SQLite has one writer, and our connection one user
    if folder is None:
        opened = _open_memory(None)
    else:
        opened = await trio.to_thread.run_sync(_open, folder, limiter=limiter)
    journal = Journal(opened=opened, limiter=limiter, times=times or JournalTimes())
    try:
        task_status.started(journal)
        await journal._write_on()
    finally:
        with trio.move_on_after(journal._times.close_s, shield=True):
            await journal._write_rest()
        with trio.CancelScope(shield=True):  # ends: SQLite is told not to wait for others here
            await journal._close()


@attrs.frozen(kw_only=True)
class _Opened:
    """What opening gave. *fault*: why no job can be accepted, for as long as this daemon lives."""

    database: Database
    identity: str
    last_webhook_sequence: int
    data_version: int
    fault: str | None


def _open(folder: Path) -> _Opened:
    """Open the journal on disk, or one in memory that takes no jobs."""
    try:
        database = Database.open(folder)
        try:
            with database.transaction() as connection:
                statements.resume_interrupted(connection)
            return _look_into(database, None)
        except BaseException:
            database.close()
            raise
    except (OSError, sqlite3.Error) as exc:
        reason = describe(exc)
        log.error("journal.not_writable", folder=str(folder), reason=reason)  # noqa: TRY400  a full story in one line
        return _open_memory(reason)


def _open_memory(fault: str | None) -> _Opened:
    return _look_into(Database.open_memory(), fault)


def _look_into(database: Database, fault: str | None) -> _Opened:
    return _Opened(
        database=database,
        identity=statements.identity(database.connection),
        last_webhook_sequence=statements.max_webhook_sequence(database.connection),
        data_version=database.data_version(),
        fault=fault,
    )


@attrs.frozen(kw_only=True)
class _Refusal:
    """A job that is not accepted, without a try. Only its call-back waits, so that all come from the journal's task."""

    done: Callable[[JournalUnavailable | None], None]
    reason: JournalUnavailable


_Item = Acceptance | ChangeOrder | Question | _Refusal


@attrs.define(eq=False, kw_only=True)
class Journal:
    """The open journal; :func:`serve_journal` gives it. All methods are for the Trio thread.

    The asynchronous ones raise :class:`JournalUnavailable` if the disk cannot be read, or after the journal's end.
    Each may be cancelled at any moment.
    """

    healthy: bool = True
    """Whether the last write succeeded. False for ever if the folder could not be written at the start."""
    commits: int = 0
    """Transactions written since the start."""
    identity: str = attrs.field(init=False)
    """32 hex digits, the same on each start; for naming folders."""

    _opened: _Opened
    _limiter: trio.CapacityLimiter
    _times: JournalTimes
    _database: Database = attrs.field(init=False)
    _queue: deque[_Item] = attrs.field(init=False, factory=deque)
    _waiting_items: int = 0
    _waiting_bytes: int = 0
    _waiting_changes: int = 0  # in the queue or in the turn
    _unsaved: Unsaved = attrs.field(init=False, factory=Unsaved)
    _in_turn: list[Question] = attrs.field(init=False, factory=list)
    _wake: trio.Event = attrs.field(init=False, factory=trio.Event)
    _failed_at: float | None = None
    _tried_at: float = -math.inf
    _erase_at: float = math.inf
    _last_webhook_sequence: int = attrs.field(init=False)
    _data_version: int = attrs.field(init=False)
    _closed: bool = False

    def __attrs_post_init__(self) -> None:
        self._database = self._opened.database
        self.identity = self._opened.identity
        self._last_webhook_sequence = self._opened.last_webhook_sequence
        self._data_version = self._opened.data_version
        self.healthy = self._opened.fault is None

    @property
    def durable(self) -> bool:
        """Whether what is written is on a disk."""
        return self._database.folder is not None

    @property
    def pending_changes(self) -> int:
        """How many changes are not saved yet."""
        return len(self._unsaved) + self._waiting_changes

    # Accepting

    def accept_nowait(self, row: JobRow, done: Callable[[JournalUnavailable | None], None]) -> None:
        """Add a job; *done* is called from the journal's task, with None once the row is durable, else with the reason.

        After a reason nothing of the row is left: it is never tried again. :class:`JobIdTaken` is one.
        """
        if self._closed:
            done(_closed_error())
            return
        acceptance = Acceptance(row=row, done=done)
        size = _size(acceptance)
        if self._opened.fault is not None:
            reason = JournalUnavailable(f"the journal cannot be written: {self._opened.fault}")
            self._put(_Refusal(done=done, reason=reason))
        elif self._waiting_items >= _WAITING_ITEMS or self._waiting_bytes + size > _WAITING_BYTES:
            self._put(_Refusal(done=done, reason=JournalUnavailable("too many requests wait for the journal's disk")))
        else:
            self._waiting_items += 1
            self._waiting_bytes += size
            self._put(acceptance)

    # Changes of accepted jobs

    def job_started(self, job_id: str, attempts: int) -> None:
        """Note that a job runs, for the *attempts*-th time."""
        self._change(JobChange(job_id=job_id, state="running", attempts=attempts))

    def job_waiting(self, job_id: str, crashes: int) -> None:
        """Note that a job is back in the queue; what it had made is void."""
        self._change(JobChange(job_id=job_id, state="queued", crashes=crashes))

    def job_made(self, job_id: str, made: bytes) -> None:
        """Note that a job's graph has run, and what it made; it need not run again."""
        self._change(JobChange(job_id=job_id, state="delivering", made=made))

    def job_ended(
        self,
        job_id: str,
        *,
        state: str,
        outcome: bytes,
        ended_at: float,
        kept_bytes: int,
        webhooks: Sequence[WebhookRow],
        done: Callable[[], None],
    ) -> None:
        """Note how a job ended, and the webhooks that are now owed; the request goes.

        *done* is called from the journal's task once that is durable, or when the first try has failed: it is then
        in memory, tried again, and the outcome has to be told all the same.
        """
        change = JobChange(
            job_id=job_id,
            state=state,
            outcome=outcome,
            ended_at=ended_at,
            kept_bytes=kept_bytes,
            webhooks=tuple(webhooks),
        )
        self._change(change, done)

    # Webhooks

    def next_webhook_sequence(self) -> int:
        """Return a sequence that no webhook has."""
        self._last_webhook_sequence += 1
        return self._last_webhook_sequence

    def webhook_tried(self, webhook_id: str, *, attempts: int, next_at: float, error: str) -> None:
        """Note that a webhook was not taken, and is tried again at *next_at* (unix seconds)."""
        self._change(WebhookChange(webhook_id=webhook_id, attempts=attempts, next_at=next_at, last_error=error))

    def webhook_taken(self, webhook_id: str) -> None:
        """Note that a webhook was taken: its row goes."""
        self._change(WebhookChange(webhook_id=webhook_id, taken=True))

    def webhook_dead(self, webhook_id: str, *, at: float, attempts: int, error: str) -> None:
        """Note that a webhook was given up *at* (unix seconds)."""
        self._change(WebhookChange(webhook_id=webhook_id, attempts=attempts, dead_at=at, last_error=error))

    # Reading

    async def max_job_sequence(self) -> int:
        """Return the greatest sequence of a job, 0 without any."""
        return await self._ask(lambda database, _: statements.max_job_sequence(database.connection))

    async def unfinished_jobs(self) -> list[JobRow]:
        """Return the jobs that have not ended, whole, by sequence.

        Those that ran when the last daemon died were put back into the queue, with one more in *daemon_deaths*.
        """
        return await self._ask(lambda database, unsaved: statements.unfinished_jobs(database.connection, unsaved))

    async def find_job(self, job_id: str) -> JobRow | None:
        """Return a job's whole row."""
        return await self._ask(lambda database, unsaved: statements.find_job(database.connection, unsaved, job_id))

    async def list_jobs(self, wanted: JobFilter) -> list[JobRow]:
        """Return the jobs that *wanted* names, the newest first, without their *request* and *made*."""
        return await self._ask(lambda database, unsaved: statements.list_jobs(database.connection, unsaved, wanted))

    async def pending_webhooks(self) -> list[WebhookRow]:
        """Return the webhooks that are still owed, by sequence."""
        return await self._ask(lambda database, unsaved: statements.pending_webhooks(database.connection, unsaved))

    async def webhooks_of(self, job_id: str) -> list[WebhookRow]:
        """Return a job's webhooks that are owed or were given up, by sequence."""
        return await self._ask(lambda database, unsaved: statements.webhooks_of(database.connection, unsaved, job_id))

    async def dead_webhooks(self, limit: int = 1000) -> list[WebhookRow]:
        """Return the webhooks that were given up, by sequence."""
        return await self._ask(lambda database, unsaved: statements.dead_webhooks(database.connection, unsaved, limit))

    async def count_webhooks(self) -> tuple[int, int]:
        """Return how many webhooks are pending, and how many dead."""
        return await self._ask(lambda database, unsaved: statements.count_webhooks(database.connection, unsaved))

    async def forget_expired(
        self, *, now: float, jobs_s: float, dead_s: float, max_kept_bytes: int, max_jobs: int, limit: int = 256
    ) -> list[tuple[str, str]]:
        """Remove ended jobs that nobody needs, with their dead webhooks; return id and key of each, at most *limit*.

        A job is needed while a webhook is pending, for *jobs_s* after its end, and for *dead_s* after its last webhook
        was given up. Beyond that the oldest go until the ended jobs are at most *max_jobs* and the files kept for
        them at most *max_kept_bytes*: first those without dead letters, then those with; for the sake of bytes, only
        those that keep some. During an outage of the disk nothing is removed.

        Cancelled while it waits for its turn, it does nothing; once the rows go it returns, as the caller has
        to remove the files. What a daemon that dies in between leaves are files without a row.
        """

        def forget(database: Database, unsaved: Unsaved) -> list[tuple[str, str]]:
            if unsaved:
                return []
            with database.transaction() as connection:
                return statements.forget_expired(
                    connection,
                    now=now,
                    jobs_s=jobs_s,
                    dead_s=dead_s,
                    max_kept_bytes=max_kept_bytes,
                    max_jobs=max_jobs,
                    limit=limit,
                )

        try:
            forgotten = await self._ask(forget, finish=True)
        except JournalUnavailable as exc:
            log.warning("journal.forget_failed", reason=str(exc))
            return []
        if forgotten:
            self._erase_soon()
        return forgotten

    async def forget_job(self, job_id: str) -> bool:
        """Remove an ended job with its dead webhooks; False if it is not there, has not ended, or has a pending one.

        Cancellation is as for :meth:`forget_expired`. During an outage of the disk nothing is removed.
        """

        def forget(database: Database, unsaved: Unsaved) -> bool:
            if unsaved:
                return False
            with database.transaction() as connection:
                return statements.forget_job(connection, job_id)

        forgotten = await self._ask(forget, finish=True)
        if forgotten:
            self._erase_soon()
        return forgotten

    async def known_keys(self) -> frozenset[str]:
        """Return the keys of all jobs."""
        return await self._ask(lambda database, _: statements.known_keys(database.connection))

    async def wait_changed_outside(self) -> None:
        """Return when another process has committed since this was last called. For one caller.

        SQLite tells nobody of a commit; its counter has to be looked at. It may count a commit of which nothing is
        to be seen, such as an emptied log, so read what there is. In memory this waits for ever.
        """
        if not self.durable:
            await trio.sleep_forever()
        while True:
            try:
                version = await self._ask(lambda database, _: database.data_version())
            except JournalUnavailable:
                version = self._data_version  # the outage is told by the writes; nothing can be learnt now
            if version != self._data_version:
                self._data_version = version
                self._erase_soon()  # the command line drops webhooks, and their URLs may hold tokens
                return
            await trio.sleep(self._times.look_s)

    # The queue

    def _put(self, item: _Item) -> None:
        self._queue.append(item)
        self._wake.set()

    def _change(self, change: Change, done: Callable[[], None] | None = None) -> None:
        if self._closed:
            log.error("journal.changes_lost", changes=1, **subject(change))
            if done is not None:
                done()
            return
        self._waiting_changes += 1
        self._put(ChangeOrder(change=change, done=done))

    async def _ask(self, ask: Callable[[Database, Unsaved], T], *, finish: bool = False) -> T:
        """Have *ask* called in a turn. *finish*: once begun, wait for the answer even if cancelled."""
        if self._closed:
            raise _closed_error()
        question = Question(ask=ask, waiter=trio.lowlevel.current_task())

        # Not an event: between the moment of a cancel and the moment its task runs, the turn may begin. What is
        # abandoned has to be known at the first of the two, or a job would be forgotten and nobody told.
        def give_up(_: object) -> trio.lowlevel.Abort:
            if finish and question.begun:
                return trio.lowlevel.Abort.FAILED  # the wait ends all the same: every turn answers
            question.abandoned = True
            return trio.lowlevel.Abort.SUCCEEDED

        self._put(question)
        await trio.lowlevel.wait_task_rescheduled(give_up)
        if question.refused is not None:
            raise question.refused
        answer: T = question.answer
        return answer

    def _erase_soon(self) -> None:
        due = trio.current_time() + self._times.erase_s
        if self.durable and due < self._erase_at:
            self._erase_at = due
            self._wake.set()

    # The writer

    async def _write_on(self) -> None:
        """Take turns until cancelled."""
        while True:
            if not self._queue:
                with trio.move_on_at(self._next_due()):
                    await self._wake.wait()
            self._wake = trio.Event()
            await trio.lowlevel.checkpoint()  # cancelled here, nothing has been taken
            if self._queue or trio.current_time() >= self._next_due():
                await self._turn()

    async def _write_rest(self) -> None:
        """Write what waits, and try once more what the disk has refused."""
        while self._queue:
            await trio.lowlevel.checkpoint()  # here the bound of the caller's takes hold, between two turns
            await self._turn()
        if self._unsaved:
            await self._turn()

    def _next_due(self) -> float:
        """Return when there is something to do that nobody asked for."""
        retry_at = math.inf if self._failed_at is None else self._tried_at + self._times.retry_s
        return min(retry_at, self._erase_at)

    async def _turn(self) -> None:
        batch = self._take_batch()
        orders = [item for item in batch if isinstance(item, ChangeOrder)]
        self._in_turn = [item for item in batch if isinstance(item, Question)]
        turn = partial(
            take_turn,
            self._database,
            unsaved=self._unsaved,
            accepted=[item for item in batch if isinstance(item, Acceptance)],
            changes=[order.change for order in orders],
            questions=self._in_turn,
            erase=trio.current_time() >= self._erase_at,
            probe=self._failed_at is not None,
        )
        if self.durable:
            # A thread cannot be cancelled, and what was taken has to be told: a cancel waits for the end of the turn.
            with trio.CancelScope(shield=True):
                result = await trio.to_thread.run_sync(turn, limiter=self._limiter)
        else:
            result = turn()
        self._waiting_changes -= len(orders)
        self._settle(result)
        for item in batch:
            match item:
                case Acceptance():
                    item.done(item.refused)
                case _Refusal():
                    item.done(item.reason)
                case ChangeOrder(done=done) if done is not None:
                    done()
                case Question():
                    item.tell()
                case _:
                    pass
        self._in_turn = []

    def _take_batch(self) -> list[_Item]:
        batch: list[_Item] = []
        size = 0
        while self._queue and len(batch) < _BATCH_ITEMS:
            item = self._queue[0]
            size += _size(item)
            if batch and size > _BATCH_BYTES:
                break
            self._queue.popleft()
            if isinstance(item, Acceptance):
                self._waiting_items -= 1
                self._waiting_bytes -= _size(item)
            if isinstance(item, Question):
                if item.abandoned:
                    continue
                item.begun = True
            batch.append(item)
        return batch

    def _settle(self, result: TurnResult) -> None:
        """Take over how a turn went, and say what an operator has to know of it."""
        now = self._tried_at = trio.current_time()
        erases = result.erases
        self._unsaved = result.unsaved
        if result.erased is not None:
            self._erase_at = math.inf if result.erased else now + self._times.erase_s
        if erases:
            self._erase_soon()
        for change, reason in result.refused:
            log.error("journal.change_refused", reason=reason, **subject(change))
        if result.wrote:
            self.commits += 1
        if result.failure is not None:
            if self._failed_at is None:
                self._failed_at = now
                self.healthy = False
                log.error("journal.write_failed", reason=result.failure, unsaved_changes=len(self._unsaved))
        elif result.wrote and self._failed_at is not None:
            log.info("journal.write_recovered", outage_s=round(now - self._failed_at, 3))
            self._failed_at = None
            self.healthy = True

    async def _close(self) -> None:
        """Close the file, and answer whoever still waits."""
        self._closed = True
        if self.durable:
            await trio.to_thread.run_sync(self._database.close, limiter=self._limiter)
        else:
            self._database.close()
        if self.pending_changes:
            log.error("journal.changes_lost", changes=self.pending_changes)
        for item in (*self._in_turn, *self._queue):
            match item:
                case Acceptance():
                    item.done(_closed_error())
                case _Refusal():
                    item.done(item.reason)
                case ChangeOrder(done=done) if done is not None:
                    done()
                case Question(told=False):
                    item.refused = _closed_error()
                    item.tell()
                case _:
                    pass
        self._queue.clear()


def _size(item: _Item) -> int:
    """Return about how many bytes an item adds to its transaction."""
    match item:
        case Acceptance(row=JobRow(request=request)):
            return len(request or b"")
        case ChangeOrder(change=JobChange(made=made, outcome=outcome)):
            return len(made or b"") + len(outcome or b"")
        case _:
            return 0


def _closed_error() -> JournalUnavailable:
    return JournalUnavailable("the journal is closed")
