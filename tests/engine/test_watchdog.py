"""Which engine is taken for hung, and which is not, whatever it does not do; and what becomes of the prompt in it."""

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
import trio
import trio.lowlevel
from daemon_support import faulty, free_port, picture
from engine_kit import ScriptedClient, bring_up, event, whole_run
from process_support import PROGRAMS, Family, Lines, opened, program
from structlog.testing import LogCapture
from trio.testing import MockClock

from comfyd.config import EngineConfig, RestartPolicy
from comfyd.engine import Completed, Engine, EngineEvent, EngineState, Execution, Submission
from comfyd.engine.activity import Snapshot, Work, read_oom_kills, read_snapshot
from comfyd.engine.client import EngineClient
from comfyd.engine.output import OutputLine
from comfyd.engine.supervisor import SupervisorConfig, supervise_engine
from comfyd.engine.watchdog import (
    WAITING_FACTOR,
    WatchdogTimes,
    WorkerObituary,
    serve_watchdog,
    serve_worker_watch,
)
from comfyd.errors import EngineError, EngineHung, EngineLost, EngineWorkerDied

TIMES = WatchdogTimes(hang_timeout_s=120.0)
LATE_S = 160.0
"""By then an engine without any sign of life is hung: the time-out, a first look, and what questions take."""
GRAPH = {"3": {"class_type": "KSampler", "inputs": {}}}


# --- the truth table, on a virtual clock


class Client(ScriptedClient):
    """One that tells what it is, too."""

    async def system_stats(self) -> dict[str, Any]:
        await self._called("system_stats", "")
        return {}


@attrs.define(eq=False)
class Bench:
    """An engine that is up, with scripted processes, under the watchdog. *busy* is what they do in each second."""

    engine: Engine = attrs.field(factory=lambda: Engine(name="engine-1"))
    client: Client = attrs.field(factory=Client)
    busy: Work = attrs.field(factory=Work)
    wants: bool = False
    error: EngineError | None = None
    hung_at: float = 0.0
    result: Execution | EngineLost | None = None
    samples: int = 0

    async def sample(self) -> Snapshot:
        await trio.lowlevel.checkpoint()
        self.samples += 1
        now = trio.current_time()
        work = Work(
            cpu_s=now * self.busy.cpu_s, io_bytes=int(now * self.busy.io_bytes), faults=int(now * self.busy.faults)
        )
        return Snapshot(done={(1, 1): work}, wants=self.wants)

    async def watch(self, times: WatchdogTimes = TIMES) -> None:
        try:
            await serve_watchdog(self.engine, cast("EngineClient", self.client), self.sample, times)
        except EngineHung as exc:
            self.error, self.hung_at = exc, trio.current_time()

    async def execute(self, prompt_id: str = "p") -> None:
        try:
            submission = Submission(graph=GRAPH, extra_data={}, prompt_id=prompt_id)
            self.result = await self.engine.execute(submission, lambda _: None)
        except EngineLost as exc:
            self.result = exc


@asynccontextmanager
async def watched(bench: Bench, *, prompt: bool = True) -> AsyncIterator[trio.Nursery]:
    """Run the watchdog; with *prompt*, one is in the engine and its node 3 has begun."""
    bring_up(bench.engine, bench.client)
    async with trio.open_nursery() as nursery:
        if prompt:
            nursery.start_soon(bench.execute)
            await trio.testing.wait_all_tasks_blocked()
            bench.engine.received(event("execution_start"))
            bench.engine.received(event("executing", node="3"))
        nursery.start_soon(bench.watch)
        await trio.testing.wait_all_tasks_blocked()
        try:
            yield nursery
        finally:  # a cancelled one would be withdrawn first, for which a clock must run
            for attempt in bench.engine.attempts:
                attempt.lose("the test is over")
        nursery.cancel_scope.cancel("the test is over")


