"""The scenarios: which contenders meet which load, and what is wanted of comfyd.

Contenders take turns within a round, and rounds repeat, so that whatever else the machine does meets them alike.
"""

import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks.effort import FULL, QUICK, Effort, Numbers, ours
from benchmarks.load import Load
from benchmarks.media_scenarios import MEDIA_SCENARIOS
from benchmarks.processes import (
    COUNTING,
    EMBEDDED,
    Cores,
    EngineKind,
    comfyd,
    engine_alone,
    peer,
    real_comfyui,
    requests_of,
)
from benchmarks.report import Bound, Row


def one_client(effort: Effort) -> list[Row]:
    """One prompt after the other on an engine that costs nothing: what comfyd adds, seen at its largest."""
    return [
        _alternate(
            "one-client", EMBEDDED, Cores.shared_out(), "tiny", effort, effort.prompts(300), Bound(limit=3, ratio=True)
        )
    ]


def real_client(effort: Effort) -> list[Row]:
    """One prompt after the other on ComfyUI, a picture of 512 px that must be computed. Needs COMFYUI_DIR."""
    with tempfile.TemporaryDirectory(prefix="comfyd-bench-") as front:
        kind = real_comfyui(Path(front))
        if kind is None:
            return []
        bound = Bound(limit=1.35, ratio=True)
        return [
            _alternate(
                "real-client", kind, Cores.everywhere(), "picture", effort, effort.prompts(100), bound, with_peer=True
            )
        ]


def _alternate(
    name: str,
    kind: EngineKind,
    cores: Cores,
    graph: str,
    effort: Effort,
    prompts: int,
    bound: Bound,
    *,
    with_peer: bool = False,
) -> Row:
    numbers = Numbers()
    latencies: dict[str, list[float]] = {}
    with ExitStack() as stack:
        contenders = {
            "raw": stack.enter_context(engine_alone(kind, cores)),
            "comfyd": stack.enter_context(comfyd(kind, cores)),
        }
        if with_peer and os.environ.get("PEER_COMMAND"):
            contenders["peer"] = stack.enter_context(peer(cores))
        for turn in range(effort.rounds + 1):
            for contender, server in contenders.items():
                load = Load(
                    mode="raw" if contender == "raw" else "prompts",
                    url=server.url,
                    graph=graph,
                    total=prompts,
                    first=numbers.take(prompts),
                )
                measured = server.run(load)
                if turn > 0:  # the first is for warming up
                    latencies.setdefault(contender, []).append(statistics.median(measured.latencies_ms))
    return Row(scenario=name, measure="median latency", unit="ms", values=latencies, bound=bound)


def in_flight(effort: Effort) -> list[Row]:
    """500 callers wait at the same time, on an engine that costs nothing."""
    numbers, prompts, callers = Numbers(), effort.prompts(2000), 500
    rates: dict[str, list[float]] = {"raw": [], "comfyd": []}
    growth: list[float] = []
    processor: list[float] = []
    cores = Cores.shared_out()
    with engine_alone(EMBEDDED, cores) as raw, comfyd(EMBEDDED, cores) as daemon:
        daemon.run(Load(mode="prompts", url=daemon.url, graph="tiny", total=50, first=numbers.take(50)))
        raw.run(Load(mode="raw", url=raw.url, graph="tiny", total=50, first=numbers.take(50)))
        before_mb = daemon.rss_mb()
        for _ in range(effort.rounds):
            for contender, server in (("raw", raw), ("comfyd", daemon)):
                server.forget_peak()
                load = Load(
                    mode="raw" if contender == "raw" else "prompts",
                    url=server.url,
                    graph="tiny",
                    total=prompts,
                    in_flight=callers,
                    first=numbers.take(prompts),
                )
                used_s = server.cpu_s()
                measured = server.run(load)
                if server is daemon:
                    processor.append((server.cpu_s() - used_s) * 1000 / prompts)
                rates[contender].append(len(measured.latencies_ms) / measured.elapsed_s)
            growth.append(daemon.peak_rss_mb() - before_mb)
    return [
        Row(
            scenario="in-flight",
            measure="500 callers",
            unit="prompts/s",
            values=rates,
            bound=Bound(limit=0.3, ratio=True, at_least=True),  # 300 where a raw client has 1,000
        ),
        ours("in-flight", "processor time of the daemon", "ms/prompt", processor, Bound(limit=3.3)),
        ours("in-flight", "growth of RSS", "MB", growth, Bound(limit=60)),
    ]


