"""What is written down of jobs whose callers do not wait, so that they outlive the daemon.

The job service calls :class:`Ledger` at each step of such a job; ``jobs/journalled.py`` turns that into rows of the
journal and events of the outbox.
"""

from collections.abc import Callable
from typing import Protocol

from comfyd.engine import Completed
from comfyd.jobs.model import Job, JobState
from comfyd.journal import JobFilter, JournalUnavailable
from comfyd.media.collect import OutputFile

Recorded = Callable[[JournalUnavailable | None], None]


class Ledger(Protocol):
    """Where the job service writes down what must not be lost. Nothing here waits."""

    @property
    def durable(self) -> bool:
        """Whether what is written survives the daemon."""
        ...

    def accept(self, job: Job, body: bytes, done: Recorded) -> None:
        """Write *job* down with its request, and call *done* when it is on disk, or why it is not."""
        ...

    def started(self, job: Job) -> None:
        """*job* is handed to an engine."""
        ...

    def waiting(self, job: Job) -> None:
        """*job* went back to the queue."""
        ...

    def made(self, job: Job, execution: Completed, outputs: tuple[OutputFile, ...]) -> None:
        """The outputs of *job* are there, and are to be delivered."""
        ...

    def ended(self, job: Job, state: JobState, done: Callable[[], None]) -> None:
        """*job* has its outcome (``job.decided``); call *done* when it may be told."""
        ...

    async def find(self, job_id: str) -> Job | None:
        """The ended job that is remembered under *job_id*."""
        ...

    async def page(self, wanted: JobFilter) -> list[Job]:
        """Ended jobs, newest first."""
        ...

    async def forget(self, job: Job) -> bool:
        """Forget an ended job and what is kept of it; False if somebody still has to be told."""
        ...
