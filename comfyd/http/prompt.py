"""``POST /prompt``: from a body to a job, and from its outcome to an answer."""

import hashlib
import uuid
from typing import Any, Final

import attrs
import structlog
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope

from comfyd.errors import Failure, InvalidValue, RequestRefused
from comfyd.host.logging import bind_job
from comfyd.http import problems
from comfyd.http.answer import FileChanged, send_success
from comfyd.http.asgi import (
    ClientGone,
    check_json_type,
    read_body,
    send_failure,
    send_whole,
    until_client_gone,
)
from comfyd.jobs import Job, JobService, Outcome, Request, parse_request
from comfyd.jobs.failures import invalid_request
from comfyd.wire import decode_json, encode_json

log = structlog.get_logger("comfyd.http")

_LARGE_BYTES: Final = 1 << 20
"""Bodies from here on are decoded in a thread. The decoder keeps the interpreter lock, but the loop gets its turns."""


@attrs.frozen
class PromptEndpoint:
    """The endpoint, as a plain ASGI application. It holds nothing between two requests."""

    service: JobService
    max_body_bytes: int

    async def __call__(self, scope: HTTPScope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve one request."""
        if scope["method"] != "POST":
            await send_failure(send, problems.method_not_allowed("POST"), headers=[(b"allow", b"POST")])
            return
        try:
            check_json_type(scope)
            request, digest = await self._read(scope, receive)
            if request.id is not None:
                await self.service.wait_free(request.id)
            graph = request.prompt if request.detached else None
            job = self.service.submit(request, request.id or str(uuid.uuid4()), digest)
        except RequestRefused as exc:
            await send_failure(send, exc.failure)
            return
        except ClientGone:
            return
        if graph is not None:
            accepted = {"id": job.id, "status": "ok", "prompt": graph, **request.echo}
            await send_whole(send, 202, encode_json(accepted), headers=[(b"location", f"/jobs/{job.id}".encode())])
            return
        with self.service.attached(job), bind_job(job.id, job.attempts):

            async def answer() -> None:
                await _answer(send, job, await job.wait_final())

            await until_client_gone(receive, answer)

    async def _read(self, scope: HTTPScope, receive: ASGIReceiveCallable) -> tuple[Request, bytes]:
        body = await read_body(scope, receive, self.max_body_bytes)
        try:
            if len(body) < _LARGE_BYTES:
                return _parse(body)
            return await trio.to_thread.run_sync(_parse, body)
        except InvalidValue as exc:
            raise RequestRefused(invalid_request(exc.faults)) from exc


def _parse(body: bytearray) -> tuple[Request, bytes]:
    value: Any = decode_json(body)
    body.clear()  # a body can be 100 MB; what it said is in *value*
    request = parse_request(value)
    # Only who names the job can mean the same one twice.
    digest = hashlib.blake2b(encode_json(value), digest_size=16).digest() if request.id is not None else b""
    return request, digest


async def _answer(send: ASGISendCallable, job: Job, outcome: Outcome) -> None:
    if isinstance(outcome, Failure):
        await send_failure(send, outcome, job_id=job.id)
        return
    try:
        await send_success(send, job.id, outcome, job.request.echo)
    except FileChanged as exc:
        log.error("job.output_changed", file=str(exc))  # noqa: TRY400  # a fact about the disk, not a bug of ours
        raise
