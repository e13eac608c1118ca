"""What is written of a job to outlive the daemon, and how it is read again. JSON, one document for each stage.

*made* says what the graph made, until it is delivered; the *outcome* is what is told. Paths are in both, as files are
built into answers when these are sent; neither leaves the daemon as it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from comfyd.engine import Completed, ExecutionTimes, NodeTime
from comfyd.errors import Failure, FailureKind, Fault
from comfyd.host.environment import mask_urls
from comfyd.jobs.model import Outcome, Stats, Success
from comfyd.media.collect import OutputFile
from comfyd.wire import decode_json, encode_json

_LONGEST_ECHO: Final = 4096
"""Characters of one text that a failure repeats of the graph: inputs in base64 may have 100 MB, and were not prepared
yet if the job failed early."""


@attrs.frozen(kw_only=True)
class EndRecord:
    """How a job ended, with what is told beside the outcome: the graph as it is shown, the blocks that are echoed.

    *started_at*: when it was first handed to an engine, in unix seconds.
    """

    outcome: Outcome
    graph: Mapping[str, Any]
    echo: Mapping[str, Any]
    started_at: float | None = None


@attrs.frozen(kw_only=True)
class MadeRecord:
    """A graph that has run: its files are there and wait for their delivery. *graph* is the one that is shown.

    *clock* are the job's stages so far, in seconds; *reported* is what nodes have reported, for cleaning up.
    """

    graph: Mapping[str, Any]
    prefixes: tuple[str, ...]
    reported: tuple[Mapping[str, Any], ...]
    outputs: tuple[OutputFile, ...]
    execution: Completed
    clock: Mapping[str, float]


def encode_end(record: EndRecord) -> bytes:
    """Write an :class:`EndRecord`."""
    document: dict[str, Any] = {"graph": record.graph, "echo": record.echo, "started_at": record.started_at}
    outcome = record.outcome
    if isinstance(outcome, Failure):
        document["failure"] = {
            "kind": outcome.kind.value,
            "detail": outcome.detail,
            "faults": [[fault.location, fault.message] for fault in outcome.faults],
            "facts": dict(outcome.facts),
        }
        document["graph"] = presentable(record.graph)
    else:
        document["outputs"] = [_output_document(output) for output in outcome.outputs]
        document["stats"] = outcome.stats.as_dict()
    return encode_json(document)


def decode_end(data: bytes) -> EndRecord:
    """Read what :func:`encode_end` wrote."""
    document = decode_json(data)
    graph = document["graph"]
    outcome: Outcome
    if (failure := document.get("failure")) is not None:
        outcome = Failure(
            kind=FailureKind(failure["kind"]),
            detail=failure["detail"],
            faults=tuple(Fault(location=location, message=message) for location, message in failure["faults"]),
            facts=failure["facts"],
        )
    else:
        outputs = tuple(_read_output(output) for output in document["outputs"])
        outcome = Success(graph=graph, outputs=outputs, stats=_read_stats(document["stats"]))
    return EndRecord(outcome=outcome, graph=graph, echo=document["echo"], started_at=document["started_at"])


def encode_made(record: MadeRecord) -> bytes:
    """Write a :class:`MadeRecord`."""
    return encode_json(
        {
            "graph": record.graph,
            "prefixes": record.prefixes,
            "reported": record.reported,
            "outputs": [_output_document(output) for output in record.outputs],
            "execution": {"outputs": record.execution.outputs, "times": _times_document(record.execution.times)},
            "clock": record.clock,
        }
    )


def decode_made(data: bytes) -> MadeRecord:
    """Read what :func:`encode_made` wrote."""
    document = decode_json(data)
    execution = document["execution"]
    return MadeRecord(
        graph=document["graph"],
        prefixes=tuple(document["prefixes"]),
        reported=tuple(document["reported"]),
        outputs=tuple(_read_output(output) for output in document["outputs"]),
        execution=Completed(outputs=execution["outputs"], times=_read_times(execution["times"])),
        clock=document["clock"],
    )


def presentable(value: Any, longest: int = _LONGEST_ECHO) -> Any:
    """A copy of *value* that may be told to others: no passwords in URLs, and no text longer than *longest*."""
    if isinstance(value, Mapping):
        return {key: presentable(item, longest) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [presentable(item, longest) for item in value]
    if isinstance(value, str):
        if len(value) > longest:
            return f"{mask_urls(value[:64])}... ({len(value)} characters)"
        return mask_urls(value)
    return value


def _output_document(output: OutputFile) -> dict[str, Any]:
    return {
        "path": str(output.path),
        "filename": output.filename,
        "node_id": output.node_id,
        "media_type": output.media_type,
        "size_bytes": output.size_bytes,
        "converted": output.converted,
        "object_url": output.object_url,
        "url": output.url,
    }


def _read_output(document: Mapping[str, Any]) -> OutputFile:
    return OutputFile(**{**document, "path": Path(document["path"])})


def _times_document(times: ExecutionTimes) -> dict[str, Any]:
    nodes = {node: [time.start_ms, time.duration_ms] for node, time in times.nodes.items()}
    return {"start_ms": times.start_ms, "end_ms": times.end_ms, "nodes": nodes}


def _read_times(document: Mapping[str, Any]) -> ExecutionTimes:
    nodes = {node: NodeTime(start_ms=start, duration_ms=took) for node, (start, took) in document["nodes"].items()}
    return ExecutionTimes(start_ms=document["start_ms"], end_ms=document["end_ms"], nodes=nodes)


def _read_stats(document: Mapping[str, Any]) -> Stats:
    execution = document["comfy_execution"]
    nodes = {
        node: NodeTime(start_ms=time["start"], duration_ms=time["duration"])
        for node, time in execution["nodes"].items()
    }
    return Stats(
        **{name: value for name, value in document.items() if name != "comfy_execution"},
        times=ExecutionTimes(start_ms=execution["start"], end_ms=execution["end"], nodes=nodes),
    )
