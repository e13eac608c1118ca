"""What waits for a receiver: truthful order whatever coalesces, and bounds."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.webhooks.event_queue import EventQueue, QueuedEvent


def state(name: str, section: str | None = "job") -> QueuedEvent:
    return QueuedEvent(body=name.encode(), section=section)


def progress(name: str, node: str = "1", section: str | None = "job") -> QueuedEvent:
    return QueuedEvent(body=name.encode(), section=section, outdates=("progress", node))


def status(name: str) -> QueuedEvent:
    return QueuedEvent(body=name.encode(), section=None, outdates="status")


def fill(queue: EventQueue, *events: QueuedEvent) -> int:
    return sum(queue.append(event) for event in events)


def drain(queue: EventQueue) -> list[str]:
    return [queue.pop_first().body.decode() for _ in range(len(queue))]


def test_newer_progress_takes_the_place_at_the_end_and_the_older_one_goes() -> None:
    queue = EventQueue()
    assert fill(queue, state("a"), progress("p1"), progress("q1", "2"), progress("p2"), state("b", "other")) == 0
    assert drain(queue) == ["a", "q1", "p2", "b"]


def test_progress_before_a_state_change_of_its_job_stays() -> None:
    queue = EventQueue()
    fill(queue, progress("p1"), state("executing 2"), progress("p2"), progress("p3"))
    assert drain(queue) == ["p1", "executing 2", "p3"]


def test_a_state_change_of_another_job_keeps_nothing() -> None:
    queue = EventQueue()
    fill(queue, progress("p1"), state("other", "other job"), progress("p2"))
    assert drain(queue) == ["other", "p2"]


def test_of_status_events_without_a_state_change_between_the_last_stays() -> None:
    queue = EventQueue()
    fill(queue, status("s1"), progress("p"), status("s2"), state("a"), status("s3"), status("s4"))
    assert drain(queue) == ["p", "s2", "a", "s4"]


def test_what_was_taken_out_is_not_outdated_any_more() -> None:
    queue = EventQueue()
    fill(queue, progress("p1"))
    assert queue.pop_first().body == b"p1"
    fill(queue, progress("p2"), progress("p3"))
    assert drain(queue) == ["p3"]


def test_taking_progress_of_before_a_state_change_leaves_the_later_to_be_outdated() -> None:
    queue = EventQueue()
    fill(queue, progress("p1"), state("a"), progress("p2"))
    assert queue.pop_first().body == b"p1"
    fill(queue, progress("p3"))
    assert drain(queue) == ["a", "p3"]


def test_an_empty_queue_gives_nothing() -> None:
    with pytest.raises(IndexError):
        EventQueue().pop_first()


def test_at_the_bound_the_oldest_progress_goes_first_then_the_oldest_of_all() -> None:
    queue = EventQueue(max_events=4)
    events = [state("a"), progress("p", "1"), progress("q", "2"), state("b"), state("c"), state("d"), state("e")]
    dropped = [queue.append(event) for event in events]
    assert dropped == [0, 0, 0, 0, 1, 1, 1]
    assert drain(queue) == ["b", "c", "d", "e"]


def test_new_progress_is_what_goes_when_only_state_changes_wait() -> None:
    queue = EventQueue(max_events=2)
    assert fill(queue, state("a"), state("b"), progress("p")) == 1
    assert drain(queue) == ["a", "b"]


def test_bytes_are_bounded_like_events() -> None:
    queue = EventQueue(max_bytes=100)
    assert fill(queue, state("a" * 50), progress("p" * 20), state("b" * 30)) == 0
    assert queue.size_bytes == 100
    assert fill(queue, state("c" * 10)) == 1
    assert fill(queue, state("d" * 40)) == 1
    assert [text[0] for text in drain(queue)] == ["b", "c", "d"]
    assert queue.size_bytes == 0


def test_one_event_over_the_bound_goes_alone() -> None:
    queue = EventQueue(max_bytes=100)
    assert fill(queue, state("a"), state("b" * 101), progress("p" * 101), state("c")) == 2
    assert drain(queue) == ["a", "c"]


EVENTS = st.tuples(
    st.sampled_from(["progress", "progress_state", "status", "state"]),
    st.sampled_from(["one", "two"]),
    st.sampled_from(["1", "2"]),
)
STEPS = st.lists(st.one_of(EVENTS, st.none()), max_size=60)  # None: the sender takes one


def numbered(step: tuple[str, str, str], number: int) -> QueuedEvent:
    kind, job, node = step
    section = None if kind == "status" else job
    outdates = {"progress": ("progress", node), "progress_state": "progress_state", "status": "status", "state": None}
    return QueuedEvent(body=str(number).encode(), section=section, outdates=outdates[kind])


def known(events: list[QueuedEvent], at: QueuedEvent) -> dict[object, bytes]:
    """What a receiver of *events* knows of the progress of *at*'s job, and of the status, when *at* arrives."""
    before = events[: events.index(at)]
    return {
        (event.section, event.outdates): event.body
        for event in before
        if event.outdates is not None and event.section in (at.section, None)
    }


@given(STEPS)
def test_what_is_sent_is_a_truthful_part_of_what_happened(steps: list[tuple[str, str, str] | None]) -> None:
    queue = EventQueue()
    published: list[QueuedEvent] = []
    sent: list[QueuedEvent] = []
    for number, step in enumerate(steps):
        if step is not None:
            published.append(numbered(step, number))
            assert queue.append(published[-1]) == 0
        elif len(queue):
            sent.append(queue.pop_first())
    sent += [queue.pop_first() for _ in range(len(queue))]
    numbers = [int(event.body) for event in sent]
    assert all(one < other for one, other in pairwise(numbers)), "the order of what happened"
    changes = [event for event in published if event.outdates is None]
    assert [event for event in sent if event.outdates is None] == changes, "no state change is left out"
    for change in changes:
        assert known(sent, change) == known(published, change), "at each state change the same is known"
    end = QueuedEvent(body=b"end", section="one")
    assert known([*sent, end], end) == known([*published, end], end), "and at the end"


@given(STEPS, st.integers(1, 8), st.integers(4, 20))
def test_bounds_hold_and_nothing_is_remembered_of_what_left(
    steps: list[tuple[str, str, str] | None], max_events: int, max_bytes: int
) -> None:
    queue = EventQueue(max_events=max_events, max_bytes=max_bytes)
    sent: list[int] = []
    for number, step in enumerate(steps):
        if step is not None:
            queue.append(numbered(step, number))
        elif len(queue):
            sent.append(int(queue.pop_first().body))
        assert len(queue) <= max_events
        assert queue.size_bytes <= max_bytes
    sent += [int(text) for text in drain(queue)]
    assert sent == sorted(set(sent))
    assert queue.size_bytes == 0
    assert not queue._newest
    assert not queue._progress
