"""The daemon as a process: how it starts, how it refuses to, and what a bad engine or configuration makes of it."""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from daemon_support import (
    Daemon,
    Graph,
    command,
    faulty,
    open_daemon,
    picture,
    post,
    problem,
    raising,
    start_daemon,
)
from process_support import is_alive, program


async def exits(daemon: Daemon, code: int, within_s: float = 8) -> None:
    """Check that it exits with *code* that fast, counted from now, and leaves nothing."""
    assert await daemon.wait_exit(within_s) == code, str(daemon.log)
    daemon.assert_nothing_left()


async def reasons_to_give_up(folder: Path, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Start a daemon for each case, all at once; check that each exits with 1 soon, and return why it says it did."""
    reasons = {}

    async def one(name: str, options: Mapping[str, Any]) -> None:
        async with open_daemon(folder / name, ready=False, **options) as daemon:
            await exits(daemon, 1, within_s=10)
            assert not daemon.log.find("engine.up")
            (gave_up,) = daemon.log.find("engine.gave_up")
            reasons[name] = gave_up["reason"]

    async with trio.open_nursery() as nursery:
        for name, options in cases.items():
            nursery.start_soon(one, name, options)
    return reasons


def write_graph(folder: Path, graph: Graph) -> str:
    """Write a warm-up file, and return its path."""
    path = folder / "warmup.json"
    path.write_text(json.dumps(graph))
    return str(path)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """What an engine waits for with ``--listen-after``, until somebody writes to it."""
    path = tmp_path / "listen"
    os.mkfifo(path)
    return path


@contextmanager
def stranger() -> Iterator[tuple[int, socket.socket]]:
    """Somebody else who listens at a port, and accepts what comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1], listener


# --- a start that succeeds


async def test_it_answers_before_its_engine_is_up_and_takes_prompts_once_it_is(tmp_path: Path, fifo: Path) -> None:
    cmd = command("flaky_engine", "--listen-after", fifo)
    # No arguments: "run" is what comfyd does then.
    async with open_daemon(tmp_path, ready=False, cmd=cmd, arguments=()) as daemon:
        await daemon.log.wait("engine.output", text="flaky: not listening yet")
        async with daemon.client() as client:
            health, ready = await client.get("/health"), await client.get("/ready")
            assert (health.status_code, health.json()["status"]) == (503, "not healthy")
            assert (ready.status_code, ready.json()["status"]) == (503, "not ready")
            assert "starting" in ready.json()["reason"]
            refused = await post(client, picture())
            problem(refused, 503, "not-ready")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            problem(await client.get("/models"), 503, "not-ready")

            await trio.to_thread.run_sync(fifo.write_bytes, b"")
            await trio.to_thread.run_sync(daemon.wait_ready)
            health, ready = await client.get("/health"), await client.get("/ready")
            assert (health.status_code, health.json()["status"]) == (200, "healthy")
            assert (ready.status_code, ready.json()) == (200, {"version": health.json()["version"], "status": "ready"})
            assert (await post(client, picture())).status_code == 200


async def test_websockets_that_are_refused_at_first_delay_the_start_and_no_more(tmp_path: Path) -> None:
    cmd = command("flaky_engine", "--refuse-websockets", 3)
    async with open_daemon(tmp_path, cmd=cmd) as daemon, daemon.client() as client:
        await daemon.log.wait("engine.output", text="flaky: websocket refused", count=3)
        assert (await post(client, picture())).status_code == 200


# --- an engine that does not come up


async def test_an_engine_that_never_makes_sense_ends_the_start_when_its_budget_is_over(tmp_path: Path) -> None:
    budget = {"STARTUP_CHECK_INTERVAL_S": "0.5", "STARTUP_CHECK_MAX_TRIES": "4"}
    cases = {
        fault: {"cmd": command("flaky_engine", argument, "--grandchildren"), "environ": budget}
        for fault, argument in {
            "refuses": "--answer=/system_stats=500",
            "hangs": "--answer=/system_stats=hang",
            "talks nonsense": "--answer=/system_stats=garbage",
            "refuses its websocket": "--refuse-websockets=100000",
        }.items()
    }
    reasons = await reasons_to_give_up(tmp_path, cases)
    assert reasons == dict.fromkeys(cases, "the engine did not answer within 2 s")


