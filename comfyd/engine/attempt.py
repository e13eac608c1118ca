"""One prompt on one engine: what its events say, and how it ended.

Pure state, no waiting: events and answers go in, and whoever waits looks at the fields after :attr:`Attempt.changed`.
Order of events: ComfyUI 0.3.64, ``execution.py`` and ``main.py``; the end is ``executing`` with node null, which is
sent after history is stored, and not ``execution_success``.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import trio

from comfyd.engine.broken_device import broken_device
from comfyd.engine.client import Refusal
from comfyd.engine.messages import EngineEvent
from comfyd.errors import EngineBroken, EngineError, EngineLost
from comfyd.texts import hide_paths


@attrs.frozen(kw_only=True)
class NodeTime:
    """When a node began (milliseconds since the epoch) and how long it took (milliseconds; None: never seen to end)."""

    start_ms: float
    duration_ms: float | None = None


@attrs.frozen(kw_only=True)
class ExecutionTimes:
    """When the engine began and ended a prompt, in milliseconds since the epoch, and the same for each node it ran."""

    start_ms: float
    end_ms: float
    nodes: Mapping[str, NodeTime]


@attrs.frozen(kw_only=True)
class Completed:
    """The graph ran. *outputs* maps node ids to what the node reported (``{"images": [{filename, ...}]}``)."""

    outputs: Mapping[str, Mapping[str, Any]]
    times: ExecutionTimes


@attrs.frozen(kw_only=True)
class Raised:
    """A node raised. Text as ComfyUI gave it, without its traceback."""

    node_id: str
    node_type: str
    exception_type: str
    exception_message: str
    outputs: Mapping[str, Mapping[str, Any]]


@attrs.frozen(kw_only=True)
class Interrupted:
    """The prompt was interrupted, by us or by somebody else who talks to the engine."""

    outputs: Mapping[str, Mapping[str, Any]]


@attrs.frozen(kw_only=True)
class Refused:
    """The engine did not take the prompt, or not all of it."""

    refusal: Refusal
    outputs: Mapping[str, Mapping[str, Any]]


Execution = Completed | Raised | Interrupted | Refused


@attrs.define(eq=False)
class Attempt:
    """A prompt that was handed to an engine. *observe* hears each of its events, between two frames."""

    prompt_id: str
    observe: Callable[[EngineEvent], None]
    job: tuple[str, int] | None = None
    """Id and attempt of the job that it is for."""
    ended: bool = False
    graph: Mapping[str, Any] = attrs.field(factory=dict)
    """What was submitted, to name a node's class."""
    secrets: tuple[str, ...] = attrs.field(default=(), repr=False)
    """What came with it and is not for its last words, such as keys for partner nodes."""
    began_at: float = 0.0
    """When it was handed over, by Trio's clock."""
    loss: EngineLost | None = None
    """Why its end can no longer be learnt: the engine went away."""
    given_up: EngineError | None = None
    """Why the watchdog has it interrupted: an interruption that follows is no caller's."""
    in_doubt: bool = False
    """Events may have been missed; history and queue have to be asked."""
    changed: trio.Event = attrs.field(factory=trio.Event)
    _outputs: dict[str, Mapping[str, Any]] = attrs.field(factory=dict)
    _verdict: Raised | Interrupted | Completed | None = None
    _started_ms: float | None = None
    _nodes: dict[str, NodeTime] = attrs.field(factory=dict)
    _running_node: tuple[str, float] | None = None  # id, perf_counter seconds

    @property
    def outputs(self) -> Mapping[str, Mapping[str, Any]]:
        """What nodes have reported so far."""
        return self._outputs

    def hear(self, event: EngineEvent) -> None:
        """Take in an event of this prompt."""
        data = event.data
        match event.type:
            case "execution_start":
                self._started_ms = _now_ms()
            case "executing":
                node = data.get("node")
                self._node_ended()
                if node is None:
                    self._end()
                elif isinstance(node, str):
                    self._running_node = (node, time.perf_counter())
                    self._nodes[node] = NodeTime(start_ms=_now_ms())
            case "executed":
                output = data.get("output")
                if isinstance(output, dict):
                    self._outputs[str(data.get("node"))] = output
            case "execution_error":
                self._verdict = self._raised(data)
            case "execution_interrupted":
                self._verdict = Interrupted(outputs=self._outputs)
            case "execution_success":
                self._node_ended()
                self._verdict = self._completed()
            case _:
                pass
        self.observe(event)

    def settle(self, entry: Mapping[str, Any]) -> None:
        """Take in the prompt's history entry: the whole truth, where events were missed.

        Shape: ``{"outputs": {...}, "status": {"status_str", "completed", "messages": [[type, data], ...]}}``.
        ``status`` may be null in old versions; outputs without a status then mean success.
        """
        outputs, status = entry.get("outputs"), entry.get("status")
        reports = outputs.items() if isinstance(outputs, dict) else ()
        self._outputs = {node_id: report for node_id, report in reports if isinstance(report, dict)}
        messages = status.get("messages") if isinstance(status, dict) else None
        failed = isinstance(status, dict) and status.get("status_str") == "error"
        # The messages say how it failed; without them it is no success all the same.
        self._verdict = self._raised({}) if failed else self._completed()
        for message in messages if isinstance(messages, list) else ():
            match message:
                case ["execution_error", data]:
                    self._verdict = self._raised(data if isinstance(data, dict) else {})
                case ["execution_interrupted", _]:
                    self._verdict = Interrupted(outputs=self._outputs)
                case _:
                    pass
        self._end()

    def doubt(self) -> None:
        """Events may have been missed from now on."""
        if not self.ended:
            self.in_doubt = True
            self.wake()

    def lose(self, reason: str, *, cause: str = "failed", last_words: tuple[str, ...] = ()) -> None:
        """The engine is gone, and what became of the prompt with it."""
        if not self.ended and self.loss is None:
            self.loss = EngineLost(reason, cause=cause, last_words=last_words)
            self.wake()

    def wake(self) -> None:
        """Make whoever waits look again."""
        self.changed.set()
        self.changed = trio.Event()

    @property
    def lost(self) -> str | None:
        """Why its end can no longer be learnt, in words; None while it can."""
        return None if self.loss is None else str(self.loss)

    @property
    def running_node(self) -> tuple[str, str] | None:
        """Id and class of the node that runs; None between nodes."""
        if self._running_node is None:
            return None
        node_id = self._running_node[0]
        node = self.graph.get(node_id)
        return node_id, str(node.get("class_type", "")) if isinstance(node, Mapping) else ""

    @property
    def engine_failure(self) -> EngineError | None:
        """What the end says of the engine, where it is the engine that failed and not the job."""
        match self._verdict:
            case Raised(exception_type=kind, exception_message=message):
                sign = broken_device(kind, message)
                return EngineBroken(hide_paths(sign)) if sign is not None else None
            case Interrupted():
                return self.given_up
            case _:
                return None

    @property
    def execution(self) -> Completed | Raised | Interrupted:
        """How it ended. Only to be asked once :attr:`ended` is true."""
        if self._verdict is None:
            raise RuntimeError("asked for the end of an attempt that has not ended")
        return self._verdict

    def _end(self) -> None:
        if self._verdict is None:  # the verdict was missed: history knows it
            self.doubt()
            return
        self.ended = True
        self.in_doubt = False
        self.wake()

    def _node_ended(self) -> None:
        if self._running_node is not None:
            node, since = self._running_node
            duration_ms = (time.perf_counter() - since) * 1000
            self._nodes[node] = attrs.evolve(self._nodes[node], duration_ms=round(duration_ms, 3))
            self._running_node = None

    def _completed(self) -> Completed:
        now = _now_ms()
        times = ExecutionTimes(start_ms=self._started_ms or now, end_ms=now, nodes=dict(self._nodes))
        return Completed(outputs=self._outputs, times=times)

    def _raised(self, data: Mapping[str, Any]) -> Raised:
        return Raised(
            node_id=str(data.get("node_id", "")),
            node_type=str(data.get("node_type", "")),
            exception_type=str(data.get("exception_type", "")),
            exception_message=str(data.get("exception_message", "")).strip(),
            outputs=self._outputs,
        )


def _now_ms() -> float:
    return round(time.time() * 1000, 3)
