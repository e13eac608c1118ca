"""A graph as the Python file that makes it again: its usual widgets as inputs, everything else as it is."""

import keyword
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import attrs

from comfyd.engine import is_link
from comfyd.errors import ComfydError
from comfyd.workflows.author import SEED_MAX
from comfyd.workflows.live import MODEL_INPUTS, LiveInfo
from comfyd.workflows.offers import TypedOffer
from comfyd.workflows.writing.choosing import Chosen
from comfyd.workflows.writing.names import hand_titles, input_names, node_names
from comfyd.workflows.writing.source_text import (
    WIDTH,
    Expression,
    Group,
    annotated_name,
    call,
    fits,
    flat,
    laid_out,
    literal,
    quote,
    subscript,
)

_INDENT: Final = " " * 4
_MOST_LITERALS: Final = 12
"""Longer enumerations are asked of the engine: they are lists of files, or as long as one."""
_LARGEST_DRAWN_SEED: Final = 2**53 - 1  # random_seed() draws up to here
_INT64: Final = range(-(2**63), 2**63)
_BASES: Final = {"int": "int", "float": "float", "string": "str", "bool": "bool"}
_MEDIA: Final = {"image": "Image", "video": "Video", "audio": "Audio"}


class CircularGraph(ComfydError):
    """Nodes of the graph wait for each other: it cannot run, and no order of them can be written down."""

    def __init__(self, node_ids: Iterable[str]) -> None:
        shown = " -> ".join(node_ids)
        super().__init__(f"the graph runs in a circle: {shown}")


@attrs.define
class _Imports:
    """What the file uses of other modules, collected while its text is made."""

    comfyd: set[str] = attrs.field(factory=lambda: {"Graph", "inputs"})
    typing: set[str] = attrs.field(factory=set)
    modules: set[str] = attrs.field(factory=set)

    def lines(self) -> Iterator[str]:
        """Give the lines, sorted as ruff's isort rules sort them."""
        yield from (f"import {name}" for name in ("random",) if name in self.modules)
        if self.typing:
            yield f"from typing import {', '.join(sorted(self.typing))}"
        if self.typing or "random" in self.modules:
            yield ""
        if "attrs" in self.modules:
            yield from ("import attrs", "")
        names = sorted(self.comfyd, key=lambda name: (name[0].islower(), name))
        line = f"from comfyd.workflow import {', '.join(names)}"
        if len(line) <= WIDTH:
            yield line
        else:
            yield from ("from comfyd.workflow import (", *(f"{_INDENT}{name}," for name in names), ")")


def write_python(chosen: Chosen, live: LiveInfo, *, summary: str, description: str) -> str:
    """Write the file.

    Raises:
        CircularGraph: nodes wait for each other.
    """
    order = running_order(chosen.graph)
    imports = _Imports()
    names = input_names(offer.name for offer in chosen.offers)
    members = [line for offer in chosen.offers for line in _member(names[offer.name], offer, chosen, live, imports)]
    given = {place: f"given.{names[offer.name]}" for offer in chosen.offers for place in offer.places}
    body = list(_body(chosen.graph, order, given, live))
    lines = [
        *_docstring(summary, description),
        "",
        *imports.lines(),
        *("", "", "@inputs", "class Input:", f'{_INDENT}"""What a caller may choose."""'),
        *(("", *members) if members else ()),
        *("", "", "def workflow(given: Input) -> Graph:", f'{_INDENT}"""Write the graph."""'),
        *body,
        "",
    ]
    return "\n".join(lines)


def python_input(chosen: Chosen) -> dict[str, Any]:
    """Return the input of which the file makes the graph that it was written from."""
    own = chosen.own_input()
    return {name: own[offer] for offer, name in input_names(own).items()}


def running_order(graph: Mapping[str, Any]) -> list[str]:
    """Sort nodes: each after those that it needs, and otherwise as the graph has them.

    The graph may be of thousands of nodes in one chain, so nothing here calls itself.

    Raises:
        CircularGraph: there is no such order.
    """
    order: dict[str, None] = {}
    feeding = {value[0] for node in graph.values() for value in _inputs(node).values() if is_link(value)}
    ends = [node_id for node_id in graph if node_id not in feeding]
    for start in (*ends, *graph):  # a circle has no end
        path = {} if start in order else {start: _needed(graph[start])}
        while path:
            here = next(reversed(path))
            following = next((each for each in path[here] if each not in order), None)
            if following is None:
                order[here] = None
                del path[here]
            elif following in path:
                circle = list(path)
                raise CircularGraph([*circle[circle.index(following) :], following])
            else:
                path[following] = _needed(graph[following])
    return list(order)


def _needed(node: Mapping[str, Any]) -> Iterator[str]:
    return iter([value[0] for value in _inputs(node).values() if is_link(value)])


def _inputs(node: Mapping[str, Any]) -> Mapping[str, Any]:
    return node.get("inputs") or {}


def _docstring(summary: str, description: str) -> Iterator[str]:
    summary, description = (_safe(text) for text in (summary, description))
    if not description:
        yield f'"""{summary}"""'
        return
    yield f'"""{summary}'
    yield ""
    yield from textwrap.wrap(description, WIDTH, break_long_words=False, break_on_hyphens=False)
    yield '"""'


