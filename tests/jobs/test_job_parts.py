"""The small parts of jobs: states, deadlines, the measured service time, progress, what is told of a failure."""

import time

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from jobs_kit import TIMES, event, make_job

from comfyd.engine import NodeTime, Raised, Refusal
from comfyd.engine.attempt import ExecutionTimes
from comfyd.errors import Failure, FailureKind, Fault, InvalidValue
from comfyd.jobs import Job, JobState, PromptRequest, Request, parse_request
from comfyd.jobs.deadlines import Deadlines
from comfyd.jobs.failures import execution_failed, prompt_refused, summary
from comfyd.jobs.model import Clock
from comfyd.jobs.progress import Progress
from comfyd.jobs.service_time import ServiceTime
from comfyd.texts import hide_paths

S = JobState
LEGAL = {
    S.ACCEPTED: {S.PREPARING, S.QUEUED, S.FAILED, S.CANCELLED},
    S.PREPARING: {S.QUEUED, S.FAILED, S.CANCELLED},
    S.QUEUED: {S.RUNNING, S.FAILED, S.CANCELLED},
    S.RUNNING: {S.QUEUED, S.DELIVERING, S.FAILED, S.CANCELLED},
    S.DELIVERING: {S.QUEUED, S.SUCCEEDED, S.FAILED, S.CANCELLED},
    S.SUCCEEDED: set(),
    S.FAILED: set(),
    S.CANCELLED: set(),
}

# States


@pytest.mark.parametrize("before", S)
@pytest.mark.parametrize("after", S)
def test_a_job_moves_only_along_its_way(before: JobState, after: JobState) -> None:
    job = make_job(state=before)
    changed = job.changed
    if after in LEGAL[before]:
        job.move(after)
        assert job.state is after
        assert changed.is_set()
        assert not job.changed.is_set()
    else:
        with pytest.raises(RuntimeError, match=f"from {before.value} to {after.value}"):
            job.move(after)
        assert job.state is before
        assert not changed.is_set()


def test_states_are_final_exactly_if_nothing_comes_after_them() -> None:
    assert {state for state in S if state.final} == {state for state in S if not LEGAL[state]}


async def test_the_outcome_is_waited_for_through_any_number_of_changes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    job = make_job()
    outcome = Failure(kind=FailureKind.TIMEOUT, detail="late")
    got = []

    async def wait() -> None:
        got.append(await job.wait_final())

    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            for state in (S.QUEUED, S.RUNNING):
                await trio.testing.wait_all_tasks_blocked()
                job.move(state)
            await trio.testing.wait_all_tasks_blocked()
            assert got == []
            job.outcome = outcome
            job.move(S.FAILED)
    assert got == [outcome]


def test_the_extra_data_with_its_keys_is_not_shown_in_a_repr() -> None:
    for kind in (PromptRequest, Request):
        assert "sk-secret" not in repr(kind(prompt={}, extra_data={"api_key": "sk-secret"}))


def test_stats_add_up_stages_and_are_milliseconds() -> None:
    times = ExecutionTimes(start_ms=1000.0, end_ms=1250.5, nodes={"1": NodeTime(start_ms=1001.0, duration_ms=2.5)})
    clock = Clock(accepted=time.perf_counter() - 2, prepare_s=0.5, queue_s=0.25, engine_s=1.0, collect_s=0.001)
    stats = clock.stats(attempts=2, times=times).as_dict()
    assert stats.pop("total_time") == pytest.approx(2000, abs=200)
    assert stats == {
        "comfy_execution": {
            "start": 1000.0,
            "end": 1250.5,
            "duration": 250.5,
            "nodes": {"1": {"start": 1001.0, "duration": 2.5}},
        },
        "preprocess_time": 500.0,
        "queue_time": 250.0,
        "comfy_round_trip_time": 1000.0,
        "postprocess_time": 1.0,
        "upload_time": 0.0,
        "attempts": 2,
    }


def test_stats_begin_with_nothing() -> None:
    stats = Clock().stats(attempts=1, times=TIMES)
    assert (stats.preprocess_time, stats.queue_time, stats.comfy_round_trip_time) == (0.0, 0.0, 0.0)


# Requests


@pytest.mark.parametrize("job_id", ["a", "0", "-", "_x", ":", "A.b-c_d:e", "x" * 128])
def test_an_id_may_be_what_a_file_name_may_be(job_id: str) -> None:
    assert parse_request({"prompt": {}, "id": job_id}).id == job_id


