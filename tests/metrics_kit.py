"""What the tests of metrics share: live objects to read from, and the numbers of a scrape by name and labels."""

from collections import Counter
from typing import Any, cast

import attrs
import trio
from engine_kit import ScriptedClient
from jobs_kit import CLASSES, make_service
from prometheus_client.parser import text_string_to_metric_families

from comfyd.engine import Engine
from comfyd.engine.client import EngineClient
from comfyd.errors import EngineUnavailable
from comfyd.host.gauges import Watched
from comfyd.host.metrics import Metrics
from comfyd.jobs import JobService

DEVICE = {
    "name": "cuda:0 NVIDIA",
    "type": "cuda",
    "index": 0,
    "vram_total": 24_000,
    "vram_free": 20_000,
    "torch_vram_total": 3_000,
    "torch_vram_free": 1_000,
}


class StatsClient(ScriptedClient):
    """An engine's HTTP side that tells of its devices, if it is not silent."""

    stats: Any = {"devices": [DEVICE]}  # noqa: RUF012  # replaced as a whole, per client
    asked: int = 0
    mute: bool = False
    broken: bool = False

    async def system_stats(self) -> Any:
        self.asked += 1
        await trio.lowlevel.checkpoint()
        if self.mute:
            await trio.sleep_forever()
        if self.broken:
            raise EngineUnavailable("nobody there")
        return self.stats


@attrs.define
class CountingOutbox:
    """What metrics read of an outbox."""

    pending: int = 3
    dead: int = 2
    attempts: Counter[str] = attrs.field(factory=lambda: Counter(taken=7, failed=1, dead=2))


@attrs.define
class CountingEvents:
    """What metrics read of system events."""

    pending: int = 4
    sent: int = 5
    failed: int = 6
    dropped: int = 7


@attrs.define
class Scene:
    """Metrics with what they watch."""

    metrics: Metrics
    service: JobService
    engine: Engine
    client: StatsClient

    async def scrape(self) -> dict[str, float]:
        """Each sample of a scrape under its name with its labels as they stand in the text."""
        body = await self.metrics.render()
        assert not body.packed
        return samples(body.data.decode())


def samples(text: str) -> dict[str, float]:
    """Each sample of the text format, labels sorted: ``{'name{a="1",b="2"}': 3.0}``."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def make_scene(*, events: bool = True, **watched: Any) -> Scene:
    """Metrics of a service with one engine, which is up and warm."""
    engine = Engine(name="engine-1")
    client = StatsClient()
    engine.launched()
    engine.went_up(cast("EngineClient", client), CLASSES)
    engine.connected("client-1")
    engine.mark_warm()
    service = make_service(engine)
    metrics = Metrics()
    metrics.watch(
        Watched(
            service=service,
            outbox=cast("Any", CountingOutbox()),
            events=cast("Any", CountingEvents()) if events else None,
            **watched,
        )
    )
    return Scene(metrics, service, engine, client)
