"""The problem types: one component schema for each, and the answers that operations have in common."""

from collections.abc import Iterable
from typing import Any, Final

from comfyd.errors import Failure, FailureKind
from comfyd.http.openapi.examples import FAILURES
from comfyd.http.openapi.schemas import INTEGER, STRING, Schema, described, list_of, record, ref
from comfyd.http.problems import CONTENT_TYPE, document_of

_MEANINGS: Final[dict[FailureKind, str]] = {
    FailureKind.INVALID_REQUEST: "The body is not JSON or does not fit its schema, or a query parameter is wrong.",
    FailureKind.NO_OUTPUT_NODE: "No node of the graph saves anything.",
    FailureKind.INVALID_INPUT: "An input cannot be fetched, decoded or found, or its URL is not allowed.",
    FailureKind.INVALID_PROMPT: "The graph is not valid; what ComfyUI said of its nodes is in `node_errors`.",
    FailureKind.NOT_FOUND: "There is no such job, output, workflow or route.",
    FailureKind.METHOD_NOT_ALLOWED: "The route does not have this method; `Allow` names those that it has.",
    FailureKind.BODY_TOO_LARGE: "The body is larger than `MAX_BODY_SIZE_MB`.",
    FailureKind.UNSUPPORTED_MEDIA_TYPE: "The body is said to be something else than JSON.",
    FailureKind.RANGE_NOT_SATISFIABLE: "The range begins after the end of the file.",
    FailureKind.UNAUTHORIZED: "The request has no key, or one that is not valid.",
    FailureKind.ID_CONFLICT: "Another body was sent under an id that is in use.",
    FailureKind.WEBHOOK_PENDING: "The job cannot be removed yet, as somebody has still to be told of its end.",
    FailureKind.JOB_CANCELLED: "The job was cancelled by `/interrupt` or DELETE.",
    FailureKind.QUEUE_FULL: "As many jobs wait as `MAX_QUEUED_JOBS` allows. Nothing was queued.",
    FailureKind.NOT_READY: "Something that is needed is not there at the moment: the engine, or the journal.",
    FailureKind.DRAINING: "comfyd is stopping.",
    FailureKind.EXECUTION_FAILED: "A node raised, or did not make what it said.",
    FailureKind.WORKFLOW_FAILED: "The workflow made no graph, by no fault of its caller.",
    FailureKind.ENGINE_CRASHED: "ComfyUI ended under the job `JOB_MAX_ATTEMPTS` times.",
    FailureKind.STORAGE_FAILED: "An output could not be stored.",
    FailureKind.TIMEOUT: "The time of the request or of the daemon ran out.",
    FailureKind.INTERNAL: "A mistake of comfyd's own; its log has the details.",
}
_FACTS: Final[dict[FailureKind, dict[str, Schema]]] = {
    FailureKind.INVALID_PROMPT: {
        "node_errors": {"type": "object", "description": "ComfyUI's own, by node id, without tracebacks."}
    },
    FailureKind.INVALID_INPUT: {"node_id": dict(STRING)},
    FailureKind.EXECUTION_FAILED: {
        "node_id": dict(STRING),
        "node_type": dict(STRING),
        "exception_type": dict(STRING),
        "exception_message": dict(STRING),
    },
    FailureKind.ENGINE_CRASHED: {
        "attempts": dict(INTEGER),
        "cause": described(STRING, "What became of the engine, as a slug."),
        "last_words": described(list_of(STRING), "What it wrote to stderr during the job."),
    },
    FailureKind.STORAGE_FAILED: {"reason": described(STRING, "Why, as a slug."), "node_id": dict(STRING)},
    FailureKind.INTERNAL: {"node_id": dict(STRING)},
}
_RETRIED: Final = frozenset({429, 503})


def status_of(kind: FailureKind) -> int:
    """The status of an answer that tells *kind*."""
    status: int = document_of(Failure(kind=kind, detail=""))["status"]
    return status


def title_of(kind: FailureKind) -> str:
    """The title of *kind*."""
    title: str = document_of(Failure(kind=kind, detail=""))["title"]
    return title