@pytest.mark.parametrize("job_id", ["", ".a", "..", "a/b", "a b", "ä", "a\n", "x" * 129, 5, ["a"]])
def test_an_id_that_is_none_is_refused_at_its_place(job_id: object) -> None:
    with pytest.raises(InvalidValue) as caught:
        parse_request({"prompt": {}, "id": job_id})
    assert [fault.location for fault in caught.value.faults] == ["id"]


def test_every_fault_of_a_request_is_told_and_null_means_absent() -> None:
    with pytest.raises(InvalidValue) as caught:
        parse_request({"priority": 101, "timeout_s": 0, "propmt": {}})
    assert {fault.location for fault in caught.value.faults} == {"prompt", "priority", "timeout_s", "propmt"}
    assert parse_request({"prompt": {}, "id": None, "priority": None, "timeout_s": None}) == Request(prompt={})


# Deadlines


async def expire_all(jobs: list[Job], until_s: float) -> list[tuple[str, float]]:
    """Who expires when, with *jobs* added before anybody watches."""
    deadlines = Deadlines()
    expired: list[tuple[str, float]] = []
    began = trio.current_time()
    for job in jobs:
        deadlines.add(job)
    with trio.move_on_after(until_s):
        await deadlines.serve(lambda job: expired.append((job.id, round(trio.current_time() - began, 6))))
    return expired


async def test_each_job_expires_at_its_deadline_whatever_the_order(autojump_clock: trio.testing.MockClock) -> None:
    now = trio.current_time()
    jobs = [make_job(f"in{n}", sequence=n, deadline=now + n) for n in (5, 1, 3)]
    assert await expire_all(jobs, 10) == [("in1", 1.0), ("in3", 3.0), ("in5", 5.0)]


async def test_jobs_with_one_deadline_all_expire_at_it(autojump_clock: trio.testing.MockClock) -> None:
    jobs = [make_job(str(n), sequence=n, deadline=trio.current_time() + 2) for n in range(3)]
    assert await expire_all(jobs, 10) == [("0", 2.0), ("1", 2.0), ("2", 2.0)]


async def test_a_job_without_a_deadline_or_with_an_outcome_never_expires(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ended = make_job("ended", deadline=trio.current_time() + 1, outcome=Failure(kind=FailureKind.TIMEOUT, detail=""))
    assert await expire_all([make_job("endless", sequence=2), ended], 1e9) == []


async def test_a_sooner_deadline_that_comes_later_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    deadlines = Deadlines()
    expired: list[tuple[str, float]] = []
    now = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deadlines.serve, lambda job: expired.append((job.id, round(trio.current_time() - now, 6))))
        await trio.testing.wait_all_tasks_blocked()
        deadlines.add(make_job("late", sequence=1, deadline=now + 100))
        await trio.sleep(10)
        deadlines.add(make_job("soon", sequence=2, deadline=now + 15))
        deadlines.add(make_job("past", sequence=3, deadline=now + 5))
        await trio.sleep(20)
        assert expired == [("past", 10.0), ("soon", 15.0)]
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert expired[2:] == [("late", 100.0)]


async def test_a_job_that_ends_while_it_is_watched_does_not_expire(autojump_clock: trio.testing.MockClock) -> None:
    deadlines = Deadlines()
    expired: list[Job] = []
    job = make_job(deadline=trio.current_time() + 5)
    deadlines.add(job)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(deadlines.serve, expired.append)
        await trio.sleep(1)
        job.outcome = Failure(kind=FailureKind.JOB_CANCELLED, detail="")
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert expired == []


# Service time


def test_the_time_to_come_back_is_a_guess_until_a_job_has_ended() -> None:
    assert ServiceTime().retry_after_s(3) == 15.0


def test_the_time_to_come_back_follows_what_was_measured() -> None:
    measured = ServiceTime()
    measured.measured(10.0)
    assert measured.retry_after_s(1) == 10.0
    assert measured.retry_after_s(7) == 70.0
    assert measured.retry_after_s(0) == 10.0
    measured.measured(20.0)
    assert measured.retry_after_s(1) == pytest.approx(12.0)
    for _ in range(60):
        measured.measured(20.0)
    assert measured.retry_after_s(1) == pytest.approx(20.0, rel=1e-3)


def test_the_time_to_come_back_is_between_a_second_and_an_hour() -> None:
    quick, slow = ServiceTime(), ServiceTime()
    quick.measured(0.004)
    slow.measured(600.0)
    assert quick.retry_after_s(10) == 1.0
    assert quick.retry_after_s(1000) == pytest.approx(4.0)
    assert slow.retry_after_s(1000) == 3600.0


