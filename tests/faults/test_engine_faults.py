"""The engine killed, cut off or idle under jobs that were promised: each ends once, with the attempts that it cost."""

from pathlib import Path
from typing import Final

import pytest
import trio
from api_support import png
from daemon_support import Graph, command, faulty, picture, wait_state
from fault_kit import WITHIN_S, hook_of, open_site
from fetch_servers import bad_server, when, whole
from webhook_receiver import Reply

RESTART: Final = {"ALWAYS_RESTART_COMFYUI": "true"}
FRAMES: Final = 14
"""Messages of one picture() on the websocket, as ``test_daemon_engine_trouble.py`` lists them."""


async def test_an_engine_killed_with_a_job_at_every_stage_costs_the_running_one_an_attempt_and_the_others_nothing(
    tmp_path: Path,
) -> None:
    released = trio.Event()
    async with (
        bad_server({"/slow.png": when(released, whole(png(), Content_Type="image/png"))}) as inputs,
        open_site(tmp_path, RESTART, cmd=command("flaky_engine")) as site,
    ):
        site.receiver.script(Reply(hold=released), path=hook_of("telling"))
        await site.post("telling", picture())
        await site.wait_told("telling")
        await site.post("running", faulty({"hang": "block", "times": 1}))
        await wait_state(site.daemon, "running", "running", node_id="1")
        await site.post("queued", picture())
        graph = picture()
        graph["1"] = {"class_type": "LoadImage", "inputs": {"image": inputs.url("/slow.png")}}
        await site.post("preparing", graph)
        with trio.fail_after(WITHIN_S):
            await inputs.asked.wait()
        await site.kill_engine()
        released.set()
        views = await site.check()
        assert {job_id: view["attempts"] for job_id, view in views.items()} == {
            "telling": 1,
            "running": 2,
            "queued": 1,
            "preparing": 1,
        }
        assert all(len(site.told(job_id)) == 1 for job_id in site.promises)


async def test_a_job_that_kills_the_engine_is_given_up_with_its_last_words_and_no_restart_brings_it_back(
    tmp_path: Path,
) -> None:
    words = "terminate called after throwing an instance of 'std::bad_alloc'\n"
    async with open_site(tmp_path, RESTART, cmd=command("flaky_engine")) as site:
        await site.post("deadly", faulty({"die": "executing", "say": words}), problem="engine-crashed")
        await site.post("harmless", picture())
        views = await site.check()
        problem = views["deadly"]["problem"]
        assert (problem["attempts"], problem["cause"]) == (2, "signal")
        assert any("std::bad_alloc" in line for line in problem["last_words"])
        assert views["harmless"]["attempts"] == 1
        assert len(site.daemon.log.find("job.quarantined")) == 1
        await site.kill()

        await site.start()
        assert await site.check() == views
        assert len(site.told("deadly")) == 1
        assert not site.daemon.log.find("engine.failed")


async def test_what_a_job_has_cost_its_engines_is_remembered_over_a_kill_of_the_daemon(tmp_path: Path) -> None:
    graph = faulty({"die": "executing", "times": 1, "key": "first"})
    graph["3"]["_meta"] = {"flaky": {"hang": "block", "times": 1, "key": "second"}}
    graph["4"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["1", 0], "filename_prefix": "again"},
        "_meta": {"flaky": {"die": "executing"}},
    }
    async with open_site(tmp_path, RESTART, cmd=command("flaky_engine")) as site:
        await site.post("deadly", graph, problem="engine-crashed")
        await site.daemon.log.wait("job.requeued", job_id="deadly")
        await wait_state(site.daemon, "deadly", "running", node_id="1")
        await site.kill()

        await site.start()
        views = await site.check()
        assert views["deadly"]["problem"]["attempts"] == 3, "died, cut by the daemon's death, died"
        assert len(site.daemon.log.find("engine.failed")) == 1


@pytest.mark.parametrize(("lives", "problem"), [(1, None), (99, "engine-crashed")], ids=["once", "always"])
async def test_an_engine_that_answers_and_runs_nothing_is_replaced_and_its_jobs_have_an_outcome(
    tmp_path: Path, lives: int, problem: str | None
) -> None:
    environ = {**RESTART, "COMFYUI_HANG_TIMEOUT_S": "1", "COMFYUI_STOP_GRACE_S": "1"}
    async with open_site(tmp_path, environ, cmd=command("idle_engine", "--lives", lives)) as site:
        await site.post("first", picture(), problem=problem)
        await site.daemon.log.wait("engine.failed", cause="hung")
        if problem is None:
            await site.post("second", picture())
        views = await site.check()
        assert views["first"]["attempts"] == 2
        if problem is not None:
            assert views["first"]["problem"]["cause"] == "hung"


def cut_after(frame: int) -> Graph:
    return faulty({"drop_after": frame, "key": f"cut-{frame}"})


async def test_promised_jobs_whose_websocket_is_cut_after_each_message_are_told_once(tmp_path: Path) -> None:
    async with open_site(tmp_path, cmd=command("flaky_engine")) as site:
        for frame in range(FRAMES + 1):
            await site.post(f"cut-{frame}", cut_after(frame))
        await site.post("cut-always", faulty({"drop_each": True}))
        views = await site.check()
        assert {view["attempts"] for view in views.values()} == {1}
        assert len(site.daemon.log.find("engine.websocket_lost")) >= FRAMES
        assert all(len(site.told(job_id)) == 1 for job_id in site.promises)
