"""What a node type is: typed inputs with bounds, outputs, and a function. ``/object_info`` is made from this.

Two generations of nodes exist in ComfyUI and their choices look different on the wire: the old one gives the list of
choices as the type, ``[["a", "b"], {...}]``; the new one gives ``["COMBO", {"options": ["a", "b"]}]``, and 0.3.64
checks only values of the old one at submission. Both appear here (:func:`choice` and :func:`combo`).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import attrs

from comfyd.embedded.files import Folders
from comfyd.embedded.models import Models
from comfyd.embedded.settings import PreviewMethod, Settings

MAX_RESOLUTION_PX: Final = 16384
SEED_MAX: Final = 0xFFFF_FFFF_FFFF_FFFF

_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class Interrupted(Exception):
    """Somebody interrupted the running prompt. Not derived from ComfydError: a node's own failure must not catch it."""


@attrs.frozen(kw_only=True)
class Library:
    """What the choices of an input may depend on, besides the node type."""

    folders: Folders
    models: Models


Choices = tuple[str, ...] | Callable[[Library], Sequence[str]]


@attrs.frozen(kw_only=True)
class Input:
    """One input of a node type. *options* are bounds, default, tooltip and the like, in ComfyUI's names.

    *listed* choices stand where the type would (old generation). *check* looks at a value at submission and returns
    what is wrong with it, or None; an input with a check of its own is not held against its choices or bounds, as in
    ComfyUI (execution.py, ``validate_inputs``).
    """

    name: str
    type: str
    options: Mapping[str, Any] = _NOTHING
    choices: Choices | None = None
    listed: bool = False
    required: bool = True
    check: Callable[[Library, Any], str | None] | None = None

    def choices_now(self, library: Library) -> list[str]:
        """Return the choices; some change while the engine runs."""
        if self.choices is None:
            return []
        return list(self.choices(library) if callable(self.choices) else self.choices)

    def wire_type(self, library: Library) -> str | list[str]:
        """Return what stands in the place of the type."""
        return self.choices_now(library) if self.listed else self.type

    def wire_options(self, library: Library) -> dict[str, Any]:
        """Return what stands beside the type."""
        if self.choices is not None and not self.listed:
            return {"multiselect": False, "options": self.choices_now(library), **self.options}
        return dict(self.options)


@attrs.frozen(kw_only=True)
class NodeResult:
    """What a node produced: a value per output, and what an output node shows (``ui``, which ends in history)."""

    outputs: tuple[Any, ...] = ()
    ui: dict[str, Any] | None = None


class Progress:
    """How a running node reports. All methods may be called from the thread the node runs in, or from the loop."""

    def update(self, value: int, maximum: int, preview_jpeg: bytes | None) -> None:
        """Report step *value* of *maximum*; raises :class:`Interrupted` when the prompt was interrupted."""
        raise NotImplementedError

    def text(self, text: str) -> None:
        """Show a line of text at the node."""
        raise NotImplementedError


@attrs.frozen(kw_only=True)
class NodeContext:
    """What a node may know and do besides its inputs. *prompt* is the graph that is being run."""

    node_id: str
    prompt_id: str
    prompt: Mapping[str, Any]
    extra_data: Mapping[str, Any]
    settings: Settings
    library: Library
    interrupted: threading.Event
    progress: Progress

    def raise_if_interrupted(self) -> None:
        """Raise Interrupted if somebody interrupted the prompt."""
        if self.interrupted.is_set():
            raise Interrupted

    def pause(self, duration_s: float) -> None:
        """Block for a time, in the node's thread; an interrupt ends it at once.

        Raises:
            Interrupted: the prompt was interrupted.
        """
        if duration_s > 0 and self.interrupted.wait(duration_s):
            raise Interrupted

    @property
    def previews(self) -> bool:
        """Whether samplers shall show what they do."""
        return self.settings.preview_method is not PreviewMethod.NONE


NodeFunction = Callable[..., NodeResult]


