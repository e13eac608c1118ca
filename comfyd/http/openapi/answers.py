"""The schemas of what comfyd answers and sends.

They are written down here, as answers are made by hand; the tests hold what a daemon really answers against them, with
every object closed, so that neither a member too many nor one too few goes unnoticed.
"""

from typing import Any, Final

from comfyd.http.openapi.schemas import INTEGER, NUMBER, STRING, TIME, Schema, described, list_of, nullable, record, ref
from comfyd.jobs.model import JobState
from comfyd.jobs.request import ID_PATTERN
from comfyd.variables import SYSTEM_EVENTS

JOB_ID: Final[Schema] = {"type": "string", "pattern": ID_PATTERN, "maxLength": 128}
_MS: Final[Schema] = {"type": "number", "description": "Milliseconds."}
_STATE: Final[Schema] = {"enum": [state.value for state in JobState], "type": "string"}
_ECHO: Final[dict[str, Schema]] = {"s3": described(ref("S3Target"), "The block of the request, as it was sent.")}
_INPUT_ECHO: Final[Schema] = {"type": "object", "description": "The workflow's input, with every default filled in."}

_OUTPUT: Final = {
    "filename": described(STRING, "The name of the file."),
    "node_id": described(STRING, "The node that saved it."),
    "media_type": described(STRING, "By content, not by name."),
    "size_bytes": INTEGER,
}
_OUTPUT_OPTIONAL: Final = {
    "converted": {"type": "boolean", "description": "Whether `convert_output` was applied; it is for pictures only."},
    "url": {"type": "string", "format": "uri", "description": "Where it is stored, with storage."},
}
_RESULT: Final = {
    "id": JOB_ID,
    "prompt": described(ref("Graph"), "The graph as it was queued, with the rewritten file name prefixes."),
    "images": described(
        list_of(STRING),
        "The files, in the order of `outputs`: as base64, or as URLs with storage. Not only pictures.",
    ),
    "filenames": list_of(STRING),
    "outputs": list_of(ref("Output")),
    "stats": ref("Stats"),
}
_BEGINNING: Final = {
    "id": JOB_ID,
    "state": ref("JobState"),
    "workflow": described(nullable(STRING), "The workflow's name; null for a job of `/prompt`."),
    "accepted_at": TIME,
    "started_at": nullable(TIME),
    "ended_at": nullable(TIME),
    "attempts": described(INTEGER, "How often ComfyUI was given the graph."),
}
_PROGRESS: Final = {
    "position": described(nullable(INTEGER), "How many jobs are before it in the queue; null if it is not waiting."),
    "percent": {"type": "number", "minimum": 0, "maximum": 100, "description": "Over the whole graph."},
    "node_id": nullable(STRING),
    "node_title": nullable(STRING),
    "step": described(nullable(NUMBER), "Of the node that is running."),
    "steps": nullable(NUMBER),
    "eta_s": described(nullable(NUMBER), "Seconds to the end, as far as can be told."),
}
_ENDED: Final = {"outputs": list_of(ref("JobOutput")), "stats": ref("Stats"), "problem": ref("Problem")}


def _version(text: str, *words: str) -> Schema:
    return record(text, {"version": STRING, "status": {"type": "string", "enum": list(words)}})


def _event(text: str, kind: str) -> Schema:
    return {
        "type": "string",
        "const": kind,
        "description": text,
    }


