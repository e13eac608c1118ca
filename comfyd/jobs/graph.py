"""Looking at a prompt graph before ComfyUI does, and making its file names the job's own.

ComfyUI trusts the shape of a graph: a node without ``inputs`` that no output depends on passes its validation and then
kills its only worker thread for good (0.3.64, ``execution.py``). So shapes and links are checked here, everything else
by ComfyUI itself, which knows its nodes best.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import attrs

from comfyd.engine import NodeClasses, is_link
from comfyd.errors import Fault
from comfyd.wire import nearest, quoted

MAX_NODES: Final = 20_000
"""Far beyond any real graph (the largest published ones have some hundreds of nodes); a bound on work per request."""

CONCATENATE: Final = "StringConcatenate"
"""ComfyUI's own node that joins two strings, used to prepend the id to a prefix that another node computes."""


@attrs.frozen(kw_only=True)
class PreparedGraph:
    """A graph whose nodes all have ``inputs``, with rewritten prefixes. *prefixes* are the literal ones among them."""

    nodes: dict[str, dict[str, Any]]
    prefixes: tuple[str, ...]


def check_shape(prompt: Mapping[str, Any]) -> list[Fault]:
    """Find everything in *prompt* that is not the shape of a graph, or links to a node that is not there."""
    if not prompt:
        return [Fault(location="prompt", message="the graph is empty; at least one node is needed")]
    if len(prompt) > MAX_NODES:
        return [Fault(location="prompt", message=f"must have at most {MAX_NODES} nodes, got {len(prompt)}")]
    return [fault for node_id, node in prompt.items() for fault in _check_node(node_id, node, prompt)]


def _check_node(node_id: str, node: Any, prompt: Mapping[str, Any]) -> Iterator[Fault]:
    place = f"prompt.{node_id}"
    if not isinstance(node, dict):
        hint = ""
        if node_id in {"nodes", "links", "last_node_id", "version"}:
            hint = '; this looks like a workflow saved by the editor: use "Export (API)" in ComfyUI'
        yield Fault(location=place, message=f'must be a node: {{"class_type", "inputs"}}, got {quoted(node)}{hint}')
        return
    class_type = node.get("class_type")
    if not isinstance(class_type, str) or not class_type:
        got = f", got {quoted(class_type)}" if "class_type" in node else ""
        yield Fault(location=f"{place}.class_type", message=f"must be the name of a node class{got}")
    inputs = node.get("inputs")
    if inputs is None:
        inputs = {}
    if not isinstance(inputs, dict):
        yield Fault(location=f"{place}.inputs", message=f"must be an object, got {quoted(inputs)}")
        return
    meta = node.get("_meta")
    if meta is not None and not isinstance(meta, dict):
        yield Fault(location=f"{place}._meta", message=f"must be an object, got {quoted(meta)}")
    for name, value in inputs.items():
        if is_link(value) and value[0] not in prompt:
            yield Fault(
                location=f"{place}.inputs.{name}",
                message=f"links to node {quoted(value[0])}, which is not in the graph",
            )
        elif name == "filename_prefix" and isinstance(value, str) and _leaves_folder(value):
            yield Fault(
                location=f"{place}.inputs.{name}",
                message=f"must stay below OUTPUT_DIR; absolute paths and .. are not accepted, got {quoted(value)}",
            )


def _leaves_folder(prefix: str) -> bool:
    parts = prefix.replace("\\", "/").split("/")
    return prefix[:1] in {"/", "\\"} or ".." in parts or "\0" in prefix


def check_classes(prompt: Mapping[str, Any], known: NodeClasses) -> list[Fault]:
    """Find nodes of classes that the engine does not have, with the nearest name it does have."""
    faults = []
    for node_id, node in prompt.items():
        class_type = node["class_type"]
        if class_type not in known.names:
            like = nearest(class_type, known.names)
            hint = f"; did you mean {quoted(like)}?" if like else ""
            message = f"ComfyUI has no node class {quoted(class_type)}{hint}"
            faults.append(Fault(location=f"prompt.{node_id}.class_type", message=message))
    return faults


def saves_something(prompt: Mapping[str, Any], known: NodeClasses) -> bool:
    """Whether any node of the graph writes files: the rest is not worth an engine's time."""
    return any(node["class_type"] in known.saving or _is_saver(node) for node in prompt.values())


def _is_saver(node: Mapping[str, Any]) -> bool:
    """comfyui-api's rule for classes that do not say that they are outputs: they have a file name prefix."""
    return bool((node.get("inputs") or {}).get("filename_prefix"))


def prepare_graph(prompt: Mapping[str, Any], job_id: str, known: NodeClasses) -> PreparedGraph:
    """Copy a checked graph, give every node its ``inputs``, and put the job's id into every ``filename_prefix``.

    A prefix ``name`` becomes ``<id>_name``, and ``folder/name`` becomes ``folder/<id>_name``: the folder is the
    caller's wish, and the file's own name must say whose it is. A prefix that comes from another node is
    joined with the id by a node of ours, where the engine has one that joins strings; where it has not, the link stays.
    """
    nodes = {node_id: {**node, "inputs": dict(node.get("inputs") or {})} for node_id, node in prompt.items()}
    prefixes = []
    for node_id, node in list(nodes.items()):
        prefix = node["inputs"].get("filename_prefix")
        if isinstance(prefix, int | float):
            prefix = str(prefix)  # as ComfyUI does itself (0.3.64, execution.py, validate_inputs)
        if isinstance(prefix, str):
            folder, slash, name = prefix.rpartition("/")
            rewritten = f"{folder}{slash}{job_id}_{name}"
            node["inputs"]["filename_prefix"] = rewritten
            prefixes.append(rewritten)
        elif is_link(prefix) and CONCATENATE in known.names:
            joined = _unused_id(f"{node_id}_prefix", nodes)
            nodes[joined] = {
                "class_type": CONCATENATE,
                "inputs": {"string_a": f"{job_id}_", "string_b": prefix, "delimiter": ""},
                "_meta": {"title": "comfyd: the job's id before the prefix"},
            }
            node["inputs"]["filename_prefix"] = [joined, 0]
            prefixes.append(f"{job_id}_")
    return PreparedGraph(nodes=nodes, prefixes=tuple(prefixes))


def mark_unlike_cached(graph: Mapping[str, dict[str, Any]], node_ids: Iterable[str], mark: str) -> None:
    """Make ComfyUI run the nodes *node_ids* although it has run the same graph before.

    An input that a node's class does not know is part of the key under which its result is cached, and is not passed to
    it (0.3.64, ``comfy_execution/caching.py`` and ``execution.py``). What comes before these nodes stays cached.
    """
    for node_id in node_ids:
        if node_id in graph:
            graph[node_id]["inputs"]["comfyd_run"] = mark


def _unused_id(wish: str, nodes: Mapping[str, Any]) -> str:
    while wish in nodes:
        wish += "_"
    return wish
