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

import signal
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NoReturn

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
from comfyd.host.salad import serve_deletion_cost
from comfyd.host.socket_activation import InheritedSocket
from comfyd.journal import Journal, Traces, serve_journal

if TYPE_CHECKING:
    from hypercorn.typing import ASGIFramework

    from comfyd.engine import EngineEvent
    from comfyd.http.server import TlsFiles
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
METRICS_CONNECTIONS: Final = 100
"""On a port of their own: some scrapers and balancers."""
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
            services = await trio.to_thread.run_sync(_load_services, config, journal)
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


@attrs.frozen(kw_only=True)
class _Apps:
    """What is served: on the main port, and on the metrics' own if there is one."""

    main: "ASGIFramework"
    metrics: "ASGIFramework"


@attrs.frozen(kw_only=True)
class _Services:
    """What is imported while the engine is starting: half a second of imports, of which its caller need not wait."""

    serve_outbox: Callable[..., Awaitable[None]]
    serve_system_events: Callable[..., Awaitable[None]] | None
    serving_jobs: Callable[[Engine, "Outbox", "SystemEvents | None"], Callable[..., Awaitable[None]]]
    serve_retention: Callable[[], Awaitable[Any]]
    serve_deletion_cost: Callable[..., Awaitable[NoReturn]] | None
    serve_workflows: Callable[..., Awaitable[None]]
    make_apps: Callable[["JobService", "Workflows", "Outbox", "SystemEvents | None"], "_Apps"]
    serve_http: Callable[..., Awaitable[None]]
    serve_metrics: Callable[..., Awaitable[None]] | None
    close: Callable[[], None]


def _load_services(config: Config, journal: Journal) -> _Services:
    """Import and set up what runs inside of the engine's nursery. Blocks: called in a thread."""
    from comfyd.host.gauges import Watched
    from comfyd.host.metrics import Metrics
    from comfyd.http.access import OpenRoutesOnly, guard_app
    from comfyd.http.access_log import AccessLog
    from comfyd.http.app import ComfydApp
    from comfyd.http.docs import DocsEndpoint
    from comfyd.http.metrics import MetricsEndpoint
    from comfyd.http.server import HttpServerConfig, serve_http
    from comfyd.jobs import ServiceConfig, serve_jobs
    from comfyd.jobs.journalled import JournalLedger, read_past
    from comfyd.jobs.meters import Meters
    from comfyd.jobs.retention import Retention
    from comfyd.media.kept import KeptOutputs
    from comfyd.storage import S3Store
    from comfyd.webhooks.outbox import OutboxConfig, retry_policy, serve_outbox
    from comfyd.webhooks.system_events import SystemEventsConfig, serve_system_events
    from comfyd.workflows import serve_workflows
    from comfyd.workflows.live_source import LiveSource

    service_config = ServiceConfig(jobs=config.jobs, media=config.media, urls=config.urls)
    http_config = HttpServerConfig(
        host=config.http.host,
        port=config.http.port,
        max_body_bytes=config.http.max_body_bytes,
        stop_grace_s=HTTP_STOP_GRACE_S,
        tls=_tls_files(config),
    )
    metrics_config = None
    if config.http.metrics_port is not None:
        metrics_config = attrs.evolve(
            http_config, port=config.http.metrics_port, tls=None, max_connections=METRICS_CONNECTIONS
        )
    s3 = S3Store(config=config.s3)
    engine, webhooks = config.engine, config.webhooks
    kept = KeptOutputs.of_journal(engine.output_dir, journal.identity, durable=journal.durable)
    traces = Traces.open(config.state_dir if journal.durable else None)
    metrics = Metrics()
    retention = Retention(config=config.jobs, journal=journal, kept=kept)

    def serving_jobs(engine: Engine, outbox: "Outbox", events: "SystemEvents | None") -> Callable[..., Awaitable[None]]:
        return partial(
            serve_jobs,
            service_config,
            engine,
            config.engine.input_dir,
            config.engine.output_dir,
            s3,
            kept=kept,
            ledger=JournalLedger(journal=journal, post=outbox.post, remove=retention.remove),
            traces=traces,
            read_past=partial(read_past, journal),
            publish=None if events is None else events.publish,
            meters=Meters(job_ended=metrics.job_ended, downloaded=metrics.downloaded, uploaded=metrics.uploaded),
        )

    wants_events = bool(webhooks.system_url and webhooks.system_events)
    system_events = SystemEventsConfig(
        url=webhooks.system_url or "",
        events=frozenset(webhooks.system_events),
        metadata=webhooks.system_metadata,
        tracebacks=webhooks.system_tracebacks,
        secrets=webhooks.secrets,
        retries=webhooks.retries,
    )

    def make_apps(
        service: "JobService", workflows: "Workflows", outbox: "Outbox", events: "SystemEvents | None"
    ) -> _Apps:
        live = LiveSource(engine=service.engines[0], warmup_prompt=config.jobs.warmup_prompt, config=config)
        folders = {"input": engine.input_dir, "output": engine.output_dir, "state": config.state_dir}
        metrics.watch(
            Watched(
                service=service,
                outbox=outbox,
                events=events,
                engine_pid=attrgetter("pid"),
                folders={name: folder for name, folder in folders.items() if folder is not None},
            )
        )
        docs = DocsEndpoint(
            workflows=workflows,
            live=live,
            markdown=config.workflows.markdown_descriptions,
            api_keys=bool(config.http.api_keys),
            metrics=config.http.metrics_port is None,
        )
        app = ComfydApp(
            service, workflows, live, MetricsEndpoint(metrics), docs, max_body_bytes=config.http.max_body_bytes
        )
        guarded = guard_app(
            app,
            api_keys=config.http.api_keys,
            cors_origins=config.http.cors_origins,
            metrics_elsewhere=config.http.metrics_port is not None,
        )
        return _Apps(
            main=AccessLog(guarded, metrics.request_served),
            metrics=AccessLog(OpenRoutesOnly(app), metrics.request_served),
        )

    def close() -> None:
        s3.close()
        kept.close()
        traces.close()

    return _Services(
        serve_outbox=partial(
            serve_outbox,
            OutboxConfig(urls=config.urls, secrets=webhooks.secrets, retry=retry_policy(webhooks.retries)),
            journal,
        ),
        serve_system_events=partial(serve_system_events, system_events) if wants_events else None,
        serving_jobs=serving_jobs,
        serve_retention=retention.serve,
        serve_deletion_cost=None if config.salad is None else partial(serve_deletion_cost, config.salad),
        serve_workflows=partial(serve_workflows, config.workflows.folder, required=config.workflows.folder_is_given),
        make_apps=make_apps,
        serve_http=partial(serve_http, config=http_config),
        serve_metrics=None if metrics_config is None else partial(serve_http, config=metrics_config),
        close=close,
    )


def _tls_files(config: Config) -> "TlsFiles | None":
    from comfyd.http.server import TlsFiles

    certificate, key = config.http.tls_cert_file, config.http.tls_key_file
    return None if certificate is None or key is None else TlsFiles(certificate=certificate, key=key)


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