def answer_schemas() -> dict[str, Any]:
    """The component schemas of answers and webhooks, by name; those of problems are in ``problem_schemas``."""
    return {
        "JobState": {**_STATE, "description": "Where a job is on its way; the last three are ends."},
        "Health": _version("A warm-up was completed at some time.", "healthy"),
        "NotHealthy": _version("No warm-up was completed yet.", "not healthy"),
        "Ready": _version("More work may be sent here.", "ready"),
        "NotReady": record(
            "No work should be sent here now.",
            {"version": STRING, "status": {"type": "string", "const": "not ready"}, "reason": STRING},
        ),
        "Models": {
            "type": "object",
            "description": "File names by type of model.",
            "additionalProperties": list_of(STRING),
        },
        "Output": record("A file that a job made.", _OUTPUT, optional=_OUTPUT_OPTIONAL),
        "JobOutput": record(
            "A file that a job made.",
            _OUTPUT,
            optional={
                **_OUTPUT_OPTIONAL,
                "href": {"type": "string", "format": "uri-reference", "description": "Where comfyd keeps the file."},
            },
        ),
        "Stats": record(
            "What took how long, in milliseconds.",
            {
                "comfy_execution": record(
                    "ComfyUI's own account, in unix milliseconds.",
                    {
                        "start": NUMBER,
                        "end": NUMBER,
                        "duration": _MS,
                        "nodes": {
                            "type": "object",
                            "description": "To each node that ran; cached ones are left out.",
                            "additionalProperties": record(
                                "A node's run.", {"start": NUMBER, "duration": nullable(_MS)}
                            ),
                        },
                    },
                ),
                "preprocess_time": _MS,
                "comfy_round_trip_time": _MS,
                "postprocess_time": _MS,
                "upload_time": _MS,
                "queue_time": _MS,
                "total_time": _MS,
                "attempts": INTEGER,
            },
        ),
        "PromptResult": record("What a graph made.", _RESULT, optional=_ECHO),
        "WorkflowResult": record("What a workflow made.", {**_RESULT, "input": _INPUT_ECHO}, optional=_ECHO),
        "Accepted": record(
            "The job is taken, and its end will be told.",
            {
                "id": JOB_ID,
                "status": {"type": "string", "const": "ok"},
                "prompt": described(ref("Graph"), "The graph as it was sent, or as the workflow made it."),
            },
            optional={"webhook": STRING, "webhook_v2": STRING, "input": _INPUT_ECHO, **_ECHO},
        ),
        "Interrupted": record(
            "Whether this call ended the job.",
            {"id": JOB_ID, "interrupted": {"type": "string", "enum": ["success", "failed"]}},
        ),
        "Links": record(
            "What there is of a job, relative to the daemon.", {"self": STRING, "events": STRING, "outputs": STRING}
        ),
        "Job": record(
            "A job: where it is, and once it has ended `outputs` and `stats`, or `problem`.",
            {**_BEGINNING, **_PROGRESS, "links": ref("Links")},
            optional=_ENDED,
        ),
        "ListedJob": record(
            "A job in a list.",
            {**_BEGINNING, "percent": _PROGRESS["percent"], "links": ref("Links")},
            optional={"problem": ref("ShortProblem")},
        ),
        "JobList": record(
            "A page of jobs, the newest first.",
            {
                "jobs": list_of(ref("ListedJob")),
                "next": described(nullable(STRING), "The `before` of the next page; null on the last one."),
            },
        ),
        "JobOutputs": record("The outputs of a job.", {"id": JOB_ID, "outputs": list_of(ref("JobOutput"))}),
        "JobStateEvent": record(
            "The `data` of an event `state`.", {"id": JOB_ID, "state": ref("JobState"), "at": TIME}
        ),
        "JobProgressEvent": record(
            "The `data` of an event `progress`.", {"id": JOB_ID, "state": ref("JobState"), **_PROGRESS}
        ),
        "JobResultEvent": record(
            "The `data` of the event `result`, the last one: `outputs` and `stats`, or `problem`.",
            {"id": JOB_ID, "state": ref("JobState")},
            optional=_ENDED,
        ),
        "WorkflowList": record(
            "The workflows that there are.",
            {"workflows": list_of(record("A workflow.", {"name": STRING, "summary": STRING, "source": _SOURCE}))},
        ),
        "WorkflowDescription": record(
            "A workflow, with the JSON Schema of its input.",
            {
                "name": STRING,
                "summary": STRING,
                "description": STRING,
                "source": _SOURCE,
                "input": {"type": "object", "description": "JSON Schema (2020-12), with what the engine has now."},
            },
        ),
        **_webhook_schemas(),
    }


_SOURCE: Final[Schema] = {"type": "string", "enum": ["python", "json"]}


def _webhook_schemas() -> dict[str, Any]:
    return {
        "OutputComplete": record(
            "v1: one file of a job.",
            {
                "event": _event("One output of the job is there.", "output.complete"),
                "image": described(STRING, "The file as base64, or its URL with storage."),
                "id": JOB_ID,
                "filename": STRING,
                "prompt": ref("Graph"),
                "stats": ref("Stats"),
            },
        ),
        "OutputFailed": record(
            "v1: a job that has no output to tell of.",
            {
                "event": _event("The job failed, or made no file.", "prompt.failed"),
                "error": STRING,
                "id": JOB_ID,
                "prompt": ref("Graph"),
            },
        ),
        "PromptComplete": record(
            "v2: a job that succeeded, with all that a 200 has.",
            {"type": _event("The job succeeded.", "prompt.complete"), "timestamp": TIME, **_RESULT},
            optional={"input": _INPUT_ECHO, **_ECHO},
        ),
        "PromptFailed": record(
            "v2: a job that failed, with the members of its problem.",
            {
                "type": _event("The job failed.", "prompt.failed"),
                "timestamp": TIME,
                "id": JOB_ID,
                "prompt": ref("Graph"),
                "error": STRING,
                "problem_type": ref("ProblemType"),
                "title": STRING,
                "status": INTEGER,
                "detail": STRING,
            },
            optional={"location": STRING, "errors": list_of(ref("Fault"))},
        ),
        "SystemEvent": record(
            "One of ComfyUI's own events.",
            {
                "event": {"type": "string", "enum": [f"comfy.{name}" for name in SYSTEM_EVENTS]},
                "data": record(
                    "The message of ComfyUI's websocket; in its data, `prompt_id` is the job's id.",
                    {"type": {"type": "string", "enum": list(SYSTEM_EVENTS)}, "data": {"type": "object"}},
                    optional={"sid": nullable(STRING)},
                ),
                "metadata": {
                    "type": "object",
                    "description": "What `SYSTEM_META_*` and the host say.",
                    "additionalProperties": STRING,
                },
            },
        ),
    }
