"""From what a client sent to a job, and from the job's outcome to an answer: what ``/prompt`` and workflows share."""

import hashlib
import uuid
from collections.abc import Callable
from typing import Any, Final, TypeVar

import attrs
import structlog
import trio

from comfyd.errors import Failure, InvalidValue, RequestRefused
from comfyd.host.logging import bind_job
from comfyd.http.access_log import note_job
from comfyd.http.answer import FileChanged, send_success
from comfyd.http.asgi import Exchange, check_json_type, read_body, send_failure, send_whole, until_client_gone
from comfyd.jobs import Job, JobService, Outcome, Request
from comfyd.jobs.failures import invalid_request
from comfyd.wire import encode_json

log = structlog.get_logger("comfyd.http")

_LARGE_BYTES: Final = 1 << 20
"""Bodies from here on are decoded in a thread. The decoder keeps the interpreter lock, but the loop gets its turns."""

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Submission:
    """A request that is to become a job. *body* is its request as JSON, where the journal needs one.

    *digest* tells whether two requests under one id are the same; it is empty where the caller gave no id.
    """

    request: Request
    digest: bytes
    body: bytes | None
    workflow: str = ""


async def receive_parsed(exchange: Exchange, max_body_bytes: int, parse: Callable[[bytearray], T]) -> T:
    """Receive a JSON body and *parse* it, in a thread if it is large.

    Raises:
        RequestRefused: it is too large, of another type, or not what *parse* takes.
        ClientGone: it did not come to its end.
    """
    check_json_type(exchange.scope)
    body = await read_body(exchange.scope, exchange.receive, max_body_bytes)
    try:
        if len(body) < _LARGE_BYTES:
            return parse(body)
        return await trio.to_thread.run_sync(parse, body)
    except InvalidValue as exc:
        raise RequestRefused(invalid_request(exc.faults)) from exc


def digest_of(request: Request, value: Any) -> bytes:
    """The digest of a decoded body. Only who names the job can mean the same one twice."""
    return hashlib.blake2b(encode_json(value), digest_size=16).digest() if request.id is not None else b""


async def submit_and_answer(service: JobService, exchange: Exchange, submission: Submission) -> None:
    """Make a job of *submission* and answer: 202 if its caller does not wait, else its outcome once it is there.

    Raises:
        RequestRefused: nothing was queued and nothing is left behind.
    """
    request = submission.request
    graph = request.prompt if request.detached else None
    job = await _submit(service, submission)
    note_job(job.id)
    if graph is not None:
        await job.wait_accepted()
        accepted = {"id": job.id, "status": "ok", "prompt": graph, **request.accepted_echo}
        headers = [(b"location", f"/jobs/{job.id}".encode())]
        if request.respond_async:
            headers.append((b"preference-applied", b"respond-async"))
        await send_whole(exchange.send, 202, encode_json(accepted), headers=headers)
        return
    with service.attached(job), bind_job(job.id, job.attempts):

        async def answer() -> None:
            await _answer(exchange, job, await job.wait_final())

        await until_client_gone(exchange, answer)


async def _submit(service: JobService, submission: Submission) -> Job:
    request = submission.request
    job_id = request.id
    if job_id is None:
        job_id = str(uuid.uuid4())
    else:
        await service.wait_free(job_id)
        known = await service.look_up(job_id)
        if known is not None and known.outcome is not None:  # perhaps only the journal knows it
            return service.join(known, submission.digest)
    return service.submit(request, job_id, submission.digest, body=submission.body, workflow=submission.workflow)


async def _answer(exchange: Exchange, job: Job, outcome: Outcome) -> None:
    if isinstance(outcome, Failure):
        await send_failure(exchange.send, outcome, job_id=job.id)
        return
    try:
        await send_success(exchange.send, job.id, outcome, job.request.echo)
    except FileChanged as exc:
        log.error("job.output_changed", file=str(exc))  # noqa: TRY400  # a fact about the disk, not a bug of ours
        raise
