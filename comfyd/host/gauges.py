"""What is looked at when somebody asks for the metrics: the live objects, disks, and the engine's GPU.

What may be slow to tell (disks, the GPU) is asked for at most every 10 s, for at most a second, and told from memory
otherwise.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import structlog
import trio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from comfyd.errors import EngineError

if TYPE_CHECKING:
    from comfyd.engine import Engine
    from comfyd.jobs import JobService
    from comfyd.webhooks.outbox import Outbox
    from comfyd.webhooks.system_events import SystemEvents

log = structlog.get_logger("comfyd.metrics")

REFRESH_EVERY_S: Final = 10.0
REFRESH_BUDGET_S: Final = 1.0
"""What a scrape may wait for. Prometheus gives up after 10 s, and then has no numbers at all."""


@attrs.frozen(kw_only=True)
class Watched:
    """The live objects. *folders* are those whose disks are told of, by the name that they are told under."""

    service: "JobService"
    outbox: "Outbox"
    events: "SystemEvents | None" = None
    engine_pid: "Callable[[Engine], int | None]" = lambda _engine: None
    """The process id of an engine, None while there is no process."""
    folders: Mapping[str, Path] = attrs.field(factory=dict)


class Gauges:
    """Reads *watched*. To be used on the Trio thread."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._seen: dict[str, _EngineSeen] = {}
        self._disks: dict[str, tuple[int, int]] = {}
        self._refresh_at = float("-inf")
        self._looking = trio.CapacityLimiter(1)

    def read(self) -> Iterator[Metric]:
        """Read the live objects, on the Trio thread: they change on it, and only there."""
        watched = self._watched
        service, outbox, events = watched.service, watched.outbox, watched.events
        depth, waiting = service.depth, service.waiting
        yield _gauge("comfyd_queue_depth", "Jobs that wait or run.", depth)
        yield _gauge("comfyd_queue_limit", "MAX_QUEUED_JOBS: as many may wait.", service.config.jobs.max_queued)
        yield _gauge("comfyd_jobs_waiting", "Jobs that no engine has had yet.", waiting)
        yield _gauge(
            "comfyd_jobs_running", "Jobs that an engine has had: running, or being delivered.", depth - waiting
        )
        yield _gauge("comfyd_ready", "Whether /ready says so.", service.not_ready_reason() is None)
        yield _gauge("comfyd_draining", "Whether comfyd is stopping.", service.draining)
        yield _gauge("comfyd_webhooks_pending", "Webhooks neither taken nor given up.", outbox.pending)
        yield _gauge("comfyd_webhooks_dead", "Webhooks given up, kept to be replayed.", outbox.dead)
        attempts = CounterMetricFamily("comfyd_webhook_attempts", "Attempts to deliver webhooks.", labels=["result"])
        for result, number in outbox.attempts.items():
            attempts.add_metric([result], number)
        yield attempts
        if events is not None:
            yield _gauge("comfyd_system_events_pending", "System events that wait or are being sent.", events.pending)
            told = CounterMetricFamily("comfyd_system_events", "System events by their end.", labels=["result"])
            for result, number in (("sent", events.sent), ("failed", events.failed), ("dropped", events.dropped)):
                told.add_metric([result], number)
            yield told
        yield from self._read_engines(watched)
        if self._disks:
            free = GaugeMetricFamily(
                "comfyd_disk_free_bytes", "Free on a folder's disk, for comfyd.", labels=["folder"]
            )
            size = GaugeMetricFamily("comfyd_disk_size_bytes", "Size of a folder's disk.", labels=["folder"])
            for folder, (free_bytes, size_bytes) in self._disks.items():
                free.add_metric([folder], free_bytes)
                size.add_metric([folder], size_bytes)
            yield free
            yield size

    def _read_engines(self, watched: Watched) -> Iterator[Metric]:
        up = GaugeMetricFamily("comfyd_engine_up", "Whether ComfyUI lives and answers.", labels=["engine"])
        warm = GaugeMetricFamily("comfyd_engine_warm", "Whether its warm-up is done.", labels=["engine"])
        starts = CounterMetricFamily("comfyd_engine_starts", "Processes that were started.", labels=["engine"])
        restarts = CounterMetricFamily(
            "comfyd_engine_restarts", "Restarts by what ended the process before.", labels=["engine", "cause"]
        )
        memory = GaugeMetricFamily("comfyd_engine_resident_memory_bytes", "RSS of ComfyUI.", labels=["engine"])
        device = ["engine", "device"]
        vram = {
            "vram_total": GaugeMetricFamily("comfyd_engine_vram_size_bytes", "Memory of a device.", labels=device),
            "vram_free": GaugeMetricFamily("comfyd_engine_vram_free_bytes", "Free on a device.", labels=device),
            "torch_vram_total": GaugeMetricFamily(
                "comfyd_engine_torch_vram_size_bytes", "What PyTorch holds of a device.", labels=device
            ),
            "torch_vram_free": GaugeMetricFamily(
                "comfyd_engine_torch_vram_free_bytes", "What PyTorch holds of a device and does not use.", labels=device
            ),
        }
        for engine in watched.service.engines:
            name = engine.name
            up.add_metric([name], engine.up)
            warm.add_metric([name], engine.up and engine.warm)
            starts.add_metric([name], engine.processes)
            for cause, number in engine.restarts_by_cause.items():
                restarts.add_metric([name, cause], number)
            resident = _resident_bytes(watched.engine_pid(engine))
            if resident is not None:
                memory.add_metric([name], resident)
            seen = self._seen.get(name)
            if seen is not None and engine.up and seen.process == engine.processes:
                for label, values in seen.devices.items():
                    for key, family in vram.items():
                        if key in values:
                            family.add_metric([name, label], values[key])
        yield from (up, warm, starts, restarts, memory, *vram.values())

    # --- what may be slow to tell

    async def refresh(self) -> None:
        """Ask again what is due, within the budget. Of two scrapes at a time the second does not wait."""
        watched, now = self._watched, trio.current_time()
        if now < self._refresh_at:
            return
        self._refresh_at = now + REFRESH_EVERY_S
        with trio.move_on_after(REFRESH_BUDGET_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._look_at_disks, watched.folders)
                for engine in watched.service.engines:
                    nursery.start_soon(self._ask_engine, engine)

    async def _look_at_disks(self, folders: Mapping[str, Path]) -> None:
        if not folders:
            return
        if self._looking.borrowed_tokens:  # an earlier look hangs, as network disks may: no second thread for it
            self._disks = {}
            return
        self._disks = await trio.to_thread.run_sync(
            _disk_usage, tuple(folders.items()), limiter=self._looking, abandon_on_cancel=True
        )

    async def _ask_engine(self, engine: "Engine") -> None:
        """Ask for the GPU's memory. An engine that left a question open is not asked again before it gave a sign.

        ComfyUI answers from its event loop, which a node that keeps the interpreter lock stops (0.3.64, ``server.py``).
        """
        seen = self._seen.setdefault(engine.name, _EngineSeen())
        if not engine.up or (seen.silent_at == engine.signs_of_life and engine.attempts):
            return
        seen.silent_at = engine.signs_of_life  # until it has answered
        process = engine.processes
        try:
            stats = await engine.client.system_stats()
        except EngineError as exc:
            log.debug("metrics.engine_unanswered", engine=engine.name, reason=str(exc))
            return
        seen.silent_at, seen.process, seen.devices = None, process, _devices(stats)


