"""One input of a JSON workflow: its kind and bounds, from what the engine says of the widget's class, and its checks.

ComfyUI 0.3.64 writes the options as ``min``, ``max``, ``step``, ``default``, ``multiline``, ``tooltip``,
``control_after_generate`` (``/object_info``). The default is the graph's own value: it is what its author tried.
"""

import math
import random
from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any, Final, Literal

import attrs
from msgspec import Meta

from comfyd.engine import MediaInput
from comfyd.errors import Fault, InvalidValue
from comfyd.wire import structure
from comfyd.workflows.fields import DEFAULT, GROUP, MAX_LIVE_FAULTS, MEDIA, choice_faults
from comfyd.workflows.live import MODEL_INPUTS, LiveInfo, choices_of, input_spec
from comfyd.workflows.sidecar import SidecarInput
from comfyd.workflows.widgets import Widget

Kind = Literal["int", "float", "string", "bool", "choice", "choices", "media"]
Number = int | float

_SEEDS: Final = frozenset({"seed", "noise_seed"})
_SIZES: Final = frozenset({"width", "height"})
_MODEL_SUFFIXES: Final = (".safetensors", ".ckpt", ".pt", ".pth", ".sft", ".gguf", ".bin", ".onnx")
_LARGEST_DRAWN_SEED: Final = 2**53 - 1  # as in author.py: no larger whole number is exact in JavaScript
_JSON_TYPES: Final = {"int": "integer", "float": "number", "string": "string", "bool": "boolean"}
_PYTHON_TYPES: Final = {"int": int, "float": float, "string": str, "bool": bool}


@attrs.frozen(kw_only=True)
class Offer:
    """A widget that callers may set, under a name. *places* are all the widgets that take its value."""

    name: str
    places: tuple[tuple[str, str], ...]
    widget: Widget
    wish: SidecarInput | None = None


@attrs.frozen(kw_only=True)
class TypedOffer:
    """An offer with what the engine says of it. *default* counts only when neither *required* nor *drawn*."""

    name: str
    places: tuple[tuple[str, str], ...]
    kind: Kind
    default: Any = None
    required: bool = False
    drawn: bool = False
    """A seed that is drawn for each request."""
    low: Number | None = None
    high: Number | None = None
    step: int | None = None
    choices: tuple[Any, ...] | None = None
    media: MediaInput | None = None
    description: str = ""
    group: str | None = None
    checked_type: Any = None

    def schema(self) -> dict[str, Any]:
        """Return its JSON Schema."""
        schema: dict[str, Any] = {}
        if self.media is not None:
            schema |= {"type": "string", "minLength": 1, MEDIA: self.media.kind.value}
            if self.media.is_folder:
                schema = {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}
        elif self.kind == "choices":
            schema |= {"type": "array", "items": {"enum": list(self.choices)} if self.choices else {}}
        elif self.kind == "choice":
            schema |= {"enum": list(self.choices)} if self.choices else {}
            if self.choices is None or all(isinstance(choice, str) for choice in self.choices):
                schema = {"type": "string", **schema}
        else:
            schema["type"] = _JSON_TYPES[self.kind]
        bounds = (("minimum", self.low), ("maximum", self.high), ("multipleOf", self.step))
        schema |= {key: bound for key, bound in bounds if bound is not None}
        if self.drawn:
            schema[DEFAULT] = "random"
        elif not self.required:
            schema["default"] = self.default
        if self.description:
            schema["description"] = self.description
        if self.group:
            schema[GROUP] = self.group
        return schema

    def value(self, given: Any) -> Any:
        """Return the value to use for *given*, where None means that nothing was given.

        Raises:
            InvalidValue: it does not fit, at ``input.<name>``.
        """
        location = f"input.{self.name}"
        if given is None:
            if self.required:
                raise InvalidValue((Fault(location=location, message="is required"),))
            if self.drawn:
                return random.randint(int(self.low or 0), self._most_drawn())  # noqa: S311  # noise, not a secret
            value = self.default
        else:
            value = structure(self.checked_type, given, location=location)
        # A default too: it may name a model that this machine has not.
        each = value if self.kind == "choices" and isinstance(value, list) else [value]
        found = (fault for one in each for fault in choice_faults(self.choices, one, location))
        faults = tuple(islice(found, MAX_LIVE_FAULTS))
        if faults:
            raise InvalidValue(faults)
        return value

    def _most_drawn(self) -> int:
        most = _LARGEST_DRAWN_SEED if self.high is None else min(int(self.high), _LARGEST_DRAWN_SEED)
        return max(most, int(self.low or 0))


