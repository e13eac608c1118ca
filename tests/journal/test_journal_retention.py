"""What is forgotten, and in what order."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from comfyd.journal import Database, JobRow, WebhookRow, statements
from comfyd.journal.changes import JobChange

NewJob = Callable[..., JobRow]
NewWebhook = Callable[..., WebhookRow]

NOW = 100_000.0
KEEP: dict[str, Any] = {"now": NOW, "jobs_s": 1e9, "dead_s": 1e9, "max_kept_bytes": 1 << 60, "max_jobs": 1 << 60}


@pytest.fixture
def database() -> Iterator[Database]:
    with Database.open_memory() as database:
        yield database


@pytest.fixture
def ended(database: Database, new_job: NewJob, new_webhook: NewWebhook) -> Callable[..., None]:
    """Add a job that ended *age_s* ago, with one webhook for each of *dead_ages_s*: None is pending."""

    def add(number: int, age_s: float, *dead_ages_s: float | None, kept_bytes: int = 0) -> None:
        hooks = tuple(
            new_webhook(100 * number + place, number, dead_at=None if dead_age_s is None else NOW - dead_age_s)
            for place, dead_age_s in enumerate(dead_ages_s)
        )
        with database.transaction() as connection:
            statements.accept(connection, new_job(number))
            change = JobChange(
                job_id=f"job-{number}",
                state="succeeded",
                outcome=b"{}",
                ended_at=NOW - age_s,
                kept_bytes=kept_bytes,
                webhooks=hooks,
            )
            statements.change(connection, change)

    return add


@pytest.fixture
def forget(database: Database) -> Callable[..., list[int]]:
    def forget(limit: int = 256, **limits: Any) -> list[int]:
        with database.transaction() as connection:
            forgotten = statements.forget_expired(connection, **(KEEP | limits), limit=limit)
        assert all(job_id.removeprefix("job-") == key.removeprefix("key-") for job_id, key in forgotten)
        return [int(key.removeprefix("key-")) for _, key in forgotten]

    return forget


Ended = Callable[..., None]
Forget = Callable[..., list[int]]


def test_ended_jobs_are_forgotten_when_they_are_old_the_oldest_first(
    database: Database, ended: Ended, forget: Forget, new_job: NewJob
) -> None:
    for number, age_s in ((1, 50.0), (2, 150.0), (3, 100.0), (4, 101.0)):
        ended(number, age_s)
    with database.transaction() as connection:
        statements.accept(connection, new_job(5, accepted_at=0.0))
    assert forget(jobs_s=100.0) == [2, 4]
    assert forget(jobs_s=100.0) == []
    assert statements.known_keys(database.connection) == {"key-1", "key-3", "key-5"}


def test_a_job_with_a_pending_webhook_is_never_forgotten(ended: Ended, forget: Forget) -> None:
    ended(1, 5000.0, None, kept_bytes=10)
    ended(2, 5000.0, 4000.0, None, kept_bytes=10)
    assert forget(jobs_s=0.0, dead_s=0.0, max_kept_bytes=0, max_jobs=0) == []


def test_dead_letters_keep_their_job_until_the_last_of_them_is_old(
    database: Database, ended: Ended, forget: Forget
) -> None:
    ended(1, 500.0, 400.0, 90.0)
    ended(2, 500.0, 400.0, 300.0)
    ended(3, 500.0)
    ended(4, 50.0, 5000.0)  # its letters are old, but it is not
    assert forget(jobs_s=100.0, dead_s=200.0) == [2, 3]
    assert [row.job_id for row in database.list_webhooks()] == ["job-1", "job-1", "job-4"]


def test_too_many_jobs_are_forgotten_the_oldest_first_and_those_with_dead_letters_last(
    ended: Ended, forget: Forget
) -> None:
    ended(1, 500.0, 1.0)
    ended(2, 300.0)
    ended(3, 400.0)
    ended(4, 600.0, 1.0)
    ended(5, 900.0, None)
    assert forget(max_jobs=5) == []
    assert forget(max_jobs=3) == [3, 2]
    assert forget(max_jobs=2) == [4]
    assert forget(max_jobs=0) == [1]


def test_too_many_bytes_are_freed_from_the_oldest_jobs_that_keep_any(ended: Ended, forget: Forget) -> None:
    ended(1, 500.0)
    ended(2, 400.0, kept_bytes=100)
    ended(3, 300.0, kept_bytes=100)
    ended(4, 600.0, 1.0, kept_bytes=100)
    ended(5, 200.0, kept_bytes=100)
    assert forget(max_kept_bytes=400) == []
    assert forget(max_kept_bytes=399) == [2]
    assert forget(max_kept_bytes=150) == [3, 5]
    assert forget(max_kept_bytes=0) == [4]


def test_what_was_too_old_counts_no_more_against_the_bounds(ended: Ended, forget: Forget) -> None:
    for number in range(1, 5):
        ended(number, 100.0 * number, kept_bytes=10)
    assert forget(jobs_s=250.0, max_jobs=2, max_kept_bytes=20) == [4, 3]


def test_no_more_are_forgotten_at_once_than_asked_for(ended: Ended, forget: Forget) -> None:
    for number in range(1, 10):
        ended(number, 1000.0 - number)
    assert forget(jobs_s=995.5, max_jobs=2, limit=3) == [1, 2, 3]
    assert forget(jobs_s=995.5, max_jobs=2, limit=3) == [4, 5, 6]
    assert forget(jobs_s=995.5, max_jobs=2, limit=3) == [7]
    assert forget(jobs_s=995.5, max_jobs=2, limit=3) == []
