"""What the tests of the jobs API share: the application over a service whose jobs are driven by hand, and watchers."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import trio
from api_support import WITHIN_S
from http_server_kit import TOO_LONG_S, Server, open_files, quick_config, tasks_living
from jobs_kit import TIMES, event, make_service, request

from comfyd.cli.sse import EventParser
from comfyd.engine import Completed
from comfyd.errors import Failure, FailureKind
from comfyd.host.metrics import Metrics
from comfyd.http.app import ComfydApp
from comfyd.http.docs import DocsEndpoint
from comfyd.http.events import EventStreams
from comfyd.http.metrics import MetricsEndpoint
from comfyd.http.server import serve_http
from comfyd.jobs import Job, JobService, JobState, Success
from comfyd.jobs.ledger import Recorded
from comfyd.jobs.model import Clock
from comfyd.journal import JobFilter, JournalUnavailable
from comfyd.media.collect import OutputFile
from comfyd.workflows import Workflows
from comfyd.workflows.live_source import LiveSource

_MAX_BODY_BYTES = 1 << 20
FAILURE = Failure(kind=FailureKind.EXECUTION_FAILED, detail="a node raised", facts={"node_id": "2"})


@attrs.define(eq=False)
class HandLedger:
    """A journal in memory. *held* collects what is to be called when an end is on disk, if *holding*."""

    durable: bool = True
    holding: bool = False
    broken: bool = False
    accepting: bool = True
    unaccepted: list[Recorded] = attrs.field(factory=list)
    held: list[Callable[[], None]] = attrs.field(factory=list)
    jobs: dict[str, Job] = attrs.field(factory=dict)
    forgotten: list[str] = attrs.field(factory=list)
    untold: set[str] = attrs.field(factory=set)
    """Ids of jobs whose webhooks were not taken yet."""
    pages: list[JobFilter] = attrs.field(factory=list)

    def accept(self, job: Job, body: bytes, done: Recorded) -> None:
        if self.accepting:
            done(None)
        else:
            self.unaccepted.append(done)

    def started(self, job: Job) -> None: ...

    def waiting(self, job: Job) -> None: ...

    def made(self, job: Job, execution: Completed, outputs: tuple[OutputFile, ...]) -> None: ...

    def ended(self, job: Job, state: JobState, done: Callable[[], None]) -> None:
        self.jobs[job.id] = job
        job.ended_at = time.time()  # as the journal's does, before the end is told
        if self.holding:
            self.held.append(done)
        else:
            done()

    async def find(self, job_id: str) -> Job | None:
        await self._asked()
        return self.jobs.get(job_id)

    async def page(self, wanted: JobFilter) -> list[Job]:
        self.pages.append(wanted)
        await self._asked()
        fits = [
            job
            for job in self.jobs.values()
            if job.outcome is not None
            and (not wanted.states or job.state.value in wanted.states)
            and wanted.workflow in {None, job.workflow}
            and (wanted.before is None or job.sequence < wanted.before)
        ]
        return sorted(fits, key=lambda job: -job.sequence)[: wanted.limit]

    async def forget(self, job: Job) -> bool:
        await self._asked()
        if job.id in self.untold or job.id not in self.jobs:
            return False
        del self.jobs[job.id]
        self.forgotten.append(job.id)
        return True

    async def _asked(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise JournalUnavailable("the disk is full")


@attrs.define(eq=False)
class Api:
    """The application, served on a socket, with the service behind it."""

    server: Server
    client: httpx.AsyncClient
    service: JobService
    ledger: HandLedger
    streams: EventStreams

    @property
    def watchers(self) -> int:
        """How many event streams are open."""
        return self.streams.watching

    def submit(self, job_id: str = "job", *, workflow: str = "", **fields: Any) -> Job:
        """A job whose caller does not wait; it is in the queue."""
        fields.setdefault("respond_async", True)
        return self.service.submit(request(**fields), job_id, b"", workflow=workflow)

    def run(self, job: Job) -> None:
        """An engine takes *job*."""
        assert self.service.queue.remove(job)
        self.service.started(job)

    def hear(self, job: Job, kind: str, **data: Any) -> None:
        """The engine tells something of *job*."""
        if job.progress.hear(event(kind, **data)):
            job.touch()

    def succeed(self, job: Job, *outputs: OutputFile) -> None:
        """The graph of *job*, which runs, has made *outputs*."""
        job.move(JobState.DELIVERING)
        stats = Clock().stats(attempts=job.attempts, times=TIMES)
        self.service.finish(job, Success(graph={}, outputs=outputs, stats=stats), JobState.SUCCEEDED)

    def fail(self, job: Job, failure: Failure = FAILURE) -> None:
        self.service.finish(job, failure, JobState.FAILED)

    async def finished(self, job_id: str, folder: Path, *contents: bytes, name: str = "a.png", **fields: Any) -> Job:
        """A job that has made a file of each of *contents*; *fields* are those of :class:`OutputFile`."""
        job = self.submit(job_id)
        self.run(job)
        outputs = []
        for place, data in enumerate(contents):
            path = folder / f"{job_id}-{place}"
            await trio.Path(path).write_bytes(data)
            described = {"filename": name, "node_id": "2", "media_type": "image/png", **fields}
            outputs.append(OutputFile(path=path, size_bytes=len(data), **described))
        self.succeed(job, *outputs)
        return job


@asynccontextmanager
async def open_api() -> AsyncIterator[Api]:
    """Serve the application. Unlike ``serving`` it may be left from a fixture, where other tasks come and go."""
    ledger = HandLedger()
    service = make_service()
    service.ledger = ledger
    live = LiveSource(engine=service.engines[0])
    app = ComfydApp(
        service,
        Workflows(),
        live,
        MetricsEndpoint(Metrics()),
        DocsEndpoint(workflows=Workflows(), live=live),
        max_body_bytes=_MAX_BODY_BYTES,
    )
    stop = trio.Event()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    with trio.fail_after(TOO_LONG_S):
        async with trio.open_nursery() as nursery:
            config = quick_config(max_body_bytes=_MAX_BODY_BYTES)
            url = await nursery.start(serve_http, app, config, stop)
            server = Server(
                port=int(url.rpartition(":")[2]),
                url=url,
                stop=stop,
                tasks_at_rest=tasks_living(),
                files_at_rest=open_files(),
            )
            # Time-outs are the test's own.
            async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False, limits=limits) as client:  # noqa: S113
                yield Api(server, client, service, ledger, app.events)
            stop.set()


@attrs.define(eq=False)
class Watcher:
    """A client of an event stream, by hand: no HTTP client's generators have to be closed."""

    stream: trio.SocketStream
    status: int
    head: bytes
    parser: EventParser = attrs.field(factory=EventParser)
    raw: bytearray = attrs.field(factory=bytearray)
    """Everything that came of the body."""
    _lines: list[bytes] = attrs.field(factory=list)
    _rest: bytes = b""
    ended: bool = False

    async def next(self) -> tuple[str, Any]:
        """The next event's name and data; ``("end", None)`` at the end of the stream."""
        with trio.fail_after(WITHIN_S):
            while True:
                while self._lines:
                    found = self.parser.feed(self._lines.pop(0).decode())
                    if found is not None:
                        return found.name, found.data
                data = await self.stream.receive_some(65536)
                if not data:
                    self.ended = True
                    return "end", None
                self._take(data)

    async def until(self, name: str, **members: Any) -> list[tuple[str, Any]]:
        """The events up to and with the first one of that name that has these members."""
        events = []
        while True:
            found, data = await self.next()
            events.append((found, data))
            if found == name and all(data.get(key) == value for key, value in members.items()):
                return events
            assert found != "end", events

    async def rest(self) -> list[tuple[str, Any]]:
        """The events up to the end of the stream."""
        return (await self.until_end())[:-1]

    async def until_end(self) -> list[tuple[str, Any]]:
        events = [await self.next()]
        while not self.ended:
            events.append(await self.next())
        return events

    def _take(self, data: bytes) -> None:
        self.raw += data
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._lines += lines


def watching(
    server: Server, job_id: str = "job", *, last_id: str | None = None, query: str = ""
) -> AbstractAsyncContextManager[Watcher]:
    """Watch a job."""
    return watching_at(server.port, f"/jobs/{job_id}", last_id=last_id, query=query)


@asynccontextmanager
async def watching_at(port: int, url: str, *, last_id: str | None = None, query: str = "") -> AsyncIterator[Watcher]:
    """Watch the job at *url*. HTTP 1.0, whose answer is the plain stream up to the end."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        more = f"Last-Event-ID: {last_id}\r\n" if last_id is not None else ""
        await stream.send_all(f"GET {url}/events{query} HTTP/1.0\r\n{more}\r\n".encode())
        received = b""
        with trio.fail_after(WITHIN_S):
            while b"\r\n\r\n" not in received:
                data = await stream.receive_some(65536)
                assert data, received
                received += data
        head, _, body = received.partition(b"\r\n\r\n")
        watcher = Watcher(stream, int(head[9:12]), head.lower())
        watcher._take(body)
        yield watcher
