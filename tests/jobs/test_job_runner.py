"""The tasks behind the service, on an engine that follows a script: each way a job can go, and what stays on disk."""

import base64
import errno
import gc
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio
from jobs_kit import (
    ScriptedEngine,
    completed,
    event,
    graph,
    make_service,
    saved,
    scripted,
    submit,
    wait_until,
    write_files,
)
from media_kit import png

from comfyd.engine import Engine, EngineEvent, Interrupted, Raised, Refusal, Refused, Submission
from comfyd.errors import EngineLost, EngineUnavailable, Failure, FailureKind, WarmupFailed
from comfyd.jobs import Job, JobService, JobState, Success
from comfyd.jobs import runner as runner_module
from comfyd.jobs.deliver import Deliverer
from comfyd.jobs.prepare import Preparer
from comfyd.jobs.runner import Runner
from comfyd.media import resolve as resolve_module
from comfyd.media.fetch import open_fetcher
from comfyd.media.files import InputStore
from comfyd.media.inputs import resolve_inputs
from comfyd.media.kept import KeptOutputs
from comfyd.media.resolve import Resolver
from comfyd.net import UrlPolicy
from comfyd.storage import S3Store

PICTURE = base64.b64encode(png(4, 4)).decode()
CANCELLED = Failure(kind=FailureKind.JOB_CANCELLED, detail="cancelled by the caller")
Observe = Callable[[EngineEvent], None]


@attrs.define(eq=False)
class Daemon:
    """A service with its tasks running, and the folders they work on."""

    service: JobService
    engine: ScriptedEngine
    preparer: Preparer
    runner: Runner
    output_dir: Path
    nursery: trio.Nursery

    def submit(self, job_id: str = "job", **fields: Any) -> Job:
        return submit(self.service, job_id, **fields)

    async def failure(self, job: Job) -> Failure:
        with trio.fail_after(10):
            outcome = await job.wait_final()
        assert isinstance(outcome, Failure)
        return outcome

    async def success(self, job: Job) -> Success:
        with trio.fail_after(10):
            outcome = await job.wait_final()
        assert isinstance(outcome, Success), outcome
        return outcome

    async def wait_cleaned(self) -> None:
        """Wait until the files of every job that has ended are gone. The threads' ends are not ours to await."""
        await wait_until(lambda: not (self.service.to_clean or self.preparer._cleaning.borrowed_tokens))

    def inputs_on_disk(self) -> list[str]:
        return sorted(path.name for path in self.preparer.store.root.iterdir() if path.name not in {".lock", "spool"})

    def outputs_on_disk(self) -> list[str]:
        return sorted(str(path.relative_to(self.output_dir)) for path in self.output_dir.rglob("*") if path.is_file())


@asynccontextmanager
async def running(tmp_path: Path, engine: ScriptedEngine, **jobs: Any) -> AsyncIterator[Daemon]:
    """Everything that serve_jobs starts, for an engine that is scripted. Real clock: threads do the disk's work."""
    output_dir = tmp_path / "output"
    output_dir.mkdir()
    service = make_service(cast("Engine", engine), **jobs)
    store = InputStore.open(tmp_path / "input")
    media, s3 = service.config.media, S3Store()
    kept = KeptOutputs(root=output_dir / "kept")
    with closing(store), trio.fail_after(25):
        async with open_fetcher(media, UrlPolicy(), store.root / "spool") as fetcher, trio.open_nursery() as nursery:
            preparer = Preparer(
                service=service,
                store=store,
                resolver=Resolver(store=store, fetcher=fetcher, s3=s3, limits=media),
                kept=kept,
                output_dir=output_dir,
            )
            runner = Runner(
                service=service,
                engine=cast("Engine", engine),
                preparer=preparer,
                deliverer=Deliverer(store=store, kept=kept, s3=s3),
                kept=kept,
                output_dir=output_dir,
            )
            for serve in (preparer.serve_preparing, preparer.serve_cleaning, runner.serve):
                nursery.start_soon(serve)  # noqa: ASYNC113  # none has a moment at which it is ready
            yield Daemon(
                service=service,
                engine=engine,
                preparer=preparer,
                runner=runner,
                output_dir=output_dir,
                nursery=nursery,
            )
            nursery.cancel_scope.cancel("the test is over")


