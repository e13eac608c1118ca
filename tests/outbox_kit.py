"""What the tests of the outbox share: a journal on disk, jobs that ended in it, and an outbox that tells of them."""

import base64
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import trio
from jobs_kit import TIMES
from webhook_receiver import Received

from comfyd.errors import Failure, FailureKind
from comfyd.jobs.model import Clock, Outcome, Success
from comfyd.jobs.records import EndRecord, encode_end
from comfyd.journal import JobRow, Journal, JournalTimes, JournalUnavailable, WebhookRow, serve_journal
from comfyd.media.collect import OutputFile
from comfyd.net import parse_policy
from comfyd.webhooks import Outbox, OutboxConfig, rows_for, serve_outbox
from comfyd.webhooks.retry import RetryPolicy

GRAPH = {"1": {"class_type": "A", "inputs": {"seed": 2**64 - 1, "text": '名前 "quoted" \\ \n'}}}
SECRET = b"0123456789abcdef01234567"
ENDED_AT = 1_767_225_600.25  # 2026-01-01T00:00:00.250Z
FAILURE = Failure(
    kind=FailureKind.EXECUTION_FAILED, detail="node 1 raised", facts={"node_id": "1", "exception_type": "ValueError"}
)
LOOPBACK = parse_policy("guarded", "127.0.0.0/8")
QUICK = RetryPolicy(retries=3, first_delay_s=0.01, max_delay_s=0.02)


def output(folder: Path, name: str, data: bytes) -> OutputFile:
    """A file of that content, as the record of a job has it."""
    path = folder / name
    path.write_bytes(data)
    return OutputFile(path=path, filename=name, node_id="9", media_type="image/png", size_bytes=len(data))


def success(*outputs: OutputFile) -> Success:
    """A success with these outputs."""
    return Success(graph=GRAPH, outputs=outputs, stats=Clock().stats(attempts=1, times=TIMES))


def job_row(outcome: Outcome, job_id: str = "job", **echo: Any) -> JobRow:
    """The row of a job that ended like this."""
    return JobRow(
        id=job_id,
        key=f"key-{job_id}",
        sequence=1,
        accepted_at=ENDED_AT - 1,
        deadline_at=None,
        digest=b"",
        outcome=encode_end(EndRecord(outcome=outcome, graph=GRAPH, echo=echo)),
        ended_at=ENDED_AT,
    )


@attrs.define(eq=False)
class Desk:
    """A running journal, and what the job service would do with it."""

    journal: Journal
    jobs: int = 0

    async def end_job(
        self, job_id: str, outcome: Outcome, *, webhook: str | None = None, webhook_v2: str | None = None
    ) -> tuple[WebhookRow, ...]:
        """Accept a job and end it; gives its webhooks, which are in the journal then."""
        self.jobs += 1
        row = attrs.evolve(job_row(outcome, job_id), sequence=self.jobs, request=b"{}", outcome=None, ended_at=None)
        accepted, recorded = trio.Event(), trio.Event()

        def done(error: JournalUnavailable | None) -> None:
            assert error is None
            accepted.set()

        self.journal.accept_nowait(row, done)
        await accepted.wait()
        webhooks = rows_for(
            job_id,
            row.key,
            outcome,
            webhook=webhook,
            webhook_v2=webhook_v2,
            next_sequence=self.journal.next_webhook_sequence,
            now=ENDED_AT,
        )
        self.journal.job_ended(
            job_id,
            state="failed" if isinstance(outcome, Failure) else "succeeded",
            outcome=encode_end(EndRecord(outcome=outcome, graph=GRAPH, echo={})),
            ended_at=ENDED_AT,
            kept_bytes=0,
            webhooks=webhooks,
            done=recorded.set,
        )
        await recorded.wait()
        return webhooks


@asynccontextmanager
async def running_desk(folder: Path | None) -> AsyncIterator[Desk]:
    """Run a journal in *folder* that looks for others' commits often."""
    async with trio.open_nursery() as nursery:
        serve = partial(serve_journal, folder, times=JournalTimes(look_s=0.02))
        yield Desk(await nursery.start(serve))
        nursery.cancel_scope.cancel("the test is over")


def config(**changes: Any) -> OutboxConfig:
    """A config that may reach 127.0.0.0/8 and does not wait long."""
    return attrs.evolve(OutboxConfig(urls=LOOPBACK, retry=QUICK), **changes)


@asynccontextmanager
async def running_outbox(journal: Journal, **changes: Any) -> AsyncIterator[Outbox]:
    """Run an outbox on *journal*."""
    async with trio.open_nursery() as nursery:
        yield await nursery.start(serve_outbox, config(**changes), journal)
        nursery.cancel_scope.cancel("the test is over")


async def wait_until(outbox: Outbox, true: Callable[[], bool]) -> None:
    """Return once *true*, which is asked whenever the outbox did something."""
    while not true():
        await outbox.wait_changed()


async def wait_empty(outbox: Outbox) -> None:
    """Return when nothing is pending."""
    await wait_until(outbox, lambda: not outbox.pending)


def verify(request: Received, secrets: Sequence[bytes]) -> None:
    """Check a signature as a receiver does, by the specification's words: every secret has signed."""
    signed = f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.".encode() + request.body
    expected = {b64_hmac(secret, signed) for secret in secrets}
    assert set(request.headers["webhook-signature"].split(" ")) == {f"v1,{each}" for each in expected}


def b64_hmac(secret: bytes, signed: bytes) -> str:
    """The signature's own part."""
    return base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
