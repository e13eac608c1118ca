"""One prompt's events, in each of the orders that ComfyUI sends them in, and its history in each of its shapes."""

from collections.abc import Callable
from typing import Any

import pytest
from engine_kit import ERROR, OUTPUTS, SUCCESS, event, whole_run

from comfyd.engine.attempt import Attempt, Completed, Interrupted, Raised
from comfyd.engine.messages import EngineEvent


def new_attempt(observe: Callable[[EngineEvent], None] = lambda _: None) -> Attempt:
    return Attempt(prompt_id="p", observe=observe)


def heard(*events: EngineEvent) -> Attempt:
    attempt = new_attempt()
    for one in events:
        attempt.hear(one)
    return attempt


def test_a_prompt_that_succeeds_ends_with_its_outputs_and_the_times_of_its_nodes() -> None:
    attempt = heard(*whole_run())
    assert attempt.ended
    assert not attempt.in_doubt
    execution = attempt.execution
    assert isinstance(execution, Completed)
    assert execution.outputs == OUTPUTS
    assert set(execution.times.nodes) == {"3", "9"}
    for node in execution.times.nodes.values():
        assert node.duration_ms is not None
        assert node.duration_ms >= 0
        assert execution.times.start_ms <= node.start_ms <= execution.times.end_ms


def test_success_alone_is_not_the_end_as_history_is_not_stored_yet() -> None:
    attempt = heard(*whole_run()[:-1])
    assert not attempt.ended
    assert not attempt.in_doubt
    attempt.hear(event("executing", node=None))
    assert attempt.ended


def test_cached_output_nodes_report_without_having_been_executed() -> None:
    attempt = heard(
        event("execution_start"),
        event("execution_cached", nodes=["3", "9"]),
        event("executed", node="9", output=OUTPUTS["9"]),
        event("execution_success"),
        event("executing", node=None),
    )
    assert isinstance(attempt.execution, Completed)
    assert attempt.execution.outputs == OUTPUTS
    assert attempt.execution.times.nodes == {}


def test_a_node_that_raises_ends_the_prompt_with_what_was_reported_before() -> None:
    attempt = heard(
        event("execution_start"),
        event("executed", node="9", output=OUTPUTS["9"]),
        event("executing", node="3"),
        event("execution_error", **ERROR),
    )
    before = attempt.ended
    attempt.hear(event("executing", node=None))
    assert (before, attempt.ended) == (False, True)
    assert attempt.execution == Raised(
        node_id="3",
        node_type="KSampler",
        exception_type="RuntimeError",
        exception_message="out of luck",
        outputs=OUTPUTS,
    )


def test_an_error_without_its_facts_is_an_error_all_the_same() -> None:
    attempt = heard(event("execution_error"), event("executing", node=None))
    assert attempt.execution == Raised(node_id="", node_type="", exception_type="", exception_message="", outputs={})


def test_an_interrupted_prompt_is_told_apart_from_a_failed_one() -> None:
    attempt = heard(
        event("execution_start"), event("execution_interrupted", node_id="3"), event("executing", node=None)
    )
    assert attempt.execution == Interrupted(outputs={})


def test_an_end_whose_verdict_was_missed_is_in_doubt_and_no_success() -> None:
    attempt = heard(event("execution_start"), event("executing", node="3"))
    changed = attempt.changed
    attempt.hear(event("executing", node=None))
    assert attempt.in_doubt
    assert not attempt.ended
    assert changed.is_set()
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = attempt.execution


def test_a_verdict_that_comes_after_the_doubt_is_taken() -> None:
    attempt = heard(event("execution_start"))
    attempt.doubt()
    for one in whole_run()[1:]:
        attempt.hear(one)
    assert attempt.ended
    assert not attempt.in_doubt


def test_every_event_is_observed_once_in_order_also_those_that_change_nothing() -> None:
    seen: list[EngineEvent] = []
    attempt = new_attempt(seen.append)
    events = [*whole_run(), event("something_new", x=1)]
    for one in events:
        attempt.hear(one)
    assert seen == events


@pytest.mark.parametrize("data", [{}, {"node": 5}, {"node": "9", "output": None}, {"node": "9", "output": ["a.png"]}])
def test_odd_reports_are_passed_over(data: dict[str, Any]) -> None:
    attempt = heard(event("executed", **data))
    assert attempt.outputs == {}


def test_a_node_that_runs_twice_counts_with_its_last_run() -> None:
    attempt = heard(
        event("executing", node="3"),
        event("executing", node="4"),
        event("executing", node="3"),
        event("execution_success"),
        event("executing", node=None),
    )
    assert isinstance(attempt.execution, Completed)
    assert list(attempt.execution.times.nodes) == ["3", "4"]
    assert all(node.duration_ms is not None for node in attempt.execution.times.nodes.values())


def test_doubt_and_loss_wake_and_mean_nothing_after_the_end() -> None:
    attempt = new_attempt()
    for act in (attempt.doubt, lambda: attempt.lose("gone")):
        changed = attempt.changed
        act()
        assert changed.is_set()
    attempt.lose("a second reason")
    assert attempt.lost == "gone"

    ended = heard(*whole_run())
    ended.doubt()
    ended.lose("gone")
    assert (ended.in_doubt, ended.lost) == (False, None)


# From history


def messages(*kinds: str) -> dict[str, Any]:
    return {
        "status_str": "error",
        "completed": False,
        "messages": [["execution_start", {"prompt_id": "p"}], *([kind, ERROR] for kind in kinds)],
    }


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ({"outputs": OUTPUTS, "status": SUCCESS}, Completed),
        ({"outputs": OUTPUTS, "status": None}, Completed),
        ({"outputs": OUTPUTS}, Completed),
        ({"outputs": OUTPUTS, "status": {"status_str": "success", "completed": True, "messages": None}}, Completed),
        ({"outputs": OUTPUTS, "status": messages("execution_cached", "execution_error")}, Raised),
        ({"outputs": OUTPUTS, "status": messages("execution_interrupted")}, Interrupted),
        ({"outputs": OUTPUTS, "status": {"status_str": "error", "completed": False, "messages": []}}, Raised),
        ({"outputs": OUTPUTS, "status": {"status_str": "error", "completed": False}}, Raised),
        ({"outputs": OUTPUTS, "status": {**SUCCESS, "messages": [None, 5, [], ["x"], "ab"]}}, Completed),
        ({"outputs": OUTPUTS, "status": {"status_str": "error", "messages": [["execution_error", None]]}}, Raised),
        ({"outputs": OUTPUTS, "status": "success"}, Completed),
    ],
)
def test_history_tells_how_a_prompt_ended_in_each_of_its_shapes(entry: dict[str, Any], kind: type[object]) -> None:
    attempt = new_attempt()
    attempt.doubt()
    changed = attempt.changed
    attempt.settle(entry)
    assert attempt.ended
    assert not attempt.in_doubt
    assert changed.is_set()
    assert isinstance(attempt.execution, kind)
    assert attempt.execution.outputs == OUTPUTS


def test_an_error_in_history_has_the_facts_of_the_event() -> None:
    attempt = new_attempt()
    attempt.settle({"outputs": {}, "status": messages("execution_error")})
    assert attempt.execution == heard(event("execution_error", **ERROR), event("executing", node=None)).execution


@pytest.mark.parametrize("outputs", [None, [], "x", {}])
def test_history_replaces_what_events_have_told_and_odd_outputs_are_none(outputs: Any) -> None:
    attempt = heard(event("executed", node="8", output={"images": []}))
    attempt.settle({"outputs": outputs, "status": SUCCESS})
    assert attempt.execution.outputs == {}