async def test_a_prompt_without_any_sign_of_life_in_a_silent_engine_hangs(
    autojump_clock: MockClock, log_output: LogCapture
) -> None:
    bench = Bench()
    bench.client.silent = {"queue"}
    async with watched(bench):
        await trio.sleep(115)
        assert bench.engine.up
        await trio.sleep(LATE_S - 115)
    assert isinstance(bench.error, EngineHung)
    assert str(bench.error) == (
        "the engine hung: no event, no HTTP answer and no CPU time for 120 s while prompt p ran node 3 (KSampler)"
    )
    assert isinstance(bench.result, EngineLost)
    assert (bench.result.cause, str(bench.result)) == ("hung", str(bench.error))
    assert bench.engine.state is EngineState.DOWN
    (logged,) = [entry for entry in log_output.entries if entry["event"] == "engine.hung"]
    assert logged["log_level"] == "error"
    assert {key: logged[key] for key in ("http", "prompt_id", "node_id", "node_type", "cpu_s")} == {
        "http": "silent",
        "prompt_id": "p",
        "node_id": "3",
        "node_type": "KSampler",
        "cpu_s": 0.0,
    }
    assert logged["quiet_s"] == pytest.approx(120)


async def test_a_zombie_that_answers_is_interrupted_first_and_then_ended(autojump_clock: MockClock) -> None:
    bench = Bench()
    async with watched(bench):
        await trio.sleep(LATE_S)
    assert isinstance(bench.error, EngineHung)
    assert str(bench.error).endswith("(KSampler), though it answers over HTTP")
    assert bench.error.evidence["http"] == "answers"
    assert bench.client.methods == ["submit", "queue", "interrupt"]
    assert isinstance(bench.result, EngineLost)
    assert bench.result.cause == "hung"


async def test_a_prompt_that_an_interrupt_ends_is_lost_and_the_engine_goes_on(autojump_clock: MockClock) -> None:
    bench = Bench()
    async with watched(bench):
        await bench.client.wait_called("interrupt")
        bench.engine.received(event("execution_interrupted"))
        bench.engine.received(event("executing", node=None))
        await trio.sleep(1)
        assert isinstance(bench.result, EngineLost)
        assert bench.result.cause == "hung"
        assert "node 3 (KSampler)" in str(bench.result)
        assert bench.engine.up
        await trio.sleep(1000)
    assert bench.error is None


async def test_a_prompt_that_succeeds_while_it_is_given_up_has_succeeded(autojump_clock: MockClock) -> None:
    bench = Bench()
    async with watched(bench):
        await bench.client.wait_called("interrupt")
        for one in whole_run():
            bench.engine.received(one)
        await trio.sleep(1)
    assert isinstance(bench.result, Completed)
    assert bench.error is None


async def test_an_event_that_comes_while_the_queue_is_asked_for_is_a_sign_of_life(autojump_clock: MockClock) -> None:
    bench = Bench()
    bench.client.silent = {"queue"}
    async with watched(bench):
        await bench.client.wait_called("queue")
        bench.engine.received(event("progress", value=1, max=2))
        await trio.sleep(100)
        assert bench.error is None
        assert bench.result is None
        assert "interrupt" not in bench.client.methods


async def test_a_prompt_that_moves_on_when_interrupted_is_no_reason_to_end_the_engine(
    autojump_clock: MockClock,
) -> None:
    bench = Bench()
    async with watched(bench):
        await bench.client.wait_called("interrupt")
        bench.engine.received(event("progress", value=1, max=2))
        await trio.sleep(60)
        assert bench.engine.up
        assert bench.engine.attempts, "it still runs"
        bench.engine.received(event("execution_interrupted"))
        bench.engine.received(event("executing", node=None))
        await trio.sleep(1)
        assert isinstance(bench.result, EngineLost)
        assert bench.result.cause == "hung", "it was us who interrupted it"
    assert bench.error is None


@pytest.mark.parametrize(
    "busy",
    [
        Work(cpu_s=1.0),
        Work(cpu_s=0.01),  # a node that mostly waits for its GPU
        Work(io_bytes=20_000),
        Work(faults=3),
    ],
)
async def test_a_silent_prompt_whose_processes_work_is_no_hang_and_asks_for_no_request(
    autojump_clock: MockClock, busy: Work
) -> None:
    bench = Bench(busy=busy)
    bench.client.silent = {"queue", "system_stats", "interrupt"}
    async with watched(bench):
        await trio.sleep(3600)
        assert bench.client.methods == ["submit"]
    assert bench.error is None