async def _runs_for_ever(engine: ScriptedEngine, submission: Submission, observe: Observe) -> None:
    await trio.sleep_forever()


def _saves(output_dir: Path, *names: str) -> Any:
    """A step that writes files and reports them, as SaveImage does."""

    async def step(engine: ScriptedEngine, submission: Submission, observe: Observe) -> Any:
        prefix = submission.graph["2"]["inputs"]["filename_prefix"]
        files = [name.replace("*", prefix) for name in names]
        write_files(output_dir, files)
        outputs = saved(*files)
        observe(event("executed", node="2", output=outputs["2"]))
        return completed(outputs)

    return step


# The ways that a job can go


async def test_a_job_that_runs_succeeds_with_its_files_which_go_after_delivery(tmp_path: Path) -> None:
    engine = scripted(_saves(tmp_path / "output", "*_00001_.png", "*_00002_.png"))
    async with running(tmp_path, engine) as daemon:
        job = daemon.submit(extra_data={"key": "secret"})
        with daemon.service.attached(job):
            success = await daemon.success(job)
            assert [output.filename for output in success.outputs] == ["job_pic_00001_.png", "job_pic_00002_.png"]
            assert success.graph == job.graph
            assert success.stats.attempts == 1
            assert job.state is JobState.SUCCEEDED
            assert len(daemon.outputs_on_disk()) == 2
        await daemon.wait_cleaned()
        assert daemon.outputs_on_disk() == []
        assert daemon.service.depth == 0
        (submission,) = engine.submissions
        assert submission.graph == job.graph
        assert submission.extra_data == {"key": "secret"}
        await daemon.service.wait_drained()


async def test_files_that_were_learnt_from_history_only_are_removed_as_well(tmp_path: Path) -> None:
    """The socket was away when the node reported them, so no event told of them."""
    engine = scripted(completed(saved("job_pic_00001_.png")))
    async with running(tmp_path, engine) as daemon:
        write_files(daemon.output_dir, ["job_pic_00001_.png", "other_pic_00001_.png"])
        job = daemon.submit()
        with daemon.service.attached(job):
            success = await daemon.success(job)
            assert len(success.outputs) == 1
        await daemon.wait_cleaned()
        assert daemon.outputs_on_disk() == ["other_pic_00001_.png"]


async def test_each_execution_has_a_prompt_id_of_its_own(tmp_path: Path) -> None:
    engine = scripted(EngineLost("crashed"), completed(), completed())
    async with running(tmp_path, engine) as daemon:
        await daemon.success(daemon.submit("a"))
        await daemon.success(daemon.submit("b"))
        assert len({submission.prompt_id for submission in engine.submissions}) == 3


async def test_a_node_that_raises_fails_the_job_and_its_half_written_files_go(tmp_path: Path) -> None:
    raised = Raised(node_id="2", node_type="SaveImage", exception_type="OSError", exception_message="full", outputs={})
    async with running(tmp_path, scripted(raised)) as daemon:
        write_files(daemon.output_dir, ["job_pic_00001_.png", "job_pic_00002.webp", "job_b_pic_00001_.png", "job_pic"])
        failure = await daemon.failure(daemon.submit())
        assert failure.kind is FailureKind.EXECUTION_FAILED
        assert failure.facts["node_id"] == "2"
        await daemon.wait_cleaned()
        assert daemon.outputs_on_disk() == ["job_b_pic_00001_.png", "job_pic"]


async def test_a_refused_prompt_fails_the_job_with_comfyuis_reasons(tmp_path: Path) -> None:
    refusal = Refusal(error={"type": "t", "message": "Bad", "details": ""}, node_errors={"2": {"errors": []}})
    async with running(tmp_path, scripted(Refused(refusal=refusal, outputs={}))) as daemon:
        failure = await daemon.failure(daemon.submit())
        assert failure.kind is FailureKind.INVALID_PROMPT
        assert failure.facts == {"node_errors": {"2": {"errors": []}}}


