"""``comfyd submit`` as a process beside a real daemon with the embedded engine, or one that is cut off or killed."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import httpx
import pytest
import pyvips
import trio
from api_support import blank, graph_of, loader, pixel, png, rest, saver
from daemon_support import Daemon, Graph, free_port, large_file, raising, running_daemon, start_daemon
from storage_support import Asked, CutAnswer, Fault, Hang, Peer, Reply, ResetInBody, StallAnswer, open_proxy
from webhook_receiver import Received, webhook_receiver
from webhook_receiver import Reply as Told

WITHIN_S: Final = 40.0
KEY: Final = "the-key-of-the-daemon"
WORKFLOW: Final = '''
"""A picture saved again."""

from comfyd.workflow import Graph, inputs


@inputs
class Input:
    image: str
    name: str = "again"


def workflow(given: Input) -> Graph:
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": given.image}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": given.name}},
    }
'''


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One that wants a key. What it keeps of these tests' jobs is removed at the end, so that nothing is left."""
    folder = tmp_path_factory.mktemp("submit")
    (folder / "workflows" / "deep").mkdir(parents=True)
    (folder / "workflows" / "deep" / "again.py").write_text(WORKFLOW)
    environ = {"WORKFLOW_DIR": str(folder / "workflows"), "API_KEYS": KEY, "MAX_BODY_SIZE_MB": "1"}
    with running_daemon(folder, environ=environ) as daemon:
        yield daemon
        with _asking(daemon) as client:
            for job in client.get("/jobs", params={"limit": 200}).json()["jobs"]:
                assert client.delete(f"/jobs/{job['id']}").status_code == 204


def _asking(daemon: Daemon) -> httpx.Client:
    return httpx.Client(base_url=daemon.url, headers={"x-api-key": KEY}, trust_env=False, timeout=WITHIN_S)


@attrs.define(eq=False)
class Command:
    """A running ``comfyd submit``, and what it has written."""

    process: trio.Process
    out: bytearray = attrs.field(factory=bytearray)
    err: bytearray = attrs.field(factory=bytearray)
    _changed: trio.Event = attrs.field(factory=trio.Event)
    _open: int = 2

    async def read(self, stream: trio.abc.ReceiveStream, into: bytearray) -> None:
        async with stream:
            async for data in stream:
                into += data
                self._tell()
        self._open -= 1
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def says(self, text: str) -> None:
        """Wait until stderr has *text*."""
        with trio.move_on_after(WITHIN_S):
            while text.encode() not in self.err and self._open:
                await self._changed.wait()
        assert text in self.err.decode(), f"stderr: {self.err.decode()}\nstdout: {self.out.decode()}"

    async def ends(self) -> int:
        """Wait until it has exited and all is read; return the exit code."""
        with trio.fail_after(WITHIN_S):
            code = await self.process.wait()
            while self._open:
                await self._changed.wait()
        assert not [word for word in ("Traceback", "Exception ignored", "Warning") if word in self.err.decode()], (
            self.err
        )
        return code

    @property
    def lines(self) -> list[str]:
        return self.out.decode().splitlines()

    @property
    def errors(self) -> list[str]:
        return self.err.decode().splitlines()


@asynccontextmanager
async def submitting(*arguments: object, cwd: Path, environ: Mapping[str, str] | None = None) -> AsyncIterator[Command]:
    """Run the command in *cwd*; it is killed at the end if it still runs."""
    # Warnings are errors there as well: what nobody closes is told on stderr.
    env = {"HOME": str(cwd), "LANG": "C.UTF-8", "PATH": os.defpath, "PYTHONWARNINGS": "error", **(environ or {})}
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "comfyd", "submit", *map(str, arguments)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=cwd,
        )  # fmt: skip
        command = Command(process)
        assert process.stdout is not None
        assert process.stderr is not None
        nursery.start_soon(command.read, process.stdout, command.out)
        nursery.start_soon(command.read, process.stderr, command.err)
        try:
            yield command
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):  # a killed process is sure to end
                await process.wait()


async def run(*arguments: object, cwd: Path, code: int = 0, environ: Mapping[str, str] | None = None) -> Command:
    """Run the command to its end, which is to be *code*."""
    async with submitting(*arguments, cwd=cwd, environ=environ) as command:
        ended = await command.ends()
    assert ended == code, f"{ended}: {command.err.decode()}"
    return command


