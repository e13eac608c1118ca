"""The examples of the document. The tests hold each one against its schema, and run those that can be run."""

from collections.abc import Mapping
from typing import Any, Final

from comfyd.errors import Failure, FailureKind, Fault
from comfyd.http.openapi.schemas import Schema, accepts_null
from comfyd.jobs.failures import invalid_prompt, invalid_request, no_output_node
from comfyd.workflows.fields import DEFAULT, MEDIA

JOB_ID: Final = "5f2c7a0e-9a51-4d0c-8f44-1f6a4c1f3a0b"
PICTURE: Final = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYPgPAAEDAQAIicLsAAAAAElFTkSuQmCC"
"""A PNG of one blue pixel, as base64."""

GRAPH: Final[dict[str, Any]] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blue"}},
}
"""It needs no model: every ComfyUI runs it."""
QUEUED: Final[dict[str, Any]] = {
    **GRAPH,
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"{JOB_ID}_blue"}},
}
_FILENAME: Final = f"{JOB_ID}_blue_00001_.png"

OUTPUT: Final[dict[str, Any]] = {
    "filename": _FILENAME,
    "node_id": "2",
    "media_type": "image/png",
    "size_bytes": 69,
}
JOB_OUTPUT: Final = {**OUTPUT, "href": f"/jobs/{JOB_ID}/outputs/0"}
STATS: Final[dict[str, Any]] = {
    "comfy_execution": {
        "start": 1780000000000,
        "end": 1780000000041,
        "duration": 41,
        "nodes": {
            "1": {"start": 1780000000002, "duration": 8.5},
            "2": {"start": 1780000000011, "duration": 27.25},
        },
    },
    "preprocess_time": 0.0,
    "comfy_round_trip_time": 44.1,
    "postprocess_time": 1.2,
    "upload_time": 0.0,
    "queue_time": 0.4,
    "total_time": 46.3,
    "attempts": 1,
}
RESULT: Final[dict[str, Any]] = {
    "id": JOB_ID,
    "prompt": QUEUED,
    "images": [PICTURE],
    "filenames": [_FILENAME],
    "outputs": [OUTPUT],
    "stats": STATS,
}
WORKFLOW_RESULT: Final[dict[str, Any]] = {**RESULT, "input": {"width": 64, "height": 64}}
ACCEPTED: Final[dict[str, Any]] = {"id": JOB_ID, "status": "ok", "prompt": GRAPH}

PROMPT_REQUESTS: Final[Mapping[str, Any]] = {
    "wait": {"summary": "Wait for the picture", "value": {"prompt": GRAPH}},
    "convert": {
        "summary": "As a JPEG",
        "value": {"prompt": GRAPH, "convert_output": {"format": "jpeg", "options": {"quality": 90}}},
    },
    "webhook": {
        "summary": "Be told by a webhook",
        "value": {"id": "order-1234", "prompt": GRAPH, "webhook_v2": "https://example.com/hooks/comfyd"},
    },
    "s3": {
        "summary": "Upload to S3, and answer at once",
        "value": {"prompt": GRAPH, "s3": {"bucket": "pictures", "prefix": "2026/", "async": True}},
    },
}

_LINKS: Final = {
    "self": f"/jobs/{JOB_ID}",
    "events": f"/jobs/{JOB_ID}/events",
    "outputs": f"/jobs/{JOB_ID}/outputs",
}
_RUNNING: Final[dict[str, Any]] = {
    "id": JOB_ID,
    "state": "running",
    "workflow": "sd1.5/txt2img",
    "accepted_at": "2026-05-28T20:26:40.000Z",
    "started_at": "2026-05-28T20:26:40.120Z",
    "ended_at": None,
    "attempts": 1,
}
_HALF_WAY: Final[dict[str, Any]] = {
    "position": None,
    "percent": 52.4,
    "node_id": "3",
    "node_title": "KSampler",
    "step": 10,
    "steps": 20,
    "eta_s": 1.4,
}
_ENDED: Final[dict[str, Any]] = {**_RUNNING, "state": "succeeded", "ended_at": "2026-05-28T20:26:43.020Z"}
_AT_THE_END: Final[dict[str, Any]] = {
    "position": None,
    "percent": 100.0,
    "node_id": None,
    "node_title": None,
    "step": None,
    "steps": None,
    "eta_s": None,
}
JOBS: Final[Mapping[str, Any]] = {
    "running": {"summary": "A job that runs", "value": {**_RUNNING, **_HALF_WAY, "links": _LINKS}},
    "succeeded": {
        "summary": "A job that succeeded",
        "value": {**_ENDED, **_AT_THE_END, "links": _LINKS, "outputs": [JOB_OUTPUT], "stats": STATS},
    },
}
JOB_LIST: Final[dict[str, Any]] = {"jobs": [{**_RUNNING, "percent": 52.4, "links": _LINKS}], "next": "41"}
EVENTS: Final = (
    ": ok\nretry: 2000\n\n"
    'id: 1c9f3b1e-5f2c7a0e9a51-3\nevent: state\ndata: {"id":"order-1234","state":"running",'
    '"at":"2026-05-28T20:26:40.120Z"}\n\n'
    'event: progress\ndata: {"id":"order-1234","state":"running","position":null,"percent":52.4,"node_id":"3",'
    '"node_title":"KSampler","step":10,"steps":20,"eta_s":1.4}\n\n'
    'id: 5f2c7a0e9a51-end\nevent: result\ndata: {"id":"order-1234","state":"succeeded","outputs":[],"stats":{}}\n\n'
)

