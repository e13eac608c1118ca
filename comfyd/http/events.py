"""``GET /jobs/<id>/events``: a job's way as Server-Sent Events, until its outcome.

Three kinds of event. ``state`` tells each state that the job came into, in order and none left out: there is a handful
of them, and the job remembers them. ``progress`` tells how far it is now: between two writes any number of changes
become one, so a slow watcher needs no buffer and delays nobody. ``result`` tells the end, and is the last.

``state`` and ``result`` have ids, by which a client that was cut off goes on where it was (HTML standard, section
9.2, "Server-sent events"): states that it has not seen come again, then the newest progress. An id names the life of
the daemon, the job and the number of the change: of another life, or another job that had the same id, everything is
told. The end has an id of its own that every life knows, as a job ends once: who has it gets a 204, on which an
``EventSource`` gives up.
"""

import random
import uuid
from collections.abc import Iterator
from typing import Any, Final

import attrs
import trio
from hypercorn.typing import ASGISendCallable

from comfyd.http.asgi import Exchange, header, send_empty, start, until_client_gone
from comfyd.http.job_views import iso_time, job_result, progress_view
from comfyd.http.query import parse_query, text_of
from comfyd.jobs import Job, JobService, Outcome
from comfyd.wire import encode_json

_OPENING: Final = b": ok\nretry: 2000\n\n"
"""The comment makes proxies pass on the header; a client that was cut off comes back after two seconds."""
_HEARTBEAT: Final = b": still here\n\n"
_HEARTBEAT_S: Final = 15.0
"""Proxies cut a silent connection after 30 to 60 s."""
_LOOK_AGAIN_S: Final = 5.0
"""The place in the queue and the time that is left change without the job's doing. To find the place takes some 50 us
in a queue of a thousand, and each of that many jobs may have its watcher: then this is 1 % of the time."""
_SHORTEST_GAP_S: Final = 0.05
"""Between two writes to a watcher: twenty a second are smooth for an eye."""
_WRITES_PER_S: Final = 1000
"""To all watchers together, at most: a write takes some 200 us in all, and this much is a fifth of a core. More
watchers than fifty make each one's gap longer."""
_LONGEST_ID: Final = 128


@attrs.define(eq=False)
class EventStreams:
    """The event streams of all jobs."""

    service: JobService
    life: str = attrs.field(factory=lambda: uuid.uuid4().hex[:8])
    """Names this life of the daemon: the numbers of a job's changes begin anew in the next one."""
    watching: int = 0
    """How many streams are open."""

    async def serve(self, exchange: Exchange, job: Job) -> None:
        """Answer one request for the events of *job*.

        Raises:
            RequestRefused: the query is not valid.
        """
        # An EventSource cannot set a header at its first connection, and keeps the query at each following one.
        query = parse_query(exchange.scope, {"last_event_id": text_of(_LONGEST_ID)})
        last_id = header(exchange.scope, b"last-event-id") or query.get("last_event_id", "")
        if last_id == _end_id(job):
            await send_empty(exchange.send, 204, [(b"cache-control", b"no-store")])
            return
        # "no-transform", as a proxy that compresses holds events back until it has a block of them.
        headers = [(b"cache-control", b"no-store, no-transform"), (b"x-accel-buffering", b"no")]
        await start(exchange.send, 200, b"text/event-stream", headers)
        if exchange.scope["method"] == "HEAD":
            await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        self.watching += 1
        try:
            seen = self._revision_of(job, last_id)
            await until_client_gone(exchange, lambda: self._follow(exchange.send, job, seen))
        finally:
            self.watching -= 1

    async def _follow(self, send: ASGISendCallable, job: Job, seen: int) -> None:
        """Tell all of *job* after its change number *seen*, until it ends, or nobody here works on it any more."""
        told: dict[str, Any] | None = None
        news = [_OPENING]
        written_at = trio.current_time()
        while True:
            changed = job.changed
            news.extend(self._states(job, seen))
            seen = job.revision
            over = job.outcome is not None or _given_up(job)
            if job.outcome is not None:
                news.append(_event(b"result", job_result(job), _end_id(job)))
            elif not over and (now := progress_view(job, self.service)) != told:
                told = now
                news.append(_event(b"progress", now))
            if news or over:
                await send({"type": "http.response.body", "body": b"".join(news), "more_body": not over})
                if over:
                    return
                news.clear()
                written_at = trio.current_time()
                await trio.sleep(max(_SHORTEST_GAP_S, self._share_s))
            with trio.move_on_after(_LOOK_AGAIN_S):
                await changed.wait()
            # One change wakes every watcher of the job, and all in one go would be a stall for everybody else.
            await trio.sleep(random.random() * self._share_s)  # noqa: S311  # no secret
            if trio.current_time() - written_at >= _HEARTBEAT_S:
                news.append(_HEARTBEAT)

    @property
    def _share_s(self) -> float:
        """The time between two writes to a watcher if all together get their most."""
        return self.watching / _WRITES_PER_S

    def _states(self, job: Job, seen: int) -> Iterator[bytes]:
        """The states that came after change *seen*, but for the last one of all, which the result tells."""
        for change in job.states:
            if change.revision > seen and not change.state.final:
                state = {"id": job.id, "state": change.state.value, "at": iso_time(change.at)}
                yield _event(b"state", state, f"{self._life_of(job)}{change.revision}")

    def _life_of(self, job: Job) -> str:
        return f"{self.life}-{job.key[:12]}-"

    def _revision_of(self, job: Job, event_id: str) -> int:
        """The number of the change that an event told of; 0, before all, if it was not in this life of this job."""
        life = self._life_of(job)
        number = event_id.removeprefix(life)
        known = event_id.startswith(life) and number.isascii() and number.isdecimal() and len(number) < 10
        return int(number) if known else 0


async def wait_told(job: Job) -> Outcome | None:
    """Wait until the outcome of *job* may be told; None if there will be none in this life of the daemon."""
    while job.outcome is None and not _given_up(job):
        await job.changed.wait()
    return job.outcome


def _given_up(job: Job) -> bool:
    return job.shelved or job.refusal is not None


def _end_id(job: Job) -> str:
    return f"{job.key[:12]}-end"


def _event(name: bytes, data: dict[str, Any], event_id: str | None = None) -> bytes:
    head = b"" if event_id is None else b"id: %b\n" % event_id.encode()
    return b"%bevent: %b\ndata: %b\n\n" % (head, name, encode_json(data))
