"""The JSON Schema of an input: live choices put in and checked, and the rows of a table made from it.

What a type cannot say stands in the schema under names of ours, at the very place it is about (msgspec carries
``Meta.extra_json_schema`` there), so nested classes, lists and optional members need no second walk over types.
"""

import difflib
import heapq
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import attrs

from comfyd.errors import Fault
from comfyd.wire import encode_json, quoted
from comfyd.workflows.live import LiveInfo

CHOICES: Final = "x-comfyd-choices"
"""Where the values of an input come from (:meth:`LiveInfo.choices`); becomes ``enum`` when the schema is told."""
MEDIA: Final = "x-comfyd-media"
"""``image``, ``video`` or ``audio``: a file name, a URL, a data URL or base64."""
DEFAULT: Final = "x-comfyd-default"
"""The words for a default that is no value, such as ``random``."""
GROUP: Final = "x-comfyd-group"
"""The heading under which a form may show an input."""

_INT64_MAX: Final = 2**63 - 1
_SHOWN_CHOICES: Final = 12
"""Longer enumerations (there are 40 samplers) are left out of tables and messages; the schema has all of them."""
_NEAR: Final = 3
_COMPARED: Final = 50
_PIECES: Final = 24
MAX_LIVE_FAULTS: Final = 20
"""So many names that the engine does not have are told of: looking for the nearest of each takes milliseconds."""


@attrs.frozen(kw_only=True)
class InputField:
    """One input of a workflow, in words. *default* and *bounds* are empty where there are none."""

    name: str
    type: str
    required: bool
    default: str
    description: str
    bounds: str
    group: str | None = None