def at(daemon: Daemon) -> dict[str, str]:
    """The environment of a user of *daemon*."""
    return {"COMFYD_URL": daemon.url, "COMFYD_API_KEY": KEY}


def write(folder: Path, graph: Any) -> Path:
    path = folder / "graph.json"
    path.write_text(json.dumps(graph))
    return path


def view(daemon: Daemon, job_id: str) -> dict[str, Any]:
    with _asking(daemon) as client:
        answer: dict[str, Any] = client.get(f"/jobs/{job_id}").raise_for_status().json()
    return answer


def canvas(**options: Any) -> Graph:
    graph = graph_of(blank("1", **options), saver("2", "1", prefix="made"))
    graph["1"]["_meta"] = {"title": "The canvas"}
    return graph


def resting(seconds: float) -> Graph:
    return graph_of(blank("1"), rest("2", "1", seconds), saver("3", "2", prefix="made"))


# --- from a file to files


async def test_outputs_are_saved_under_their_names_and_their_paths_are_all_of_stdout(
    daemon: Daemon, tmp_path: Path
) -> None:
    write(tmp_path, resting(0.1) | {"1": canvas(batch_size=2)["1"]})
    done = await run("graph.json", "-o", "pictures/new", cwd=tmp_path, environ=at(daemon))
    assert len(done.lines) == 2
    assert sorted(os.listdir(tmp_path / "pictures/new")) == [Path(line).name for line in done.lines]
    for line in done.lines:
        assert re.fullmatch(r"pictures/new/\d{8}-\d{6}-[0-9a-f]{6}_made_0000[12]_\.png", line)
        assert pyvips.Image.new_from_file(str(tmp_path / line)).width == 8
    assert re.search(r"job \d{8}-\d{6}-[0-9a-f]{6}$", done.errors[0])
    assert "  100.0 %  done" in done.errors
    assert re.search(r"done in .* s, 2 outputs$", done.errors[-1])


async def test_the_same_id_joins_the_job_and_replaces_no_file_unless_forced(daemon: Daemon, tmp_path: Path) -> None:
    write(tmp_path, canvas())
    names = []
    for more in ((), (), ("--force",)):
        done = await run("graph.json", "--id", "twice", "--quiet", *more, cwd=tmp_path, environ=at(daemon))
        names += done.lines
        assert done.errors == []
    assert names == ["twice_made_00001_.png", "twice_made_00001_-2.png", "twice_made_00001_.png"]
    conflict = await run("graph.json", "--id", "twice", "--set", "1.width=9", cwd=tmp_path, code=2, environ=at(daemon))
    assert "another request" in conflict.errors[-1]


async def test_inputs_are_set_by_id_or_title_and_files_are_sent_along(daemon: Daemon, tmp_path: Path) -> None:
    graph = graph_of(blank("1"), saver("2", "1", prefix="made"), loader("3", "not-here.png"), saver("4", "3"))
    graph["1"]["_meta"] = {"title": "Canvas v1.5"}
    graph["3"]["_meta"] = {"title": "Photo"}
    write(tmp_path, graph)
    (tmp_path / "photo.png").write_bytes(png(colour=(1, 2, 3)))
    settings = ("--set", "Canvas v1.5.width=24", "--set", "2.filename_prefix=2024", "--input", "photo.image=@photo.png")
    done = await run("graph.json", *settings, "--id", "settings", cwd=tmp_path, environ=at(daemon))
    assert done.lines == ["settings_2024_00001_.png", "settings_x_00001_.png"]
    assert pyvips.Image.new_from_file(str(tmp_path / done.lines[0])).width == 24
    assert pixel((tmp_path / done.lines[1]).read_bytes()) == (1, 2, 3)


async def test_a_whole_request_with_further_fields_gives_json_for_scripts(daemon: Daemon, tmp_path: Path) -> None:
    write(tmp_path, {"prompt": canvas(), "id": "of-the-file", "priority": 5})
    field = 'convert_output={"format":"webp"}'
    done = await run("graph.json", "--field", field, "--json", "-o", "out", cwd=tmp_path, environ=at(daemon))
    (line,) = done.lines
    document = json.loads(line)
    assert (document["id"], document["state"]) == ("of-the-file", "succeeded")
    (output,) = document["outputs"]
    assert (output["media_type"], output["path"]) == ("image/webp", "out/of-the-file_made_00001_.webp")
    assert (tmp_path / output["path"]).stat().st_size == output["size_bytes"]
    assert done.errors == []