async def test_an_engine_that_cannot_run_ends_the_start_at_once_and_says_why(tmp_path: Path) -> None:
    script = tmp_path / "engine.sh"
    make_script(script, "#!/no/such/interpreter\n")
    environ = {"STARTUP_CHECK_MAX_TRIES": "1000"}
    reasons = await reasons_to_give_up(
        tmp_path,
        {
            "exits with 3": {"cmd": shlex.join(program("exit_at_once", 3)), "environ": environ},
            "exits with 0": {"cmd": shlex.join(program("exit_zero")), "environ": environ},
            "has no nodes": {"cmd": command("flaky_engine", "--answer=/object_info=500"), "environ": environ},
            "has odd nodes": {"cmd": command("flaky_engine", "--answer=/object_info=garbage"), "environ": environ},
            # Started again it would fail in the same way, so not even ALWAYS_RESTART_COMFYUI helps.
            "no interpreter": {"cmd": str(script), "environ": {**environ, "ALWAYS_RESTART_COMFYUI": "true"}},
        },
    )
    assert reasons.pop("no interpreter").endswith("(the file is there; the interpreter that it names is not)")
    assert reasons.pop("has odd nodes").startswith("the engine's answer is not JSON")
    assert reasons == {
        "exits with 3": "the engine exited with code 3",
        "exits with 0": "the engine exited with code 0",
        "has no nodes": "the engine answered GET /object_info with status 500",
    }


def make_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


# --- a configuration that makes no sense


async def test_a_command_that_is_not_there_is_one_line_and_exit_2(tmp_path: Path) -> None:
    async with open_daemon(tmp_path, ready=False, cmd="no-such-engine --flag") as daemon:
        await exits(daemon, 2)
        assert len(daemon.log.lines) == 1
        assert daemon.log.lines[0].startswith('comfyd: CMD: "no-such-engine --flag" is not allowed')


async def test_every_fault_of_a_configuration_is_told_on_a_line_of_its_own(tmp_path: Path) -> None:
    bad = {"PORT": "70000", "MAX_QUEUED_JOBS": "none", "ALWAYS_RESTART_COMFYUI": "perhaps", "LOG_LEVEL": "loud"}
    async with open_daemon(tmp_path, ready=False, environ=bad) as daemon:
        await exits(daemon, 2)
        lines = daemon.log.lines
        assert len(lines) == 4
        for name, value in bad.items():
            assert any(line.startswith(f'comfyd: {name}: "{value}" is not allowed; ') for line in lines)
        assert not (tmp_path / "state").exists(), "a start that is refused touches nothing"


async def test_input_dir_that_cannot_be_written_is_exit_1_and_leaves_no_engine(tmp_path: Path) -> None:
    await trio.Path(tmp_path / "file").write_text("in the way")
    environ = {"INPUT_DIR": str(tmp_path / "file/input")}
    async with open_daemon(tmp_path, ready=False, environ=environ) as daemon:
        await exits(daemon, 1)
        reason = daemon.log.find("daemon.start_failed")[0]["reason"]
        assert reason.startswith("INPUT_DIR ")
        assert "Not a directory" in reason


# --- ports that are taken


async def test_our_port_taken_is_exit_1_and_leaves_no_engine(tmp_path: Path) -> None:
    with stranger() as (port, _):
        async with open_daemon(tmp_path, ready=False, environ={"PORT": str(port)}) as daemon:
            await exits(daemon, 1)
            reason = daemon.log.find("daemon.start_failed")[0]["reason"]
            assert str(port) in reason
            assert "in use" in reason


async def test_a_stranger_on_the_engines_port_is_neither_taken_for_the_engine_nor_spoken_to(tmp_path: Path) -> None:
    with stranger() as (port, listener):
        address = {"COMFYUI_PORT_HOST": str(port)}
        cmd = command("flaky_engine")
        reasons = await reasons_to_give_up(
            tmp_path,
            {
                "once": {"cmd": cmd, "environ": address},
                "always": {"cmd": cmd, "environ": {**address, "ALWAYS_RESTART_COMFYUI": "true"}},
            },
        )
        assert all(f"127.0.0.1 port {port}" in reason for reason in reasons.values())
        listener.settimeout(5)
        for _ in reasons:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5)
                assert connection.recv(100) == b""