def _safe(text: str) -> str:
    """Make text fit for a docstring: one line, nothing that ends it or escapes."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(plain.replace("\\", "/").replace('"', "'").split())


def _member(name: str, offer: TypedOffer, chosen: Chosen, live: LiveInfo, imports: _Imports) -> Iterator[str]:
    annotation = _type(offer, chosen, live, imports)
    words = _field_words(offer, annotation)
    if words:
        imports.typing.add("Annotated")
        imports.comfyd.add("Field")
        field = call("Field", *words)
        if isinstance(annotation, Group) and annotation.opening == "Annotated[":
            annotation = Group("Annotated[", (*annotation.items, ("", field)), "]")
        else:
            annotation = subscript("Annotated", annotation, field)
    return annotated_name(name, annotation, _default(offer, imports))


def _type(offer: TypedOffer, chosen: Chosen, live: LiveInfo, imports: _Imports) -> Expression:
    if offer.media is not None:
        word = _MEDIA[offer.media.kind.value]
        imports.comfyd.add(word)
        return f"{word} | list[{word}]" if offer.media.is_folder else word
    if offer.kind == "choice":
        return _choice_type(offer, chosen, live, imports)
    if offer.kind == "int" and (offer.low, offer.high) == (0, SEED_MAX):
        imports.comfyd.add("Seed")
        return "Seed"
    return _BASES[offer.kind]


def _choice_type(offer: TypedOffer, chosen: Chosen, live: LiveInfo, imports: _Imports) -> Expression:
    node_id, name = offer.places[0]
    class_type = chosen.graph[node_id]["class_type"]
    options = offer.choices or ()
    for word, known in (("Sampler", live.samplers), ("Scheduler", live.schedulers)):
        if known and options == known:
            imports.comfyd.add(word)
            return word
    kind = MODEL_INPUTS.get((class_type, name))
    if kind == "checkpoints":
        imports.comfyd.add("Checkpoint")
        return "Checkpoint"
    if kind is None and _are_few_words(options) and offer.default in options:
        imports.typing.add("Literal")
        return subscript("Literal", *(literal(option) for option in options))
    imports.typing.add("Annotated")
    base = {bool: "bool", int: "int", float: "float"}.get(type(offer.default), "str")
    if kind is not None:
        imports.comfyd.add("models")
        return subscript("Annotated", base, call("models", ("", quote(kind))))
    imports.comfyd.add("choices")
    return subscript("Annotated", base, call("choices", ("", quote(class_type)), ("", quote(name))))


def _are_few_words(options: tuple[Any, ...]) -> bool:
    """Whether the choices are the class's own, and no list of the files that somebody has."""
    return (
        0 < len(options) <= _MOST_LITERALS
        and len(set(options)) == len(options)
        and all(isinstance(option, str) and "." not in option and "/" not in option for option in options)
    )


def _field_words(offer: TypedOffer, annotation: Expression) -> list[tuple[str, Expression]]:
    words: list[tuple[str, Expression]] = []
    if offer.description:
        words.append(("description=", quote(offer.description)))
    if annotation == "Seed":
        return words
    for label, bound in (("ge=", offer.low), ("le=", offer.high), ("multiple_of=", offer.step)):
        # msgspec's bounds are of 64 bits, but for a maximum, which Field() helps with. A greater one is none.
        helped = label == "le=" and bound is not None and bound <= SEED_MAX
        if bound is not None and (bound in _INT64 or isinstance(bound, float) or helped):
            words.append((label, repr(bound)))
    return words


def _default(offer: TypedOffer, imports: _Imports) -> Expression | None:
    if offer.required:
        return None
    if not offer.drawn:
        return literal(offer.default)
    low = max(0, int(offer.low or 0))
    high = _LARGEST_DRAWN_SEED if offer.high is None else int(offer.high)
    if low == 0 and high >= _LARGEST_DRAWN_SEED:
        imports.comfyd.add("random_seed")
        return "random_seed()"
    imports.modules |= {"attrs", "random"}  # random_seed() would draw what this node does not take
    return call("attrs.field", ("factory=", f"lambda: random.randint({low}, {min(high, _LARGEST_DRAWN_SEED)})"))


def _body(
    graph: Mapping[str, Any], order: list[str], given: Mapping[tuple[str, str], str], live: LiveInfo
) -> Iterator[str]:
    names = node_names(graph, order, live.object_info)
    titles = hand_titles(graph)
    yield f"{_INDENT}graph = Graph()"
    for node_id in order:
        node = graph[node_id]
        values: list[tuple[str, Expression]] = []
        odd: list[tuple[str, Expression]] = []
        for name, value in _inputs(node).items():
            if (node_id, name) in given:
                written: Expression = given[node_id, name]
            else:
                written = names.link(value[0], value[1]) if is_link(value) else literal(value)
            if _is_keyword_argument(name):
                values.append((f"{name}=", written))
            else:
                odd.append((f"{quote(name)}: ", written))
        if odd:
            values.append(("**", Group("{", tuple(odd), "}")))
        made = call("graph.node", ("", quote(node["class_type"])), *values)
        yield from _statement(made, titles.get(node_id), names.whole.get(node_id), names.outputs.get(node_id))
    yield f"{_INDENT}return graph"


def _statement(made: Group, title: str | None, whole: str | None, outputs: tuple[str, ...] | None) -> Iterator[str]:
    titled = f".titled({quote(title)})" if title else ""
    taken = f".outputs({len(outputs)})" if outputs else ""
    target = f"{', '.join(outputs)} = " if outputs else f"{whole} = " if whole else ""
    line = f"{_INDENT}{target}{flat(made)}{titled}{taken}"
    if fits(line):
        yield line
        return
    if not (titled or taken):
        yield from laid_out(target, made, indent=_INDENT)
        return
    # A chain of calls over several lines is hard to read: one call for each statement.
    node = whole or "node"
    yield from laid_out(f"{node} = ", made, indent=_INDENT)
    if titled:
        yield f"{_INDENT}{node}{titled}"
    if taken:
        yield f"{_INDENT}{target}{node}{taken}"


def _is_keyword_argument(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)
