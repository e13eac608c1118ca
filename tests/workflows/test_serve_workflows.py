"""The watched folder: changes are taken up whole, broken files are logged, what hangs stops nothing.

The clock is real: the folder is looked at in threads.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path, PurePosixPath

import pytest
import structlog
import trio
from workflows_kit import MINIMAL, reasons, txt2img, write

from comfyd.workflows import LiveInfo, WorkflowCatalogue, Workflows, serve, serve_workflows
from comfyd.workflows.catalogue import Listing


@asynccontextmanager
async def serving(folder: Path, *, required: bool = True, load_timeout_s: float = 30.0) -> AsyncIterator[Workflows]:
    serve = partial(serve_workflows, folder, required=required, look_every_s=0.01, load_timeout_s=load_timeout_s)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            workflows = await nursery.start(serve)
            await workflows.loaded.wait()
            yield workflows
            nursery.cancel_scope.cancel("the test is over")


async def until(workflows: Workflows, holds: Callable[[WorkflowCatalogue], bool]) -> WorkflowCatalogue:
    while not holds(workflows.current):
        await workflows.wait_changed()
    return workflows.current


def summaries(catalogue: WorkflowCatalogue) -> dict[str, str]:
    return {workflow.route: workflow.summary for workflow in catalogue.workflows}


async def test_the_first_catalogue_is_there_when_it_has_started(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": MINIMAL})
    async with serving(tmp_path) as workflows:
        assert summaries(workflows.current) == {"a": "A summary."}


async def test_files_that_come_change_and_go_are_taken_up(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": MINIMAL})
    async with serving(tmp_path) as workflows:
        write(tmp_path, {"sub/b.json": txt2img()})
        await until(workflows, lambda now: now.get("sub/b") is not None)
        write(tmp_path, {"a.py": MINIMAL.replace("A summary", "Changed")})
        await until(workflows, lambda now: summaries(now) == {"a": "Changed.", "sub/b": "sub/b"})
        (tmp_path / "a.py").unlink()
        await until(workflows, lambda now: summaries(now) == {"sub/b": "sub/b"})


async def test_a_request_under_way_keeps_the_version_it_began_with(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": MINIMAL + "\n\nfrom ._v import V\n", "_v.py": "V = 1"})
    async with serving(tmp_path) as workflows:
        old = workflows.current.get("a")
        assert old is not None
        write(tmp_path, {"_v.py": "V = 22", "a.py": MINIMAL.replace("512", "64")})
        new = (await until(workflows, lambda now: now.get("a") is not old)).get("a")
        assert new is not None
        assert (await old.build({}, LiveInfo())).input == {"width": 512}
        assert (await new.build({}, LiveInfo())).input == {"width": 64}


async def test_a_file_that_breaks_goes_and_the_log_has_its_traceback(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": MINIMAL, "b.py": MINIMAL})
    with structlog.testing.capture_logs() as logs:
        async with serving(tmp_path) as workflows:
            write(tmp_path, {"a.py": "import nothing_like_it"})
            now = await until(workflows, lambda now: bool(now.problems))
            assert list(summaries(now)) == ["b"]
            write(tmp_path, {"c.py": MINIMAL})
            await until(workflows, lambda now: now.get("c") is not None)
            write(tmp_path, {"a.py": MINIMAL})
            await until(workflows, lambda now: now.get("a") is not None)
    broken = [entry for entry in logs if entry["event"] == "workflow.broken"]
    (entry,) = broken  # once, not at each reload
    assert entry["file"] == "a.py"
    assert "nothing_like_it" in entry["reason"]
    assert "Traceback" in entry["traceback"]


async def test_a_folder_that_appears_later_is_read_then(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    async with serving(folder, required=False) as workflows:
        assert workflows.current.problems == ()
        write(folder, {"a.py": MINIMAL})
        await until(workflows, lambda now: now.get("a") is not None)


async def test_a_folder_that_goes_takes_its_workflows_with_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", {"a.py": MINIMAL})
    async with serving(folder) as workflows:
        folder.rename(tmp_path / "g")
        now = await until(workflows, lambda now: now.get("a") is None)
        assert reasons(now) == {".": "the folder does not exist"}
        (tmp_path / "g").rename(folder)
        await until(workflows, lambda now: now.get("a") is not None)


async def test_a_file_that_hangs_when_it_is_read_keeps_the_catalogue_as_it_was(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    folder = write(tmp_path / "f", {"a.py": MINIMAL})
    hanging = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
    try:
        async with serving(folder, load_timeout_s=1.0) as workflows:
            write(folder, {"b.py": hanging + MINIMAL})
            now = await until(workflows, lambda now: bool(now.problems))
            assert "was not read within 1 s" in reasons(now)["."]
            assert list(summaries(now)) == ["a"]
            write(folder, {"b.py": MINIMAL})
            now = await until(workflows, lambda now: now.get("b") is not None)
            assert now.problems == ()
    finally:
        gate.touch()


async def test_a_folder_is_not_read_while_it_is_still_changing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The looks are scripted: a file that grows between two of them, as while it is copied."""
    states = [Listing(files={PurePosixPath("a.txt"): (0, size, 0)}) for size in (0, 1, 2, 3, 3, 4, 4)]
    looks = iter(states)
    read: list[Listing] = []
    ended = trio.Event()

    def look(folder: Path, *, required: bool) -> Listing:
        listing = next(looks, states[-1])
        if listing is states[-1]:
            trio.from_thread.run_sync(ended.set)
        return listing

    def load(folder: Path, listing: Listing, before: WorkflowCatalogue) -> WorkflowCatalogue:
        read.append(listing)
        return WorkflowCatalogue(listing=listing)

    monkeypatch.setattr(serve, "list_folder", look)
    monkeypatch.setattr(serve, "load_listed", load)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve_workflows, tmp_path, look_every_s=0.001))
            await ended.wait()
            while len(read) < 3:  # noqa: ASYNC110  # a task that looks each millisecond is never blocked for long
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel("the test is over")
    assert read == [states[0], states[3], states[5]]


async def test_a_change_is_told_to_everybody_who_waits(tmp_path: Path) -> None:
    told: list[WorkflowCatalogue] = []
    async with serving(tmp_path) as workflows, trio.open_nursery() as nursery:

        async def wait() -> None:
            told.append(await workflows.wait_changed())

        for _ in range(3):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        write(tmp_path, {"a.py": MINIMAL})
    assert [list(summaries(catalogue)) for catalogue in told] == [["a"]] * 3
