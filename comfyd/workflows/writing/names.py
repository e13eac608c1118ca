"""Names for a Python file: of the inputs, and of what the nodes of a graph compute."""

import builtins
import keyword
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import attrs

from comfyd.engine import is_link
from comfyd.workflows.widgets import slug, widgets_of

_LONGEST: Final = 28
"""Characters of a name that is made of a title; longer ones make lines that nobody reads."""
_SHADOWED: Final = frozenset(
    {"attrs", "choices", "inputs", "installed_model", "models", "random", "random_seed", "warmup_checkpoint"}
)
_NO_MEMBERS: Final = _SHADOWED | {"bool", "float", "int", "list", "self", "str"}
"""What the file uses inside its class, where a member of that name would hide it; attrs writes ``self`` itself."""
_NO_LOCALS: Final = frozenset(dir(builtins)) | _SHADOWED | {"graph", "given", "node", "workflow"}
_EMPTY_WORDS: Final = frozenset({"load", "loader", "simple", "node"})

_WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "EmptyLatentImage": "latent",
        "EmptySD3LatentImage": "latent",
        "KSampler": "sampled",
        "KSamplerAdvanced": "sampled",
        "SamplerCustom": "sampled",
        "SamplerCustomAdvanced": "sampled",
        "VAEDecode": "picture",
        "VAEDecodeTiled": "picture",
        "VAEEncode": "latent",
    }
)
"""What people call what ComfyUI's commonest nodes make (0.3.64, ``nodes.py``), instead of the type alone."""

Output = tuple[str, int]


def identifier(text: str, taken: Collection[str] = ()) -> str:
    """Make a Python name of *text*, unlike all of *taken*."""
    name = re.sub(r"\W", "_", slug(text)) or "value"
    if not name.isidentifier():
        name = f"value_{name}"
        name = name if name.isidentifier() else "value"
    if keyword.iskeyword(name):
        name += "_"
    number, free = 2, name
    while free in taken:
        free = f"{name}_{number}"
        number += 1
    return free


def input_names(names: Iterable[str]) -> dict[str, str]:
    """Map the names of inputs to names that a Python class can have."""
    found: dict[str, str] = {}
    for name in names:
        taken = _NO_MEMBERS.union(found.values())
        own = identifier(name)
        found[name] = own if own not in taken else identifier(f"{own}_input", taken)
    return found


@attrs.frozen(kw_only=True)
class NodeNames:
    """The variables of a graph. A node that is in neither has none: nobody links to it."""

    whole: Mapping[str, str]
    """Variables that hold a node; its first output is meant unless another one is asked for."""
    outputs: Mapping[str, tuple[str, ...]]
    """Variables that hold the outputs of a node; ``_`` is one that is not used."""

    def link(self, node_id: str, output: int) -> str:
        """Write a link to an output."""
        if node_id in self.outputs:
            return self.outputs[node_id][output]
        return self.whole[node_id] if output == 0 else f"{self.whole[node_id]}[{output}]"


_MOST_UNPACKED: Final = 4


def hand_titles(graph: Mapping[str, Any]) -> dict[str, str]:
    """Find the titles that somebody chose, by node; those that ComfyUI's editor writes by itself are left out.

    It is asked of a widget, and not all nodes have one; so each is given one for this.
    """
    alike = {node_id: {**node, "inputs": {"widget": 0}} for node_id, node in graph.items()}
    return {widget.node_id: widget.title for widget in widgets_of(alike) if widget.titled_by_hand}


def node_names(graph: Mapping[str, Any], order: Sequence[str], object_info: Mapping[str, Any]) -> NodeNames:
    """Name what the nodes make, in the *order* in which they are written.

    In turn the ways to a name are tried, and the first that gives a thing one that no other wants is taken: a title
    that somebody chose; what it is used for; what it is; the name of its class.
    """
    users: dict[Output, set[str]] = {}
    for node in graph.values():
        for name, value in (node.get("inputs") or {}).items():
            if is_link(value):
                users.setdefault((value[0], value[1]), set()).add(name)
    used: dict[str, list[int]] = {}
    for node_id, output in users:
        used.setdefault(node_id, []).append(output)
    unpacked = {node_id for node_id, found in used.items() if len(found) > 1 and max(found) < _MOST_UNPACKED}
    things: list[Output] = []
    for node_id in order:
        if node_id in unpacked:
            things += ((node_id, output) for output in sorted(used[node_id]))
        elif node_id in used:
            things.append((node_id, 0))

    titles = hand_titles(graph)

    def kind(thing: Output) -> str:
        return output_name(object_info, graph[thing[0]]["class_type"], thing[1])

    def title(thing: Output) -> str:
        own = slug(titles.get(thing[0], ""))
        return own if thing[0] not in unpacked and len(own) <= _LONGEST else ""

    def role(thing: Output) -> str:
        found = users.get(thing, set())
        return next(iter(found)) if len(found) == 1 and found <= {"positive", "negative"} else ""

    def what(thing: Output) -> str:
        return "" if thing[0] in unpacked else _WORDS.get(graph[thing[0]]["class_type"], "")

    def long(thing: Output) -> str:
        class_type = slug(_snake(graph[thing[0]]["class_type"]))
        if thing[0] not in unpacked:
            return class_type
        words = [word for word in class_type.split("_") if word not in _EMPTY_WORDS]
        return "_".join([*words, kind(thing) or str(thing[1])])

    def first_kind(thing: Output) -> str:
        """The plain name for the first loader: ``model``, and ``lora_model`` for what comes after it."""
        return kind(thing) if thing in firsts else ""

    firsts = {kind(thing): thing for thing in reversed(things) if thing[0] in unpacked}.values()
    found = _named(things, (title, role, what, first_kind, kind, long))
    return NodeNames(
        whole={node_id: found[node_id, 0] for node_id in used if node_id not in unpacked},
        outputs={
            node_id: tuple(found.get((node_id, output), "_") for output in range(max(used[node_id]) + 1))
            for node_id in unpacked
        },
    )


def output_name(object_info: Mapping[str, Any], class_type: str, output: int) -> str:
    """What the engine calls an output, as words; empty where it says nothing."""
    info = object_info.get(class_type)
    for key in ("output_name", "output"):
        names = info.get(key) if isinstance(info, dict) else None
        if isinstance(names, list | tuple) and output < len(names) and isinstance(names[output], str):
            return slug(_snake(names[output]))
    return ""


def _named(things: Sequence[Output], ways: Sequence[Callable[[Output], str]]) -> dict[Output, str]:
    names: dict[Output, str] = {}
    taken = set(_NO_LOCALS)
    left = list(things)
    for way in ways:
        wanted: dict[str, list[Output]] = {}
        for thing in left:
            text = way(thing)
            wanted.setdefault(identifier(text) if text else "", []).append(thing)
        for name, those in wanted.items():
            if name and len(those) == 1 and name not in taken:
                names[those[0]] = name
                taken.add(name)
        left = [thing for thing in left if thing not in names]
    for thing in left:
        names[thing] = identifier(ways[-1](thing), taken)
        taken.add(names[thing])
    return names


def _snake(name: str) -> str:
    """``VAEDecode`` is ``VAE_Decode``, ``KSampler`` stays ``KSampler``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z]{2})(?=[A-Z][a-z])", "_", name)
