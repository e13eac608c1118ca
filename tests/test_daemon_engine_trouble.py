"""The whole daemon over an engine that dies, forgets, talks nonsense or hangs up: every caller gets one true answer."""

import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from daemon_support import (
    Daemon,
    command,
    faulty,
    open_daemon,
    picture,
    post,
    problem,
    raising,
    running_daemon,
    submit,
    wait_state,
)

RESTART: Final = {"ALWAYS_RESTART_COMFYUI": "true"}
LONG_S: Final = 60.0

# What the engine says of one picture() from its POST to its end, in order.
MESSAGES: Final = (
    *("status", "status", "execution_start", "execution_cached"),  # the queue: one waits, none waits
    *("progress_state", "executing", "progress_state"),  # of node 1
    *("progress_state", "executing", "executed", "progress_state"),  # of node 3, which has something to show
    *("execution_success", "status", "end"),
)


# --- the engine dies, and is not to be restarted


async def test_when_the_engine_is_killed_every_caller_is_told_and_the_daemon_exits_1(tmp_path: Path) -> None:
    async with (
        open_daemon(tmp_path, cmd=command("flaky_engine", "--grandchildren")) as daemon,
        daemon.client() as client,
        trio.open_nursery() as nursery,
    ):
        running = await submit(daemon, nursery, client, picture(seconds=LONG_S))
        await wait_state(daemon, running.job_id, "running")
        waiting = [await submit(daemon, nursery, client, picture()) for _ in range(2)]
        os.kill(daemon.engine_pid, signal.SIGKILL)
        for posted in (running, *waiting):
            told = problem(await posted.wait(within_s=5), 502, "engine-crashed")
            assert "signal 9" in told["detail"]
        assert await daemon.wait_exit(within_s=5) == 1
        assert daemon.log.find("daemon.stopping")[0]["reason"] == "the engine was ended by signal 9"
        assert len(daemon.log.find("job.ended")) == 3


async def test_an_engine_that_exits_with_0_under_a_job_is_a_crash_too(tmp_path: Path) -> None:
    async with open_daemon(tmp_path, cmd=command("flaky_engine")) as daemon, daemon.client() as client:
        answer = await post(client, faulty({"die": "execution_start", "how": "0"}))
        problem(answer, 502, "engine-crashed")
        assert await daemon.wait_exit(within_s=5) == 1
        assert daemon.log.find("engine.gave_up")[0]["reason"] == "the engine exited with code 0"


async def test_an_engine_that_exits_when_idle_ends_the_daemon_but_not_the_answer_before(tmp_path: Path) -> None:
    async with open_daemon(tmp_path, cmd=command("flaky_engine")) as daemon, daemon.client() as client:
        assert (await post(client, faulty({"die": "end", "how": "0"}))).status_code == 200
        assert await daemon.wait_exit(within_s=5) == 1


async def test_an_engine_that_dies_while_the_daemon_stops_ends_the_wait_for_it(tmp_path: Path) -> None:
    async with (
        open_daemon(tmp_path, cmd=command("flaky_engine")) as daemon,
        daemon.client() as client,
        trio.open_nursery() as nursery,
    ):
        running = await submit(daemon, nursery, client, picture(seconds=LONG_S))
        await wait_state(daemon, running.job_id, "running")
        daemon.signal()
        await daemon.log.wait("daemon.stopping")
        os.kill(daemon.engine_pid, signal.SIGKILL)
        problem(await running.wait(within_s=5), 502, "engine-crashed")
        assert await daemon.wait_exit(within_s=5) == 0, "it stopped as it was asked to"


async def test_when_the_engines_guard_is_killed_the_engine_ends_with_it_and_callers_are_told(tmp_path: Path) -> None:
    async with (
        open_daemon(tmp_path, cmd=command("flaky_engine", "--grandchildren", "--ignore-sigterm")) as daemon,
        daemon.client() as client,
        trio.open_nursery() as nursery,
    ):
        running = await submit(daemon, nursery, client, picture(seconds=LONG_S))
        await wait_state(daemon, running.job_id, "running")
        (guard,) = [pid for pid, line in daemon.processes().items() if "guard.py" in line]
        os.kill(guard, signal.SIGKILL)
        problem(await running.wait(within_s=5), 502, "engine-crashed")
        assert await daemon.wait_exit(within_s=5) == 1


# --- the engine dies, and is restarted