async def test_a_prompt_that_somebody_else_interrupted_is_a_cancelled_job(tmp_path: Path) -> None:
    async with running(tmp_path, scripted(Interrupted(outputs={}))) as daemon:
        job = daemon.submit()
        assert (await daemon.failure(job)).kind is FailureKind.JOB_CANCELLED
        assert job.state is JobState.CANCELLED


async def test_a_job_whose_engine_is_lost_runs_again_before_later_ones(tmp_path: Path) -> None:
    engine = scripted(EngineLost("crashed"), completed(), completed())
    async with running(tmp_path, engine) as daemon:
        first, second = daemon.submit("first"), daemon.submit("second")
        assert (await daemon.success(first)).stats.attempts == 2
        await daemon.success(second)
        prefixes = [one.graph["2"]["inputs"]["filename_prefix"] for one in engine.submissions]
        assert prefixes == ["first_pic", "first_pic", "second_pic"]
        assert first.crashes == 1


@pytest.mark.parametrize("error", [EngineLost("code 3", last_words=("Fatal",)), EngineUnavailable("code 3")])
async def test_a_job_under_which_the_engine_dies_too_often_is_given_up_as_the_cause(
    tmp_path: Path, error: Exception
) -> None:
    async with running(tmp_path, scripted(error, error, completed()), max_attempts=2) as daemon:
        failure = await daemon.failure(daemon.submit())
        assert failure.kind is FailureKind.ENGINE_CRASHED
        assert failure.detail == "ComfyUI ended under this job 2 times: code 3"
        assert failure.facts["attempts"] == 2
        assert failure.facts["cause"] == "failed"
        assert failure.facts.get("last_words") == (["Fatal"] if isinstance(error, EngineLost) else None)
        await daemon.success(daemon.submit("next"))


async def test_with_one_attempt_allowed_the_first_crash_ends_the_job(tmp_path: Path) -> None:
    async with running(tmp_path, scripted(EngineLost("x")), max_attempts=1) as daemon:
        assert (await daemon.failure(daemon.submit())).detail == "ComfyUI ended under this job once: x"


async def test_a_file_that_is_gone_is_made_again_first_by_a_mark_then_by_an_empty_cache(tmp_path: Path) -> None:
    gone = completed(saved("old_00001_.png"))
    engine = scripted(gone, gone, _saves(tmp_path / "output", "*_00001_.png"))
    async with running(tmp_path, engine) as daemon:
        job = daemon.submit()
        success = await daemon.success(job)
        assert [output.filename for output in success.outputs] == ["job_pic_00001_.png"]
        assert success.stats.attempts == 3
        assert engine.calls == ["execute", "execute", "free", "execute"]


async def test_each_rerun_for_a_missing_file_is_unlike_what_comfyui_has_cached(tmp_path: Path) -> None:
    marks = []

    async def gone(engine: ScriptedEngine, submission: Submission, observe: Observe) -> Any:
        marks.append([node["inputs"].get("comfyd_run") for node in submission.graph.values()])
        return completed(saved("old_00001_.png"))

    async with running(tmp_path, scripted(gone, gone, gone)) as daemon:
        await daemon.failure(daemon.submit())
    assert [upstream for upstream, _ in marks] == [None, None, None], "what comes before stays cached"
    assert marks[0][1] is None
    assert len({mark for _, mark in marks}) == 3


async def test_a_file_that_is_never_there_fails_the_job_and_crashes_count_apart(tmp_path: Path) -> None:
    gone = completed(saved("old_00001_.png"))
    async with running(tmp_path, scripted(gone, EngineLost("x"), gone, gone), max_attempts=2) as daemon:
        failure = await daemon.failure(daemon.submit())
        assert failure.kind is FailureKind.EXECUTION_FAILED
        assert failure.detail == "node 2 reported the file old_00001_.png, which is not in OUTPUT_DIR"
        assert failure.faults[0].location == "prompt.2"
        assert daemon.engine.calls.count("free") == 1


