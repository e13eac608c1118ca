"""What a job is: the request, where it is on its way, and how it ended.

accepted -> preparing -> queued -> running -> delivering -> succeeded. Preparing is passed over where there is nothing
to prepare; a job whose engine was lost, or whose reported file is gone, goes back to queued; failed and cancelled can
be reached from anywhere before an end.
"""

import time
import uuid
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from comfyd.engine import ExecutionTimes
from comfyd.errors import Failure, RequestRefused
from comfyd.jobs.progress import Progress
from comfyd.jobs.request import Request
from comfyd.media.collect import OutputFile
from comfyd.wire import decode_json, encode_json


class JobState(Enum):
    """Where a job is on its way."""

    ACCEPTED = "accepted"
    PREPARING = "preparing"
    QUEUED = "queued"
    RUNNING = "running"
    DELIVERING = "delivering"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing comes after it."""
        return self in _FINAL


_FINAL: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
_ENDS: Final = {JobState.FAILED, JobState.CANCELLED}
_NEXT: Final[Mapping[JobState, frozenset[JobState]]] = {
    JobState.ACCEPTED: frozenset({JobState.PREPARING, JobState.QUEUED} | _ENDS),
    JobState.PREPARING: frozenset({JobState.QUEUED} | _ENDS),
    JobState.QUEUED: frozenset({JobState.RUNNING} | _ENDS),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.DELIVERING} | _ENDS),
    JobState.DELIVERING: frozenset({JobState.QUEUED, JobState.SUCCEEDED} | _ENDS),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


@attrs.frozen(kw_only=True)
class Stats:
    """What took how long, in milliseconds."""

    preprocess_time: float
    queue_time: float
    comfy_round_trip_time: float
    postprocess_time: float
    upload_time: float
    total_time: float
    attempts: int
    times: ExecutionTimes

    def as_dict(self) -> dict[str, Any]:
        """The ``stats`` member of an answer."""
        return {
            "comfy_execution": {
                "start": self.times.start_ms,
                "end": self.times.end_ms,
                "duration": round(self.times.end_ms - self.times.start_ms, 3),
                "nodes": {
                    node: {"start": t.start_ms, "duration": t.duration_ms} for node, t in self.times.nodes.items()
                },
            },
            "preprocess_time": self.preprocess_time,
            "comfy_round_trip_time": self.comfy_round_trip_time,
            "postprocess_time": self.postprocess_time,
            "upload_time": self.upload_time,
            "queue_time": self.queue_time,
            "total_time": self.total_time,
            "attempts": self.attempts,
        }


@attrs.frozen(kw_only=True)
class Success:
    """The graph ran and its files are there. *graph* is the graph as it was queued."""

    graph: Mapping[str, Any]
    outputs: tuple[OutputFile, ...]
    stats: Stats


Outcome = Success | Failure


@attrs.define
class Clock:
    """When a job passed its marks, by :func:`time.perf_counter`; stages of a second attempt add up."""

    accepted: float = attrs.field(factory=time.perf_counter)
    prepare_s: float = 0.0
    queue_s: float = 0.0
    engine_s: float = 0.0
    collect_s: float = 0.0
    upload_s: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """The stages so far, in seconds, with the time since acceptance: what outlives this process."""
        stages = attrs.asdict(self)
        return {**stages, "accepted": time.perf_counter() - self.accepted}

    @classmethod
    def resumed(cls, stages: Mapping[str, float]) -> "Clock":
        """The clock that :meth:`as_dict` wrote, going on from there."""
        return cls(**{**stages, "accepted": time.perf_counter() - stages["accepted"]})

    def stats(self, *, attempts: int, times: ExecutionTimes) -> Stats:
        """What the stages took so far."""
        return Stats(
            preprocess_time=_ms(self.prepare_s),
            queue_time=_ms(self.queue_s),
            comfy_round_trip_time=_ms(self.engine_s),
            postprocess_time=_ms(self.collect_s),
            upload_time=_ms(self.upload_s),
            total_time=_ms(time.perf_counter() - self.accepted),
            attempts=attempts,
            times=times,
        )


@attrs.frozen(kw_only=True)
class StateChange:
    """That a job came into *state*, at *at* (unix seconds), as its change number *revision*."""

    revision: int
    state: JobState
    at: float


@attrs.define(eq=False)
class Job:
    """A prompt on its way through comfyd. Only :class:`comfyd.jobs.service.JobService` changes it."""

    id: str
    request: Request
    digest: bytes
    """Tells whether another request under the same id is the same request; empty if the caller gave no id."""
    sequence: int
    """Order of arrival."""
    deadline: float = float("inf")
    """Trio time at which the job has failed by time-out."""
    internal: bool = False
    """The daemon's own (warm-up): not counted, not idempotent."""
    key: str = attrs.field(factory=lambda: uuid.uuid4().hex)
    """Names the job's folder: unlike the id it is never used twice."""
    state: JobState = JobState.ACCEPTED
    attempts: int = 0
    """How often it was handed to an engine."""
    crashes: int = 0
    """How many engines were lost under it."""
    stale_runs: int = 0
    """Runs in which a cached node reported a file that is gone."""
    _graph: dict[str, dict[str, Any]] | bytes = attrs.field(factory=dict, alias="graph")
    prefixes: tuple[str, ...] = ()
    """The rewritten prefixes: every file that the graph saves begins with one of them, or is reported by its node."""
    reported: list[Mapping[str, Any]] = attrs.field(factory=list)
    """What nodes have reported, over all attempts: the files in it are removed at the end."""
    folder: Path | None = None
    """The job's own folder, with the inputs that it brought and its converted outputs. Removed at the end."""
    shown: dict[tuple[str, str], str] = attrs.field(factory=dict)
    """Values of inputs, by node id and name, as callers see them where the engine gets a path of this server."""
    waiters: int = 0
    """Callers that wait for the outcome or are being sent it."""
    cleaned: bool = False
    """Whether it was handed to the cleaning task."""
    queued_at: float = 0.0
    outcome: Outcome | None = None
    clock: Clock = attrs.field(factory=Clock)
    progress: Progress = attrs.field(factory=Progress)
    changed: trio.Event = attrs.field(factory=trio.Event)
    told: trio.Event = attrs.field(factory=trio.Event)
    """Set when it has its outcome: callers wait for that one, and are not woken by each change before."""
    scope: trio.CancelScope | None = None
    """What is to be cancelled if the job is, while somebody works on it."""
    workflow: str = ""
    """The name of the workflow that made the graph; empty for a prompt."""
    accepted_at: float = attrs.field(factory=time.time)
    """Unix seconds, as the two below."""
    started_at: float | None = None
    """When it was first handed to an engine."""
    ended_at: float | None = None
    daemon_deaths: int = 0
    """How many daemons were killed while it ran."""
    journalled: bool = False
    """Whether the journal has it: it survives the daemon."""
    refusal: Failure | None = None
    """Why the journal did not take it; the job is then forgotten."""
    decided: Outcome | None = None
    """The outcome from the moment on at which there is no other; :attr:`outcome` once it is also on disk, if it has to
    be: told before, a daemon that dies between the two could tell another one after its restart."""
    end_state: JobState | None = None
    """The state that it ends in, if its end was decided while it was on its way into the journal."""
    run_since: float = 0.0
    """Trio time at which its present attempt began."""
    shelved: bool = False
    """Whether it was put aside for the next start of the daemon."""
    made: bool = False
    """Whether its outputs are there and only have to be delivered."""
    kept_bytes: int = 0
    """Size of the outputs that are kept for whoever asks later."""
    revision: int = 1
    """Counts its changes, for watchers that resume."""
    states: list[StateChange] = attrs.field(init=False)
    """Every state so far, a handful."""

    def __attrs_post_init__(self) -> None:
        """Note the first state."""
        self.states = [StateChange(revision=self.revision, state=self.state, at=self.accepted_at)]

    @property
    def graph(self) -> dict[str, dict[str, Any]]:
        """As it goes to the engine: inputs resolved, prefixes rewritten."""
        graph = self._graph
        if isinstance(graph, bytes):
            graph = self._graph = decode_json(graph)
        return graph

    @graph.setter
    def graph(self, graph: dict[str, dict[str, Any]]) -> None:
        self._graph = graph

    def pack(self) -> None:
        """Hold the graph as JSON until it is asked for, at a fifth of its size: for jobs that wait behind many."""
        if not isinstance(self._graph, bytes):
            self._graph = encode_json(self._graph)

    @property
    def over(self) -> bool:
        """Whether nobody is to work on it any more."""
        return self.decided is not None or self.shelved

    @property
    def shown_graph(self) -> Mapping[str, Any]:
        """The graph as it was queued, without paths of this server."""
        graph: dict[str, Any] = dict(self.graph)
        for (node_id, name), value in self.shown.items():
            graph[node_id] = {**graph[node_id], "inputs": {**graph[node_id]["inputs"], name: value}}
        return graph

    def move(self, state: JobState) -> None:
        """Go on to *state*. Illegal moves are bugs and raise."""
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"a job cannot go from {self.state.value} to {state.value}")
        self.state = state
        now = time.time()
        if state is JobState.RUNNING and self.started_at is None:
            self.started_at = now
        elif state.final:
            self.ended_at = now if self.ended_at is None else self.ended_at
            self.told.set()
        self.states.append(StateChange(revision=self.revision + 1, state=state, at=now))
        self.touch()

    def touch(self) -> None:
        """Make whoever watches the job look again."""
        self.revision += 1
        self.changed.set()
        self.changed = trio.Event()

    async def wait_accepted(self) -> None:
        """Wait until the job is a promise: it is in the journal, or need not be.

        Raises:
            RequestRefused: the journal could not take it.
        """
        while self.request.detached and not self.journalled:
            if self.refusal is not None:
                raise RequestRefused(self.refusal)
            await self.changed.wait()

    async def wait_final(self) -> Outcome:
        """Wait for the outcome."""
        while self.outcome is None:
            await self.told.wait()
        return self.outcome


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
