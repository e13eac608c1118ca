"""One prompt on one engine, whatever happens meanwhile: refusals, lost answers, lost sockets, a dying engine, a cancel.

All in memory and on a virtual clock: the engine's HTTP side is a script, its events are handed over by the test.
"""

from typing import Any

import attrs
import pytest
import trio
from engine_kit import ERROR, NO_CLASSES, OUTPUTS, SUCCESS, ScriptedClient, bring_up, event, whole_run
from trio.testing import MockClock

from comfyd.engine import (
    Completed,
    Engine,
    EngineEvent,
    EngineState,
    Execution,
    Interrupted,
    Raised,
    Refusal,
    Refused,
    Submission,
)
from comfyd.engine.engine import DOUBT_RECHECK_S, INTERRUPT_GRACE_S, SUBMIT_TIMEOUT_S
from comfyd.errors import EngineError, EngineExited, EngineLost, WarmupFailed

PARTLY = Refusal(error={"type": "t", "message": "m"}, node_errors={"9": {}}, may_be_queued=True)
WHOLLY = Refusal(error={"type": "t", "message": "m"}, node_errors={})


@attrs.define(eq=False)
class Bench:
    """An engine that is up, its scripted client, and one execution under way in *scope*."""

    engine: Engine = attrs.field(factory=lambda: Engine(name="engine-1"))
    client: ScriptedClient = attrs.field(factory=ScriptedClient)
    seen: list[EngineEvent] = attrs.field(factory=list)
    result: Execution | EngineLost | None = None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    done: trio.Event = attrs.field(factory=trio.Event)
    extra_data: dict[str, Any] = attrs.field(factory=dict)

    async def execute(self, prompt_id: str = "p") -> None:
        submission = Submission(graph={"1": {}}, extra_data=self.extra_data, prompt_id=prompt_id)
        with trio.CancelScope() as self.scope:
            try:
                self.result = await self.engine.execute(submission, self.seen.append)
            except EngineLost as exc:
                self.result = exc
        self.done.set()

    async def begin(self, nursery: trio.Nursery) -> None:
        """Start the execution, up to where it waits."""
        nursery.start_soon(self.execute)
        await trio.testing.wait_all_tasks_blocked()

    def hear(self, *events: EngineEvent) -> None:
        for one in events:
            self.engine.received(one)

    async def ended(self, within_s: float = 1.0) -> Execution | EngineLost | None:
        """The result, which is there within *within_s* seconds."""
        with trio.fail_after(within_s):
            await self.done.wait()
        return self.result


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bring_up(bench.engine, bench.client)
    return bench


# The normal way


