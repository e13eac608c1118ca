"""In which order the nodes of a prompt run (comfy_execution/graph.py of ComfyUI 0.3.64, its rules in our words)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from comfyd.embedded.nodes.registry import NodeType


class DependencyCycle(Exception):
    """The nodes that are left all wait for each other."""

    def __init__(self, node_id: str) -> None:
        super().__init__("Dependency cycle detected")
        self.node_id = node_id


def is_link(value: Any) -> bool:
    """Whether an input's value is ``[node id, output index]``."""
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], (int, float))
    )


@attrs.define(eq=False)
class ExecutionOrder:
    """Hands out the nodes that a set of outputs needs, each when all it depends on is done.

    Among the nodes that could run, output nodes come first, then those that an output waits for, then those one step
    further away; a user sees results early that way. Nodes whose result is cached are neither run nor followed
    upstream, except that a cached output is handed out all the same.
    """

    _prompt: Mapping[str, Any]
    _node_types: Mapping[str, NodeType]
    _is_cached: Callable[[str], bool]
    _waits_for: dict[str, set[str]] = attrs.field(init=False, factory=dict)
    _blocks: dict[str, dict[str, None]] = attrs.field(init=False, factory=dict)

    def add(self, outputs: Iterable[str]) -> None:
        """Take up outputs, and whatever they need that is not cached."""
        for output in outputs:
            stack = [output]
            found: list[tuple[str, str]] = []
            while stack:
                node_id = stack.pop()
                if node_id in self._waits_for:
                    continue
                self._waits_for[node_id] = set()
                self._blocks[node_id] = {}
                for value in self._prompt[node_id]["inputs"].values():
                    if is_link(value) and not self._is_cached(value[0]):
                        stack.append(value[0])
                        found.append((value[0], node_id))
            for source, target in found:
                self._waits_for[target].add(source)
                self._blocks[source][target] = None

    def __bool__(self) -> bool:
        return bool(self._waits_for)

    def next(self) -> str:
        """Choose the node to run now; it stays until :meth:`done`.

        Raises:
            DependencyCycle: nodes are left but none can run.
        """
        ready = [node_id for node_id, sources in self._waits_for.items() if not sources]
        if not ready:
            raise DependencyCycle(self._a_node_in_a_cycle())
        if len(ready) == 1:
            return ready[0]
        for is_near in (self._is_output, self._feeds_output, self._feeds_feeder):
            for node_id in ready:
                if is_near(node_id):
                    return node_id
        return ready[0]

    def done(self, node_id: str) -> None:
        """The node that :meth:`next` gave has run; what waited for it may follow."""
        del self._waits_for[node_id]
        for target in self._blocks.pop(node_id):
            self._waits_for[target].discard(node_id)

    def _is_output(self, node_id: str) -> bool:
        return self._node_types[self._prompt[node_id]["class_type"]].is_output

    def _feeds_output(self, node_id: str) -> bool:
        return any(self._is_output(target) for target in self._blocks[node_id])

    def _feeds_feeder(self, node_id: str) -> bool:
        return any(self._feeds_output(target) for target in self._blocks[node_id])

    def _a_node_in_a_cycle(self) -> str:
        # Each node left waits for another one that is left, so following that far enough ends inside a cycle.
        node_id = next(iter(self._waits_for))
        for _ in range(len(self._waits_for)):
            node_id = next(iter(self._waits_for[node_id]))
        return node_id
