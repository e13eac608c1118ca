"""Writes the inputs that jobs bring to disk, outside of any engine's turn; and removes what jobs leave."""

import time
from pathlib import Path
from typing import Final, NoReturn

import attrs
import structlog
import trio

from comfyd.errors import Failure, FailureKind
from comfyd.host.logging import bind_job
from comfyd.jobs.model import Job, JobState, Success
from comfyd.jobs.service import JobService
from comfyd.media.collect import records
from comfyd.media.files import InputStore, remove_folder, remove_outputs
from comfyd.media.inputs import Candidate, InvalidInputs
from comfyd.media.kept import KeptOutputs
from comfyd.media.resolve import Resolver

log = structlog.get_logger("comfyd.jobs")

_GATHERING_S: Final = 0.03
"""How long files may outlive their job, so that a busy daemon does not wake a thread for each."""
_CLEANING_AT_ONCE: Final = 256
"""Jobs whose files are removed in one turn of the cleaning thread."""


@attrs.define(eq=False)
class Preparer:
    """The preparing and the cleaning task's work, behind one limiter each."""

    service: JobService
    store: InputStore
    resolver: Resolver
    kept: KeptOutputs
    output_dir: Path
    _cleaning: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1))

    async def serve_preparing(self) -> NoReturn:
        """Prepare accepted jobs, several at once, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                while self.service.to_prepare:
                    # Not by way of a variable: that would keep the last job's inputs, 100 MB of text, until the next.
                    nursery.start_soon(self._prepare_and_enqueue, *self.service.to_prepare.popleft())
                await self.service.preparing.park()

    async def _prepare_and_enqueue(self, job: Job, found: tuple[Candidate, ...]) -> None:
        if job.over:  # cancelled, and cleaned up, before its turn came
            return
        with bind_job(job.id, job.attempts):
            await self.prepare(job, found)
            if not job.over:
                self.service.enqueue(job)

    async def prepare(self, job: Job, found: tuple[Candidate, ...]) -> None:
        """Give each of the *found* inputs of *job* the value by which ComfyUI finds it, or end the job.

        Downloads stop when the job is cancelled. A thread cannot be: the job is cleaned up when its thread is done.
        """
        began = time.perf_counter()
        job.folder = self.store.folder(job.key)
        with trio.CancelScope() as job.scope:
            try:
                resolved = await self.resolver.resolve(found, job.key)
                for (node_id, name), value in resolved.values.items():
                    job.graph[node_id]["inputs"][name] = value
                job.shown = resolved.shown
            except InvalidInputs as exc:
                if not job.over:
                    self.service.finish(job, exc.failure, JobState.FAILED)
            except OSError as exc:  # the disk is full, or gone: this job's end, and not the daemon's
                log.error("job.inputs_not_written", reason=str(exc))  # noqa: TRY400  # a full story in one line
                if not job.over:
                    detail = f"the inputs could not be written to disk: {exc.strerror}"
                    self.service.finish(job, Failure(kind=FailureKind.INTERNAL, detail=detail), JobState.FAILED)
        job.scope = None
        job.clock.prepare_s += time.perf_counter() - began
        if job.over:
            self.service.clean_if_done(job)

    async def serve_cleaning(self) -> NoReturn:
        """Remove the files of jobs that have ended and been delivered, until cancelled."""
        while True:
            if not self.service.to_clean:
                await self.service.cleaning.park()
            await trio.sleep(_GATHERING_S)  # what ends meanwhile goes in the same turn of the thread
            await self.clean()

    async def clean(self) -> None:
        """Remove the files of the jobs that wait for it."""
        waiting = self.service.to_clean
        while waiting:
            some = [waiting.popleft() for _ in range(min(len(waiting), _CLEANING_AT_ONCE))]
            shared = {job.key: self.service.prefixes_of_others(job) for job in some if _may_have_left_more(job)}
            await trio.to_thread.run_sync(self._remove, some, shared, limiter=self._cleaning)
            self.service.cleaned(some)

    def _remove(self, jobs: list[Job], shared: dict[str, frozenset[str]]) -> None:
        for job in jobs:
            if job.folder is not None:
                remove_folder(job.folder)
            if job.request.keeps_outputs:
                # Decided, and perhaps still on its way to the disk: what it tells of must be there.
                outputs = job.decided.outputs if isinstance(job.decided, Success) else ()
                self.kept.only(job.key, {output.path for output in outputs})
            try:
                made = {
                    record.path
                    for reported in job.reported
                    for record in records(job.graph, reported, self.output_dir)
                    if record.path is not None
                }
                prefixes = [p for p in job.prefixes if p not in shared[job.key]] if job.key in shared else []
                remove_outputs(self.output_dir, made, prefixes, job_id=job.id)
            except OSError as exc:
                log.error("job.files_left", job_id=job.id, reason=str(exc))  # noqa: TRY400  # a full story in one line


def _may_have_left_more(job: Job) -> bool:
    """Whether *job* may have written files that no node reported: it ran, and did not simply succeed."""
    return job.attempts > 0 and not (isinstance(job.decided, Success) and job.attempts == 1)
