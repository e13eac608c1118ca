"""From what an engine said to what the caller is told: no traceback, no path of the server."""

from collections.abc import Mapping
from typing import Any, Final

from comfyd.engine import Raised, Refusal
from comfyd.errors import Failure, FailureKind, Fault
from comfyd.texts import hide_paths

# Members of a node error's extra_info that only help whoever reads the server's code (ComfyUI 0.3.64, execution.py).
_PRIVATE: Final = frozenset({"traceback", "input_config", "linked_node"})


def execution_failed(raised: Raised) -> Failure:
    """A node raised."""
    message = hide_paths(raised.exception_message)
    return Failure(
        kind=FailureKind.EXECUTION_FAILED,
        detail=f"node {raised.node_id} ({raised.node_type}) raised {raised.exception_type}: {message}",
        faults=(Fault(location=f"prompt.{raised.node_id}", message=message),),
        facts={
            "node_id": raised.node_id,
            "node_type": raised.node_type,
            "exception_type": raised.exception_type,
            "exception_message": message,
        },
    )


def prompt_refused(refusal: Refusal, graph: Mapping[str, Any]) -> Failure:
    """ComfyUI did not take *graph*, or not all of it. Error types: ComfyUI 0.3.64, ``execution.py``.

    Faults are told in the order of the graph: ComfyUI's own is that of a set, another one each time.
    """
    error = refusal.error
    message = hide_paths(_sentence(error))
    if error.get("type") == "prompt_no_outputs":
        return no_output_node(message)
    order = {
        place: number
        for number, place in enumerate(
            place
            for node_id, node in graph.items()
            for place in (
                f"prompt.{node_id}",
                *(f"prompt.{node_id}.inputs.{name}" for name in node.get("inputs") or ()),
            )
        )
    }
    found = _node_faults(refusal.node_errors)
    faults = tuple(sorted(found, key=lambda fault: (order.get(fault.location, len(order)), fault.location)))
    return Failure(
        kind=FailureKind.INVALID_PROMPT,
        detail=message,
        faults=faults or (Fault(location="prompt", message=message),),
        facts={"node_errors": _public(refusal.node_errors)} if refusal.node_errors else {},
    )


def no_output_node(message: str = "no node of the graph saves anything; add one such as SaveImage") -> Failure:
    """No node of the graph saves anything."""
    return Failure(kind=FailureKind.NO_OUTPUT_NODE, detail=message, faults=(Fault(location="prompt", message=message),))


def invalid_prompt(faults: tuple[Fault, ...]) -> Failure:
    """We ourselves do not take the graph."""
    return Failure(kind=FailureKind.INVALID_PROMPT, detail=summary(faults), faults=faults)


def invalid_request(faults: tuple[Fault, ...]) -> Failure:
    """The body does not fit its schema."""
    return Failure(kind=FailureKind.INVALID_REQUEST, detail=summary(faults), faults=faults)


def summary(faults: tuple[Fault, ...]) -> str:
    """One sentence for a list of faults: the first, and how many more there are."""
    first = faults[0]
    text = f"{first.location}: {first.message}" if first.location else first.message
    return text if len(faults) == 1 else f"{text} (and {len(faults) - 1} more)"


def _node_faults(node_errors: Mapping[str, Any]) -> list[Fault]:
    faults = []
    for node_id, node in node_errors.items():
        errors = node.get("errors") if isinstance(node, dict) else None
        for error in errors if isinstance(errors, list) else ():
            if not isinstance(error, dict):
                continue
            extra = error.get("extra_info")
            name = extra.get("input_name") if isinstance(extra, dict) else None
            location = f"prompt.{node_id}.inputs.{name}" if isinstance(name, str) else f"prompt.{node_id}"
            faults.append(Fault(location=location, message=hide_paths(_sentence(error))))
    return faults


def _sentence(error: Mapping[str, Any]) -> str:
    message, details = str(error.get("message") or "the graph is not valid"), str(error.get("details") or "")
    return f"{message}: {details}" if details else message


def _public(value: Any) -> Any:
    """Copy a part of ComfyUI's answer without tracebacks and server paths."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items() if key not in _PRIVATE}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return hide_paths(value) if isinstance(value, str) else value
