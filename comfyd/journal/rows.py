"""The values that the journal keeps and gives, and what it raises. Bytes are the caller's: the journal reads none."""

import attrs

from comfyd.errors import ComfydError, StartupFailed

__all__ = ["JobFilter", "JobIdTaken", "JobRow", "JournalLocked", "JournalUnavailable", "WebhookRow"]


@attrs.frozen(kw_only=True)
class JobRow:
    """One accepted job. Moments are unix seconds, as a row outlives the daemon's own clock.

    *id* is the caller's, unique among the rows; *key* is never used twice. *sequence* is the order of arrival.
    *digest* tells equal requests. *workflow* is empty for ``/prompt``. *request*, *made* (what the graph made, once it
    has run) and *outcome* (once ended) are JSON; *request* is None once the job has ended, as it may hold secrets.
    *state* is free text from the job model. *kept_bytes* is the size of the files kept for the job.
    """

    id: str
    key: str
    sequence: int
    accepted_at: float
    deadline_at: float | None
    digest: bytes
    workflow: str = ""
    request: bytes | None = attrs.field(default=None, repr=False)
    state: str = "accepted"
    attempts: int = 0
    crashes: int = 0
    daemon_deaths: int = 0
    made: bytes | None = attrs.field(default=None, repr=False)
    outcome: bytes | None = attrs.field(default=None, repr=False)
    ended_at: float | None = None
    kept_bytes: int = 0


@attrs.frozen(kw_only=True)
class WebhookRow:
    """One webhook that is owed to a receiver, or was given up. Moments are unix seconds.

    *id* is the ``webhook-id`` header: unique per event, the same on every attempt. *sequence* is the order of creation.
    *kind* is ``v1-output``, ``v1-failed`` or ``v2``; *place* tells which output. *next_at* is the next attempt's
    moment. *dead_at* is when it was given up; None is pending.
    """

    id: str
    sequence: int
    job_id: str
    job_key: str
    url: str = attrs.field(repr=False)
    kind: str
    place: int | None = None
    created_at: float
    attempts: int = 0
    next_at: float | None = None
    dead_at: float | None = None
    last_error: str = ""


@attrs.frozen(kw_only=True)
class JobFilter:
    """Which jobs to list. Empty *states* are all; *before* is a sequence, itself not listed."""

    states: frozenset[str] = frozenset()
    workflow: str | None = None
    before: int | None = None
    limit: int = 50


class JournalUnavailable(ComfydError):
    """The journal could not be written or read: disk full, read-only, broken. The text has no paths."""


class JobIdTaken(JournalUnavailable):
    """Another row has this id (or key). Not an outage: trying again does not help."""

    def __init__(self) -> None:
        super().__init__("the journal has a job with this id")


class JournalLocked(StartupFailed):
    """Another daemon keeps its journal in the same folder."""

    def __init__(self) -> None:
        super().__init__("another comfyd runs on the same STATE_DIR; give each daemon a folder of its own")
