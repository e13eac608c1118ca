"""The service: what it takes, what it refuses, and that each job is counted, told and cleaned up once."""

from typing import Any, cast

import pytest
import trio
from jobs_kit import CLASSES, completed, graph, make_service, request, submit, warm_engine

from comfyd.engine import Engine
from comfyd.engine.client import EngineClient
from comfyd.errors import Failure, FailureKind, RequestRefused
from comfyd.jobs import Job, JobService, JobState, Outcome, Success
from comfyd.jobs.model import Clock

GONE_BY_CALLER = Failure(kind=FailureKind.JOB_CANCELLED, detail="cancelled by the caller")


def refused(service: JobService, job_id: str = "job", digest: bytes = b"", **fields: Any) -> Failure:
    """Submit what must be refused; nothing is left behind by it."""
    before = (service.depth, service._waiting, len(service.queue), len(service.to_prepare), len(service.to_clean))
    with pytest.raises(RequestRefused) as caught:
        submit(service, job_id, digest, **fields)
    after = (service.depth, service._waiting, len(service.queue), len(service.to_prepare), len(service.to_clean))
    assert before == after
    return caught.value.failure


def outcome_of(job: Job) -> Outcome | None:
    """The outcome as it is now; a checker takes an attribute's for unchanging."""
    return job.outcome


def run(service: JobService, job: Job) -> None:
    """Bring a queued *job* to running, as a runner does."""
    service.queue.remove(job)
    service.started(job)


def succeed(service: JobService, job: Job) -> None:
    """Bring a running *job* to its success."""
    job.move(JobState.DELIVERING)
    stats = Clock().stats(attempts=job.attempts, times=completed().times)
    service.finish(job, Success(graph=job.graph, outputs=(), stats=stats), JobState.SUCCEEDED)


# Accepting


async def test_a_job_without_inputs_is_queued_at_once() -> None:
    service = make_service()
    job = submit(service)
    assert job.state is JobState.QUEUED
    assert service.queue.position(job) == 0
    assert service.get("job") is job
    assert service.depth == 1
    assert job.deadline == float("inf")


async def test_the_graph_is_made_the_jobs_own_and_the_request_lets_go_of_it() -> None:
    job = submit(make_service(), "named")
    assert job.graph["2"]["inputs"]["filename_prefix"] == "named_pic"
    assert job.prefixes == ("named_pic",)
    assert job.request.prompt == {}


@pytest.mark.parametrize("value", ["x.png", "", "iVBORw0KGgo=", "data:,", "https://example.com/x.png"])
async def test_a_job_with_inputs_waits_to_be_prepared_first(value: str) -> None:
    service = make_service()
    loader = {"class_type": "LoadImage", "inputs": {"image": value}}
    job = submit(service, prompt=graph(**{"3": loader}))
    assert job.state is JobState.PREPARING
    assert len(service.queue) == 0
    ((waiting, (candidate,)),) = service.to_prepare
    assert waiting is job
    assert candidate.location == "prompt.3.inputs.image"


@pytest.mark.parametrize("value", ["listed.png", None, 5, ["1", 0]])
async def test_an_input_that_comfyui_lists_or_that_is_no_text_needs_no_preparing(value: Any) -> None:
    loader = {"class_type": "LoadImage", "inputs": {"image": value}}
    assert submit(make_service(), prompt=graph(**{"3": loader})).state is JobState.QUEUED


@pytest.mark.parametrize(
    ("asked", "configured", "expected"), [(None, None, None), (3.0, None, 3.0), (None, 7.0, 7.0), (3.0, 7.0, 3.0)]
)
async def test_the_deadline_is_the_requests_own_or_else_the_configured_one(
    autojump_clock: trio.testing.MockClock, asked: float | None, configured: float | None, expected: float | None
) -> None:
    service = make_service(timeout_s=configured)
    job = submit(service, timeout_s=asked)
    assert job.deadline == (float("inf") if expected is None else trio.current_time() + expected)


async def test_a_job_that_runs_out_of_time_ends_by_timeout_with_the_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    service = make_service(timeout_s=7.0)
    job = submit(service)
    other = submit(service, "longer", timeout_s=8.5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.deadlines.serve, service.expire)
        await trio.sleep(6.9)
        assert outcome_of(job) is None
        await trio.sleep(0.2)
        assert isinstance(job.outcome, Failure)
        assert job.outcome.kind is FailureKind.TIMEOUT
        assert job.outcome.detail == "the job did not end within 7 s; it was queued"
        assert job.state is JobState.FAILED
        assert outcome_of(other) is None
        assert len(service.queue) == 1
        await trio.sleep(2)
        assert isinstance(other.outcome, Failure)
        nursery.cancel_scope.cancel()