async def test_a_file_outside_of_the_output_folder_fails_the_job_at_once_and_stays(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    async with running(tmp_path, scripted(completed(saved("secret.png", subfolder="..")))) as daemon:
        job = daemon.submit()
        failure = await daemon.failure(job)
        assert failure.kind is FailureKind.EXECUTION_FAILED
        assert str(tmp_path) not in str(failure)
        assert job.attempts == 1
        await daemon.wait_cleaned()
        assert secret.exists()


async def test_progress_and_reports_are_heard_while_the_job_runs(tmp_path: Path) -> None:
    go_on = trio.Event()

    async def step(engine: ScriptedEngine, submission: Submission, observe: Observe) -> Any:
        observe(event("execution_cached", nodes=["1"]))
        observe(event("executed", node="2", output=saved("job_pic_00001_.png")["2"]))
        observe(event("executed", node="3", output=None))
        await go_on.wait()
        return completed()

    async with running(tmp_path, scripted(step)) as daemon:
        job = daemon.submit()
        while job.progress.view.percent == 0:
            with trio.fail_after(5):
                await job.changed.wait()
        assert job.progress.view.percent == 50.0
        assert job.reported == [saved("job_pic_00001_.png")]
        go_on.set()
        await daemon.success(job)


# Cancelling


async def test_cancelling_a_running_job_frees_the_engine_for_the_next_once_it_is_idle(tmp_path: Path) -> None:
    engine = scripted(_runs_for_ever, completed())
    async with running(tmp_path, engine) as daemon:
        job, following = daemon.submit("first"), daemon.submit("second")
        await wait_until(lambda: engine.submissions)
        assert daemon.service.cancel(job, CANCELLED)
        assert await daemon.failure(job) is CANCELLED
        await daemon.success(following)
        assert engine.calls == ["execute", "wait_idle", "execute"]
        assert job.scope is None
        await daemon.wait_cleaned()


async def test_a_cancelled_jobs_files_are_removed_only_when_the_engine_has_let_go(tmp_path: Path) -> None:
    idle = trio.Event()

    @attrs.define(eq=False)
    class SlowToStop(ScriptedEngine):
        async def wait_idle(self) -> None:
            write_files(tmp_path / "output", ["job_pic_00001_.png"])  # the save node was at it already
            await idle.wait()

    async with running(tmp_path, SlowToStop(script=deque([_runs_for_ever]))) as daemon:
        job = daemon.submit()
        await wait_until(lambda: daemon.engine.submissions)
        daemon.service.cancel(job, CANCELLED)
        await trio.testing.wait_all_tasks_blocked()
        assert daemon.outputs_on_disk() == ["job_pic_00001_.png"]
        assert list(daemon.service.to_clean) == []
        idle.set()
        with trio.fail_after(5):
            await daemon.service.wait_drained()
        await daemon.wait_cleaned()
        assert daemon.outputs_on_disk() == []


async def test_a_waiting_job_that_is_cancelled_never_reaches_the_engine(tmp_path: Path) -> None:
    engine = scripted(_runs_for_ever, completed())
    async with running(tmp_path, engine) as daemon:
        first, second, third = (daemon.submit(name) for name in ("first", "second", "third"))
        daemon.service.cancel(second, CANCELLED)
        await wait_until(lambda: engine.submissions)
        daemon.service.cancel(first, CANCELLED)
        await daemon.success(third)
        assert len(engine.submissions) == 2


# An engine that goes and comes


async def test_jobs_wait_while_the_engine_is_down_and_run_when_it_is_warm_again(tmp_path: Path) -> None:
    engine = scripted(completed(), up=False, warm=False)
    async with running(tmp_path, engine) as daemon:
        job = daemon.submit()
        await trio.testing.wait_all_tasks_blocked()
        assert engine.calls == []
        engine.set_up(up=True)
        await daemon.success(job)
        assert engine.calls == ["mark_warm", "execute"]


async def test_a_job_that_comes_while_the_engine_is_down_goes_back_to_its_place(tmp_path: Path) -> None:
    engine = scripted(completed(), completed())
    async with running(tmp_path, engine) as daemon:
        await trio.testing.wait_all_tasks_blocked()  # the runner waits for a job
        engine.set_up(up=False)
        first, second = daemon.submit("first"), daemon.submit("second")
        await trio.testing.wait_all_tasks_blocked()
        assert [daemon.service.queue.position(job) for job in (first, second)] == [0, 1]
        engine.set_up(up=True, warm=True)
        await daemon.success(first)
        await daemon.success(second)
        assert engine.submissions[0].graph == first.graph


async def test_when_the_engine_is_gone_for_good_every_job_is_told(tmp_path: Path) -> None:
    engine = scripted(up=False, warm=False)
    async with running(tmp_path, engine) as daemon:
        jobs = [daemon.submit("a"), daemon.submit("b")]
        await trio.testing.wait_all_tasks_blocked()
        engine.set_up(up=False, gone="the engine exited with code 1")
        for job in jobs:
            failure = await daemon.failure(job)
            assert failure.kind is FailureKind.ENGINE_CRASHED
            assert failure.detail == "ComfyUI is gone: the engine exited with code 1"


# Warming up

WARM_UP = graph("warm")


async def test_a_warm_up_runs_before_any_job_and_leaves_nothing(tmp_path: Path) -> None:
    output_dir = tmp_path / "output"
    engine = scripted(_saves(output_dir, "*_00001_.png"), completed(), warm=False)
    async with running(tmp_path, engine, warmup_prompt=WARM_UP) as daemon:
        job = daemon.submit()
        await daemon.success(job)
        assert engine.calls == ["execute", "mark_warm", "execute"]
        assert engine.submissions[0].graph["2"]["inputs"]["filename_prefix"] == "comfyd-warmup_warm"
        await daemon.wait_cleaned()
        assert daemon.outputs_on_disk() == []
        assert daemon.service.get("comfyd-warmup") is None


async def test_a_warm_up_whose_file_is_gone_is_run_again_in_its_own_turn(tmp_path: Path) -> None:
    gone = completed(saved("old_00001_.png"))
    engine = scripted(gone, gone, _saves(tmp_path / "output", "*_00001_.png"), completed(), warm=False)
    async with running(tmp_path, engine, warmup_prompt=WARM_UP) as daemon:
        await daemon.success(daemon.submit())
        assert engine.calls == ["execute", "execute", "free", "execute", "mark_warm", "execute"]
        assert len(daemon.service.queue) == 0


@pytest.mark.parametrize(
    ("prompt", "script", "reason"),
    [
        ({"1": {"class_type": "Unknown", "inputs": {}}}, [], "the warm-up prompt is not valid: prompt.1.class_type"),
        (
            WARM_UP,
            [Raised(node_id="1", node_type="A", exception_type="E", exception_message="m", outputs={})],
            "the warm-up prompt failed: node 1",
        ),
        (
            graph("warm", **{"3": {"class_type": "LoadImage", "inputs": {"image": "absent.png"}}}),
            [],
            "the warm-up prompt failed: there is no input file",
        ),
    ],
)
async def test_an_engine_on_which_the_warm_up_fails_is_condemned_and_never_used(
    tmp_path: Path, prompt: Any, script: list[Any], reason: str
) -> None:
    engine = scripted(*script, warm=False)
    async with running(tmp_path, engine, warmup_prompt=prompt) as daemon:
        await wait_until(lambda: engine.condemned)
        (error,) = engine.condemned
        assert isinstance(error, WarmupFailed)
        assert str(error).startswith(reason)
        assert "mark_warm" not in engine.calls
        assert daemon.inputs_on_disk() == []


async def test_an_engine_that_dies_in_its_warm_up_is_its_supervisors_business(tmp_path: Path) -> None:
    async def dies(engine: ScriptedEngine, submission: Submission, observe: Observe) -> Any:
        engine.set_up(up=False)
        raise EngineLost("crashed")

    engine = scripted(dies, completed(), completed(), warm=False)
    async with running(tmp_path, engine, warmup_prompt=WARM_UP) as daemon:
        job = daemon.submit()
        await trio.testing.wait_all_tasks_blocked()
        assert engine.condemned == []
        assert job.outcome is None
        engine.set_up(up=True)
        await daemon.success(job)
        assert engine.calls == ["execute", "execute", "mark_warm", "execute"]


# Inputs


def loading(value: str, **more: str) -> dict[str, Any]:
    nodes = {"3": value, **more}
    return graph(**{key: {"class_type": "LoadImage", "inputs": {"image": text}} for key, text in nodes.items()})


async def test_inputs_are_written_before_the_engines_turn_and_go_with_the_job(tmp_path: Path) -> None:
    engine = scripted(_runs_for_ever)
    async with running(tmp_path, engine) as daemon:
        job = daemon.submit(prompt=loading(PICTURE))
        await wait_until(lambda: engine.submissions)
        value = engine.submissions[0].graph["3"]["inputs"]["image"]
        assert (tmp_path / "input" / value).read_bytes() == png(4, 4)
        assert value == f"comfyd/{daemon.preparer.store.root.name}/{job.key}/001.png"
        assert job.clock.prepare_s > 0
        daemon.service.cancel(job, CANCELLED)
        with trio.fail_after(5):
            await daemon.service.wait_drained()
        await daemon.wait_cleaned()
        assert daemon.inputs_on_disk() == []


async def test_inputs_that_cannot_be_used_fail_the_job_and_leave_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, scripted()) as daemon:
        job = daemon.submit(prompt=loading(PICTURE, **{"4": "absent.png", "5": PICTURE[:-8] + "!!!!!!!!"}))
        failure = await daemon.failure(job)
        assert failure.kind is FailureKind.INVALID_INPUT
        assert [fault.location for fault in failure.faults] == ["prompt.4.inputs.image", "prompt.5.inputs.image"]
        assert job.state is JobState.FAILED
        await daemon.wait_cleaned()
        assert daemon.inputs_on_disk() == []
        assert daemon.engine.submissions == []


