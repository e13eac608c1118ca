"""How far a graph is: a percentage over all its nodes, from the engine's events.

A node that the engine reports as cached counts as done; the running node counts by its own steps. Events: ComfyUI
0.3.64, ``execution.py`` and ``comfy_execution/progress.py``.
"""

from typing import Any

import attrs

from comfyd.engine import EngineEvent


@attrs.frozen(kw_only=True)
class ProgressView:
    """What a watcher is told. *percent* never falls within an attempt."""

    percent: float
    node_id: str | None
    step: int | None
    steps: int | None


@attrs.define
class Progress:
    """Follows one attempt."""

    _graph_nodes: frozenset[str] = frozenset()
    _done: set[str] = attrs.field(factory=set)
    _node: str | None = None
    _step: int | None = None
    _steps: int | None = None
    _percent: float = 0.0
    """The highest so far: a node may count its steps more than once (tiles, passes)."""

    def begin(self, graph_nodes: frozenset[str]) -> None:
        """A new attempt begins: nothing is done."""
        self._graph_nodes = graph_nodes
        self._done = set()
        self._node = self._step = self._steps = None
        self._percent = 0.0

    def hear(self, event: EngineEvent) -> bool:
        """Take in an event; True if the view has changed."""
        data = event.data
        match event.type:
            case "execution_cached":
                nodes = data.get("nodes")
                self._done.update(str(node) for node in (nodes if isinstance(nodes, list) else ()))
            case "executing":
                self._node_done()
                node = data.get("display_node") or data.get("node")
                self._node = node if isinstance(node, str) else None
                self._step = self._steps = None
            case "progress":
                self._step, self._steps = _number(data.get("value")), _number(data.get("max"))
            case "execution_success":
                self._node_done()
                self._done.update(self._graph_nodes)
            case _:
                return False
        self._percent = max(self._percent, self._percent_now())
        return True

    @property
    def view(self) -> ProgressView:
        """Where the attempt is now."""
        return ProgressView(percent=self._percent, node_id=self._node, step=self._step, steps=self._steps)

    def _percent_now(self) -> float:
        total = len(self._graph_nodes)
        done = float(len(self._done & self._graph_nodes))
        if self._node in self._graph_nodes and self._node not in self._done and self._step and self._steps:
            done += min(1.0, self._step / self._steps)
        return round(100 * done / total, 1) if total else 0.0

    def _node_done(self) -> None:
        if self._node is not None:
            self._done.add(self._node)


def _number(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) else None