async def test_what_an_engine_at_rest_uses_is_no_sign_of_life(autojump_clock: MockClock) -> None:
    bench = Bench(busy=Work(cpu_s=0.0005, io_bytes=100, faults=0))
    async with watched(bench):
        await trio.sleep(LATE_S)
    assert isinstance(bench.error, EngineHung)


@pytest.mark.parametrize("sign", [event("progress", value=1, max=2), event("a_custom_nodes_own", None), b"preview"])
async def test_whatever_a_prompt_sends_now_and_then_is_a_sign_of_life(
    autojump_clock: MockClock, sign: EngineEvent | bytes
) -> None:
    bench = Bench()
    bench.client.silent = {"queue"}
    async with watched(bench):
        for _ in range(20):
            await trio.sleep(110)
            if isinstance(sign, bytes):
                bench.engine.received_binary(sign)
            else:
                bench.engine.received(sign)
    assert bench.error is None


@pytest.mark.parametrize("kind", ["status", "crystools.monitor"])
async def test_what_an_engine_sends_without_a_worker_is_no_sign_of_a_prompts_life(
    autojump_clock: MockClock, kind: str
) -> None:
    bench = Bench()
    async with watched(bench) as nursery:

        async def chatter() -> None:
            while True:
                bench.engine.received(event(kind, None))
                await trio.sleep(1)

        nursery.start_soon(chatter)
        await trio.sleep(LATE_S)
    assert isinstance(bench.error, EngineHung)


async def test_a_thread_that_waits_for_a_disk_is_life_but_not_for_ever(autojump_clock: MockClock) -> None:
    bench = Bench(wants=True)
    async with watched(bench):
        await trio.sleep(WAITING_FACTOR * 120)
        assert bench.error is None
        await trio.sleep(LATE_S)
    assert isinstance(bench.error, EngineHung)


async def test_a_prompt_that_the_queue_does_not_have_any_more_is_asked_after_and_is_no_hang(
    autojump_clock: MockClock,
) -> None:
    bench = Bench()
    async with watched(bench):
        await trio.sleep(60)
        bench.client.end("p")  # and the event that told it was lost
        await trio.sleep(LATE_S - 60)
        assert isinstance(bench.result, Completed)
    assert bench.error is None


async def test_a_prompt_that_the_worker_never_takes_is_not_interrupted_in_vain(autojump_clock: MockClock) -> None:
    bench = Bench()
    async with watched(bench):
        bench.client.running, bench.client.pending = set(), {"p"}
        await trio.sleep(LATE_S)
    assert isinstance(bench.error, EngineHung)
    assert "interrupt" not in bench.client.methods


async def test_the_quiet_of_one_prompt_is_not_held_against_the_next(autojump_clock: MockClock) -> None:
    bench = Bench()
    async with watched(bench) as nursery:
        await trio.sleep(110)
        bench.engine.attempts[0].lose("forgotten")
        await trio.lowlevel.checkpoint()
        bench.client.running.clear()
        nursery.start_soon(bench.execute, "another")
        await trio.sleep(110)
        assert bench.error is None
        await trio.sleep(50)
    assert isinstance(bench.error, EngineHung)


async def test_an_engine_at_rest_is_asked_twice_a_minute_and_its_processes_are_not_looked_at(
    autojump_clock: MockClock,
) -> None:
    bench = Bench()
    async with watched(bench, prompt=False):
        await trio.sleep(3601)
    assert bench.client.methods == ["queue"] * 120
    assert bench.samples == 0
    assert bench.error is None


async def test_an_engine_at_rest_that_answers_nothing_and_does_nothing_hangs(autojump_clock: MockClock) -> None:
    bench = Bench()
    bench.client.silent = {"queue", "system_stats"}
    async with watched(bench, prompt=False):
        await trio.sleep(2 * 120)
    assert isinstance(bench.error, EngineHung)
    assert str(bench.error) == ("the engine hung: no event, no HTTP answer and no CPU time for 120 s while it was idle")
    assert bench.hung_at >= 120