@attrs.frozen(kw_only=True, slots=False)
class NodeType:
    """A kind of node.

    *run* is called with the context and the inputs as keywords, in a thread when *threaded*. *costless* takes its place
    under ``--cost none``, always on the event loop, and must not wait; None means that *run* computes no pixels anyway.
    *fingerprint* stands for inputs that a value only names (a file): it goes into the cache key. It is called in a
    thread when *threaded*, with the library, the value of its input, and whether it must be cheap. *always_runs* keeps
    the node, and so all that depends on it, from being taken from the cache.
    """

    name: str
    run: NodeFunction
    inputs: tuple[Input, ...] = ()
    outputs: tuple[str, ...] = ()
    output_names: tuple[str, ...] | None = None
    output_tooltips: tuple[str, ...] | None = None
    is_output: bool = False
    category: str
    display_name: str
    description: str = ""
    hidden: Mapping[str, str] = _NOTHING
    fingerprint: tuple[str, Callable[[Library, Any, bool], str]] | None = None
    threaded: bool = False
    costless: NodeFunction | None = None
    always_runs: bool = False

    @cached_property
    def by_name(self) -> Mapping[str, Input]:
        """The inputs by their names."""
        return {item.name: item for item in self.inputs}

    def info(self, library: Library) -> dict[str, Any]:
        """Return this type as ``/object_info`` shows it (server.py, ``node_info``, 0.3.64)."""
        required = [item for item in self.inputs if item.required]
        optional = [item for item in self.inputs if not item.required]
        shown: dict[str, Any] = {"required": {item.name: _config(item, library) for item in required}}
        order: dict[str, Any] = {"required": [item.name for item in required]}
        if optional:
            shown["optional"] = {item.name: _config(item, library) for item in optional}
            order["optional"] = [item.name for item in optional]
        if self.hidden:
            shown["hidden"] = dict(self.hidden)
            order["hidden"] = list(self.hidden)
        info = {
            "input": shown,
            "input_order": order,
            "output": self.outputs,
            "output_is_list": [False] * len(self.outputs),
            "output_name": self.output_names or self.outputs,
            "name": self.name,
            "display_name": self.display_name,
            "description": self.description,
            "python_module": "comfyd.embedded",
            "category": self.category,
            "output_node": self.is_output,
        }
        if self.output_tooltips:
            info["output_tooltips"] = self.output_tooltips
        return info


def _config(item: Input, library: Library) -> list[Any]:
    options = item.wire_options(library)
    return [item.wire_type(library), options] if options else [item.wire_type(library)]


def link(name: str, kind: str, *, tooltip: str | None = None, required: bool = True) -> Input:
    """An input that can only be linked, such as an IMAGE."""
    return Input(name=name, type=kind, options={"tooltip": tooltip} if tooltip else _NOTHING, required=required)


def integer(name: str, default: int | None = None, **options: Any) -> Input:
    """An INT."""
    return Input(name=name, type="INT", options=_with_default(default, options))


def number(name: str, default: float | None = None, **options: Any) -> Input:
    """A FLOAT."""
    return Input(name=name, type="FLOAT", options=_with_default(default, options))


def text(name: str, default: Any = None, **options: Any) -> Input:
    """A STRING."""
    return Input(name=name, type="STRING", options=_with_default(default, options))


def boolean(name: str, default: bool | None = None, *, required: bool = True, **options: Any) -> Input:
    """A BOOLEAN."""
    return Input(name=name, type="BOOLEAN", options=_with_default(default, options), required=required)


def choice(name: str, choices: Choices, *, required: bool = True, **options: Any) -> Input:
    """A choice as nodes of the old generation show it; its value is checked at submission."""
    return Input(name=name, type="COMBO", choices=choices, listed=True, options=options, required=required)


def combo(name: str, choices: Choices, **options: Any) -> Input:
    """A choice as nodes of the new generation show it; 0.3.64 does not check its value at submission."""
    return Input(name=name, type="COMBO", choices=choices, options=options)


def model_choice(name: str, kind: str, **options: Any) -> Input:
    """A choice among the models of a type."""
    return choice(name, lambda library: library.models.names(kind), **options)


def _with_default(default: Any, options: dict[str, Any]) -> dict[str, Any]:
    return options if default is None else {"default": default, **options}