async def test_a_workflow_is_run_with_its_inputs_and_a_file_among_them(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png(colour=(9, 8, 7)))
    wanted = ("--workflow", "deep/again", "--input", "image=@photo.png", "--input", "name=lake", "--id", "workflow")
    done = await run(*wanted, cwd=tmp_path, environ=at(daemon))
    assert done.lines == ["workflow_lake_00001_.png"]
    assert pixel((tmp_path / done.lines[0]).read_bytes()) == (9, 8, 7)
    assert view(daemon, "workflow")["workflow"] == "deep/again"
    unknown = await run("--workflow", "deep/agian", "--input", "a=1", cwd=tmp_path, code=2, environ=at(daemon))
    assert "deep/again" in unknown.errors[-1]


async def test_no_wait_prints_the_id_once_the_daemon_has_the_job(daemon: Daemon, tmp_path: Path) -> None:
    write(tmp_path, canvas())
    left = await run("graph.json", "--no-wait", cwd=tmp_path, environ=at(daemon))
    assert view(daemon, left.lines[0])["id"] == left.lines[0]
    assert os.listdir(tmp_path) == ["graph.json"]
    as_json = await run("graph.json", "--no-wait", "--json", "--id", "left", cwd=tmp_path, environ=at(daemon))
    assert json.loads(as_json.lines[0]) == {"id": "left", "state": "accepted", "url": f"{daemon.url}/jobs/left"}


async def test_the_graph_may_come_from_a_pipe(daemon: Daemon, tmp_path: Path) -> None:
    done = await trio.run_process(
        [sys.executable, "-m", "comfyd", "submit", "-", "--id", "piped"],
        stdin=json.dumps(canvas()).encode(), env=at(daemon), cwd=tmp_path, capture_stdout=True, capture_stderr=True,
    )  # fmt: skip
    assert done.stdout == b"piped_made_00001_.png\n"


async def test_who_reads_no_paths_changes_nothing_of_the_rest(daemon: Daemon, tmp_path: Path) -> None:
    write(tmp_path, canvas(batch_size=2))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        argv = [sys.executable, "-m", "comfyd", "submit", "graph.json", "--quiet"]
        done = await trio.run_process(argv, env=at(daemon), cwd=tmp_path, stdout=writer, capture_stderr=True)
    finally:
        os.close(writer)
    assert done.stderr == b""
    assert len(os.listdir(tmp_path)) == 3, "the graph and two pictures"


# --- what goes wrong


async def test_a_job_that_fails_is_told_in_one_line_with_the_nodes_title(daemon: Daemon, tmp_path: Path) -> None:
    graph = raising("no more memory")
    graph["2"]["_meta"] = {"title": "The culprit"}
    write(tmp_path, graph)
    failed = await run("graph.json", cwd=tmp_path, code=1, environ=at(daemon))
    assert re.fullmatch(r'comfyd submit: node 2 "The culprit" raised [\w.]+: no more memory', failed.errors[-1])
    assert failed.lines == []
    as_json = await run("graph.json", "--json", "--id", "fails", cwd=tmp_path, code=1, environ=at(daemon))
    problem = json.loads(as_json.err)
    assert (problem["type"], problem["id"], problem["node_id"]) == ("execution-failed", "fails", "2")
    assert as_json.lines == []


async def test_a_bad_request_is_told_with_its_places(daemon: Daemon, tmp_path: Path) -> None:
    write(tmp_path, canvas())
    by_us = await run("graph.json", "--priority", "999", cwd=tmp_path, code=2, environ=at(daemon))
    assert by_us.errors == ["comfyd submit: priority: must be <= 100, got 999"]
    by_engine = await run("graph.json", "--set", "1.width=-7", cwd=tmp_path, code=2, environ=at(daemon))
    assert 'node 1 "The canvas", input width: ' in by_engine.err.decode()
    fetched = await run("graph.json", "--set", "The canvas.widht=7", cwd=tmp_path, code=2, environ=at(daemon))
    assert fetched.errors[0].endswith('no input "widht"; did you mean "width"?')
    key = await run("graph.json", cwd=tmp_path, code=2, environ=at(daemon) | {"COMFYD_API_KEY": "wrong"})
    assert "key" in key.errors[-1]
    assert "wrong" not in key.err.decode()


