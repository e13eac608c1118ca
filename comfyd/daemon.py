"""The nursery tree of the daemon, and only that. Order is nesting: leaving a block stops what is inside it first.

::

    main
    └─ signals            the first asks to stop, the second cancels everything
    └─ reaper             orphans, as PID 1 or subreaper
    └─ journal            one writer of what must not be lost                      (stops last)
       └─ engine          process, listener, watchdog, restart with back-off; systemd's notifications
          └─ outbox       webhooks, per receiver
          └─ events       ComfyUI's own events to the operator's receiver
             └─ jobs      preparing, one runner, finishing, cleaning, retention; workflow files, deletion cost
                └─ http   connections and their handlers                           (stops first)
"""

import gc
import signal
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn

import attrs
import structlog
import trio

from comfyd import __version__
from comfyd.config import Config
from comfyd.engine.engine import Engine, EngineState
from comfyd.engine.process import GUARD_WAIT_S, KILL_WAIT_S, LEFTOVERS_WAIT_S
from comfyd.engine.supervisor import SupervisorConfig, supervise_engine
from comfyd.errors import EngineError, Failure, FailureKind, StartupFailed
from comfyd.host.environment import child_environment
from comfyd.host.notify import Notifier, read_notify, serve_notify
from comfyd.host.reaper import serve_reaper, stop_signals
from comfyd.host.socket_activation import InheritedSocket
from comfyd.journal import Journal, serve_journal
from comfyd.services import HTTP_STOP_GRACE_S, load_services

if TYPE_CHECKING:
    from comfyd.engine import EngineEvent
    from comfyd.jobs import JobService
    from comfyd.webhooks.outbox import Outbox
    from comfyd.webhooks.system_events import SystemEvents
    from comfyd.workflows import Workflows

log = structlog.get_logger("comfyd.daemon")

EXIT_STOPPED: Final = 0
EXIT_GAVE_UP: Final = 1
LAUNCH_HEAD_START_S: Final = 0.25
"""How long the import of jobs and HTTP waits for the engine's process to be launched, so that the two overlap. Not
longer: the probes of a balancer should be answered from the first moment, also if the engine cannot be started."""
LAST_WORD_S: Final = 1.0
"""For webhooks that tell of jobs which only ended as the drain time was over: those of a journal on disk can wait."""


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


async def run_daemon(config: Config, environ: Mapping[str, str], inherited: tuple[InheritedSocket, ...] = ()) -> int:
    """Run until asked to stop by a signal or by the engine's giving up; return the exit code.

    Raises (in an exception group):
        StartupFailed: comfyd could not begin its work.
    """
    shutdown = Shutdown()
    async with trio.open_nursery() as main:
        await main.start(serve_signals, shutdown, main.cancel_scope)
        await main.start(serve_reaper)
        log.info("daemon.starting", version=__version__, embedded=config.embedded)
        for warning in config.warnings:
            log.warning("daemon.configuration", warning=warning)
        await run_tree(config, environ, shutdown, inherited)
        main.cancel_scope.cancel("stopped")
    log.info("daemon.stopped", exit_code=shutdown.exit_code)
    return shutdown.exit_code


