"""A pytest plugin: every Trio test runs under the stall guard, and fails if our code held its loop up.

The limits tell two things apart, as the machine is shared: 50 ms of *computing* are ours whatever else runs here; a
blocking call is only seen in wall time, which a busy machine stretches, so that has 250 ms.

A stall counts if a coroutine of ``comfyd`` was being run, or a callback of it. What else is found is the tests' own (a
picture made in the test's body, a plain function of ours called a thousand times): it is listed at the end and fails
nothing. A test that has a reason says ``@pytest.mark.may_stall``.

Tests of Hypothesis are not covered: pytest-trio 0.8 runs those with ``trio.run`` whatever the mark says.
"""

from collections.abc import Callable, Generator
from functools import partial
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, Final

import pytest
import trio

import comfyd
from comfyd.host.stall_guard import Stall, StallGuard, StallLimits

LIMITS: Final = StallLimits(computing_s=0.05, waiting_s=0.25)
OURS: Final = str(Path(comfyd.__file__).parent)
TESTS: Final = str(Path(__file__).parent)
LISTED: Final = 40
"""Of the tests' own, in the summary."""

_STALLS: Final = pytest.StashKey[list[Stall]]()
_TESTS_OWN: Final = pytest.StashKey[list[tuple[str, Stall]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "may_stall(reason): this test holds its loop up on purpose")
    config.stash[_TESTS_OWN] = []


@pytest.hookimpl(tryfirst=True)  # pytest-trio takes the first mark that names a runner, and adds its own in this hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the guard installed where pytest-trio runs a test."""
    for item in items:
        if iscoroutinefunction(getattr(item, "obj", None)) and item.get_closest_marker("may_stall") is None:
            stalls = item.stash[_STALLS] = []
            item.add_marker(pytest.mark.trio(run=partial(run_guarded, stalls)))


def run_guarded(
    stalls: list[Stall], async_fn: Callable[..., Any], *, instruments: list[trio.abc.Instrument], **options: Any
) -> Any:
    """Call :func:`trio.run`, and note the stalls."""
    return trio.run(async_fn, instruments=[*instruments, StallGuard(stalls.append, LIMITS)], **options)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test that passed, if our code stalled."""
    result = yield
    stalls = item.stash.get(_STALLS, [])
    ours = [stall for stall in stalls if is_ours(stall)]
    item.config.stash[_TESTS_OWN] += [(item.nodeid, stall) for stall in stalls if stall not in ours]
    if ours:
        pytest.fail("the loop stalled\n" + "\n".join(map(str, ours)), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """List what the tests themselves did to their loops."""
    found = config.stash[_TESTS_OWN]
    if found and config.get_verbosity() >= 0:
        terminalreporter.section("steps of the tests' own that held their loop up")
        for test, stall in sorted(found, key=lambda pair: -pair[1].wall_s)[:LISTED]:
            innermost = stall.stack[-1] if stall.stack else "its end"
            terminalreporter.line(
                f"{test}: {stall.wall_s * 1000:.0f} ms ({stall.computed_s * 1000:.0f} ms computed) at {innermost}"
            )


def is_ours(stall: Stall) -> bool:
    """Whether comfyd's code held the loop up; a stack that is not of the step itself proves nothing."""
    ours = [place for place in stall.stack if place.file.startswith(OURS)]
    if stall.samples == 0 or not ours:
        return False
    called_by_test = any(place.file.startswith(TESTS) for place in stall.stack)
    return not called_by_test or any(place.is_coroutine for place in ours)