def inlined(schema: Any, components: Mapping[str, Any]) -> Any:
    """Put the components in the place of the references to them: the schema stands for itself wherever it is put.

    Raises:
        RecursionError: a class contains itself; its schema would have no end.
    """
    if isinstance(schema, list):
        return [inlined(item, components) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        return {**inlined(components[name], components), **beside}
    return {key: inlined(value, components) for key, value in schema.items()}


def with_choices(schema: Any, live: LiveInfo) -> Any:
    """Copy *schema*, with what the engine offers now as ``enum``."""
    if isinstance(schema, list):
        return [with_choices(item, live) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: with_choices(value, live) for key, value in schema.items() if key != CHOICES}
    choices = live.choices(schema[CHOICES]) if isinstance(schema.get(CHOICES), str) else None
    if choices:
        copy["enum"] = list(choices)
    return copy


def live_faults(schema: Mapping[str, Any], value: Any, live: LiveInfo, location: str) -> Iterator[Fault]:
    """Find what only the engine, or a number beyond msgspec's bounds, makes wrong in a value of the right shape."""
    source = schema.get(CHOICES)
    if source is not None and value is not None:
        yield from choice_faults(live.choices(source), value, location, source)
    most = schema.get("maximum")
    if type(most) is int and most > _INT64_MAX and type(value) is int and value > most:
        yield Fault(location=location, message=f"must be <= {most}, got {quoted(value)}")
    for member in schema.get("anyOf", ()):
        if member.get("type") == _json_type(value):
            yield from live_faults(member, value, live, location)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        others = schema.get("additionalProperties")
        for name, item in value.items():
            inside = properties.get(name, others)
            if isinstance(inside, dict):
                yield from live_faults(inside, item, live, f"{location}.{name}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, item in enumerate(value):
            yield from live_faults(schema["items"], item, live, f"{location}.{index}")


def choice_faults(choices: tuple[Any, ...] | None, value: Any, location: str, source: str = "") -> Iterator[Fault]:
    """Find that *value* is none of *choices*, and name the nearest ones. Nothing is refused where none are known."""
    if choices is None or _among(value, choices):
        return
    kind, _, name = source.partition(":")
    if not choices:
        what = f"{name} models" if kind == "models" else "choices"
        yield Fault(location=location, message=f"ComfyUI has no {what} at all, got {quoted(value)}")
        return
    if len(choices) <= _SHOWN_CHOICES:
        message = f"must be one of {', '.join(quoted(choice) for choice in choices)}, got {quoted(value)}"
    else:
        message = f"must be one of the {len(choices)} that ComfyUI has, got {quoted(value)}"
    near = nearest_ones(value, choices) if isinstance(value, str) else []
    hint = f"; the nearest are {', '.join(map(quoted, near))}" if near else ""
    yield Fault(location=location, message=message + hint)


def nearest_ones(name: str, known: Iterable[Any]) -> list[str]:
    """Return up to three of *known* that somebody who wrote *name* may have meant, the likeliest first."""
    if len(name) > 128:  # difflib is quadratic; file names of models are shorter
        return []
    folded = name.casefold()
    by_folded = {each.casefold(): each for each in known if isinstance(each, str)}
    candidates: Iterable[str] = by_folded
    if len(by_folded) > _COMPARED:
        # 5,000 file names would take difflib 800 ms; those that share most pieces with the name take 30 ms.
        pieces = list({folded[at : at + 3] for at in range(max(1, len(folded) - 2))})[:_PIECES]
        candidates = heapq.nlargest(_COMPARED, by_folded, key=lambda each: sum(piece in each for piece in pieces))
    close = difflib.get_close_matches(folded, candidates, n=_NEAR, cutoff=0.5)
    return [by_folded[each] for each in close]


def _among(value: Any, choices: tuple[Any, ...]) -> bool:
    # true == 1 in Python, not in JSON
    return any(value == choice and isinstance(value, bool) is isinstance(choice, bool) for choice in choices)


def _json_type(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case dict():
            return "object"
        case _:
            return "null"


def fields_of(schema: Mapping[str, Any]) -> tuple[InputField, ...]:
    """Make the rows of a table from the schema of an object."""
    required = frozenset(schema.get("required", ()))
    return tuple(
        InputField(
            name=name,
            type=_type_text(prop),
            required=name in required,
            default=_default_text(prop),
            description=prop.get("description", ""),
            bounds=_bounds_text(prop),
            group=prop.get(GROUP),
        )
        for name, prop in schema.get("properties", {}).items()
    )


def _default_text(prop: Mapping[str, Any]) -> str:
    if DEFAULT in prop:
        return str(prop[DEFAULT])
    return encode_json(prop["default"]).decode() if "default" in prop else ""


def _type_text(prop: Mapping[str, Any]) -> str:
    if MEDIA in prop:
        return str(prop[MEDIA])
    if "anyOf" in prop:
        members = (_type_text(member) for member in prop["anyOf"] if member.get("type") != "null")
        return " or ".join(dict.fromkeys(members))
    if "enum" in prop:
        shown = prop["enum"][:_SHOWN_CHOICES]
        more = len(prop["enum"]) - len(shown)
        listed = ", ".join(quoted(choice) for choice in shown)
        return f"one of {listed} and {more} more" if more else f"one of {listed}"
    if prop.get("type") == "array":
        items = prop.get("items")
        return f"list of {_type_text(items)}" if isinstance(items, dict) and items else "list"
    return str(prop.get("type", "any"))


_BOUNDS: Final = (
    ("minimum", ">= {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "<= {}"),
    ("exclusiveMaximum", "< {}"),
    ("multipleOf", "a multiple of {}"),
    ("minLength", "at least {} characters"),
    ("maxLength", "at most {} characters"),
    ("minItems", "at least {} items"),
    ("maxItems", "at most {} items"),
    ("pattern", "like {}"),
)


def _bounds_text(prop: Mapping[str, Any]) -> str:
    members = [member for member in (prop, *prop.get("anyOf", ())) if MEDIA not in member]  # of media it says nothing
    return ", ".join(words.format(member[key]) for key, words in _BOUNDS for member in members if key in member)
