"""The worker: runs queued prompts one at a time and tells of it (execution.py and main.py of ComfyUI 0.3.64).

Everything here lives on the event loop; only the nodes' own functions run in a thread, one at a time, as ComfyUI has
one worker thread. An interrupt is looked at before each node and at each step a node reports.
"""

import itertools
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

import attrs
import trio

from comfyd.embedded.cache import Kept, ResultCache, cache_keys
from comfyd.embedded.events import Hub
from comfyd.embedded.graph import DependencyCycle, ExecutionOrder, is_link
from comfyd.embedded.nodes.registry import Interrupted, Library, NodeContext, NodeResult, NodeType, Progress
from comfyd.embedded.prompt_queue import Ended, Item, PromptQueue
from comfyd.embedded.settings import Cost, Settings
from comfyd.embedded.validation import type_name

_log: Final = logging.getLogger(__name__)


class NodeFailed(Exception):
    """A node raised; *facts* are those of the ``execution_error`` message."""

    def __init__(self, node_id: str, facts: dict[str, Any]) -> None:
        super().__init__(f"node {node_id} failed")
        self.node_id = node_id
        self.facts = facts


@attrs.define(eq=False, kw_only=True)
class Executor:
    """Runs prompts. *client_id* is that of the running or last prompt; *node_id* the node that runs now."""

    settings: Settings
    library: Library
    node_types: Mapping[str, NodeType]
    hub: Hub
    queue: PromptQueue
    interrupted: threading.Event = attrs.field(factory=threading.Event)
    client_id: str | None = None
    node_id: str | None = None
    _runs: Iterator[int] = attrs.field(factory=itertools.count)
    _cache: ResultCache = attrs.field(init=False)
    _threads: trio.CapacityLimiter = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._cache = ResultCache(kind=self.settings.cache, size=self.settings.cache_size)
        self._threads = trio.CapacityLimiter(1)  # nodes run one at a time, as in ComfyUI

    async def run(self) -> None:
        """Run prompts until cancelled, or until a malformed graph kills the worker.

        A graph can pass validation and still break what no node's failure breaks: a node without ``inputs`` that no
        output depends on. ComfyUI's worker thread dies of it with a traceback on stderr; the server answers on and
        nothing runs any more (reference E6). That is reproduced, because clients have to recognise it.
        """
        try:
            while True:
                await self._run_next()
        except Exception:  # noqa: BLE001 - see above: what ends ComfyUI's thread must end this task and nothing else
            sys.stderr.write(f"Exception in thread Thread-1 (prompt_worker):\n{traceback.format_exc()}")
            sys.stderr.flush()

    async def _run_next(self) -> None:
        item = await self.queue.get()
        if item is not None:
            began = time.perf_counter()
            ended = await self._run_prompt(item)
            self.queue.done(ended)
            if self.client_id is not None:
                self.hub.send("executing", {"node": None, "prompt_id": item[1]}, self.client_id)
            _log.info("Prompt executed in %.2f seconds", time.perf_counter() - began)
        _, free_memory = self.queue.take_flags()
        if free_memory:
            self._cache.clear()
        # A flood of prompts that need no thread must not keep the loop from its sockets.
        await trio.lowlevel.checkpoint()

    async def _run_prompt(self, item: Item) -> Ended:
        _, prompt_id, prompt, extra_data, outputs = item
        self.interrupted.clear()
        self.client_id = extra_data.get("client_id")
        run = _PromptRun(executor=self, prompt_id=prompt_id, prompt=prompt, extra_data=extra_data)
        run.tell("execution_start", {"prompt_id": prompt_id})
        run.keys = cache_keys(prompt, await self._fingerprints(prompt))
        self._cache.begin(run.keys.values())
        cached = [node_id for node_id in prompt if run.kept(node_id) is not None]
        run.tell("execution_cached", {"nodes": cached, "prompt_id": prompt_id})
        try:
            await run.all(outputs)
        except Interrupted:
            _log.info("Processing interrupted")
            run.tell("execution_interrupted", run.where(), to_all=True)
        except NodeFailed as failure:
            run.tell("execution_error", run.where(failure.node_id) | failure.facts)
        else:
            run.tell("execution_success", {"prompt_id": prompt_id})
            run.success = True
        self.node_id = None
        ended = run.ended()
        self._cache.end()
        return ended

    async def _fingerprints(self, prompt: Mapping[str, Any]) -> dict[str, str]:
        """Look at the files that nodes name. One that cannot be read makes its node run anew, and fail there."""
        found: dict[str, str] = {}
        costless = self.settings.cost is Cost.NONE
        for node_id, node in prompt.items():
            node_type = self.node_types[node["class_type"]]
            if node_type.always_runs:
                found[node_id] = f"run {next(self._runs)}"
            if node_type.fingerprint is None:
                continue
            name, look = node_type.fingerprint
            value = node["inputs"].get(name)
            look_now = partial(look, self.library, value, costless)
            try:
                found[node_id] = (
                    look_now() if costless else await trio.to_thread.run_sync(look_now, limiter=self._threads)
                )
            except Exception as exc:  # noqa: BLE001 - the node itself will say what is wrong, where it is told
                _log.warning("WARNING: %s", exc)
                found[node_id] = f"run {next(self._runs)}"
        return found

    @property
    def cache(self) -> ResultCache:
        """The results of nodes that ran."""
        return self._cache

    async def call(self, function: partial[NodeResult], *, threaded: bool) -> NodeResult:
        """Run a node's function, in the one node thread if it blocks.

        A cancelled engine does not wait for the thread: the process is about to end, and the thread with it. The
        interrupt makes the node stop at its next step all the same.
        """
        if not threaded:
            return function()
        try:
            return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=self._threads)
        except trio.Cancelled:
            self.interrupted.set()
            raise