async def run_tree(
    config: Config, environ: Mapping[str, str], shutdown: Shutdown, inherited: tuple[InheritedSocket, ...]
) -> None:
    """Start everything, wait until asked to stop, drain, and stop everything in order."""
    engine_config = SupervisorConfig(
        engine=config.engine,
        env=lambda port: child_environment(environ, config.engine, port=port),
        hang_timeout_s=config.engine.hang_timeout_s,
    )
    stop_http = trio.Event()
    async with trio.open_nursery() as journals:
        journal: Journal = await journals.start(serve_journal, config.state_dir)
        async with trio.open_nursery() as engines:
            engine = await engines.start(supervise_engine, engine_config, shutdown.engine_gave_up)
            with trio.move_on_after(LAUNCH_HEAD_START_S):
                while not engine.processes:
                    await engine.wait_changed()
            services = await trio.to_thread.run_sync(load_services, config, journal)
            gc.freeze()  # what was imported lives as long as we do: full collections took 34 ms to find that out
            async with trio.open_nursery() as senders:
                outbox: Outbox = await senders.start(services.serve_outbox)
                events: SystemEvents | None = None
                if services.serve_system_events is not None:
                    events = await senders.start(services.serve_system_events)
                    engine.on_broadcast = partial(_publish_broadcast, events)
                async with trio.open_nursery() as jobs:
                    service: JobService = await jobs.start(services.serving_jobs(engine, outbox, events))
                    jobs.start_soon(services.serve_retention)
                    if services.serve_deletion_cost is not None:
                        await jobs.start(services.serve_deletion_cost, lambda: service.depth, service.wait_changed)
                    workflows: Workflows = await jobs.start(services.serve_workflows)
                    status = partial(status_line, engine, service)
                    alive = partial(is_alive, engine, shutdown)
                    notifier: Notifier = await engines.start(serve_notify, read_notify(environ), status, alive)
                    jobs.start_soon(announce_ready, engine, notifier)
                    try:
                        async with trio.open_nursery() as http:
                            apps = services.make_apps(service, workflows, outbox, events)
                            serve = partial(services.serve_http, apps.main, stop=stop_http, inherited=inherited)
                            url: str = await http.start(serve)
                            if services.serve_metrics is not None:
                                await http.start(partial(services.serve_metrics, apps.metrics, stop=stop_http))
                            log.info("daemon.listening", url=url)
                            await shutdown.asked.wait()
                            notifier.stopping(longest_stop_s(config))
                            await drain(service, outbox, events, config.jobs.drain_timeout_s)
                            stop_http.set()
                    finally:
                        engine.let_go()
                    jobs.cancel_scope.cancel("HTTP has stopped")
                services.close()
                senders.cancel_scope.cancel("jobs have stopped")
            engines.cancel_scope.cancel("jobs have stopped")
        journals.cancel_scope.cancel("everybody has written")


async def announce_ready(engine: Engine, notifier: Notifier) -> None:
    """Tell systemd once the first warm-up is done."""
    while not engine.was_ever_warm:
        await engine.wait_changed()
    notifier.ready()


def status_line(engine: Engine, service: "JobService") -> str:
    """What ``systemctl status`` shows."""
    if engine.up:
        return f"{service.depth} jobs" if engine.warm else "engine is warming up"
    return f"engine is {engine.state.value}" + (f": {engine.last_failure}" if engine.last_failure else "")


async def is_alive(engine: Engine, shutdown: Shutdown) -> bool:
    """Whether to feed systemd's watchdog: the loop turns, as this runs, and the engine's supervisor has not ended."""
    return engine.state is not EngineState.GONE or shutdown.asked.is_set()


def longest_stop_s(config: Config) -> float:
    """How long the stop may take: every rung of the ladder, and some seconds for a busy machine."""
    engine_s = config.engine.stop_grace_s + KILL_WAIT_S + GUARD_WAIT_S + LEFTOVERS_WAIT_S
    return config.jobs.drain_timeout_s + LAST_WORD_S + HTTP_STOP_GRACE_S + engine_s + 10.0


def _publish_broadcast(events: "SystemEvents", event: "EngineEvent") -> None:
    events.publish(event.type, event.data, None, None, None)


async def drain(service: "JobService", outbox: "Outbox", events: "SystemEvents | None", timeout_s: float) -> None:
    """Take no more jobs, let those in flight end and be delivered and told, and stop the rest when the time is over.

    Jobs and webhooks that the journal keeps go on when comfyd starts again; all others are told that they are ended.
    """
    service.begin_drain()
    began = trio.current_time()
    with trio.move_on_after(timeout_s) as in_time:
        await service.wait_drained()
    if in_time.cancelled_caught:
        jobs = service.depth
        shelved = service.stop_all(
            Failure(kind=FailureKind.DRAINING, detail=f"comfyd stopped; the job did not end within {timeout_s:g} s")
        )
        log.warning("daemon.drain_timeout", jobs=jobs, shelved=shelved, timeout_s=timeout_s)
    else:
        log.info("daemon.drained", took_s=round(trio.current_time() - began, 3))
    with trio.move_on_after(max(LAST_WORD_S, began + timeout_s - trio.current_time())):
        async with trio.open_nursery() as telling:
            telling.start_soon(outbox.wait_drained)
            if events is not None:
                telling.start_soon(events.wait_drained)


async def serve_signals(
    shutdown: Shutdown,
    everything: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Turn the first SIGTERM or SIGINT into asking, and the second into cancelling everything."""
    with trio.open_signal_receiver(*stop_signals()) as signals:
        task_status.started()
        async for number in signals:
            name = signal.Signals(number).name
            if shutdown.asked.is_set():
                log.warning("daemon.stopping_at_once", reason=f"another {name}")
                everything.cancel(f"another {name}")
            else:
                shutdown.ask(name)
    raise RuntimeError("the signal receiver ended by itself")
