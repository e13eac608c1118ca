"""``comfyd doctor``: what is wrong is told on a line of its own, and an exit code says whether anything is."""

import argparse
import fcntl
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from daemon_support import Daemon, free_port
from process_support import PROGRAMS, Family
from real_comfyui_support import COMFYUI_DIR, comfyui_python
from storage_support import Peer

from comfyd.cli import doctor, doctor_machine
from comfyd.cli.doctor import add_parser, doctor_command
from comfyd.cli.doctor_engine import ImportFailures, missing_classes
from comfyd.cli.doctor_machine import check_clock, check_disks, check_folder, check_gpu, check_port, port_holder
from comfyd.cli.doctor_services import check_workflows
from comfyd.cli.finding import Finding, Verdict

Environ = dict[str, str]
SECRET = "hunter2-hunter2"


@attrs.frozen
class Run:
    code: int
    out: str

    def of(self, check: str) -> list[tuple[str, str]]:
        """Verdict and text of each line of that check."""
        lines = (line.split(maxsplit=2) for line in self.out.splitlines()[:-1])
        return [(verdict, text) for verdict, name, text in lines if name == check]

    def one(self, check: str) -> tuple[str, str]:
        (found,) = self.of(check)
        return found


Command = Callable[..., Run]


@pytest.fixture
def family() -> Iterator[Family]:
    """Marks what the doctor starts; at the end nothing of it may be left."""
    family = Family()
    yield family
    assert list(family.alive()) == []


@pytest.fixture
def environ(tmp_path: Path, family: Family) -> Environ:
    """The embedded engine's, with a port of our own."""
    return {
        **family.env(),
        "HOME": str(tmp_path),
        "STATE_DIR": str(tmp_path / "state"),
        "HOST": "127.0.0.1",
        "PORT": str(free_port()),
        "WORKFLOW_DIR": "",
    }


