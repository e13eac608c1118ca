"""SIGKILL of the daemon with jobs at every stage of their way: nothing promised is lost, told twice, or left behind."""

import contextlib
import signal
import sqlite3
from pathlib import Path
from typing import Final

import pytest
import trio
from api_support import b64, png
from daemon_support import Graph, command, faulty, picture, wait_state
from fault_kit import WITHIN_S, Site, hook_of, open_site
from fetch_servers import bad_server, in_turn, then_hang, whole
from storage_support import NO_SETTINGS, Asked, Fault, Hang, Peer, open_proxy
from webhook_receiver import Reply

JPEG: Final = {"format": "jpeg", "options": {"quality": 50}}


def loaded(url: str) -> Graph:
    """A picture that comes from *url*."""
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": url}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "loaded"}},
    }


def saved_before(seconds: float) -> Graph:
    """A graph that has saved a picture when node 8 begins, which takes so long and saves nothing."""
    graph = picture()
    graph["8"] = {"class_type": "Sleep", "inputs": {"seconds": seconds, "value": ["1", 0]}}
    graph["9"] = {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}}
    return graph


async def test_a_daemon_killed_with_a_job_at_every_stage_keeps_each_promise_once(
    tmp_path: Path, s3_server: Peer
) -> None:
    uploading, released = trio.Event(), trio.Event()
    puts: list[Asked] = []

    def storage(asked: Asked) -> Fault | None:
        if asked.method != "PUT":
            return None
        puts.append(asked)
        return Hang(reached=uploading) if len(puts) == 1 else None

    with s3_server.client() as s3:
        s3.create_bucket(Bucket="killed")
    async with (
        open_proxy(s3_server, storage) as (_, peer),
        bad_server({"/slow.png": in_turn(then_hang(), whole(png(), Content_Type="image/png"))}) as inputs,
        open_site(tmp_path, NO_SETTINGS | peer.environment(), cmd=command("flaky_engine")) as site,
    ):
        site.receiver.script(Reply(status=410), path=hook_of("dead-letter"))
        site.receiver.script(Reply(status=500, headers={"retry-after": "60"}), path=hook_of("back-off"))
        site.receiver.script(Reply(never=True), path=hook_of("telling"))
        site.receiver.script(Reply(hold=released), path=hook_of("told"))
        await site.post("dead-letter", picture(), given_up=True)
        await site.post("back-off", picture())
        await site.post("telling", picture(), convert_output=JPEG)
        await site.post("uploading", picture(), s3={"bucket": "killed", "prefix": "a/"})
        await site.post("told", picture())
        for job_id in ("dead-letter", "back-off", "telling", "told"):
            await site.wait_told(job_id)
        await site.daemon.log.wait("webhook.dead", job_id="dead-letter")
        await site.daemon.log.wait("webhook.failed", job_id="back-off")
        with trio.fail_after(WITHIN_S):
            await uploading.wait()
        # The engine hangs under this one, the first time.
        await site.post("running", faulty({"hang": "block", "times": 1}))
        await wait_state(site.daemon, "running", "running", node_id="1")
        await site.post("preparing", loaded(inputs.url("/slow.png")))
        await site.post("brought", loaded(b64(png(colour=(1, 2, 3)))))
        with trio.fail_after(WITHIN_S):
            await inputs.asked.wait()
        await wait_state(site.daemon, "brought", "queued")
        await site.post("queued", picture(), hook="webhook")
        await site.post("accepted", picture())
        # A stopped daemon cannot read the answer to this one before it is killed.
        site.daemon.signal(signal.SIGSTOP)
        released.set()
        with trio.fail_after(WITHIN_S):
            await site.receiver.wait_until(lambda: site.told("told")[0].status == 200)
        await site.kill()

        await site.start()
        views = await site.check()
        attempts = {job_id: view["attempts"] for job_id, view in views.items()}
        assert attempts == {**dict.fromkeys(site.promises, 1), "running": 2}, "only what was cut is run again"
        times = {job_id: len(site.told(job_id)) for job_id in site.promises}
        assert times == {**dict.fromkeys(site.promises, 1), "back-off": 2, "telling": 2, "told": 2}
        assert len(puts) == 2


