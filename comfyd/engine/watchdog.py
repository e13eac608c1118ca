"""Finds the engine that hangs, from evidence, and ends it.

A long node is no hang: a video encode, a model load, a compile or one step of a slow sampler may send no event for many
minutes, and ComfyUI's server shares the GIL with them, so it may not answer either. Therefore no single sign is enough:

======================= ========================= =================== =================================
prompt in the engine?   events, previews          CPU, disk           HTTP
======================= ========================= =================== =================================
yes: life if            one came                  some was used       (silence is normal, and an answer
                                                                      says nothing of the worker)
no: life if             one came                  some was used       it answers
======================= ========================= =================== =================================

An engine without any of its signs for the whole time-out hangs. That covers the zombie, whose worker thread is dead
while its server answers and its queue says running (ComfyUI#16312): with a prompt, an answer is no sign of life.
Measured on ComfyUI 0.3.64, CPU only, pinged each 10 s and asked for its queue each 5 s: 0 to 1 ticks (10 ms) of CPU in
40 s as a zombie and idle, 2 page faults, 4 KiB read.

What cannot be told from a hang: a node that only waits, for a remote service or in a sleep, without an event for the
whole time-out; and a kernel on a GPU that is waited for without spinning (PyTorch's default spins). Who runs such nodes
sets ``COMFYUI_HANG_TIMEOUT_S`` above their longest silence, or to 0.

Quiet time is counted in looks, not read from a clock: after a suspended machine or a stopped daemon, the gap counts as
one look.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn, TypeAlias

import attrs
import structlog
import trio

from comfyd.engine.activity import Snapshot, Work
from comfyd.engine.attempt import Attempt
from comfyd.engine.client import EngineClient, QueueContent
from comfyd.engine.engine import Engine
from comfyd.engine.output import OutputLine
from comfyd.errors import EngineError, EngineHung, EngineUnavailable, EngineWorkerDied
from comfyd.texts import hide_paths

log = structlog.get_logger("comfyd.engine")

IDLE_SHARE: Final = 0.002
"""Of one core, that an engine at rest may use: eight times what was measured. A monitor in a custom node uses more, and
hides a hang; that is the better mistake."""
QUESTION_CPU_S: Final = 0.02
"""What answering one of our own questions may cost: 2 ms measured, and graphs in the queue can be large."""
IDLE_IO_BYTES: Final = 64 * 1024
"""Between two looks: a log line, a few wake-ups. Any load of a model is far more."""
IDLE_FAULTS: Final = 16
"""Between two looks: pages of an engine at rest that were swapped out."""
WAITING_FACTOR: Final = 5
"""How many time-outs long a thread that waits for a disk or a CPU, and gets nothing done, counts as life. A network
disk may hang for long and come back; behind a dead GPU driver the same state lasts for ever."""

WORKER_TRACEBACK_S: Final = 1.0
"""How long the traceback of a dead worker may take to arrive; it is written at once."""
WORKER_SETTLE_S: Final = 0.25
"""For events that were sent before the worker died: they come by another way than its traceback."""
WORKER_DOUBT_S: Final = 0.75
WORKER_LOOKS: Final = 10

_WORKER_DIED: Final = re.compile(r"^Exception in thread .*\(prompt_worker\):?$")
"""``threading.excepthook`` of CPython 3.10 and later; the thread's target is ``prompt_worker`` (ComfyUI 0.3.64,
main.py). The thread ends by it, always."""
_TRACEBACK_GOES_ON: Final = ("Traceback ", "During handling of", "The above exception", " ", "\t")

Sample: TypeAlias = Callable[[], Awaitable[Snapshot]]
"""Reads what the engine's processes have done so far."""


@attrs.frozen(kw_only=True)
class WatchdogTimes:
    """How patient the watchdog is; all follows from one number, in seconds."""

    hang_timeout_s: float = attrs.field(default=120.0, validator=attrs.validators.gt(0))

    @property
    def look_s(self) -> float:
        """Between two looks."""
        return min(10.0, self.hang_timeout_s / 12)

    @property
    def probe_s(self) -> float:
        """Between two questions to an engine at rest."""
        return min(30.0, self.hang_timeout_s / 4)

    @property
    def answer_s(self) -> float:
        """How long an answer may take."""
        return min(5.0, self.hang_timeout_s / 4)

    @property
    def interrupt_grace_s(self) -> float:
        """How long an interrupted prompt may take to end: works within 0.5 s where it works (E5)."""
        return min(5.0, self.hang_timeout_s)


