"""Runs jobs on one engine, one at a time, and looks at what came of each outside the engine's turn."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import attrs
import structlog
import trio

from comfyd.engine import (
    Completed,
    Engine,
    EngineEvent,
    Execution,
    Interrupted,
    Raised,
    Refused,
    Submission,
)
from comfyd.engine.last_words import secrets_in
from comfyd.errors import EngineError, EngineLost, Failure, FailureKind, Fault, RequestRefused, WarmupFailed
from comfyd.host.logging import bind_job, redacting
from comfyd.jobs import failures
from comfyd.jobs.deliver import Deliverer, DeliveryFailed
from comfyd.jobs.graph import mark_unlike_cached
from comfyd.jobs.model import Job, JobState, Success
from comfyd.jobs.prepare import Preparer
from comfyd.jobs.request import Request
from comfyd.jobs.service import JobService
from comfyd.media.collect import Collection, OutputFile, collect
from comfyd.media.kept import KeptOutputs

log = structlog.get_logger("comfyd.jobs")

_FINISHING_AT_ONCE: Final = 64
"""Jobs that are converted and uploaded at a time. When storage is slower than the engine, the engine waits: outputs
that nobody takes would fill the disk."""
_COLLECTING_THREADS: Final = 4
"""Looking at files is short; more threads would only wait for the same disk."""
_READ_ALONG_BYTES: Final = 1 << 20
"""Outputs of a job that are read in the same turn of the thread that finds them: pictures of a usual size."""
_STALE_RUNS: Final = 2
"""How often a job is run again because a node reported a file that is gone. ComfyUI reports old names for a graph that
it has run before: the first time its saving nodes are made to run again, the second time the whole cache is emptied."""
_FREE_SETTLE_S: Final = 0.1
"""ComfyUI empties its cache between two prompts, at the next turn of its worker after ``/free`` has answered
(0.3.64, ``main.py``, prompt_worker), and says nothing when it has."""


Publish = Callable[[str, Mapping[str, Any], str | None, str | None, str | None], None]


@attrs.define(eq=False)
class Runner:
    """One engine's runner with its finishing task."""

    service: JobService
    engine: Engine
    preparer: Preparer
    deliverer: Deliverer
    kept: KeptOutputs
    output_dir: Path
    publish: Publish | None = None
    """Hears every event of callers' jobs: type, data, session, job id, and the engine's id of the attempt."""
    _collecting: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(_COLLECTING_THREADS))
    _finishing_slots: trio.Semaphore = attrs.field(factory=lambda: trio.Semaphore(_FINISHING_AT_ONCE))

    async def serve(self) -> None:
        """Hand jobs to the engine until cancelled, or until the engine is gone for good; then every job is told.

        What it made is finished by a task for each, so that a slow disk or upload under one job does not hold up the
        next.
        """
        async with trio.open_nursery() as finishing:
            try:
                await self._serve_engine(finishing)
            except EngineLost as exc:
                self.service.engine_gone(str(exc))

    async def _serve_engine(self, finishing: trio.Nursery) -> NoReturn:
        while True:
            await self.engine.wait_up()
            if not self.engine.warm:
                await self._warm_up()
                continue
            job = await self.service.queue.get()
            if not (self.engine.up and self.engine.warm):
                self.service.queue.put_nowait(job)  # back to its place; the engine went down while we waited
                continue
            execution = await self._run(job)
            if execution is not None:
                try:
                    self._finishing_slots.acquire_nowait()  # the usual case, without a turn of the scheduler
                except trio.WouldBlock:
                    await self._finishing_slots.acquire()
                finishing.start_soon(self._finish_in_its_slot, job, execution)

    async def _finish_in_its_slot(self, job: Job, execution: Execution) -> None:
        try:
            await self._finish(job, execution)
        finally:
            self._finishing_slots.release()

    async def deliver_again(self, job: Job, execution: Completed, outputs: tuple[OutputFile, ...]) -> None:
        """Deliver what a job had made when an earlier daemon ended; no engine is needed for it."""
        async with self._finishing_slots:
            if not job.over:
                with bind_job(job.id, job.attempts):
                    await self._deliver(job, execution, outputs)

    async def _run(self, job: Job) -> Execution | None:
        """Run *job* once. None: it ended otherwise (cancelled), or goes back to the queue (the engine was lost)."""
        self.service.started(job)
        began = time.perf_counter()
        heard = len(job.reported)
        lost: EngineLost | None = None
        execution: Execution | None = None
        extra_data = job.request.extra_data or {}
        with bind_job(job.id, job.attempts), redacting(secrets_in(extra_data)):
            with trio.CancelScope() as job.scope:
                try:
                    if job.stale_runs > 1:
                        await self.engine.client.free()
                        await trio.sleep(_FREE_SETTLE_S)
                    submission = Submission(graph=job.graph, extra_data=extra_data)
                    execution = await self.engine.execute(submission, partial(self._hear, job))
                    if len(job.reported) - heard < len(execution.outputs):  # some are known from history only
                        job.reported.append(execution.outputs)
                except EngineLost as exc:
                    lost = exc
                except EngineError as exc:
                    lost = EngineLost(str(exc), cause=exc.cause)
            if job.scope.cancelled_caught:
                await self.engine.wait_idle()  # the engine may still be at it; its turn ends when it says so
            job.scope = None
            job.clock.engine_s += time.perf_counter() - began
            if job.over:
                self.service.clean_if_done(job)
                return None
            if lost is not None:
                self._engine_lost(job, lost)
                return None
            self.service.service_time.measured(time.perf_counter() - began)
            job.move(JobState.DELIVERING)
            return execution

    def _engine_lost(self, job: Job, lost: EngineLost) -> None:
        job.crashes += 1
        limit = self.service.config.jobs.max_attempts
        if job.internal or job.crashes >= limit:
            times = "once" if job.crashes == 1 else f"{job.crashes} times"
            facts: dict[str, Any] = {"attempts": job.attempts, "cause": lost.cause}
            if lost.last_words:
                facts["last_words"] = list(lost.last_words)
            detail = f"ComfyUI ended under this job {times}: {lost}"
            log.error("job.quarantined", job_id=job.id, cause=lost.cause, crashes=job.crashes)
            failure = Failure(kind=FailureKind.ENGINE_CRASHED, detail=detail, facts=facts)
            self.service.finish(job, failure, JobState.FAILED)
            return
        log.warning(
            "job.requeued", job_id=job.id, reason=str(lost), cause=lost.cause, crashes=job.crashes, max_attempts=limit
        )
        self.service.enqueue(job)

    async def _finish(self, job: Job, execution: Execution) -> None:
        """Turn an execution into the job's outcome."""
        with bind_job(job.id, job.attempts):
            match execution:
                case Completed():
                    await self._collect(job, execution)
                case Raised():
                    self._fail(job, failures.execution_failed(execution))
                case Refused():
                    self._fail(job, failures.prompt_refused(execution.refusal, job.graph))
                case Interrupted():
                    detail = "the job was interrupted in ComfyUI"
                    self._fail(job, Failure(kind=FailureKind.JOB_CANCELLED, detail=detail))

    async def _collect(self, job: Job, execution: Completed) -> None:
        began = time.perf_counter()
        plain = job.request.conversion is None and job.request.s3 is None
        look = partial(collect, read_along_bytes=_READ_ALONG_BYTES if plain else 0)
        collection: Collection = await trio.to_thread.run_sync(
            look, job.graph, execution.outputs, self.output_dir, limiter=self._collecting
        )
        job.clock.collect_s += time.perf_counter() - began
        if job.over:  # cancelled meanwhile
            self.service.clean_if_done(job)
        elif collection.refused or (collection.missing and job.stale_runs >= _STALE_RUNS):
            node_id, name = (collection.refused or collection.missing)[0]
            self._fail(job, _file_not_there(node_id, name))
        elif collection.missing:
            log.info("job.output_gone", files=[name for _, name in collection.missing])
            job.stale_runs += 1
            mark_unlike_cached(job.graph, (node_id for node_id, _ in collection.missing), f"{job.key}-{job.attempts}")
            self.service.enqueue(job)
        else:
            await self._keep_and_deliver(job, execution, collection.found)

    async def _keep_and_deliver(self, job: Job, execution: Completed, outputs: tuple[OutputFile, ...]) -> None:
        if job.request.keeps_outputs and outputs:
            try:
                with trio.CancelScope() as job.scope:  # or it is cleaned up while its files are still on their way
                    outputs = await trio.to_thread.run_sync(self.kept.keep, job.key, outputs, limiter=self._collecting)
            except OSError as exc:  # the disk is full, or gone: this job's end, and not the daemon's
                log.error("job.outputs_not_kept", reason=str(exc))  # noqa: TRY400  # a full story in one line
                detail = f"the outputs could not be moved to where they are kept: {exc.strerror}"
                self._fail(job, Failure(kind=FailureKind.INTERNAL, detail=detail))
            job.scope = None
        if job.over:  # cancelled meanwhile
            self.service.clean_if_done(job)
            return
        if job.journalled:
            job.made = True
            self.service.ledger.made(job, execution, outputs)
        await self._deliver(job, execution, outputs)

    async def _deliver(self, job: Job, execution: Completed, outputs: tuple[OutputFile, ...]) -> None:
        if job.request.conversion is not None and not job.request.keeps_outputs:
            job.folder = self.deliverer.store.folder(job.key)
        with trio.CancelScope() as job.scope:
            try:
                outputs = await self.deliverer.deliver(job, outputs)
            except DeliveryFailed as exc:
                self._fail(job, exc.failure)
            except OSError as exc:  # the disk is full, or gone: this job's end, and not the daemon's
                log.error("job.outputs_not_written", reason=str(exc))  # noqa: TRY400  # a full story in one line
                detail = f"the outputs could not be written to disk: {exc.strerror}"
                self._fail(job, Failure(kind=FailureKind.INTERNAL, detail=detail))
        job.scope = None
        if job.over:
            self.service.clean_if_done(job)
            return
        if job.request.keeps_outputs:
            job.kept_bytes = sum(output.size_bytes for output in outputs)
        stats = job.clock.stats(attempts=job.attempts, times=execution.times)
        success = Success(graph=job.shown_graph, outputs=outputs, stats=stats)
        self.service.finish(job, success, JobState.SUCCEEDED)

    def _hear(self, job: Job, event: EngineEvent) -> None:
        if event.type == "executed":
            output = event.data.get("output")
            if isinstance(output, Mapping):
                job.reported.append({str(event.data.get("node")): output})
        if job.progress.hear(event):
            job.touch()
        if self.publish is not None and not job.internal:
            self.publish(event.type, event.data, None, job.id, event.prompt_id)

    def _fail(self, job: Job, failure: Failure) -> None:
        if not job.over:
            ended = JobState.CANCELLED if failure.kind is FailureKind.JOB_CANCELLED else JobState.FAILED
            self.service.finish(job, failure, ended)

    async def _warm_up(self) -> None:
        """Run the warm-up prompt the way of any job; an engine on which it fails is not used."""
        prompt = self.service.config.jobs.warmup_prompt
        if prompt is None:
            self.engine.mark_warm()
            return
        began = time.perf_counter()
        job = self.service.new_job(Request(prompt=dict(prompt)), "comfyd-warmup", internal=True)
        try:
            found = self.service.shape(job)
            if found:
                job.move(JobState.PREPARING)
                await self.preparer.prepare(job, found)
            if job.outcome is None:
                job.move(JobState.QUEUED)
                job.queued_at = trio.current_time()
                execution = await self._run(job)
                while execution is not None and job.outcome is None:
                    await self._finish(job, execution)
                    if job.outcome is None:  # a cached file was gone: it is back in the queue, and this is its turn
                        self.service.queue.remove(job)
                        execution = await self._run(job)
        except RequestRefused as exc:
            await self._condemn(f"the warm-up prompt is not valid: {exc}")
            return
        if isinstance(job.outcome, Failure):
            if job.outcome.kind is not FailureKind.ENGINE_CRASHED:  # of which the engine's supervisor knows already
                await self._condemn(f"the warm-up prompt failed: {job.outcome.detail}")
        else:
            log.info("engine.warm", engine=self.engine.name, took_s=round(time.perf_counter() - began, 3))
            self.engine.mark_warm()

    async def _condemn(self, reason: str) -> None:
        """Give the engine up, and wait until its supervisor has; until then it would only be warmed up again."""
        self.engine.condemn(WarmupFailed(reason))
        while self.engine.up:
            await self.engine.wait_changed()


def _file_not_there(node_id: str, name: str) -> Failure:
    detail = f"node {node_id} reported the file {name}, which is not in OUTPUT_DIR"
    return Failure(
        kind=FailureKind.EXECUTION_FAILED,
        detail=detail,
        faults=(Fault(location=f"prompt.{node_id}", message=detail),),
        facts={"node_id": node_id},
    )
