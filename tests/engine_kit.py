"""What the tests of one engine share: a client whose answers are written down, and the events of a prompt."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import attrs
import trio

from comfyd.engine import Engine, EngineEvent, NodeClasses, Refusal
from comfyd.engine.client import EngineClient, QueueContent
from comfyd.errors import EngineUnavailable

NO_CLASSES = NodeClasses(names=frozenset(), saving=frozenset(), media={})
SUCCESS = {"status_str": "success", "completed": True, "messages": [["execution_start", {}]]}
OUTPUTS = {"9": {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}}
ERROR: dict[str, Any] = {
    "node_id": "3",
    "node_type": "KSampler",
    "exception_type": "RuntimeError",
    "exception_message": "out of luck\n",
    "traceback": ["File ..."],
}


def event(kind: str, prompt_id: str | None = "p", **data: Any) -> EngineEvent:
    """An event of prompt *prompt_id*."""
    return EngineEvent(type=kind, data=data, prompt_id=prompt_id)


def whole_run(prompt_id: str = "p") -> list[EngineEvent]:
    """The events of a prompt that succeeds, in ComfyUI's order (0.3.64)."""
    return [
        event("execution_start", prompt_id),
        event("execution_cached", prompt_id, nodes=["1"]),
        event("executing", prompt_id, node="3"),
        event("progress", prompt_id, value=1, max=2),
        event("executing", prompt_id, node="9"),
        event("executed", prompt_id, node="9", output=OUTPUTS["9"]),
        event("execution_success", prompt_id),
        event("executing", prompt_id, node=None),
    ]


@attrs.define(eq=False)
class ScriptedClient:
    """An engine's HTTP side in memory: it keeps a queue and a history, and notes who asked for what.

    *silent* names the methods that never answer; *failing* those that raise :class:`EngineUnavailable`.
    """

    refusal: Refusal | None = None
    takes: bool = True
    """Whether a submitted prompt gets into the queue, whatever was answered."""
    running: set[str] = attrs.field(factory=set)
    pending: set[str] = attrs.field(factory=set)
    entries: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    silent: set[str] = attrs.field(factory=set)
    failing: set[str] = attrs.field(factory=set)
    calls: list[tuple[str, str]] = attrs.field(factory=list)
    submitted: list[dict[str, Any]] = attrs.field(factory=list)
    forgotten: list[list[str]] = attrs.field(factory=list)
    called: trio.Event = attrs.field(factory=trio.Event)

    @property
    def methods(self) -> list[str]:
        return [method for method, _ in self.calls]

    async def wait_called(self, method: str) -> None:
        while method not in self.methods:
            await self.called.wait()

    async def submit(self, **submission: Any) -> Refusal | None:
        self.submitted.append(submission)
        if self.takes:
            self.running.add(submission["prompt_id"])
        await self._called("submit", submission["prompt_id"])
        return self.refusal

    async def history(self, prompt_id: str) -> Mapping[str, Any] | None:
        await self._called("history", prompt_id)
        return self.entries.get(prompt_id)

    async def queue(self) -> QueueContent:
        await self._called("queue", "")
        return QueueContent(running=frozenset(self.running), pending=frozenset(self.pending))

    async def delete_queued(self, prompt_id: str) -> None:
        await self._called("delete_queued", prompt_id)
        self.pending.discard(prompt_id)

    async def interrupt(self, prompt_id: str) -> None:
        await self._called("interrupt", prompt_id)

    async def forget(self, prompt_ids: Iterable[str]) -> None:
        self.forgotten.append(list(prompt_ids))
        await self._called("forget", "")

    def end(self, prompt_id: str, *, outputs: Mapping[str, Any] = OUTPUTS, status: Any = SUCCESS) -> None:
        """The prompt leaves the queue and gets into history."""
        self.running.discard(prompt_id)
        self.entries[prompt_id] = {"outputs": outputs, "status": status}

    async def _called(self, method: str, argument: str) -> None:
        self.calls.append((method, argument))
        self.called.set()
        self.called = trio.Event()
        await trio.lowlevel.checkpoint()
        if method in self.silent:
            await trio.sleep_forever()
        if method in self.failing:
            raise EngineUnavailable(f"{method}: nobody there")


def bring_up(engine: Engine, client: ScriptedClient, client_id: str | None = "client-1") -> None:
    """The engine is up, and listened to with *client_id*."""
    engine.went_up(cast("EngineClient", client), NO_CLASSES)
    if client_id is not None:
        engine.connected(client_id)