@pytest.mark.parametrize("when", ["unread", "taken", "execution_start", "executed"])
async def test_a_restarted_engine_runs_the_job_again_and_those_that_waited_in_their_order(
    tmp_path: Path, when: str
) -> None:
    async with (
        open_daemon(tmp_path, cmd=command("flaky_engine"), environ=RESTART) as daemon,
        daemon.client() as client,
        trio.open_nursery() as nursery,
    ):
        graphs = [faulty({"die": when, "times": 1}), picture(), picture()]
        jobs = [await submit(daemon, nursery, client, graph) for graph in graphs]
        await daemon.log.wait("engine.failed", restart_in_s=0.5)
        ready, health = await client.get("/ready"), await client.get("/health")
        assert (ready.status_code, health.status_code) == (503, 200)
        assert "the engine is down" in ready.json()["reason"]

        answers = [await job.wait() for job in jobs]
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert [answer.json()["stats"]["attempts"] for answer in answers] == [2, 1, 1]
        assert [len(answer.json()["images"]) for answer in answers] == [1, 1, 1]
        await daemon.log.wait("job.ended", count=3)
        ended = [event["job_id"] for event in daemon.log.find("job.ended")]
        assert ended == [job.job_id for job in jobs]
        assert (await client.get("/ready")).status_code == 200


async def test_a_prompt_that_kills_the_engine_each_time_is_given_up_and_the_others_succeed(tmp_path: Path) -> None:
    async with (
        open_daemon(tmp_path, cmd=command("flaky_engine"), environ=RESTART) as daemon,
        daemon.client() as client,
        trio.open_nursery() as nursery,
    ):
        before = await submit(daemon, nursery, client, picture(seconds=0.3))
        poison = await submit(daemon, nursery, client, faulty({"die": "execution_start"}))
        after = await submit(daemon, nursery, client, picture())
        told = problem(await poison.wait(), 502, "engine-crashed")
        assert told["attempts"] == 2
        assert "2 times" in told["detail"]
        assert (await before.wait()).json()["stats"]["attempts"] == 1
        assert (await after.wait()).json()["stats"]["attempts"] == 1


async def test_an_engine_that_fails_too_often_ends_the_daemon_and_every_caller_is_told(tmp_path: Path) -> None:
    environ = {**RESTART, "COMFYUI_RESTART_LIMIT": "1", "JOB_MAX_ATTEMPTS": "10"}
    async with (
        open_daemon(tmp_path, cmd=command("flaky_engine"), environ=environ) as daemon,
        daemon.client() as client,
        trio.open_nursery() as nursery,
    ):
        poison = await submit(daemon, nursery, client, faulty({"die": "execution_start"}))
        waiting = await submit(daemon, nursery, client, picture())
        for posted in (poison, waiting):
            problem(await posted.wait(), 502, "engine-crashed")
        assert await daemon.wait_exit(within_s=5) == 1
        assert daemon.log.find("engine.gave_up")[0]["reason"] == "the engine failed 2 times within 600 s"


async def test_an_engine_that_dies_under_its_warm_up_is_restarted_and_warmed_up_again(tmp_path: Path) -> None:
    warmup = tmp_path / "warmup.json"
    warmup.write_text(json.dumps(faulty({"die": "execution_start", "times": 1})))
    environ = {**RESTART, "WARMUP_PROMPT_FILE": str(warmup)}
    async with open_daemon(tmp_path, ready=False, cmd=command("flaky_engine"), environ=environ) as daemon:
        await daemon.log.wait("engine.warm")
        assert len(daemon.log.find("engine.started")) == 2
        async with daemon.client() as client:
            assert (await post(client, picture())).status_code == 200


async def test_while_the_engine_is_down_prompts_are_taken_and_callers_may_leave(tmp_path: Path) -> None:
    async with (
        open_daemon(tmp_path, cmd=command("flaky_engine"), environ=RESTART) as daemon,
        daemon.client() as client,
        trio.open_nursery() as nursery,
    ):
        os.kill(daemon.engine_pid, signal.SIGKILL)
        await daemon.log.wait("engine.failed")
        patient, hurried, left = [
            await submit(daemon, nursery, client, picture(), **fields) for fields in ({}, {"timeout_s": 0.1}, {})
        ]
        left.leave()
        ended = await daemon.log.wait("job.ended", job_id=left.job_id)
        assert (ended["state"], ended["attempts"]) == ("cancelled", 0)
        problem(await hurried.wait(), 504, "timeout")
        assert (await patient.wait()).json()["stats"]["attempts"] == 1


# --- the engine lives, but is of no use any more

