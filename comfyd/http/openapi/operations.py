"""The operations of the fixed routes, in the order in which a reader meets them."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from comfyd.errors import FailureKind
from comfyd.http.openapi import examples
from comfyd.http.openapi.answers import JOB_ID
from comfyd.http.openapi.problem_types import problem_responses
from comfyd.http.openapi.schemas import STRING, described, list_of, ref
from comfyd.jobs.model import JobState

Operation = dict[str, Any]

JSON: Final = "application/json"
RUN_FAILURES: Final = (
    FailureKind.INVALID_REQUEST,
    FailureKind.NO_OUTPUT_NODE,
    FailureKind.INVALID_INPUT,
    FailureKind.INVALID_PROMPT,
    FailureKind.BODY_TOO_LARGE,
    FailureKind.UNSUPPORTED_MEDIA_TYPE,
    FailureKind.ID_CONFLICT,
    FailureKind.JOB_CANCELLED,
    FailureKind.QUEUE_FULL,
    FailureKind.NOT_READY,
    FailureKind.DRAINING,
    FailureKind.EXECUTION_FAILED,
    FailureKind.ENGINE_CRASHED,
    FailureKind.STORAGE_FAILED,
    FailureKind.TIMEOUT,
)
_JOURNAL: Final = (FailureKind.NOT_FOUND, FailureKind.NOT_READY)
_ENDED: Final = " or ".join(f"`{state.value}`" for state in JobState if state.final)

# Parameters have no examples: Swagger UI would send them with everything that is tried out.
PREFER: Final = {
    "name": "Prefer",
    "in": "header",
    "description": "`respond-async` asks for a 202 at once (RFC 7240); the job is then found at `/jobs`.",
    "schema": dict(STRING),
}


def operation(
    operation_id: str,
    tag: str,
    summary: str,
    description: str,
    responses: Mapping[str, Any],
    *,
    failures: Iterable[FailureKind] = (),
    open_to_all: bool = False,
    **more: Any,
) -> Operation:
    """One operation. *failures* are told as problems, beside those that every operation may end in.

    *open_to_all*: no key is asked for.
    """
    common = [] if open_to_all else [FailureKind.INTERNAL]
    problems = problem_responses({*failures, *common})
    answers = {**responses, **{status: each for status, each in problems.items() if status not in responses}}
    whole: Operation = {
        "operationId": operation_id,
        "tags": [tag],
        "summary": summary,
        "description": description,
        **more,
        "responses": {status: answers[status] for status in sorted(answers)},
    }
    if open_to_all:
        whole["security"] = []
    return whole


def answer(text: str, schema: Mapping[str, Any], *, media_type: str = JSON, **more: Any) -> dict[str, Any]:
    """An answer with a body; *more* are members of its media type (``example``, ``examples``)."""
    return {"description": text, "content": {media_type: {"schema": dict(schema), **more}}}


def header(text: str, schema: Mapping[str, Any] = STRING) -> dict[str, Any]:
    """A header of an answer."""
    return {"description": text, "schema": dict(schema)}


ACCEPTED: Final[dict[str, Any]] = {
    **answer(
        "The job is taken: its end will be told by webhook, and is found at `Location`.",
        ref("Accepted"),
        example=examples.ACCEPTED,
    ),
    "headers": {
        "Location": header("The job.", {"type": "string", "format": "uri-reference"}),
        "Preference-Applied": header("`respond-async`, if that was asked for."),
    },
}


def fixed_paths(*, metrics: bool) -> dict[str, Any]:
    """The paths that are there whatever the workflows are; */metrics* may be on a port of its own."""
    paths: dict[str, Any] = {
        "/prompt": {"post": _run_prompt()},
        "/workflows": {"get": _list_workflows()},
        "/interrupt": {"post": _interrupt()},
        "/jobs": {"get": _list_jobs()},
        "/jobs/{id}": {"parameters": [_JOB_PARAMETER], "get": _get_job(), "delete": _delete_job()},
        "/jobs/{id}/events": {"parameters": [_JOB_PARAMETER], "get": _events()},
        "/jobs/{id}/outputs": {"parameters": [_JOB_PARAMETER], "get": _outputs()},
        "/jobs/{id}/outputs/{place}": {"parameters": [_JOB_PARAMETER, _PLACE_PARAMETER], "get": _output()},
        "/models": {"get": _models()},
        "/health": {"get": _health()},
        "/ready": {"get": _ready()},
    }
    if metrics:
        paths["/metrics"] = {"get": _metrics()}
    return paths | _document_paths()


_JOB_PARAMETER: Final = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "The job's id.",
    "schema": JOB_ID,
}
_PLACE_PARAMETER: Final = {
    "name": "place",
    "in": "path",
    "required": True,
    "description": "Which of the job's outputs, counted from 0.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
}


def _run_prompt() -> Operation:
    return operation(
        "runPrompt",
        "Run",
        "Run a graph",
        "Without a webhook and without asynchronous storage the answer waits for the graph's end, and has its files. "
        "A client that leaves meanwhile cancels its job. The same `id` and body while the job is known joins that job.",
        {
            "200": answer("What the graph made.", ref("PromptResult"), example=examples.RESULT),
            "202": ACCEPTED,
        },
        failures=RUN_FAILURES,
        parameters=[PREFER],
        requestBody={
            "required": True,
            "content": {JSON: {"schema": ref("PromptRequest"), "examples": dict(examples.PROMPT_REQUESTS)}},
        },
    )


def _list_workflows() -> Operation:
    example = {"workflows": [{"name": "sd1.5/txt2img", "summary": "Text to image.", "source": "python"}]}
    return operation(
        "listWorkflows",
        "Run",
        "List the workflows",
        "Each workflow is an endpoint of its own, `/workflow/<name>` (`/workflows/<name>` is the same).",
        {"200": answer("All workflows.", ref("WorkflowList"), example=example)},
    )


def _interrupt() -> Operation:
    return operation(
        "interruptJob",
        "Jobs",
        "Cancel a job",
        "Cancels a job that waits or runs, and says whether it was this call that ended it.",
        {
            "200": answer(
                "The job was cancelled.",
                ref("Interrupted"),
                example={"id": examples.JOB_ID, "interrupted": "success"},
            ),
            "404": answer(
                "There is no such job, or its end was decided before.",
                ref("Interrupted"),
                example={"id": examples.JOB_ID, "interrupted": "failed"},
            ),
        },
        failures=(FailureKind.INVALID_REQUEST, FailureKind.BODY_TOO_LARGE, FailureKind.UNSUPPORTED_MEDIA_TYPE),
        requestBody={
            "required": True,
            "content": {JSON: {"schema": ref("InterruptRequest"), "example": {"id": examples.JOB_ID}}},
        },
    )


def _list_jobs() -> Operation:
    states = [*(state.value for state in JobState), "active", "ended"]
    return operation(
        "listJobs",
        "Jobs",
        "List jobs",
        "The newest first, a page at a time: the jobs that are not over, and those that ended and are still known.",
        {
            "200": {
                **answer("A page of jobs.", ref("JobList"), example=examples.JOB_LIST),
                "headers": {"Link": header('The next page (`rel="next"`), if there is one.')},
            }
        },
        failures=(FailureKind.INVALID_REQUEST, FailureKind.NOT_READY),
        parameters=[
            _query(
                "state",
                "Only jobs in one of these states; `active` and `ended` stand for several.",
                {**list_of({"type": "string", "enum": states}), "minItems": 1},
                style="form",
                explode=False,
            ),
            _query("workflow", "Only jobs of this workflow.", {"type": "string", "maxLength": 512}),
            _query("limit", "How many at most.", {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}),
            _query(
                "before",
                "Where the page begins: `next` of the page before.",
                {"type": "string", "pattern": "^[0-9]{1,18}$"},
            ),
        ],
    )


def _get_job() -> Operation:
    return operation(
        "getJob",
        "Jobs",
        "Look at a job",
        f"Its state and progress; once it is {_ENDED}, its result.",
        {"200": answer("The job.", ref("Job"), examples=dict(examples.JOBS))},
        failures=(FailureKind.INVALID_REQUEST, *_JOURNAL),
        parameters=[
            _query(
                "wait",
                "Answer when the job has ended, or after so many seconds.",
                {"type": "number", "minimum": 0, "maximum": 60, "default": 0},
            )
        ],
    )


def _delete_job() -> Operation:
    return operation(
        "deleteJob",
        "Jobs",
        "Cancel a job, or have it forgotten",
        "A job that is on its way is cancelled, and told as it ended. One that has ended is removed with its outputs.",
        {
            "200": answer("The job, cancelled; or as it ended just then.", ref("Job")),
            "204": {"description": "The job had ended; it is forgotten."},
        },
        failures=(*_JOURNAL, FailureKind.WEBHOOK_PENDING, FailureKind.DRAINING),
    )


def _events() -> Operation:
    return operation(
        "streamJobEvents",
        "Jobs",
        "Follow a job",
        "Server-Sent Events: `state` (JobStateEvent) for each state, `progress` (JobProgressEvent) as it goes on, and "
        "`result` (JobResultEvent) at the end. A client that was cut off goes on by `Last-Event-ID`.",
        {
            # Of a stream's items 3.1 has no words (3.2 has itemSchema): some tools take a schema for the text, some for
            # each event.
            "200": answer(
                "The events, until the job has ended.",
                {"description": "The `data` of each event is JSON, by the schema that is named above."},
                media_type="text/event-stream",
                example=examples.EVENTS,
            ),
            "204": {"description": "The client has the end already."},
        },
        failures=(FailureKind.INVALID_REQUEST, *_JOURNAL),
        parameters=[
            {
                "name": "Last-Event-ID",
                "in": "header",
                "description": "The id of the last event that the client saw.",
                "schema": dict(STRING),
            },
            _query(
                "last_event_id",
                "The same, for an `EventSource`, which cannot set headers.",
                {"type": "string", "maxLength": 128},
            ),
        ],
    )


def _outputs() -> Operation:
    return operation(
        "listJobOutputs",
        "Jobs",
        "List a job's outputs",
        "There are some once the job has succeeded. `href` is there where comfyd keeps the file: for jobs that were "
        "answered with a 202 and have no storage.",
        {
            "200": answer(
                "The outputs.",
                ref("JobOutputs"),
                example={"id": examples.JOB_ID, "outputs": [examples.JOB_OUTPUT]},
            )
        },
        failures=_JOURNAL,
    )


def _output() -> Operation:
    file = {"description": "The file as it is.", "content": {"*/*": {"schema": {}}}}
    headers = {
        "ETag": header("Names this content."),
        "Accept-Ranges": header("`bytes`"),
        "Content-Disposition": header("The file's name."),
    }
    return operation(
        "getJobOutput",
        "Jobs",
        "Get a file",
        "Whole or in part, as one range at a time. What a browser would run as a program is told to be saved.",
        {
            "200": {**file, "headers": headers},
            "206": {
                "description": "A part of the file.",
                "headers": {**headers, "Content-Range": header("Which part.")},
                "content": {"*/*": {"schema": {}}},
            },
            "302": {
                "description": "The file is in a storage.",
                "headers": {"Location": header("A presigned URL.", {"type": "string", "format": "uri"})},
            },
            "304": {"description": "The client has this content (`If-None-Match`).", "headers": {"ETag": header("")}},
        },
        failures=(*_JOURNAL, FailureKind.RANGE_NOT_SATISFIABLE),
        parameters=[
            {
                "name": "Range",
                "in": "header",
                "description": "`bytes=<first>-<last>`",
                "schema": dict(STRING),
            }
        ],
    )


def _models() -> Operation:
    return operation(
        "listModels",
        "Engine",
        "List the models",
        "From ComfyUI's own folders, as they are now.",
        {
            "200": answer(
                "File names by type.", ref("Models"), example={"checkpoints": ["pattern-v1.safetensors"], "loras": []}
            )
        },
        failures=(FailureKind.NOT_READY,),
    )


def _health() -> Operation:
    return operation(
        "getHealth",
        "Probes",
        "Whether comfyd ever worked",
        "200 from the first warm-up on, whatever becomes of the engine later. Never asks for a key.",
        {
            "200": answer("It did.", ref("Health"), example={"version": "1.0.0", "status": "healthy"}),
            "503": answer("Not yet.", ref("NotHealthy"), example={"version": "1.0.0", "status": "not healthy"}),
        },
        open_to_all=True,
    )


def _ready() -> Operation:
    reason = "the engine is warming up"
    return operation(
        "getReadiness",
        "Probes",
        "Whether to send more work here",
        "For balancers: 200 while an engine is up and warm, the queue is not too deep, and comfyd is not stopping. "
        "Never asks for a key.",
        {
            "200": answer("Yes.", ref("Ready"), example={"version": "1.0.0", "status": "ready"}),
            "503": answer(
                "No.", ref("NotReady"), example={"version": "1.0.0", "status": "not ready", "reason": reason}
            ),
        },
        open_to_all=True,
    )


def _metrics() -> Operation:
    formats: Collection[str] = ("text/plain", "application/openmetrics-text")
    text = "# TYPE comfyd_queue_depth gauge\ncomfyd_queue_depth 2.0\n"
    content = {name: {"schema": dict(STRING), "example": text} for name in formats}
    return operation(
        "getMetrics",
        "Probes",
        "Metrics",
        "For Prometheus, in the format that it prefers. Never asks for a key.",
        {"200": {"description": "The metrics.", "content": content}},
        open_to_all=True,
    )


def _document_paths() -> dict[str, Any]:
    document = described({"type": "object"}, "An OpenAPI 3.1 document.")
    unchanged = {"description": "It is as the client has it (`If-None-Match`)."}

    def get(operation_id: str, summary: str, media_type: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        good = {**answer("It.", schema, media_type=media_type), "headers": {"ETag": header("Names this content.")}}
        text = "It has the workflows and the models that there are at the moment."
        return {"get": operation(operation_id, "Docs", summary, text, {"200": good, "304": unchanged})}

    return {
        "/openapi.json": get("getOpenApi", "This document", JSON, document),
        "/docs/json": get("getOpenApiAsJson", "This document, where comfyui-api has it", JSON, document),
        "/docs/yaml": get("getOpenApiAsYaml", "This document, as YAML", "application/yaml", document),
        "/docs": get("getDocs", "This document, for people", "text/html", STRING),
    }


def _query(name: str, text: str, schema: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": text, "schema": dict(schema), **more}