def _made(site: Site) -> bool:
    """Whether the journal knows what a job has made."""
    uri = f"file:{site.state_dir / 'journal.sqlite3'}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=WITHIN_S)) as journal:
        return bool(journal.execute("SELECT 1 FROM jobs WHERE made IS NOT NULL").fetchone())


async def test_a_daemon_killed_while_it_converts_converts_again(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        await site.post("converted", picture(size_px=2048), convert_output={"format": "avif"})
        with trio.fail_after(WITHIN_S):
            # A folder cannot be waited for without inotify.
            while not list(site.daemon.output_dir.glob("comfyd/*/*/converted/*")):  # noqa: ASYNC110
                await trio.sleep(0.005)
            # Before that is on disk, a kill makes it run once more, which is right as well.
            while not _made(site):  # noqa: ASYNC110  # SQLite tells nobody of a commit
                await trio.sleep(0.005)
        await site.kill()
        assert list(site.daemon.output_dir.glob("comfyd/*/*/converted/*")), "what was killed has left something"

        await site.start()
        views = await site.check()
        assert views["converted"]["attempts"] == 1


@pytest.mark.parametrize("end", ["cancelled", "uploaded", "converted"])
async def test_a_daemon_killed_just_as_a_job_ends_leaves_no_file_of_it(
    tmp_path: Path, s3_server: Peer, end: str
) -> None:
    with s3_server.client() as s3:
        s3.create_bucket(Bucket="ends")
    async with open_site(tmp_path, NO_SETTINGS | s3_server.environment()) as site:
        match end:
            case "uploaded":
                await site.post(end, picture(), s3={"bucket": "ends", "prefix": "a/"})
            case "converted":
                await site.post(end, picture(), convert_output=JPEG)
            case "cancelled":
                await site.post(end, saved_before(60.0), problem="job-cancelled")
                await wait_state(site.daemon, end, "running", node_id="8")
                async with site.daemon.client() as client:
                    assert (await client.delete(f"/jobs/{end}")).json()["state"] == "cancelled"
        await site.daemon.log.wait("job.ended", job_id=end)
        await site.kill()
        left = site.daemon.job_files()

        await site.start()
        views = await site.check()
        assert views[end]["attempts"] == 1, f"it had ended, and had left {left}"


async def test_what_an_attempt_saved_before_its_daemon_was_killed_is_not_delivered_and_goes(
    tmp_path: Path,
) -> None:
    async with open_site(tmp_path) as site:
        await site.post("cut", saved_before(1.5))
        await wait_state(site.daemon, "cut", "running", node_id="8")
        await site.kill()
        assert [file for file in site.daemon.job_files() if file.startswith("output/cut_")]

        await site.start()
        views = await site.check()
        assert views["cut"]["attempts"] == 2
        assert len(views["cut"]["outputs"]) == 1


async def test_a_job_that_runs_whenever_the_daemon_is_killed_is_given_up_and_not_run_again(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        await site.post("cause", picture(seconds=60.0), problem="engine-crashed")
        await wait_state(site.daemon, "cause", "running", node_id="2")
        await site.kill()
        with contextlib.closing(sqlite3.connect(site.state_dir / "journal.sqlite3")) as journal, journal:
            assert journal.execute("UPDATE jobs SET daemon_deaths = 4").rowcount == 1  # as if it was the fifth time
        await site.start()
        views = await site.check()
        assert "comfyd was killed 5 times" in views["cause"]["problem"]["detail"]
        await site.kill()

        await site.start()
        assert await site.check() == views
        assert len(site.told("cause")) == 1