# Refusing


@pytest.mark.parametrize(
    ("prompt", "kind", "location"),
    [
        ({}, FailureKind.INVALID_REQUEST, "prompt"),
        ({"1": None}, FailureKind.INVALID_REQUEST, "prompt.1"),
        ({"1": {"class_type": "Unknown"}}, FailureKind.INVALID_PROMPT, "prompt.1.class_type"),
        ({"1": {"class_type": "EmptyImage"}}, FailureKind.NO_OUTPUT_NODE, "prompt"),
        ({"1": {"class_type": "PreviewImage"}}, FailureKind.NO_OUTPUT_NODE, "prompt"),
    ],
)
async def test_a_graph_that_cannot_run_is_refused_with_its_place(
    prompt: dict[str, Any], kind: FailureKind, location: str
) -> None:
    failure = refused(make_service(), prompt=prompt)
    assert failure.kind is kind
    assert failure.faults[0].location == location
    assert failure.retry_after_s is None


async def test_before_the_first_warm_up_nothing_is_taken() -> None:
    engine = Engine(name="engine-1")
    service = make_service(engine)
    assert service.not_ready_reason() == "the engine is starting"
    healthy_before = service.healthy
    failure = refused(service)
    assert (failure.kind, failure.detail) == (FailureKind.NOT_READY, "the engine is starting")
    assert failure.retry_after_s == 5.0
    engine.went_up(cast("EngineClient", object()), CLASSES)
    assert refused(service).detail == "the engine is warming up"
    engine.mark_warm()
    assert (healthy_before, service.healthy) == (False, True)
    submit(service)


async def test_while_a_proved_engine_is_restarted_jobs_are_taken_but_readiness_says_no() -> None:
    engine = warm_engine()
    service = make_service(engine)
    engine.went_down("crashed")
    assert service.not_ready_reason() == "the engine is down"
    assert service.healthy is True
    assert submit(service).state is JobState.QUEUED


async def test_an_engine_that_is_gone_for_good_takes_nothing() -> None:
    engine = warm_engine()
    service = make_service(engine)
    engine.went_down("crashed", for_good=True)
    failure = refused(service)
    assert (failure.kind, failure.detail) == (FailureKind.NOT_READY, "the engine is gone")
    assert service.not_ready_reason() == "the engine is gone"


async def test_while_draining_nothing_is_taken_and_the_caller_is_told_when_to_come_back() -> None:
    service = make_service()
    submit(service, "waiting")
    service.service_time.measured(4.0)
    service.begin_drain()
    failure = refused(service)
    assert failure.kind is FailureKind.DRAINING
    assert failure.retry_after_s == 4.0
    assert service.not_ready_reason() == "draining"


async def test_a_full_queue_refuses_and_has_room_again_once_a_job_runs() -> None:
    service = make_service(max_queued=2)
    first = submit(service, "first")
    submit(service, "second")
    failure = refused(service, "third")
    assert failure.kind is FailureKind.QUEUE_FULL
    assert failure.retry_after_s == 5.0
    assert "2 jobs" in failure.detail
    run(service, first)
    submit(service, "third")
    assert refused(service, "fourth").kind is FailureKind.QUEUE_FULL


async def test_a_job_that_comes_back_from_a_lost_engine_does_not_take_the_room_of_another() -> None:
    service = make_service(max_queued=1)
    first = submit(service, "first")
    run(service, first)
    service.enqueue(first)
    second = submit(service, "second")
    assert refused(service, "third").kind is FailureKind.QUEUE_FULL
    run(service, first)
    succeed(service, first)
    assert refused(service, "third").kind is FailureKind.QUEUE_FULL
    service.cancel(second, GONE_BY_CALLER)
    submit(service, "third")


async def test_every_job_is_counted_out_once_however_it_ends() -> None:
    service = make_service(max_queued=3)
    loader = {"class_type": "LoadImage", "inputs": {"image": "x.png"}}
    jobs = [submit(service, "a"), submit(service, "b"), submit(service, "c", prompt=graph(**{"3": loader}))]
    run(service, jobs[0])
    for job in jobs:
        assert service.cancel(job, GONE_BY_CALLER)
    assert service._waiting == 0
    assert service.depth == 0
    for name in "def":
        submit(service, name)
    assert refused(service, "g").kind is FailureKind.QUEUE_FULL