async def serve_watchdog(engine: Engine, client: EngineClient, sample: Sample, times: WatchdogTimes) -> NoReturn:
    """Look at one life of *engine* until cancelled, or until it hangs.

    A hung prompt is interrupted first, if the engine still answers. Where that works the engine is well, the node was
    not: the prompt's attempt is lost with cause ``hung``, so that its job is run again or given up, and the engine goes
    on. Where it does not, nothing but a restart helps.

    Raises:
        EngineHung: it hangs. Its prompts are lost by then; whoever stops the process is to do so.
    """
    await _Watchdog(engine=engine, client=client, sample=sample, times=times).serve()


@attrs.define(eq=False, kw_only=True)
class _Watchdog:
    engine: Engine
    client: EngineClient
    sample: Sample
    times: WatchdogTimes
    _quiet_s: float = 0.0
    _waiting_s: float = 0.0
    _signs: int = 0
    _prompt_id: str | None = None
    _until_probe_s: float = 0.0
    _questions: int = 0
    _unanswered_s: float = 0.0
    _before: Snapshot | None = None
    _before_at: float = 0.0
    _work: Work = attrs.field(factory=Work)

    async def serve(self) -> NoReturn:
        self._signs = self.engine.signs_of_life
        self._until_probe_s = self.times.probe_s
        while True:
            await trio.sleep(self.times.look_s)
            if self.engine.up:
                await self._look()
                # A sum of many small floats may fall short of the whole by its last digits.
                if self._quiet_s >= self.times.hang_timeout_s - self.times.look_s / 2:
                    await self._judge()

    async def _look(self) -> None:
        attempt = self._attempt()
        prompt_id = attempt.prompt_id if attempt is not None else None
        other_prompt = self._prompt_id is not None and self._prompt_id != prompt_id
        self._prompt_id = prompt_id
        if self._heard() or other_prompt:
            self._calm()
            return
        if attempt is None:
            if self._before is None:  # no doubt so far
                self._until_probe_s -= self.times.look_s
                if self._until_probe_s > 0:
                    return
            self._until_probe_s = self.times.probe_s
            if await self._answers():
                self._calm()
                return
        await self._measure()

    async def _measure(self) -> None:
        """Compare what the processes have done with the look before, and count this look as quiet if it is nothing."""
        now, now_at = await self.sample(), trio.current_time()
        before, since_s = self._before, now_at - self._before_at
        questions, self._questions = self._questions, 0
        unanswered_s, self._unanswered_s = self._unanswered_s, 0.0
        self._before, self._before_at = now, now_at
        if before is None:
            return
        work = now.since(before)
        if not _is_idle(work, since_s, questions):
            self._calm(keep=now)
        elif now.wants and self._waiting_s < WAITING_FACTOR * self.times.hang_timeout_s:
            self._waiting_s += self.times.look_s
        else:
            self._quiet_s += self.times.look_s + unanswered_s
            self._work += work

    async def _judge(self) -> None:
        attempt = self._attempt()
        if attempt is None:
            raise self.engine.failed(self._hung(None, answers=False))
        queue = await self._ask_queue()
        if self._heard() or attempt.ended or attempt.loss is not None:  # while we asked
            self._calm()
            return
        if queue is None:
            raise self.engine.failed(self._hung(attempt, answers=False))
        if attempt.prompt_id not in queue.running | queue.pending:
            log.info("engine.end_missed", engine=self.engine.name, prompt_id=attempt.prompt_id)
            attempt.doubt()  # its runner asks history then
            self._calm()
            return
        hung = self._hung(attempt, answers=True)
        if attempt.prompt_id in queue.running and await self._interrupted(attempt, hung):
            self._calm()
            return
        if self._heard():  # it lives after all; the interrupt, once it works, costs the prompt an attempt
            self._calm()
            return
        raise self.engine.failed(hung)

    async def _interrupted(self, attempt: Attempt, hung: EngineHung) -> bool:
        """Interrupt a prompt, and tell whether it has ended within the grace period."""
        attempt.given_up = hung
        with trio.move_on_after(self.times.interrupt_grace_s):
            try:
                await self.client.interrupt(attempt.prompt_id)
            except EngineUnavailable as exc:
                log.debug("engine.interrupt_unanswered", reason=str(exc), prompt_id=attempt.prompt_id)
                return False
            while not attempt.ended and attempt.loss is None:
                await attempt.changed.wait()
        return attempt.ended

    def _hung(self, attempt: Attempt | None, *, answers: bool) -> EngineHung:
        """Put the evidence into words and log it."""
        evidence: dict[str, Any] = {
            "quiet_s": round(self._quiet_s, 3),
            "http": "answers" if answers else "silent",
            "cpu_s": round(self._work.cpu_s, 3),
            "io_bytes": self._work.io_bytes,
            "page_faults": self._work.faults,
            "processes": len(self._before.done) if self._before is not None else 0,
        }
        doing = "it was idle"
        if attempt is not None:
            doing = f"prompt {attempt.prompt_id} was in it"
            evidence["prompt_id"] = attempt.prompt_id
            if attempt.running_node is not None:
                node_id, node_type = evidence["node_id"], evidence["node_type"] = attempt.running_node
                doing = f"prompt {attempt.prompt_id} ran node {node_id} ({node_type})"
        missing = "no event and no CPU time" if answers else "no event, no HTTP answer and no CPU time"
        though = ", though it answers over HTTP" if answers else ""
        text = f"the engine hung: {missing} for {self.times.hang_timeout_s:g} s while {doing}{though}"
        log.error("engine.hung", engine=self.engine.name, reason=text, **evidence)
        return EngineHung(text, evidence)

    def _attempt(self) -> Attempt | None:
        return next(iter(self.engine.attempts), None)

    def _heard(self) -> bool:
        heard = self.engine.signs_of_life != self._signs
        self._signs = self.engine.signs_of_life
        return heard

    def _calm(self, *, keep: Snapshot | None = None) -> None:
        """There was a sign of life: begin to count anew. *keep* is what the next look compares with."""
        self._quiet_s = self._waiting_s = 0.0
        self._work = Work()
        self._before = keep

    async def _answers(self) -> bool:
        """Whether the engine's server answers anything at all."""
        with trio.move_on_after(self.times.answer_s):
            # A custom node may have broken the one route; a server that answers on the other one lives.
            for question in (self.client.queue, self.client.system_stats):
                self._questions += 1
                try:
                    await question()
                except EngineUnavailable as exc:
                    log.debug("engine.question_unanswered", reason=str(exc))
                    continue
                return True
            return False
        self._unanswered_s += self.times.answer_s
        return False

    async def _ask_queue(self) -> QueueContent | None:
        self._questions += 1
        try:
            with trio.fail_after(self.times.answer_s):
                return await self.client.queue()
        except (EngineUnavailable, trio.TooSlowError) as exc:
            log.debug("engine.question_unanswered", reason=str(exc))
            return None


