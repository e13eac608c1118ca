"""What a workflow written in Python uses; its author imports it as :mod:`comfyd.workflow`.

This is an interface for people outside comfyd: names here stay.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, TypeVar, dataclass_transform

import attrs
import msgspec

from comfyd.errors import ComfydError
from comfyd.workflows.fields import CHOICES, DEFAULT, MEDIA
from comfyd.workflows.live import LiveInfo

SEED_MAX: Final = 0xFFFF_FFFF_FFFF_FFFF
"""The largest seed that ComfyUI's samplers take."""
_LARGEST_DRAWN_SEED: Final = 2**53 - 1
"""Seeds are drawn no larger, because JavaScript reads no larger whole number exactly, and callers repeat them."""

LIVE_DEFAULT: Final = "comfyd.live_default"
DEFAULT_WORDS: Final = "comfyd.default_words"

Link = list[Any]
"""What an input holds that another node computes: the node's id and the number of the output."""

T = TypeVar("T")


def Field(  # noqa: N802  # it is written like a type, inside Annotated
    *,
    description: str | None = None,
    ge: int | float | None = None,
    gt: int | float | None = None,
    le: int | float | None = None,
    lt: int | float | None = None,
    multiple_of: int | float | None = None,
    min_length: int | None = None,
    max_length: int | None = None,
    pattern: str | None = None,
) -> msgspec.Meta:
    """Describe and bound an input.

    ``width: Annotated[int, Field(ge=64, le=2048)] = 512``. Bounds are of numbers, lengths of strings and lists;
    *pattern* is a regular expression.
    """
    words: dict[str, Any] = {"description": description, "min_length": min_length, "max_length": max_length}
    words |= {"ge": ge, "gt": gt, "le": le, "lt": lt, "multiple_of": multiple_of, "pattern": pattern}
    if isinstance(le, int) and le > 2**63 - 1:  # msgspec's bounds are of 64 bits with a sign, a seed has none
        words |= {"le": None, "extra_json_schema": {"maximum": le}}
    return msgspec.Meta(**{name: value for name, value in words.items() if value is not None})


def models(kind: str) -> msgspec.Meta:
    """Take one of the models of a type.

    ``lora: Annotated[str, models("loras")]``. The types are called like ComfyUI's model folders.
    """
    return msgspec.Meta(extra_json_schema={CHOICES: f"models:{kind}"})


def choices(class_type: str, input_name: str) -> msgspec.Meta:
    """Take one of what an input of a node offers, such as a custom node's.

    ``upscaler: Annotated[str, choices("UpscaleModelLoader", "model_name")]``.
    """
    return msgspec.Meta(extra_json_schema={CHOICES: f"node:{class_type}.{input_name}"})


def _media(kind: str) -> msgspec.Meta:
    return msgspec.Meta(min_length=1, extra_json_schema={MEDIA: kind})


Seed = Annotated[int, Field(ge=0, le=SEED_MAX)]
"""A seed, of 64 bits."""
Sampler = Annotated[str, msgspec.Meta(extra_json_schema={CHOICES: "samplers"})]
"""A sampler that this ComfyUI has, custom ones too."""
Scheduler = Annotated[str, msgspec.Meta(extra_json_schema={CHOICES: "schedulers"})]
"""A scheduler that this ComfyUI has."""
Checkpoint = Annotated[str, models("checkpoints")]
"""A checkpoint that this ComfyUI has."""
Image = Annotated[str, _media("image")]
"""A picture: a file name, a URL, a data URL or base64."""
Video = Annotated[str, _media("video")]
"""A film, given like an :data:`Image`."""
Audio = Annotated[str, _media("audio")]
"""A sound, given like an :data:`Image`."""


def _drawn_seed() -> int:
    return random.randint(0, _LARGEST_DRAWN_SEED)  # noqa: S311  # noise for pictures, not a secret


def random_seed() -> Any:
    """Default of a seed: another one for each request, told in the answer's ``input``."""
    return attrs.field(factory=_drawn_seed, metadata={DEFAULT_WORDS: "random"})


def warmup_checkpoint() -> Any:
    """Default of a checkpoint: that of the warm-up prompt. Without one, the input is required."""
    return attrs.field(metadata={LIVE_DEFAULT: lambda live: live.warmup_checkpoint})


def installed_model(kind: str, *words: str) -> Any:
    """Default of a model: the first of its type whose name has one of *words*, earlier words first.

    ``unet: Annotated[str, models("diffusion_models")] = installed_model("diffusion_models", "flux")``. Without such a
    model the input is required.
    """

    def find(live: LiveInfo) -> str | None:
        names = live.models.get(kind, ())
        return next((name for word in words for name in names if word.casefold() in name.casefold()), None)

    return attrs.field(metadata={LIVE_DEFAULT: find})


@dataclass_transform(
    kw_only_default=True,
    frozen_default=True,
    field_specifiers=(attrs.field, random_seed, warmup_checkpoint, installed_model),
)
def inputs(cls: type[T]) -> type[T]:
    """Make a class of annotated names the input of a workflow.

    Short for ``attrs.frozen(kw_only=True, eq=False)``; any attrs class will do. (``eq`` is a fifth of what loading a
    file costs, and nobody compares inputs.)
    """
    made: type[T] = attrs.frozen(kw_only=True, eq=False)(cls)
    return made


class InputRefused(ComfydError):
    """A workflow does not want this input, for a reason that its types cannot say; the caller is told (400)."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


@attrs.frozen
class Node:
    """A node of a graph that is being written. ``node[0]`` is its first output; the node itself stands for it too."""

    id: str
    _nodes: dict[str, dict[str, Any]] = attrs.field(repr=False)

    def __getitem__(self, output: int) -> Link:
        return [self.id, output]

    __iter__ = None  # or unpacking would ask for outputs without end

    def outputs(self, count: int) -> tuple[Link, ...]:
        """Return the first *count* outputs: ``model, clip, vae = loader.outputs(3)``."""
        return tuple(self[index] for index in range(count))

    def titled(self, title: str) -> "Node":
        """Give the node a title, which ComfyUI shows in errors; return the node."""
        self._nodes[self.id]["_meta"] = {"title": title}
        return self


class Graph(Mapping[str, dict[str, Any]]):
    """A prompt graph that is being written. Nodes get the ids ``1``, ``2``, ... in their order."""

    def __init__(self) -> None:
        self._nodes: dict[str, dict[str, Any]] = {}

    def node(self, class_type: str, /, **values: Any) -> Node:
        """Add a node. A value is a plain one, a :class:`Node` (its first output) or ``node[n]``."""
        added = Node(str(len(self._nodes) + 1), self._nodes)
        linked = {name: value[0] if isinstance(value, Node) else value for name, value in values.items()}
        self._nodes[added.id] = {"class_type": class_type, "inputs": linked}
        return added

    def __getitem__(self, node_id: str) -> dict[str, Any]:
        return self._nodes[node_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)


Comfy = LiveInfo
"""What ComfyUI has (models, samplers, schedulers, its whole object_info), and the daemon's configuration."""

__all__ = [
    "DEFAULT",
    "DEFAULT_WORDS",
    "LIVE_DEFAULT",
    "SEED_MAX",
    "Audio",
    "Checkpoint",
    "Comfy",
    "Field",
    "Graph",
    "Image",
    "InputRefused",
    "Link",
    "Node",
    "Sampler",
    "Scheduler",
    "Seed",
    "Video",
    "choices",
    "inputs",
    "installed_model",
    "models",
    "random_seed",
    "warmup_checkpoint",
]
