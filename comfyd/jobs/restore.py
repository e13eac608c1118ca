"""What an earlier life of the daemon left: jobs of the journal go on, files that nobody owns any more go away."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Final

import attrs
import structlog
import trio

from comfyd.engine import Completed, NodeClasses
from comfyd.errors import EngineLost, Failure, FailureKind, InvalidValue, RequestRefused
from comfyd.jobs.graph import CONCATENATE, check_shape, prepare_graph
from comfyd.jobs.model import Clock, Job, JobState
from comfyd.jobs.records import decode_made
from comfyd.jobs.request import Request, parse_request
from comfyd.jobs.runner import Runner
from comfyd.jobs.service import JobService
from comfyd.journal import JobRow
from comfyd.media.collect import OutputFile
from comfyd.wire import decode_json, encode_json

log = structlog.get_logger("comfyd.jobs")

_DAEMON_DEATHS: Final = 5
"""Daemons that may be killed while one job runs, before the job is held to be the cause: it may take the memory of the
whole machine. More than JOB_MAX_ATTEMPTS, as most daemons are killed by deployments."""
_AT_ONCE: Final = 50
"""Jobs that are taken up between two turns of the other tasks: 10 ms or so."""


@attrs.frozen(kw_only=True)
class Unfinished:
    """A job of the journal that has not ended, and its request's graph or what it has made."""

    job: Job
    made: tuple[Completed, tuple[OutputFile, ...]] | None = None
    unreadable: str | None = None


def read_unfinished(rows: Sequence[JobRow]) -> deque[Unfinished]:
    """Make jobs of *rows*, in their order. Blocks for as long as decoding them takes."""
    return deque(_read(row) for row in rows)


async def restore_jobs(unfinished: deque[Unfinished], service: JobService, runner: Runner) -> None:
    """Let every job of *unfinished* go on from where it was; it is emptied. Returns when all are on their way."""
    for one in unfinished:
        one.job.deadline = _deadline(one.job)
        service.take_back(one.job)
    if unfinished:
        log.info("journal.restored", jobs=len(unfinished), made=sum(1 for one in unfinished if one.made is not None))
    to_run: deque[Job] = deque()
    async with trio.open_nursery() as nursery:
        while unfinished:
            one = unfinished.popleft()
            if one.unreadable is not None:
                _give_up(service, one.job, one.unreadable)
            elif one.made is not None:
                nursery.start_soon(runner.deliver_again, one.job, *one.made)
            elif one.job.daemon_deaths >= _DAEMON_DEATHS:
                _give_up(service, one.job, f"comfyd was killed {one.job.daemon_deaths} times while this job ran")
            else:
                to_run.append(one.job)
        await _take_up(to_run, service)


async def _take_up(jobs: deque[Job], service: JobService) -> None:
    """Queue *jobs* as soon as an engine has said which nodes it has, without which no graph can be prepared."""
    if not jobs:
        return
    try:
        while service.engines[0].node_classes is None:
            await service.engines[0].wait_up()
    except EngineLost:
        return  # the runner tells every job
    while jobs:
        job = jobs.popleft()
        if not job.over:
            try:
                service.take_up(job)
            except RequestRefused as exc:
                service.finish(job, exc.failure, JobState.FAILED)
        if len(jobs) % _AT_ONCE == 0:
            await trio.lowlevel.checkpoint()


def _give_up(service: JobService, job: Job, detail: str) -> None:
    log.error("job.given_up", job_id=job.id, reason=detail)
    service.finish(job, Failure(kind=FailureKind.ENGINE_CRASHED, detail=detail), JobState.FAILED)


def _deadline(job: Job) -> float:
    """The job's deadline by this process's clock; until here it was by the wall's."""
    return job.deadline if job.deadline == float("inf") else trio.current_time() + job.deadline - time.time()


def _read(row: JobRow) -> Unfinished:
    unreadable: str | None = None
    request = Request(prompt={}, respond_async=True)
    try:
        body = decode_json(row.request or b"{}")
        given = body.pop("input", None) if isinstance(body, dict) else None
        request = parse_request(body)
        if given is not None:  # a workflow's, which made the graph, and is told with the result
            request = attrs.evolve(request, echo={**request.echo, "input": given})
    except InvalidValue as exc:  # written by another version, or not by us
        unreadable = f"the journal's entry cannot be read: {exc}"
    if not request.detached:  # a wish that was in a header
        request = attrs.evolve(request, respond_async=True)
    job = Job(
        id=row.id,
        key=row.key,
        request=request,
        digest=row.digest,
        sequence=row.sequence,
        deadline=float("inf") if row.deadline_at is None else row.deadline_at,
        attempts=row.attempts,
        crashes=row.crashes,
        daemon_deaths=row.daemon_deaths,
        workflow=row.workflow,
        accepted_at=row.accepted_at,
        journalled=True,
        # Of ten thousand jobs most wait for long: their graphs stay JSON until their turn.
        graph=encode_json(request.prompt),
    )
    job.request = attrs.evolve(request, prompt={})
    record = None
    if row.made is not None and unreadable is None:
        try:
            record = decode_made(row.made)
        except (InvalidValue, KeyError, TypeError, ValueError) as exc:  # it runs once more then
            log.error("job.made_unreadable", job_id=row.id, reason=repr(exc))  # noqa: TRY400  # its own story
    if record is not None:
        job.state = JobState.DELIVERING
        job.made = True
        job.graph = {node_id: dict(node) for node_id, node in record.graph.items()}
        job.prefixes = record.prefixes
        job.reported = list(record.reported)
        job.clock = Clock.resumed(record.clock)
        return Unfinished(job=job, made=(record.execution, record.outputs))
    if row.attempts and not check_shape(request.prompt):
        # For cleaning up what its cut attempt left, also if it never runs again.
        known = NodeClasses(names=frozenset({CONCATENATE}), saving=frozenset(), media={})
        job.prefixes = prepare_graph(request.prompt, job.id, known).prefixes
    return Unfinished(job=job, unreadable=unreadable)
