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
from typing import TYPE_CHECKING, Any, Final, NoReturn

import attrs
import structlog
import trio

from comfyd import __version__
from comfyd.config import Config
from comfyd.engine.supervisor import SupervisorConfig, supervise_engine
from comfyd.errors import EngineError, Failure, FailureKind, StartupFailed
from comfyd.host.environment import child_environment

if TYPE_CHECKING:
    from comfyd.jobs import JobService

log = structlog.get_logger("comfyd.daemon")

EXIT_STOPPED: Final = 0
EXIT_GAVE_UP: Final = 1
LAUNCH_HEAD_START_S: Final = 0.25
"""How long the import of jobs and HTTP waits for the engine's process to be launched, so that the two overlap. Not
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
    stop_http = trio.Event()
    async with trio.open_nursery() as engines:
        engine = await engines.start(supervise_engine, engine_config, shutdown.engine_gave_up)
        with trio.move_on_after(LAUNCH_HEAD_START_S):
            while not engine.processes:
                await engine.wait_changed()
        services = await trio.to_thread.run_sync(_load_services, config)
        async with trio.open_nursery() as jobs:
            service: JobService = await jobs.start(services.serve_jobs, engine)
            try:
                async with trio.open_nursery() as http:
                    serve = partial(services.serve_http, services.make_app(service), stop=stop_http)
                    url: str = await http.start(serve)
                    log.info("daemon.listening", url=url)
                    await shutdown.asked.wait()
                    await drain(service, config.jobs.drain_timeout_s)
                    stop_http.set()
            finally:
                engine.let_go()
            jobs.cancel_scope.cancel("HTTP has stopped")
        services.close()
        engines.cancel_scope.cancel("jobs have stopped")


@attrs.frozen(kw_only=True)
class _Services:
    """What is imported while the engine is starting: half a second of imports, of which its caller need not wait."""

    serve_jobs: Callable[..., Awaitable[None]]
    make_app: Callable[["JobService"], Any]
    serve_http: Callable[..., Awaitable[None]]
    close: Callable[[], None]


def _load_services(config: Config) -> _Services:
    """Import and set up what runs inside of the engine's nursery. Blocks: called in a thread."""
    from comfyd.http.app import ComfydApp
    from comfyd.http.server import HttpServerConfig, serve_http
    from comfyd.jobs import ServiceConfig, serve_jobs
    from comfyd.storage import S3Store

    service_config = ServiceConfig(jobs=config.jobs, media=config.media, urls=config.urls)
    http_config = HttpServerConfig(
        host=config.http.host,
        port=config.http.port,
        max_body_bytes=config.http.max_body_bytes,
        stop_grace_s=HTTP_STOP_GRACE_S,
    )
    s3 = S3Store(config=config.s3)

    engine = config.engine
    return _Services(
        serve_jobs=partial(serve_jobs, service_config, input_dir=engine.input_dir, output_dir=engine.output_dir, s3=s3),
        make_app=partial(ComfydApp, max_body_bytes=config.http.max_body_bytes),
        serve_http=partial(serve_http, config=http_config),
        close=s3.close,
    )


async def drain(service: "JobService", timeout_s: float) -> None:
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