async def test_an_engine_at_rest_that_answers_one_route_or_computes_is_well(autojump_clock: MockClock) -> None:
    broken = Bench()
    broken.client.failing = {"queue"}
    computing = Bench(busy=Work(cpu_s=0.9))
    computing.client.silent = {"queue", "system_stats"}
    for bench in (broken, computing):
        async with watched(bench, prompt=False):
            await trio.sleep(3600)
        assert bench.error is None


async def test_a_leap_of_the_clock_counts_as_one_look(mock_clock: MockClock) -> None:
    bench = Bench()
    bench.client.silent = {"queue"}
    async with watched(bench):
        for _ in range(6):
            mock_clock.jump(3600)
            await trio.testing.wait_all_tasks_blocked()
        assert bench.error is None
        assert bench.samples == 6


# --- the worker thread

TRACEBACK = (
    "Exception in thread Thread-5 (prompt_worker):",
    "Traceback (most recent call last):",
    '  File "/usr/lib/python3.11/threading.py", line 1045, in _bootstrap_inner',
    "    self.run()",
    '  File "/srv/ComfyUI/comfy_execution/caching.py", line 142, in get_node_signature',
    "KeyError: 'inputs'",
)


def died(obituary: WorkerObituary) -> None:
    for text in TRACEBACK:
        obituary.hear(OutputLine(stream="stderr", text=text))


@pytest.mark.parametrize("prompt", [True, False])
async def test_a_dead_worker_thread_ends_the_engine_within_two_seconds(
    autojump_clock: MockClock, log_output: LogCapture, prompt: bool
) -> None:
    bench, obituary = Bench(), WorkerObituary()
    async with watched(bench, prompt=prompt):
        await trio.sleep(50)
        died(obituary)
        with trio.fail_after(2), pytest.raises(EngineWorkerDied, match=r"worker thread died: KeyError: 'inputs'$"):
            await serve_worker_watch(bench.engine, obituary, bench.sample)
        await trio.testing.wait_all_tasks_blocked()
        assert bench.engine.last_cause == "worker-died"
        if prompt:
            assert isinstance(bench.result, EngineLost)
            assert bench.result.cause == "worker-died"
    assert [entry["log_level"] for entry in log_output.entries if entry["event"] == "engine.worker_died"] == ["error"]


async def test_a_worker_whose_death_is_only_text_goes_on(autojump_clock: MockClock) -> None:
    bench, obituary = Bench(), WorkerObituary()
    async with watched(bench) as nursery:
        nursery.start_soon(serve_worker_watch, bench.engine, obituary, bench.sample)
        for _ in range(2):
            died(obituary)
            await trio.sleep(0.5)
            bench.engine.received(event("progress", value=1, max=2))
            await trio.sleep(10)
            assert bench.engine.up


async def test_a_death_is_not_believed_while_the_processes_compute_but_for_ten_seconds(
    autojump_clock: MockClock,
) -> None:
    bench, obituary = Bench(busy=Work(cpu_s=1.0)), WorkerObituary()
    async with watched(bench):
        died(obituary)
        with trio.fail_after(10), pytest.raises(EngineWorkerDied):
            await serve_worker_watch(bench.engine, obituary, bench.sample)
        assert trio.current_time() > 7


def test_only_the_workers_thread_counts() -> None:
    obituary = WorkerObituary()
    for text in (
        "Exception in thread Thread-3 (monitor):",
        "it said: Exception in thread Thread-5 (prompt_worker):",
        "Traceback (most recent call last):",
        "KeyError: 'inputs'",
    ):
        obituary.hear(OutputLine(stream="stderr", text=text))
    assert not obituary.died.is_set()


# --- what the kernel says


