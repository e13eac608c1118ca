"""What is kept of nodes that ran, and when it is used again (comfy_execution/caching.py of ComfyUI 0.3.64).

A node's key covers its type, its inputs and, through its links, everything upstream, but not its id: an unchanged part
of a changed graph runs no node again. Outputs and what an output node showed are kept together, so a graph sent twice
answers the second time with the file names of the first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import attrs
import msgspec

from comfyd.embedded.graph import is_link
from comfyd.embedded.nodes.registry import NodeResult
from comfyd.embedded.settings import CacheKind

Fingerprints = Mapping[str, str]


def cache_keys(prompt: Mapping[str, Any], fingerprints: Fingerprints) -> dict[str, bytes]:
    """Compute the key of every node of a graph, whether an output depends on it or not.

    *fingerprints* stand for what is not in the graph, such as the content of files that nodes name.

    Raises:
        KeyError: a node has no ``inputs``. Nothing catches it in ComfyUI either: it ends the worker.
    """
    keys: dict[str, bytes] = {}
    for node_id in prompt:
        _key(node_id, prompt, fingerprints, keys, set())
    return keys


def _key(
    node_id: str,
    prompt: Mapping[str, Any],
    fingerprints: Fingerprints,
    keys: dict[str, bytes],
    path: set[str],
) -> bytes:
    if node_id in keys:
        return keys[node_id]
    if node_id in path:  # a cycle; it cannot run, so any constant will do
        return b"cycle"
    node = prompt.get(node_id)
    if node is None:
        return b"missing"
    parts: list[Any] = [node["class_type"], fingerprints.get(node_id)]
    inputs = node["inputs"]
    path.add(node_id)
    for name in sorted(inputs):
        value = inputs[name]
        if is_link(value):
            parts.append((name, _key(value[0], prompt, fingerprints, keys, path), value[1]))
        else:
            parts.append((name, value))
    path.discard(node_id)
    key = blake2b(msgspec.json.encode(parts, order="deterministic"), digest_size=16).digest()
    keys[node_id] = key
    return key


@attrs.frozen(kw_only=True)
class Kept:
    """The result of a node, and the id of the node that produced it."""

    result: NodeResult
    node_id: str


@attrs.define(eq=False, kw_only=True)
class ResultCache:
    """Results by key.

    What is kept depends on *kind*. Classic: the results of the last graph. LRU: those of the *size* nodes used last.
    None: nothing.
    """

    kind: CacheKind
    size: int = 0
    _kept: OrderedDict[bytes, Kept] = attrs.field(factory=OrderedDict)

    def begin(self, keys: Iterable[bytes]) -> None:
        """A prompt with these keys begins: drop what the rules do not keep any longer."""
        wanted = set(keys)
        if self.kind is CacheKind.LRU:
            for key in wanted & self._kept.keys():
                self._kept.move_to_end(key)
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        else:
            for key in self._kept.keys() - wanted:
                del self._kept[key]

    def end(self) -> None:
        """The prompt has ended."""
        if self.kind is CacheKind.NONE:
            self._kept.clear()

    def get(self, key: bytes) -> Kept | None:
        """Return what is kept for a node, by its key."""
        return self._kept.get(key)

    def put(self, key: bytes, kept: Kept) -> None:
        """Keep the result of a node."""
        self._kept[key] = kept
        self._kept.move_to_end(key)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
