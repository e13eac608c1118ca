"""What became of a job, in words for people."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from comfyd.cli.submit.graph import title_of
from comfyd.cli.table import printable

_SHOWN_FAULTS: Final = 10
_LONGEST: Final = 600
_PLACE: Final = re.compile(r"prompt\.(?P<node>.+?)(?:\.(?P<rest>inputs|class_type|_meta)(?:\.(?P<input>.+))?)?")


def problem_lines(document: Mapping[str, Any], graph: Mapping[str, Any]) -> Iterator[str]:
    """Tell a problem: one line that says what happened, and one for each place where that says more."""
    detail = str(document.get("detail") or document.get("title") or "no reason was given")
    if document.get("type") == "execution-failed" and isinstance(document.get("node_id"), str):
        kind, message = document.get("exception_type"), document.get("exception_message")
        yield _line(f"{node_words(document['node_id'], graph, document.get('node_type'))} raised {kind}: {message}")
        return
    errors = [error for error in document.get("errors") or () if isinstance(error, dict)]
    if len(errors) == 1 and str(errors[0].get("message")) in detail:
        where = place_words(str(errors[0].get("location") or ""), graph)
        yield _line(f"{where}: {errors[0]['message']}" if where else detail)
        return
    yield _line(detail)
    for error in errors[:_SHOWN_FAULTS]:
        where = place_words(str(error.get("location") or ""), graph)
        yield _line(f"  {where}: {error.get('message')}" if where else f"  {error.get('message')}")
    if len(errors) > _SHOWN_FAULTS:
        yield f"  and {len(errors) - _SHOWN_FAULTS} more"


def place_words(location: str, graph: Mapping[str, Any]) -> str:
    """Name a place of the request: ``prompt.3.inputs.seed`` is ``node 3 "KSampler", input seed``."""
    found = _PLACE.fullmatch(location)
    if found is None:
        return "" if location == "prompt" else location
    words = node_words(found["node"], graph)
    if found["input"]:
        return f"{words}, input {found['input']}"
    return words


def node_words(node_id: str, graph: Mapping[str, Any], class_type: Any = None) -> str:
    """Name a node by its id and its title, or its class where the graph is not known here."""
    node = graph.get(node_id)
    called = title_of(node) if node is not None else class_type
    return f'node {node_id} "{called}"' if called else f"node {node_id}"


def progress_words(view: Mapping[str, Any]) -> str:
    """What a job is doing, from the daemon's ``progress``."""
    position, eta_s = view.get("position"), view.get("eta_s")
    match view.get("state"):
        case "queued" if isinstance(position, int):
            ahead = "next" if position == 0 else f"{position} {'job' if position == 1 else 'jobs'} before it"
            about = f", about {duration_words(eta_s)}" if isinstance(eta_s, int | float) else ""
            return f"queued: {ahead}{about}"
        case "preparing":
            return "fetching inputs"
        case "running" if view.get("node_id") is not None:
            step, steps = view.get("step"), view.get("steps")
            counted = f" {step}/{steps}" if isinstance(steps, int) and steps > 1 else ""
            return printable(f"{view.get('node_title') or view['node_id']}{counted}")
        case state:
            return printable(str(state))


def duration_words(seconds: float) -> str:
    """Tell a duration roughly: ``8 s``, ``3 min``, ``2 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def _line(text: str) -> str:
    indent = "  " if text.startswith("  ") else ""
    line = indent + printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
