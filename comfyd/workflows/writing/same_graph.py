"""Whether two graphs are the same but for their nodes' ids, and where they differ if not.

Titles do not count. A node is known by its class, its values, and the nodes that it is linked to, so one
digest for each node, made in running order, is enough: no search for a mapping of ids is needed.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from comfyd.engine import is_link
from comfyd.wire import decode_json, encode_json, quoted
from comfyd.workflows.writing.python_file import running_order

_MOST_TOLD: Final = 20
"""Differences. Who mends these finds the others the next time."""


def differences(wanted: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """Say in what *made* is not *wanted*, for the person or the program that wrote it; nothing if it is the same.

    Raises:
        CircularGraph: one of them cannot be put in order.
    """
    digests, others = _digests(wanted), _digests(made)
    if Counter(digests.values()) == Counter(others.values()):
        return []
    told = [*_own_differences(wanted, made)] or [*_link_differences(wanted, digests, others)]
    return told[:_MOST_TOLD]


def _digests(graph: Mapping[str, Any]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for node_id in running_order(graph):
        node = graph[node_id]
        parts = [node["class_type"].encode("utf-8", "surrogatepass")]
        for name, value in sorted(_inputs(node).items()):
            parts.append(name.encode("utf-8", "surrogatepass"))
            parts.append(found[value[0]] + b"%d" % value[1] if is_link(value) else b"=" + _json_text(value))
        found[node_id] = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
    return found


def _json_text(value: Any) -> bytes:
    """Write a value so that equal ones are the same text: 1 and 1.0 are one number, and true is none."""
    return encode_json(_plain(value))


def _plain(value: Any) -> Any:
    match value:
        case float() if value.is_integer():
            return int(value)
        case Mapping():
            return {key: _plain(value[key]) for key in sorted(value)}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


def _own_differences(wanted: Mapping[str, Any], made: Mapping[str, Any]) -> Iterator[str]:
    """Compare the nodes of each class by their own values."""
    left: dict[str, list[dict[str, bytes]]] = {}
    for node in made.values():
        left.setdefault(node["class_type"], []).append(_values(node))
    missing = []
    for node_id, node in wanted.items():
        alike = left.get(node["class_type"], [])
        if _values(node) in alike:
            alike.remove(_values(node))
        else:
            missing.append(node_id)
    for node_id in missing:
        node = wanted[node_id]
        values = _values(node)
        alike = left.get(node["class_type"], [])
        what = f"node {quoted(node_id)} ({node['class_type']})"
        if not alike:
            yield f"{what} is missing"
            continue
        nearest = max(alike, key=lambda other: sum(other.get(name) == value for name, value in values.items()))
        alike.remove(nearest)
        for name in sorted(values.keys() | nearest.keys()):
            if values.get(name) != nearest.get(name):
                yield f"{what}: {name} must be {_told(values.get(name))}, is {_told(nearest.get(name))}"
    for class_type, others in left.items():
        for _ in others:
            yield f"there is one {class_type} too many"


def _link_differences(
    wanted: Mapping[str, Any], digests: Mapping[str, bytes], others: Mapping[str, bytes]
) -> Iterator[str]:
    """Name the nodes whose own values are right and whose links are not: the first of each chain."""
    known = set(others.values())
    for node_id, node in wanted.items():
        links = [value[0] for value in _inputs(node).values() if is_link(value)]
        if digests[node_id] not in known and all(digests[each] in known for each in links):
            shown = ", ".join(f"{name} to {value}" for name, value in _inputs(node).items() if is_link(value))
            yield f"node {quoted(node_id)} ({node['class_type']}) must be linked so: {shown}"
    if set(digests.values()) <= known:
        yield "a node that is used several times is made several times, or the other way round"


_LINK: Final = b"a link"  # which is no JSON


def _values(node: Mapping[str, Any]) -> dict[str, bytes]:
    """Give the inputs as JSON text, in which true is not 1."""
    return {name: _LINK if is_link(value) else _json_text(value) for name, value in _inputs(node).items()}


def _told(value: bytes | None) -> str:
    if value is None:
        return "left out"
    return "a link" if value == _LINK else quoted(decode_json(value))


def _inputs(node: Mapping[str, Any]) -> Mapping[str, Any]:
    return node.get("inputs") or {}
