"""What the tests of the journal share: rows, an open journal, and the child program."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from comfyd.journal import JobRow, Journal, JournalTimes, JournalUnavailable, WebhookRow, serve_journal

CHILD = Path(__file__).parent / "journal" / "journal_child.py"


@pytest.fixture
def new_job() -> Callable[..., JobRow]:
    """Make the row of job *number*."""

    def make(number: int, **fields: Any) -> JobRow:
        values: dict[str, Any] = {
            "id": f"job-{number}",
            "key": f"key-{number}",
            "sequence": number,
            "accepted_at": 1000.0 + number,
            "deadline_at": None,
            "digest": b"\x00digest",
            "request": b'{"prompt":{}}',
        }
        return JobRow(**(values | fields))

    return make


@pytest.fixture
def new_webhook() -> Callable[..., WebhookRow]:
    """Make the row of webhook *number* of job *job*."""

    def make(number: int, job: int, **fields: Any) -> WebhookRow:
        values: dict[str, Any] = {
            "id": f"webhook-{number}",
            "sequence": number,
            "job_id": f"job-{job}",
            "job_key": f"key-{job}",
            "url": "https://receiver.example/hook",
            "kind": "v2",
            "created_at": 2000.0,
        }
        return WebhookRow(**(values | fields))

    return make


@pytest.fixture
def opened() -> Callable[..., AbstractAsyncContextManager[Journal]]:
    """Serve a journal for as long as the block lasts, and fail what hangs."""

    @asynccontextmanager
    async def serve(folder: Path | None, times: JournalTimes | None = None) -> AsyncIterator[Journal]:
        with trio.fail_after(25):
            async with trio.open_nursery() as nursery:
                yield await nursery.start(partial(serve_journal, folder, times=times))
                nursery.cancel_scope.cancel()

    return serve


@pytest.fixture
def accept() -> Callable[[Journal, JobRow], Awaitable[JournalUnavailable | None]]:
    """Accept a row and wait for the journal's word."""

    async def accept(journal: Journal, row: JobRow) -> JournalUnavailable | None:
        told = trio.Event()
        answers: list[JournalUnavailable | None] = []

        def done(answer: JournalUnavailable | None) -> None:
            answers.append(answer)
            told.set()

        journal.accept_nowait(row, done)
        await told.wait()
        return answers[0]

    return accept


@pytest.fixture
def end() -> Callable[..., Awaitable[None]]:
    """End a job and wait until the journal has taken note."""

    async def end(journal: Journal, number: int, **fields: Any) -> None:
        told = trio.Event()
        values: dict[str, Any] = {
            "state": "succeeded",
            "outcome": b'{"ok":true}',
            "ended_at": 5000.0,
            "kept_bytes": 0,
            "webhooks": (),
        }
        journal.job_ended(f"job-{number}", **(values | fields), done=told.set)
        await told.wait()

    return end


@pytest.fixture
def child() -> Callable[..., Any]:
    """Run one command of the child program to its end, and return what it printed as JSON."""

    def run(*arguments: object) -> Any:
        command = [sys.executable, "-W", "error", str(CHILD), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
