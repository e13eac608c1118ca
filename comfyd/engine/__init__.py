"""One engine: its process, its HTTP side, its websocket; and the supervisor that keeps it running."""

from comfyd.engine.attempt import Completed, Execution, ExecutionTimes, Interrupted, NodeTime, Raised, Refused
from comfyd.engine.client import Refusal
from comfyd.engine.engine import Engine, EngineState, Submission
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
