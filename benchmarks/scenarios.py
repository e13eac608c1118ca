"""The scenarios of many small prompts, and the list of all: which contenders meet which load, and what is wanted."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from benchmarks.contenders import open_contenders, small_prompts
from benchmarks.effort import Effort, Numbers, ours, percentile
from benchmarks.large_scenarios import LARGE_SCENARIOS
from benchmarks.load import Load
from benchmarks.media_scenarios import MEDIA_SCENARIOS
from benchmarks.processes import COUNTING, EMBEDDED, Cores, EngineKind, comfyd, real_comfyui, requests_of
from benchmarks.report import Bound, Row, Values
from benchmarks.webhook_scenarios import WEBHOOK_SCENARIOS

PARTS: Final = {"median": 0.5, "p90": 0.9, "p99": 0.99}


def one_client(effort: Effort) -> list[Row]:
    """One prompt after the other on an engine that costs nothing: what comfyd adds, seen at its largest."""
    half = Bound(limit=0.5, ratio=True, to="peer")
    bounds = {"median": (Bound(limit=3, ratio=True),), "added at median": (half,), "added at p90": (half,)}
    return _one_after_the_other(
        "one-client", EMBEDDED, Cores.shared_out(), "tiny", effort, effort.prompts(1000), bounds
    )


def real_client(effort: Effort) -> list[Row]:
    """One prompt after the other on ComfyUI, a picture of 512 px that must be computed. Needs COMFYUI_DIR."""
    with tempfile.TemporaryDirectory(prefix="comfyd-bench-") as front:
        # What pings GET / for readiness wants an answer, and nobody wants the real front end.
        Path(front, "index.html").write_text("<!doctype html><title>no front end</title>", encoding="utf-8")
        kind = real_comfyui(Path(front))
        if kind is None:
            return []
        bounds = {
            "median": (Bound(limit=1.35, ratio=True),),
            "p90": (Bound(limit=0.4, ratio=True, to="peer"),),
        }
        prompts = effort.prompts(100)
        return _one_after_the_other("real-client", kind, Cores.everywhere(), "picture", effort, prompts, bounds)


def _one_after_the_other(
    name: str,
    kind: EngineKind,
    cores: Cores,
    graph: str,
    effort: Effort,
    prompts: int,
    bounds: Mapping[str, tuple[Bound, ...]],
) -> list[Row]:
    """Measure latencies, and what each adds to the raw client's of the same round."""
    numbers, values = Numbers(), Values(name)
    with open_contenders(kind, cores, raw=True) as contenders:
        latencies: dict[tuple[int, str], list[float]] = {}
        for turn, contender, server in contenders.in_turn(effort.rounds):
            load = Load(
                mode=small_prompts(contender), url=server.url, graph=graph, total=prompts, first=numbers.take(prompts)
            )
            if (measured := contenders.run(contender, load)) and turn > 0:
                latencies[turn, contender] = measured.latencies_ms
    for (turn, contender), found in latencies.items():
        for part, of in PARTS.items():
            value = percentile(found, of)
            values.add(part, contender, value)
            if contender != "raw":
                values.add(f"added at {part}", contender, value - percentile(latencies[turn, "raw"], of))
    measures = [*PARTS, *(f"added at {part}" for part in PARTS)]
    return [values.row(measure, "ms", *bounds.get(measure, ())) for measure in measures]


def in_flight(effort: Effort) -> list[Row]:
    """32 callers, then 500, wait at the same time, on an engine that costs nothing; for the 32 it takes 5 ms."""
    to_peer: dict[int, dict[str, Bound]] = {
        32: {"processor": Bound(limit=0.7, ratio=True, to="peer")},
        500: {
            "prompts": Bound(limit=2.5, ratio=True, to="peer", at_least=True),
            "growth": Bound(limit=0.5, ratio=True, to="peer"),
        },
    }
    alone: dict[int, dict[str, Bound]] = {
        32: {},
        500: {
            "prompts": Bound(limit=0.3, ratio=True, at_least=True),  # 300 where a raw client has 1,000
            "processor": Bound(limit=3.3),
            "growth": Bound(limit=60),
        },
    }
    rows = []
    for callers in (32, 500):
        # With 500 the engine's queue is long enough for a peer to learn the id of a prompt before that ends.
        values = _many_at_once(effort, callers, "brief" if callers == 32 else "tiny")
        units = {"prompts": "per s", "processor": "ms/prompt", "growth": "MB"}
        for measure, unit in units.items():
            wanted = [bounds[callers][measure] for bounds in (alone, to_peer) if measure in bounds[callers]]
            rows.append(values.row(f"{callers} callers, {measure}", unit, *wanted))
    return rows


def _many_at_once(effort: Effort, callers: int, graph: str) -> Values:
    numbers, prompts, values = Numbers(), effort.prompts(2000), Values("in-flight")
    with open_contenders(EMBEDDED, Cores.shared_out(), raw=True) as contenders:
        before_mb: dict[str, float] = {}
        for turn, contender, server in contenders.in_turn(effort.rounds):
            server.forget_peak()
            used_s = server.cpu_s()
            # To warm up, a few prompts one by one: what 500 at once leave behind belongs to what is measured.
            total, at_once = (50, 1) if turn == 0 else (max(prompts, callers), callers)
            load = Load(mode=small_prompts(contender), url=server.url, graph=graph, total=total, in_flight=at_once)
            load.first = numbers.take(total)
            measured = contenders.run(contender, load)
            if measured is None:
                continue
            if turn == 0:
                before_mb[contender] = server.rss_mb()
                continue
            values.add(f"{callers} callers, prompts", contender, total / measured.elapsed_s)
            if contender != "raw":  # whose server is the engine
                used_ms = (server.cpu_s() - used_s) * 1000
                values.add(f"{callers} callers, processor", contender, used_ms / total)
                values.add(f"{callers} callers, growth", contender, server.peak_rss_mb() - before_mb[contender])
    return values


def start(effort: Effort) -> list[Row]:
    """From starting the program to ready, and what it then holds in memory."""
    values, cores = Values("start"), Cores.everywhere()
    for _ in range(effort.rounds):
        # All of them start one after the other, and each stops before the next begins.
        with open_contenders(EMBEDDED, cores, raw=True) as contenders:
            engine_s = contenders.servers["raw"].started_in_s
            for contender, server in contenders.servers.items():
                values.add("start to ready", contender, server.started_in_s)
                if contender == "raw":
                    continue
                values.add("beyond the engine's own", contender, server.started_in_s - engine_s)
                values.add("idle RSS", contender, server.rss_mb())
            for contender, server in list(contenders.servers.items()):
                if contender != "raw":
                    contenders.run(contender, Load(mode="prompts", url=server.url, graph="tiny", total=100))
                    values.add("RSS after 100 prompts", contender, server.rss_mb())
    third, most = Bound(limit=0.3, ratio=True, to="peer"), Bound(limit=0.7, ratio=True, to="peer")
    return [
        values.row("start to ready", "s"),
        values.row("beyond the engine's own", "s", Bound(limit=0.5), third),
        values.row("idle RSS", "MB", Bound(limit=90), most),
        values.row("RSS after 100 prompts", "MB"),
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
    **LARGE_SCENARIOS,
    "questions": questions,
    **MEDIA_SCENARIOS,
    **WEBHOOK_SCENARIOS,
}
