"""``/jobs`` and what is below it: look at jobs, follow one, get its outputs, cancel it or have it forgotten."""

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final
from urllib.parse import quote, urlencode

import attrs
import trio

from comfyd.errors import Failure, FailureKind, RequestRefused
from comfyd.http import problems
from comfyd.http.asgi import (
    Exchange,
    Handler,
    by_method,
    send_empty,
    send_failure,
    send_json,
    until_client_gone,
)
from comfyd.http.events import EventStreams, wait_told
from comfyd.http.interrupt import CANCELLED
from comfyd.http.job_views import job_view, listed_view
from comfyd.http.outputs import send_output, send_outputs
from comfyd.http.query import parse_query, seconds, some_of, text_of, whole_number
from comfyd.jobs import Job, JobService, JobState
from comfyd.jobs.request import ID_PATTERN
from comfyd.journal import JobFilter, JournalUnavailable

_ID: Final = re.compile(ID_PATTERN)
_LONGEST_WAIT_S: Final = 60.0
_DEFAULT_PAGE: Final = 50
_LARGEST_PAGE: Final = 200
_STATES: Final = {
    **{state.value: (state.value,) for state in JobState},
    "active": tuple(state.value for state in JobState if not state.final),
    "ended": tuple(state.value for state in JobState if state.final),
}
_LIST_PARAMETERS: Final = {
    "state": some_of(_STATES),
    "workflow": text_of(512),
    "limit": whole_number(1, _LARGEST_PAGE),
    "before": whole_number(0),
}
_STILL_TELLING: Final = Failure(
    kind=FailureKind.WEBHOOK_PENDING,
    detail="the job has ended, but somebody has still to be told: a caller who waits, or the receiver of a webhook",
    retry_after_s=5.0,
)
_SHELVED: Final = Failure(
    kind=FailureKind.DRAINING,
    detail="comfyd is stopping and has put the job aside; it goes on with the next start, and can be cancelled then",
    retry_after_s=5.0,
)


@attrs.frozen
class JobsEndpoint:
    """The endpoint, as a plain ASGI application."""

    service: JobService
    events: EventStreams

    async def __call__(self, exchange: Exchange) -> None:
        """Serve one request whose path is ``/jobs`` or below it."""
        match exchange.scope["path"].split("/")[2:]:
            case []:
                await by_method(exchange, {"GET": self._list})
            case [job_id]:
                await by_method(
                    exchange, {"GET": self._of(job_id, self._one), "DELETE": self._of(job_id, self._delete)}
                )
            case [job_id, "events"]:
                await by_method(exchange, {"GET": self._of(job_id, self.events.serve)})
            case [job_id, "outputs"]:
                await by_method(exchange, {"GET": self._of(job_id, send_outputs)})
            case [job_id, "outputs", place]:
                await by_method(exchange, {"GET": self._of(job_id, partial(send_output, place=place))})
            case _:
                await send_failure(exchange.send, problems.not_found("such route"))

    def _of(self, job_id: str, handler: Callable[[Exchange, Job], Awaitable[None]]) -> Handler:
        async def handle(exchange: Exchange) -> None:
            with _journal_wanted():
                job = await self.service.look_up(job_id) if _ID.fullmatch(job_id) else None
            if job is None:
                raise RequestRefused(problems.not_found("such job"))
            await handler(exchange, job)

        return handle

    async def _list(self, exchange: Exchange) -> None:
        query = parse_query(exchange.scope, _LIST_PARAMETERS)
        limit = query.get("limit", _DEFAULT_PAGE)
        wanted = JobFilter(
            states=query.get("state", frozenset()),
            workflow=query.get("workflow"),
            before=query.get("before"),
            limit=limit + 1,  # one more tells whether there is a next page
        )
        with _journal_wanted():
            jobs = await self.service.page(wanted)
        following = str(jobs[limit - 1].sequence) if len(jobs) > limit else None
        headers = [] if following is None else [(b"link", _link_to_next(query, following))]
        document = {"jobs": [listed_view(job) for job in jobs[:limit]], "next": following}
        await send_json(exchange.send, 200, document, headers)

    async def _one(self, exchange: Exchange, job: Job) -> None:
        wait_s = parse_query(exchange.scope, {"wait": seconds(_LONGEST_WAIT_S)}).get("wait", 0.0)

        async def answer() -> None:
            with trio.move_on_after(wait_s):
                await wait_told(job)
            await send_json(exchange.send, 200, job_view(job, self.service))

        if wait_s and job.outcome is None:
            await until_client_gone(exchange, answer)
        else:
            await send_json(exchange.send, 200, job_view(job, self.service))

    async def _delete(self, exchange: Exchange, job: Job) -> None:
        """Cancel a job that is on its way; of one that has ended remove what is kept."""
        if job.outcome is not None:
            with _journal_wanted():
                forgotten = await self.service.forget(job)
            if not forgotten:
                raise RequestRefused(_STILL_TELLING)
            await send_empty(exchange.send, 204)
            return
        self.service.cancel(job, CANCELLED)  # without effect if its end is decided: then it is told which one it is
        outcome = await wait_told(job)
        if job.shelved:
            raise RequestRefused(_SHELVED)
        if outcome is None:  # the journal did not take it, so there never was a promise
            raise RequestRefused(problems.not_found("such job"))
        await send_json(exchange.send, 200, job_view(job, self.service))


@contextmanager
def _journal_wanted() -> Iterator[None]:
    """Where the journal has to be asked: a disk that fails is told as what passes."""
    try:
        yield
    except JournalUnavailable as exc:
        detail = f"the journal, which knows the jobs that have ended, does not answer: {exc}"
        raise RequestRefused(Failure(kind=FailureKind.NOT_READY, detail=detail, retry_after_s=30.0)) from exc


def _link_to_next(query: Mapping[str, Any], following: str) -> bytes:
    """The value of ``Link`` (RFC 8288), with the query as it was understood."""
    parameters = {"state": ",".join(sorted(query["state"]))} if "state" in query else {}
    parameters |= {name: str(query[name]) for name in ("workflow", "limit") if name in query}
    return f'</jobs?{urlencode({**parameters, "before": following}, quote_via=quote)}>; rel="next"'.encode()
