"""The disk of STATE_DIR full: nothing more is promised, what was promised is told, and it passes by itself."""

import contextlib
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import pytest
from daemon_support import Graph, picture, post, problem, wait_state
from fault_kit import Site, open_site

DISK_BYTES: Final = 8 << 20
"""The journal's schema and log take some 200 KB."""

Full = Callable[[Site], AbstractContextManager[None]]


@contextmanager
def no_space(site: Site) -> Iterator[None]:
    """Let other files take all the space (ENOSPC)."""
    ballast = site.state_dir / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert os.statvfs(site.state_dir).f_bavail == 0
    yield
    ballast.unlink()


@contextmanager
def no_growth(site: Site) -> Iterator[None]:
    """Let no file of the daemon become larger than its journal is now (EFBIG); its engine is not concerned."""
    largest = max(path.stat().st_size for path in site.state_dir.iterdir())
    before = resource.prlimit(site.daemon.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(site.daemon.pid, resource.RLIMIT_FSIZE, (largest, before[1]))
    yield
    resource.prlimit(site.daemon.pid, resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=["no_space", "no_growth"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Full]]:
    """A folder for STATE_DIR, and what fills its disk."""
    if request.param == "no_growth":
        yield tmp_path / "state", no_growth
        return
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to be allowed to mount a tmpfs")
    try:
        yield disk / "state", no_space
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def large(title: str = "x" * (1 << 18)) -> Graph:
    """A graph whose request is larger than what the journal's files have to spare."""
    graph = picture()
    graph["1"]["_meta"] = {"title": title}
    return graph


async def test_while_the_disk_is_full_nothing_is_promised_and_everything_promised_is_told(
    tmp_path: Path, full: tuple[Path, Full]
) -> None:
    state_dir, fill = full
    async with open_site(tmp_path / "site", {"STATE_DIR": str(state_dir)}) as site, site.daemon.client() as client:
        await site.post("before", picture())
        await site.post("across", picture(seconds=1.0))
        await wait_state(site.daemon, "across", "running", node_id="2")
        with fill(site):
            refused = site.promise("refused", large())
            answer = await client.post("/prompt", json=refused.body)
            document = problem(answer, 503, "not-ready")
            assert "the journal cannot be written" in document["detail"]
            assert str(tmp_path) not in answer.text
            assert int(answer.headers["retry-after"]) > 0
            assert (await post(client, picture())).status_code == 200, "who waits for the answer needs no journal"
            await site.wait_told("across")
            assert (await client.get("/ready")).status_code == 200
            assert (await client.get("/jobs/refused")).status_code == 404
        await site.daemon.log.wait("journal.write_recovered")
        await site.post("refused", large())
        views = await site.check()
        assert {job_id: view["attempts"] for job_id, view in views.items()} == dict.fromkeys(site.promises, 1)
        await site.kill()

        await site.start()
        assert await site.check() == views
        assert all(len(site.told(job_id)) == 1 for job_id in site.promises)
