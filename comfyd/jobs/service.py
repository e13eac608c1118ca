"""The job service: takes jobs from any source, and leads each along its way to one outcome.

Who does what: :meth:`JobService.submit` accepts; the preparing task writes inputs to disk; one runner per engine hands
over one job at a time; the finishing task looks at the files; the cleaning task removes what is no longer needed. A
caller's task owns nothing: it submits, waits, reads the files and lets go. Between two waits every method leaves a job
in a consistent state, so there is no lock.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import attrs
import structlog
import trio

from comfyd.config import JobsConfig, MediaConfig
from comfyd.engine import Engine, EngineState
from comfyd.errors import Failure, FailureKind, RequestRefused
from comfyd.jobs import failures
from comfyd.jobs.deadlines import Deadlines
from comfyd.jobs.graph import check_classes, check_shape, prepare_graph, saves_something
from comfyd.jobs.model import Job, JobState, Outcome
from comfyd.jobs.queue import JobQueue
from comfyd.jobs.request import Request
from comfyd.jobs.service_time import ServiceTime
from comfyd.media.inputs import Candidate, candidates
from comfyd.net import UrlPolicy

log = structlog.get_logger("comfyd.jobs")

_STARTING_RETRY_S: Final = 5.0
_REMEMBERED: Final = 1000
"""Some kilobytes each, mostly the graph."""


@attrs.frozen(kw_only=True)
class ServiceConfig:
    """What the job service needs to know."""

    jobs: JobsConfig
    media: MediaConfig
    urls: UrlPolicy = attrs.field(factory=UrlPolicy)


@attrs.define(eq=False)
class JobService:
    """Every job that comfyd knows. Made by :func:`comfyd.jobs.serve_jobs`, which runs the tasks behind it."""

    config: ServiceConfig
    engines: tuple[Engine, ...]
    queue: JobQueue = attrs.field(factory=JobQueue)
    deadlines: Deadlines = attrs.field(factory=Deadlines)
    service_time: ServiceTime = attrs.field(factory=ServiceTime)
    draining: bool = False
    to_prepare: deque[tuple[Job, tuple[Candidate, ...]]] = attrs.field(factory=deque)
    """Bounded by ``max_queued``, as every job in it counts as waiting."""
    to_clean: deque[Job] = attrs.field(factory=deque)
    """Bounded by the jobs that are known: each is here once."""
    preparing: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)
    cleaning: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)
    _known: dict[str, Job] = attrs.field(factory=dict)
    _remembered: dict[str, Job] = attrs.field(factory=dict)
    """The last jobs that ended without a caller to tell, oldest first: for who asks, or sends the same again."""
    _leaving: set[str] = attrs.field(factory=set)
    """Ids of jobs whose files are being removed."""
    _waiting: int = 0
    """Jobs accepted and not yet running."""
    _sequence: int = 0
    _changed: trio.Event = attrs.field(factory=trio.Event)

    # --- for callers

    def submit(self, request: Request, job_id: str, digest: bytes) -> Job:
        """Accept a job, or join the one that is known under *job_id*. Never waits.

        Raises:
            RequestRefused: nothing was queued and nothing is left behind.
        """
        known = self.get(job_id)
        if known is not None:
            if digest and known.digest == digest:
                log.info("job.joined", job_id=known.id, state=known.state.value)
                return known
            raise RequestRefused(
                Failure(
                    kind=FailureKind.ID_CONFLICT,
                    detail=f"another request is being served under the id {job_id}",
                )
            )
        self._refuse_if_busy()
        job = self.new_job(request, job_id, digest)
        found = self.shape(job)
        if request.timeout_s is not None or self.config.jobs.timeout_s is not None:
            job.deadline = trio.current_time() + (request.timeout_s or self.config.jobs.timeout_s or 0)
            self.deadlines.add(job)
        self._known[job_id] = job
        self._waiting += 1
        log.info("job.accepted", job_id=job.id, nodes=len(job.graph), inputs=len(found), waiting=self._waiting)
        if found:
            job.move(JobState.PREPARING)
            self.to_prepare.append((job, found))
            self.preparing.unpark()
        else:
            self.enqueue(job)
        return job

    async def wait_free(self, job_id: str) -> None:
        """Wait until no file of an earlier job *job_id* is about to be removed.

        ComfyUI reports the earlier job's files for the same graph, and they would go under the answer of the new one.
        """
        while job_id in self._leaving:
            await self._changed.wait()

    @contextmanager
    def attached(self, job: Job) -> Iterator[None]:
        """Be one of the callers who wait for *job*; its files stay for as long as the block runs.

        When the last caller leaves before there is an outcome, the job is cancelled: nobody would take its result.
        """
        job.waiters += 1
        try:
            yield
        finally:
            job.waiters -= 1
            if job.waiters == 0 and job.outcome is None and not job.request.detached:
                log.info("job.abandoned", job_id=job.id, state=job.state.value)
                self.cancel(job, Failure(kind=FailureKind.JOB_CANCELLED, detail="the caller has gone"))
            self.clean_if_done(job)

    def cancel(self, job: Job, failure: Failure) -> bool:
        """End *job* by *failure* wherever it is; False if it has already ended."""
        if job.outcome is not None:
            return False
        self.queue.remove(job)
        ended = JobState.CANCELLED if failure.kind is FailureKind.JOB_CANCELLED else JobState.FAILED
        self.finish(job, failure, ended)
        if job.scope is not None:
            job.scope.cancel("the job was cancelled")
        return True

    def get(self, job_id: str) -> Job | None:
        """The job that is known under *job_id*: one on its way, or one of the last whose callers did not wait."""
        return self._known.get(job_id) or self._remembered.get(job_id)

    # --- for probes and the daemon

    @property
    def healthy(self) -> bool:
        """Whether a warm-up was ever completed."""
        return any(engine.was_ever_warm for engine in self.engines)

    def not_ready_reason(self) -> str | None:
        """Why no more work should be sent here; None if it may."""
        if self.draining:
            return "draining"
        if not any(engine.up for engine in self.engines):
            state = self.engines[0].state.value
            return f"the engine is {state}"
        if not any(engine.up and engine.warm for engine in self.engines):
            return "the engine is warming up"
        limit = self.config.jobs.max_queue_depth
        if limit and self.depth >= limit:
            return f"the queue depth is {self.depth}, the limit is {limit}"
        return None

    @property
    def depth(self) -> int:
        """Jobs of callers that wait or run."""
        return sum(1 for job in self._known.values() if not job.state.final)

    def begin_drain(self) -> None:
        """Take no more jobs."""
        self.draining = True

    async def wait_drained(self) -> None:
        """Wait until every job has ended and been delivered."""
        while self._known:
            await self._changed.wait()

    def cancel_all(self, failure: Failure) -> None:
        """End every job that has no outcome yet."""
        for job in list(self._known.values()):
            self.cancel(job, failure)

    # --- for the tasks behind the service

    def new_job(self, request: Request, job_id: str, digest: bytes = b"", *, internal: bool = False) -> Job:
        """Make a job that nobody knows yet."""
        self._sequence += 1
        return Job(id=job_id, request=request, digest=digest, sequence=self._sequence, internal=internal)

    def shape(self, job: Job) -> tuple[Candidate, ...]:
        """Check the job's graph and make it the job's own. Returns the inputs that have to be prepared.

        Raises:
            RequestRefused: the graph is not one that the engine could run.
        """
        prompt = job.request.prompt
        if faults := check_shape(prompt):
            raise RequestRefused(failures.invalid_request(tuple(faults)))
        classes = next((engine.node_classes for engine in self.engines if engine.node_classes is not None), None)
        if classes is None:
            raise RequestRefused(self._not_ready("the engine has not started yet"))
        if faults := check_classes(prompt, classes):
            raise RequestRefused(failures.invalid_prompt(tuple(faults)))
        if not saves_something(prompt, classes):
            raise RequestRefused(failures.no_output_node())
        prepared = prepare_graph(prompt, job.id, classes)
        job.graph, job.prefixes = prepared.nodes, prepared.prefixes
        # The request's own graph may hold megabytes of base64, which are files from here on.
        job.request = attrs.evolve(job.request, prompt={})
        return tuple(candidates(prepared.nodes, classes))

    def enqueue(self, job: Job) -> None:
        """Let *job* wait for an engine, at its place by priority and arrival."""
        job.move(JobState.QUEUED)
        job.queued_at = trio.current_time()
        self.queue.put_nowait(job)

    def started(self, job: Job) -> None:
        """*job* is handed to an engine."""
        if job.attempts == 0 and not job.internal:
            self._waiting -= 1
        job.attempts += 1
        job.clock.queue_s += trio.current_time() - job.queued_at
        job.progress.begin(frozenset(job.graph))
        job.move(JobState.RUNNING)

    def finish(self, job: Job, outcome: Outcome, state: JobState) -> None:
        """Give *job* its one outcome."""
        if job.outcome is not None:
            raise RuntimeError(f"job {job.id} has an outcome already")
        job.outcome = outcome
        if job.attempts == 0 and not job.internal:
            self._waiting -= 1
        job.move(state)
        facts: dict[str, Any] = {"job_id": job.id, "state": state.value, "attempts": job.attempts}
        if isinstance(outcome, Failure):
            log.info("job.ended", **facts, type=outcome.kind.value, detail=outcome.detail)
        else:
            log.info("job.ended", **facts, outputs=len(outcome.outputs), total_ms=outcome.stats.total_time)
        self.clean_if_done(job)

    def clean_if_done(self, job: Job) -> None:
        """Hand *job* to the cleaning task once it has ended, nobody reads its files, and nobody works on it."""
        if job.outcome is None or job.waiters or job.scope is not None or job.cleaned:
            return
        job.cleaned = True
        if self._known.get(job.id) is job:
            del self._known[job.id]
            if job.request.detached:
                self._remembered[job.id] = job
                if len(self._remembered) > _REMEMBERED:
                    del self._remembered[next(iter(self._remembered))]
        self._leaving.add(job.id)
        self.to_clean.append(job)
        self.cleaning.unpark()
        self._notify()

    def cleaned(self, jobs: Iterable[Job]) -> None:
        """The files of *jobs* are gone."""
        self._leaving.difference_update(job.id for job in jobs)
        self._notify()

    def expire(self, job: Job) -> None:
        """*job* has run out of its time."""
        seconds = job.request.timeout_s or self.config.jobs.timeout_s
        detail = f"the job did not end within {seconds:g} s; it was {job.state.value}"
        self.cancel(job, Failure(kind=FailureKind.TIMEOUT, detail=detail))

    def engine_gone(self, reason: str) -> None:
        """No engine will come back: tell every job."""
        self.cancel_all(Failure(kind=FailureKind.ENGINE_CRASHED, detail=f"ComfyUI is gone: {reason}"))

    def abandon_all(self) -> None:
        """Hand every job that is left to the cleaning task: nobody works on any of them any more."""
        for job in list(self._known.values()):
            job.cleaned = True
            self.to_clean.append(job)
        self._known.clear()

    def prefixes_of_others(self, job: Job) -> frozenset[str]:
        """Prefixes that another known job has as well; removing files by them would take that job's files."""
        return frozenset(prefix for other in self._known.values() if other is not job for prefix in other.prefixes)

    # --- inside

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _refuse_if_busy(self) -> None:
        if self.draining:
            raise RequestRefused(
                Failure(
                    kind=FailureKind.DRAINING,
                    detail="comfyd is stopping and takes no more jobs",
                    retry_after_s=self.service_time.retry_after_s(self.depth),
                )
            )
        if not self.healthy:
            raise RequestRefused(self._not_ready(self.not_ready_reason() or "the engine is not ready"))
        if all(engine.state is EngineState.GONE for engine in self.engines):
            raise RequestRefused(self._not_ready("the engine is gone"))
        if self._waiting >= self.config.jobs.max_queued:
            raise RequestRefused(
                Failure(
                    kind=FailureKind.QUEUE_FULL,
                    detail=f"{self._waiting} jobs are waiting, which is as many as MAX_QUEUED_JOBS allows",
                    retry_after_s=self.service_time.retry_after_s(1),
                )
            )

    def _not_ready(self, detail: str) -> Failure:
        return Failure(kind=FailureKind.NOT_READY, detail=detail, retry_after_s=_STARTING_RETRY_S)