# Progress


def began(*nodes: str) -> Progress:
    progress = Progress()
    progress.begin(frozenset(nodes))
    return progress


def percent_after(progress: Progress, kind: str, **data: object) -> float:
    progress.hear(event(kind, **data))
    return progress.view.percent


def test_progress_counts_nodes_cached_ones_and_steps_over_the_whole_graph() -> None:
    progress = began("1", "2", "3", "4")
    assert progress.view.percent == 0.0
    assert percent_after(progress, "execution_start") == 0.0
    assert percent_after(progress, "execution_cached", nodes=["1"]) == 25.0
    assert percent_after(progress, "executing", node="2") == 25.0
    assert percent_after(progress, "progress", value=5, max=20) == 31.2
    assert (progress.view.node_id, progress.view.step, progress.view.steps) == ("2", 5, 20)
    assert percent_after(progress, "progress", value=20, max=20) == 50.0
    assert percent_after(progress, "executing", node="3") == 50.0
    assert (progress.view.node_id, progress.view.step, progress.view.steps) == ("3", None, None)
    assert percent_after(progress, "execution_success") == 100.0
    assert percent_after(progress, "executing", node=None) == 100.0
    assert progress.view.node_id is None


def test_progress_never_falls_when_a_node_counts_its_steps_again() -> None:
    progress = began("1", "2")
    progress.hear(event("executing", node="1"))
    seen = [percent_after(progress, "progress", value=value, max=10) for value in (5, 10, 1, 5, 10)]
    assert seen == sorted(seen)
    assert seen[-1] == 50.0


def test_a_new_attempt_begins_with_nothing() -> None:
    progress = began("1", "2")
    progress.hear(event("execution_success"))
    progress.begin(frozenset({"1", "2"}))
    view = progress.view
    assert (view.percent, view.node_id, view.step, view.steps) == (0.0, None, None, None)


def test_a_node_that_the_graph_does_not_have_counts_for_nothing() -> None:
    progress = began("1", "2")
    assert percent_after(progress, "execution_cached", nodes=["8", "9"]) == 0.0
    assert percent_after(progress, "executing", node="2.0.0.1") == 0.0
    assert percent_after(progress, "progress", value=1, max=2) == 0.0
    assert percent_after(progress, "executing", node=None) == 0.0


def test_a_node_of_an_expanded_graph_is_shown_as_the_callers_own() -> None:
    progress = began("1", "2")
    progress.hear(event("executing", node="2.0.0.1", display_node="2"))
    assert progress.view.node_id == "2"


def test_a_cached_node_that_runs_all_the_same_is_not_counted_twice() -> None:
    progress = began("1", "2")
    progress.hear(event("execution_cached", nodes=["1"]))
    progress.hear(event("executing", node="1"))
    assert percent_after(progress, "progress", value=9, max=10) == 50.0


@pytest.mark.parametrize("kind", ["status", "executed", "progress_state", "something_new"])
def test_events_that_do_not_change_the_view_wake_nobody(kind: str) -> None:
    assert began("1").hear(event(kind, node="1")) is False


EVENTS = st.one_of(
    st.builds(lambda nodes: event("execution_cached", nodes=nodes), st.lists(st.sampled_from("1234"))),
    st.builds(lambda node: event("executing", node=node), st.sampled_from([None, "1", "2", "3", "4", 5])),
    st.builds(
        lambda value, most: event("progress", value=value, max=most),
        st.one_of(st.integers(-3, 30), st.none(), st.floats(-1, 20), st.just("3")),
        st.one_of(st.integers(-1, 20), st.none()),
    ),
    st.just(event("execution_success")),
    st.just(event("execution_cached")),
)


@given(st.lists(EVENTS))
def test_progress_stays_between_0_and_100_and_never_falls_whatever_comes(events: list[object]) -> None:
    progress = began("1", "2", "3")
    seen = [0.0]
    for one in events:
        progress.hear(one)  # type: ignore[arg-type] # hypothesis does not type what a strategy of several makes
        seen.append(progress.view.percent)
    assert seen == sorted(seen)
    assert seen[-1] <= 100.0