async def test_a_full_disk_fails_the_job_and_not_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    async with running(tmp_path, scripted(completed())) as daemon:
        with monkeypatch.context() as patch:
            patch.setattr(resolve_module, "resolve_inputs", full)
            failure = await daemon.failure(daemon.submit(prompt=loading(PICTURE)))
        assert failure.kind is FailureKind.INTERNAL
        assert "No space left" in failure.detail
        assert str(tmp_path) not in failure.detail
        await daemon.wait_cleaned()
        assert daemon.inputs_on_disk() == []
        await daemon.success(daemon.submit("next"))


async def test_a_job_that_is_cancelled_before_its_inputs_are_looked_at_leaves_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, scripted()) as daemon:
        job = daemon.submit(prompt=loading(PICTURE))
        daemon.service.cancel(job, CANCELLED)
        await trio.testing.wait_all_tasks_blocked()
        await daemon.wait_cleaned()
        await wait_until(lambda: not daemon.preparer.resolver._limiter.borrowed_tokens)
        assert daemon.inputs_on_disk() == []


async def test_a_job_that_is_cancelled_while_its_inputs_are_written_is_cleaned_up_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_it, go_on = threading.Event(), threading.Event()
    original = resolve_inputs

    def slow(*arguments: Any) -> Any:
        at_it.set()
        go_on.wait(10)
        return original(*arguments)

    monkeypatch.setattr(resolve_module, "resolve_inputs", slow)
    async with running(tmp_path, scripted()) as daemon:
        job = daemon.submit(prompt=loading(PICTURE))
        await trio.to_thread.run_sync(partial(at_it.wait, 5))
        daemon.service.cancel(job, CANCELLED)
        assert await daemon.failure(job) is CANCELLED
        assert list(daemon.service.to_clean) == [], "its thread is still at it"
        go_on.set()
        with trio.fail_after(5):
            await daemon.service.wait_drained()
        await daemon.wait_cleaned()
        assert daemon.inputs_on_disk() == []
        assert daemon.engine.submissions == []


