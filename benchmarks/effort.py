"""How much is measured, and what all scenarios share."""

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


def ours(scenario: str, measure: str, unit: str, values: list[float], bound: Bound | None) -> Row:
    """Make the row of a measure that only comfyd has."""
    return Row(scenario=scenario, measure=measure, unit=unit, values={"comfyd": values}, bound=bound)
