"""The scenarios of large outputs that go to clients who wait for them, while others ask the probe."""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.contenders import open_contenders
from benchmarks.effort import Effort, Numbers, percentile
from benchmarks.graphs import large
from benchmarks.load import Load
from benchmarks.processes import EMBEDDED, Cores, comfyd
from benchmarks.report import Bound, Row, Values

_AT_ONCE: Final = 4
_EACH_MB: Final = 64


def large_output(effort: Effort) -> list[Row]:
    """An output of 200 MB goes to one client, while others ask the probe and run small prompts."""
    numbers, values = Numbers(), Values("large-output")
    usual_ms: dict[str, float] = {}
    with open_contenders(EMBEDDED, Cores.shared_out()) as contenders:
        for turn, contender, server in contenders.in_turn(effort.rounds):
            if turn == 0:
                load = Load(mode="prompts", url=server.url, graph="tiny", total=100, first=numbers.take(100))
                if warm := contenders.run(contender, load):
                    usual_ms[contender] = statistics.median(warm.latencies_ms)
                continue
            before_mb = server.rss_mb()
            server.forget_peak()
            load = Load(mode="large", url=server.url, graph="large", first=numbers.take(10_000))
            if measured := contenders.run(contender, load):
                values.add("time, run and delivered", contender, measured.latencies_ms[0])
                values.add("growth of RSS", contender, server.peak_rss_mb() - before_mb)
                values.add("longest delay of a probe", contender, max(measured.probes_ms))
                if measured.beside_ms:
                    values.add("longest delay of a prompt", contender, max(measured.beside_ms) - usual_ms[contender])
    return [
        values.row("time, run and delivered", "ms", Bound(limit=0.7, ratio=True, to="peer")),
        values.row("growth of RSS", "MB", Bound(limit=40), Bound(limit=0.03, ratio=True, to="peer")),
        values.row("longest delay of a probe", "ms", Bound(limit=50)),
        values.row("longest delay of a prompt", "ms", Bound(limit=50)),
    ]


def huge_output(effort: Effort) -> list[Row]:
    """An output of 1 GB goes to one client; only comfyd's, as a peer on V8 has no string that long."""
    values = Values("huge-output")
    with comfyd(EMBEDDED, Cores.shared_out()) as server:
        server.run(Load(mode="prompts", url=server.url, graph="tiny", total=100))
        for turn in range(min(effort.rounds, 3)):
            before_mb = server.rss_mb()
            server.forget_peak()
            measured = server.run(Load(mode="large", url=server.url, graph="huge", first=(turn + 1) * 10_000))
            values.add("speed, run and delivered", "comfyd", 1024 / (measured.latencies_ms[0] / 1000))
            values.add("growth of RSS", "comfyd", server.peak_rss_mb() - before_mb)
            values.add("longest delay of a probe", "comfyd", max(measured.probes_ms))
    return [
        values.row("speed, run and delivered", "MB/s"),
        values.row("growth of RSS", "MB", Bound(limit=40)),
        values.row("longest delay of a probe", "ms", Bound(limit=50)),
    ]


def outputs_at_once(effort: Effort) -> list[Row]:
    """Four outputs of 64 MB go to four clients at the same time, while others ask the probe every 5 ms."""
    values = Values("outputs-at-once")
    with (
        tempfile.TemporaryDirectory(prefix="comfyd-bench-") as name,
        open_contenders(EMBEDDED, Cores.shared_out()) as (contenders),
    ):
        bodies = [Path(name, f"{number}.json") for number in range(_AT_ONCE)]
        for number, body in enumerate(bodies):
            # Of different sizes, as equal nodes would be one in the engine's cache.
            body.write_bytes(msgspec.json.encode({"prompt": large(_EACH_MB + number, f"bench-{number}")}))
        for turn, contender, server in contenders.in_turn(effort.rounds):
            before_mb = server.rss_mb()
            server.forget_peak()
            load = Load(mode="given", url=server.url, paths=[str(body) for body in bodies], probes=True)
            load.total = load.in_flight = _AT_ONCE
            measured = contenders.run(contender, load)
            if measured and turn > 0:
                values.add("all delivered", contender, measured.elapsed_s * 1000)
                values.add("growth of RSS", contender, server.peak_rss_mb() - before_mb)
                values.add("probe, p99", contender, percentile(measured.probes_ms, 0.99))
                values.add("longest delay of a probe", contender, max(measured.probes_ms))
    return [
        values.row("all delivered", "ms", Bound(limit=1, ratio=True, to="peer")),
        values.row("growth of RSS", "MB", Bound(limit=60), Bound(limit=0.1, ratio=True, to="peer")),
        values.row("probe, p99", "ms", Bound(limit=30)),
        values.row("longest delay of a probe", "ms", Bound(limit=50)),
    ]


LARGE_SCENARIOS: Final[dict[str, Callable[[Effort], list[Row]]]] = {
    "large-output": large_output,
    "huge-output": huge_output,
    "outputs-at-once": outputs_at_once,
}