async def test_daemons_beside_each_other_share_folders_but_no_engine(tmp_path: Path) -> None:
    shared = {"INPUT_DIR": str(tmp_path / "one/input"), "OUTPUT_DIR": str(tmp_path / "one/output")}
    async with open_daemon(tmp_path / "one") as one, one.client() as client:
        port = one.log.find("engine.started")[0]["port"]
        async with open_daemon(tmp_path / "other", environ=shared) as other, other.client() as other_client:
            assert one.engine_pid != other.engine_pid
            assert (await post(client, picture())).status_code == 200
            assert (await post(other_client, picture())).status_code == 200
        assert one.job_files(), "the other one has left our mark where it was"

        intruder = {"intruder": {"environ": {"COMFYUI_PORT_HOST": str(port)}}}
        reasons = await reasons_to_give_up(tmp_path, intruder)
        assert f"127.0.0.1 port {port}" in reasons["intruder"]
        assert is_alive(one.engine_pid)
        assert (await post(client, picture())).status_code == 200


# --- warm-up


async def test_the_warm_up_runs_before_the_first_caller_who_is_refused_meanwhile(tmp_path: Path) -> None:
    environ = {"WARMUP_PROMPT_FILE": write_graph(tmp_path, picture(seconds=2))}
    async with open_daemon(tmp_path, ready=False, environ=environ) as daemon, daemon.client() as client:
        await daemon.log.wait("engine.up")
        refused = await post(client, picture())
        health, ready = await client.get("/health"), await client.get("/ready")
        assert not daemon.log.find("engine.warm"), "this machine is too slow for this test"
        assert "warming up" in problem(refused, 503, "not-ready")["detail"]
        assert health.status_code == 503
        assert "warming up" in ready.json()["reason"]
        assert (await daemon.log.wait("engine.warm"))["took_s"] >= 2
        assert (await client.get("/health")).status_code == 200
        assert (await post(client, picture())).status_code == 200


async def test_a_warm_up_that_does_not_succeed_is_exit_1(tmp_path: Path) -> None:
    unknown = picture()
    unknown["1"]["class_type"] = "CheckpointOfThePast"
    for name in ("raises", "refused", "crashes", "always"):
        await trio.Path(tmp_path / name).mkdir()
    crash = write_graph(tmp_path / "crashes", faulty({"die": "execution_start"}))
    again = {"ALWAYS_RESTART_COMFYUI": "true", "COMFYUI_RESTART_LIMIT": "1"}
    failing = write_graph(tmp_path / "raises", raising("no memory for the model"))
    refused = {"WARMUP_PROMPT_FILE": write_graph(tmp_path / "refused", unknown)}

    async def one(name: str, reason: str, **options: Any) -> None:
        async with open_daemon(tmp_path / name, ready=False, **options) as daemon:
            await exits(daemon, 1, within_s=12)
            assert reason in daemon.log.find("engine.gave_up")[0]["reason"], str(daemon.log)
            assert not daemon.log.find("engine.warm")

    async with trio.open_nursery() as nursery:
        run = nursery.start_soon
        run(partial(one, "raises", "no memory for the model", environ={"WARMUP_PROMPT_FILE": failing}))
        run(partial(one, "refused", "CheckpointOfThePast", environ=refused))
        run(partial(one, "crashes", "signal 9", cmd=command("flaky_engine"), environ={"WARMUP_PROMPT_FILE": crash}))
        run(partial(one, "always", "failed 2 times", environ={**again, "WARMUP_PROMPT_FILE": failing}))


async def test_a_warm_up_file_that_is_no_prompt_is_exit_2(tmp_path: Path) -> None:
    environ = {"WARMUP_PROMPT_FILE": write_graph(tmp_path, {"nodes": [], "links": []})}
    async with open_daemon(tmp_path, ready=False, environ=environ) as daemon:
        await exits(daemon, 2)
        assert len(daemon.log.lines) == 1
        assert daemon.log.lines[0].startswith("comfyd: WARMUP_PROMPT_FILE: ")


# --- what a killed daemon left


async def test_inputs_that_a_killed_daemon_left_are_removed_by_the_next_one(tmp_path: Path) -> None:
    killed = start_daemon(tmp_path)
    try:
        await trio.to_thread.run_sync(killed.wait_ready)
        killed.process.kill()
        await killed.wait_exit()
        assert killed.job_files(), "its mark in INPUT_DIR"
    finally:
        killed.close()
    async with open_daemon(tmp_path) as daemon:
        own = daemon.job_files()
        assert len(own) == 1
    assert daemon.job_files() == []


def test_the_version_is_told_without_a_configuration() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "comfyd", "--version"],
        env={"PORT": "nonsense", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert ran.stdout.startswith("comfyd ")
    assert ran.stderr == ""
