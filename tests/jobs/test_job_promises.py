"""Jobs whose callers do not wait: a promise only when it is written down, told only when its end is."""

import time
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio
from jobs_kit import TIMES, NotedLedger, completed, graph, make_job, make_service, submit

from comfyd.engine import Completed
from comfyd.errors import Failure, FailureKind, RequestRefused
from comfyd.jobs import Job, JobService, JobState, Outcome, Success
from comfyd.jobs.model import Clock
from comfyd.jobs.records import MadeRecord, encode_made
from comfyd.jobs.restore import read_unfinished, restore_jobs
from comfyd.jobs.runner import Runner
from comfyd.journal import JobFilter, JobIdTaken, JobRow, JournalUnavailable
from comfyd.media.collect import OutputFile
from comfyd.wire import encode_json

CANCELLED = Failure(kind=FailureKind.JOB_CANCELLED, detail="cancelled")
STOPPING = Failure(kind=FailureKind.DRAINING, detail="comfyd stopped")


def ledger_of(service: JobService) -> NotedLedger:
    return cast("NotedLedger", service.ledger)


def promised(service: JobService, job_id: str = "job", **fields: Any) -> Job:
    return submit(service, job_id, respond_async=True, **fields)


def outcome_of(job: Job) -> Outcome | None:
    """The outcome as it is now; a checker takes an attribute's for unchanging."""
    return job.outcome


def begin(service: JobService, job: Job) -> None:
    service.queue.remove(job)
    service.started(job)


def succeed(service: JobService, job: Job) -> None:
    job.move(JobState.DELIVERING)
    stats = Clock().stats(attempts=job.attempts, times=completed().times)
    service.finish(job, Success(graph=job.graph, outputs=(), stats=stats), JobState.SUCCEEDED)


# Accepting


async def test_a_promise_is_made_only_once_it_is_on_disk() -> None:
    service = make_service()
    ledger_of(service).hold = True
    job = promised(service)
    with trio.move_on_after(0):
        await job.wait_accepted()
        raise AssertionError("it was promised before it was written down")
    assert (job.state, len(service.queue), service.depth) == (JobState.ACCEPTED, 0, 1)
    ledger_of(service).release()
    await job.wait_accepted()
    assert (job.state, service.queue.position(job)) == (JobState.QUEUED, 0)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (JournalUnavailable("the disk is full"), FailureKind.NOT_READY),
        (JobIdTaken(), FailureKind.ID_CONFLICT),
    ],
)
async def test_a_job_that_cannot_be_written_down_is_refused_and_leaves_nothing(
    error: JournalUnavailable, kind: FailureKind
) -> None:
    service = make_service()
    ledger_of(service).refusal = error
    job = promised(service)
    with pytest.raises(RequestRefused) as refused:
        await job.wait_accepted()
    assert refused.value.failure.kind is kind
    assert (service.get("job"), service.depth, service.waiting, len(service.queue)) == (None, 0, 0, 0)


async def test_a_job_whose_caller_waits_is_not_written_down() -> None:
    service = make_service()
    job = submit(service)
    begin(service, job)
    succeed(service, job)
    assert ledger_of(service).notes == []
    assert isinstance(job.outcome, Success)


async def test_a_job_that_is_cancelled_on_its_way_to_the_disk_ends_when_it_is_there() -> None:
    service = make_service()
    ledger_of(service).hold = True
    job = promised(service)
    assert service.cancel(job, CANCELLED)
    assert (outcome_of(job), service.waiting) == (None, 0)
    ledger_of(service).release()
    assert ledger_of(service).notes == [("accepted", "job"), ("cancelled", "job")]
    assert outcome_of(job) is None
    ledger_of(service).release()
    assert outcome_of(job) is CANCELLED
    assert len(service.queue) == 0


async def test_a_job_that_is_cancelled_on_its_way_to_a_full_disk_is_only_refused() -> None:
    service = make_service()
    ledger_of(service).hold = True
    ledger_of(service).refusal = JournalUnavailable("the disk is full")
    job = promised(service)
    service.cancel(job, CANCELLED)
    ledger_of(service).release()
    with pytest.raises(RequestRefused):
        await job.wait_accepted()
    assert (service.waiting, service.depth) == (0, 0)


# Ending


async def test_an_outcome_is_told_only_once_it_is_on_disk_and_is_decided_at_once() -> None:
    service = make_service()
    job = promised(service)
    begin(service, job)
    ledger_of(service).hold = True
    succeed(service, job)
    assert outcome_of(job) is None
    assert job.over
    assert service.depth == 0
    assert service.cancel(job, CANCELLED) is False
    ledger_of(service).release()
    assert isinstance(outcome_of(job), Success)
    assert list(service.to_clean) == [job]


async def test_each_step_is_written_down() -> None:
    service = make_service()
    job = promised(service)
    begin(service, job)
    service.enqueue(job)
    begin(service, job)
    succeed(service, job)
    steps = [what for what, _ in ledger_of(service).notes]
    assert steps == ["accepted", "started", "waiting", "started", "succeeded"]


