"""The processes that are measured: an engine, comfyd with an engine as its child, and another server like it."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import attrs
import msgspec

from benchmarks.load import Load, Measured
from benchmarks.sockets import BadAnswer, ask_once, request

REPOSITORY: Final = Path(__file__).parents[1]
_START_S: Final = 90.0
_STOP_S: Final = 40.0
_LOAD_S: Final = 300.0
_MIB: Final = 1024.0  # of the kB in /proc
NO_SETTINGS: Final[Mapping[str, str]] = MappingProxyType({})


class NotStarted(Exception):
    """A contender did not come up."""


class LoadFailed(Exception):
    """A contender did not do what a load asked of it."""


@attrs.frozen(kw_only=True)
class Cores:
    """Who runs where. Where there are but two, the load shares with what is not measured."""

    server: list[int]
    engine: list[int]
    load: list[int]

    @classmethod
    def shared_out(cls) -> "Cores":
        """Give the server a processor of its own, if there are two or more."""
        available = sorted(os.sched_getaffinity(0))
        if len(available) < 2:
            return cls.everywhere()
        return cls(server=available[:1], engine=available[1:2], load=available[2:3] or available[1:2])

    @classmethod
    def everywhere(cls) -> "Cores":
        """Leave it to the system: for engines that use every processor themselves."""
        available = sorted(os.sched_getaffinity(0))
        return cls(server=available, engine=available, load=available)


@attrs.frozen(kw_only=True)
class EngineKind:
    """Which engine: *argv* is its command but for address and folders."""

    argv: tuple[str, ...]

    def command(self, port: int, folder: Path) -> list[str]:
        """Return the whole command line."""
        flags = ["--listen", "127.0.0.1", "--port", str(port)]
        for name in ("output", "input", "temp", "user"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            flags += [f"--{name}-directory", str(folder / name)]
        return [*self.argv, *flags]


EMBEDDED: Final = EngineKind(argv=(sys.executable, "-m", "comfyd.embedded", "--cost", "none"))
MEDIA: Final = EngineKind(argv=(sys.executable, "-m", "benchmarks.media_engine", "--cost", "none"))
COUNTING: Final = EngineKind(argv=(sys.executable, "-m", "benchmarks.counting_engine", "--cost", "none"))


def real_comfyui(front: Path) -> EngineKind | None:
    """ComfyUI itself, if COMFYUI_DIR is set; *front* is an empty folder, as no front end is wanted."""
    home = Path(os.environ.get("COMFYUI_DIR", ""))
    if not os.environ.get("COMFYUI_DIR"):
        return None
    candidates = (home / "venv/bin/python", home / ".venv/bin/python")
    found = next((str(path) for path in candidates if path.is_file()), sys.executable)
    python = os.environ.get("COMFYUI_PYTHON") or found
    options = ("--cpu", "--disable-api-nodes", "--disable-auto-launch", "--database-url", "sqlite:///:memory:")
    return EngineKind(argv=(python, str(home / "main.py"), *options, "--front-end-root", str(front)))


@attrs.define(eq=False, kw_only=True)
class Server:
    """A contender that runs. *engine_pid* is None where nobody tells it."""

    pid: int
    url: str
    folder: Path
    started_in_s: float
    cores: Cores
    engine_pid: int | None = None
    engine_url: str = ""

    def pin(self) -> None:
        """Put server and engine on their processors, with all the threads that they have."""
        _pin(self.pid, self.cores.server)
        if self.engine_pid is not None:
            _pin(self.engine_pid, self.cores.engine)

    def run(self, load: Load) -> Measured:
        """Run a load against it.

        Raises:
            LoadFailed: it did not do what was asked, or not in time.
        """
        load.output_dir = str(self.folder / "output")
        load.cores = self.cores.load
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "benchmarks.load"],
                input=msgspec.json.encode(load),
                capture_output=True,
                timeout=_LOAD_S,
                check=True,
                cwd=REPOSITORY,
            )
        except subprocess.TimeoutExpired as exc:
            raise LoadFailed(f"{load.mode} of {self.url} took more than {_LOAD_S:g} s") from exc
        except subprocess.CalledProcessError as exc:
            last = exc.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise LoadFailed(f"{load.mode} of {self.url}: {last}") from exc
        return msgspec.json.decode(ended.stdout, type=Measured)

    def rss_mb(self) -> float:
        """Return what it holds in memory now, without its engine."""
        return _status(self.pid, "VmRSS")

    def cpu_s(self) -> float:
        """Return the processor time that it has taken so far, without its engine (proc(5): utime and stime)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def forget_peak(self) -> None:
        """Let the peak begin anew (Linux, Documentation/filesystems/proc.rst, clear_refs)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak_rss_mb(self) -> float:
        """Return the most that it has held in memory since :meth:`forget_peak`."""
        return _status(self.pid, "VmHWM")


@contextlib.contextmanager
def engine_alone(kind: EngineKind, cores: Cores) -> Iterator[Server]:
    """Run an engine with nothing before it. A raw client takes the server's place, and its processor."""
    with tempfile.TemporaryDirectory(prefix="comfyd-bench-") as folder:
        port = _free_port()
        began = time.perf_counter()
        with _process(kind.command(port, Path(folder)), {}) as process:
            url = f"http://127.0.0.1:{port}"
            _wait_ok(process, url, "/system_stats")
            took_s = time.perf_counter() - began
            placed = Cores(server=cores.engine, engine=cores.engine, load=cores.server)
            server = Server(pid=process.pid, url=url, folder=Path(folder), started_in_s=took_s, cores=placed)
            server.pin()
            yield server