def large_output(effort: Effort) -> list[Row]:
    """An output of 200 MB goes to one client, while others ask the probe and run small prompts."""
    numbers = Numbers()
    growth: list[float] = []
    probes: list[float] = []
    beside: list[float] = []
    rate: list[float] = []
    with comfyd(EMBEDDED, Cores.shared_out()) as server:
        warm = server.run(Load(mode="prompts", url=server.url, graph="tiny", total=100, first=numbers.take(100)))
        usual_ms = statistics.median(warm.latencies_ms)
        for _ in range(effort.rounds):
            before_mb = server.rss_mb()
            server.forget_peak()
            measured = server.run(Load(mode="large", url=server.url, graph="large", first=numbers.take(10_000)))
            growth.append(server.peak_rss_mb() - before_mb)
            probes.append(max(measured.probes_ms))
            rate.append(200 / (measured.latencies_ms[0] / 1000))
            if measured.beside_ms:
                beside.append(max(measured.beside_ms) - usual_ms)
    within = Bound(limit=50)
    return [
        ours("large-output", "growth of RSS", "MB", growth, Bound(limit=40)),
        ours("large-output", "longest delay of a probe", "ms", probes, within),
        ours("large-output", "longest delay of a prompt", "ms", beside, within),
        ours("large-output", "speed, run and delivered", "MB/s", rate, None),
    ]


def start(effort: Effort) -> list[Row]:
    """From starting the program to ready, and what it then holds in memory."""
    started: dict[str, list[float]] = {"raw": [], "comfyd": []}
    beyond: list[float] = []
    idle: list[float] = []
    used: list[float] = []
    cores = Cores.everywhere()
    for _ in range(effort.rounds):
        with engine_alone(EMBEDDED, cores) as raw:
            started["raw"].append(raw.started_in_s)
        with comfyd(EMBEDDED, cores) as server:
            started["comfyd"].append(server.started_in_s)
            idle.append(server.rss_mb())
            server.run(Load(mode="prompts", url=server.url, graph="tiny", total=100))
            used.append(server.rss_mb())
        beyond.append(started["comfyd"][-1] - started["raw"][-1])
    return [
        Row(scenario="start", measure="start to ready", unit="s", values=started),
        ours("start", "beyond the engine's own", "s", beyond, Bound(limit=0.5)),
        ours("start", "idle RSS", "MB", idle, Bound(limit=90)),
        ours("start", "RSS after 100 prompts", "MB", used, None),
    ]


def questions(effort: Effort) -> list[Row]:
    """How often the engine is asked for history and queue while all goes well."""
    prompts = effort.prompts(500)
    history: list[float] = []
    each: list[float] = []
    with comfyd(COUNTING, Cores.shared_out()) as server:
        before = requests_of(server)
        for turn in range(effort.rounds):
            first = turn * prompts
            server.run(Load(mode="prompts", url=server.url, graph="tiny", total=prompts, in_flight=20, first=first))
            after = requests_of(server)
            asked = {route: times - before.get(route, 0) for route, times in after.items()}
            history.append(float(asked.get("GET /history", 0) + asked.get("GET /queue", 0)))
            each.append(sum(asked.values()) / prompts)
            before = after
    return [
        ours("questions", "GET /history and /queue", "requests", history, Bound(limit=0)),
        ours("questions", "requests to the engine", "per prompt", each, Bound(limit=1.1)),
    ]


SCENARIOS: Final[dict[str, Callable[[Effort], list[Row]]]] = {
    "start": start,
    "one-client": one_client,
    "real-client": real_client,
    "in-flight": in_flight,
    "large-output": large_output,
    "questions": questions,
    **MEDIA_SCENARIOS,
}

__all__ = ["FULL", "QUICK", "SCENARIOS", "Effort"]
