"""What the nursery tree runs, imported and set up from the configuration: everything inside of the engine's nursery.

Importing it all takes half a second, in which the engine is starting already. So nothing of it is imported before
:func:`load_services` is called; ``daemon.py`` decides what is started where, and in which order it stops.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NoReturn

import attrs

from comfyd.config import Config
from comfyd.engine.engine import Engine
from comfyd.host.salad import serve_deletion_cost
from comfyd.journal import Journal, Traces

if TYPE_CHECKING:
    from hypercorn.typing import ASGIFramework

    from comfyd.http.server import TlsFiles
    from comfyd.jobs import JobService
    from comfyd.webhooks.outbox import Outbox
    from comfyd.webhooks.system_events import SystemEvents
    from comfyd.workflows import Workflows

METRICS_CONNECTIONS: Final = 100
"""On a port of their own: some scrapers and balancers."""
HTTP_STOP_GRACE_S: Final = 1.0
"""For what is still being answered once every job has ended: the drain has waited for all answers that clients read."""


@attrs.frozen(kw_only=True)
class Apps:
    """What is served: on the main port, and on the metrics' own if there is one."""

    main: "ASGIFramework"
    metrics: "ASGIFramework"


@attrs.frozen(kw_only=True)
class Services:
    """What is imported while the engine is starting: half a second of imports, of which its caller need not wait."""

    serve_outbox: Callable[..., Awaitable[None]]
    serve_system_events: Callable[..., Awaitable[None]] | None
    serving_jobs: Callable[[Engine, "Outbox", "SystemEvents | None"], Callable[..., Awaitable[None]]]
    serve_retention: Callable[[], Awaitable[Any]]
    serve_deletion_cost: Callable[..., Awaitable[NoReturn]] | None
    serve_workflows: Callable[..., Awaitable[None]]
    make_apps: Callable[["JobService", "Workflows", "Outbox", "SystemEvents | None"], "Apps"]
    serve_http: Callable[..., Awaitable[None]]
    serve_metrics: Callable[..., Awaitable[None]] | None
    close: Callable[[], None]


def load_services(config: Config, journal: Journal) -> Services:
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
    ) -> Apps:
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
        return Apps(
            main=AccessLog(guarded, metrics.request_served),
            metrics=AccessLog(OpenRoutesOnly(app), metrics.request_served),
        )

    def close() -> None:
        s3.close()
        kept.close()
        traces.close()

    return Services(
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