WORKER_DIED: Final = (
    "Exception in thread Thread-5 (prompt_worker):\n"
    "Traceback (most recent call last):\n"
    '  File "/srv/ComfyUI/main.py", line 200, in prompt_worker\n'
    "KeyError: 'inputs'\n"
)
CUDA_BROKEN: Final = (
    "CUDA error: an illegal memory access was encountered\n"
    "CUDA kernel errors might be asynchronously reported at some other API call"
)


async def test_a_worker_thread_that_dies_costs_a_restart_and_one_more_attempt(tmp_path: Path) -> None:
    async with (
        open_daemon(tmp_path, cmd=command("flaky_engine"), environ=RESTART) as daemon,
        daemon.client() as client,
        trio.open_nursery() as nursery,
    ):
        # Its worker stops at node 2, which no interrupt reaches, as a dead one does.
        graph = faulty({"say": WORKER_DIED, "times": 1}, seconds=2.5, uninterruptible=True)
        stuck = await submit(daemon, nursery, client, graph)
        waiting = await submit(daemon, nursery, client, picture())
        await daemon.log.wait(
            "engine.worker_died", timeout_s=5, reason="the engine's worker thread died: KeyError: 'inputs'"
        )
        assert (await stuck.wait()).json()["stats"]["attempts"] == 2
        assert (await waiting.wait()).json()["stats"]["attempts"] == 1
        assert daemon.log.find("engine.failed")[0]["cause"] == "worker-died"


async def test_a_broken_gpu_context_is_the_engines_failure_and_is_cured_by_a_restart(tmp_path: Path) -> None:
    async with (
        open_daemon(tmp_path, cmd=command("flaky_engine"), environ=RESTART) as daemon,
        daemon.client() as client,
    ):
        told = problem(await post(client, raising(CUDA_BROKEN)), 502, "engine-crashed")
        assert told["attempts"] == 2
        assert "an illegal memory access was encountered" in told["detail"]
        assert "asynchronously" not in told["detail"], "the first line says it"
        assert (await post(client, picture())).status_code == 200
        await daemon.log.wait("engine.failed", count=2, cause="cuda-broken")
        assert len(daemon.log.find("engine.started")) == 3


async def test_out_of_memory_on_the_gpu_is_the_jobs_failure_and_the_engine_goes_on(tmp_path: Path) -> None:
    async with (
        open_daemon(tmp_path, cmd=command("flaky_engine"), environ=RESTART) as daemon,
        daemon.client() as client,
    ):
        message = "CUDA out of memory. Tried to allocate 20.00 GiB."
        told = problem(await post(client, raising(message)), 500, "execution-failed")
        assert message in told["detail"]
        assert (await post(client, picture())).status_code == 200
        assert len(daemon.log.find("engine.started")) == 1


async def test_what_ended_an_engine_is_told_by_its_cause(tmp_path: Path) -> None:
    async with (
        open_daemon(tmp_path, cmd=command("flaky_engine"), environ=RESTART) as daemon,
        daemon.client() as client,
    ):
        for how, cause in (("3", "exited"), ("kill", "signal")):
            answer = await post(client, faulty({"die": "execution_start", "how": how, "times": 1, "key": cause}))
            assert answer.json()["stats"]["attempts"] == 2
            await daemon.log.wait("engine.failed", cause=cause)


