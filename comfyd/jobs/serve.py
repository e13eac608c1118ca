"""Runs the tasks behind the job service."""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import attrs
import structlog
import trio

from comfyd.engine import Engine
from comfyd.errors import StartupFailed
from comfyd.jobs.deliver import Deliverer
from comfyd.jobs.ledger import Ledger
from comfyd.jobs.meters import NOBODY_COUNTS, Meters
from comfyd.jobs.model import Outcome, Success
from comfyd.jobs.prepare import Preparer
from comfyd.jobs.restore import Unfinished, restore_jobs
from comfyd.jobs.runner import Publish, Runner
from comfyd.jobs.service import JobService, ServiceConfig
from comfyd.journal import Trace, Traces
from comfyd.media.fetch import open_fetcher
from comfyd.media.files import InputStore, remove_outputs
from comfyd.media.kept import KeptOutputs
from comfyd.media.resolve import Resolver
from comfyd.storage import S3Store

log = structlog.get_logger("comfyd.jobs")

_LAST_CLEANING_S: Final = 10.0
"""For removing the files of jobs that ended as comfyd stopped: unlinking is quick, but the disk may be on a network."""


@attrs.frozen(kw_only=True)
class Past:
    """What earlier lives of the daemon left: jobs that have not ended, and the number of the last that came."""

    unfinished: deque[Unfinished] = attrs.field(factory=deque)
    """Emptied as the jobs go on: nobody holds them for longer than they take."""
    last_sequence: int = 0


async def serve_jobs(
    config: ServiceConfig,
    engine: Engine,
    input_dir: Path,
    output_dir: Path,
    s3: S3Store,
    *,
    kept: KeptOutputs,
    ledger: Ledger,
    traces: Traces,
    read_past: Callable[[], Awaitable[Past]],
    publish: Publish | None = None,
    meters: Meters = NOBODY_COUNTS,
    task_status: trio.TaskStatus[JobService] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Lead jobs along their way until cancelled. ``started()`` gives the service.

    Raises:
        StartupFailed: INPUT_DIR cannot be written.
    """
    try:
        store = await trio.to_thread.run_sync(InputStore.open, input_dir)
    except OSError as exc:
        raise StartupFailed(f"INPUT_DIR {input_dir} cannot be used: {exc.strerror}") from exc
    past = await read_past()
    if traces.left:
        await _sweep(traces, past.unfinished, ledger, kept, output_dir)
    service = JobService(config=config, engines=(engine,), ledger=ledger, traces=traces, on_ended=meters.job_ended)
    service.continue_after(past.last_sequence)
    with ExitStack() as at_end:
        at_end.callback(store.close)
        spool = store.root / "spool"
        async with open_fetcher(config.media, config.urls, spool, on_fetched=meters.downloaded) as fetcher:
            resolver = Resolver(store=store, fetcher=fetcher, s3=s3, limits=config.media, on_fetched=meters.downloaded)
            preparer = Preparer(service=service, store=store, resolver=resolver, kept=kept, output_dir=output_dir)
            deliverer = Deliverer(store=store, kept=kept, s3=s3, on_uploaded=meters.uploaded)
            runner = Runner(
                service=service,
                engine=engine,
                preparer=preparer,
                deliverer=deliverer,
                kept=kept,
                output_dir=output_dir,
                publish=publish,
            )
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(preparer.serve_cleaning)
                    nursery.start_soon(preparer.serve_preparing)
                    nursery.start_soon(service.deadlines.serve, service.expire)
                    nursery.start_soon(runner.serve)
                    nursery.start_soon(restore_jobs, past.unfinished, service, runner)
                    task_status.started(service)
            finally:
                service.abandon_all()
                with trio.move_on_after(_LAST_CLEANING_S, shield=True):
                    await preparer.clean()


async def _sweep(
    traces: Traces, unfinished: Iterable[Unfinished], ledger: Ledger, kept: KeptOutputs, output_dir: Path
) -> None:
    """Remove what jobs have left that a killed daemon could not clean up after.

    That is all files of jobs which are told already, or which nobody can be told of, but for what is kept of them; and
    of jobs that will run again the files of the attempt that was cut. What still has to be delivered stays.
    """
    made = {one.job.key: one.job.prefixes for one in unfinished if one.made is not None}
    spared = frozenset(prefix for prefixes in made.values() for prefix in prefixes)
    swept = 0
    for trace in traces.left:
        if trace.key not in made:
            ended = await ledger.find(trace.job_id)
            outcome = ended.outcome if ended is not None and ended.key == trace.key else None
            await trio.to_thread.run_sync(_remove_left, trace, outcome, spared, kept, output_dir)
            traces.end(trace.key)
            swept += 1
    log.info("jobs.swept", jobs=swept)


def _remove_left(
    trace: Trace, outcome: Outcome | None, spared: frozenset[str], kept: KeptOutputs, output_dir: Path
) -> None:
    if outcome is not None:
        kept.only(trace.key, {output.path for output in outcome.outputs} if isinstance(outcome, Success) else ())
    try:
        remove_outputs(output_dir, (), [p for p in trace.prefixes if p not in spared], job_id=trace.job_id)
    except OSError as exc:
        log.error("job.files_left", job_id=trace.job_id, reason=str(exc))  # noqa: TRY400  # a full story in one line
