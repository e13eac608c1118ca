"""The prompts that wait, the one that runs, and the history of the others (execution.py, ``PromptQueue``, 0.3.64)."""

import heapq
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
import trio

# ComfyUI's own bound (MAXIMUM_HISTORY_SIZE): whole graphs are kept, so this is hundreds of megabytes at worst.
MAX_HISTORY: Final = 10_000

_SECRETS: Final = ("auth_token_comfy_org", "api_key_comfy_org")

# (number, prompt id, graph, extra_data, outputs to execute), which is how /queue and /history show it.
Item = tuple[float, str, dict[str, Any], dict[str, Any], list[str]]


@attrs.frozen(kw_only=True)
class Ended:
    """How a prompt ended: what history will hold of it."""

    outputs: dict[str, Any]
    meta: dict[str, Any]
    success: bool
    messages: list[tuple[str, dict[str, Any]]]


@attrs.define(eq=False)
class PromptQueue:
    """Waiting, running and finished prompts. *changed* is called at each change of the number that /prompt shows."""

    changed: Callable[[], None]
    running: Item | None = None
    unload_models: bool = False
    free_memory: bool = False
    _waiting: list[Item] = attrs.field(factory=list)
    _history: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    _wakeup: trio.Event = attrs.field(factory=trio.Event)

    def put(self, item: Item) -> None:
        """Queue a prompt. The queue has no bound, as ComfyUI's has none; the daemon hands over one at a time.

        Raises:
            TypeError: number and prompt id equal those of a waiting prompt; it is queued all the same, as in ComfyUI.
        """
        heapq.heappush(self._waiting, item)
        self.changed()
        self._wakeup.set()

    async def get(self) -> Item | None:
        """Wait for a prompt and make it the running one; None when only a flag of :meth:`free` was set."""
        while not self._waiting:
            if self.unload_models or self.free_memory:
                return None
            self._wakeup = trio.Event()
            await self._wakeup.wait()
        self.running = heapq.heappop(self._waiting)
        self.changed()
        return self.running

    def done(self, ended: Ended) -> None:
        """Move the running prompt to history, without its secrets. A prompt of the same id is replaced there."""
        if self.running is None:
            raise RuntimeError("no prompt is running")
        number, prompt_id, prompt, extra_data, outputs = self.running
        self.running = None
        if len(self._history) > MAX_HISTORY:
            del self._history[next(iter(self._history))]
        public = {key: value for key, value in extra_data.items() if key not in _SECRETS}
        self._history[prompt_id] = {
            "prompt": (number, prompt_id, prompt, public, outputs),
            "outputs": ended.outputs,
            "status": {
                "status_str": "success" if ended.success else "error",
                "completed": ended.success,
                "messages": ended.messages,
            },
            "meta": ended.meta,
        }
        self.changed()

    def remaining(self) -> int:
        """Count the prompts that wait or run."""
        return len(self._waiting) + (self.running is not None)

    def snapshot(self) -> dict[str, Any]:
        """Return what ``/queue`` shows: whole graphs, partner keys included, as ComfyUI does."""
        return {"queue_running": [] if self.running is None else [self.running], "queue_pending": list(self._waiting)}

    def clear(self) -> None:
        """Remove all waiting prompts without a trace."""
        self._waiting.clear()
        self.changed()

    def delete(self, prompt_id: str) -> None:
        """Remove a waiting prompt without a trace; nothing happens if none has this id."""
        for index, item in enumerate(self._waiting):
            if item[1] == prompt_id:
                del self._waiting[index]
                heapq.heapify(self._waiting)
                self.changed()
                return

    def free(self, *, unload_models: bool, free_memory: bool) -> None:
        """Ask the worker to free memory after the current prompt."""
        self.unload_models |= unload_models
        self.free_memory |= free_memory
        self._wakeup.set()

    def take_flags(self) -> tuple[bool, bool]:
        """Return and reset (unload models, free memory)."""
        flags = self.unload_models, self.free_memory
        self.unload_models = self.free_memory = False
        return flags

    def history(self, max_items: int | None = None, offset: int = -1) -> Mapping[str, Any]:
        """Return finished prompts, oldest first: *max_items* from *offset*, or the last ones if that is negative."""
        ids = list(self._history)
        if offset < 0 and max_items is not None:
            offset = len(ids) - max_items
        kept = ids[max(0, offset) :]
        return {prompt_id: self._history[prompt_id] for prompt_id in kept[:max_items]}

    def history_of(self, prompt_id: str) -> Mapping[str, Any]:
        """Return one finished prompt under its id, or nothing: unknown and unfinished look the same."""
        return {prompt_id: self._history[prompt_id]} if prompt_id in self._history else {}

    def clear_history(self) -> None:
        """Forget all finished prompts."""
        self._history.clear()

    def delete_history(self, prompt_id: str) -> None:
        """Forget a finished prompt."""
        self._history.pop(prompt_id, None)
