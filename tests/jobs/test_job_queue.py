"""The queue against a sorted list, and who is woken by it."""

from typing import Any

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule
from jobs_kit import make_job

from comfyd.jobs import Job
from comfyd.jobs.queue import JobQueue


def get_nowait(queue: JobQueue) -> Job | None:
    """Run one ``get`` in a loop of its own; None if it would wait."""
    got: list[Job] = []

    async def get() -> None:
        with trio.move_on_after(0):
            got.append(await queue.get())

    trio.run(get)
    return got[0] if got else None


class QueueMachine(RuleBasedStateMachine):
    """The queue does what a list sorted by priority and arrival does."""

    jobs: Bundle[Job] = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.queue = JobQueue()
        self.model: list[Job] = []
        self.arrived = 0

    @rule(target=jobs, priority=st.integers(-2, 2))
    def arrive(self, priority: int) -> Job:
        self.arrived += 1
        job = make_job(f"job{self.arrived}", priority=priority, sequence=self.arrived)
        self._put(job)
        return job

    @rule(job=jobs)
    def put_again(self, job: Job) -> None:
        """A job whose engine was lost comes back; also one that was removed meanwhile."""
        if job not in self.model:
            self._put(job)

    @rule(job=jobs)
    def remove(self, job: Job) -> None:
        assert self.queue.remove(job) is (job in self.model)
        if job in self.model:
            self.model.remove(job)

    @precondition(lambda self: self.model)
    @rule()
    def get(self) -> None:
        assert get_nowait(self.queue) is self.model.pop(0)

    @precondition(lambda self: not self.model)
    @rule()
    def get_from_an_empty_one_waits(self) -> None:
        assert get_nowait(self.queue) is None

    @rule(job=jobs)
    def position_of_any(self, job: Job) -> None:
        assert self.queue.position(job) == (self.model.index(job) if job in self.model else None)

    @invariant()
    def length_and_positions(self) -> None:
        assert len(self.queue) == len(self.model)
        assert [self.queue.position(job) for job in self.model] == list(range(len(self.model)))

    def _put(self, job: Job) -> None:
        self.queue.put_nowait(job)
        self.model.append(job)
        self.model.sort(key=lambda one: (-one.request.priority, one.sequence))


TestQueue: Any = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


async def test_a_waiting_getter_is_woken_by_a_put(autojump_clock: trio.testing.MockClock) -> None:
    queue, got = JobQueue(), []

    async def take() -> None:
        got.append(await queue.get())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await trio.testing.wait_all_tasks_blocked()
        assert got == []
        job = make_job()
        queue.put_nowait(job)
        with trio.fail_after(1):
            await trio.testing.wait_all_tasks_blocked()
    assert got == [job]


async def test_two_getters_get_one_job_each(autojump_clock: trio.testing.MockClock) -> None:
    queue, got = JobQueue(), []

    async def take() -> None:
        got.append(await queue.get())

    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            nursery.start_soon(take)
            await trio.testing.wait_all_tasks_blocked()
            jobs = [make_job(sequence=1), make_job(sequence=2)]
            for job in jobs:
                queue.put_nowait(job)
    assert sorted(got, key=lambda job: job.sequence) == jobs
    assert len(queue) == 0


async def test_a_getter_that_is_cancelled_loses_no_job(autojump_clock: trio.testing.MockClock) -> None:
    queue, job, got = JobQueue(), make_job(), []

    async def take(scope: trio.CancelScope) -> None:
        with scope:
            got.append(await queue.get())

    first = trio.CancelScope()
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(take, trio.CancelScope())
            await trio.testing.wait_all_tasks_blocked()
            queue.put_nowait(job)  # wakes the first, which is cancelled before it runs
            first.cancel()
            await trio.testing.wait_all_tasks_blocked()
            if not got:
                assert queue.position(job) == 0, "neither given out nor waiting"
                queue.put_nowait(make_job(sequence=2))
            elif len(got) == 1:
                queue.put_nowait(make_job(sequence=2))
    assert got[0] is job


async def test_removed_jobs_do_not_pile_up() -> None:
    queue = JobQueue()
    stays = make_job("stays", priority=-1, sequence=0)
    queue.put_nowait(stays)
    for sequence in range(1, 5000):
        job = make_job(sequence=sequence)
        queue.put_nowait(job)
        assert queue.remove(job)
    assert len(queue._heap) < 100
    assert len(queue) == 1
    assert await queue.get() is stays


async def test_a_job_that_is_put_again_returns_to_its_place_among_later_ones() -> None:
    queue = JobQueue()
    first, second = make_job(sequence=1), make_job(sequence=2)
    queue.put_nowait(first)
    assert await queue.get() is first
    queue.put_nowait(second)
    queue.put_nowait(first)
    assert [queue.position(first), queue.position(second)] == [0, 1]
    assert [await queue.get(), await queue.get()] == [first, second]


async def test_higher_priority_runs_first_and_equal_ones_by_arrival() -> None:
    queue = JobQueue()
    jobs = [make_job(sequence=n, priority=p) for n, p in enumerate([0, 5, -5, 5, 0])]
    for job in jobs:
        queue.put_nowait(job)
    assert [(await queue.get()).sequence for _ in jobs] == [1, 3, 0, 4, 2]
