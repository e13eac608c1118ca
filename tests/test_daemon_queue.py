"""The whole daemon under callers who leave, hurry, or are too many."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import trio
from daemon_support import Daemon, open_daemon, picture, post, problem, running_daemon, submit, wait_state

LONG_S: Final = 60.0
MAX_QUEUED: Final = 4


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    environ = {"MAX_QUEUED_JOBS": str(MAX_QUEUED), "MAX_QUEUE_DEPTH": "2"}
    with running_daemon(tmp_path_factory.mktemp("queue"), environ=environ) as running:
        yield running


async def test_a_client_that_leaves_while_it_waits_takes_its_job_off_the_queue(daemon: Daemon) -> None:
    async with daemon.client() as client, trio.open_nursery() as nursery:
        running = await submit(daemon, nursery, client, picture(seconds=0.5))
        left = await submit(daemon, nursery, client, picture(seconds=LONG_S))
        next_one = await submit(daemon, nursery, client, picture())
        left.leave()
        ended = await daemon.log.wait("job.ended", job_id=left.job_id)
        assert (ended["state"], ended["attempts"]) == ("cancelled", 0)
        assert (await running.wait()).status_code == 200
        assert (await next_one.wait(within_s=2)).status_code == 200


async def test_a_client_that_leaves_while_its_job_runs_has_it_interrupted_and_the_next_one_runs(daemon: Daemon) -> None:
    async with daemon.client() as client, trio.open_nursery() as nursery:
        left = await submit(daemon, nursery, client, picture(seconds=LONG_S))
        await wait_state(daemon, left.job_id, "running")
        next_one = await submit(daemon, nursery, client, picture())
        left.leave()
        assert (await next_one.wait(within_s=2)).status_code == 200
        assert (await daemon.log.wait("job.ended", job_id=left.job_id))["state"] == "cancelled"
        await daemon.log.wait("engine.output", text="Processing interrupted")


async def test_one_of_two_callers_of_a_job_may_leave_and_the_other_is_answered(daemon: Daemon) -> None:
    graph = picture(seconds=0.7)
    async with daemon.client() as client, trio.open_nursery() as nursery:
        first = await submit(daemon, nursery, client, graph, id="shared")
        second = await submit(daemon, nursery, client, graph, id="shared")
        await daemon.log.wait("job.joined", job_id="shared")
        first.leave()
        assert (await second.wait(within_s=3)).status_code == 200
        assert (await daemon.log.wait("job.ended", job_id="shared"))["state"] == "succeeded"


async def test_a_job_that_runs_out_of_its_time_while_it_runs_is_interrupted(daemon: Daemon) -> None:
    async with daemon.client() as client, trio.open_nursery() as nursery:
        with trio.fail_after(3):
            late = await submit(daemon, nursery, client, picture(seconds=LONG_S), timeout_s=0.4)
            next_one = await submit(daemon, nursery, client, picture())
            told = problem(await late.wait(), 504, "timeout")
            assert "0.4 s" in told["detail"]
            assert "running" in told["detail"]
            assert (await next_one.wait()).status_code == 200


async def test_a_job_that_runs_out_of_its_time_while_it_waits_is_never_run(daemon: Daemon) -> None:
    async with daemon.client() as client, trio.open_nursery() as nursery:
        running = await submit(daemon, nursery, client, picture(seconds=0.8))
        late = await submit(daemon, nursery, client, picture(), timeout_s=0.2)
        told = problem(await late.wait(within_s=0.6), 504, "timeout")
        assert "queued" in told["detail"]
        assert (await running.wait()).status_code == 200
        assert (await daemon.log.wait("job.ended", job_id=late.job_id))["attempts"] == 0


async def test_a_node_that_heeds_no_interrupt_delays_the_next_job_and_not_the_answer(daemon: Daemon) -> None:
    async with daemon.client() as client, trio.open_nursery() as nursery:
        graph = picture(seconds=1.2, uninterruptible=True)
        late = await submit(daemon, nursery, client, graph, timeout_s=0.2)
        next_one = await submit(daemon, nursery, client, picture())
        problem(await late.wait(within_s=0.8), 504, "timeout")
        assert (await next_one.wait(within_s=3)).status_code == 200
        assert late.ended_at < next_one.ended_at


async def test_a_job_of_which_one_node_raises_leaves_nothing_of_what_others_saved(daemon: Daemon) -> None:
    graph = picture()
    graph["7"] = {"class_type": "Sleep", "inputs": {"seconds": 0.3, "uninterruptible": False, "value": ["1", 0]}}
    graph["8"] = {"class_type": "Raise", "inputs": {"message": "no memory left", "enabled": True, "value": ["7", 0]}}
    graph["9"] = {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "never"}}
    async with daemon.client() as client, trio.open_nursery() as nursery:
        posted = await submit(daemon, nursery, client, graph)
        await wait_state(daemon, posted.job_id, "running", node_id="7")
        assert f"output/{posted.job_id}_test_00001_.png" in daemon.job_files(), "nodes that save run first"
        told = problem(await posted.wait(), 500, "execution-failed")
        assert (told["node_id"], told["node_type"]) == ("8", "Raise")
        assert told["exception_message"] == "no memory left"
        await daemon.wait_outputs_removed()


async def test_readiness_tells_of_the_depth_and_prompts_are_taken_all_the_same(daemon: Daemon) -> None:
    async with daemon.client() as client, trio.open_nursery() as nursery:
        running = await submit(daemon, nursery, client, picture(seconds=0.5))
        assert (await client.get("/ready")).status_code == 200
        waiting = await submit(daemon, nursery, client, picture())
        ready = await client.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["reason"] == "the queue depth is 2, the limit is 2"
        beyond = await submit(daemon, nursery, client, picture())
        for posted in (running, waiting, beyond):
            assert (await posted.wait()).status_code == 200
        assert (await client.get("/ready")).status_code == 200


async def test_a_full_queue_refuses_with_a_time_to_come_back_and_takes_again_when_one_has_left(daemon: Daemon) -> None:
    async with daemon.client() as client, trio.open_nursery() as nursery:
        running = await submit(daemon, nursery, client, picture(seconds=0.7))
        await wait_state(daemon, running.job_id, "running")
        waiting = [await submit(daemon, nursery, client, picture()) for _ in range(MAX_QUEUED)]
        refused = await post(client, picture())
        problem(refused, 429, "queue-full")
        assert int(refused.headers["retry-after"]) >= 1
        waiting[-1].leave()
        await daemon.log.wait("job.ended", job_id=waiting[-1].job_id)
        again = await submit(daemon, nursery, client, picture())
        for posted in (running, *waiting[:-1], again):
            assert (await posted.wait()).status_code == 200


async def test_priority_comes_before_arrival_and_arrival_decides_among_equals(daemon: Daemon) -> None:
    async with daemon.client() as client, trio.open_nursery() as nursery:
        running = await submit(daemon, nursery, client, picture(seconds=0.5))
        await wait_state(daemon, running.job_id, "running")
        jobs = {
            name: await submit(daemon, nursery, client, picture(), id=name, priority=priority)
            for name, priority in (("low", -1), ("usual", 0), ("high", 5), ("high-too", 5))
        }
        for posted in jobs.values():
            assert (await posted.wait()).status_code == 200
        await daemon.log.wait("job.ended", job_id="low")
        ended = [event["job_id"] for event in daemon.log.find("job.ended") if event["job_id"] in jobs]
        assert ended == ["high", "high-too", "usual", "low"]


async def test_a_default_time_holds_for_jobs_that_name_none(tmp_path: Path) -> None:
    async with open_daemon(tmp_path, environ={"JOB_TIMEOUT_S": "0.5"}) as daemon, daemon.client() as client:
        problem(await post(client, picture(seconds=LONG_S)), 504, "timeout")
        assert (await post(client, picture(seconds=0.7), timeout_s=10)).status_code == 200