@attrs.define
class _EngineSeen:
    """What an engine said last, and of which process it was."""

    devices: dict[str, dict[str, int]] = attrs.field(factory=dict)
    process: int = 0
    silent_at: int | None = None
    """Its signs of life when it was asked and did not answer."""


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _resident_bytes(pid: int | None) -> int | None:
    """Read how much memory a process holds; None if it is gone. ``/proc`` does not block."""
    if pid is None:
        return None
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):  # gone, or just going
        return None


_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def _disk_usage(folders: tuple[tuple[str, Path], ...]) -> dict[str, tuple[int, int]]:
    """Free and whole size of the disks of *folders*, in bytes, without those that cannot be asked."""
    found = {}
    for name, path in folders:
        try:
            usage = shutil.disk_usage(path)
        except OSError:
            continue
        found[name] = (usage.free, usage.total)
    return found


def _devices(stats: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Memory of each device, by a label such as ``cuda:0``; whatever an old or odd engine leaves out is left out.

    Shape: ``{"devices": [{"name", "type", "index", "vram_total", ...}]}``, in bytes; ComfyUI 0.3.64, ``server.py``.
    """
    found: dict[str, dict[str, int]] = {}
    devices = stats.get("devices")
    for place, device in enumerate(devices if isinstance(devices, list) else ()):
        if place < _MAX_DEVICES and isinstance(device, dict):
            index = device.get("index")
            label = f"{str(device.get('type', 'device'))[:20]}:{index if isinstance(index, int) else place}"
            found[label] = {key: value for key, value in device.items() if key in _VRAM_KEYS and isinstance(value, int)}
    return found


_MAX_DEVICES: Final = 64
_VRAM_KEYS: Final = frozenset({"vram_total", "vram_free", "torch_vram_total", "torch_vram_free"})
