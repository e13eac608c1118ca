"""Finds what holds the event loop up: a step of a task that takes longer than it may, with the stack that shows where.

A *step* is what a task does between two awaits that really wait. While it lasts, no other task, connection or probe
gets its turn. There are two kinds of stall, with a limit each, as they need different machines to be told apart:

- A step that *computes*: processor time of the loop's own thread. That is ours whatever else the machine does, so the
  limit can be narrow, also where several programs share a processor.
- A step that *waits*: wall time, of which little was computed. A blocking call, a disk, a lock, the interpreter's lock
  held by a worker thread. Time in which the step could have run and the system had no processor for it is told apart,
  and not counted, where the system tells it (Linux, Documentation/scheduler/sched-stats.rst, ``schedstat``).

The stack is sampled while the step lasts, by a thread, because once the step has ended its stack is gone. A call into C
that holds the interpreter's lock throughout (a large ``msgspec`` decode) is sampled as soon as it returns: CPython
hands the lock over at the end of that call (``CHECK_EVAL_BREAKER`` after ``CALL``, ceval.c, 3.11 to 3.13), so the line
is right mostly, and where it came too late, the stack is where the task waits next.

For debugging and for tests: see :meth:`StallGuard.before_task_step` for what it costs.
"""

import gc
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_ITERABLE_COROUTINE
from itertools import islice
from types import FrameType
from typing import Final

import attrs
import structlog
import trio

log = structlog.get_logger("comfyd.daemon")

LOOP_FUNCTION: Final = "unrolled_run"
"""Of trio/_core/_run.py (0.35). Outside of it is how the loop was started: the same in every stack."""
WORTH_A_LOOK_S: Final = 0.005
"""After a step of this length the processor's clock is read again: see :meth:`StallGuard.after_task_step`."""
SAMPLE_EVERY_S: Final = 0.01
"""Twice a default switch interval, so that at most half of the samples only wait for the interpreter's lock."""
MAX_SAMPLES: Final = 100
"""A second of them says where a step is; one that never ends should not fill the memory."""
MAX_FRAMES: Final = 60
"""The innermost ones; deeper stacks are those of a recursion."""


@attrs.frozen(kw_only=True)
class StallLimits:
    """How long a step may take: *computing_s* of processor time, *waiting_s* of wall time. Both in seconds."""

    computing_s: float = attrs.field(default=0.05, validator=attrs.validators.gt(0))
    waiting_s: float = attrs.field(default=0.05, validator=attrs.validators.gt(0))

    @property
    def least_s(self) -> float:
        """The wall time below which nothing can be over a limit."""
        return min(self.computing_s, self.waiting_s)


