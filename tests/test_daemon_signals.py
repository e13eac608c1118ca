"""How the daemon stops: in order, in time, with every caller told and nothing left, and when it is killed as well."""

import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import trio
from daemon_support import Daemon, command, large_file, open_daemon, picture, post, problem, submit, wait_state

LONG_S: Final = 60.0


async def seconds_to_exit(daemon: Daemon, *, code: int = 0) -> float:
    """Wait for its exit with *code*; return how long it took from now, in seconds."""
    began = trio.current_time()
    assert await daemon.wait_exit() == code, str(daemon.log)
    return trio.current_time() - began


# --- idle


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_daemon_stops_at_once_with_everything_its_engine_started(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with open_daemon(tmp_path, cmd=command("flaky_engine", "--grandchildren")) as daemon:
        assert len(daemon.processes()) == 4, "the guard, the engine, its child and its grandchild"
        daemon.signal(number)
        assert await seconds_to_exit(daemon) < 2
        assert daemon.log.find("daemon.stopping")[0]["reason"] == number.name


async def test_an_engine_that_ignores_sigterm_is_killed_after_its_grace_period(tmp_path: Path) -> None:
    cmd = command("flaky_engine", "--ignore-sigterm")
    async with open_daemon(tmp_path, cmd=cmd, environ={"COMFYUI_STOP_GRACE_S": "1"}) as daemon:
        daemon.signal()
        assert 1 <= await seconds_to_exit(daemon) < 3


# --- while it starts


async def test_a_daemon_whose_engine_is_still_starting_stops_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "listen")
    cmd = command("flaky_engine", "--listen-after", tmp_path / "listen", "--grandchildren")
    async with open_daemon(tmp_path, ready=False, cmd=cmd) as daemon:
        await daemon.log.wait("engine.output", text="flaky: not listening yet")
        daemon.signal()
        assert await seconds_to_exit(daemon) < 2


async def test_a_daemon_that_warms_up_stops_at_once(tmp_path: Path) -> None:
    warmup = tmp_path / "warmup.json"
    warmup.write_text(json.dumps(picture(seconds=LONG_S)))
    async with open_daemon(tmp_path, ready=False, environ={"WARMUP_PROMPT_FILE": str(warmup)}) as daemon:
        await daemon.log.wait("engine.output", text="got prompt")
        daemon.signal()
        assert await seconds_to_exit(daemon) < 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_at_no_step_of_its_start_does_a_stopped_daemon_leave_anything(
    tmp_path: Path, number: signal.Signals
) -> None:
    async def stop_at(step: str) -> None:
        cmd = command("flaky_engine", "--grandchildren", "--ignore-sigterm")
        environ = {"COMFYUI_STOP_GRACE_S": "0.5"}
        async with open_daemon(tmp_path / step, ready=False, cmd=cmd, environ=environ) as daemon:
            await daemon.log.wait(step)
            daemon.signal(number)
            exit_code = await daemon.wait_exit(within_s=6)
            assert exit_code == (0 if number == signal.SIGTERM else -number), str(daemon.log)
            if number == signal.SIGKILL:
                await daemon.wait_no_process(within_s=3)
                remove_mark_of_killed(daemon)

    async with trio.open_nursery() as nursery:
        for step in ("daemon.starting", "daemon.listening", "engine.started", "engine.up"):
            nursery.start_soon(stop_at, step)


# --- with work in flight


