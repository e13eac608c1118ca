"""How long a job takes, measured, so that a caller who must come back is told when."""

from typing import Final

import attrs

_WEIGHT: Final = 0.2
"""Of the newest job in the mean: some ten jobs back still count."""
_UNKNOWN_S: Final = 5.0
"""Said before the first job has ended."""
_MIN_S: Final = 1.0
_MAX_S: Final = 3600.0


@attrs.define
class ServiceTime:
    """A moving mean of the seconds that an engine spends on a job."""

    mean_s: float | None = None
    """None before the first job has ended."""

    def measured(self, seconds: float) -> None:
        """A job has ended."""
        self.mean_s = seconds if self.mean_s is None else self.mean_s + _WEIGHT * (seconds - self.mean_s)

    def retry_after_s(self, jobs_before: int) -> float:
        """In how many seconds so many jobs will have been served; between a second and an hour."""
        mean_s = _UNKNOWN_S if self.mean_s is None else self.mean_s
        return min(_MAX_S, max(_MIN_S, mean_s * max(1, jobs_before)))
