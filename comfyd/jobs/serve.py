"""Runs the tasks behind the job service."""

from contextlib import ExitStack
from pathlib import Path
from typing import Final

import structlog
import trio

from comfyd.engine import Engine
from comfyd.errors import StartupFailed
from comfyd.jobs.deliver import Deliverer
from comfyd.jobs.prepare import Preparer
from comfyd.jobs.runner import Runner
from comfyd.jobs.service import JobService, ServiceConfig
from comfyd.media.fetch import open_fetcher
from comfyd.media.files import InputStore
from comfyd.media.resolve import Resolver
from comfyd.storage import S3Store

log = structlog.get_logger("comfyd.jobs")

_LAST_CLEANING_S: Final = 10.0
"""For removing the files of jobs that ended as comfyd stopped: unlinking is quick, but the disk may be on a network."""


async def serve_jobs(
    config: ServiceConfig,
    engine: Engine,
    input_dir: Path,
    output_dir: Path,
    s3: S3Store,
    *,
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
    service = JobService(config=config, engines=(engine,))
    with ExitStack() as at_end:
        at_end.callback(store.close)
        async with open_fetcher(config.media, config.urls, store.root / "spool") as fetcher:
            resolver = Resolver(store=store, fetcher=fetcher, s3=s3, limits=config.media)
            preparer = Preparer(service=service, store=store, resolver=resolver, output_dir=output_dir)
            deliverer = Deliverer(store=store, s3=s3)
            runner = Runner(
                service=service, engine=engine, preparer=preparer, deliverer=deliverer, output_dir=output_dir
            )
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(preparer.serve_cleaning)
                    nursery.start_soon(preparer.serve_preparing)
                    nursery.start_soon(service.deadlines.serve, service.expire)
                    nursery.start_soon(runner.serve)
                    task_status.started(service)
            finally:
                service.abandon_all()
                with trio.move_on_after(_LAST_CLEANING_S, shield=True):
                    await preparer.clean()