def schema_name(kind: FailureKind) -> str:
    """The name of the component schema of *kind*: ``IdConflictProblem``."""
    return "".join(word.capitalize() for word in kind.value.split("-")) + "Problem"


def problem_schemas() -> dict[str, Any]:
    """The component schemas of problems, by name."""
    short = {"type": ref("ProblemType"), "title": STRING, "status": INTEGER, "detail": STRING}
    listing = "\n".join(f"- `{kind.value}` ({status_of(kind)}): {_MEANINGS[kind]}" for kind in FailureKind)
    return {
        "ProblemType": {
            "type": "string",
            "description": f"Why a request or a job did not succeed; these slugs are stable.\n\n{listing}",
            "enum": [kind.value for kind in FailureKind],
        },
        "Fault": record(
            "One thing that is wrong.",
            {
                "location": described(
                    STRING, "A dotted path such as `prompt.3.inputs.width`; empty for the body as a whole."
                ),
                "message": STRING,
            },
        ),
        "ShortProblem": record("Why a job did not succeed, in short.", short),
        "Problem": record(
            "Why a request or a job did not succeed (RFC 9457). Some types have further members.",
            {**short, "error": described(STRING, "The same as `detail`, for clients of comfyui-api.")},
            optional={
                "id": described(STRING, "The job."),
                "location": described(STRING, "The place of the first of `errors`."),
                "errors": described(list_of(ref("Fault")), "Everything that is wrong."),
            },
        ),
        **{schema_name(kind): _schema_of(kind) for kind in FailureKind},
    }


def _schema_of(kind: FailureKind) -> Schema:
    own = {
        "type": {"type": "string", "const": kind.value},
        "status": {"type": "integer", "const": status_of(kind)},
        **_FACTS.get(kind, {}),
    }
    return {
        "description": _MEANINGS[kind],
        "allOf": [ref("Problem"), {"type": "object", "properties": own, "required": ["type", "status"]}],
    }


def problem_responses(kinds: Iterable[FailureKind]) -> dict[str, Any]:
    """The answers of an operation that may end in one of *kinds*, by status; each kind with an example."""
    by_status: dict[int, list[FailureKind]] = {}
    for kind in FailureKind:  # their order, whatever the caller's is
        if kind in frozenset(kinds):
            by_status.setdefault(status_of(kind), []).append(kind)
    return {str(status): _response(status, by_status[status]) for status in sorted(by_status)}


def _response(status: int, kinds: list[FailureKind]) -> dict[str, Any]:
    references = [ref(schema_name(kind)) for kind in kinds]
    schema: Schema = references[0]
    if len(references) > 1:
        mapping = {kind.value: reference["$ref"] for kind, reference in zip(kinds, references, strict=True)}
        schema = {"oneOf": references, "discriminator": {"propertyName": "type", "mapping": mapping}}
    examples = {kind.value: {"summary": title_of(kind), "value": example_of(kind)} for kind in kinds}
    response: dict[str, Any] = {
        "description": " ".join(f"`{kind.value}`: {_MEANINGS[kind]}" for kind in kinds),
        "content": {CONTENT_TYPE: {"schema": schema, "examples": examples}},
    }
    headers: dict[str, Any] = {}
    if status in _RETRIED:
        headers["Retry-After"] = {
            "description": "Seconds after which another attempt makes sense, where that can be told.",
            "schema": {"type": "integer", "minimum": 0},
        }
    if status == 401:
        headers["WWW-Authenticate"] = {"description": "The scheme to use.", "schema": dict(STRING)}
    if status == 416:
        headers["Content-Range"] = {"description": "`bytes */<size>`", "schema": dict(STRING)}
    return {**response, "headers": headers} if headers else response


def example_of(kind: FailureKind) -> dict[str, Any]:
    """A problem document of *kind*."""
    failure = FAILURES.get(kind) or Failure(kind=kind, detail=_MEANINGS[kind].rstrip(".").replace("`", ""))
    return document_of(failure)