@pytest.fixture
def command(environ: Environ, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``comfyd doctor`` in this process, with the embedded engine unless CMD is given."""

    def run(*arguments: str, **more: object) -> Run:
        parser = argparse.ArgumentParser(prog="comfyd")
        add_parser(parser.add_subparsers(dest="command"))
        given = ("doctor", *arguments) if "CMD" in more else ("doctor", "--embedded", *arguments)
        variables = {**environ, **{name: str(value) for name, value in more.items()}}
        code = doctor_command(parser.parse_args(given), variables)
        captured = capsys.readouterr()
        assert captured.err == ""
        return Run(code, captured.out)

    return run


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Environ]:
    """Gives the variables of an engine that says these lines first and then is the embedded one, on a fixed port."""

    def given(*lines: str, cmd: str | None = None, body: str = "") -> Environ:
        for folder in ("input", "output", "models"):
            (tmp_path / folder).mkdir(exist_ok=True)
        program = tmp_path / "engine.py"
        program.write_text(
            "import os, sys\n"
            f"for line in {lines!r}:\n    print(line, file=sys.stderr)\n{body}\n"
            "from comfyd.embedded.__main__ import main\n"
            "sys.argv[1:] = ['--port', os.environ['COMFYUI_PORT_HOST'], '--base-directory', os.getcwd() + '/engine']\n"
            "sys.exit(main())\n"
        )
        return {
            "CMD": cmd or f"{sys.executable} {program}",
            "BASE": "",
            "COMFYUI_PORT_HOST": str(free_port()),
            "INPUT_DIR": str(tmp_path / "input"),
            "OUTPUT_DIR": str(tmp_path / "output"),
            "MODEL_DIR": str(tmp_path / "models"),
            "COMFYUI_STOP_GRACE_S": "1",
        }

    return given


# --- the whole


def test_a_good_machine_passes_and_the_engine_was_started_and_stopped(command: Command, tmp_path: Path) -> None:
    run = command()
    assert run.code == 0, run.out
    assert ", 0 failed, " in run.out.splitlines()[-1]
    verdict, text = run.one("engine")
    assert verdict == "ok"
    found = re.match(
        r"ComfyUI 0\.3\.\S+ answers after \d+\.\d s \(budget 10 s\) and stops within \d\.\d s; (\d+)", text
    )
    assert found is not None, text
    assert int(found[1]) > 50
    assert run.one("nodes") == ("ok", "all modules of nodes were imported")
    assert [run.one(check)[0] for check in ("clock", "STATE_DIR", "journal", "port")] == ["ok"] * 4
    assert not list((tmp_path / "state").glob("journal*")), "looking makes no journal"


def test_what_comes_first_is_printed_first_and_each_thing_has_one_line(command: Command) -> None:
    run = command("--no-start", SYSTEM_META_x="\x1b[2J\nnew line")
    checks = [line.split()[1] for line in run.out.splitlines()[:-1]]
    order = ["configuration", "clock", "STATE_DIR", "journal", "port", "INPUT_DIR", "OUTPUT_DIR", "MODEL_DIR"]
    assert checks == [*order, "disk", "gpu", "s3", "webhook", "workflows", "engine"]
    assert run.one("engine") == ("skipped", "not started, as you wish")
    assert "\x1b" not in run.out


def test_json_is_one_object_with_everything(command: Command) -> None:
    run = command("--json", "--no-start")
    document = json.loads(run.out)
    assert (document["ok"], document["failed"]) == (True, 0)
    by_check = {finding["check"]: finding for finding in document["findings"]}
    assert by_check["port"]["verdict"] == "ok"
    assert set(by_check["port"]) == {"check", "verdict", "what", "advice"}


def test_a_bad_configuration_ends_it_at_once_with_its_own_code(command: Command) -> None:
    run = command(PORT="x", DRAIN_TIMEOUT_S="y", WEBHOOK_SECRET=SECRET)
    assert run.code == 2
    faults = run.of("configuration")
    assert [verdict for verdict, _ in faults] == ["FAILED"] * 3
    assert faults[0][1] == 'PORT: "x" is not allowed; a whole number from 0 to 65535'
    assert SECRET not in run.out
    assert len(run.out.splitlines()) == 4


def test_a_warning_of_the_configuration_is_told(command: Command) -> None:
    run = command("--no-start", MAX_QUEUED_JOB="5")
    assert run.code == 0
    assert ("warning", "MAX_QUEUED_JOB is not a variable of comfyd; did you mean MAX_QUEUED_JOBS?") in run.of(
        "configuration"
    )


def test_a_look_that_does_not_come_back_fails_alone(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECK_S", 0.2)
    monkeypatch.setattr(doctor_machine, "check_disks", lambda _: time.sleep(2))
    run = command("--no-start")
    assert run.code == 1
    assert run.one("disk") == ("FAILED", "no answer within 0.2 s; is a network disk or a peer away?")
    assert run.one("workflows")[0] == "ok"


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import argparse, sys; from comfyd.cli.doctor import add_parser\n"
        "add_parser(argparse.ArgumentParser().add_subparsers())\n"
        "print([name for name in ('trio', 'httpx', 'comfyd.config') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"


# --- beside a daemon


def test_beside_a_daemon_its_engine_is_left_alone(shared_daemon: Daemon, command: Command) -> None:
    before = shared_daemon.processes()
    run = command(PORT=shared_daemon.port, STATE_DIR=shared_daemon.folder / "state")
    assert run.code == 0, run.out
    verdict, text = run.one("port")
    assert verdict == "ok"
    assert re.fullmatch(rf"{shared_daemon.port} is the one of comfyd \S+, which runs as .+ \(pid \d+\)", text)
    assert f"(pid {shared_daemon.pid})" in text
    assert run.one("daemon") == ("ok", "ready")
    assert run.one("engine")[0] == "skipped"
    assert f"comfyd runs on port {shared_daemon.port}" in run.one("engine")[1]
    assert run.one("journal") == ("ok", "can be read; no dead letters")
    assert shared_daemon.processes() == before


def test_a_daemon_elsewhere_on_the_same_state_is_found(command: Command, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with (tmp_path / "state/lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = command()
        assert run.code == 0
        assert run.one("daemon")[0] == "warning"
        assert run.one("engine") == ("skipped", "not started: a comfyd runs on this STATE_DIR")
    assert command("--no-start").of("daemon") == [], "a lock file alone is no daemon"


def test_state_in_memory_is_said(command: Command) -> None:
    run = command("--no-start", STATE_DIR="")
    assert run.one("journal")[0] == "ok"
    assert "in memory only" in run.one("journal")[1]


def test_a_journal_that_is_none_fails(command: Command, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state/journal.sqlite3").write_bytes(b"this is no database, whatever its name may say" * 100)
    run = command("--no-start")
    assert run.code == 1
    assert run.one("journal")[0] == "FAILED"
    assert (tmp_path / "state/journal.sqlite3").read_bytes().startswith(b"this is no"), "and is left as it is"


# --- port


def test_a_taken_port_fails_and_its_holder_is_named(command: Command) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        run = command("--no-start", PORT=port)
        assert run.code == 1
        verdict, text = run.one("port")
        assert verdict == "FAILED"
        assert text.startswith(f"{port} is taken by ")
        assert f"(pid {os.getpid()}); stop it, or choose another PORT" in text


def test_a_port_is_tried_as_the_daemon_would_take_it() -> None:
    port = free_port()
    assert check_port("::", port).verdict is Verdict.OK
    assert check_port("127.0.0.1", 0).verdict is Verdict.OK
    with closing(socket.create_server(("127.0.0.1", port))):
        assert check_port("::", port).verdict is Verdict.FAILED, "of both families"
        assert check_port("127.0.0.1", port).verdict is Verdict.FAILED
        assert check_port("127.0.0.2", port).verdict is Verdict.OK, "another address"
    assert check_port("127.0.0.1", port).verdict is Verdict.OK, "nothing is kept"


def test_an_address_of_another_machine_fails() -> None:
    found = check_port("192.0.2.1", free_port())
    assert (found.verdict, found.what) == (Verdict.FAILED, "HOST 192.0.2.1 is no address of this machine")


def test_a_name_that_does_not_resolve_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    found = check_port("nowhere.example", 3000)
    assert found.what == "HOST nowhere.example cannot be resolved: Name or service not known"


def test_who_holds_a_port_is_read_from_proc(tmp_path: Path) -> None:
    with closing(socket.create_server(("::1", 0), family=socket.AF_INET6)) as server:
        holder = port_holder(server.getsockname()[1])
        assert holder is not None
        assert holder.endswith(f"(pid {os.getpid()})")
    assert port_holder(free_port()) is None
    (tmp_path / "net").mkdir()
    heading = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    row = "   0: 0100007F:0BB8 00000000:0000 {} 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0\n"
    (tmp_path / "net/tcp").write_text(heading + row.format("01"))
    (tmp_path / "7/fd").mkdir(parents=True)
    (tmp_path / "7/comm").write_text("node\n")
    (tmp_path / "7/fd/3").symlink_to("socket:[4711]")
    assert port_holder(3000, tmp_path) is None, "a connection is no listener"
    (tmp_path / "net/tcp").write_text(heading + row.format("0A"))
    assert port_holder(3000, tmp_path) == "node (pid 7)"
    assert port_holder(3001, tmp_path) is None


# --- folders, disks, clock, GPU


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    assert check_folder("X", tmp_path).verdict is Verdict.OK
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_fails() -> None:
    """/proc takes no files from anybody, root included."""
    found = check_folder("OUTPUT_DIR", Path("/proc"))
    assert (found.verdict, found.advice) == (Verdict.FAILED, "see OUTPUT_DIR")
    assert found.what.startswith("/proc cannot be written: ")


def test_a_folder_that_is_not_there_is_judged_by_whether_it_can_be_made(tmp_path: Path) -> None:
    missing = tmp_path / "a/b"
    assert check_folder("X", missing).verdict is Verdict.WARNING
    assert check_folder("X", missing, expected=False).verdict is Verdict.OK
    assert check_folder("X", missing, writable=False).verdict is Verdict.FAILED
    assert check_folder("X", missing, writable=False, expected=False).verdict is Verdict.OK
    assert check_folder("X", Path("/proc/self/none"), expected=False).verdict is Verdict.FAILED, "not even by root"
    assert not missing.parent.exists()


Disk = namedtuple("Disk", "f_blocks f_bavail f_frsize f_files f_favail")  # as os.statvfs_result


@pytest.mark.parametrize(
    ("disk", "verdict"),
    [
        (Disk(100_000_000, 50_000_000, 4096, 1000, 500), Verdict.OK),
        (Disk(100_000_000, 9_000_000, 4096, 1000, 500), Verdict.WARNING),  # 9 %, though 37 GB
        (Disk(2_000_000, 1_000_000, 4096, 1000, 500), Verdict.WARNING),  # 4 GB, though half of it
        (Disk(100_000_000, 50_000_000, 4096, 1000, 99), Verdict.WARNING),  # inodes
        (Disk(100_000_000, 50_000_000, 4096, 0, 0), Verdict.OK),  # btrfs counts none
        (Disk(0, 0, 4096, 0, 0), Verdict.WARNING),
    ],
)
def test_a_disk_that_is_nearly_full_is_warned_of(
    disk: Any, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    (found,) = check_disks([tmp_path, tmp_path / "not/there"])
    assert found.verdict is verdict, found


def test_each_disk_is_looked_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    found = check_disks([tmp_path, tmp_path / "a", tmp_path / "none", Path("/proc")])
    assert len(found) == 2
    assert f"{tmp_path} and {tmp_path / 'a'} is free" in found[0].what


def test_a_clock_before_the_installation_is_wrong() -> None:
    assert check_clock().verdict is Verdict.OK
    assert check_clock(86_400.0 * 365).what == "it is 1971-01-01 00:00:00 UTC, before comfyd was installed"
    assert check_clock(86_400.0 * 365).verdict is Verdict.FAILED


@pytest.fixture
def smi(tmp_path: Path) -> Callable[[str], Environ]:
    """Gives an environment whose nvidia-smi is this shell script."""

    def given(script: str) -> Environ:
        path = tmp_path / "bin/nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return {"PATH": f"{path.parent}:{os.environ['PATH']}"}

    return given


async def test_gpus_are_told_as_nvidia_smi_names_them(smi: Callable[[str], Environ], tmp_path: Path) -> None:
    found = await check_gpu(smi("echo 'RTX 5090, 32607 MiB, 590.1'; echo 'RTX 4090, 24564 MiB, 590.1'"))
    assert (found.verdict, found.what) == (Verdict.OK, "RTX 5090, 32607 MiB, 590.1; RTX 4090, 24564 MiB, 590.1")
    found = await check_gpu(smi("exit 9"))
    assert (found.verdict, found.what) == (Verdict.WARNING, "nvidia-smi ended with 9")
    assert (await check_gpu({"PATH": str(tmp_path)}, tmp_path)).what == "no NVIDIA GPU is to be seen"
    for name in ("nvidia0", "nvidia1", "nvidiactl", "sda1"):
        (tmp_path / name).touch()
    found = await check_gpu({"PATH": str(tmp_path)}, tmp_path)
    assert (found.verdict, found.what.partition(" (")[0]) == (Verdict.OK, "nvidia0, nvidia1")


async def test_an_nvidia_smi_that_hangs_is_ended_and_told(
    smi: Callable[[str], Environ], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_machine, "_NVIDIA_SMI_S", 0.2)
    with trio.fail_after(20):
        found = await check_gpu(smi("exec sleep 1000"))
    assert (found.verdict, found.what) == (Verdict.FAILED, "nvidia-smi did not end within 0.2 s")


# --- S3 and webhooks


def test_s3_that_nobody_configured_is_not_asked(command: Command, no_aws: pytest.MonkeyPatch) -> None:
    assert command("--no-start").one("s3")[0] == "skipped"


def test_s3_that_answers_is_well_and_a_bucket_is_looked_for(command: Command, moto: Peer, bucket: str) -> None:
    environ = moto.environment()
    run = command("--no-start", **environ)
    assert run.one("s3") == ("ok", f"{moto.url} answers and takes the keys")
    run = command("--no-start", "--bucket", bucket, **environ)
    assert (run.code, run.one("s3")[0]) == (1, "FAILED")
    assert run.one("s3")[1].startswith(f"the bucket {bucket} does not exist")
    with moto.client() as client:
        client.create_bucket(Bucket=bucket)
    run = command("--no-start", "--bucket", bucket, **environ)
    assert run.one("s3") == ("ok", f"{moto.url} answers, and the bucket {bucket} is there")
    assert moto.secret_key not in run.out


def test_s3_that_is_away_fails(command: Command, no_aws: pytest.MonkeyPatch) -> None:
    port = free_port()
    environ = Peer(port=port).environment()
    for name, value in environ.items():
        no_aws.setenv(name, value)
    run = command("--no-start", **environ)
    assert run.code == 1
    assert run.one("s3") == ("FAILED", f"127.0.0.1:{port} refuses connections; see AWS_ENDPOINT_URL and the way there")


STORE = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Store(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(403)
        self.end_headers()

    def do_GET(self):
        code = sys.argv[1]
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response(403)
        self.send_header("content-type", "application/xml")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

server = HTTPServer(("127.0.0.1", 0), Store)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def refusing_store(no_aws: pytest.MonkeyPatch) -> Iterator[Callable[[str], Environ]]:
    """Starts a store that answers each request with 403, and GET with this code; gives the variables for it."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str) -> Environ:
        process = subprocess.Popen(
            [sys.executable, "-c", STORE, code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        started.append(process)
        assert process.stdout is not None
        environ = Peer(port=int(process.stdout.readline())).environment()
        for name, value in environ.items():
            no_aws.setenv(name, value)
        return environ

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_keys_that_may_not_list_buckets_are_known_all_the_same(
    command: Command, refusing_store: Callable[[str], Environ]
) -> None:
    environ = refusing_store("AccessDenied")
    verdict, text = command("--no-start", **environ).one("s3")
    assert verdict == "ok"
    assert "knows the keys, which may not list buckets" in text
    run = command("--no-start", "--bucket", "mine", **environ)
    assert (run.code, run.one("s3")[0]) == (0, "warning")
    assert "access to the bucket mine is denied" in run.one("s3")[1]


@pytest.mark.parametrize("arguments", [(), ("--bucket", "mine")])
@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("InvalidAccessKeyId", "see AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", "see AWS_ACCESS_KEY_ID"),
        ("RequestTimeTooSkewed", "set the clock"),
    ],
)
def test_keys_or_a_clock_that_the_store_refuses_fail(
    command: Command, refusing_store: Callable[[str], Environ], code: str, advice: str, arguments: tuple[str, ...]
) -> None:
    run = command("--no-start", *arguments, **refusing_store(code))
    assert (run.code, run.one("s3")[0]) == (1, "FAILED")
    assert f"; {advice}" in run.one("s3")[1]


def test_an_s3_profile_or_endpoint_that_makes_no_sense_fails(command: Command, no_aws: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_PROFILE", "nobody"), ("AWS_ENDPOINT_URL", "not a url")):
        no_aws.setenv(name, value)
        run = command("--no-start", **{name: value})
        assert (run.code, run.one("s3")[0]) == (1, "FAILED")
        no_aws.delenv(name)


def test_the_receiver_of_system_webhooks_is_connected_to(command: Command) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        url = f"http://user:{SECRET}@127.0.0.1:{server.getsockname()[1]}/hook?token={SECRET}"
        run = command("--no-start", SYSTEM_WEBHOOK_URL=url, SYSTEM_WEBHOOK_EVENTS="all")
        assert run.one("webhook")[0] == "ok"
        assert SECRET not in run.out
        assert command("--no-start", SYSTEM_WEBHOOK_URL=url).one("webhook")[0] == "warning", "it gets no events"
    run = command("--no-start", SYSTEM_WEBHOOK_URL=url, SYSTEM_WEBHOOK_EVENTS="all")
    assert (run.code, run.one("webhook")[0]) == (1, "FAILED")
    assert run.one("webhook")[1].endswith(": Connection refused; see SYSTEM_WEBHOOK_URL")
    assert SECRET not in run.out


# --- the engine


def test_modules_that_were_not_imported_are_named_with_their_reasons(
    command: Command, engine: Callable[..., Environ]
) -> None:
    """The lines are those of ComfyUI 0.3.64, nodes.py."""
    lines = (
        "Cannot import /srv/ComfyUI/custom_nodes/Broken module for custom nodes: No module named 'x'",
        "Skip /srv/ComfyUI/custom_nodes/Empty module for custom nodes due to the lack of NODES_LIST (need one).",
        "Import times for custom nodes:",
        "   0.0 seconds: /srv/ComfyUI/custom_nodes/websocket_image_save.py",
        "   0.1 seconds (IMPORT FAILED): /srv/ComfyUI/custom_nodes/Broken",
        "   0.1 seconds (IMPORT FAILED): /srv/ComfyUI/custom_nodes/Empty",
        "WARNING: some comfy_extras/ nodes did not import correctly. This may be because ...",
        "IMPORT FAILED: nodes_audio.py",
    )
    run = command(**engine(*lines))
    assert run.code == 0, "ComfyUI works without them"
    advice = "; install what it needs into ComfyUI's Python, or remove it"
    assert run.of("nodes") == [
        ("warning", f"Broken was not imported: No module named 'x'{advice}"),
        ("warning", f"Empty was not imported: the lack of NODES_LIST{advice}"),
        ("warning", f"nodes_audio.py was not imported{advice}"),
    ]
    assert run.one("engine")[0] == "ok"


def test_a_flood_of_failed_modules_is_bounded() -> None:
    failures = ImportFailures()
    for number in range(1000):
        failures.hear(f"Cannot import /c/{number} module for custom nodes: {'x' * 5000}")
    failures.hear("   0.0 seconds (IMPORT FAILED): /c/0")
    assert len(failures.modules) == 200
    assert failures.modules["0"] == "x" * 300, "the sum does not take the reason away"


def test_an_engine_that_exits_fails_with_what_it_said_last(command: Command, engine: Callable[..., Environ]) -> None:
    body = f"sys.stderr.write('RuntimeError: no GPU for {SECRET}\\n'); sys.exit(3)"
    run = command(**engine(body=body), MY_API_KEY=SECRET)
    assert run.code == 1
    verdict, text = run.one("engine")
    assert verdict == "FAILED"
    assert text.startswith("the engine exited with code 3; it said: RuntimeError: no GPU for ********")
    assert SECRET not in run.out


def test_an_engine_that_never_answers_is_given_up_in_time(command: Command, engine: Callable[..., Environ]) -> None:
    cmd = f"{sys.executable} {PROGRAMS / 'never_listen.py'}"
    run = command("--start-timeout", "0.5", **engine(cmd=cmd))
    assert run.code == 1
    assert run.one("engine")[1].startswith("the engine did not answer within 0.5 s; it said: Starting server")


def test_an_engine_slower_than_the_daemon_would_wait_fails_with_the_number_to_set(
    command: Command, engine: Callable[..., Environ]
) -> None:
    variables = engine(body="import time; time.sleep(0.5)")
    run = command(**variables, STARTUP_CHECK_INTERVAL_S="0.1", STARTUP_CHECK_MAX_TRIES="2")
    assert run.code == 1
    found = re.fullmatch(
        r"answers after (\d\.\d) s, and comfyd would give it up after 0\.2 s; "
        r"set STARTUP_CHECK_MAX_TRIES to (\d+) or more",
        run.one("engine")[1],
    )
    assert found is not None, run.out
    assert int(found[2]) * 0.1 >= 1.8 * float(found[1])


def test_a_command_that_cannot_be_executed_fails(
    command: Command, engine: Callable[..., Environ], tmp_path: Path
) -> None:
    script = tmp_path / "no-interpreter"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    run = command(**engine(cmd=str(script)))
    assert run.code == 1
    assert run.one("engine")[1].startswith("cannot execute the engine's command ")


def test_an_engine_port_that_is_taken_fails_and_nothing_is_started(
    command: Command, engine: Callable[..., Environ], tmp_path: Path
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        variables = engine(body=f"open({str(tmp_path / 'started')!r}, 'w')")
        port = server.getsockname()[1]
        run = command(**{**variables, "COMFYUI_PORT_HOST": str(port)})
        assert run.code == 1
        assert f"not started: 127.0.0.1 port {port} is taken by " in run.one("engine")[1]
        assert f"(pid {os.getpid()})" in run.one("engine")[1]
    assert not (tmp_path / "started").exists()


def test_the_nodes_of_warm_up_and_workflows_are_looked_for(command: Command, tmp_path: Path) -> None:
    graph = {"1": {"class_type": "EmptyImage", "inputs": {}}, "2": {"class_type": "NoSuchNode", "inputs": {}}}
    warmup = tmp_path / "warmup.json"
    warmup.write_text(json.dumps(graph))
    workflows = tmp_path / "workflows"
    workflows.mkdir()
    (workflows / "bad.json").write_text("{")
    saving = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}}
    (workflows / "lacking.json").write_text(json.dumps({**graph, "3": saving}))
    run = command(WARMUP_PROMPT_FILE=warmup, WORKFLOW_DIR=workflows)
    assert run.code == 1
    assert run.one("warm-up")[0] == "FAILED"
    assert "does not have: NoSuchNode" in run.one("warm-up")[1]
    found = run.of("workflows")
    assert [verdict for verdict, _ in found] == ["warning", "ok", "warning"]
    assert found[0][1].startswith("bad.json: ")
    assert found[1][1] == f"1 workflow in {workflows}"
    assert found[2][1].startswith("lacking needs node classes that this ComfyUI does not have: NoSuchNode")
    del graph["2"]
    warmup.write_text(json.dumps(graph))
    (workflows / "lacking.json").unlink()
    assert command(WARMUP_PROMPT_FILE=warmup, WORKFLOW_DIR=workflows).one("warm-up")[0] == "ok"


def test_a_workflow_folder_that_was_set_and_is_not_there_is_warned_of(command: Command, tmp_path: Path) -> None:
    run = command("--no-start", WORKFLOW_DIR=tmp_path / "none")
    assert run.of("workflows")[0][0] == "warning"


def test_what_a_workflow_prints_does_not_get_into_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talkative.py").write_text("print('hello')\n")
    found = check_workflows(tmp_path, required=True)
    assert found.findings[-1].what == f"0 workflows in {tmp_path}"
    assert capsys.readouterr() == ("", "hello\n")


def test_many_missing_classes_are_cut() -> None:
    found = missing_classes("warm-up", "it", [*"abcdefgh", "a"], frozenset("h"))
    assert isinstance(found, Finding)
    assert found.what == "it needs node classes that this ComfyUI does not have: a, b, c, d, e and 2 more"
    assert missing_classes("warm-up", "it", "ab", frozenset("abc")) is None


def test_a_ctrl_c_stops_the_engine_and_leaves_nothing(environ: Environ, engine: Callable[..., Environ]) -> None:
    """The fixture that marks processes sees to it that none is left."""
    program = (
        "import argparse, os, sys; from comfyd.cli.doctor import add_parser, doctor_command\n"
        "parser = argparse.ArgumentParser(); add_parser(parser.add_subparsers())\n"
        "sys.exit(doctor_command(parser.parse_args(['doctor'])))"
    )
    variables = engine(body="import pathlib, signal; pathlib.Path('began').touch(); signal.pause()")
    cwd = Path(variables["INPUT_DIR"])
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**environ, **variables}, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        give_up_at = time.monotonic() + 20
        while not (cwd / "began").exists():
            assert time.monotonic() < give_up_at
            assert process.poll() is None
            time.sleep(0.02)  # a file cannot be waited for
        process.send_signal(2)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "\ncomfyd doctor: stopped\n")