@contextlib.contextmanager
def comfyd(kind: EngineKind, cores: Cores, settings: Mapping[str, str] = NO_SETTINGS) -> Iterator[Server]:
    """Run comfyd with an engine as its child; *settings* are more of its environment."""
    with tempfile.TemporaryDirectory(prefix="comfyd-bench-") as name:
        folder = Path(name)
        port, engine_port = _free_port(), _free_port()
        environ = {
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "CMD": shlex.join(kind.command(engine_port, folder)),
            "COMFYUI_PORT_HOST": str(engine_port),
            "INPUT_DIR": str(folder / "input"),
            "OUTPUT_DIR": str(folder / "output"),
            "BASE": "",
            "STATE_DIR": "",
            "STARTUP_CHECK_MAX_TRIES": str(int(_START_S)),
            "LOG_FORMAT": "json",
            "DRAIN_TIMEOUT_S": "5",
            **settings,
        }
        log = folder / "comfyd.log"
        began = time.perf_counter()
        with _process([sys.executable, "-m", "comfyd", "run"], environ, log=log) as process:
            url = f"http://127.0.0.1:{port}"
            _wait_ok(process, url, "/ready")
            server = Server(
                pid=process.pid,
                url=url,
                folder=folder,
                started_in_s=time.perf_counter() - began,
                cores=cores,
                engine_pid=_engine_pid(log),
                engine_url=f"http://127.0.0.1:{engine_port}",
            )
            server.pin()
            yield server


@contextlib.contextmanager
def peer(cores: Cores, kind: EngineKind | None = None, settings: Mapping[str, str] = NO_SETTINGS) -> Iterator[Server]:
    """Run PEER_COMMAND: another server of ``POST /prompt`` that starts its engine itself.

    It stays in the foreground, listens on PORT, lets its engine listen on COMFYUI_PORT_HOST, and stops on SIGINT. With
    *kind* it is told which engine to start, and where files are, by CMD, INPUT_DIR and OUTPUT_DIR. Of *settings*, which
    are comfyd's, it obeys those that it knows.
    """
    port, engine_port = _free_port(), _free_port()
    environ = {**os.environ, **settings, "PORT": str(port), "COMFYUI_PORT_HOST": str(engine_port), "LOG_LEVEL": "warn"}
    with tempfile.TemporaryDirectory(prefix="comfyd-bench-") as folder:
        environ["PEER_DATA"] = folder
        if kind is not None:
            environ["CMD"] = shlex.join(kind.command(engine_port, Path(folder)))
            environ["INPUT_DIR"] = os.path.join(folder, "input")
            environ["OUTPUT_DIR"] = os.path.join(folder, "output")
            environ["PYTHONPATH"] = str(REPOSITORY)  # it may start the engine in another folder
        began = time.perf_counter()
        command = shlex.split(os.environ["PEER_COMMAND"])
        with _process(command, environ, stop_by=signal.SIGINT) as process:
            url = f"http://127.0.0.1:{port}"
            _wait_ok(process, url, "/ready")
            took_s = time.perf_counter() - began
            server = Server(pid=process.pid, url=url, folder=Path(folder), started_in_s=took_s, cores=cores)
            server.engine_pid = next(iter(_children(process.pid)), None)
            server.pin()
            yield server


