"""Which webhook goes next, decided without a clock: order, bounds, and nobody forgotten."""

from collections import defaultdict
from typing import Any

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from comfyd.journal import WebhookRow
from comfyd.webhooks.schedule import Schedule, Turn


def row(number: int, job: str = "job", url: str = "a", **more: Any) -> WebhookRow:
    return WebhookRow(
        id=f"msg_{number}", sequence=number, job_id=job, job_key=job, url=url, kind="v2", created_at=0.0, **more
    )


def make(per_receiver: int = 2, at_once: int = 3, suspects: int = 1) -> Schedule:
    return Schedule(receiver_of=lambda each: each.url, per_receiver=per_receiver, at_once=at_once, suspects=suspects)


def take(schedule: Schedule) -> Turn:
    turn = schedule.take()
    assert turn is not None
    return turn


def test_receivers_take_turns_whatever_the_first_has_to_be_told() -> None:
    schedule = make(at_once=1)
    for number in range(3):
        schedule.add(row(number, job=f"a{number}", url="a"))
    schedule.add(row(9, url="b"))
    order = []
    while (turn := schedule.take()) is not None:
        order.append(turn.row.url)
        schedule.settle(turn, reached=True)
    assert order == ["a", "b", "a", "a"]


def test_a_receiver_gets_one_until_it_answers_and_one_again_when_it_falls_silent() -> None:
    schedule = make(per_receiver=2)
    for number in range(6):
        schedule.add(row(number, job=f"job-{number}"))
    first = take(schedule)
    assert schedule.take() is None
    schedule.settle(first, reached=True)
    second, third = take(schedule), take(schedule)
    assert schedule.take() is None
    schedule.put_back(second, second.row, 10.0, reached=False)
    assert schedule.take() is None, "one is on its way still"
    schedule.settle(third, reached=None)
    assert take(schedule).row.id == "msg_3"
    assert schedule.take() is None


def test_silent_receivers_have_slots_of_their_own() -> None:
    schedule = make(at_once=1, suspects=1)
    for number in range(3):
        schedule.add(row(number, job=f"a{number}", url="silent"))
    schedule.settle(take(schedule), reached=False)
    assert take(schedule).row.url == "silent"
    schedule.add(row(8, url="good"))
    assert take(schedule).row.url == "good"
    schedule.add(row(9, job="other", url="good"))
    assert schedule.take() is None, "both kinds of slots are taken"


def test_a_receiver_in_line_among_the_silent_goes_with_the_others_once_it_answers() -> None:
    schedule = make(per_receiver=2, at_once=2, suspects=1)
    for number in range(4):
        schedule.add(row(number, job=f"a{number}", url="a"))
    schedule.settle(take(schedule), reached=True)
    one, two = take(schedule), take(schedule)
    schedule.put_back(one, one.row, 5.0, reached=False)  # it is suspect, and has one on its way still
    schedule.add(row(8, url="silent"))
    schedule.settle(take(schedule), reached=False)
    schedule.add(row(9, url="silent"))
    held = take(schedule)
    schedule.settle(two, reached=True)
    assert take(schedule).row.url == "a"
    assert held.row.url == "silent"


def test_back_off_holds_its_job_back_and_no_slot() -> None:
    schedule = make(at_once=1)
    for each in (row(1, "x"), row(2, "x"), row(3, "y")):
        schedule.add(each)
    first = take(schedule)
    schedule.put_back(first, attrs.evolve(first.row, attempts=1), 7.0, reached=True)
    assert schedule.in_flight == 0
    assert schedule.next_due == 7.0
    assert take(schedule).row.id == "msg_3"
    schedule.release(6.9)
    assert schedule.due == 0
    schedule.release(7.0)
    assert schedule.due == 1


def test_a_dropped_first_lets_the_next_go_and_a_hastened_one_goes_once() -> None:
    schedule = make()
    for each in (row(1), row(2)):
        schedule.add(each)
    first = take(schedule)
    schedule.put_back(first, first.row, 7.0, reached=True)
    schedule.drop("msg_1")
    second = take(schedule)
    assert second.row.id == "msg_2"
    schedule.put_back(second, attrs.evolve(second.row, attempts=3), 9.0, reached=True)
    schedule.hasten(row(2))
    third = take(schedule)
    assert third.row.attempts == 0
    schedule.release(100.0)
    assert schedule.due == 0, "the back-offs that were left are no events"
    schedule.settle(third, reached=True)
    assert len(schedule) == 0


