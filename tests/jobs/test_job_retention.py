"""What is kept of ended jobs goes when its time has come, or when its caller says so."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from comfyd.config import JobsConfig
from comfyd.jobs import retention as retention_module
from comfyd.jobs.retention import Retention
from comfyd.journal import Journal
from comfyd.media.kept import KeptOutputs


@pytest.fixture
async def journal(opened: Callable[..., AbstractAsyncContextManager[Journal]]) -> AsyncIterator[Journal]:
    async with opened(None) as journal:
        yield journal


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[KeptOutputs]:
    kept = KeptOutputs.of_journal(tmp_path, "a-journal", durable=True)
    yield kept
    kept.close()


def keep(kept: KeptOutputs, key: str) -> Path:
    """Keep an output of the job *key*; return where it is."""
    folder = kept.folder(key)
    folder.mkdir(parents=True)
    (folder / "00000.png").write_bytes(b"a picture")
    return folder


async def test_what_a_caller_deleted_is_gone_when_the_daemon_has_stopped(journal: Journal, kept: KeptOutputs) -> None:
    retention = Retention(config=JobsConfig(), journal=journal, kept=kept)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(retention.serve)
        await trio.testing.wait_all_tasks_blocked()  # what nobody knows was swept
        folders = [keep(kept, key) for key in ("a", "b")]
        retention.remove(["a"])
        retention.remove(["b"])
        nursery.cancel_scope.cancel("the daemon stops")
    assert [folder.exists() for folder in folders] == [False, False]


async def test_what_is_deleted_while_it_looks_for_what_is_old_is_not_forgotten(
    journal: Journal, kept: KeptOutputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_module, "_EVERY_S", 0.0)  # it looks all the time, and removing is always cut off
    retention = Retention(config=JobsConfig(), journal=journal, kept=kept)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(retention.serve)
        for number in range(50):
            folder = keep(kept, f"job-{number}")
            retention.remove([folder.name])
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel("the daemon stops")
    assert kept.keys() == frozenset()
