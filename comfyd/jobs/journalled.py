"""Jobs in the journal: written down at each step, and taken up again when the daemon starts."""

import time
from collections.abc import Callable, Sequence

import attrs
import structlog
import trio

from comfyd.engine import Completed
from comfyd.jobs.ledger import Recorded
from comfyd.jobs.model import Job, JobState
from comfyd.jobs.records import EndRecord, MadeRecord, decode_end, encode_end, encode_made
from comfyd.jobs.request import Request
from comfyd.jobs.restore import read_unfinished
from comfyd.jobs.serve import Past
from comfyd.journal import JobFilter, JobRow, Journal, JournalUnavailable, WebhookRow
from comfyd.media.collect import OutputFile
from comfyd.webhooks.rows import rows_for

log = structlog.get_logger("comfyd.jobs")


@attrs.define(eq=False)
class JournalLedger:
    """The ledger of a running daemon. *post* hands new webhooks to the outbox; *remove* removes kept outputs by key."""

    journal: Journal
    post: Callable[[Sequence[WebhookRow]], None]
    remove: Callable[[Sequence[str]], None]

    @property
    def durable(self) -> bool:
        """Whether the journal is on disk."""
        return self.journal.durable

    def accept(self, job: Job, body: bytes, done: Recorded) -> None:
        """Write the job's row."""
        now = time.time()
        left_s = _seconds_left(job)
        row = JobRow(
            id=job.id,
            key=job.key,
            sequence=job.sequence,
            accepted_at=job.accepted_at,
            deadline_at=None if left_s is None else now + left_s,
            digest=job.digest,
            workflow=job.workflow,
            request=body,
        )
        self.journal.accept_nowait(row, done)

    def started(self, job: Job) -> None:
        """Note the attempt."""
        self.journal.job_started(job.id, job.attempts)

    def waiting(self, job: Job) -> None:
        """Note that it waits again."""
        self.journal.job_waiting(job.id, job.crashes)

    def made(self, job: Job, execution: Completed, outputs: tuple[OutputFile, ...]) -> None:
        """Write down what was made."""
        record = MadeRecord(
            graph=job.shown_graph,
            prefixes=job.prefixes,
            reported=tuple(job.reported),
            outputs=tuple(attrs.evolve(output, base64=None) for output in outputs),
            execution=execution,
            clock=job.clock.as_dict(),
        )
        self.journal.job_made(job.id, encode_made(record))

    def ended(self, job: Job, state: JobState, done: Callable[[], None]) -> None:
        """Write the outcome and the webhooks that tell it, in one transaction."""
        outcome = job.decided
        if outcome is None:
            raise RuntimeError("a job without an outcome has not ended")
        now = time.time()
        job.ended_at = now
        rows = rows_for(
            job.id,
            job.key,
            outcome,
            webhook=job.request.webhook,
            webhook_v2=job.request.webhook_v2,
            next_sequence=self.journal.next_webhook_sequence,
            now=now,
        )
        record = EndRecord(outcome=outcome, graph=job.shown_graph, echo=job.request.echo, started_at=job.started_at)

        def recorded() -> None:
            self.post(rows)
            done()

        self.journal.job_ended(
            job.id,
            state=state.value,
            outcome=encode_end(record),
            ended_at=now,
            kept_bytes=job.kept_bytes,
            webhooks=rows,
            done=recorded,
        )

    async def find(self, job_id: str) -> Job | None:
        """Look the job up in the journal."""
        try:
            row = await self.journal.find_job(job_id)
        except JournalUnavailable as exc:
            log.warning("journal.not_readable", reason=str(exc))
            return None
        return None if row is None or row.outcome is None else ended_job(row)

    async def page(self, wanted: JobFilter) -> list[Job]:
        """List jobs from the journal."""
        rows = await self.journal.list_jobs(wanted)
        return [ended_job(row) for row in rows if row.outcome is not None]

    async def forget(self, job: Job) -> bool:
        """Remove the job's row and its kept outputs."""
        gone = await self.journal.forget_job(job.id)
        if gone:
            self.remove([job.key])
        return gone


def ended_job(row: JobRow) -> Job:
    """The job that *row*, of an ended one, tells of."""
    if row.outcome is None:
        raise ValueError("the job has not ended")
    record = decode_end(row.outcome)
    state = JobState(row.state)
    return Job(
        id=row.id,
        request=Request(prompt={}, respond_async=True, echo=record.echo),
        digest=row.digest,
        sequence=row.sequence,
        key=row.key,
        state=state,
        attempts=row.attempts,
        crashes=row.crashes,
        workflow=row.workflow,
        accepted_at=row.accepted_at,
        started_at=record.started_at,
        ended_at=row.ended_at,
        journalled=True,
        kept_bytes=row.kept_bytes,
        decided=record.outcome,
        outcome=record.outcome,
        cleaned=True,
    )


def _seconds_left(job: Job) -> float | None:
    return None if job.deadline == float("inf") else job.deadline - trio.current_time()


async def read_past(journal: Journal) -> Past:
    """Read what earlier lives of the daemon left."""
    rows = await journal.unfinished_jobs()
    unfinished = await trio.to_thread.run_sync(read_unfinished, rows)
    return Past(unfinished=unfinished, last_sequence=await journal.max_job_sequence())