def test_receivers_without_events_are_forgotten_in_the_end() -> None:
    schedule = make()
    for number in range(5000):
        schedule.add(row(number, job=f"job-{number}", url=f"receiver-{number}"))
        schedule.settle(take(schedule), reached=True)
    assert len(schedule._receivers) <= 1025


class Model(RuleBasedStateMachine):
    """Random events, ends, back-offs and drops against plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = make(per_receiver=2, at_once=3, suspects=2)
        self.lanes: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.waiting: dict[str, float] = {}
        self.turns: list[Turn] = []
        self.now = 0.0
        self.number = 0

    @rule(job=st.sampled_from("xyz"), url=st.sampled_from("abcd"))
    def add(self, job: str, url: str) -> None:
        self.number += 1
        self.schedule.add(row(self.number, job, url))
        self.lanes[url, job].append(f"msg_{self.number}")

    @rule()
    def take(self) -> None:
        turn = self.schedule.take()
        if turn is None:
            return
        lane = self.lanes[turn.row.url, turn.row.job_key]
        assert lane[0] == turn.row.id, "strictly in order"
        assert turn.row.id not in self.waiting
        assert turn.row.id not in [other.row.id for other in self.turns]
        self.turns.append(turn)

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), reached=st.sampled_from([True, False, None]))
    def settle(self, data: st.DataObject, reached: bool | None) -> None:
        turn = self.turns.pop(data.draw(st.integers(0, len(self.turns) - 1)))
        self.schedule.settle(turn, reached=reached)
        self.lanes[turn.row.url, turn.row.job_key].pop(0)

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), reached=st.sampled_from([True, False, None]), wait_s=st.integers(1, 5))
    def put_back(self, data: st.DataObject, reached: bool | None, wait_s: int) -> None:
        turn = self.turns.pop(data.draw(st.integers(0, len(self.turns) - 1)))
        self.schedule.put_back(turn, turn.row, self.now + wait_s, reached=reached)
        self.waiting[turn.row.id] = self.now + wait_s

    @rule(wait_s=st.integers(1, 3))
    def release(self, wait_s: int) -> None:
        self.now += wait_s
        self.schedule.release(self.now)
        self.waiting = {each: due for each, due in self.waiting.items() if due > self.now}

    @rule(data=st.data(), hasten=st.booleans())
    def drop_or_hasten(self, data: st.DataObject, hasten: bool) -> None:
        at_rest = sorted(self.schedule.ids_at_rest())
        if not at_rest:
            return
        webhook_id = data.draw(st.sampled_from(at_rest))
        known = self.schedule.row(webhook_id)
        self.waiting.pop(webhook_id, None)
        if hasten:
            self.schedule.hasten(known)
        else:
            self.schedule.drop(webhook_id)
            self.lanes[known.url, known.job_key].remove(webhook_id)

    @invariant()
    def everything_is_somewhere(self) -> None:
        ids = {webhook_id for lane in self.lanes.values() for webhook_id in lane}
        in_flight = {turn.row.id for turn in self.turns}
        assert len(self.schedule) == len(ids)
        assert set(self.schedule.ids_at_rest()) == ids - in_flight
        assert self.schedule.in_flight == len(in_flight) <= 5
        firsts = {lane[0] for lane in self.lanes.values() if lane}
        assert self.schedule.due == len(firsts - in_flight - set(self.waiting))
        for url in "abcd":
            assert sum(turn.row.url == url for turn in self.turns) <= 2

    def teardown(self) -> None:
        """Whatever happened, all of it goes out in the end."""
        for turn in self.turns:
            self.schedule.settle(turn, reached=False)
        self.schedule.release(self.now + 100)
        while (turn_ := self.schedule.take()) is not None:
            self.schedule.settle(turn_, reached=self.number % 2 == 0)
        assert len(self.schedule) == 0


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