@attrs.define(eq=False, kw_only=True)
class _PromptRun:
    """One prompt while it runs."""

    executor: Executor
    prompt_id: str
    prompt: Mapping[str, Any]
    extra_data: Mapping[str, Any]
    keys: dict[str, bytes] = attrs.field(factory=dict)
    success: bool = False
    messages: list[tuple[str, dict[str, Any]]] = attrs.field(factory=list)
    executed: dict[str, None] = attrs.field(factory=dict)
    states: dict[str, dict[str, Any]] = attrs.field(factory=dict)

    def kept(self, node_id: str) -> Kept | None:
        key = self.keys.get(node_id)
        return None if key is None else self.executor.cache.get(key)

    def tell(self, event: str, data: dict[str, Any], *, to_all: bool = False) -> None:
        """Record a message for history, and send it to the prompt's client; to all if it has none and *to_all*."""
        data = {**data, "timestamp": int(time.time() * 1000)}
        self.messages.append((event, data))
        client_id = self.executor.client_id
        if client_id is not None or to_all:
            self.executor.hub.send(event, data, client_id)

    def tell_client(self, event: str, data: dict[str, Any]) -> None:
        if self.executor.client_id is not None:
            self.executor.hub.send(event, data, self.executor.client_id)

    def where(self, node_id: str | None = None) -> dict[str, Any]:
        node_id = node_id or self.executor.node_id or ""
        return {
            "prompt_id": self.prompt_id,
            "node_id": node_id,
            "node_type": self.prompt[node_id]["class_type"],
            "executed": list(self.executed),
        }

    async def all(self, outputs: list[str]) -> None:
        """Run what *outputs* need.

        Raises:
            NodeFailed: a node raised, or the graph has a cycle.
            Interrupted: somebody interrupted.
        """
        order = ExecutionOrder(self.prompt, self.executor.node_types, lambda node_id: self.kept(node_id) is not None)
        order.add(outputs)
        while order:
            try:
                node_id = order.next()
            except DependencyCycle as exc:
                facts = {
                    "exception_message": str(exc),
                    "exception_type": "graph.DependencyCycleError",
                    "traceback": [],
                    "current_inputs": [],
                    "current_outputs": list(self.prompt),
                }
                raise NodeFailed(exc.node_id, facts) from exc
            await self._one(node_id)
            order.done(node_id)

    async def _one(self, node_id: str) -> None:
        kept = self.kept(node_id)
        if kept is not None:
            self.tell_client("executed", self._shown(node_id, kept.result.ui))
            self.report(node_id, "finished")
            return
        self.report(node_id, "running", value=0.0, maximum=1.0)
        self.executor.node_id = node_id
        self.tell_client("executing", {"node": node_id, "display_node": node_id, "prompt_id": self.prompt_id})
        result = await self._result(node_id)
        if result.ui:
            self.tell_client("executed", self._shown(node_id, result.ui))
        self.executor.cache.put(self.keys[node_id], Kept(result=result, node_id=node_id))
        self.report(node_id, "finished")
        self.executed[node_id] = None

    def _shown(self, node_id: str, ui: dict[str, Any] | None) -> dict[str, Any]:
        return {"node": node_id, "display_node": node_id, "output": ui, "prompt_id": self.prompt_id}

    async def _result(self, node_id: str) -> NodeResult:
        executor = self.executor
        node_type = executor.node_types[self.prompt[node_id]["class_type"]]
        inputs: dict[str, Any] | None = None
        try:
            inputs = self._inputs(node_id, node_type)
            if executor.interrupted.is_set():
                raise Interrupted  # noqa: TRY301 - one place decides what an interrupt means
            costless = executor.settings.cost is Cost.NONE and node_type.costless is not None
            function = node_type.costless if costless and node_type.costless is not None else node_type.run
            threaded = node_type.threaded and not costless
            context = NodeContext(
                node_id=node_id,
                prompt_id=self.prompt_id,
                prompt=self.prompt,
                extra_data=self.extra_data,
                settings=executor.settings,
                library=executor.library,
                interrupted=executor.interrupted,
                progress=_NodeProgress(self, node_id, threaded=threaded),
            )
            return await executor.call(partial(function, context, **inputs), threaded=threaded)
        except Interrupted:
            raise
        except Exception as exc:
            _log.error("!!! Exception during processing !!! %s", exc)
            _log.error(traceback.format_exc())
            facts = {
                "exception_message": f"{exc}\n",
                "exception_type": type_name(type(exc)),
                "traceback": traceback.format_tb(exc.__traceback__),
                "current_inputs": {name: [_printable(value)] for name, value in (inputs or {}).items()},
                "current_outputs": list(self.prompt),
            }
            raise NodeFailed(node_id, facts) from exc

    def _inputs(self, node_id: str, node_type: NodeType) -> dict[str, Any]:
        """Collect what the node's function is called with; inputs that its type does not know are left out."""
        given = self.prompt[node_id]["inputs"]
        values = {}
        for name in node_type.by_name:
            if name not in given:
                continue
            value = given[name]
            if is_link(value):
                kept = self.kept(value[0])
                value = None if kept is None else kept.result.outputs[value[1]]
            values[name] = value
        for name, source in node_type.hidden.items():
            match source:
                case "PROMPT":
                    values[name] = self.prompt
                case "EXTRA_PNGINFO":
                    values[name] = self.extra_data.get("extra_pnginfo")
                case "UNIQUE_ID":
                    values[name] = node_id
        return values

    def report(self, node_id: str, state: str, *, value: float | None = None, maximum: float | None = None) -> None:
        """Note a node's progress and send ``progress_state``: all nodes so far, at each change, as ComfyUI does."""
        entry = self.states.setdefault(
            node_id,
            {
                "value": 0,
                "max": 1,
                "state": state,
                "node_id": node_id,
                "prompt_id": self.prompt_id,
                "display_node_id": node_id,
                "parent_node_id": None,
                "real_node_id": node_id,
            },
        )
        entry["state"] = state
        entry["max"] = entry["max"] if maximum is None else maximum
        entry["value"] = entry["max"] if state == "finished" else entry["value"] if value is None else value
        data = {"prompt_id": self.prompt_id, "nodes": self.states}
        self.executor.hub.send("progress_state", data, self.executor.client_id)

    def step(self, node_id: str, value: int, maximum: int, preview_jpeg: bytes | None) -> None:
        """Tell of one step of a node. Belongs to the event loop."""
        executor = self.executor
        self.report(node_id, "running", value=value, maximum=maximum)
        ids = {
            "node_id": node_id,
            "prompt_id": self.prompt_id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
        }
        rich = executor.hub.supports(executor.client_id, "supports_preview_metadata")
        if preview_jpeg is not None and rich:
            executor.hub.send_preview(preview_jpeg, ids, executor.client_id)
        progress = {"value": value, "max": maximum, "prompt_id": self.prompt_id, "node": node_id}
        executor.hub.send("progress", progress, executor.client_id)
        if preview_jpeg is not None and not rich:
            executor.hub.send_preview(preview_jpeg, ids, executor.client_id)

    def ended(self) -> Ended:
        outputs, meta = {}, {}
        for node_id in self.prompt:
            kept = self.kept(node_id)
            if kept is not None and kept.result.ui:
                outputs[node_id] = kept.result.ui
                meta[node_id] = {
                    "node_id": kept.node_id,
                    "display_node": kept.node_id,
                    "parent_node": None,
                    "real_node_id": kept.node_id,
                }
        return Ended(outputs=outputs, meta=meta, success=self.success, messages=self.messages)


class _NodeProgress(Progress):
    """Carries reports of one node to the event loop, from the node's thread or from the loop itself."""

    def __init__(self, run: _PromptRun, node_id: str, *, threaded: bool) -> None:
        self._run = run
        self._node_id = node_id
        self._threaded = threaded

    def update(self, value: int, maximum: int, preview_jpeg: bytes | None) -> None:
        if self._run.executor.interrupted.is_set():
            raise Interrupted
        step = partial(self._run.step, self._node_id, value, maximum, preview_jpeg)
        if self._threaded:
            trio.from_thread.run_sync(step)
        else:
            step()

    def text(self, text: str) -> None:
        send = partial(self._run.executor.hub.send_text, self._node_id, text)
        if self._threaded:
            trio.from_thread.run_sync(send)
        else:
            send()


def _printable(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
