"""The queue of jobs that wait for an engine: bounded by its owner, highest priority first, then order of arrival."""

import heapq

import attrs
import trio

from comfyd.jobs.model import Job


@attrs.define(eq=False)
class JobQueue:
    """A heap of jobs. Getting waits; everything else happens at once.

    The bound is the service's: it counts accepted jobs, of which those being prepared are not here yet.
    """

    _heap: list[tuple[int, int, int, Job]] = attrs.field(factory=list)
    """By priority, arrival and ticket. An entry counts as long as its job waits with that very ticket."""
    _waiting: dict[int, int] = attrs.field(factory=dict)
    """The ticket of each waiting job, by sequence. A new one for each put: a job may come back before the entry of its
    last time has been dropped."""
    _tickets: int = 0
    _lot: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    def __len__(self) -> int:
        return len(self._waiting)

    def put_nowait(self, job: Job) -> None:
        """Add *job*. One that was here before comes back to its old place, as its sequence number has not changed."""
        self._tickets += 1
        heapq.heappush(self._heap, (-job.request.priority, job.sequence, self._tickets, job))
        self._waiting[job.sequence] = self._tickets
        self._lot.unpark()

    def remove(self, job: Job) -> bool:
        """Take *job* off without running it; False if it is not here. Its heap entry is dropped when its turn comes."""
        if self._waiting.pop(job.sequence, None) is None:
            return False
        if len(self._heap) > 2 * len(self._waiting) + 64:  # mostly removed jobs: do not keep them in memory
            self._heap = [entry for entry in self._heap if self._waiting.get(entry[1]) == entry[2]]
            heapq.heapify(self._heap)
        return True

    async def get(self) -> Job:
        """Take the next job off, waiting for one if there is none."""
        while True:
            while self._heap:
                _, sequence, ticket, job = heapq.heappop(self._heap)
                if self._waiting.get(sequence) == ticket:
                    del self._waiting[sequence]
                    return job
            await self._lot.park()

    def position(self, job: Job) -> int | None:
        """How many waiting jobs run before *job*; None if it does not wait here."""
        if job.sequence not in self._waiting:
            return None
        place = (-job.request.priority, job.sequence)
        return sum(1 for entry in self._heap if entry[:2] < place and self._waiting.get(entry[1]) == entry[2])
