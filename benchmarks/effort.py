"""How much is measured, and what all scenarios share."""

import statistics
from collections.abc import Sequence
from typing import Final

import attrs

from benchmarks.report import Bound, Row


@attrs.frozen(kw_only=True)
class Effort:
    """How much is measured: *rounds*, and what part of the full number of prompts in each."""

    rounds: int
    part: float

    def prompts(self, full: int) -> int:
        """Return how many prompts a round has."""
        return max(10, round(full * self.part))


QUICK: Final = Effort(rounds=2, part=0.2)
FULL: Final = Effort(rounds=5, part=1.0)


@attrs.define(eq=False)
class Numbers:
    """Gives each load its own prompts: no two of a run have the same number."""

    _next: int = 1

    def take(self, count: int) -> int:
        """Return the first of *count* numbers that nobody else gets."""
        first, self._next = self._next, self._next + count
        return first


def percentile(values: Sequence[float], part: float) -> float:
    """Return the least of *values* that at least *part* of them (0 to 1) do not exceed; the median for 0.5.

    No value is made up between two that were measured, but for the median of an even number.
    """
    if part == 0.5:
        return statistics.median(values)
    ordered = sorted(values)
    place = -(-len(ordered) * part // 1)  # rounded up: the nearest-rank definition
    return ordered[max(0, int(place) - 1)]


def ours(scenario: str, measure: str, unit: str, values: list[float], *bounds: Bound) -> Row:
    """Make the row of a measure that only comfyd has."""
    return Row(scenario=scenario, measure=measure, unit=unit, values={"comfyd": values}, bounds=tuple(bounds))