# The same id


async def test_the_same_id_and_body_join_the_job_even_while_draining_or_full() -> None:
    service = make_service(max_queued=1)
    job = submit(service, digest=b"same")
    assert submit(service, digest=b"same") is job
    service.begin_drain()
    assert submit(service, digest=b"same") is job
    assert service.depth == 1


@pytest.mark.parametrize("digest", [b"other", b""])
async def test_the_same_id_with_another_body_is_a_conflict(digest: bytes) -> None:
    service = make_service()
    submit(service, digest=b"same")
    failure = refused(service, digest=digest)
    assert failure.kind is FailureKind.ID_CONFLICT
    assert "job" in failure.detail


async def test_an_id_is_free_again_once_its_job_has_ended_and_been_delivered() -> None:
    service = make_service()
    first = submit(service, digest=b"same")
    run(service, first)
    with service.attached(first):
        succeed(service, first)
        assert submit(service, digest=b"same") is first
    second = submit(service, digest=b"same")
    assert second is not first
    assert second.key != first.key


# Callers who wait


async def test_the_files_stay_until_the_last_caller_has_left() -> None:
    service = make_service()
    job = submit(service)
    run(service, job)
    with service.attached(job):
        with service.attached(job):
            succeed(service, job)
        assert list(service.to_clean) == []
        assert service.get("job") is job
    assert list(service.to_clean) == [job]
    assert service.get("job") is None


async def test_when_the_last_caller_leaves_before_the_outcome_the_job_is_cancelled() -> None:
    service = make_service()
    job = submit(service)
    with service.attached(job):
        with service.attached(job):
            pass
        assert outcome_of(job) is None
    assert isinstance(job.outcome, Failure)
    assert job.outcome.detail == "the caller has gone"
    assert job.state is JobState.CANCELLED
    assert len(service.queue) == 0
    assert list(service.to_clean) == [job]


async def test_a_caller_who_leaves_by_an_error_has_left() -> None:
    service = make_service()
    job = submit(service)
    with pytest.raises(ZeroDivisionError), service.attached(job):
        raise ZeroDivisionError
    assert job.state is JobState.CANCELLED
    assert job.waiters == 0


async def test_a_caller_who_joins_after_the_outcome_keeps_the_files_too() -> None:
    service = make_service()
    job = submit(service, digest=b"same")
    run(service, job)
    first = service.attached(job)
    first.__enter__()
    succeed(service, job)
    with service.attached(job):
        first.__exit__(None, None, None)
        assert list(service.to_clean) == []
    assert list(service.to_clean) == [job]


# Cancelling


async def test_cancelling_a_waiting_job_takes_it_off_the_queue_and_tells_who_waits() -> None:
    service = make_service()
    job = submit(service)
    changed = job.changed
    assert service.cancel(job, GONE_BY_CALLER) is True
    assert job.outcome is GONE_BY_CALLER
    assert job.state is JobState.CANCELLED
    assert changed.is_set()
    assert service.queue.position(job) is None
    assert service.cancel(job, GONE_BY_CALLER) is False
    assert list(service.to_clean) == [job]


async def test_cancelling_a_job_that_is_worked_on_cancels_the_work_and_leaves_the_files_to_it() -> None:
    service = make_service()
    job = submit(service)
    run(service, job)
    with trio.CancelScope() as job.scope:
        service.cancel(job, GONE_BY_CALLER)
        assert list(service.to_clean) == []
        await trio.sleep_forever()
    assert job.scope.cancelled_caught
    job.scope = None
    service.clean_if_done(job)
    service.clean_if_done(job)
    assert list(service.to_clean) == [job]


async def test_an_outcome_that_is_no_cancellation_fails_the_job() -> None:
    service = make_service()
    job = submit(service)
    service.cancel(job, Failure(kind=FailureKind.ENGINE_CRASHED, detail="x"))
    assert job.state is JobState.FAILED


async def test_a_second_outcome_is_a_bug() -> None:
    service = make_service()
    job = submit(service)
    service.cancel(job, GONE_BY_CALLER)
    with pytest.raises(RuntimeError, match="has an outcome already"):
        service.finish(job, GONE_BY_CALLER, JobState.CANCELLED)
    assert service._waiting == 0


