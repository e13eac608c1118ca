"""Every file of a workflow folder, tried: does it load, does it make a graph, and if not, where is the fault?"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import trio
import yaml

from comfyd.engine import NodeClasses
from comfyd.errors import InvalidValue
from comfyd.jobs.graph import check_classes, saves_something
from comfyd.workflows.catalogue import WorkflowProblem, load_catalogue
from comfyd.workflows.fields import MEDIA
from comfyd.workflows.live import LiveInfo
from comfyd.workflows.model import Workflow, WorkflowFailed

_FRAME: Final = re.compile(r'File "(?P<file>[^"\n]+)", line (?P<line>\d+)')
_LINE: Final = re.compile(r"\bline (?P<line>\d+)\b")
_BYTE: Final = re.compile(r"\(byte (?P<byte>\d+)\)")
_PLACE: Final = re.compile(r"(?:^|[ ;])(?:prompt\.)?(?P<place>[^\s:;]+\.[^\s:;]+)[: ]")
_NODE: Final = re.compile(r'\(node "(?P<node>[^"]+)"\)')
_MAX_SEARCHED_BYTES: Final = 1024 * 1024
"""A place is looked for in the first part of a file that is larger; PyYAML is slow."""


@attrs.frozen(kw_only=True)
class CheckedFile:
    """One file (relative to the folder). Without a *message* it is in order; *line* counts from 1."""

    file: str
    line: int = 1
    message: str = ""


def check_folder(folder: Path, live: LiveInfo) -> tuple[CheckedFile, ...]:
    """Load all workflows below *folder* and let each make a graph; sorted by file. Blocks, and runs their code.

    What *live* knows is checked too: node classes, models, choices. Inputs that must be given are made up; what a
    workflow has against those is no fault of its.
    """
    catalogue = load_catalogue(folder)
    found = [_placed(folder, problem) for problem in catalogue.problems]
    for workflow in catalogue.workflows:
        file = f"{workflow.route}{'.py' if workflow.source == 'python' else '.json'}"
        problems = list(_tried(workflow, file, live))
        found += [_placed(folder, problem) for problem in problems] or [CheckedFile(file=file)]
    return tuple(sorted(found, key=lambda each: (each.file, each.line, each.message)))


def _tried(workflow: Workflow, file: str, live: LiveInfo) -> Iterator[WorkflowProblem]:
    schema = workflow.input_schema(live)
    sample = {name: sample_of(schema["properties"][name]) for name in schema["required"]}
    try:
        built = trio.run(partial(workflow.build, sample, live))
    except InvalidValue as exc:
        for fault in exc.faults:
            name = fault.location.split(".")[1:2]
            if not name or name[0] not in sample:
                yield WorkflowProblem(file=file, message=f"a call without {fault.location} fails: {fault.message}")
        return
    except WorkflowFailed as exc:
        text = str(exc).removeprefix(f"the workflow {workflow.route} ")
        if exc.traceback_text is not None:
            text = f"{text}: {exc.__cause__}".rstrip(": ")
        yield WorkflowProblem(file=file, message=text, traceback_text=exc.traceback_text)
        return
    if live.object_info:
        known = NodeClasses.from_object_info(live.object_info)
        for fault in check_classes(built.prompt, known):
            yield WorkflowProblem(file=file, message=f"{fault.location} {fault.message}")
        if not saves_something(built.prompt, known):
            yield WorkflowProblem(file=file, message="no node of its graph saves anything, so each call is refused")


def sample_of(schema: Mapping[str, Any]) -> Any:
    """Make up a value that most likely fits a JSON Schema of ours."""
    if "anyOf" in schema:
        return sample_of(schema["anyOf"][0])
    if schema.get("enum"):
        return schema["enum"][0]
    match schema.get("type"):
        case "integer" | "number":
            return _sample_number(schema)
        case "boolean":
            return False
        case "array":
            return [sample_of(schema.get("items") or {}) for _ in range(schema.get("minItems", 0))]
        case "object":
            properties = schema.get("properties", {})
            return {name: sample_of(properties[name]) for name in schema.get("required", ())}
        case _:
            word = "sample.png" if MEDIA in schema else "sample"
            return word.ljust(schema.get("minLength", 0), "x")[: schema.get("maxLength")]


def _sample_number(schema: Mapping[str, Any]) -> int | float:
    low = schema.get("minimum", schema["exclusiveMinimum"] + 1 if "exclusiveMinimum" in schema else None)
    high = schema.get("maximum", schema["exclusiveMaximum"] - 1 if "exclusiveMaximum" in schema else None)
    value: int | float = 1
    value = value if high is None else min(value, high)
    value = value if low is None else max(value, low)
    step = schema.get("multipleOf")
    return value if step is None else math.ceil(value / step) * step


def _placed(folder: Path, problem: WorkflowProblem) -> CheckedFile:
    """Find the line of a problem; the first where nothing says more."""
    message = problem.message
    if problem.traceback_text is not None:
        frames = [frame for frame in _FRAME.finditer(problem.traceback_text) if _below(folder, frame["file"])]
        if frames:  # the innermost; it may be in a helper that the workflow uses
            file = _below(folder, frames[-1]["file"]) or problem.file
            return CheckedFile(
                file=file, line=int(frames[-1]["line"]), message=_LINE.sub("", message, count=1).lstrip(": ")
            )
    path = folder / problem.file
    if problem.file.endswith(".py"):
        return CheckedFile(file=problem.file, line=_function_line(path), message=message)
    return CheckedFile(file=problem.file, line=_data_line(path, message), message=message)


def _below(folder: Path, file: str) -> str | None:
    path = Path(file)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else None


def _function_line(path: Path) -> int:
    """The line of the function that a fault without a traceback is about, else the first."""
    for number, line in enumerate(_text(path).splitlines(), 1):
        if re.match(r"(async )?def workflow\b", line):
            return number
    return 1


def _data_line(path: Path, message: str) -> int:
    text = _text(path)
    if byte := _BYTE.search(message):
        return text.encode()[: int(byte["byte"])].count(b"\n") + 1
    if line := _LINE.search(message):
        return int(line["line"])
    place = _NODE.search(message) or _PLACE.search(message)
    if place is None:
        return 1
    try:
        here = yaml.compose(text, Loader=yaml.SafeLoader)  # which JSON is too
    except yaml.YAMLError:
        return 1
    found = 1
    for part in place[1].split("."):
        members = dict(_members(here))
        if part not in members:
            break
        found, here = members[part]
    return found


def _members(node: Any) -> Iterator[tuple[str, tuple[int, Any]]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), (key.start_mark.line + 1, value)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield str(index), (value.start_mark.line + 1, value)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_SEARCHED_BYTES).decode("utf-8", "replace")
    except OSError:  # the problem itself says so
        return ""
