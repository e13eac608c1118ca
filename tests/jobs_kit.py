"""What the tests of jobs share: node classes, graphs, a service whose engine is up, and a scripted engine."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import attrs
import trio

from comfyd.config import JobsConfig, MediaConfig
from comfyd.engine import (
    Completed,
    Engine,
    EngineEvent,
    EngineState,
    Execution,
    ExecutionTimes,
    MediaInput,
    MediaKind,
    NodeClasses,
    Submission,
)
from comfyd.engine.client import EngineClient
from comfyd.errors import EngineError, EngineLost
from comfyd.jobs import Job, JobService, JobState, Request, ServiceConfig
from comfyd.jobs.ledger import Recorded
from comfyd.journal import JobFilter, JournalUnavailable
from comfyd.media.collect import OutputFile

CLASSES = NodeClasses(
    names=frozenset({"EmptyImage", "LoadImage", "SaveImage", "PreviewImage", "PrimitiveString", "StringConcatenate"}),
    saving=frozenset({"SaveImage"}),
    media={"LoadImage": {"image": MediaInput(kind=MediaKind.IMAGE, listed=frozenset({"listed.png"}))}},
)
TIMES = ExecutionTimes(start_ms=1000.0, end_ms=1250.5, nodes={})
NO_OUTPUTS: Mapping[str, Mapping[str, Any]] = {}


def graph(prefix: Any = "pic", **more: Any) -> dict[str, Any]:
    """A graph of two nodes that saves one picture, and *more* nodes."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
        **more,
    }


def request(prompt: Mapping[str, Any] | None = None, **fields: Any) -> Request:
    """A request for *prompt*, by default :func:`graph`."""
    return Request(prompt=dict(graph() if prompt is None else prompt), **fields)


def make_job(job_id: str = "job", *, priority: int = 0, sequence: int = 1, **fields: Any) -> Job:
    """A job that no service knows."""
    return Job(id=job_id, request=request(priority=priority), digest=b"", sequence=sequence, **fields)


def warm_engine() -> Engine:
    """An engine that is up and warm. Nobody asks its client anything in these tests."""
    engine = Engine(name="engine-1")
    engine.went_up(cast("EngineClient", object()), CLASSES)
    engine.mark_warm()
    return engine


@attrs.define(eq=False)
class NotedLedger:
    """A ledger that forgets nothing and takes everything at once; with *hold* it says that it did when told to.

    *notes* are what it was told, ``(what, job id)``.
    """

    durable: bool = True
    hold: bool = False
    refusal: JournalUnavailable | None = None
    notes: list[tuple[str, str]] = attrs.field(factory=list)
    held: list[Callable[[], None]] = attrs.field(factory=list)
    ended_jobs: dict[str, Job] = attrs.field(factory=dict)

    def accept(self, job: Job, body: bytes, done: Recorded) -> None:
        self._note("accepted", job, lambda: done(self.refusal))

    def started(self, job: Job) -> None:
        self.notes.append(("started", job.id))

    def waiting(self, job: Job) -> None:
        self.notes.append(("waiting", job.id))

    def made(self, job: Job, execution: Completed, outputs: tuple[OutputFile, ...]) -> None:
        self.notes.append(("made", job.id))

    def ended(self, job: Job, state: JobState, done: Callable[[], None]) -> None:
        self._note(state.value, job, done)

    def release(self) -> None:
        """Say of everything that was held that it is on disk."""
        held, self.held = self.held, []
        for done in held:
            done()

    def _note(self, what: str, job: Job, done: Callable[[], None]) -> None:
        self.notes.append((what, job.id))
        if self.hold:
            self.held.append(done)
        else:
            done()

    async def find(self, job_id: str) -> Job | None:
        await trio.lowlevel.checkpoint()
        return self.ended_jobs.get(job_id)

    async def page(self, wanted: JobFilter) -> list[Job]:
        await trio.lowlevel.checkpoint()
        return list(self.ended_jobs.values())

    async def forget(self, job: Job) -> bool:
        await trio.lowlevel.checkpoint()
        return self.ended_jobs.pop(job.id, None) is not None