async def test_the_work_of_an_engine_and_of_all_that_it_started_is_seen(tmp_path: Path) -> None:
    burner = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
    script = (
        "import subprocess, sys, time, pathlib\n"
        f"child = [sys.executable, '-S', '-c', {burner + 'time.sleep(100)'!r}]\n"
        "detach = f'import subprocess; subprocess.Popen({child!r}, start_new_session=True)'\n"
        "subprocess.run([sys.executable, '-S', '-c', detach], check=True)\n"
        "open('/dev/zero', 'rb').read(1 << 20)\n"
        "print('ready', flush=True)\n"
        "time.sleep(100)\n"
    )
    lines = Lines()
    config = Family().config(*program("show_self")[:2], "-c", script)
    async with opened(config, lines) as process:
        await lines.wait_for("ready")
        while True:
            snapshot = read_snapshot(process.pid)
            if sum(work.cpu_s for work in snapshot.done.values()) >= 0.2:
                break
            await trio.sleep(0.01)  # the process burns CPU meanwhile; /proc cannot be waited for
        assert len(snapshot.done) == 2, "the engine, and a grandchild that left its session; not the guard"
        assert snapshot.since(Snapshot(done={})).io_bytes >= 1 << 20
        assert all(value >= 0 for value in attrs.astuple(read_snapshot(process.pid).since(snapshot)))
    assert read_snapshot(process.pid) == Snapshot(done={})


def test_the_kernels_count_of_killed_processes_is_a_number_where_it_is_told() -> None:
    kills = read_oom_kills()
    assert kills is None or kills >= 0
    assert kills is not None or not Path("/proc/vmstat").exists()


# --- real engines that misbehave

HANG_S = 1.2


@attrs.define(eq=False)
class Life:
    """A supervised embedded engine in processes of its own, and the log of its supervisor."""

    engine: Engine
    log: LogCapture

    async def run(self, graph: dict[str, Any], observe: Callable[[EngineEvent], None] = lambda _: None) -> Execution:
        with trio.fail_after(20):
            await self.engine.wait_up()
            return await self.engine.execute(Submission(graph=graph, extra_data={}), observe)

    async def lost(self, graph: dict[str, Any], observe: Callable[[EngineEvent], None] = lambda _: None) -> EngineLost:
        with pytest.raises(EngineLost) as caught:
            await self.run(graph, observe)
        return caught.value

    def stop(self) -> None:
        """Stop the engine's process, as a debugger or an operator does."""
        os.kill(self.pid, signal.SIGSTOP)

    def find(self, name: str) -> list[Any]:
        return [entry for entry in self.log.entries if entry["event"] == name]

    @property
    def pid(self) -> int:
        return int(self.find("engine.started")[-1]["pid"])


@asynccontextmanager
async def supervised(folder: Path, log: LogCapture, *, hang_timeout_s: float = HANG_S) -> AsyncIterator[Life]:
    """Keep a flaky engine running, and at the end see that no process is left."""
    family, port = Family(), free_port()
    config = EngineConfig(
        argv=(sys.executable, str(PROGRAMS / "flaky_engine.py")),
        cwd=folder,
        home=folder,
        port=port,
        input_dir=folder / "input",
        output_dir=folder / "output",
        model_dir=folder / "models",
        start_max_tries=20,
        always_restart=True,
        stop_grace_s=0.5,
        restart=RestartPolicy(first_delay_s=0.05),
    )
    env = {
        **family.env(),
        "DIRECT_ADDRESS": "127.0.0.1",
        "COMFYUI_PORT_HOST": str(port),
        "INPUT_DIR": str(config.input_dir),
        "OUTPUT_DIR": str(config.output_dir),
    }
    settings = SupervisorConfig(engine=config, env=lambda _: env, hang_timeout_s=hang_timeout_s)
    gave_up: list[Exception] = []
    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            engine: Engine = await nursery.start(supervise_engine, settings, gave_up.append)
            await engine.wait_up()
            yield Life(engine, log)
            nursery.cancel_scope.cancel("the test is over")
    assert gave_up == []
    assert list(family.alive()) == []


