"""The widgets of a graph, what is not linked, and a name for each: unique, and the same after each reload.

Names come from the graph alone and not from what an engine says of its classes, so that a caller's names do not change
with the engine, and an engine that is not up yet changes nothing.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import attrs

from comfyd.engine import is_link

MAX_NAME_CHARACTERS: Final = 64
MAX_FOLLOWED_NODES: Final = 1000
"""So far a text is followed to learn whether it is the prompt or the negative one; then it has no role."""

_MARK: Final = re.compile(r"\s*input\s*:\s*(?P<name>[^()]*?)\s*(?:\((?P<only>[^()]*)\))?\s*\Z", re.IGNORECASE)
_TEXTS: Final = frozenset({"text", "value", "string", "prompt"})
_GENERIC: Final = _TEXTS | {"image", "video", "audio", "file"}
"""What such a widget is about is said by its node's title, not by its own name."""
_DEFAULT_TITLES: Final = frozenset({"loadcheckpoint", "loadvae", "loadlora", "loadclip", "loaddiffusionmodel"})


@attrs.frozen(kw_only=True)
class Widget:
    """A value in a graph that is not a link. *title* is the node's, without the mark."""

    node_id: str
    input: str
    class_type: str
    title: str
    titled_by_hand: bool
    value: Any
    role: str | None = None
    """``prompt`` or ``negative_prompt``, where the links say so."""

    @property
    def place(self) -> tuple[str, str]:
        """Where it is: node id and input name."""
        return self.node_id, self.input


def widgets_of(graph: Mapping[str, Any]) -> tuple[Widget, ...]:
    """List the widgets of all nodes, by node id and in each node's own order.

    Only plain values are listed: what custom nodes keep as lists or objects belongs to their own pages.
    """
    uses = _uses(graph)
    return tuple(
        Widget(
            node_id=node_id,
            input=name,
            class_type=graph[node_id]["class_type"],
            title=_title(graph[node_id]),
            titled_by_hand=_titled_by_hand(graph[node_id]),
            value=value,
            role=_role(node_id, uses) if name in _TEXTS and isinstance(value, str) else None,
        )
        for node_id in sorted(graph, key=_natural)
        for name, value in (graph[node_id].get("inputs") or {}).items()
        if isinstance(value, str | int | float)
    )


def marked(graph: Mapping[str, Any], widgets: Iterable[Widget]) -> tuple[Widget, ...]:
    """Choose the widgets of nodes that are titled ``input: name``, or ``input: name (widget, widget)``."""
    chosen = []
    for widget in widgets:
        mark = _MARK.match(_raw_title(graph[widget.node_id]))
        if mark is not None:
            only = {part.strip() for part in (mark["only"] or "").split(",") if part.strip()}
            if not only or widget.input in only:
                chosen.append(widget)
    return tuple(chosen)


def named(widgets: Iterable[Widget]) -> dict[str, Widget]:
    """Give each widget a name, in their order.

    In turn the ways to a name are tried: the first that gives a widget one that no other wants. A widget that is alone
    on a node with a title of its author's has that title; generic ones (``text``) take the title or their role, others
    their own name; then title and widget, then the node's id is added, which is unique but for odd characters.
    """
    left = list(widgets)
    order = {widget.place: index for index, widget in enumerate(left)}
    alone = _alone(left)
    names: dict[str, Widget] = {}
    ways: tuple[Callable[[Widget], str], ...] = (
        lambda widget: _short_name(widget, alone=widget.node_id in alone),
        _long_name,
        lambda widget: f"{_long_name(widget)}_{slug(widget.node_id)}",
    )
    for way in ways:
        wanted: dict[str, list[Widget]] = {}
        for widget in left:
            wanted.setdefault(_cut(way(widget)), []).append(widget)
        left = []
        for name, those in wanted.items():
            if len(those) == 1 and name not in names:
                names[name] = those[0]
            else:
                left += those
    for widget in sorted(left, key=lambda widget: (_natural(widget.node_id), widget.input)):
        name = _cut(_long_name(widget))
        number = 2
        while f"{name}_{number}" in names:
            number += 1
        names[f"{name}_{number}"] = widget
    return dict(sorted(names.items(), key=lambda item: order[item[1].place]))


def slug(text: str) -> str:
    """Make a name of words: letters and digits of any script, in lower case, joined by ``_``."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", re.sub(r"[\W_]+", "_", folded)).strip("_")


def _cut(name: str) -> str:
    name = name[:MAX_NAME_CHARACTERS].strip("_") or "input"
    return name if not name[0].isdigit() else f"input_{name}"


def _short_name(widget: Widget, *, alone: bool) -> str:
    title = slug(widget.title) if widget.titled_by_hand else ""
    if title and (alone or widget.input in _GENERIC):
        return title
    return widget.role or slug(widget.input)


def _long_name(widget: Widget) -> str:
    own = slug(widget.input)
    title = slug(widget.title) or slug(widget.class_type)
    return title if title.endswith(own) else f"{title}_{own}"


def _alone(widgets: Iterable[Widget]) -> frozenset[str]:
    counts: dict[str, int] = {}
    for widget in widgets:
        counts[widget.node_id] = counts.get(widget.node_id, 0) + 1
    return frozenset(node_id for node_id, count in counts.items() if count == 1)


def _raw_title(node: Mapping[str, Any]) -> str:
    title = (node.get("_meta") or {}).get("title")
    return title if isinstance(title, str) else ""


def _title(node: Mapping[str, Any]) -> str:
    title = _raw_title(node)
    mark = _MARK.match(title)
    return (mark["name"] if mark is not None else title) or node["class_type"]


def _titled_by_hand(node: Mapping[str, Any]) -> bool:
    """Whether the author chose the title. The editor writes the class's display name otherwise, which resembles it."""
    title = _raw_title(node)
    if _MARK.match(title) is not None:
        return True
    given, own = slug(title).replace("_", ""), slug(node["class_type"]).replace("_", "")
    return bool(given) and given not in _DEFAULT_TITLES and not (given.startswith(own) or own.startswith(given))


def _natural(node_id: str) -> tuple[Any, ...]:
    """Sort ``10`` after ``9``, and ``8:2`` (in a subgraph) after ``8:1``."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", node_id))


Uses = dict[str, list[tuple[str, str]]]


def _uses(graph: Mapping[str, Any]) -> Uses:
    uses: Uses = {}
    for node_id, node in graph.items():
        for name, value in (node.get("inputs") or {}).items():
            if is_link(value):
                uses.setdefault(value[0], []).append((node_id, name))
    return uses


def _role(node_id: str, uses: Uses) -> str | None:
    """Follow a text to the sampler: what ends in its ``positive`` is the prompt."""
    found: set[str] = set()
    seen = {node_id}
    left = [node_id]
    while left and len(seen) < MAX_FOLLOWED_NODES:
        for user, name in uses.get(left.pop(), ()):
            if name in {"positive", "negative"}:
                found.add(name)
            elif user not in seen:
                seen.add(user)
                left.append(user)
    if len(found) != 1:
        return None
    return "prompt" if found == {"positive"} else "negative_prompt"