async def test_a_request_over_the_limit_is_told_with_the_name_of_the_limit(daemon: Daemon, tmp_path: Path) -> None:
    write(tmp_path, graph_of(loader("1", "x"), saver("2", "1")))
    (tmp_path / "large.png").write_bytes(os.urandom(8 << 20))
    refused = await run("graph.json", "--input", "1.image=@large.png", cwd=tmp_path, code=2, environ=at(daemon))
    assert "MAX_BODY_SIZE_MB" in refused.errors[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "give the FILE"),
        (("a.json", "--workflow", "b"), "give the FILE"),
        (("missing.json",), "missing.json cannot be read: No such file"),
        (("graph.json", "--field", "prompt=1"), "there is an option for it"),
        (("graph.json", "--url", "localhost:3000"), "must be http://host:port"),
        (("graph.json", "-o", "graph.json"), "cannot be used for the outputs"),
    ],
)
async def test_a_command_that_makes_no_sense_is_told_before_anything_is_sent(
    tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    write(tmp_path, canvas())
    refused = await run(*arguments, cwd=tmp_path, code=2, environ={"PORT": str(free_port())})
    assert told in refused.err.decode()


async def test_a_daemon_that_is_not_there_or_not_ready_is_an_exit_code_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, canvas())
    port = free_port()
    url = f"http://user:hidden@127.0.0.1:{port}/below"
    gone = await run("graph.json", "--url", url, cwd=tmp_path, code=3)
    assert gone.errors == [f"comfyd submit: http://127.0.0.1:{port}/below is not reachable: Connection refused"]
    busy = Told(status=503, headers={"retry-after": "9999"}, body=b'{"type":"not-ready","detail":"it starts"}')
    async with webhook_receiver(busy) as peer:
        not_ready = await run("graph.json", "--url", peer.url(""), "--wait-ready", 5, cwd=tmp_path, code=3)
        assert "it starts" in not_ready.errors[-1]
        assert len(peer.received) == 1, "it is no use to ask again before the time that it told"
        peer.default = Told(status=503, body=b"<html>a proxy's page</html>")
        behind = await run("graph.json", "--url", peer.url(""), "--json", cwd=tmp_path, code=3)
    assert json.loads(behind.err)["type"] == "unreachable"


async def test_it_waits_for_a_daemon_that_starts_later(tmp_path: Path) -> None:
    write(tmp_path, canvas())
    async with webhook_receiver(up=False) as peer:
        peer.script(Told(status=429, headers={"retry-after": "0"}, body=b'{"type":"queue-full","detail":"full"}'))
        peer.default = Told(status=202)
        arguments = ("graph.json", "--url", peer.url("/below"), "--wait-ready", 60, "--no-wait", "--id", "later")
        async with submitting(*arguments, cwd=tmp_path) as command:
            await command.says("is not reachable: Connection refused; trying again for 60 s")
            await peer.go_up()
            assert await command.ends() == 0
    assert [asked.target for asked in peer.received] == ["/below/prompt"] * 2
    assert [asked.json["id"] for asked in peer.received] == ["later"] * 2
    assert peer.received[0].headers["prefer"] == "respond-async"


# --- taken back


async def test_ctrl_c_cancels_the_job_on_the_daemon(daemon: Daemon, tmp_path: Path) -> None:
    write(tmp_path, resting(60))
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        job_id = f"taken-back-{number}"
        async with submitting("graph.json", "--id", job_id, cwd=tmp_path, environ=at(daemon)) as command:
            await command.says("A rest")
            command.process.send_signal(number)
            assert await command.ends() == code
        assert command.errors[-1] == f"comfyd submit: job {job_id}: cancelled"
        assert view(daemon, job_id)["state"] == "cancelled"


async def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    write(tmp_path, canvas())

    def reply(asked: Received) -> Told:
        return Told(status=202) if asked.path == "/prompt" else Told(never=True)

    async with (
        webhook_receiver(reply) as peer,
        submitting("graph.json", "--url", peer.url(""), "--id", "a", cwd=tmp_path) as command,
    ):
        with trio.fail_after(WITHIN_S):
            await peer.wait_until(lambda: any(asked.path == "/jobs/a/events" for asked in peer.begun))
            command.process.send_signal(signal.SIGINT)
            await peer.wait_until(lambda: any(asked.path == "/interrupt" for asked in peer.received))
            command.process.send_signal(signal.SIGINT)
        assert await command.ends() == 130