# --- the engine lives, but cannot be relied on


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all that an engine may survive. It is not to be restarted, so each crash would be noticed."""
    with running_daemon(tmp_path_factory.mktemp("flaky"), cmd=command("flaky_engine")) as running:
        yield running
        assert len(running.log.find("engine.started")) == 1


_numbers = itertools.count(1)


async def run_faulty(daemon: Daemon, fault: dict[str, Any], *, attempts: int = 1) -> None:
    """Run a prompt with *fault* to its right answer, told once."""
    job_id = f"faulty-{next(_numbers)}"
    async with daemon.client() as client:
        with trio.fail_after(5):
            answer = await post(client, faulty({"key": job_id, **fault}), id=job_id)
        assert answer.status_code == 200, f"{answer.text}; the log:\n{daemon.log}"
        document = answer.json()
        assert document["stats"]["attempts"] == attempts
        assert [output["media_type"] for output in document["outputs"]] == ["image/png"]
        assert document["images"][0].startswith("iVBORw0KGgo")  # the signature of a PNG
        assert (await post(client, picture())).json()["stats"]["attempts"] == 1
    await daemon.log.wait("job.ended", job_id=job_id, state="succeeded", attempts=attempts)
    assert len(daemon.log.find("job.ended", job_id=job_id)) == 1


async def test_the_messages_of_a_prompt_are_those_after_which_the_websocket_is_dropped(daemon: Daemon) -> None:
    async with daemon.client() as client:
        answer = await post(client, picture())
    assert answer.status_code == 200
    told = await daemon.log.wait("engine.output", text=lambda text: " messages: " in text)
    assert told["text"].partition("messages: ")[2].split() == list(MESSAGES)


@pytest.mark.parametrize("count", range(len(MESSAGES) + 1))
async def test_a_websocket_dropped_after_any_message_of_a_prompt_costs_nothing(daemon: Daemon, count: int) -> None:
    lost = len(daemon.log.find("engine.websocket_lost"))
    await run_faulty(daemon, {"drop_after": count})
    await daemon.log.wait("engine.websocket_lost", count=lost + 1)


async def test_a_websocket_dropped_and_refused_for_a_while_costs_nothing(daemon: Daemon) -> None:
    refused = len(daemon.log.find("engine.output", text="flaky: websocket refused"))
    await run_faulty(daemon, {"drop_after": 4, "refuse": 3})
    await daemon.log.wait("engine.output", text="flaky: websocket refused", count=refused + 3)


async def test_a_websocket_dropped_after_every_single_message_costs_nothing(daemon: Daemon) -> None:
    await run_faulty(daemon, {"drop_each": True})


async def test_frames_that_make_no_sense_are_ignored(daemon: Daemon) -> None:
    ignored = len(daemon.log.find("engine.frame_ignored"))
    lost = len(daemon.log.find("engine.websocket_lost"))
    await run_faulty(daemon, {"junk": True})
    await daemon.log.wait("engine.frame_ignored", count=ignored + 10 * len(MESSAGES))
    assert len(daemon.log.find("engine.websocket_lost")) == lost, "not even the connection is lost"


@pytest.mark.parametrize("entry", ["bare", "odd"])
async def test_of_a_history_entry_what_makes_sense_is_used(daemon: Daemon, entry: str) -> None:
    await run_faulty(daemon, {"drop_after": len(MESSAGES) - 1, "history": entry})


async def test_a_prompt_whose_end_is_unknown_and_that_history_lost_is_run_again(daemon: Daemon) -> None:
    await run_faulty(daemon, {"drop_after": 3, "history": "lost", "times": 1}, attempts=2)


async def test_a_prompt_that_history_loses_each_time_fails_and_does_not_hang(daemon: Daemon) -> None:
    fault = {"drop_after": 3, "history": "lost"}
    async with daemon.client() as client:
        with trio.fail_after(8):
            told = problem(await post(client, faulty(fault)), 502, "engine-crashed")
        assert told["attempts"] == 2
        assert "does not know the prompt any more" in told["detail"]
        assert (await post(client, picture())).status_code == 200


# --- the engine answers the submission badly


@pytest.mark.parametrize("answer", ["500", "+500"])
async def test_an_engine_that_fails_on_a_submission_is_a_refusal_whether_it_queued_it_or_not(
    daemon: Daemon, answer: str
) -> None:
    async with daemon.client() as client:
        with trio.fail_after(5):
            told = problem(await post(client, faulty({"post": answer})), 400, "invalid-prompt")
            assert "500" in told["detail"]
            assert (await post(client, picture())).status_code == 200


@pytest.mark.parametrize("answer", ["+garbage", "+404"])
async def test_a_prompt_that_was_taken_succeeds_although_its_submission_was_answered_by_nonsense(
    daemon: Daemon, answer: str
) -> None:
    await run_faulty(daemon, {"post": answer})


@pytest.mark.parametrize("answer", ["garbage", "404"])
async def test_a_prompt_that_was_not_taken_is_submitted_again(daemon: Daemon, answer: str) -> None:
    await run_faulty(daemon, {"post": answer, "times": 1}, attempts=2)


@pytest.mark.parametrize("answer", ["hang", "+hang"])
async def test_a_submission_that_is_never_answered_ends_with_the_jobs_time_and_does_not_hold_up_the_next(
    daemon: Daemon, answer: str
) -> None:
    graph = faulty({"post": answer}, seconds=LONG_S)
    async with daemon.client() as client:
        with trio.fail_after(5):
            problem(await post(client, graph, timeout_s=0.5), 504, "timeout")
            assert (await post(client, picture())).status_code == 200
