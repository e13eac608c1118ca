"""The scenarios of those who do not wait: jobs that are accepted durably and told by webhook, and ComfyUI's events."""

import tempfile
from collections.abc import Callable
from typing import Final

from benchmarks.contenders import open_contenders
from benchmarks.effort import Effort, Numbers, percentile
from benchmarks.load import Load
from benchmarks.processes import EMBEDDED, Cores, sink, taken_by, wait_quiet
from benchmarks.report import Bound, Row, Values

_AT_ONCE: Final = 16
_EVENTS_PER_S: Final = 1000
_GIVE_UP_S: Final = 10.0
"""Without any webhook; longer than a pause between two attempts."""


def accepted(effort: Effort) -> list[Row]:
    """16 callers hand jobs over, each on disk before its 202 (not so the peer's); a webhook tells each outcome."""
    numbers, values, jobs = Numbers(), Values("accepted"), effort.prompts(500)
    with tempfile.TemporaryDirectory(prefix="comfyd-bench-") as state, sink() as url:
        settings = {"URL_ALLOW": "127.0.0.1", "STATE_DIR": state}
        with open_contenders(EMBEDDED, Cores.shared_out(), settings) as contenders:
            for turn, contender, server in contenders.in_turn(effort.rounds):
                before = taken_by(url)
                used_s, before_mb = server.cpu_s(), server.rss_mb()
                server.forget_peak()
                load = Load(mode="accepted", url=server.url, graph="brief", webhook=f"{url}/{contender}", total=jobs)
                load.in_flight, load.first = _AT_ONCE, numbers.take(jobs)
                measured = contenders.run(contender, load)
                after = wait_quiet(url, expected=before.taken + jobs, quiet_s=_GIVE_UP_S)
                if measured is None or turn == 0:
                    continue
                told, began_at = after.taken - before.taken, measured.ended_at - measured.elapsed_s
                if contender == "comfyd" and told != jobs:
                    raise RuntimeError(f"{told} webhooks told of {jobs} jobs")
                values.add("time to the 202, median", contender, percentile(measured.latencies_ms, 0.5))
                values.add("time to the 202, p99", contender, percentile(measured.latencies_ms, 0.99))
                values.add("webhooks missing", contender, jobs - told)
                values.add("jobs, to the last webhook", contender, told / (after.last_at - began_at))
                values.add("processor", contender, (server.cpu_s() - used_s) * 1000 / jobs)
                values.add("growth of RSS", contender, server.peak_rss_mb() - before_mb)
    return [
        values.row("time to the 202, median", "ms"),
        values.row("time to the 202, p99", "ms"),
        values.row("webhooks missing", "jobs", Bound(limit=0)),
        values.row("jobs, to the last webhook", "per s"),
        values.row("processor", "ms/job"),
        values.row("growth of RSS", "MB"),
    ]


def events(effort: Effort) -> list[Row]:
    """ComfyUI's events at 1,000 a second to a webhook, while one client runs the prompts that cause them."""
    numbers, values, prompts = Numbers(), Values("events"), effort.prompts(500)
    with sink() as url:
        settings = {"SYSTEM_WEBHOOK_URL": url, "SYSTEM_WEBHOOK_EVENTS": "all", "URL_ALLOW": "127.0.0.1"}
        with open_contenders(EMBEDDED, Cores.shared_out(), settings) as contenders:
            each: dict[str, float] = {}
            """How many events a prompt causes, by contender: they need not forward the same."""
            for turn, contender, server in contenders.in_turn(effort.rounds):
                before = wait_quiet(url)
                used_s = server.cpu_s()
                total = 50 if turn == 0 else prompts
                load = Load(mode="prompts", url=server.url, graph="tiny", total=total, first=numbers.take(total))
                load.every_s = 0.0 if turn == 0 else each[contender] / _EVENTS_PER_S
                measured = contenders.run(contender, load)
                after = wait_quiet(url)
                if measured is None:
                    continue
                sent = after.taken - before.taken
                if sent == 0:
                    raise RuntimeError(f"{contender} sent no events")
                if turn == 0:
                    each[contender] = sent / total
                    continue
                began_at = measured.ended_at - measured.elapsed_s
                values.add("events, to the last one", contender, sent / (after.last_at - began_at))
                values.add("behind at the end", contender, max(0.0, after.last_at - measured.ended_at) * 1000)
                values.add("processor", contender, (server.cpu_s() - used_s) * 1000 / sent)
                values.add("prompts meanwhile, p99", contender, percentile(measured.latencies_ms, 0.99))
    return [
        values.row("events, to the last one", "per s", Bound(limit=900, at_least=True)),
        values.row("behind at the end", "ms", Bound(limit=100)),
        values.row("processor", "ms/event"),
        values.row("prompts meanwhile, p99", "ms"),
    ]


WEBHOOK_SCENARIOS: Final[dict[str, Callable[[Effort], list[Row]]]] = {"accepted": accepted, "events": events}