async def test_ctrl_c_while_the_request_is_sent_says_that_nothing_was_submitted(daemon: Daemon, tmp_path: Path) -> None:
    write(tmp_path, canvas())
    hang = Hang()

    def way(asked: Asked) -> Fault | None:
        return hang if asked.method == "POST" and asked.target == "/prompt" else None

    async with open_proxy(Peer(port=daemon.port), way) as (_, peer):
        environ = at(daemon) | {"COMFYD_URL": peer.url}
        async with submitting("graph.json", "--id", "never", cwd=tmp_path, environ=environ) as command:
            with trio.fail_after(WITHIN_S):
                await hang.reached.wait()
            command.process.send_signal(signal.SIGINT)
            assert await command.ends() == 130
    assert command.errors[-1] == "comfyd submit: job never: not submitted"


async def test_ctrl_c_while_outputs_are_saved_leaves_them_at_the_daemon_and_no_part_here(
    daemon: Daemon, tmp_path: Path
) -> None:
    write(tmp_path, large_file(2))
    stall = StallAnswer(after_bytes=500_000)
    async with open_proxy(Peer(port=daemon.port), partial(_on_outputs, [stall])) as (_, peer):
        environ = at(daemon) | {"COMFYD_URL": peer.url}
        async with submitting("graph.json", "--id", "stalled", cwd=tmp_path, environ=environ) as command:
            with trio.fail_after(WITHIN_S):
                await stall.reached.wait()
            command.process.send_signal(signal.SIGINT)
            assert await command.ends() == 130
    assert os.listdir(tmp_path) == ["graph.json"]
    assert "it has succeeded; its outputs are at" in command.errors[-1]
    assert view(daemon, "stalled")["state"] == "succeeded"


# --- cut off


def _on_outputs(faults: list[Fault], asked: Asked) -> Fault | None:
    return faults.pop(0) if faults and "/outputs/" in asked.target else None


async def test_an_output_that_was_cut_goes_on_where_it_was_and_is_whole(daemon: Daemon, tmp_path: Path) -> None:
    write(tmp_path, large_file(2))
    faults: list[Fault] = [CutAnswer(after_bytes=600_000), Reply(status=503), CutAnswer(after_bytes=700_000)]
    async with open_proxy(Peer(port=daemon.port), partial(_on_outputs, faults)) as (proxy, peer):
        done = await run("graph.json", "--id", "cut", cwd=tmp_path, environ=at(daemon) | {"COMFYD_URL": peer.url})
    ranges = [asked.headers.get("range") for asked in proxy.asked if "/outputs/" in asked.target]
    assert ranges[0] is None
    begun = [int(re.fullmatch(r"bytes=(\d+)-", text)[1]) for text in ranges[1:] if text]  # type: ignore[index]  # told
    assert len(begun) == 3
    assert 0 < begun[0] == begun[1] < begun[2]
    with _asking(daemon) as client:
        assert (tmp_path / done.lines[0]).read_bytes() == client.get("/jobs/cut/outputs/0").content
    assert (tmp_path / done.lines[0]).stat().st_size == 2 << 20
    assert "is back" in done.err.decode()


async def test_a_request_and_events_that_were_cut_off_are_one_job_told_to_its_end(
    daemon: Daemon, tmp_path: Path
) -> None:
    write(tmp_path, resting(1.0))
    faults: dict[str, list[Fault]] = {
        "/prompt": [ResetInBody(after_bytes=10), CutAnswer()],  # the second one the daemon has taken
        "/jobs/once/events": [CutAnswer(after_bytes=900), CutAnswer(after_bytes=5)],
    }

    def way(asked: Asked) -> Fault | None:
        left = faults.get(asked.target)
        return left.pop(0) if left else None

    async with open_proxy(Peer(port=daemon.port), way) as (proxy, peer):
        done = await run("graph.json", "--id", "once", cwd=tmp_path, environ=at(daemon) | {"COMFYD_URL": peer.url})
    assert done.lines == ["once_made_00001_.png"]
    listening = [asked.headers.get("last-event-id") for asked in proxy.asked if asked.target == "/jobs/once/events"]
    assert len(listening) == 3
    assert listening[0] is None
    assert listening[1], "it goes on after the last event that it heard"
    assert listening[2] == listening[1]
    assert len(daemon.log.find("job.accepted", job_id="once")) == 1


