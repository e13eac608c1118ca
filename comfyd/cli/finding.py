"""What ``comfyd doctor`` finds: one line for each thing that it looked at."""

from enum import Enum

import attrs


class Verdict(Enum):
    """How a thing is. Only FAILED counts for the exit code."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    FAILED = "FAILED"


@attrs.frozen(kw_only=True)
class Finding:
    """One thing that was looked at: *what* was found, and *advice* on what to do about it. Neither holds a secret."""

    check: str
    verdict: Verdict
    what: str
    advice: str = ""


def fine(check: str, what: str) -> Finding:
    """It is as it should be."""
    return Finding(check=check, verdict=Verdict.OK, what=what)


def skipped(check: str, what: str) -> Finding:
    """It was not looked at; *what* says why."""
    return Finding(check=check, verdict=Verdict.SKIPPED, what=what)


def doubtful(check: str, what: str, advice: str = "") -> Finding:
    """Comfyd works, but not as well as it might, or not for long."""
    return Finding(check=check, verdict=Verdict.WARNING, what=what, advice=advice)


def failed(check: str, what: str, advice: str = "") -> Finding:
    """Comfyd does not start, or will not do its work."""
    return Finding(check=check, verdict=Verdict.FAILED, what=what, advice=advice)
