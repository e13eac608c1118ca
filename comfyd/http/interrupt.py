"""``POST /interrupt``: cancel a job by the way that comfyui-api has for it. ``DELETE /jobs/<id>`` is ours."""

from typing import Annotated, Final

import attrs
from msgspec import Meta

from comfyd.errors import Failure, FailureKind, Fault, InvalidValue, RequestRefused
from comfyd.http.asgi import ClientGone, Exchange, check_json_type, read_body, send_json
from comfyd.http.events import wait_told
from comfyd.jobs import JobService
from comfyd.jobs.failures import invalid_request
from comfyd.jobs.request import ID_PATTERN
from comfyd.wire import decode_json, structure

_MAX_BODY_BYTES: Final = 1 << 16
_TOO_LARGE: Final = Failure(
    kind=FailureKind.BODY_TOO_LARGE,
    detail="the body of an interrupt is an object with an id, 64 KB at most",
    faults=(Fault(location="", message="must be at most 64 KB"),),
)
CANCELLED: Final = Failure(kind=FailureKind.JOB_CANCELLED, detail="the job was cancelled by a caller")


@attrs.frozen(kw_only=True)
class InterruptRequest:
    """The body of ``POST /interrupt``."""

    id: Annotated[str, Meta(pattern=ID_PATTERN, max_length=128, description="The job to cancel.")]


async def interrupt(service: JobService, exchange: Exchange) -> None:
    """Cancel a queued or running job, and say whether it was this call that ended it.

    Raises:
        RequestRefused: the body is not a request to interrupt something.
    """
    check_json_type(exchange.scope)
    try:
        body = await read_body(exchange.scope, exchange.receive, _MAX_BODY_BYTES, _TOO_LARGE)
        job_id = structure(InterruptRequest, decode_json(body)).id
    except InvalidValue as exc:
        raise RequestRefused(invalid_request(exc.faults)) from exc
    except ClientGone:
        return
    job = service.get(job_id)
    if job is not None and service.cancel(job, CANCELLED):
        await wait_told(job)
        await send_json(exchange.send, 200, {"id": job_id, "interrupted": "success"})
    else:  # unknown, or its end was decided before: plain JSON, as comfyui-api answers it
        await send_json(exchange.send, 404, {"id": job_id, "interrupted": "failed"})