async def test_when_delivery_is_slower_than_the_engine_the_engine_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs that nobody takes would fill the disk."""
    monkeypatch.setattr(runner_module, "_FINISHING_AT_ONCE", 2)
    go_on = trio.Event()

    async def stuck(self: Deliverer, job: Job, outputs: Any) -> Any:
        await go_on.wait()
        return outputs

    async with running(tmp_path, scripted(*[completed()] * 9)) as daemon:
        monkeypatch.setattr(Deliverer, "deliver", stuck)
        jobs = [daemon.submit(f"job-{number}") for number in range(9)]
        await wait_until(lambda: len(daemon.engine.submissions) >= 3)
        await trio.testing.wait_all_tasks_blocked()
        # Two are delivered, and one is held by the runner, as there is no slot for it yet.
        assert len(daemon.engine.submissions) == 3
        go_on.set()
        for job in jobs:
            await daemon.success(job)


async def test_a_full_disk_at_delivery_fails_the_job_and_not_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(self: Deliverer, job: Job, outputs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    async with running(tmp_path, scripted(completed(), completed())) as daemon:
        with monkeypatch.context() as patch:
            patch.setattr(Deliverer, "deliver", full)
            failure = await daemon.failure(daemon.submit())
        assert failure.kind is FailureKind.INTERNAL
        assert "No space left" in failure.detail
        assert str(tmp_path) not in failure.detail
        await daemon.success(daemon.submit("next"))


async def test_an_id_is_free_when_the_files_of_its_last_job_are_gone(tmp_path: Path) -> None:
    async with running(tmp_path, scripted(_saves(tmp_path / "output", "job_pic_00001_.png"))) as daemon:
        job = daemon.submit("job")
        await daemon.success(job)
        assert daemon.outputs_on_disk() == ["job_pic_00001_.png"]
        await daemon.service.wait_free("job")
        assert daemon.outputs_on_disk() == []


async def test_what_a_caller_sent_is_let_go_of_once_it_is_on_disk(tmp_path: Path) -> None:
    """An input can be 90 MB of base64; the preparing task kept the last job's until the next came."""
    async with running(tmp_path, scripted(completed())) as daemon:
        job = daemon.submit(prompt=loading(PICTURE))
        sent = weakref.ref(daemon.service.to_prepare[0][1][0])
        await daemon.success(job)
        await trio.testing.wait_all_tasks_blocked()
        gc.collect()
        assert sent() is None