def make_service(engine: Engine | None = None, **jobs: Any) -> JobService:
    """A service with one engine, which is up and warm by default. *jobs* are fields of :class:`JobsConfig`."""
    config = ServiceConfig(jobs=JobsConfig(**jobs), media=MediaConfig())
    return JobService(config=config, engines=(warm_engine() if engine is None else engine,), ledger=NotedLedger())


def submit(service: JobService, job_id: str = "job", digest: bytes = b"", **fields: Any) -> Job:
    """Submit :func:`graph` under *job_id*."""
    return service.submit(request(**fields), job_id, digest)


def saved(*filenames: str, subfolder: str = "", node_id: str = "2") -> dict[str, dict[str, Any]]:
    """What SaveImage reports."""
    images = [{"filename": name, "subfolder": subfolder, "type": "output"} for name in filenames]
    return {node_id: {"images": images}}


def completed(outputs: Mapping[str, Mapping[str, Any]] = NO_OUTPUTS) -> Completed:
    """An execution that came to its end."""
    return Completed(outputs=outputs, times=TIMES)


@attrs.define(eq=False)
class ScriptedClient:
    """The one method of an engine's client that a runner calls itself."""

    calls: list[str]

    async def free(self) -> None:
        self.calls.append("free")


Step = Callable[["ScriptedEngine", Submission, Callable[[EngineEvent], None]], Any]


@attrs.define(eq=False)
class ScriptedEngine:
    """An engine with :class:`comfyd.engine.Engine`'s interface towards runners, whose executions are written down.

    Each step of *script* is the result of one execution: an :class:`Execution`, an error to raise, or an async
    function that gets the engine, the submission and the observer.
    """

    script: deque[Execution | Exception | Step] = attrs.field(factory=deque)
    name: str = "scripted"
    up: bool = True
    warm: bool = True
    gone: str | None = None
    was_ever_warm: bool = True
    node_classes: NodeClasses | None = CLASSES
    calls: list[str] = attrs.field(factory=list)
    submissions: list[Submission] = attrs.field(factory=list)
    condemned: list[EngineError] = attrs.field(factory=list)
    _changed: trio.Event = attrs.field(factory=trio.Event)

    @property
    def state(self) -> EngineState:
        if self.up:
            return EngineState.UP
        return EngineState.DOWN if self.gone is None else EngineState.GONE

    @property
    def client(self) -> ScriptedClient:
        return ScriptedClient(self.calls)

    async def wait_up(self) -> None:
        while not self.up:
            if self.gone is not None:
                raise EngineLost(self.gone)
            await self._changed.wait()

    async def wait_changed(self) -> None:
        await self._changed.wait()

    def mark_warm(self) -> None:
        self.calls.append("mark_warm")
        self.warm = self.was_ever_warm = True

    def condemn(self, error: EngineError) -> None:
        self.condemned.append(error)
        self.set_up(up=False)

    def set_up(self, *, up: bool, warm: bool = False, gone: str | None = None) -> None:
        self.up, self.warm, self.gone = up, warm, gone
        self._changed.set()
        self._changed = trio.Event()

    async def execute(self, submission: Submission, observe: Callable[[EngineEvent], None]) -> Execution:
        self.calls.append("execute")
        self.submissions.append(submission)
        step = self.script.popleft()
        await trio.lowlevel.checkpoint()
        if isinstance(step, Exception):
            raise step
        if callable(step):
            return cast("Execution", await step(self, submission, observe))
        return step

    async def wait_idle(self) -> None:
        self.calls.append("wait_idle")
        await trio.lowlevel.checkpoint()


def scripted(*script: Execution | Exception | Step, **fields: Any) -> ScriptedEngine:
    """An engine whose executions end as *script* says."""
    return ScriptedEngine(script=deque(script), **fields)


def event(kind: str, **data: Any) -> EngineEvent:
    """An event of some prompt."""
    return EngineEvent(type=kind, data=data, prompt_id="attempt")


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait for what no event tells of: the work of threads, and what only a peer knows."""
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110  # see above
            await trio.sleep(0.002)


def write_files(folder: Path, names: Iterable[str], data: bytes = b"data") -> None:
    """Make files, with their folders."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
