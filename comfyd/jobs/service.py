"""The job service: takes jobs from any source, and leads each along its way to one outcome.

Who does what: :meth:`JobService.submit` accepts; the preparing task writes inputs to disk; one runner per engine hands
over one job at a time; the finishing task looks at the files; the cleaning task removes what is no longer needed. A
caller's task owns nothing: it submits, waits, reads the files and lets go. Between two waits every method leaves a job
in a consistent state, so there is no lock.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import attrs
import structlog
import trio

from comfyd.config import JobsConfig, MediaConfig
from comfyd.engine import Engine, EngineState
from comfyd.errors import Failure, FailureKind, Fault, RequestRefused
from comfyd.jobs import failures
from comfyd.jobs.deadlines import Deadlines
from comfyd.jobs.graph import check_classes, check_shape, prepare_graph, saves_something
from comfyd.jobs.ledger import Ledger
from comfyd.jobs.model import Job, JobState, Outcome
from comfyd.jobs.queue import JobQueue
from comfyd.jobs.request import Request
from comfyd.jobs.service_time import ServiceTime
from comfyd.journal import JobFilter, JobIdTaken, JournalUnavailable, Traces
from comfyd.media.inputs import Candidate, candidates
from comfyd.net import UrlPolicy, UrlRefused, check_url
from comfyd.wire import encode_json

log = structlog.get_logger("comfyd.jobs")

_STARTING_RETRY_S: Final = 5.0
_REMEMBERED: Final = 100
"""Some kilobytes each, mostly the graph; the journal knows the others."""
_UNPACKED: Final = 100
"""Waiting jobs whose graphs are held ready. Behind so many, encoding and decoding one (30 us) delays nobody, and ten
thousand jobs take 30 MB instead of 80."""
_JOURNAL_RETRY_S: Final = 30.0


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
    ledger: Ledger
    on_ended: Callable[[Job], None] | None = None
    """Hears of every job of a caller that has its outcome."""
    traces: Traces = attrs.field(factory=lambda: Traces.open(None))
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

    def submit(
        self, request: Request, job_id: str, digest: bytes, *, body: bytes | None = None, workflow: str = ""
    ) -> Job:
        """Accept a job, or join the one that is known under *job_id*. Never waits.

        A job whose caller does not wait is a promise only when :meth:`Job.wait_accepted` has returned. *body* is its
        request as JSON, for the journal; the ended jobs of the journal are for the caller to :meth:`look_up` before.

        Raises:
            RequestRefused: nothing was queued and nothing is left behind.
        """
        known = self.get(job_id)
        if known is not None:
            return self.join(known, digest)
        self._refuse_if_busy()
        self._check_webhooks(request)
        job = self.new_job(request, job_id, digest, workflow=workflow)
        found = self.shape(job)
        if request.timeout_s is not None or self.config.jobs.timeout_s is not None:
            job.deadline = trio.current_time() + (request.timeout_s or self.config.jobs.timeout_s or 0)
            self.deadlines.add(job)
        self._known[job_id] = job
        self._waiting += 1
        self._notify()
        log.info("job.accepted", job_id=job.id, nodes=len(job.graph), inputs=len(found), waiting=self._waiting)
        if request.detached:
            self.ledger.accept(job, encode_json({}) if body is None else body, partial(self._journalled, job, found))
        else:
            self._admit(job, found)
        return job

    def join(self, known: Job, digest: bytes) -> Job:
        """Make a request one with the job that is known under its id.

        Raises:
            RequestRefused: it is another request.
        """
        if digest and known.digest == digest:
            log.info("job.joined", job_id=known.id, state=known.state.value)
            return known
        raise RequestRefused(
            Failure(kind=FailureKind.ID_CONFLICT, detail=f"another request is being served under the id {known.id}")
        )

    def take_up(self, job: Job) -> None:
        """Let a job of the journal that has not run to its end go on. Its graph is its request's, as it came.

        Raises:
            RequestRefused: the graph is not one that the engine could run, now.
        """
        job.request = attrs.evolve(job.request, prompt=job.graph)
        self._admit(job, self.shape(job))

    def take_back(self, job: Job) -> None:
        """Know a job of the journal that was accepted in an earlier life of the daemon. It counts as waiting."""
        self._known[job.id] = job
        self.deadlines.add(job)
        if job.attempts == 0:
            self._waiting += 1

    def continue_after(self, sequence: int) -> None:
        """Let the order of arrival go on after that of an earlier life of the daemon."""
        self._sequence = max(self._sequence, sequence)

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
            if job.waiters == 0 and job.decided is None and not job.request.detached:
                log.info("job.abandoned", job_id=job.id, state=job.state.value)
                self.cancel(job, Failure(kind=FailureKind.JOB_CANCELLED, detail="the caller has gone"))
            self.clean_if_done(job)

    def cancel(self, job: Job, failure: Failure) -> bool:
        """End *job* by *failure* wherever it is; False if it has already ended, or its end is decided."""
        if job.over:
            return False
        self.queue.remove(job)
        ended = JobState.CANCELLED if failure.kind is FailureKind.JOB_CANCELLED else JobState.FAILED
        self.finish(job, failure, ended)
        if job.scope is not None:
            job.scope.cancel("the job was cancelled")
        return True

    def get(self, job_id: str) -> Job | None:
        """The job that is in memory under *job_id*: one on its way, or one of the last whose callers did not wait."""
        return self._known.get(job_id) or self._remembered.get(job_id)

    async def look_up(self, job_id: str) -> Job | None:
        """The job that is known under *job_id*, in memory or in the journal."""
        return self.get(job_id) or await self.ledger.find(job_id) or self.get(job_id)

    async def page(self, wanted: JobFilter) -> list[Job]:
        """Jobs that fit, the newest first: those on their way, and ended ones whose callers did not wait."""
        known = [job for job in self._known.values() if _fits(job, wanted)]
        here = {job.id for job in known}
        ended = [job for job in await self.ledger.page(wanted) if job.id not in here]
        return heapq.nlargest(wanted.limit, (*known, *ended), key=lambda job: job.sequence)

    async def forget(self, job: Job) -> bool:
        """Forget an ended job and its kept outputs; False if it has not ended, or somebody has still to be told."""
        if job.outcome is None or not await self.ledger.forget(job):
            return False
        self._remembered.pop(job.id, None)
        return True

    def estimate_s(self, job: Job) -> float | None:
        """Seconds until *job* has run, from the times that jobs took; None where nobody can tell."""
        mean_s = self.service_time.mean_s
        if mean_s is None or job.outcome is not None or job.state in (JobState.ACCEPTED, JobState.PREPARING):
            return None
        if job.state is JobState.DELIVERING:
            return 0.0
        if job.state is JobState.RUNNING:
            return max(0.0, mean_s - (trio.current_time() - job.run_since))
        position = self.queue.position(job)
        return None if position is None else mean_s * (position + 1)

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
        return sum(1 for job in self._known.values() if not job.over)

    @property
    def waiting(self) -> int:
        """Jobs that were accepted and have not run yet."""
        return self._waiting

    def begin_drain(self) -> None:
        """Take no more jobs."""
        self.draining = True

    async def wait_changed(self) -> None:
        """Wait until a job came or went."""
        await self._changed.wait()

    async def wait_drained(self) -> None:
        """Wait until every job has ended and been delivered."""
        while self._known:
            await self._changed.wait()

    def cancel_all(self, failure: Failure) -> None:
        """End every job that has no outcome yet."""
        for job in list(self._known.values()):
            self.cancel(job, failure)

    def stop_all(self, failure: Failure) -> int:
        """End every job that has no outcome yet, but for those that the next start takes up; say how many these are."""
        shelved = 0
        for job in list(self._known.values()):
            if self._shelve(job):
                shelved += 1
            else:
                self.cancel(job, failure)
        return shelved

    # --- for the tasks behind the service

    def new_job(
        self, request: Request, job_id: str, digest: bytes = b"", *, internal: bool = False, workflow: str = ""
    ) -> Job:
        """Make a job that nobody knows yet."""
        self._sequence += 1
        return Job(
            id=job_id,
            request=request,
            digest=digest,
            sequence=self._sequence,
            internal=internal,
            workflow=workflow,
        )

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
        if job.journalled and job.attempts:
            self.ledger.waiting(job)
        if len(self.queue) > _UNPACKED:
            job.pack()
        self.queue.put_nowait(job)

    def started(self, job: Job) -> None:
        """*job* is handed to an engine."""
        if job.attempts == 0 and not job.internal:
            self._waiting -= 1
        job.attempts += 1
        job.run_since = trio.current_time()
        job.clock.queue_s += job.run_since - job.queued_at
        if job.journalled:
            self.ledger.started(job)
        self.traces.begin(job.key, job.id, job.prefixes)
        job.progress.begin(frozenset(job.graph))
        job.move(JobState.RUNNING)

    def finish(self, job: Job, outcome: Outcome, state: JobState) -> None:
        """Decide *job*'s one outcome. It is told at once, or when it is on disk if the job is in the journal."""
        if job.over:
            raise RuntimeError(f"job {job.id} has an outcome already")
        job.decided = outcome
        if job.attempts == 0 and not job.internal:
            self._waiting -= 1
        if job.request.detached and not job.internal:
            if job.journalled:
                self.ledger.ended(job, state, partial(self._ended, job, state))
            else:  # it is on its way into the journal, and ends when it is there
                job.end_state = state
        else:
            self._ended(job, state)

    def _ended(self, job: Job, state: JobState) -> None:
        outcome = job.outcome = job.decided
        job.move(state)
        if self.on_ended is not None and not job.internal:
            self.on_ended(job)
        facts: dict[str, Any] = {"job_id": job.id, "state": state.value, "attempts": job.attempts}
        if isinstance(outcome, Failure):
            log.info("job.ended", **facts, type=outcome.kind.value, detail=outcome.detail)
        elif outcome is not None:
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
        for job in jobs:
            self._leaving.discard(job.id)
            if job.attempts:
                self.traces.end(job.key)
        self._notify()

    def expire(self, job: Job) -> None:
        """*job* has run out of its time."""
        seconds = job.request.timeout_s or self.config.jobs.timeout_s
        within = f"within {seconds:g} s" if seconds else "in time"
        detail = f"the job did not end {within}; it was {job.state.value}"
        self.cancel(job, Failure(kind=FailureKind.TIMEOUT, detail=detail))

    def engine_gone(self, reason: str) -> None:
        """No engine will come back: tell every job that still needs one. What was made is delivered all the same."""
        failure = Failure(kind=FailureKind.ENGINE_CRASHED, detail=f"ComfyUI is gone: {reason}")
        for job in list(self._known.values()):
            if job.state is not JobState.DELIVERING:
                self.cancel(job, failure)

    def abandon_all(self) -> None:
        """Hand every job that is left to the cleaning task: nobody works on any of them any more.

        What the next start takes up is left alone where it needs it: outputs that were made and not delivered.
        """
        for job in list(self._known.values()):
            job.cleaned = True
            if self._shelve(job) or job.shelved:
                continue
            self.to_clean.append(job)
        self._known.clear()

    def prefixes_of_others(self, job: Job) -> frozenset[str]:
        """Prefixes that another known job has as well; removing files by them would take that job's files."""
        return frozenset(prefix for other in self._known.values() if other is not job for prefix in other.prefixes)

    # --- inside

    def _admit(self, job: Job, found: tuple[Candidate, ...]) -> None:
        if found:
            job.move(JobState.PREPARING)
            self.to_prepare.append((job, found))
            self.preparing.unpark()
        else:
            self.enqueue(job)

    def _journalled(self, job: Job, found: tuple[Candidate, ...], error: JournalUnavailable | None) -> None:
        """The journal has *job*, or could not take it."""
        if error is not None:
            job.refusal = (
                Failure(kind=FailureKind.ID_CONFLICT, detail=f"another request is being served under the id {job.id}")
                if isinstance(error, JobIdTaken)
                else Failure(
                    kind=FailureKind.NOT_READY,
                    detail=f"jobs that are answered later cannot be accepted now: {error}",
                    retry_after_s=_JOURNAL_RETRY_S,
                )
            )
            if job.decided is None:
                self._waiting -= 1
                job.decided = job.refusal
            self._known.pop(job.id, None)
            self._notify()
            job.touch()
            return
        job.journalled = True
        job.touch()
        if job.end_state is not None:  # cancelled meanwhile
            self.ledger.ended(job, job.end_state, partial(self._ended, job, job.end_state))
        elif not job.over:
            self._admit(job, found)

    def _shelve(self, job: Job) -> bool:
        """Put *job* aside for the next start of the daemon, if the journal keeps it so long."""
        if job.over or not (job.journalled and self.ledger.durable):
            return False
        self.queue.remove(job)
        if job.attempts == 0:
            self._waiting -= 1
        job.shelved = True
        if not job.made:
            if job.attempts:
                self.ledger.waiting(job)
            self.to_clean.append(job)  # what a cut attempt left
            self.cleaning.unpark()
        job.cleaned = True
        self._known.pop(job.id, None)
        log.info("job.shelved", job_id=job.id, state=job.state.value)
        if job.scope is not None:
            job.scope.cancel("the job is put aside")
        self._notify()
        job.touch()
        return True

    def _check_webhooks(self, request: Request) -> None:
        faults = []
        for name, url in (("webhook", request.webhook), ("webhook_v2", request.webhook_v2)):
            if url is not None:
                try:
                    check_url(url, self.config.urls)
                except UrlRefused as exc:
                    faults.append(Fault(location=name, message=str(exc)))
        if faults:
            raise RequestRefused(failures.invalid_request(tuple(faults)))

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


def _fits(job: Job, wanted: JobFilter) -> bool:
    return (
        (not wanted.states or job.state.value in wanted.states)
        and (wanted.workflow is None or job.workflow == wanted.workflow)
        and (wanted.before is None or job.sequence < wanted.before)
        and not job.internal
    )
