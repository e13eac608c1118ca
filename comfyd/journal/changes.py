"""What is to be changed in the journal, and what of it is not on disk yet.

Every change says what a row is to become, not by how much it differs, so a later one of the same row can take in an
earlier one, and writing one twice does no harm. That bounds what an outage keeps in memory: one change for each
job accepted before it, and one for each of their webhooks.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Self

import attrs

from comfyd.journal.rows import JobRow, WebhookRow

__all__ = ["Change", "JobChange", "Unsaved", "WebhookChange"]


@attrs.frozen(kw_only=True)
class JobChange:
    """What a job's row is to become. None in *attempts* and *crashes* keeps what the row has; the rest is as given.

    With *ended_at* the request goes, *webhooks* are added, and later changes of the job have no effect.
    """

    job_id: str
    state: str
    attempts: int | None = None
    crashes: int | None = None
    made: bytes | None = attrs.field(default=None, repr=False)
    outcome: bytes | None = attrs.field(default=None, repr=False)
    ended_at: float | None = None
    kept_bytes: int = 0
    webhooks: tuple[WebhookRow, ...] = ()

    def after(self, earlier: "JobChange") -> "JobChange":
        """Return one change that does what *earlier* and then this one do."""
        if earlier.ended_at is not None:
            return earlier
        return attrs.evolve(
            self,
            attempts=earlier.attempts if self.attempts is None else self.attempts,
            crashes=earlier.crashes if self.crashes is None else self.crashes,
        )

    def apply_to(self, row: JobRow) -> JobRow:
        """Return what *row* is to become."""
        if row.ended_at is not None:
            return row
        return attrs.evolve(
            row,
            state=self.state,
            attempts=row.attempts if self.attempts is None else self.attempts,
            crashes=row.crashes if self.crashes is None else self.crashes,
            made=self.made,
            outcome=self.outcome,
            ended_at=self.ended_at,
            kept_bytes=self.kept_bytes,
            request=row.request if self.ended_at is None else None,
        )


@attrs.frozen(kw_only=True)
class WebhookChange:
    """What a webhook's row is to become; *taken*: the row goes, and the other fields say nothing."""

    webhook_id: str
    taken: bool = False
    attempts: int = 0
    next_at: float | None = None
    dead_at: float | None = None
    last_error: str = ""

    def apply_to(self, row: WebhookRow) -> WebhookRow | None:
        """Return what *row* is to become, None if it goes."""
        if self.taken:
            return None
        return attrs.evolve(
            row, attempts=self.attempts, next_at=self.next_at, dead_at=self.dead_at, last_error=self.last_error
        )


Change = JobChange | WebhookChange


@attrs.define(eq=False)
class Unsaved:
    """The changes that are not on disk, at most one per row. Those of jobs come first, as they add webhooks."""

    jobs: dict[str, JobChange] = attrs.field(factory=dict)
    webhooks: dict[str, WebhookChange] = attrs.field(factory=dict)

    def __len__(self) -> int:
        return len(self.jobs) + len(self.webhooks)

    def and_then(self, changes: Iterable[Change]) -> Self:
        """Return these and *changes*, which came later."""
        both = type(self)(dict(self.jobs), dict(self.webhooks))
        for change in changes:
            if isinstance(change, WebhookChange):
                both.webhooks[change.webhook_id] = change
            else:
                earlier = both.jobs.get(change.job_id)
                both.jobs[change.job_id] = change if earlier is None else change.after(earlier)
        return both

    def in_order(self) -> Iterator[Change]:
        """Yield the changes as they can be written."""
        yield from self.jobs.values()
        yield from self.webhooks.values()

    @property
    def erases(self) -> bool:
        """Whether something goes that may hold secrets: a request, or the URL of a webhook."""
        return any(job.ended_at is not None for job in self.jobs.values()) or any(
            webhook.taken for webhook in self.webhooks.values()
        )

    def apply_to_job(self, row: JobRow) -> JobRow:
        """Return *row* as it will be."""
        change = self.jobs.get(row.id)
        return row if change is None else change.apply_to(row)

    def apply_to_webhooks(self, rows: Iterable[WebhookRow], alive: Collection[str]) -> list[WebhookRow]:
        """Return all webhooks as they will be, by sequence.

        *rows* are all that are on disk, *alive* the ids of the jobs that have not ended there: only these can end.
        """
        known = {row.id: row for row in rows}
        for job in self.jobs.values():
            if job.job_id in alive:
                known.update((row.id, row) for row in job.webhooks)
        for webhook_id, change in self.webhooks.items():
            before = known.pop(webhook_id, None)
            after = None if before is None else change.apply_to(before)
            if after is not None:
                known[webhook_id] = after
        return sorted(known.values(), key=lambda row: row.sequence)