async def test_an_ended_job_is_found_where_only_the_journal_knows_it() -> None:
    service = make_service()
    old = make_job("old")
    ledger_of(service).ended_jobs["old"] = old
    assert await service.look_up("old") is old
    assert await service.look_up("unknown") is None
    old.outcome = CANCELLED
    assert await service.forget(old) is True
    assert await service.look_up("old") is None


async def test_a_page_joins_what_is_on_its_way_and_what_has_ended_newest_first() -> None:
    service = make_service()
    ledger_of(service).ended_jobs = {"old": make_job("old", sequence=0)}
    jobs = [promised(service, f"job-{number}") for number in range(3)]
    begin(service, jobs[0])
    page = await service.page(JobFilter(limit=10))
    assert [job.id for job in page] == ["job-2", "job-1", "job-0", "old"]
    ledger_of(service).ended_jobs = {}
    assert [job.id for job in await service.page(JobFilter(states=frozenset({"running"})))] == ["job-0"]
    assert [job.id for job in await service.page(JobFilter(before=jobs[2].sequence, limit=1))] == ["job-1"]


async def test_an_estimate_counts_the_jobs_before_and_knows_nothing_before_the_first_has_ended() -> None:
    service = make_service()
    jobs = [promised(service, f"job-{number}") for number in range(3)]
    assert service.estimate_s(jobs[2]) is None
    service.service_time.measured(4.0)
    assert [service.estimate_s(job) for job in jobs] == [4.0, 8.0, 12.0]
    begin(service, jobs[0])
    assert service.estimate_s(jobs[0]) == pytest.approx(4.0, abs=0.5)
    succeed(service, jobs[0])
    assert service.estimate_s(jobs[0]) is None


# Stopping


async def test_when_comfyd_stops_promises_are_put_aside_and_others_are_told() -> None:
    service = make_service()
    running, waiting = promised(service, "running"), promised(service, "waiting")
    begin(service, running)
    sync = submit(service, "sync")
    assert service.stop_all(STOPPING) == 2
    assert sync.outcome is STOPPING
    assert (running.outcome, waiting.outcome) == (None, None)
    assert (service.depth, service.waiting, len(service.queue)) == (0, 0, 0)
    # The attempt that was cut is taken back, and nothing is said of the one that had not begun.
    assert ledger_of(service).notes[-1] == ("waiting", "running")
    assert {job.id for job in service.to_clean} == {"running", "waiting", "sync"}


async def test_what_a_job_has_made_is_not_cleaned_away_when_it_is_put_aside() -> None:
    service = make_service()
    job = promised(service)
    begin(service, job)
    job.move(JobState.DELIVERING)
    job.made = True
    assert service.stop_all(STOPPING) == 1
    assert list(service.to_clean) == []
    assert ledger_of(service).notes[-1] == ("started", "job")


async def test_a_journal_in_memory_puts_nothing_aside() -> None:
    service = make_service()
    ledger_of(service).durable = False
    job = promised(service)
    assert service.stop_all(STOPPING) == 0
    assert job.outcome is STOPPING


async def test_what_is_cut_at_once_is_put_aside_as_well() -> None:
    service = make_service()
    promised(service)
    service.abandon_all()
    assert ledger_of(service).notes == [("accepted", "job")]
    assert service.get("job") is None


async def test_when_the_engine_is_gone_what_was_made_is_still_delivered() -> None:
    service = make_service()
    made, waiting = promised(service, "made"), promised(service, "waiting")
    begin(service, made)
    made.move(JobState.DELIVERING)
    service.engine_gone("it exited")
    assert outcome_of(made) is None
    assert isinstance(outcome_of(waiting), Failure)


# Starting again


def row(job_id: str = "job", **fields: Any) -> JobRow:
    body = fields.pop("body", {"prompt": graph(), "webhook_v2": "https://receiver.test/"})
    sequence = fields.pop("sequence", 7)
    return JobRow(
        id=job_id,
        key=f"key-of-{job_id}",
        sequence=sequence,
        accepted_at=time.time() - 60,
        deadline_at=fields.pop("deadline_at", None),
        digest=b"digest",
        request=encode_json(body),
        **fields,
    )


@attrs.define(eq=False)
class Delivering:
    """A runner's one method that matters here."""

    delivered: list[tuple[Job, Completed, tuple[OutputFile, ...]]] = attrs.field(factory=list)

    async def deliver_again(self, job: Job, execution: Completed, outputs: tuple[OutputFile, ...]) -> None:
        await trio.lowlevel.checkpoint()
        self.delivered.append((job, execution, outputs))


async def restore(service: JobService, *rows: JobRow) -> Delivering:
    runner = Delivering()
    await restore_jobs(read_unfinished(rows), service, cast("Runner", runner))
    return runner