def remote(*options: str) -> contextlib.AbstractContextManager[str]:
    """Run :mod:`benchmarks.remote`; yield its URL."""
    return _helper("benchmarks.remote", *options)


def sink() -> contextlib.AbstractContextManager[str]:
    """Run :mod:`benchmarks.sink`; yield its URL."""
    return _helper("benchmarks.sink")


@contextlib.contextmanager
def _helper(module: str, *options: str) -> Iterator[str]:
    """Run a server of ours that prints its port."""
    command = [sys.executable, "-m", module, *options]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None  # for mypy
            port = process.stdout.readline().strip()
            if not port:
                raise NotStarted(f"{command!r} said nothing")
            yield f"http://127.0.0.1:{int(port)}"
        finally:
            process.kill()  # it holds nothing that should be saved


@attrs.frozen(kw_only=True)
class Taken:
    """What a sink has taken: how many requests, and when the last one, by ``CLOCK_MONOTONIC`` in seconds."""

    taken: int
    last_at: float


def taken_by(sink_url: str) -> Taken:
    """Ask a sink."""
    answer = ask_once(sink_url, request("GET", "/taken"))
    told: Any = msgspec.json.decode(answer.body)
    return Taken(taken=int(told["taken"]), last_at=float(told["last_at"]))


def wait_quiet(sink_url: str, *, expected: int | None = None, quiet_s: float = 0.5, most_s: float = 120.0) -> Taken:
    """Wait until a sink has taken *expected* requests in all, or, from now on, nothing for *quiet_s*.

    Raises:
        LoadFailed: neither came about within *most_s*.
    """
    began_at = time.perf_counter()
    while time.perf_counter() < began_at + most_s:
        told = taken_by(sink_url)
        if told.taken == expected or time.perf_counter() - max(began_at, told.last_at) > quiet_s:
            return told
        time.sleep(0.02)
    raise LoadFailed(f"webhooks still came after {most_s:g} s")


def _engine_pid(log: Path) -> int:
    for line in log.read_bytes().splitlines():
        if b'"engine.started"' in line:
            return int(json.loads(line)["pid"])
    raise NotStarted("comfyd did not say which process its engine is")


@contextlib.contextmanager
def _process(
    command: list[str],
    environ: dict[str, str],
    *,
    log: Path = Path(os.devnull),
    stop_by: signal.Signals = signal.SIGTERM,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in a session of its own, and end it and what it left in that session."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    # A file and not a pipe: nobody need keep up with it, and what is measured never waits for who reads its log.
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            env={**kept, **environ},
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(stop_by)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # Mostly nobody is left; numbers are given out in a circle, so nobody else has this one yet.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait_ok(process: subprocess.Popen[bytes], url: str, path: str) -> None:
    deadline = time.perf_counter() + _START_S
    last = "nothing"
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            raise NotStarted(f"{process.args!r} ended with {process.returncode}")
        try:
            answer = ask_once(url, request("GET", path))
            if answer.status == 200:
                return
            last = f"{answer.status} {answer.body[:300]!r}"
        except (OSError, BadAnswer) as exc:
            last = str(exc)  # it does not listen yet
        time.sleep(0.01)
    raise NotStarted(f"{process.args!r} did not answer {path} within {_START_S:g} s, but {last}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _pin(pid: int, cores: list[int]) -> None:
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(thread), cores)


def _children(pid: int) -> list[int]:
    """Return the processes that *pid* started and that still run (proc(5))."""
    found: list[int] = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def _status(pid: int, field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc does not tell {field} of process {pid}")
    return int(found[1]) / _MIB


def requests_of(server: Server) -> dict[str, int]:
    """Return how often each route of the server's counting engine was asked."""
    answer = ask_once(server.engine_url, request("GET", "/benchmark/requests"))
    counted: Any = msgspec.json.decode(answer.body)
    return {str(route): int(times) for route, times in counted.items()}
