"""A step that holds the loop up is reported, with the line where; what only takes its turn is not."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from structlog.testing import LogCapture

from comfyd.host.stall_guard import Stall, StallGuard, StallLimits, log_stall

LIMITS = StallLimits(computing_s=0.05, waiting_s=0.1)
HERE = __file__


def stalls_of(async_fn: Callable[[], Awaitable[None]], *, limits: StallLimits = LIMITS) -> list[Stall]:
    """Run *async_fn* in a loop of its own under a guard; return what that reported."""
    found: list[Stall] = []
    trio.run(async_fn, instruments=[StallGuard(found.append, limits)])
    return found


def compute(seconds: float) -> None:
    """Use up the thread's processor time, whatever else the machine does."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def functions_of(stall: Stall) -> list[str]:
    return [place.function for place in stall.stack if place.file == HERE]


def test_a_step_that_computes_too_long_is_reported_with_the_stack_of_where_it_computed() -> None:
    async def step() -> None:
        await trio.lowlevel.checkpoint()
        compute(0.12)
        await trio.lowlevel.checkpoint()

    [stall] = stalls_of(step)

    assert functions_of(stall)[-1] == "compute"
    assert functions_of(stall)[0].endswith("step")
    assert stall.computed_s >= 0.115
    assert stall.wall_s >= stall.computed_s
    assert stall.samples >= 1
    assert "step" in stall.task


def test_a_blocking_call_is_reported_as_wall_time_of_which_nothing_was_computed() -> None:
    async def step() -> None:
        time.sleep(0.3)  # noqa: ASYNC251  # the very mistake

    [stall] = stalls_of(step)

    assert stall.wall_s >= 0.3
    assert stall.computed_s < 0.05
    assert functions_of(stall)[-1].endswith("step")


def test_a_blocking_call_within_its_own_limit_is_not_reported_though_it_is_over_the_limit_for_computing() -> None:
    async def step() -> None:
        time.sleep(0.08)  # noqa: ASYNC251

    assert stalls_of(step, limits=StallLimits(computing_s=0.05, waiting_s=30.0)) == []


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="the kernel does not tell")
def test_a_step_that_others_keep_from_the_processor_is_not_held_responsible_for_that() -> None:
    took_s = 0.0

    async def step() -> None:
        nonlocal took_s
        began_at = time.perf_counter()
        compute(0.15)
        took_s = time.perf_counter() - began_at

    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})  # of this thread; what it starts inherits it
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(5)]
    try:
        stalls = stalls_of(step, limits=StallLimits(computing_s=30.0, waiting_s=0.3))
    finally:
        os.sched_setaffinity(0, everywhere)
        for process in busy:
            process.kill()
            process.wait()

    assert took_s > 0.4, "nobody kept it from the processor, so this test means nothing"
    assert stalls == []


def test_waiting_in_the_loop_is_not_a_stall() -> None:
    async def wait() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(trio.sleep, 0.3)
            await trio.to_thread.run_sync(time.sleep, 0.3)

    assert stalls_of(wait) == []


def test_many_short_steps_in_one_turn_of_the_loop_are_not_taken_for_a_long_one() -> None:
    async def short() -> None:
        compute(0.004)

    async def all_at_once() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(short)

    assert stalls_of(all_at_once, limits=StallLimits(computing_s=0.05, waiting_s=30.0)) == []


def test_two_stalls_in_one_turn_of_the_loop_are_told_apart() -> None:
    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(compute_in_step, 0.07), name="first")
            nursery.start_soon(partial(compute_in_step, 0.14), name="second")

    async def compute_in_step(seconds: float) -> None:
        compute(seconds)

    found = {stall.task: stall.computed_s for stall in stalls_of(both)}

    assert found.keys() == {"first", "second"}
    assert 0.065 <= found["first"] < 0.1
    assert 0.135 <= found["second"] < 0.18


def test_a_call_into_c_that_holds_the_interpreters_lock_is_reported_at_its_line() -> None:
    whole = list(range(3_000_000))

    async def step() -> None:
        for _ in range(3):
            sum(whole)
            sorted(whole, key=float)
        await trio.lowlevel.checkpoint()

    [stall] = stalls_of(step)

    assert functions_of(stall)[-1].endswith("step")
    assert stall.computed_s >= 0.05


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="uses CPython's garbage collector")
def test_what_the_garbage_collector_takes_is_told_and_not_held_against_the_step() -> None:
    garbage = [[number] for number in range(600_000)]

    async def step() -> None:
        for _ in range(8):
            gc.collect()

    found: list[Stall] = []
    began = time.perf_counter()
    trio.run(step, instruments=[StallGuard(found.append, StallLimits(computing_s=0.05, waiting_s=30.0))])
    assert time.perf_counter() - began > 0.05, "there was too little garbage for this test to mean anything"
    assert found == []
    assert garbage


def test_where_nothing_was_sampled_the_stack_is_where_the_task_waits_next() -> None:
    found: list[Stall] = []

    async def blind() -> None:
        trio.lowlevel.add_instrument(Unwatched(found.append, LIMITS))
        await trio.lowlevel.checkpoint()
        compute(0.08)
        await where_it_went_on()

    async def where_it_went_on() -> None:
        await trio.lowlevel.checkpoint()

    trio.run(blind)

    [stall] = found
    assert stall.samples == 0
    assert any(name.endswith("where_it_went_on") for name in functions_of(stall))


class Unwatched(StallGuard):
    """A guard whose thread never gets its turn."""

    def before_run(self) -> None:
        """Start nothing."""

    def after_run(self) -> None:
        """Stop nothing."""


def test_a_guard_leaves_no_thread_and_no_callback_behind_also_when_the_run_fails() -> None:
    async def fail() -> None:
        raise KeyError("on purpose")

    callbacks = list(gc.callbacks)
    with pytest.raises(KeyError):
        stalls_of(fail)

    assert [thread.name for thread in threading.enumerate() if thread.name == "stall-guard"] == []
    assert gc.callbacks == callbacks


def test_a_guard_of_one_loop_does_not_blame_it_for_what_another_thread_computes() -> None:
    async def beside() -> None:
        await trio.to_thread.run_sync(compute, 0.3)

    assert stalls_of(beside, limits=StallLimits(computing_s=0.05, waiting_s=30.0)) == []


@pytest.mark.parametrize("limit", ["computing_s", "waiting_s"])
def test_a_limit_of_nothing_is_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=limit):
        StallLimits(**{limit: 0.0})


def test_a_stall_reads_as_a_sentence_and_a_stack() -> None:
    async def step() -> None:
        compute(0.08)

    [stall] = stalls_of(step)
    first, *places = str(stall).splitlines()

    assert " ms, of which " in first
    assert any(place.strip().startswith(HERE) and "compute" in place for place in places)


def test_a_stall_is_logged_with_its_durations_and_its_stack(log_output: LogCapture) -> None:
    async def step() -> None:
        compute(0.08)

    trio.run(step, instruments=[StallGuard(log_stall, LIMITS)])

    [entry] = log_output.entries
    assert (entry["event"], entry["log_level"]) == ("daemon.loop_stalled", "warning")
    assert entry["computed_s"] >= 0.07
    assert entry["wall_s"] >= entry["computed_s"]
    assert any("compute" in place for place in entry["stack"])