async def test_jobs_come_back_in_their_order_as_if_they_had_just_been_accepted() -> None:
    service = make_service()
    await restore(service, *(row(f"job-{number}", sequence=number) for number in range(120)))
    assert (service.waiting, service.depth) == (120, 120)
    order = [(await service.queue.get()).id for _ in range(120)]
    assert order == [f"job-{number}" for number in range(120)]
    assert ledger_of(service).notes == []


async def test_a_request_comes_back_whole() -> None:
    body = {
        "prompt": graph("other"),
        "webhook": "https://receiver.test/v1",
        "priority": 5,
        "extra_data": {"api_key_comfy_org": "secret"},
        "convert_output": {"format": "jpeg", "options": {"quality": 71}},
        "s3": {"bucket": "bucket", "prefix": "p/", "async": True},
    }
    service = make_service()
    await restore(service, row(body=body))
    job = service.get("job")
    assert job is not None
    assert (job.request.webhook, job.request.priority) == ("https://receiver.test/v1", 5)
    assert job.request.extra_data == {"api_key_comfy_org": "secret"}
    assert job.request.conversion is not None
    assert job.request.s3 is not None
    assert job.graph["2"]["inputs"]["filename_prefix"] == "job_other"
    assert (job.digest, job.key, job.sequence) == (b"digest", "key-of-job", 7)


async def test_a_wish_that_was_in_a_header_is_not_forgotten() -> None:
    service = make_service()
    await restore(service, row(body={"prompt": graph()}))
    job = service.get("job")
    assert job is not None
    assert job.request.respond_async
    assert job.request.keeps_outputs


async def test_a_job_whose_attempt_was_cut_runs_again_and_what_it_left_will_be_removed() -> None:
    service = make_service()
    await restore(service, row(attempts=1, crashes=1, daemon_deaths=1))
    job = service.get("job")
    assert job is not None
    assert (job.attempts, job.crashes, job.state) == (1, 1, JobState.QUEUED)
    assert job.prefixes == ("job_pic",)


async def test_what_was_made_is_delivered_without_an_engine_and_not_run_again(tmp_path: Path) -> None:
    output = OutputFile(
        path=tmp_path / "a.png", filename="job_pic_00001_.png", node_id="2", media_type="image/png", size_bytes=4
    )
    made = MadeRecord(
        graph=graph("job_pic"),
        prefixes=("job_pic",),
        reported=({"2": {"images": []}},),
        outputs=(output,),
        execution=Completed(outputs={}, times=TIMES),
        clock=Clock(engine_s=2.0).as_dict(),
    )
    service = make_service()
    service.engines[0].node_classes = None
    runner = await restore(service, row(attempts=1, made=encode_made(made)))
    [(job, execution, outputs)] = runner.delivered
    assert outputs == (output,)
    assert execution.times == TIMES
    assert (job.state, job.clock.engine_s, job.made) == (JobState.DELIVERING, 2.0, True)
    assert len(service.queue) == 0


async def test_what_a_job_had_made_and_nobody_can_read_is_made_once_more() -> None:
    service = make_service()
    runner = await restore(service, row(attempts=1, made=b'{"graph": {}}'))
    job = service.get("job")
    assert job is not None
    assert (runner.delivered, job.state) == ([], JobState.QUEUED)


async def test_a_deadline_goes_on_running_while_comfyd_is_away() -> None:
    service = make_service()
    await restore(service, row(deadline_at=time.time() + 30, attempts=0))
    job = service.get("job")
    assert job is not None
    assert job.deadline - trio.current_time() == pytest.approx(30, abs=1)


async def test_a_job_under_which_comfyd_itself_is_killed_again_and_again_is_given_up() -> None:
    service = make_service()
    await restore(service, row("cause", attempts=5, daemon_deaths=5), row("next"))
    assert service.get("cause") is not None
    assert ledger_of(service).notes == [("failed", "cause")]
    assert [job.id for job in service._known.values()] == ["next"]


async def test_an_entry_that_cannot_be_read_ends_its_job_and_no_other() -> None:
    service = make_service()
    broken = attrs.evolve(row("broken"), request=b"\x00not json")
    await restore(service, broken, row("next"))
    assert ledger_of(service).notes == [("failed", "broken")]
    assert [job.id for job in service._known.values()] == ["next"]


async def test_a_graph_that_the_engine_cannot_run_any_more_ends_its_job_with_the_reason() -> None:
    service = make_service()
    await restore(
        service, row(body={"prompt": {"1": {"class_type": "Gone", "inputs": {}}}, "webhook": "https://a.test"})
    )
    job = service.get("job")
    assert job is not None
    assert isinstance(job.outcome, Failure)
    assert job.outcome.kind is FailureKind.INVALID_PROMPT


async def test_the_order_of_arrival_goes_on_after_the_past() -> None:
    service = make_service()
    service.continue_after(41)
    assert promised(service).sequence == 42