@attrs.frozen(kw_only=True)
class Place:
    """A line of code that was being run, as a stack names it."""

    file: str
    line: int
    function: str
    is_coroutine: bool
    """Whether it could have given way: the innermost one that could is who held the loop up."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


@attrs.frozen(kw_only=True)
class Stall:
    """A step that took longer than it may."""

    task: str
    wall_s: float
    computed_s: float
    """Processor time of the step, at least; without *collected_s*."""
    collected_s: float
    """Wall time that the garbage collector took within it: a matter of how much there is, not of this task."""
    queued_s: float
    """In which it could have run and other programs had the processor: since the first sample, so mostly all of it."""
    stack: tuple[Place, ...]
    """Outermost first. The one that was seen most often, or, without samples, where the task waits next."""
    samples: int
    """How often the step was looked at; 0 says that *stack* is not from within it."""

    def __str__(self) -> str:
        where = f"of {self.samples} samples most often" if self.samples else "not sampled; it waits next"
        lines = "".join(f"\n    {place}" for place in self.stack)
        return (
            f"{self.task}: {self.wall_s * 1000:.0f} ms, of which {self.computed_s * 1000:.0f} ms computed,"
            f" {self.collected_s * 1000:.0f} ms collected garbage, {self.queued_s * 1000:.0f} ms without a processor;"
            f" {where}:{lines}"
        )


@attrs.frozen(kw_only=True)
class _Samples:
    """The stacks that were seen of the step that began at *began_at*."""

    began_at: float
    queued_s: float = 0.0
    """What the thread had been queued for in all at the first look."""
    stacks: list[tuple[Place, ...]] = attrs.field(factory=list)


@attrs.define(eq=False)
class StallGuard(trio.abc.Instrument):
    """Calls *report* for each step over a limit, after it, on the loop's thread: it must be quick and must not raise.

    Give it to :func:`trio.run` as an instrument, one guard for one run. Its thread lives as long as the run does.
    """

    report: Callable[[Stall], None]
    limits: StallLimits = attrs.field(factory=StallLimits)

    _began_at: float = attrs.field(default=0.0, init=False)
    """When the present step began, by ``perf_counter``; 0 between steps. Written by the loop, read by the watcher."""
    _marked_at: float = attrs.field(default=0.0, init=False)
    _marked_cpu_s: float = attrs.field(default=0.0, init=False)
    """The loop's processor time at *_marked_at*."""
    _collecting_since: float = attrs.field(default=0.0, init=False)
    _collected_s: float = attrs.field(default=0.0, init=False)
    """By the garbage collector, since *_marked_at*."""
    _samples: _Samples = attrs.field(factory=lambda: _Samples(began_at=0.0), init=False)
    _thread_id: int = attrs.field(default=0, init=False)
    _schedstat: int | None = attrs.field(default=None, init=False)
    _ended: threading.Event = attrs.field(factory=threading.Event, init=False)
    _watcher: threading.Thread | None = attrs.field(default=None, init=False)

    def before_run(self) -> None:
        """Begin to watch the thread that calls."""
        self._thread_id = threading.get_ident()
        with suppress(OSError):  # a system without it: then nothing is subtracted
            self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        gc.callbacks.append(self._collecting)
        self._watcher = threading.Thread(target=self._watch, name="stall-guard", daemon=True)
        self._watcher.start()

    def after_run(self) -> None:
        """Stop watching."""
        gc.callbacks.remove(self._collecting)
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()
        if self._schedstat is not None:
            os.close(self._schedstat)

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002  # the base class has it
        """Read the processor's clock once for all the steps of this turn."""
        self._mark(time.perf_counter())

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002  # as above
        """Note when the step begins.

        With :meth:`after_task_step` that costs 2 microseconds a step, most of which is Trio's calling them. The
        clock of the thread's processor time is not read here: that is a system call, as dear as all the rest.
        """
        self._began_at = time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """See how long the step took.

        Its processor time is what the thread took since the last look at that clock, less the time in which the steps
        in between ran; of those none was long, as after a long one the clock is read again.
        """
        ended_at = time.perf_counter()
        began_at = self._began_at
        self._began_at = 0.0
        wall_s = ended_at - began_at
        if wall_s < WORTH_A_LOOK_S:
            return
        if wall_s >= self.limits.least_s and began_at:  # 0 if it began before the guard was there
            collected_s = self._collected_s
            since_mark_s = time.thread_time() - self._marked_cpu_s
            computed_s = max(0.0, since_mark_s - (began_at - self._marked_at) - collected_s)
            samples = self._samples if self._samples.began_at == began_at else None
            queued_s = 0.0 if samples is None else self._queued_s() - samples.queued_s
            waited_s = wall_s - collected_s - queued_s
            if computed_s >= self.limits.computing_s or waited_s >= self.limits.waiting_s:
                stacks = [] if samples is None else samples.stacks
                stall = Stall(
                    task=task.name,
                    wall_s=wall_s,
                    computed_s=computed_s,
                    collected_s=collected_s,
                    queued_s=queued_s,
                    stack=Counter(stacks).most_common(1)[0][0] if stacks else _where_it_waits(task),
                    samples=len(stacks),
                )
                self.report(stall)
        self._mark(time.perf_counter())

    def _mark(self, now: float) -> None:
        self._collected_s = 0.0
        self._marked_at = now
        self._marked_cpu_s = time.thread_time()

    def _queued_s(self) -> float:
        """Return for how long in all the loop's thread could have run without being given a processor."""
        if self._schedstat is None:
            return 0.0
        _ran_ns, queued_ns, _slices = os.pread(self._schedstat, 100, 0).split()
        return int(queued_ns) / 1e9

    def _collecting(self, phase: str, _info: dict[str, int]) -> None:
        """Measure the garbage collector; it runs in whichever thread made the last object too many."""
        if threading.get_ident() != self._thread_id:
            return
        now = time.perf_counter()
        if phase == "start":
            self._collecting_since = now
        else:
            self._collected_s += now - self._collecting_since

    def _watch(self) -> None:
        """Look at the loop's stack for as long as a step goes on. In a thread."""
        # From half of the limit on: a stack of what only just got over the limit is wanted too.
        patience_s = self.limits.least_s / 2
        while not self._ended.wait(min(SAMPLE_EVERY_S, patience_s)):
            began_at = self._began_at
            if not began_at or time.perf_counter() - began_at < patience_s:
                continue
            frame = sys._current_frames().get(self._thread_id)
            if frame is None:
                continue
            stack = _stack_of(frame)
            if self._samples.began_at != began_at:
                self._samples = _Samples(began_at=began_at, queued_s=self._queued_s())
            # A step that ended meanwhile is not to blame for what the loop does now.
            if self._began_at == began_at and len(self._samples.stacks) < MAX_SAMPLES:
                self._samples.stacks.append(stack)


def log_stall(stall: Stall) -> None:
    """Tell the log: what a guard of the daemon reports to. Paths and names only, nothing of what was being handled."""
    log.warning(
        "daemon.loop_stalled",
        task=stall.task,
        wall_s=round(stall.wall_s, 3),
        computed_s=round(stall.computed_s, 3),
        collected_s=round(stall.collected_s, 3),
        queued_s=round(stall.queued_s, 3),
        samples=stall.samples,
        stack=[str(place) for place in stall.stack],
    )


def _stack_of(innermost: FrameType) -> tuple[Place, ...]:
    """Name the lines from Trio's loop inwards; outermost first."""
    places: list[Place] = []
    frame: FrameType | None = innermost
    while frame is not None and len(places) < MAX_FRAMES:
        if frame.f_code.co_name == LOOP_FUNCTION:
            break
        places.append(_place(frame))
        frame = frame.f_back
    return tuple(reversed(places))


def _where_it_waits(task: trio.lowlevel.Task) -> tuple[Place, ...]:
    """Name the awaits of a task that is suspended; nothing for one that has ended."""
    frames = islice(task.iter_await_frames(), MAX_FRAMES)
    return tuple(_place(frame) for frame, _ in frames)


def _place(frame: FrameType) -> Place:
    code = frame.f_code
    return Place(
        file=code.co_filename,
        line=frame.f_lineno or 0,  # None for what the compiler added
        function=code.co_qualname,
        is_coroutine=bool(code.co_flags & (CO_COROUTINE | CO_ASYNC_GENERATOR | CO_ITERABLE_COROUTINE)),
    )
