"""When an engine is started again, how long is waited before it, when it is given up, and whose engine answers."""

from collections.abc import Callable
from typing import Any, NoReturn, cast

import attrs
import pytest
import trio
from trio.testing import MockClock

from comfyd.config import RestartPolicy
from comfyd.engine import Engine, EngineState
from comfyd.engine.client import EngineClient
from comfyd.engine.supervisor import keep_running, refuse_if_taken, wait_answering
from comfyd.errors import (
    EngineExited,
    EnginePortTaken,
    EngineStartTimeout,
    EngineUnavailable,
    RestartLimitReached,
    StartupFailed,
)

POLICY = RestartPolicy(max_failures=3, window_s=100.0, first_delay_s=0.5, max_delay_s=30.0)


@attrs.define(eq=False)
class Runs:
    """A ``run_once`` that lives for so many seconds and then fails, again and again."""

    fail: Callable[[int], BaseException] = attrs.field(default=lambda _: EngineExited(3))
    life_s: float = 0.0
    began: list[float] = attrs.field(factory=list)

    async def __call__(self) -> NoReturn:
        self.began.append(trio.current_time())
        await trio.sleep(self.life_s)
        raise self.fail(len(self.began))

    @property
    def gaps(self) -> list[float]:
        """Seconds from each end to the next beginning."""
        pairs = zip(self.began, self.began[1:], strict=False)
        return [round(later - earlier - self.life_s, 6) for earlier, later in pairs]


async def give_up(runs: Runs, policy: RestartPolicy | None, engine: Engine | None = None) -> Exception:
    """What keep_running ends by."""
    with pytest.raises((EngineExited, EnginePortTaken, RestartLimitReached, StartupFailed)) as caught:
        await keep_running(runs, policy, engine or Engine(name="engine-1"))
    return caught.value


async def test_each_restart_waits_twice_as_long_up_to_a_bound(autojump_clock: MockClock) -> None:
    runs = Runs()
    await give_up(runs, RestartPolicy(max_failures=10, window_s=600.0, first_delay_s=0.5, max_delay_s=30.0))
    assert runs.gaps == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]


async def test_more_failures_within_the_window_than_allowed_end_it(autojump_clock: MockClock) -> None:
    runs, engine = Runs(), Engine(name="engine-1")
    error = await give_up(runs, POLICY, engine)
    assert isinstance(error, RestartLimitReached)
    assert (error.failures, error.window_s) == (4, 100.0)
    assert isinstance(error.__cause__, EngineExited)
    assert len(runs.began) == 4
    assert engine.state is EngineState.DOWN
    assert engine.last_failure == "the engine exited with code 3"


async def test_failures_that_are_older_than_the_window_count_no_more(autojump_clock: MockClock) -> None:
    runs = Runs(life_s=40.0)  # never more than three ends within 100 s
    with trio.move_on_after(5000) as scope:
        await keep_running(runs, POLICY, Engine(name="engine-1"))
    assert scope.cancelled_caught
    assert len(runs.began) > 100
    assert set(runs.gaps[2:]) == {2.0}, "the wait follows the failures that count"


async def test_after_a_long_life_the_first_wait_is_short_again(autojump_clock: MockClock) -> None:
    runs = Runs(life_s=101.0)
    with trio.move_on_after(1000):
        await keep_running(runs, POLICY, Engine(name="engine-1"))
    assert set(runs.gaps) == {0.5}


async def test_without_a_policy_the_first_failure_is_the_end(autojump_clock: MockClock) -> None:
    runs = Runs()
    error = await give_up(runs, None)
    assert isinstance(error, EngineExited)
    assert len(runs.began) == 1


@pytest.mark.parametrize("failure", [EnginePortTaken("127.0.0.1 port 1"), StartupFailed("no such command")])
async def test_a_first_start_that_cannot_succeed_is_not_tried_again(
    autojump_clock: MockClock, failure: Exception
) -> None:
    runs = Runs(fail=lambda _: failure)
    assert await give_up(runs, POLICY) is failure
    assert len(runs.began) == 1