async def test_when_the_engine_is_gone_every_job_is_told_and_cleaned_once() -> None:
    service = make_service()
    loader = {"class_type": "LoadImage", "inputs": {"image": "x.png"}}
    jobs = [submit(service, "running"), submit(service, "queued")]
    jobs.append(submit(service, "preparing", prompt=graph(**{"3": loader})))
    run(service, jobs[0])
    ended = submit(service, "ended")
    service.cancel(ended, GONE_BY_CALLER)
    service.engine_gone("the engine exited with code 3")
    for job in jobs:
        assert isinstance(job.outcome, Failure)
        assert job.outcome.kind is FailureKind.ENGINE_CRASHED
        assert job.outcome.detail == "ComfyUI is gone: the engine exited with code 3"
    assert ended.outcome is GONE_BY_CALLER
    assert list(service.to_clean) == [ended, *jobs]
    assert service.depth == 0


async def test_jobs_that_are_abandoned_at_the_end_are_all_cleaned() -> None:
    service = make_service()
    waiting, done = submit(service, "waiting"), submit(service, "done")
    service.cancel(done, GONE_BY_CALLER)
    service.abandon_all()
    assert list(service.to_clean) == [done, waiting]
    assert service.get("waiting") is None
    service.clean_if_done(waiting)
    assert len(service.to_clean) == 2


# Probes and draining


async def test_readiness_follows_the_depth_limit_and_zero_means_none() -> None:
    limited, unlimited = make_service(max_queue_depth=2), make_service()
    for service in (limited, unlimited):
        submit(service, "a")
        assert service.not_ready_reason() is None
        submit(service, "b")
    assert unlimited.not_ready_reason() is None
    assert limited.not_ready_reason() == "the queue depth is 2, the limit is 2"
    submit(limited, "beyond it jobs are taken all the same")


async def test_the_depth_counts_jobs_until_their_outcome_and_not_until_their_delivery() -> None:
    service = make_service()
    job = submit(service)
    run(service, job)
    with service.attached(job):
        assert service.depth == 1
        succeed(service, job)
        assert service.depth == 0


async def test_the_daemons_own_job_is_neither_counted_nor_known() -> None:
    service = make_service(max_queued=1)
    own = service.new_job(request(), "comfyd-warmup", internal=True)
    service.shape(own)
    own.move(JobState.QUEUED)
    service.started(own)
    service.finish(own, GONE_BY_CALLER, JobState.CANCELLED)
    assert service.depth == 0
    assert service._waiting == 0
    submit(service)
    assert list(service.to_clean) == [own]


async def test_drained_means_ended_and_delivered(autojump_clock: trio.testing.MockClock) -> None:
    service = make_service()
    first, second = submit(service, "first"), submit(service, "second")
    drained = trio.Event()

    async def wait() -> None:
        await service.wait_drained()
        drained.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        run(service, first)
        with service.attached(first):
            succeed(service, first)
            service.cancel(second, GONE_BY_CALLER)
            await trio.testing.wait_all_tasks_blocked()
            assert not drained.is_set()
        await trio.testing.wait_all_tasks_blocked()
        assert drained.is_set()


# Whose files are whose


async def test_prefixes_that_another_job_has_as_well_are_named() -> None:
    service = make_service()
    one = submit(service, "a", prompt=graph("b_pic"))  # a_b_pic
    other = submit(service, "a_b", prompt=graph("pic"))  # a_b_pic
    third = submit(service, "c")
    assert service.prefixes_of_others(one) == {"a_b_pic", "c_pic"}
    assert service.prefixes_of_others(third) == {"a_b_pic"}
    service.cancel(other, GONE_BY_CALLER)
    assert service.prefixes_of_others(one) == {"c_pic"}
    service.cancel(one, GONE_BY_CALLER)
    assert service.prefixes_of_others(one) == {"c_pic"}


async def test_time_in_the_queue_adds_up_over_attempts(autojump_clock: trio.testing.MockClock) -> None:
    service = make_service()
    job = submit(service)
    await trio.sleep(3)
    run(service, job)
    await trio.sleep(100)
    service.enqueue(job)
    await trio.sleep(2)
    run(service, job)
    assert job.clock.queue_s == pytest.approx(5.0)
    assert job.attempts == 2
    assert job.progress.view.percent == 0.0