@pytest.mark.comfyui
@pytest.mark.skipif(not COMFYUI_DIR, reason="COMFYUI_DIR is not set")
def test_real_comfyui_is_started_and_tells_its_broken_nodes(command: Command, tmp_path: Path) -> None:
    base = tmp_path / "base"
    sources = {"Broken": "import no_such_module_anywhere", "Unmapped": "", "Good": "NODE_CLASS_MAPPINGS = {}"}
    for name, source in sources.items():
        (base / "custom_nodes" / name).mkdir(parents=True)
        (base / "custom_nodes" / name / "__init__.py").write_text(source)
    for name in ("input", "output", "models", "front"):
        (base / name).mkdir()
    port = free_port()
    argv = [
        *(comfyui_python(), str(Path(COMFYUI_DIR) / "main.py"), "--base-directory", str(base)),
        *("--cpu", "--listen", "127.0.0.1", "--port", str(port), "--front-end-root", str(base / "front")),
        *("--disable-api-nodes", "--disable-auto-launch", "--database-url", "sqlite:///:memory:"),
    ]
    run = command(
        CMD=shlex.join(argv), BASE="", COMFY_HOME=COMFYUI_DIR, COMFYUI_PORT_HOST=port, STARTUP_CHECK_MAX_TRIES=100,
        INPUT_DIR=base / "input", OUTPUT_DIR=base / "output", MODEL_DIR=base / "models",
    )  # fmt: skip
    assert run.code == 0, run.out
    assert re.match(r"ComfyUI \d+\.\d+\.\d+ answers after \d+\.\d s ", run.one("engine")[1])
    assert [text.partition(";")[0] for _, text in run.of("nodes")] == [
        "Broken was not imported: No module named 'no_such_module_anywhere'",
        "Unmapped was not imported: the lack of NODE_CLASS_MAPPINGS or NODES_LIST",
    ]