async def test_a_prompt_is_submitted_once_and_ends_by_its_events_without_a_question(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.extra_data = {"key": "secret"}
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.hear(*whole_run())
        result = await bench.ended(0.001)
    assert isinstance(result, Completed)
    assert result.outputs == OUTPUTS
    assert bench.client.methods == ["submit"]
    assert bench.client.submitted == [
        {"prompt": {"1": {}}, "prompt_id": "p", "client_id": "client-1", "extra_data": {"key": "secret"}}
    ]
    assert bench.seen == whole_run()


async def test_events_that_come_before_the_submit_call_returns_are_not_lost(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.client.silent = {"submit"}
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.hear(*whole_run())
        assert bench.seen == whole_run()
        nursery.cancel_scope.cancel()


async def test_events_of_other_prompts_and_kinds_are_nobodys(bench: Bench, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.hear(*whole_run("somebody else's"), event("status", None), event("logs", None))
        await trio.sleep(100)
        assert bench.result is None
        assert bench.client.methods == ["submit"], "a prompt that is not in doubt costs no request"
        bench.hear(*whole_run())
        assert isinstance(await bench.ended(), Completed)


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [("execution_error", ERROR, Raised), ("execution_interrupted", {}, Interrupted)],
)
async def test_a_prompt_that_fails_ends_with_what_happened(
    bench: Bench, kind: str, data: dict[str, Any], expected: type[object], autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.hear(event(kind, **data), event("executing", node=None))
        assert isinstance(await bench.ended(), expected)


async def test_a_submission_waits_until_the_engine_is_listened_to(bench: Bench, autojump_clock: MockClock) -> None:
    bench.engine.disconnected()
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        assert bench.client.calls == []
        bench.engine.connected("client-2")
        await trio.testing.wait_all_tasks_blocked()
        assert bench.client.submitted[0]["client_id"] == "client-2"
        bench.hear(*whole_run())
        assert isinstance(await bench.ended(), Completed)


async def test_finished_prompts_are_dropped_from_history_together(bench: Bench, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.engine.serve_forgetting)
        for prompt_id in ("a", "b", "c"):
            nursery.start_soon(bench.execute, prompt_id)
        await trio.testing.wait_all_tasks_blocked()
        for prompt_id in ("a", "b"):
            bench.hear(*whole_run(prompt_id))
        await trio.sleep(2)
        assert [sorted(some) for some in bench.client.forgotten] == [["a", "b"]]
        bench.client.failing = {"forget"}
        bench.hear(*whole_run("c"))
        await trio.sleep(2)
        bench.client.failing = set()
        assert bench.client.forgotten[1:] == [["c"]]
        await trio.sleep(100)
        assert len(bench.client.forgotten) == 2, "with nothing new there is nothing to ask"
        nursery.cancel_scope.cancel()


# Refusals


async def test_a_refused_prompt_is_told_at_once(bench: Bench, autojump_clock: MockClock) -> None:
    bench.client.refusal, bench.client.takes = WHOLLY, False
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        result = await bench.ended(0.001)
    assert result == Refused(refusal=WHOLLY, outputs={})
    assert bench.client.methods == ["submit"]


async def test_a_partly_refused_prompt_is_taken_off_again_before_it_is_told(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.client.refusal = PARTLY
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        assert bench.client.methods[:3] == ["submit", "delete_queued", "interrupt"]
        assert bench.result is None, "it runs still"
        bench.hear(event("execution_interrupted"), event("executing", node=None))
        assert await bench.ended(0.001) == Refused(refusal=PARTLY, outputs={})


async def test_a_partly_refused_prompt_that_cannot_be_stopped_is_told_within_the_grace_period(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.client.refusal = PARTLY
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        assert await bench.ended(60) == Refused(refusal=PARTLY, outputs={})
    assert trio.current_time() - began == pytest.approx(INTERRUPT_GRACE_S)


# A submit call without an answer


async def unanswered(bench: Bench, nursery: trio.Nursery) -> None:
    bench.client.failing = {"submit"}
    await bench.begin(nursery)


async def test_a_submit_without_an_answer_that_ran_is_found_in_history(bench: Bench, autojump_clock: MockClock) -> None:
    bench.client.end("p")
    bench.client.takes = False
    async with trio.open_nursery() as nursery:
        await unanswered(bench, nursery)
        result = await bench.ended()
    assert isinstance(result, Completed)
    assert result.outputs == OUTPUTS
    assert bench.client.methods == ["submit", "history"]


async def test_a_submit_without_an_answer_that_waits_or_runs_is_waited_for(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.client.takes = False
    bench.client.pending = {"p"}
    async with trio.open_nursery() as nursery:
        await unanswered(bench, nursery)
        await trio.sleep(30)
        assert bench.result is None
        bench.client.pending, bench.client.running = set(), {"p"}
        await trio.sleep(30)
        assert bench.result is None
        bench.client.end("p")
        assert isinstance(await bench.ended(2 * DOUBT_RECHECK_S), Completed)


async def test_a_submit_without_an_answer_that_was_taken_may_end_by_its_events(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        await unanswered(bench, nursery)
        bench.hear(*whole_run())
        assert isinstance(await bench.ended(), Completed)


async def test_a_submit_without_an_answer_that_the_engine_does_not_know_is_lost(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.client.takes = False
    async with trio.open_nursery() as nursery:
        await unanswered(bench, nursery)
        result = await bench.ended()
    assert isinstance(result, EngineLost)
    assert bench.client.methods == ["submit", "history", "queue", "history"]


async def test_a_prompt_that_ends_between_the_two_questions_is_found(bench: Bench, autojump_clock: MockClock) -> None:
    bench.client.takes = False

    @attrs.define(eq=False)
    class EndsMeanwhile(ScriptedClient):
        async def queue(self) -> Any:
            self.end("p")
            return await super().queue()

    bench.client = EndsMeanwhile(takes=False)
    bring_up(bench.engine, bench.client)
    async with trio.open_nursery() as nursery:
        await unanswered(bench, nursery)
        assert isinstance(await bench.ended(), Completed)


async def test_a_submit_that_hangs_is_given_up_after_its_time_and_looked_for(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.client.silent = {"submit"}
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        await bench.client.wait_called("history")
        assert trio.current_time() - began == pytest.approx(SUBMIT_TIMEOUT_S)
        bench.client.end("p")
        assert isinstance(await bench.ended(2 * DOUBT_RECHECK_S), Completed)


async def test_questions_without_an_answer_are_asked_again_until_the_engine_is_given_up(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.client.takes = False
    bench.client.failing = {"submit", "history"}
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        await trio.sleep(10)
        assert bench.result is None
        assert 5 <= bench.client.methods.count("history") <= 15, "about once a second, and no busy loop"
        bench.engine.went_down("code 3")
        assert str(await bench.ended()) == "code 3"


# A lost socket


async def test_a_prompt_that_ended_while_the_socket_was_away_is_settled_from_history(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.hear(*whole_run()[:3])
        bench.engine.disconnected()
        bench.client.end("p", status={**SUCCESS, "status_str": "error", "messages": [["execution_error", ERROR]]})
        await trio.sleep(30)
        assert bench.client.methods == ["submit"], "without a socket nobody is asked"
        bench.engine.connected("client-2")
        assert isinstance(await bench.ended(0.001), Raised)
        assert bench.client.methods == ["submit", "history"]


async def test_a_prompt_that_still_runs_after_a_reconnect_ends_when_the_queue_changes(
    bench: Bench, autojump_clock: MockClock
) -> None:
    """Its own events go to the old client id for ever; the status broadcast is what everybody gets."""
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.engine.disconnected()
        bench.engine.connected("client-2")
        await trio.testing.wait_all_tasks_blocked(0.0001)
        assert bench.result is None
        bench.client.end("p")
        bench.hear(event("status", None))
        assert isinstance(await bench.ended(0.001), Completed)


async def test_a_prompt_in_doubt_is_looked_for_even_if_the_engine_says_nothing(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.engine.disconnected()
        bench.engine.connected("client-2")
        await trio.sleep(10)
        asked = bench.client.methods.count("history")
        assert 5 <= asked <= 12
        bench.client.end("p")
        assert isinstance(await bench.ended(2 * DOUBT_RECHECK_S), Completed)


async def test_a_socket_that_was_lost_during_the_submit_puts_the_prompt_in_doubt(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.client.end("p")
    bench.client.takes = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.execute)
        await bench.client.wait_called("submit")
        bench.engine.disconnected()
        bench.engine.connected("client-2")
        assert isinstance(await bench.ended(), Completed)


async def test_an_end_without_a_verdict_is_looked_up(bench: Bench, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.client.end("p")
        bench.hear(event("executing", node=None))
        assert isinstance(await bench.ended(0.001), Completed)


# An engine that dies


async def test_a_prompt_is_lost_at_once_when_the_engine_goes_down(bench: Bench, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.engine.went_down("the engine exited with code 3")
        result = await bench.ended(0.001)
    assert isinstance(result, EngineLost)
    assert str(result) == "the engine exited with code 3"


async def test_an_engine_that_is_not_up_loses_a_prompt_before_it_is_submitted(autojump_clock: MockClock) -> None:
    bench = Bench()
    await bench.execute()
    assert str(bench.result) == "the engine is not up"
    bring_up(bench.engine, bench.client)
    bench.engine.disconnected()
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.engine.went_down("gone before it was listened to")
        await trio.testing.wait_all_tasks_blocked()
    assert str(bench.result) == "gone before it was listened to"
    assert bench.client.calls == []


async def test_a_later_life_of_the_engine_knows_nothing_of_an_earlier_ones_prompts(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.engine.went_down("crash")
        assert isinstance(await bench.ended(), EngineLost)
        second = ScriptedClient()
        bring_up(bench.engine, second, "client-2")
        bench.hear(*whole_run())
        bench.engine.disconnected()
        await bench.engine.wait_idle()
        assert second.calls == []


# Cancelling


async def test_a_cancelled_prompt_is_deleted_and_interrupted_and_its_end_is_awaited(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.scope.cancel()
        await trio.testing.wait_all_tasks_blocked(0.0001)
        assert bench.client.calls[1:3] == [("delete_queued", "p"), ("interrupt", "p")]
        assert not bench.done.is_set(), "the engine is at it still"
        bench.hear(event("execution_interrupted"), event("executing", node=None))
        await bench.ended(0.001)
    assert bench.scope.cancelled_caught
    assert bench.result is None
    with trio.fail_after(0.001):
        await bench.engine.wait_idle()


async def test_a_cancelled_prompt_that_only_waited_leaves_no_trace_and_is_not_waited_for(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.client.takes = False
    bench.client.pending = {"p"}
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.scope.cancel()
        await bench.ended(0.001)
    assert bench.client.pending == set()


async def test_cancelling_takes_a_bounded_time_and_the_rest_is_waited_for_in_the_open(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.scope.cancel()
        began = trio.current_time()
        await bench.ended(60)
        assert trio.current_time() - began == pytest.approx(INTERRUPT_GRACE_S)
        idle = trio.Event()

        async def wait_idle() -> None:
            await bench.engine.wait_idle()
            idle.set()

        nursery.start_soon(wait_idle)
        await trio.sleep(1000)
        assert not idle.is_set()
        bench.client.end("p")
        with trio.fail_after(2 * DOUBT_RECHECK_S):
            await idle.wait()


@pytest.mark.parametrize("method", ["delete_queued", "interrupt"])
@pytest.mark.parametrize("fault", ["silent", "failing"])
async def test_an_engine_that_does_not_answer_does_not_hold_a_cancel(
    bench: Bench, method: str, fault: str, autojump_clock: MockClock
) -> None:
    setattr(bench.client, fault, {method})
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.scope.cancel()
        await bench.ended(INTERRUPT_GRACE_S + 0.001)
    assert bench.scope.cancelled_caught


async def test_a_prompt_that_is_cancelled_while_it_is_submitted_is_withdrawn(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.client.silent = {"submit"}
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.scope.cancel()
        await trio.testing.wait_all_tasks_blocked(0.0001)
        assert bench.client.methods[:3] == ["submit", "delete_queued", "interrupt"]
        bench.client.end("p")
        await bench.ended(2 * DOUBT_RECHECK_S)


async def test_waiting_until_idle_ends_with_the_engine(bench: Bench, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.scope.cancel()
        await bench.ended(60)
        nursery.start_soon(bench.engine.wait_idle)
        await trio.sleep(1)
        bench.engine.went_down("killed")
        with trio.fail_after(0.001):
            await trio.testing.wait_all_tasks_blocked()


async def test_letting_go_ends_what_is_under_way_without_waiting_for_the_interrupt(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        await bench.begin(nursery)
        bench.scope.cancel()
        await trio.testing.wait_all_tasks_blocked(0.0001)
        bench.engine.let_go()
        await bench.ended(0.001)
    assert bench.engine.state is EngineState.GONE


# States


async def test_who_waits_for_the_engine_is_woken_when_it_is_up_and_told_when_it_is_gone(
    autojump_clock: MockClock,
) -> None:
    engine, client = Engine(name="engine-1"), ScriptedClient()
    up = trio.Event()

    async def wait_up() -> None:
        await engine.wait_up()
        up.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_up)
        await trio.testing.wait_all_tasks_blocked()
        engine.went_down("first try failed")
        await trio.testing.wait_all_tasks_blocked()
        assert not up.is_set()
        bring_up(engine, client)
        with trio.fail_after(1):
            await up.wait()
    engine.went_down("for good", for_good=True)
    with pytest.raises(EngineLost, match="for good"):
        await engine.wait_up()


def test_warmth_is_of_one_life_and_having_been_warm_is_for_ever() -> None:
    engine = Engine(name="engine-1")
    assert (engine.up, engine.warm, engine.was_ever_warm, engine.state) == (False, False, False, EngineState.STARTING)
    bring_up(engine, ScriptedClient())
    engine.mark_warm()
    assert (engine.up, engine.warm, engine.was_ever_warm, engine.state) == (True, True, True, EngineState.UP)
    engine.went_down("crash")
    assert (engine.up, engine.warm, engine.was_ever_warm, engine.state) == (False, False, True, EngineState.DOWN)
    assert engine.last_failure == "crash"
    assert engine.node_classes is NO_CLASSES, "what it said of its nodes stays known"


async def test_a_condemned_engine_is_down_before_its_supervisor_learns_why(
    bench: Bench, autojump_clock: MockClock
) -> None:
    verdict = WarmupFailed("no good")
    raised: list[EngineError] = []

    async def supervise() -> None:
        try:
            await bench.engine.wait_condemned()
        except EngineError as exc:
            raised.append(exc)
            assert not bench.engine.up

    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise)
        await bench.begin(nursery)
        bench.engine.condemn(verdict)
        assert isinstance(await bench.ended(), EngineLost)
    assert raised == [verdict]


async def test_a_condemned_engine_is_given_nothing_more_whoever_has_his_turn_first(bench: Bench) -> None:
    bench.engine.condemn(EngineExited(3))
    assert not bench.engine.up, "a runner that is woken before the supervisor would hand it the next job"
    assert bench.engine.last_failure == str(EngineExited(3))


async def test_a_new_life_is_not_condemned_by_an_old_verdict(bench: Bench, autojump_clock: MockClock) -> None:
    bench.engine.condemn(EngineExited(3))
    bring_up(bench.engine, ScriptedClient())
    with trio.move_on_after(10) as scope:
        await bench.engine.wait_condemned()
    assert scope.cancelled_caught
    assert bench.engine.up