async def test_a_connection_that_is_always_cut_is_given_up_with_the_limit_that_may_be_the_reason(
    tmp_path: Path,
) -> None:
    write(tmp_path, graph_of(loader("1", "x"), saver("2", "1")))
    (tmp_path / "large.png").write_bytes(os.urandom(2 << 20))
    async with open_proxy(Peer(port=1), lambda _: ResetInBody(after_bytes=1000)) as (proxy, peer):
        arguments = ("graph.json", "--input", "1.image=@large.png", "--url", peer.url)
        cut = await run(*arguments, cwd=tmp_path, code=3)
    assert "3 MB, the daemon takes MAX_BODY_SIZE_MB" in cut.errors[-1]
    assert len(proxy.asked) == 4


async def test_a_job_survives_a_killed_daemon_and_so_does_its_client(tmp_path: Path) -> None:
    write(tmp_path, resting(1.0))
    home = tmp_path / "daemon"
    environ = {"PORT": str(free_port())}
    first = start_daemon(home, environ=environ)
    try:
        await trio.to_thread.run_sync(first.wait_ready)
        arguments = ("graph.json", "-o", "out", "--id", "survivor")
        async with submitting(*arguments, cwd=tmp_path, environ=environ) as command:
            await command.says("A rest")
            first.signal(signal.SIGKILL)
            await first.wait_exit()
            await command.says("trying again for 120 s")
            await first.wait_no_process(10.0)
            second = start_daemon(home, environ=environ)
            try:
                assert await command.ends() == 0
                assert second.log.find("journal.restored", jobs=1)
                assert second.stop() == 0
                second.assert_no_bug()
            finally:
                second.close()
    finally:
        first.close()
    assert command.lines == ["out/survivor_made_00001_.png"]
    assert (tmp_path / command.lines[0]).is_file()
    assert "comfyd submit: the daemon is back" in command.errors


async def test_a_daemon_that_does_not_come_back_is_told_with_where_the_job_is(tmp_path: Path) -> None:
    write(tmp_path, canvas())
    async with webhook_receiver(Told(status=202)) as peer:
        peer.script(Told(status=502), path="/jobs/a/events")
        peer.default = lambda asked: Told(status=202 if asked.path == "/prompt" else 502)
        away = await run("graph.json", "--url", peer.url(""), "--id", "a", "--reconnect", 0.3, cwd=tmp_path, code=3)
        assert away.errors[-1] == f"comfyd submit: the job is {peer.url('')}/jobs/a"
        peer.default = lambda asked: Told(status=202 if asked.path == "/prompt" else 404)
        forgotten = await run("graph.json", "--url", peer.url(""), "--id", "a", cwd=tmp_path, code=1)
    assert "does not know the job any more" in forgotten.err.decode()


# --- on a terminal


async def _on_terminal(arguments: tuple[str, ...], cwd: Path, environ: Mapping[str, str], columns: int) -> str:
    """Run the command with a terminal of so many columns as its stderr; return what was written there."""
    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        try:
            with trio.fail_after(WITHIN_S):
                env = {"LANG": "C.UTF-8", "TERM": "xterm", **environ}
                argv = [sys.executable, "-m", "comfyd", "submit", *arguments]
                # What is drawn in a second fits into the terminal's buffer, so it can be read afterwards.
                await trio.run_process(argv, cwd=cwd, env=env, stderr=slave, capture_stdout=True)
        finally:
            os.close(slave)
        written = b""
        while True:
            try:
                written += os.read(master, 65536)
            except OSError:  # EIO: the other end is closed, and all is read
                return written.decode()
    finally:
        os.close(master)


@pytest.mark.parametrize("columns", [40, 100])
async def test_a_terminal_gets_one_bar_as_wide_as_it_allows(daemon: Daemon, tmp_path: Path, columns: int) -> None:
    graph = resting(0.3)
    graph["2"]["_meta"] = {"title": "休憩" * 40}
    write(tmp_path, graph)
    environ = at(daemon) | {"NO_COLOR": "1"}
    written = await _on_terminal(("graph.json",), tmp_path, environ, columns)
    bars = [drawn for drawn in written.split("\r\x1b[2K") if "░" in drawn]
    assert any("休憩" in bar for bar in bars)
    for bar in bars:
        assert "\n" not in bar
        assert sum(2 if ord(character) > 0x3000 else 1 for character in bar) < columns
    assert "\x1b[36m" not in written
    coloured = await _on_terminal(("graph.json",), tmp_path, at(daemon), columns)
    assert "\x1b[36m" in coloured