def usual(widget: Widget, live: LiveInfo) -> bool:
    """Whether a widget is among those offered when nobody chose: prompts, media, seed, steps, size, models."""
    name, value = widget.input, widget.value
    if name in live.media.get(widget.class_type, ()):
        return True
    if isinstance(value, str):
        spec = input_spec(live.object_info, widget.class_type, name)
        long_text = spec is not None and spec[0] == "STRING" and bool(spec[1].get("multiline"))
        return (
            long_text
            or widget.role is not None
            or (widget.class_type, name) in MODEL_INPUTS
            or value.lower().endswith(_MODEL_SUFFIXES)
        )
    return type(value) is int and (name in _SEEDS or name in _SIZES or name == "steps")


def typed(offer: Offer, live: LiveInfo) -> TypedOffer:
    """Find out what an offer takes: from the engine, else from the value in the graph; a sidecar has the last word."""
    widget = offer.widget
    wish = offer.wish or SidecarInput(target="")
    spec = input_spec(live.object_info, widget.class_type, widget.input)
    options: Mapping[str, Any] = {} if spec is None else spec[1]
    media = live.media.get(widget.class_type, {}).get(widget.input)
    choices = None if media is not None else _choices(spec, wish)
    kind = _kind(spec, media, choices, options, widget.value)
    low, high, step = _bounds(kind, options, wish, widget.value)
    default = widget.value if wish.default is None else wish.default
    drawn = kind == "int" and wish.default is None and not wish.required and _drawn(widget, options, wish)
    return TypedOffer(
        name=offer.name,
        places=offer.places,
        kind=kind,
        default=default,
        required=wish.required or (media is not None and wish.default is None and default not in media.listed),
        drawn=drawn,
        low=low,
        high=high,
        step=step,
        choices=choices,
        media=media,
        description=wish.description or _text(options.get("tooltip")),
        group=wish.group,
        checked_type=_checked_type(kind, media, low, high, step),
    )


def _choices(spec: tuple[Any, Mapping[str, Any]] | None, wish: SidecarInput) -> tuple[Any, ...] | None:
    if wish.choices is not None:
        return tuple(wish.choices)
    return None if spec is None else choices_of(spec)


def _kind(
    spec: tuple[Any, Mapping[str, Any]] | None,
    media: MediaInput | None,
    choices: tuple[Any, ...] | None,
    options: Mapping[str, Any],
    value: Any,
) -> Kind:
    if media is not None:
        return "media"
    if choices is not None:
        return "choices" if options.get("multiselect") is True or isinstance(value, list) else "choice"
    by_name: dict[Any, Kind] = {"INT": "int", "FLOAT": "float", "STRING": "string", "BOOLEAN": "bool"}
    if spec is not None and isinstance(spec[0], str) and spec[0] in by_name:
        return by_name[spec[0]]
    by_value: dict[type, Kind] = {bool: "bool", int: "int", float: "float"}
    return by_value.get(type(value), "string")


def _bounds(
    kind: Kind, options: Mapping[str, Any], wish: SidecarInput, value: Any
) -> tuple[Number | None, Number | None, int | None]:
    if kind not in ("int", "float"):
        return None, None, None
    low = wish.min if wish.min is not None else _number(options.get("min"))
    high = wish.max if wish.max is not None else _number(options.get("max"))
    step = wish.step if wish.step is not None else _number(options.get("step"))
    if kind == "float":
        return low, high, None  # tenths are not exact in binary, and ComfyUI rounds by itself
    low, high = (None if bound is None else int(bound) for bound in (low, high))
    if step is None or step != int(step) or step <= 1:
        return low, high, None
    # A step counts for callers only where it is a fact of the graph too; ComfyUI's page enforces it, its server not.
    kept = wish.step is not None or all(bound is None or bound % step == 0 for bound in (low, value))
    return low, high, int(step) if kept else None


def _drawn(widget: Widget, options: Mapping[str, Any], wish: SidecarInput) -> bool:
    if wish.random is not None:
        return wish.random
    # ComfyUI sets control_after_generate on PrimitiveInt as well, whose number may be anything: a width, a count.
    return widget.input in _SEEDS or (bool(options.get("control_after_generate")) and "seed" in widget.input)


def _number(value: Any) -> Number | None:
    """Read a bound; some custom nodes have an infinite one, which is none."""
    if type(value) is float and value.is_integer():
        return int(value)  # 1 and not 1.0 in messages
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _checked_type(
    kind: Kind, media: MediaInput | None, low: Number | None, high: Number | None, step: int | None
) -> Any:
    if kind == "media":
        one = Annotated[str, Meta(min_length=1)]
        return one | Annotated[list[one], Meta(min_length=1)] if media is not None and media.is_folder else one
    if kind == "choice":
        return Any
    if kind == "choices":
        return list[Any]
    return Annotated[_PYTHON_TYPES[kind], Meta(ge=low, le=high, multiple_of=step)]
