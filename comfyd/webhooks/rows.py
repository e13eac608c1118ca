"""Which webhooks the end of a job makes: rows for the journal, committed together with the outcome.

A row says what is to be told, to whom; what it says is built from the job's record when it is sent.
"""

import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from comfyd.errors import Failure
from comfyd.journal import WebhookRow

if TYPE_CHECKING:  # jobs import this module: their package must not be needed to load it
    from comfyd.jobs.model import Outcome

V1_OUTPUT = "v1-output"
V1_FAILED = "v1-failed"
V2 = "v2"


def rows_for(
    job_id: str,
    job_key: str,
    outcome: "Outcome",
    *,
    webhook: str | None,
    webhook_v2: str | None,
    next_sequence: Callable[[], int],
    now: float,
) -> tuple[WebhookRow, ...]:
    """List the webhooks of a job that ended at *now* (unix seconds), v1 first, in the order of their sending.

    v1 has one for each output. Of a success without any output it is told a failure, or it would never hear of its job.
    """

    def row(url: str, kind: str, place: int | None = None) -> WebhookRow:
        return WebhookRow(
            id=_id_of(job_key, kind, place),
            sequence=next_sequence(),
            job_id=job_id,
            job_key=job_key,
            url=url,
            kind=kind,
            place=place,
            created_at=now,
        )

    def rows() -> Iterator[WebhookRow]:
        if webhook is not None:
            if isinstance(outcome, Failure) or not outcome.outputs:
                yield row(webhook, V1_FAILED)
            else:
                for place in range(len(outcome.outputs)):
                    yield row(webhook, V1_OUTPUT, place)
        if webhook_v2 is not None:
            yield row(webhook_v2, V2)

    return tuple(rows())


def iso_ms(at: float) -> str:
    """Write unix seconds as ISO 8601 in UTC with milliseconds, as JavaScript does."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _id_of(job_key: str, kind: str, place: int | None) -> str:
    """The ``webhook-id``: of the event and not of its making.

    A job that is told from memory while the disk is full, and runs again after a kill, is told under the same id, by
    which its receiver knows it.
    """
    return f"msg_{hashlib.blake2b(f'{job_key} {kind} {place}'.encode(), digest_size=16).hexdigest()}"
