"""Which jobs have run out of time: one sleeping task for all of them."""

import heapq
from collections.abc import Callable
from typing import NoReturn

import attrs
import trio

from comfyd.jobs.model import Job


@attrs.define(eq=False)
class Deadlines:
    """Jobs by deadline. A job that ends earlier stays in the heap until its time, then is passed over."""

    _heap: list[tuple[float, int, Job]] = attrs.field(factory=list)
    _sooner: trio.Event = attrs.field(factory=trio.Event)

    def add(self, job: Job) -> None:
        """Watch *job*, if it has a deadline."""
        if job.deadline == float("inf"):
            return
        heapq.heappush(self._heap, (job.deadline, job.sequence, job))
        if self._heap[0][2] is job:
            self._sooner.set()

    async def serve(self, expired: Callable[[Job], None]) -> NoReturn:
        """Call *expired* for each job at its deadline, if it has no outcome by then. Runs until cancelled."""
        while True:
            self._sooner = trio.Event()
            with trio.move_on_at(self._heap[0][0] if self._heap else float("inf")):
                await self._sooner.wait()
            now = trio.current_time()
            while self._heap and (self._heap[0][0] <= now or self._heap[0][2].outcome is not None):
                job = heapq.heappop(self._heap)[2]
                if job.outcome is None:
                    expired(job)