async def test_the_same_failure_later_is_a_failure_like_any_other(autojump_clock: MockClock) -> None:
    """Its old process may still be letting go of the port."""
    runs = Runs(fail=lambda number: EngineExited(3) if number == 1 else EnginePortTaken("x"))
    assert isinstance(await give_up(runs, POLICY), RestartLimitReached)
    assert len(runs.began) == 4


async def test_an_exit_says_more_than_the_answer_that_did_not_come(autojump_clock: MockClock) -> None:
    group = ExceptionGroup("g", [EngineStartTimeout(5), ExceptionGroup("h", [EngineUnavailable("x"), EngineExited(7)])])
    assert str(await give_up(Runs(fail=lambda _: group), None)) == "the engine exited with code 7"


async def test_a_bug_is_no_reason_to_restart(autojump_clock: MockClock) -> None:
    runs = Runs(fail=lambda _: ExceptionGroup("g", [EngineExited(3), ZeroDivisionError()]))
    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        await keep_running(runs, POLICY, Engine(name="engine-1"))
    assert len(runs.began) == 1


async def test_a_run_that_returns_is_a_bug(autojump_clock: MockClock) -> None:
    async def returns() -> None:
        await trio.lowlevel.checkpoint()

    with pytest.raises(RuntimeError, match="ends by raising"):
        await keep_running(cast("Any", returns), POLICY, Engine(name="engine-1"))


@pytest.mark.parametrize("life_s", [0.0, 1000.0])
async def test_it_can_be_cancelled_while_it_runs_and_while_it_waits(autojump_clock: MockClock, life_s: float) -> None:
    runs = Runs(life_s=life_s)
    with trio.move_on_after(0.25) as scope:
        await keep_running(runs, POLICY, Engine(name="engine-1"))
    assert scope.cancelled_caught
    assert len(runs.began) == 1


# Whose engine it is


async def test_an_address_where_somebody_answers_is_refused() -> None:
    with trio.fail_after(10):
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        with pytest.raises(EnginePortTaken, match=f"127.0.0.1 port {port}"):
            await refuse_if_taken("127.0.0.1", port)
        await listener.aclose()
        await refuse_if_taken("127.0.0.1", port)


@attrs.define(eq=False)
class Stats:
    """A client whose ``/system_stats`` answers what the list says, one after the other, the last for ever."""

    answers: list[Any]
    asked: list[float] = attrs.field(factory=list)

    async def system_stats(self) -> Any:
        self.asked.append(trio.current_time())
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        if answer == "silent":
            await trio.sleep_forever()
        if isinstance(answer, Exception):
            raise answer
        return answer


OURS = {"system": {"argv": ["main.py", "--output-directory", "/ours"]}}
THEIRS = {"system": {"argv": ["main.py"]}}


async def answering(stats: Stats, identity_arg: str | None) -> None:
    await wait_answering(cast("EngineClient", stats), identity_arg)


async def test_an_engine_that_answers_is_ours_if_its_command_line_has_our_argument(autojump_clock: MockClock) -> None:
    await answering(Stats([OURS]), "/ours")
    await answering(Stats([THEIRS]), None)
    with pytest.raises(EnginePortTaken):
        await answering(Stats([THEIRS]), "/ours")


@pytest.mark.parametrize("odd", [{}, {"system": None}, {"system": []}, {"system": {}}, {"system": {"argv": "main.py"}}])
async def test_an_engine_that_does_not_tell_its_command_line_is_taken_for_ours(
    autojump_clock: MockClock, odd: Any
) -> None:
    await answering(Stats([odd]), "/ours")


async def test_a_starting_engine_is_looked_at_often_at_first_and_then_four_times_a_second(
    autojump_clock: MockClock,
) -> None:
    stats = Stats([EngineUnavailable("refused")] * 100 + [OURS])
    await answering(stats, "/ours")
    gaps = [round(later - earlier, 4) for earlier, later in zip(stats.asked, stats.asked[1:], strict=False)]
    assert gaps[0] == 0.02
    assert gaps == sorted(gaps)
    assert gaps[-1] == 0.25


async def test_an_engine_that_takes_the_question_and_is_silent_is_asked_again(autojump_clock: MockClock) -> None:
    stats = Stats(["silent", OURS])
    with trio.fail_after(3):
        await answering(stats, "/ours")
    assert len(stats.asked) == 2
