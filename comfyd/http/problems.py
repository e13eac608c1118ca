"""From a :class:`Failure` to what a client of ours sees: RFC 9457 problem documents, and the only table of statuses."""

import math
from typing import Any, Final

import attrs

from comfyd.errors import Failure, FailureKind, Fault
from comfyd.wire import encode_json

CONTENT_TYPE: Final = "application/problem+json"

_KINDS: Final[dict[FailureKind, tuple[int, str]]] = {
    FailureKind.INVALID_REQUEST: (400, "The request is not valid"),
    FailureKind.NO_OUTPUT_NODE: (400, "The graph saves nothing"),
    FailureKind.INVALID_INPUT: (400, "An input cannot be used"),
    FailureKind.INVALID_PROMPT: (400, "The graph is not valid"),
    FailureKind.NOT_FOUND: (404, "Not found"),
    FailureKind.METHOD_NOT_ALLOWED: (405, "Method not allowed"),
    FailureKind.BODY_TOO_LARGE: (413, "The body is too large"),
    FailureKind.UNSUPPORTED_MEDIA_TYPE: (415, "The content type is not supported"),
    FailureKind.RANGE_NOT_SATISFIABLE: (416, "The range is not satisfiable"),
    FailureKind.UNAUTHORIZED: (401, "Not authorized"),
    FailureKind.ID_CONFLICT: (409, "The id is in use"),
    FailureKind.WEBHOOK_PENDING: (409, "A webhook is still to be delivered"),
    FailureKind.JOB_CANCELLED: (409, "The job was cancelled"),
    FailureKind.QUEUE_FULL: (429, "The queue is full"),
    FailureKind.NOT_READY: (503, "Not ready"),
    FailureKind.DRAINING: (503, "Stopping"),
    FailureKind.EXECUTION_FAILED: (500, "A node failed"),
    FailureKind.WORKFLOW_FAILED: (500, "The workflow failed"),
    FailureKind.ENGINE_CRASHED: (502, "ComfyUI crashed"),
    FailureKind.STORAGE_FAILED: (502, "Storage failed"),
    FailureKind.TIMEOUT: (504, "Time ran out"),
    FailureKind.INTERNAL: (500, "Internal error"),
}


@attrs.frozen(kw_only=True)
class Problem:
    """A whole answer: *status*, *headers* beside the content type, and the *body*."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def problem(failure: Failure, *, job_id: str | None = None) -> Problem:
    """Write *failure* as an answer."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if failure.retry_after_s is not None:
        headers = ((b"retry-after", str(math.ceil(failure.retry_after_s)).encode()),)
    document = document_of(failure, job_id=job_id)
    return Problem(status=document["status"], headers=headers, body=encode_json(document))


def document_of(failure: Failure, *, job_id: str | None = None) -> dict[str, Any]:
    """The problem document of *failure*; ``error`` and ``location`` are what clients of comfyui-api look at."""
    status, title = _KINDS[failure.kind]
    document: dict[str, Any] = {
        "type": failure.kind.value,
        "title": title,
        "status": status,
        "detail": failure.detail,
        "error": failure.detail,
    }
    if job_id is not None:
        document["id"] = job_id
    if failure.faults:
        document["location"] = failure.faults[0].location
        document["errors"] = [{"location": fault.location, "message": fault.message} for fault in failure.faults]
    return document | dict(failure.facts)


def not_found(what: str) -> Failure:
    """There is no such thing here."""
    return Failure(kind=FailureKind.NOT_FOUND, detail=f"there is no {what}")


def method_not_allowed(allowed: str) -> Failure:
    """The route is there, the method is not."""
    return Failure(kind=FailureKind.METHOD_NOT_ALLOWED, detail=f"only {allowed} is allowed here")


def body_too_large(max_body_bytes: int) -> Failure:
    """The body is over the limit; what came of it was dropped."""
    limit = f"{max_body_bytes / (1 << 20):g} MB (MAX_BODY_SIZE_MB)"
    return Failure(
        kind=FailureKind.BODY_TOO_LARGE,
        detail=f"the body is larger than {limit}",
        faults=(Fault(location="", message=f"must be at most {limit}"),),
    )


def unsupported_media_type(given: str) -> Failure:
    """The body does not say that it is JSON."""
    return Failure(
        kind=FailureKind.UNSUPPORTED_MEDIA_TYPE,
        detail=f"the content type must be application/json, got {given[:80]!r}",
    )


INTERNAL: Final = Failure(
    kind=FailureKind.INTERNAL, detail="comfyd made a mistake; its log has the details under this time"
)
