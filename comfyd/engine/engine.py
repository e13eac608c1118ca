"""One engine as the rest of comfyd sees it: its state, and :meth:`Engine.execute`.

Code above this package knows no websocket and no process. The engine's supervisor is the only one that calls
:meth:`Engine.went_up` and :meth:`Engine.went_down`; its listener is the only one that calls the receiver's methods.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, Final

import attrs
import structlog
import trio

from comfyd.engine.attempt import Attempt, Completed, Execution, Interrupted, Raised, Refused
from comfyd.engine.client import EngineClient, Refusal
from comfyd.engine.last_words import LastWords, secrets_in
from comfyd.engine.messages import EngineEvent
from comfyd.engine.object_info import NodeClasses
from comfyd.errors import EngineBroken, EngineError, EngineLost, EngineUnavailable
from comfyd.host.logging import current_job

log = structlog.get_logger("comfyd.engine")

INTERRUPT_GRACE_S: Final = 5.0
"""How long an abandoned prompt may take to stop before its runner is released to wait for it in the open. An interrupt
works at the next node or sampler step: 0.5 s measured."""
DOUBT_RECHECK_S: Final = 1.0
"""How often history is asked for a prompt whose events went to a socket that is gone. Every queue change that the
engine broadcasts makes us look at once; this is only for an engine that says nothing at all."""
SUBMIT_TIMEOUT_S: Final = 60.0
"""Validation lists folders and may take a second or two on slow disks; a minute means that nobody is there."""
ASK_TIMEOUT_S: Final = 20.0


class EngineState(Enum):
    """Where an engine is in its life."""

    STARTING = "starting"
    UP = "up"
    """Its process lives, it answers, it is ours, and we hear its events."""
    DOWN = "down"
    """It failed and will be started again."""
    GONE = "gone"
    """It failed and will not be started again."""


@attrs.frozen(kw_only=True)
class Submission:
    """What an engine is asked to run. *prompt_id* must be unique: ComfyUI does not check it."""

    graph: Mapping[str, Any]
    extra_data: Mapping[str, Any]
    prompt_id: str = attrs.field(factory=lambda: str(uuid.uuid4()))


@attrs.define(eq=False)
class Engine:
    """An engine that is kept running by its supervisor."""

    name: str
    state: EngineState = EngineState.STARTING
    warm: bool = False
    """Whether its warm-up is done, in this life of the process."""
    was_ever_warm: bool = False
    pid: int | None = None
    """Its process, while there is one."""
    processes: int = 0
    """How many processes were started for it."""
    last_failure: str | None = None
    last_cause: str = "failed"
    """The slug of :attr:`last_failure`, see :class:`EngineLost`."""
    last_words: LastWords = attrs.field(factory=LastWords)
    restarts_by_cause: Counter[str] = attrs.field(factory=Counter)
    """How often it was started again, by the slug of what ended the process before."""
    signs_of_life: int = 0
    """Counts what it says on the websocket that a hung one would not: see :meth:`received`."""
    node_classes: NodeClasses | None = None
    """What the engine said of its nodes when it last came up; None before the first time."""
    on_broadcast: Callable[[EngineEvent], None] | None = None
    """Hears what the engine tells everybody, which is no prompt's."""
    _client: EngineClient | None = None
    _client_id: str | None = None
    _attempts: dict[str, Attempt] = attrs.field(factory=dict)
    _finished: list[str] = attrs.field(factory=list)
    _finished_event: trio.Event = attrs.field(factory=trio.Event)
    _changed: trio.Event = attrs.field(factory=trio.Event)
    _verdict: EngineError | None = None

    # --- what users of the engine call

    @property
    def up(self) -> bool:
        """Whether it can be asked to execute."""
        return self.state is EngineState.UP

    async def wait_up(self) -> None:
        """Wait until the engine is up. Returns at once if it is.

        Raises:
            EngineLost: it is gone for good.
        """
        while not self.up:
            if self.state is EngineState.GONE:
                raise EngineLost(self.last_failure or "the engine is gone", cause=self.last_cause)
            await self._changed.wait()

    async def wait_changed(self) -> None:
        """Wait for the next change of state, warmth or connection."""
        await self._changed.wait()

    def mark_warm(self) -> None:
        """The warm-up is done; the engine may take callers' jobs."""
        self.warm = self.was_ever_warm = True
        self._notify()

    def condemn(self, error: EngineError) -> None:
        """Say that this engine must not go on: its supervisor stops the process and treats it as failed by *error*."""
        if self._verdict is None:  # the first reason is the true one; what follows may come of it
            self._verdict = error
            if self.up:  # no longer: its supervisor looks a moment later, and until then it would be given the next job
                self.state = EngineState.DOWN
                self.last_failure, self.last_cause = str(error), error.cause
            self._notify()

    @property
    def client(self) -> EngineClient:
        """The engine's HTTP interface.

        Raises:
            EngineLost: it is not up.
        """
        if self._client is None:
            raise EngineLost(self.last_failure or "the engine is not up", cause=self.last_cause)
        return self._client

    async def execute(self, submission: Submission, observe: Callable[[EngineEvent], None]) -> Execution:
        """Run one prompt to its end and say how it ended. *observe* hears each of its events.

        When cancelled, the prompt is taken off the engine's queue or interrupted before this returns, within
        :data:`INTERRUPT_GRACE_S`; :meth:`wait_idle` waits for one that takes longer.

        Raises:
            EngineLost: the engine went away before the end was known, or the end says that it is the engine that
                failed: its GPU is lost to it, or the watchdog had the prompt interrupted.
        """
        client, client_id = await self._wait_listening()
        attempt = Attempt(
            prompt_id=submission.prompt_id,
            observe=observe,
            graph=submission.graph,
            secrets=secrets_in(submission.extra_data),
            began_at=trio.current_time(),
            job=current_job(),
        )
        self._attempts[attempt.prompt_id] = attempt
        try:
            refusal = await self._submit(attempt, submission, client, client_id)
            if refusal is None:
                await self._wait_ended(attempt)
                return attempt.execution
            return Refused(refusal=refusal, outputs=attempt.outputs)
        except trio.Cancelled:
            with trio.move_on_after(INTERRUPT_GRACE_S, shield=True):
                await self._withdraw(attempt)
            raise
        finally:
            if attempt.ended or attempt.lost is not None:
                self._close(attempt)

    async def wait_idle(self) -> None:
        """Wait until no abandoned prompt is running any more, or the engine is lost."""
        for attempt in list(self._attempts.values()):
            try:
                await self._wait_ended(attempt)
            except EngineLost:
                log.debug("engine.abandoned_prompt_lost", prompt_id=attempt.prompt_id)
            self._close(attempt)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The prompts that are in the engine as far as we know, oldest first."""
        return tuple(self._attempts.values())

    @property
    def running_job(self) -> tuple[str, int] | None:
        """Id and attempt of the job that the engine works on, as far as we know."""
        return next((attempt.job for attempt in self._attempts.values() if attempt.job is not None), None)

    # --- what the daemon calls

    def let_go(self) -> None:
        """Say that comfyd stops: whatever still runs ends with the engine, so nobody waits for an interrupt to work."""
        self.went_down("comfyd is stopping", cause="stopped", for_good=True)

    # --- what the supervisor calls

    def launched(self, secrets: Iterable[str] = (), *, pid: int | None = None) -> None:
        """The process has been started, with *secrets* in its environment; it does not answer yet."""
        self.pid = pid
        self.processes += 1
        self.last_words.begin(secrets)
        self._notify()

    def went_up(self, client: EngineClient, node_classes: NodeClasses) -> None:
        """The process lives, answers over HTTP and is listened to."""
        self._client = client
        self.node_classes = node_classes
        self._verdict = None
        self.state = EngineState.UP
        self._notify()

    def failed(self, error: EngineError) -> EngineError:
        """The engine failed by *error*, which is returned, to be raised."""
        self.went_down(str(error), cause=error.cause)
        return error

    def went_down(self, reason: str, *, cause: str = "failed", for_good: bool = False) -> None:
        """The engine failed. Every prompt in it is lost."""
        self._client = None
        self._client_id = None
        self.pid = None
        self.warm = False
        self.last_failure = reason
        self.last_cause = cause
        self._finished.clear()
        self.state = EngineState.GONE if for_good else EngineState.DOWN
        for attempt in self._attempts.values():
            attempt.lose(reason, cause=cause, last_words=self._words_on(attempt))
        self._notify()

    async def wait_condemned(self) -> None:
        """Wait for :meth:`condemn`, then raise what it said.

        Raises:
            EngineError: always.
        """
        while self._verdict is None:
            await self._changed.wait()
        raise self.failed(self._verdict)

    async def serve_forgetting(self) -> None:
        """Drop finished prompts from the engine's history, many at a time. Runs until cancelled.

        History keeps whole graphs in the engine's memory, up to 10,000 of them; one request for each job would double
        the traffic to the engine.
        """
        while True:
            await self._finished_event.wait()
            await trio.sleep(
                1
            )  # gather what else ends meanwhile; the list is bounded by what an engine does in a second
            finished, self._finished = self._finished, []
            self._finished_event = trio.Event()
            try:
                with trio.fail_after(ASK_TIMEOUT_S):
                    await self.client.forget(finished)
            except (EngineError, trio.TooSlowError) as exc:
                log.debug("engine.history_not_cleared", reason=str(exc), prompts=len(finished))

    # --- what the listener calls

    def connected(self, client_id: str) -> None:
        """Events of prompts submitted with *client_id* arrive from now on."""
        self._client_id = client_id
        self._notify()
        for attempt in self._attempts.values():
            attempt.wake()

    def disconnected(self) -> None:
        """Events may have been missed."""
        self._client_id = None
        for attempt in self._attempts.values():
            attempt.doubt()

    def received(self, event: EngineEvent) -> None:
        """Route an event to its prompt.

        Every event is a sign of life but two: the queue's ``status``, which an engine without a worker sends as well,
        and the monitors of custom nodes (``crystools.monitor``), which tell of the machine from a thread of their own.
        """
        if event.type != "status" and not event.type.endswith(".monitor"):
            self.signs_of_life += 1
        if event.prompt_id is not None:
            attempt = self._attempts.get(event.prompt_id)
            if attempt is not None:
                attempt.hear(event)
                if event.type == "execution_error":
                    # At once: the worker may die of the same before it tells the end (ROCm/legacy-rocm-build#5742).
                    self._condemn_if_broken(attempt)
            return
        if self.on_broadcast is not None:
            self.on_broadcast(event)
        if event.type == "status":
            # Broadcast on each change of the queue, history being stored by then: the moment to look again for prompts
            # whose own events go to a socket that is gone.
            for attempt in self._attempts.values():
                if attempt.in_doubt:
                    attempt.wake()

    def received_binary(self, frame: bytes) -> None:
        """A preview. Nobody asks for them yet, so they are not even parsed; but who sends one is at work."""
        del frame
        self.signs_of_life += 1

    # --- inside

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _wait_listening(self) -> tuple[EngineClient, str]:
        while True:
            client = self.client
            if self._client_id is not None:
                return client, self._client_id
            await self._changed.wait()

    async def _submit(
        self, attempt: Attempt, submission: Submission, client: EngineClient, client_id: str
    ) -> Refusal | None:
        try:
            with trio.fail_after(SUBMIT_TIMEOUT_S):
                refusal = await client.submit(
                    prompt=submission.graph,
                    prompt_id=submission.prompt_id,
                    client_id=client_id,
                    extra_data=submission.extra_data,
                )
        except (EngineUnavailable, trio.TooSlowError) as exc:
            log.warning("engine.submit_unanswered", reason=str(exc), prompt_id=attempt.prompt_id)
            # It may have been taken all the same, and the engine may be dying: history and queue know.
            attempt.doubt()
            return None
        if refusal is None and self._client_id != client_id:
            # The socket was lost between the two: ComfyUI tells the end to an id that nobody listens to.
            attempt.doubt()
        if refusal is not None and refusal.may_be_queued:
            with trio.move_on_after(INTERRUPT_GRACE_S):
                await self._withdraw(attempt)
        if refusal is not None:
            attempt.ended = True
        return refusal

    async def _wait_ended(self, attempt: Attempt) -> None:
        while not attempt.ended:
            if attempt.loss is not None:
                raise attempt.loss
            changed = attempt.changed
            if not attempt.in_doubt:
                await changed.wait()
                continue
            listening = self._client is not None and self._client_id is not None
            if listening and await self._ask(attempt, self.client):
                continue
            with trio.move_on_after(DOUBT_RECHECK_S):
                await changed.wait()
        self._condemn_if_broken(attempt)
        failure = attempt.engine_failure
        if failure is not None:
            raise EngineLost(str(failure), cause=failure.cause, last_words=self._words_on(attempt))

    def _condemn_if_broken(self, attempt: Attempt) -> None:
        failure = attempt.engine_failure
        if isinstance(failure, EngineBroken) and self.up:
            self.condemn(failure)

    def _words_on(self, attempt: Attempt) -> tuple[str, ...]:
        return self.last_words.concerning(attempt.began_at, attempt.secrets)

    async def _ask(self, attempt: Attempt, client: EngineClient) -> bool:
        """Ask the two independent truths, history and queue, what became of *attempt*; True if it is known now."""
        try:
            with trio.fail_after(ASK_TIMEOUT_S):
                entry = await client.history(attempt.prompt_id)
                if entry is None:
                    queue = await client.queue()
                    if attempt.prompt_id in queue.running | queue.pending:
                        return False
                    entry = await client.history(attempt.prompt_id)  # it may have ended between the two questions
        except (EngineUnavailable, trio.TooSlowError) as exc:
            log.debug("engine.question_unanswered", reason=str(exc), prompt_id=attempt.prompt_id)
            return False
        if entry is None:
            reason = "the engine does not know the prompt any more"
            attempt.lose(reason, cause="forgotten", last_words=self._words_on(attempt))
        else:
            attempt.settle(entry)
        return True

    async def _withdraw(self, attempt: Attempt) -> None:
        """Take a prompt off the engine, out of its queue or interrupted, and wait for its end."""
        client = self._client  # the engine may go down while one of these is under way
        if attempt.ended or attempt.lost is not None or client is None:
            return
        try:
            # /interrupt ignores what is not running, /queue what is not waiting: in this order one of them works.
            await client.delete_queued(attempt.prompt_id)
            await client.interrupt(attempt.prompt_id)
            attempt.doubt()  # a prompt deleted while waiting leaves no trace and no event
            await self._wait_ended(attempt)
        except EngineError as exc:
            log.debug("engine.withdrawn_uncertainly", reason=str(exc), prompt_id=attempt.prompt_id)

    def _close(self, attempt: Attempt) -> None:
        if self._attempts.pop(attempt.prompt_id, None) is not None and attempt.lost is None:
            self._finished.append(attempt.prompt_id)
            self._finished_event.set()


__all__ = [
    "Completed",
    "Engine",
    "EngineState",
    "Execution",
    "Interrupted",
    "Raised",
    "Refused",
    "Submission",
]
