"""A stop in the middle of the work, and receivers that are slow or dead: a later daemon tells what was promised."""

from pathlib import Path

import trio
from daemon_support import picture, wait_state
from fault_kit import WITHIN_S, open_site
from webhook_receiver import Reply, webhook_receiver


async def test_jobs_that_the_drain_time_cut_or_never_began_end_with_the_next_daemon(tmp_path: Path) -> None:
    async with open_site(tmp_path, {"DRAIN_TIMEOUT_S": "0.3"}) as site:
        await site.post("running", picture(seconds=1.5))
        await wait_state(site.daemon, "running", "running", node_id="2")
        for number in range(3):
            await site.post(f"queued-{number}", picture())
        await site.stop()
        assert len(site.daemon.log.find("job.shelved")) == 4
        assert not site.receiver.received
        assert not [file for file in site.daemon.job_files() if "running" in file], "the cut attempt has left a file"

        await site.start(DRAIN_TIMEOUT_S="25")
        views = await site.check()
        assert {job_id: view["attempts"] for job_id, view in views.items()} == {
            "running": 2,
            "queued-0": 1,
            "queued-1": 1,
            "queued-2": 1,
        }
        assert all(len(site.told(job_id)) == 1 for job_id in site.promises)


async def test_dead_and_silent_receivers_delay_nobody_else_and_are_told_once_they_live_whatever_was_killed(
    tmp_path: Path,
) -> None:
    async with (
        webhook_receiver(up=False) as dead,
        webhook_receiver(Reply(never=True)) as silent,
        open_site(tmp_path) as site,
    ):
        for number in range(6):
            await site.post(f"dead-{number}", picture(), receiver=dead)
            await site.post(f"silent-{number}", picture(), receiver=silent)
        await site.post("well", picture())
        await site.wait_told("well")
        await site.daemon.log.wait("webhook.failed", job_id="dead-5")
        await site.daemon.log.wait("job.ended", job_id="silent-5")
        with trio.fail_after(WITHIN_S):
            await silent.wait_received(1)
        await site.wait_owed(12)
        await site.kill()

        silent.default = Reply()
        await dead.go_up()
        await site.start()
        await site.check()
        assert len(site.told("well")) == 1
