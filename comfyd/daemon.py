"""The nursery tree of the daemon, and only that. Order is nesting: leaving a block stops what is inside it first.

::

    main
    └─ signals      the first asks to stop, the second cancels everything
    └─ engine       process, listener, restart with back-off            (stops last)
       └─ jobs      preparing, one runner, finishing, cleaning
          └─ http   connections and their handlers                      (stops first)
"""

import signal
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final, NoReturn

import attrs
import structlog
import trio

from comfyd import __version__
from comfyd.config import Config, HttpConfig
from comfyd.engine.supervisor import SupervisorConfig, supervise_engine
from comfyd.errors import EngineError, Failure, FailureKind, StartupFailed
from comfyd.host.environment import child_environment
from comfyd.jobs import JobService, ServiceConfig, serve_jobs
from comfyd.storage import S3Store

log = structlog.get_logger("comfyd.daemon")

EXIT_STOPPED: Final = 0
EXIT_GAVE_UP: Final = 1
LAUNCH_HEAD_START_S: Final = 0.25
"""How long the import of the HTTP stack waits for the engine's process to be launched, so that the two overlap. Not
longer: the probes of a balancer should be answered from the first moment, also if the engine cannot be started."""
HTTP_STOP_GRACE_S: Final = 1.0
"""For what is still being answered once every job has ended: the drain has waited for all answers that clients read."""


@attrs.define(eq=False)
class Shutdown:
    """That comfyd is to stop, and with which exit code. The first reason counts."""

    asked: trio.Event = attrs.field(factory=trio.Event)
    exit_code: int = EXIT_STOPPED

    def ask(self, reason: str, exit_code: int = EXIT_STOPPED) -> None:
        """Ask comfyd to stop. Never waits."""
        if not self.asked.is_set():
            log.info("daemon.stopping", reason=reason, exit_code=exit_code)
            self.exit_code = exit_code
            self.asked.set()

    def engine_gave_up(self, reason: EngineError | StartupFailed) -> None:
        """The engine will not come back."""
        self.ask(str(reason), EXIT_GAVE_UP)


async def run_daemon(config: Config, environ: Mapping[str, str]) -> int:
    """Run until asked to stop by a signal or by the engine's giving up; return the exit code.

    Raises (in an exception group):
        StartupFailed: comfyd could not begin its work.
    """
    shutdown = Shutdown()
    async with trio.open_nursery() as main:
        await main.start(serve_signals, shutdown, main.cancel_scope)
        log.info("daemon.starting", version=__version__, embedded=config.embedded)
        for warning in config.warnings:
            log.warning("daemon.configuration", warning=warning)
        await run_tree(config, environ, shutdown)
        main.cancel_scope.cancel("stopped")
    log.info("daemon.stopped", exit_code=shutdown.exit_code)
    return shutdown.exit_code


async def run_tree(config: Config, environ: Mapping[str, str], shutdown: Shutdown) -> None:
    """Start everything, wait until asked to stop, drain, and stop everything in order."""
    engine_config = SupervisorConfig(
        engine=config.engine, env=lambda port: child_environment(environ, config.engine, port=port)
    )
    service_config = ServiceConfig(jobs=config.jobs, media=config.media, urls=config.urls)
    s3 = S3Store(config=config.s3)
    stop_http = trio.Event()
    async with trio.open_nursery() as engines:
        engine = await engines.start(supervise_engine, engine_config, shutdown.engine_gave_up)
        async with trio.open_nursery() as jobs:
            service: JobService = await jobs.start(
                partial(serve_jobs, service_config, engine, config.engine.input_dir, config.engine.output_dir, s3)
            )
            with trio.move_on_after(LAUNCH_HEAD_START_S):
                while not engine.processes:
                    await engine.wait_changed()
            try:
                async with trio.open_nursery() as http:
                    serve = await trio.to_thread.run_sync(_load_http, service, config.http)
                    url: str = await http.start(serve, stop_http)
                    log.info("daemon.listening", url=url)
                    await shutdown.asked.wait()
                    await drain(service, config.jobs.drain_timeout_s)
                    stop_http.set()
            finally:
                engine.let_go()
            jobs.cancel_scope.cancel("HTTP has stopped")
        s3.close()
        engines.cancel_scope.cancel("jobs have stopped")


def _load_http(service: JobService, config: HttpConfig) -> Callable[..., Awaitable[None]]:
    """Make the HTTP service. Importing it takes a third of a second, during which the engine is starting already."""
    from comfyd.http.app import ComfydApp
    from comfyd.http.server import HttpServerConfig, serve_http

    server_config = HttpServerConfig(
        host=config.host, port=config.port, max_body_bytes=config.max_body_bytes, stop_grace_s=HTTP_STOP_GRACE_S
    )
    return partial(serve_http, ComfydApp(service, config.max_body_bytes), server_config)


async def drain(service: JobService, timeout_s: float) -> None:
    """Take no more jobs, let those in flight end and be delivered, and end the rest when the time is over."""
    service.begin_drain()
    began = trio.current_time()
    with trio.move_on_after(timeout_s) as in_time:
        await service.wait_drained()
    if in_time.cancelled_caught:
        log.warning("daemon.drain_timeout", jobs=service.depth, timeout_s=timeout_s)
        service.cancel_all(
            Failure(kind=FailureKind.DRAINING, detail=f"comfyd stopped; the job did not end within {timeout_s:g} s")
        )
    else:
        log.info("daemon.drained", took_s=round(trio.current_time() - began, 3))


async def serve_signals(
    shutdown: Shutdown,
    everything: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Turn the first SIGTERM or SIGINT into asking, and the second into cancelling everything."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            name = signal.Signals(number).name
            if shutdown.asked.is_set():
                log.warning("daemon.stopping_at_once", reason=f"another {name}")
                everything.cancel(f"another {name}")
            else:
                shutdown.ask(name)
    raise RuntimeError("the signal receiver ended by itself")