def _is_idle(work: Work, since_s: float, questions: int = 0) -> bool:
    return (
        work.cpu_s <= IDLE_SHARE * since_s + QUESTION_CPU_S * questions
        and work.io_bytes <= IDLE_IO_BYTES
        and work.faults <= IDLE_FAULTS
    )


# --- the worker thread


@attrs.define(eq=False)
class WorkerObituary:
    """Reads the engine's output for the death of its worker thread. *last_line* is the end of the traceback."""

    last_line: str = ""
    died: trio.Event = attrs.field(factory=trio.Event)
    told: trio.Event = attrs.field(factory=trio.Event)
    """The traceback is complete."""

    def hear(self, line: OutputLine) -> None:
        """Take in the next line. Of either stream: an operator may have joined the two."""
        if _WORKER_DIED.match(line.text):
            self.died.set()
        elif self.died.is_set() and not self.told.is_set() and not line.text.startswith(_TRACEBACK_GOES_ON):
            self.last_line = line.text
            self.told.set()

    def forget(self) -> None:
        """Read for the next one."""
        self.last_line, self.died, self.told = "", trio.Event(), trio.Event()


async def serve_worker_watch(engine: Engine, obituary: WorkerObituary, sample: Sample) -> NoReturn:
    """Wait until the engine's worker thread has died; with or without a prompt in hand, and in the start-up too.

    The lines are text, and a node may print what a caller wrote. So they are believed only if within a second no event
    of a prompt follows, and the processes use no CPU, or for ten seconds no event.

    Raises:
        EngineWorkerDied: it has. Only a restart helps. The engine's prompts are lost by then.
    """
    while True:
        await obituary.died.wait()
        with trio.move_on_after(WORKER_TRACEBACK_S):
            await obituary.told.wait()
        await trio.sleep(WORKER_SETTLE_S)
        if await _stays_silent(engine, sample):
            error: EngineError = EngineWorkerDied(hide_paths(obituary.last_line))
            log.error("engine.worker_died", engine=engine.name, reason=str(error))
            raise engine.failed(error)
        log.warning("engine.worker_death_disproved", engine=engine.name, reason="events followed")
        obituary.forget()


async def _stays_silent(engine: Engine, sample: Sample) -> bool:
    signs = engine.signs_of_life
    before = await sample()
    for _ in range(WORKER_LOOKS):
        began = trio.current_time()
        await trio.sleep(WORKER_DOUBT_S)
        if engine.signs_of_life != signs:
            return False
        now = await sample()
        if _is_idle(now.since(before), trio.current_time() - began, questions=1):  # one: the next prompt may come
            return True
        before = now
    return True