async def test_an_engine_that_is_stopped_by_a_signal_is_restarted_with_or_without_a_prompt(
    tmp_path: Path, log_output: LogCapture
) -> None:
    async with supervised(tmp_path, log_output) as life:
        life.stop()
        while life.engine.processes < 2:  # idle
            await life.engine.wait_changed()
        assert isinstance(await life.run(picture()), Completed)

        def stop_at_the_first_node(heard: EngineEvent) -> None:
            if heard.type == "executing":
                life.stop()

        loss = await life.lost(picture(seconds=60), stop_at_the_first_node)
        assert loss.cause == "hung"
        assert isinstance(await life.run(picture()), Completed)
        assert life.engine.restarts_by_cause == {"hung": 2}
        idle, busy = life.find("engine.hung")
        assert (idle["http"], "prompt_id" in idle) == ("silent", False)
        assert (busy["http"], "prompt_id" in busy) == ("silent", True)


async def test_an_engine_whose_server_is_deadlocked_is_restarted(tmp_path: Path, log_output: LogCapture) -> None:
    async with supervised(tmp_path, log_output) as life:
        loss = await life.lost(faulty({"hang": "block", "times": 1}))
        assert loss.cause == "hung"
        assert "no HTTP answer" in str(loss)
        assert isinstance(await life.run(picture()), Completed)


@pytest.mark.parametrize("work", ["burn", "read"])
async def test_an_engine_that_is_silent_for_long_but_works_is_left_alone(
    tmp_path: Path, log_output: LogCapture, work: str
) -> None:
    async with supervised(tmp_path, log_output) as life:
        assert isinstance(await life.run(faulty({"hang": work, "hang_s": 3 * HANG_S})), Completed)
        assert life.engine.processes == 1
        assert life.find("engine.hung") == []


async def test_a_node_that_only_waits_is_interrupted_or_else_ended_with_its_engine(
    tmp_path: Path, log_output: LogCapture
) -> None:
    """What cannot be told from a hang; and one that no interrupt reaches is a zombie's image."""
    async with supervised(tmp_path, log_output) as life:
        loss = await life.lost(picture(seconds=60))
        assert loss.cause == "hung"
        assert "(Sleep), though it answers over HTTP" in str(loss)
        assert isinstance(await life.run(picture()), Completed)
        assert life.engine.processes == 1, "the interrupt was enough"
        loss = await life.lost(picture(seconds=60, uninterruptible=True))
        assert loss.cause == "hung"
        assert isinstance(await life.run(picture()), Completed)
        assert life.engine.processes == 2


async def test_without_a_time_out_a_node_may_wait_for_ever(tmp_path: Path, log_output: LogCapture) -> None:
    async with supervised(tmp_path, log_output, hang_timeout_s=0.0) as life:
        assert isinstance(await life.run(picture(seconds=2 * HANG_S)), Completed)
        assert life.find("engine.hung") == []


async def test_an_engine_whose_worker_dies_is_restarted_long_before_the_time_out(
    tmp_path: Path, log_output: LogCapture
) -> None:
    async with supervised(tmp_path, log_output, hang_timeout_s=120.0) as life:
        text = "\n".join(TRACEBACK) + "\n"
        with trio.fail_after(8):
            loss = await life.lost(faulty({"say": text, "times": 1}, seconds=60, uninterruptible=True))
        assert loss.cause == "worker-died"
        assert loss.last_words[0] == TRACEBACK[0]
        assert loss.last_words[-1] == TRACEBACK[-1]
        assert "/srv" not in "\n".join(loss.last_words)
        assert isinstance(await life.run(picture()), Completed)
        assert life.engine.restarts_by_cause == {"worker-died": 1}


async def test_a_worker_that_only_says_so_and_goes_on_is_believed_by_its_events(
    tmp_path: Path, log_output: LogCapture
) -> None:
    async with supervised(tmp_path, log_output, hang_timeout_s=120.0) as life:
        text = "\n".join(TRACEBACK) + "\n"
        assert isinstance(await life.run(faulty({"say": text, "times": 1}, seconds=0.6)), Completed)
        assert life.engine.processes == 1
