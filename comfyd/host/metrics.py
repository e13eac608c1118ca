"""Numbers for Prometheus: what is counted as it happens, and what is looked at when somebody asks.

Counters and histograms are fed by calls on the Trio thread, each some microseconds; gauges are read from the live
objects at each scrape (:mod:`comfyd.host.gauges`). Importing prometheus-client takes a twentieth of a second: only who
serves this module imports it.
"""

import gzip
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.process_collector import ProcessCollector

from comfyd import __version__
from comfyd.errors import Failure, FailureKind
from comfyd.host.gauges import Gauges, Watched

if TYPE_CHECKING:
    from comfyd.http.access_log import Access
    from comfyd.jobs import Job

OTHER: Final = "other"
MAX_LABELS: Final = 200
"""Values of a label that callers have a hand in. Each costs a histogram: 16 series, some kilobytes."""
_STAGE_BUCKETS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)
_NODE_BUCKETS: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_HTTP_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_SUCCEEDED: Final = "succeeded"
_ALWAYS_THERE: Final = (
    _SUCCEEDED,
    *(
        kind.value
        for kind in (
            FailureKind.INVALID_INPUT,
            FailureKind.INVALID_PROMPT,
            FailureKind.JOB_CANCELLED,
            FailureKind.EXECUTION_FAILED,
            FailureKind.ENGINE_CRASHED,
            FailureKind.STORAGE_FAILED,
            FailureKind.TIMEOUT,
            FailureKind.INTERNAL,
        )
    ),
)
"""Outcomes with a series from the start: ``increase()`` does not see the step from no series to 1."""


@attrs.frozen(kw_only=True)
class Body:
    """What a scraper gets. *packed*: as gzip."""

    data: bytes
    packed: bool


class BoundedLabel:
    """Values of one label: the first `MAX_LABELS` are themselves, all further ones are ``other``."""

    def __init__(self, limit: int = MAX_LABELS) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """Return the label for *value*."""
        if value in self._known:
            return value
        if len(self._known) >= self._limit:
            return OTHER
        self._known.add(value)
        return value