async def test_work_in_flight_is_finished_and_new_work_refused(tmp_path: Path) -> None:
    async with open_daemon(tmp_path) as daemon, daemon.client() as client, trio.open_nursery() as nursery:
        running = await submit(daemon, nursery, client, picture(seconds=1))
        await wait_state(daemon, running.job_id, "running")
        waiting = [await submit(daemon, nursery, client, picture()) for _ in range(2)]
        daemon.signal()
        await daemon.log.wait("daemon.stopping")

        refused = await post(client, picture())
        problem(refused, 503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
        ready, health = await client.get("/ready"), await client.get("/health")
        assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
        assert health.status_code == 200

        answers = [await posted.wait(within_s=10) for posted in (running, *waiting)]
        assert [len(answer.json()["images"]) for answer in answers] == [1, 1, 1]
        assert await seconds_to_exit(daemon) < 2
        assert len(daemon.log.find("daemon.drained")) == 1


async def test_work_that_waits_for_a_restarted_engine_is_finished_too(tmp_path: Path) -> None:
    async with (
        open_daemon(tmp_path, environ={"ALWAYS_RESTART_COMFYUI": "true"}) as daemon,
        daemon.client() as client,
        trio.open_nursery() as nursery,
    ):
        os.kill(daemon.engine_pid, signal.SIGKILL)
        await daemon.log.wait("engine.failed")
        waiting = await submit(daemon, nursery, client, picture())
        daemon.signal()
        assert (await waiting.wait()).status_code == 200
        assert await seconds_to_exit(daemon) < 2


async def test_a_daemon_without_work_does_not_wait_for_its_engine_to_be_restarted(tmp_path: Path) -> None:
    async with open_daemon(tmp_path, environ={"ALWAYS_RESTART_COMFYUI": "true"}) as daemon:
        os.kill(daemon.engine_pid, signal.SIGKILL)
        await daemon.log.wait("engine.failed")
        daemon.signal()
        assert await seconds_to_exit(daemon) < 1


async def test_what_is_not_finished_in_the_drain_time_is_told_and_the_daemon_exits_0(tmp_path: Path) -> None:
    async with (
        open_daemon(tmp_path, environ={"DRAIN_TIMEOUT_S": "1"}) as daemon,
        daemon.client() as client,
        trio.open_nursery() as nursery,
    ):
        running = await submit(daemon, nursery, client, picture(seconds=LONG_S))
        await wait_state(daemon, running.job_id, "running")
        waiting = await submit(daemon, nursery, client, picture())
        daemon.signal()
        assert 1 <= await seconds_to_exit(daemon) < 1 + 3
        for posted in (running, waiting):
            problem(await posted.wait(), 503, "draining")
        assert daemon.log.find("daemon.drain_timeout")[0]["jobs"] == 2


async def test_a_drain_time_that_a_node_does_not_heed_is_kept(tmp_path: Path) -> None:
    environ = {"DRAIN_TIMEOUT_S": "0.5", "COMFYUI_STOP_GRACE_S": "0.5"}
    async with (
        open_daemon(tmp_path, environ=environ) as daemon,
        daemon.client() as client,
        trio.open_nursery() as nursery,
    ):
        running = await submit(daemon, nursery, client, picture(seconds=LONG_S, uninterruptible=True))
        await wait_state(daemon, running.job_id, "running")
        daemon.signal()
        problem(await running.wait(within_s=3), 503, "draining")
        assert await seconds_to_exit(daemon) < 0.5 + 3


async def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    async with open_daemon(tmp_path) as daemon, daemon.client() as client, trio.open_nursery() as nursery:
        cut_off = trio.Event()

        async def client_that_is_cut_off() -> None:
            with pytest.raises(Exception, match=r"disconnected|reset|closed") as info:
                await post(client, picture(seconds=LONG_S, uninterruptible=True), id="cut-off")
            assert type(info.value).__module__ == "httpx"
            cut_off.set()

        nursery.start_soon(client_that_is_cut_off)
        await daemon.log.wait("job.accepted")
        await wait_state(daemon, "cut-off", "running")
        daemon.signal()
        await daemon.log.wait("daemon.stopping")
        daemon.signal()
        await daemon.log.wait("daemon.stopping_at_once")
        assert await seconds_to_exit(daemon) < 3
        with trio.fail_after(2):
            await cut_off.wait()


async def test_a_drain_time_of_zero_tells_everybody_at_once(tmp_path: Path) -> None:
    async with (
        open_daemon(tmp_path, environ={"DRAIN_TIMEOUT_S": "0"}) as daemon,
        daemon.client() as client,
        trio.open_nursery() as nursery,
    ):
        running = await submit(daemon, nursery, client, picture(seconds=LONG_S))
        daemon.signal()
        problem(await running.wait(within_s=2), 503, "draining")
        assert await seconds_to_exit(daemon) < 2


# --- clients that do not read


@asynccontextmanager
async def deaf_clients(daemon: Daemon, count: int, body: bytes) -> AsyncIterator[None]:
    """Post *body* on so many connections, and of each answer read the first bytes only."""
    connections = [trio.socket.socket() for _ in range(count)]
    try:
        head = b"POST /prompt HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"

        async def begin(connection: trio.socket.SocketType) -> None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that the kernel does not read for us
            await connection.connect(("127.0.0.1", daemon.port))
            await connection.send(head % len(body) + body)
            assert (await connection.recv(12)) == b"HTTP/1.1 200"

        async with trio.open_nursery() as nursery:
            for connection in connections:
                nursery.start_soon(begin, connection)
        yield
    finally:
        for connection in connections:
            connection.close()


async def test_clients_that_never_read_their_large_answers_do_not_delay_the_stop(tmp_path: Path) -> None:
    async with open_daemon(tmp_path, environ={"DRAIN_TIMEOUT_S": "1"}) as daemon:
        body = json.dumps({"id": "large", "prompt": large_file(16)}).encode()
        with trio.fail_after(20):
            async with deaf_clients(daemon, 100, body):
                assert len(daemon.log.find("job.accepted")) == 1, "the id makes it one job with a hundred callers"
                daemon.signal()
                # The drain time, a second of HTTP's own, 0.2 s to close them all; the rest is for a busy machine.
                assert await seconds_to_exit(daemon) < 1 + 3


# --- killed


async def test_a_killed_daemon_takes_its_engine_and_all_that_it_started_with_it(tmp_path: Path) -> None:
    async with open_daemon(tmp_path, cmd=command("flaky_engine", "--grandchildren", "--ignore-sigterm")) as daemon:
        family = daemon.processes()
        assert len(family) == 4
        daemon.signal(signal.SIGKILL)
        await daemon.wait_no_process(within_s=1)
        assert await daemon.wait_exit() == -signal.SIGKILL
        remove_mark_of_killed(daemon)


async def test_a_daemon_killed_under_a_job_takes_the_busy_engine_with_it(tmp_path: Path) -> None:
    async with open_daemon(tmp_path) as daemon, daemon.client() as client, trio.open_nursery() as nursery:

        async def client_that_is_cut_off() -> None:
            with pytest.raises(Exception, match=r"disconnected|reset|closed") as info:
                await post(client, picture(seconds=LONG_S, uninterruptible=True), id="cut-off")
            assert type(info.value).__module__ == "httpx"

        nursery.start_soon(client_that_is_cut_off)
        await daemon.log.wait("job.accepted")
        await wait_state(daemon, "cut-off", "running")
        daemon.signal(signal.SIGKILL)
        await daemon.wait_no_process(within_s=1)
        assert await daemon.wait_exit() == -signal.SIGKILL
        remove_mark_of_killed(daemon)


def remove_mark_of_killed(daemon: Daemon) -> None:
    """Remove the lock file in INPUT_DIR that only the next daemon can; it must be all that there is, if it is there."""
    for mark in daemon.job_files():
        assert mark.endswith("/.lock")
        (daemon.folder / mark).unlink()
