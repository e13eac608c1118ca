"""One engine: its process, its HTTP side, its websocket; and the supervisor that keeps it running."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comfyd.engine.attempt import Completed, Execution, ExecutionTimes, Interrupted, NodeTime, Raised, Refused
    from comfyd.engine.client import Refusal
    from comfyd.engine.engine import Engine, EngineState, Submission
    from comfyd.engine.last_words import LastWords
    from comfyd.engine.messages import EngineEvent
    from comfyd.engine.object_info import MediaInput, MediaKind, NodeClasses, is_link

__all__ = [
    "Completed",
    "Engine",
    "EngineEvent",
    "EngineState",
    "Execution",
    "ExecutionTimes",
    "Interrupted",
    "LastWords",
    "MediaInput",
    "MediaKind",
    "NodeClasses",
    "NodeTime",
    "Raised",
    "Refusal",
    "Refused",
    "Submission",
    "is_link",
]

_MODULES = {
    "Completed": "attempt",
    "Engine": "engine",
    "EngineEvent": "messages",
    "EngineState": "engine",
    "Execution": "attempt",
    "ExecutionTimes": "attempt",
    "Interrupted": "attempt",
    "LastWords": "last_words",
    "MediaInput": "object_info",
    "MediaKind": "object_info",
    "NodeClasses": "object_info",
    "NodeTime": "attempt",
    "Raised": "attempt",
    "Refusal": "client",
    "Refused": "attempt",
    "Submission": "engine",
    "is_link": "object_info",
}


def __getattr__(name: str) -> Any:
    """Import when first asked for: the guard of a one-file build is imported from here, and must start at once."""
    if name in _MODULES:
        return getattr(import_module(f"comfyd.engine.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