WEBHOOK_EXAMPLES: Final[Mapping[str, Any]] = {
    "OutputComplete": {
        "event": "output.complete",
        "image": PICTURE,
        "id": JOB_ID,
        "filename": _FILENAME,
        "prompt": QUEUED,
        "stats": STATS,
    },
    "OutputFailed": {
        "event": "prompt.failed",
        "error": "the prompt made no output",
        "id": JOB_ID,
        "prompt": QUEUED,
    },
    "PromptComplete": {"type": "prompt.complete", "timestamp": "2026-05-28T20:26:43.020Z", **RESULT},
    "PromptFailed": {
        "type": "prompt.failed",
        "timestamp": "2026-05-28T20:26:43.020Z",
        "id": JOB_ID,
        "prompt": QUEUED,
        "error": "ComfyUI ended under this job 2 times: the engine was ended by signal 9",
        "problem_type": "engine-crashed",
        "title": "ComfyUI crashed",
        "status": 502,
        "detail": "ComfyUI ended under this job 2 times: the engine was ended by signal 9",
        "attempts": 2,
        "cause": "signal",
    },
    "SystemEvent": {
        "event": "comfy.progress",
        "data": {"type": "progress", "data": {"value": 10, "max": 20, "prompt_id": JOB_ID, "node": "3"}},
        "metadata": {"region": "eu"},
    },
}

_NOT_THERE: Final = 'must be one of "pattern-v1.safetensors", got "v1-5.safetensors"'
FAILURES: Final[Mapping[FailureKind, Failure]] = {
    FailureKind.INVALID_REQUEST: invalid_request(
        (Fault(location="convert_output.options.quality", message="must be <= 100, got 101"),)
    ),
    FailureKind.NO_OUTPUT_NODE: no_output_node(),
    FailureKind.INVALID_INPUT: Failure(
        kind=FailureKind.INVALID_INPUT,
        detail="https://example.com/cat.png answered 404",
        faults=(Fault(location="prompt.1.inputs.image", message="https://example.com/cat.png answered 404"),),
    ),
    FailureKind.INVALID_PROMPT: invalid_prompt((Fault(location="prompt.4.inputs.ckpt_name", message=_NOT_THERE),)),
    FailureKind.EXECUTION_FAILED: Failure(
        kind=FailureKind.EXECUTION_FAILED,
        detail="node 3 (KSampler) raised OutOfMemoryError: Allocation on device",
        faults=(Fault(location="prompt.3", message="Allocation on device"),),
        facts={
            "node_id": "3",
            "node_type": "KSampler",
            "exception_type": "OutOfMemoryError",
            "exception_message": "Allocation on device",
        },
    ),
    FailureKind.ENGINE_CRASHED: Failure(
        kind=FailureKind.ENGINE_CRASHED,
        detail="ComfyUI ended under this job 2 times: the engine was ended by signal 9",
        facts={"attempts": 2, "cause": "signal", "last_words": ["Killed"]},
    ),
    FailureKind.STORAGE_FAILED: Failure(
        kind=FailureKind.STORAGE_FAILED,
        detail="s3://pictures/2026/blue.png: there is no such bucket",
        facts={"reason": "no-such-bucket"},
    ),
}


def example_inputs(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Examples of a workflow's input, made from its *schema*; none where a value cannot be told from it."""
    required = {name: _value_of(schema["properties"][name]) for name in schema.get("required", ())}
    if any(value is None for value in required.values()):
        return {}
    examples = {"required": {"summary": "Only what is required", "value": {"input": required}}}
    defaults = {
        name: prop["default"]
        for name, prop in schema.get("properties", {}).items()
        if name not in required and _is_usable(prop)
    }
    if defaults:
        examples["all"] = {"summary": "With all defaults", "value": {"input": {**required, **defaults}}}
    return examples


def _is_usable(prop: Schema) -> bool:
    # A default that is made anew for each call, and one that this engine does not have, are not to be copied.
    return "default" in prop and DEFAULT not in prop and prop["default"] in prop.get("enum", (prop["default"],))


def _value_of(prop: Schema) -> Any:
    """A value that fits *prop*, None if that is not plain to see."""
    if _is_usable(prop):
        return prop["default"]
    if prop.get("enum"):
        return prop["enum"][0]
    if accepts_null(prop) or "pattern" in prop:
        return None
    match prop.get("type"):
        case "string":
            text = "https://example.com/picture.png" if MEDIA in prop else "a galaxy in a bottle"
            fits = prop.get("minLength", 0) <= len(text) <= prop.get("maxLength", len(text))
            return text if fits else None
        case "boolean":
            return True
        case "integer" | "number" if not {"exclusiveMinimum", "exclusiveMaximum"} & prop.keys():
            lowest = prop.get("minimum", min(1, prop.get("maximum", 1)))
            step = prop.get("multipleOf", 1)
            value = -(-lowest // step) * step if "multipleOf" in prop else lowest
            return value if value <= prop.get("maximum", value) else None
        case _:
            return None
