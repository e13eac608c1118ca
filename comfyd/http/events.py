"""``GET /jobs/<id>/events``: a job's state and progress as Server-Sent Events, until its outcome.

A watcher is told where the job is now, not everything that ever happened: between two writes any number of changes
become one, so a slow watcher needs no buffer and delays nobody.
"""

from typing import Any, Final

import attrs
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, HTTPScope

from comfyd.errors import Failure
from comfyd.http import problems
from comfyd.http.answer import output_document
from comfyd.http.asgi import send_failure, start, until_client_gone
from comfyd.jobs import Job, JobService
from comfyd.wire import encode_json

_HEARTBEAT_S: Final = 15.0
"""Proxies cut a silent connection after 30 to 60 s."""
_SHORTEST_GAP_S: Final = 0.05
"""Between two writes: twenty a second are smooth for an eye, and bound what a job of many quick steps costs us."""


@attrs.frozen
class JobEventsEndpoint:
    """The endpoint, as a plain ASGI application."""

    service: JobService

    async def __call__(
        self, scope: HTTPScope, receive: ASGIReceiveCallable, send: ASGISendCallable, job_id: str
    ) -> None:
        """Serve one request."""
        if scope["method"] != "GET":
            await send_failure(send, problems.method_not_allowed("GET"), headers=[(b"allow", b"GET")])
            return
        job = self.service.get(job_id)
        if job is None:
            await send_failure(send, problems.not_found("such job"))
            return
        await start(send, 200, b"text/event-stream", [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")])
        await until_client_gone(receive, lambda: self._follow(send, job))

    async def _follow(self, send: ASGISendCallable, job: Job) -> None:
        told: dict[str, Any] | None = None
        while job.outcome is None:
            changed = job.changed
            now = job_view(job, self.service)
            if now != told:
                told = now
                await _send(send, b"event: progress\ndata: " + encode_json(now) + b"\n\n")
                await trio.sleep(_SHORTEST_GAP_S)
                continue  # it may have changed meanwhile
            with trio.move_on_after(_HEARTBEAT_S) as beat:
                await changed.wait()
            if beat.cancelled_caught:
                await _send(send, b": still here\n\n")
        await _send(send, b"event: result\ndata: " + encode_json(job_result(job)) + b"\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def job_view(job: Job, service: JobService) -> dict[str, Any]:
    """Where a job is on its way."""
    progress = job.progress.view
    node = job.graph.get(progress.node_id) if progress.node_id is not None else None
    title = ((node.get("_meta") or {}).get("title") or node.get("class_type")) if node else None
    return {
        "id": job.id,
        "state": job.state.value,
        "position": service.queue.position(job),
        "percent": progress.percent,
        "node_id": progress.node_id,
        "node_title": title,
        "step": progress.step,
        "steps": progress.steps,
    }


def job_result(job: Job) -> dict[str, Any]:
    """How a job ended."""
    outcome = job.outcome
    if outcome is None:
        raise RuntimeError("asked for the result of a job that has none yet")
    if isinstance(outcome, Failure):
        return {"id": job.id, "state": job.state.value, "problem": problems.document_of(outcome, job_id=job.id)}
    return {
        "id": job.id,
        "state": job.state.value,
        "outputs": [output_document(output) for output in outcome.outputs],
        "stats": outcome.stats.as_dict(),
    }


async def _send(send: ASGISendCallable, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
