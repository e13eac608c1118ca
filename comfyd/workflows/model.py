"""What a workflow is to the rest of comfyd: a name, a typed input, and a way from one to a prompt graph."""

import abc
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, Literal

import attrs

from comfyd.errors import ComfydError, Fault
from comfyd.jobs.graph import check_shape
from comfyd.workflows.fields import InputField, fields_of
from comfyd.workflows.live import LiveInfo

_MAX_TOLD: Final = 3
"""So many faults of a graph are told in one sentence; the author mends the first anyway."""


class WorkflowFailed(ComfydError):
    """A workflow made no graph, by no fault of its caller.

    The text is fit for the caller: no path and no traceback. *traceback_text* is for the log. *timed_out* says that it
    took longer than its bound.
    """

    def __init__(self, route: str, message: str, *, traceback_text: str | None = None, timed_out: bool = False) -> None:
        super().__init__(f"the workflow {route} {message}")
        self.route = route
        self.traceback_text = traceback_text
        self.timed_out = timed_out


@attrs.frozen(kw_only=True)
class Built:
    """What came of a call: the graph, and the input with every default filled in, as told to the caller."""

    prompt: dict[str, Any]
    input: dict[str, Any]


@attrs.frozen(kw_only=True, eq=False)
class Workflow(abc.ABC):
    """A named endpoint. *route* is its path below ``/workflow/``, such as ``sd1.5/txt2img``."""

    route: str
    summary: str
    description: str
    tags: tuple[str, ...]
    source: Literal["python", "json"]

    @abc.abstractmethod
    def input_schema(self, live: LiveInfo) -> dict[str, Any]:
        """Return the JSON Schema (2020-12) of ``input``: self-contained, the same each time for the same *live*."""

    @abc.abstractmethod
    async def build(self, raw_input: Any, live: LiveInfo) -> Built:
        """Make a graph from what a caller sent.

        Raises:
            InvalidValue: the input does not fit; every fault, at ``input.<field>``.
            WorkflowFailed: the workflow's author is to blame, or this engine lacks what it needs.
        """

    def fields(self, live: LiveInfo) -> tuple[InputField, ...]:
        """Return the inputs for tables, in the order in which they are declared."""
        return fields_of(self.input_schema(live))


def as_graph(route: str, made: Any) -> dict[str, Any]:
    """Check and copy what a workflow returned, so that no two jobs share a node.

    Tuples become lists and whole-number ids strings, so ``{1: {..., ("4", 0)}}`` is a graph as well.

    Raises:
        WorkflowFailed: it is no graph.
    """
    if not isinstance(made, Mapping):
        raise WorkflowFailed(route, f"returned {type(made).__name__} in the place of a graph")
    try:
        graph: dict[str, Any] = _plain(made)
    except (TypeError, ValueError, RecursionError) as exc:
        raise WorkflowFailed(route, f"returned a graph that is not JSON: {exc}") from None
    faults = check_shape(graph)
    if faults:
        raise WorkflowFailed(route, f"returned what is not a graph: {told(faults)}")
    return graph


def _plain(value: Any) -> Any:
    """Copy *value* as what JSON has.

    Not by ``msgspec.to_builtins``: it leaves tuples, which are no links to anybody later.
    """
    match value:
        case None | bool() | int() | str() if not isinstance(value, Enum):
            return value
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{value} is no number in JSON")
            return value
        case Enum():
            return _plain(value.value)
        case Mapping():
            return {_key(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            raise TypeError(f"it holds a {type(value).__name__}")


def _key(key: Any) -> str:
    if isinstance(key, str):
        return key
    if type(key) is int:
        return str(key)
    raise TypeError(f"it has a key that is a {type(key).__name__}")


def told(faults: list[Fault]) -> str:
    """Put the first few of *faults* into one sentence."""
    shown = "; ".join(f"{fault.location} {fault.message}" for fault in faults[:_MAX_TOLD])
    more = len(faults) - _MAX_TOLD
    return f"{shown}; and {more} more" if more > 0 else shown