class _Children:
    """A metric's children by their labels: prometheus-client's own look-up takes longer than counting does."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._children: dict[tuple[str, ...], Any] = {}

    def __getitem__(self, labels: tuple[str, ...]) -> Any:
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = self._metric.labels(*labels) if labels else self._metric
        return child


class Metrics:
    """All of comfyd's metrics, in a registry of their own. To be fed on the Trio thread."""

    def __init__(self) -> None:
        # Process-wide: a series more for each counter, which Prometheus does not use.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus-client 0.26 types it not
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Gauge("comfyd_build_info", "The version that runs; always 1.", ["version"], registry=self.registry)
        build.labels(__version__).set(1)
        self._ended = self._counter(
            "comfyd_jobs_ended", "Jobs by outcome, and workflow (empty: a prompt).", "outcome", "workflow"
        )
        self._attempts = self._counter("comfyd_job_attempts", "Runs of ended jobs; more than jobs where engines died.")[
            ()
        ]
        self._job_s = self._histogram(
            "comfyd_job_duration_seconds", "From acceptance to outcome.", _STAGE_BUCKETS, "outcome"
        )
        self._stage_s = self._histogram(
            "comfyd_job_stage_seconds", "What a job spent in a stage.", _STAGE_BUCKETS, "stage"
        )
        self._node_s = self._histogram(
            "comfyd_node_seconds", "Time of a node in jobs that succeeded.", _NODE_BUCKETS, "class_type"
        )
        self._downloads = self._counter("comfyd_downloads", "Inputs fetched, by kind of URL.", "scheme", "result")
        self._download_bytes = self._counter("comfyd_download_bytes", "Size of inputs that were fetched.", "scheme")
        self._uploads = self._counter("comfyd_uploads", "Outputs written to storage.", "result")
        self._upload_bytes = self._counter("comfyd_upload_bytes", "Size of outputs that were stored.")[()]
        self._requests = self._counter(
            "comfyd_http_requests", "Requests by route; status 0: no answer began.", "route", "method", "status"
        )
        self._request_s = self._histogram(
            "comfyd_http_request_duration_seconds", "From request to end of answer.", _HTTP_BUCKETS, "route"
        )
        self._response_bytes = self._counter("comfyd_http_response_bytes", "Size of answers' bodies.", "route")
        self._workflow, self._class = BoundedLabel(), BoundedLabel()
        self._live = _Live()
        self.registry.register(self._live)
        self._gauges: Gauges | None = None
        self._rendering = trio.CapacityLimiter(1)
        for outcome in _ALWAYS_THERE:
            self._ended[outcome, ""].inc(0)
        for result in ("ok", "failed"):
            self._uploads[result,].inc(0)
            for scheme in ("http", "https", "s3"):
                self._downloads[scheme, result].inc(0)

    def watch(self, watched: Watched) -> None:
        """Tell of *watched* from now on."""
        self._gauges = Gauges(watched)

    def _counter(self, name: str, text: str, *labels: str) -> "_Children":
        return _Children(Counter(name, text, labels, registry=self.registry))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> "_Children":
        return _Children(Histogram(name, text, labels, registry=self.registry, buckets=buckets))

    # --- what is counted

    def job_ended(self, job: "Job") -> None:
        """Count *job*, which has its outcome, with its stages and nodes. The daemon's own jobs do not count."""
        outcome = job.outcome
        if outcome is None or job.internal:
            return
        name = outcome.kind.value if isinstance(outcome, Failure) else _SUCCEEDED
        self._ended[name, self._workflow(job.workflow)].inc()
        self._attempts.inc(job.attempts)
        clock = job.clock
        self._job_s[job.state.value,].observe(time.perf_counter() - clock.accepted)
        if clock.prepare_s:
            self._stage_s["prepare",].observe(clock.prepare_s)
        if job.attempts:
            self._stage_s["queue",].observe(clock.queue_s)
            self._stage_s["engine",].observe(clock.engine_s)
        if clock.collect_s:
            self._stage_s["collect",].observe(clock.collect_s)
        if clock.upload_s:
            self._stage_s["upload",].observe(clock.upload_s)
        if not isinstance(outcome, Failure):
            for node_id, node_time in outcome.stats.times.nodes.items():
                node = outcome.graph.get(node_id)
                if node is not None and node_time.duration_ms is not None:
                    label = self._class(str(node["class_type"]))
                    self._node_s[label,].observe(node_time.duration_ms / 1000)

    def downloaded(self, url: str, size_bytes: int | None) -> None:
        """Count an input that was to be fetched from *url*; None: it was not."""
        scheme = url.partition(":")[0].lower()
        scheme = scheme if scheme in {"http", "https", "s3"} else OTHER
        self._downloads[scheme, "failed" if size_bytes is None else "ok"].inc()
        self._download_bytes[scheme,].inc(size_bytes or 0)

    def uploaded(self, size_bytes: int | None) -> None:
        """Count an output that was to be stored; None: it was not."""
        self._uploads["failed" if size_bytes is None else "ok",].inc()
        self._upload_bytes.inc(size_bytes or 0)

    def request_served(self, access: "Access") -> None:
        """Count a request. Event streams and waits make its time what the client wanted it to be."""
        self._requests[access.route, access.method, str(access.status)].inc()
        self._request_s[access.route,].observe(access.took_s)
        self._response_bytes[access.route,].inc(access.body_bytes)

    # --- what is asked

    async def render(self, *, openmetrics: bool = False, pack_above_bytes: int | None = None) -> Body:
        """Return all metrics as text, or as gzip where it is longer than *pack_above_bytes*.

        The text is written in a thread: 200 node classes are 3,000 lines.
        """
        families: tuple[Metric, ...] = ()
        if self._gauges is not None:
            await self._gauges.refresh()
            families = tuple(self._gauges.read())

        def write() -> Body:
            self._live.families = families  # under the limiter: one scrape at a time
            if openmetrics:
                data: bytes = generate_openmetrics(self.registry)  # type: ignore[no-untyped-call]  # as above
            else:
                data = generate_latest(self.registry)
            if pack_above_bytes is not None and len(data) > pack_above_bytes:
                return Body(data=gzip.compress(data, compresslevel=1), packed=True)
            return Body(data=data, packed=False)

        return await trio.to_thread.run_sync(write, limiter=self._rendering)


class _Live:
    """Hands prometheus-client what was read."""

    def __init__(self) -> None:
        self.families: Iterable[Metric] = ()

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of the scrape that is being written."""
        return self.families
