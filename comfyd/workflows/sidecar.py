"""The small file beside a JSON workflow that says what of it is offered.

``txt2img.yaml`` beside ``txt2img.json``; all of it may be left out, and YAML takes JSON too::

    summary: Text to image
    inputs:
      prompt: 6.text                       # node id, or its title, and the widget
      seed: [3.seed, 13.seed]              # one input for two nodes
      width:
        target: 5.width
        description: Width of the picture.
        min: 256
        max: 2048
        step: 64
        default: 768
        group: Size
    others: hide                           # or default: the usual choice too; or all: every widget
    hide: [3.denoise]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import attrs
import msgspec
from msgspec import Meta

from comfyd.errors import Fault, InvalidValue
from comfyd.wire import structure
from comfyd.workflows.widgets import MAX_NAME_CHARACTERS

_MOST_INPUTS: Final = 500
"""A form of that many is no form; a bound on work per request."""

Target = Annotated[str, Meta(min_length=3)]


@attrs.frozen(kw_only=True)
class SidecarInput:
    """What a sidecar says of one input. What it leaves out comes from the engine and the graph."""

    target: Annotated[str | list[Target], Meta(min_length=1)]
    description: str | None = None
    group: str | None = None
    default: Any = None
    min: int | float | None = None
    max: int | float | None = None
    step: int | float | None = None
    choices: Annotated[list[Any], Meta(min_length=1)] | None = None
    random: bool | None = None
    required: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        """The widgets that it sets, as written."""
        return (self.target,) if isinstance(self.target, str) else tuple(self.target)


@attrs.frozen(kw_only=True)
class Sidecar:
    """A whole sidecar. Without *inputs* the usual choice is offered, less *hide*."""

    summary: str | None = None
    description: str | None = None
    tags: tuple[str, ...] | None = None
    inputs: Annotated[dict[str, Any], Meta(max_length=_MOST_INPUTS)] = attrs.field(factory=dict)
    others: Literal["hide", "default", "all"] | None = None
    hide: tuple[str, ...] = ()


def read_sidecar(path: Path) -> tuple[Sidecar, dict[str, SidecarInput]]:
    """Read a sidecar, and its inputs by name.

    Raises:
        OSError: it cannot be read.
        InvalidValue: it is not YAML, or not a sidecar; every fault with its place.
    """
    try:
        value = msgspec.yaml.decode(path.read_bytes())
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:  # ValueError: not UTF-8, or 2026-99-99
        raise InvalidValue((Fault(location="", message=f"not valid YAML: {' '.join(str(exc).split())}"),)) from None
    sidecar = structure(Sidecar, {} if value is None else value)
    inputs: dict[str, SidecarInput] = {}
    faults: list[Fault] = []
    written: Mapping[Any, Any] = sidecar.inputs  # the keys of YAML may be anything, 1 and yes too
    for name, given in written.items():
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARACTERS:
            message = f"a name must be a string of 1 to {MAX_NAME_CHARACTERS} characters (put it in quotes)"
            faults.append(Fault(location=f"inputs.{name!s:.80}", message=message))
            continue
        short = isinstance(given, str | list)
        try:
            inputs[name] = structure(SidecarInput, {"target": given} if short else given, location=f"inputs.{name}")
        except InvalidValue as exc:
            faults += exc.faults
    if faults:
        raise InvalidValue(tuple(faults))
    return sidecar, inputs