# What is told of a failure


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no such file: '/opt/ComfyUI/models/x.safetensors'", "no such file: 'x.safetensors'"),
        ("/a/b/c.py:12 and /d/e", "c.py:12 and e"),
        ("see https://example.com/a/b/c", "see https://example.com/a/b/c"),
        ("width 3/4 or a/b", "width 3/4 or a/b"),
        ("/root", "/root"),
        ("", ""),
    ],
)
def test_paths_of_the_server_are_reduced_to_their_last_part(text: str, shown: str) -> None:
    assert hide_paths(text) == shown


def test_an_endless_message_is_cut() -> None:
    assert len(hide_paths("x" * 1_000_000)) == 4003


def test_paths_are_hidden_in_linear_time() -> None:
    began_at = time.perf_counter()
    hide_paths("/a" * 100_000)
    hide_paths("/" * 200_000)
    hide_paths("/ab/" * 50_000 + " ")
    assert time.perf_counter() - began_at < 2


def test_a_raising_node_is_told_with_its_place_and_without_paths() -> None:
    raised = Raised(
        node_id="7",
        node_type="LoadImage",
        exception_type="FileNotFoundError",
        exception_message="no '/srv/input/a.png'",
        outputs={},
    )
    failure = execution_failed(raised)
    assert failure.kind is FailureKind.EXECUTION_FAILED
    assert failure.detail == "node 7 (LoadImage) raised FileNotFoundError: no 'a.png'"
    assert failure.faults == (Fault(location="prompt.7", message="no 'a.png'"),)
    assert failure.facts == {
        "node_id": "7",
        "node_type": "LoadImage",
        "exception_type": "FileNotFoundError",
        "exception_message": "no 'a.png'",
    }


def test_a_refusal_names_every_input_and_passes_node_errors_on_without_what_is_private() -> None:
    error = {
        "type": "value_not_in_list",
        "message": "Value not in list",
        "details": "ckpt: 'x' not in ['/models/ckpt/y']",
        "extra_info": {"input_name": "ckpt", "input_config": ["secret"], "received_value": "x"},
    }
    raised = {
        "type": "exception_during_validation",
        "message": "Exception",
        "details": "",
        "extra_info": {"traceback": ['File "/opt/x.py"'], "linked_node": ["1", 0]},
    }
    node_errors = {
        "3": {"errors": [error, raised, "odd"], "dependent_outputs": ["9"], "class_type": "Loader"},
        "4": {"errors": None},
        "5": "odd",
    }
    refusal = Refusal(
        error={"type": "prompt_outputs_failed_validation", "message": "Failed", "details": ""}, node_errors=node_errors
    )
    failure = prompt_refused(refusal, {"4": {"inputs": {}}, "3": {"inputs": {"a": 1, "ckpt": "x"}}})
    assert failure.kind is FailureKind.INVALID_PROMPT
    assert failure.detail == "Failed"
    assert failure.faults == (
        Fault(location="prompt.3", message="Exception"),
        Fault(location="prompt.3.inputs.ckpt", message="Value not in list: ckpt: 'x' not in ['y']"),
    )
    told = failure.facts["node_errors"]
    assert told["3"]["errors"][0]["extra_info"] == {"input_name": "ckpt", "received_value": "x"}
    assert told["3"]["errors"][1]["extra_info"] == {}
    assert "/opt" not in str(told)
    assert node_errors["3"]["errors"][1]["extra_info"]["traceback"], "the original is untouched"  # type: ignore[index]


@pytest.mark.parametrize("error", [{}, {"message": None}, {"message": "", "details": None}])
def test_a_refusal_without_words_still_is_a_sentence(error: dict[str, object]) -> None:
    failure = prompt_refused(Refusal(error=error, node_errors={}), {})
    assert failure.detail == "the graph is not valid"
    assert failure.faults == (Fault(location="prompt", message="the graph is not valid"),)
    assert failure.facts == {}


def test_a_graph_that_comfyui_finds_to_have_no_outputs_has_the_failure_that_we_would_have_given() -> None:
    failure = prompt_refused(Refusal(error={"type": "prompt_no_outputs", "message": "No outputs"}, node_errors={}), {})
    assert failure.kind is FailureKind.NO_OUTPUT_NODE
    assert failure.faults == (Fault(location="prompt", message="No outputs"),)


def test_a_summary_is_the_first_fault_and_how_many_more() -> None:
    one, other = Fault(location="a.b", message="is odd"), Fault(location="", message="all is odd")
    assert summary((one,)) == "a.b: is odd"
    assert summary((other,)) == "all is odd"
    assert summary((one, other, other)) == "a.b: is odd (and 2 more)"