async def test_several_jobs_are_prepared_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4, timeout=5)
    original = resolve_inputs

    def meet(*arguments: Any) -> Any:
        together.wait()
        return original(*arguments)

    monkeypatch.setattr(resolve_module, "resolve_inputs", meet)
    async with running(tmp_path, scripted(*[completed()] * 4)) as daemon:
        jobs = [daemon.submit(name, prompt=loading(PICTURE)) for name in "abcd"]
        for job in jobs:
            await daemon.success(job)


async def test_a_file_that_cannot_be_removed_is_logged_and_does_not_keep_the_rest(tmp_path: Path) -> None:
    async def saves_a_folder(engine: ScriptedEngine, submission: Submission, observe: Observe) -> Any:
        (tmp_path / "output" / "folder").mkdir()
        observe(event("executed", node="2", output=saved("folder", "job_pic_00001_.png")["2"]))
        write_files(tmp_path / "output", ["job_pic_00001_.png"])
        return Interrupted(outputs={})

    async with running(tmp_path, scripted(saves_a_folder, completed())) as daemon:
        await daemon.failure(daemon.submit(prompt=loading(PICTURE)))
        await daemon.wait_cleaned()
        assert daemon.inputs_on_disk() == []
        assert daemon.outputs_on_disk() == []
        await daemon.success(daemon.submit("next"))
