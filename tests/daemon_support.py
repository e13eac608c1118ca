"""What the tests of the whole daemon share: start it as a process, read its log, talk to it, see what it left behind.

``running_daemon`` needs no event loop (for session fixtures); ``open_daemon`` is the same for tests on Trio; both look
at the end for what was left behind. Waits are for a line of the log, a process or an answer.

A line of the log arrives through a pipe and a thread, so it may come after the answer that it belongs to: after an
answer wait for it, and look at the whole log only once the daemon has exited.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import attrs
import httpx
import trio
from process_support import PROGRAMS, Family, wait_vanished

from comfyd.engine.guard import read_processes, with_descendants

START_WAIT_S: Final = 20.0
"""A daemon starts in about a second; two cores shared with other tests may make it many."""
LOG_WAIT_S: Final = 15.0
END_WAIT_S: Final = 20.0

Event = dict[str, Any]
Graph = dict[str, Any]


@attrs.define(eq=False)
class Log:
    """The daemon's stderr, read by a thread: all *lines*, the *events* among them, and the lines that are none."""

    lines: list[str] = attrs.field(factory=list)
    events: list[Event] = attrs.field(factory=list)
    plain: list[str] = attrs.field(factory=list)
    ended: bool = False
    _more: threading.Condition = attrs.field(init=False, factory=threading.Condition)

    def read_from(self, stderr: Any) -> None:
        """Read to the end; the body of the reading thread."""
        with stderr:
            for raw in stderr:
                line = raw.decode("utf-8", "replace").rstrip("\n")
                with self._more:
                    self.lines.append(line)
                    try:
                        self.events.append(json.loads(line))
                    except ValueError:
                        self.plain.append(line)
                    self._more.notify_all()
        with self._more:
            self.ended = True
            self._more.notify_all()

    def find(self, event: str, **fields: Any) -> list[Event]:
        """Return the events of that name with these fields, oldest first. A callable is asked about the value."""
        return [
            found for found in list(self.events)
            if found["event"] == event and all(_fits(found.get(name), wish) for name, wish in fields.items())
        ]  # fmt: skip

    def wait_for(self, event: str, *, count: int = 1, timeout_s: float = LOG_WAIT_S, **fields: Any) -> Event:
        """Block until the event was logged *count* times, and return that one.

        Raises:
            AssertionError: it was not, within *timeout_s* or before the log ended. The text holds the log.
        """
        give_up_at = time.monotonic() + timeout_s
        with self._more:
            while len(found := self.find(event, **fields)) < count:
                left_s = give_up_at - time.monotonic()
                if self.ended or left_s <= 0:
                    why = "the log ended" if self.ended else f"not within {timeout_s:g} s"
                    raise AssertionError(f"no {event} {fields or ''} ({count}): {why}; the log:\n{self}")
                self._more.wait(left_s)
        return found[count - 1]

    async def wait(self, event: str, *, count: int = 1, timeout_s: float = LOG_WAIT_S, **fields: Any) -> Event:
        """Do what :meth:`wait_for` does, without blocking the other tasks."""
        return await trio.to_thread.run_sync(
            lambda: self.wait_for(event, count=count, timeout_s=timeout_s, **fields),
            abandon_on_cancel=True,  # the thread only reads
            limiter=trio.CapacityLimiter(1),
        )

    def __str__(self) -> str:
        return "\n".join(self.lines)


def _fits(value: Any, wish: Any) -> bool:
    return bool(wish(value)) if callable(wish) else bool(value == wish)


@attrs.define(eq=False)
class Daemon:
    """A daemon that was started. Whoever started it calls :meth:`stop` and then :meth:`assert_nothing_left`."""

    process: subprocess.Popen[bytes]
    folder: Path
    family: Family
    log: Log
    _reader: threading.Thread
    _pidfd: int

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def input_dir(self) -> Path:
        return self.folder / "input"

    @property
    def output_dir(self) -> Path:
        return self.folder / "output"

    @property
    def url(self) -> str:
        """Where it listens; waits for the line that says it."""
        return str(self.log.wait_for("daemon.listening", timeout_s=START_WAIT_S)["url"])

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def engine_pid(self) -> int:
        """The newest engine's pid; waits for the first."""
        self.log.wait_for("engine.started", timeout_s=START_WAIT_S)
        return int(self.log.find("engine.started")[-1]["pid"])

    # --- waiting

    def wait_ready(self, timeout_s: float = START_WAIT_S) -> None:
        """Block until ``/ready`` says 200. The engine's *up* is logged just before, so few looks are needed."""
        self.log.wait_for("engine.up", timeout_s=timeout_s)
        give_up_at = time.monotonic() + timeout_s
        while (answer := httpx.get(f"{self.url}/ready", trust_env=False)).status_code != 200:
            assert time.monotonic() < give_up_at, f"not ready: {answer.text}; the log:\n{self.log}"
            time.sleep(0.01)  # between "up" and "warm" there is no line to wait for without a warm-up prompt

    async def wait_exit(self, within_s: float = END_WAIT_S) -> int:
        """Wait until it has exited and its log is read, and return its exit code."""
        with trio.move_on_after(within_s) as limit:
            await trio.lowlevel.wait_readable(self._pidfd)
        assert not limit.cancelled_caught, f"the daemon did not exit within {within_s:g} s; the log:\n{self.log}"
        return await trio.to_thread.run_sync(self._reaped)

    def _reaped(self) -> int:
        code = self.process.wait(timeout=END_WAIT_S)
        self._reader.join(timeout=END_WAIT_S)
        assert not self._reader.is_alive(), "somebody still holds the daemon's stderr"
        return code

    # --- ending

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def stop(self, within_s: float = END_WAIT_S) -> int:
        """Stop it by SIGTERM (or wait for it, if it is stopping already); block; return the exit code.

        Raises:
            AssertionError: it did not exit in time. It is killed then.
        """
        if self.process.poll() is None:
            self.signal()
        try:
            self.process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the daemon did not stop within {within_s:g} s; the log:\n{self.log}") from None
        return self._reaped()

    def kill(self) -> None:
        """Kill it and all of its family. For a test that has failed, or that is about just this."""
        self.process.kill()
        self.process.wait()
        for pid in self.family.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of our descriptors, and kill whatever still lives."""
        self.kill()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    # --- what is there

    def processes(self) -> dict[int, str]:
        """Return the live processes below the daemon, itself not included: pid to command line."""
        everyone = read_processes()
        below = with_descendants({self.pid}, everyone)
        return {process.pid: _command_line(process.pid) for process in below if process.pid != self.pid}

    async def wait_no_process(self, within_s: float) -> None:
        """Wait until no process that was started by the daemon, directly or not, is alive."""
        with trio.move_on_after(within_s) as limit:
            while alive := list(self.family.alive()):
                await wait_vanished([pidfd for pid in alive if (pidfd := _open_pidfd(pid)) is not None])
        left = {pid: _command_line(pid) for pid in self.family.alive()}
        assert not limit.cancelled_caught, f"still alive after {within_s:g} s: {left}"

    def job_files(self) -> list[str]:
        """Return the files below INPUT_DIR and OUTPUT_DIR, whoever made them, relative to the daemon's folder."""
        folders = (self.input_dir, self.output_dir)
        files = (path for folder in folders if folder.is_dir() for path in folder.rglob("*") if not path.is_dir())
        return sorted(str(path.relative_to(self.folder)) for path in files)

    async def wait_outputs_removed(self, within_s: float = 5.0) -> None:
        """Wait until OUTPUT_DIR has no file, while no job runs. They are removed soon after the answer, unannounced."""
        with trio.move_on_after(within_s):
            # A folder cannot be waited for without inotify.
            while any(file.startswith("output/") for file in self.job_files()):  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert not [file for file in self.job_files() if file.startswith("output/")]

    def assert_no_bug(self) -> None:
        """Check that it logged no bug of its own, no traceback, and no line that is not an event."""
        bugs = [
            event
            for event in self.log.events
            if event["event"].endswith(".bug")
            or ("traceback" in event and not event["event"].startswith("workflow."))  # those are their authors'
        ]
        assert not bugs, f"a bug was logged: {json.dumps(bugs, indent=1)}"
        plain = [line for line in self.log.plain if not line.startswith("comfyd: ")]
        assert not plain, f"lines that are not events: {plain}"

    def assert_nothing_left(self) -> None:
        """Check after its end that neither a process nor a file is left, and that it logged no bug."""
        assert self.process.poll() is not None, "it has not ended"
        left = {pid: _command_line(pid) for pid in self.family.alive()}
        assert not left, f"processes are left: {left}"
        assert not (files := self.job_files()), f"files are left: {files}"
        self.assert_no_bug()

    # --- talking

    def client(self) -> httpx.AsyncClient:
        """Make a client for it, without time-outs and without a bound on connections; the caller closes it."""
        return httpx.AsyncClient(
            base_url=self.url,
            timeout=None,  # noqa: S113  # time-outs are the test's own
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
        )


def start_daemon(
    folder: Path,
    *,
    cmd: str | None = None,
    environ: Mapping[str, str] | None = None,
    arguments: tuple[str, ...] | None = None,
) -> Daemon:
    """Start the daemon in *folder*, which is its home, with an environment of its own; does not wait.

    *cmd* is the engine's command line; without one it is the embedded engine's. *environ* adds to the environment, and
    replaces: an empty value there counts as unset. *arguments* replace those of the command line.
    """
    family = Family()
    folder.mkdir(parents=True, exist_ok=True)
    env = {
        **family.env(),
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "HOST": "127.0.0.1",
        "PORT": "0",
        "LOG_FORMAT": "json",
        "STATE_DIR": str(folder / "state"),
        "INPUT_DIR": str(folder / "input"),
        "OUTPUT_DIR": str(folder / "output"),
        **({"CMD": cmd, "BASE": ""} if cmd is not None else {}),
        **(environ or {}),
    }
    if arguments is None:
        arguments = ("run",) if cmd is not None else ("run", "--embedded")
    if cmd is not None:
        env.setdefault("COMFYUI_PORT_HOST", str(free_port()))
    process = subprocess.Popen(
        [sys.executable, "-m", "comfyd", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=env,
        cwd=folder,
        start_new_session=True,  # a signal that the tests' terminal gets is not the daemon's
    )
    log = Log()
    reader = threading.Thread(target=log.read_from, args=(process.stderr,), daemon=True)
    reader.start()
    return Daemon(process, folder, family, log, reader, os.pidfd_open(process.pid))


@contextmanager
def running_daemon(folder: Path, *, ready: bool = True, **options: Any) -> Iterator[Daemon]:
    """Start a daemon, wait until it is *ready*, and at the end stop it and see that nothing is left. Blocking."""
    daemon = start_daemon(folder, **options)
    try:
        if ready:
            daemon.wait_ready()
        yield daemon
        assert daemon.stop() == 0, str(daemon.log)
        daemon.assert_nothing_left()
    finally:
        daemon.close()


@asynccontextmanager
async def open_daemon(folder: Path, *, ready: bool = True, **options: Any) -> AsyncIterator[Daemon]:
    """Start a daemon, and with *ready* wait until it is. At the end it must exit, asked if need be, leaving nothing.

    *options* are those of :func:`start_daemon`. A test that expects a certain exit code waits for it inside.
    """
    daemon = start_daemon(folder, **options)
    try:
        if ready:
            await trio.to_thread.run_sync(daemon.wait_ready, abandon_on_cancel=True)
        yield daemon
        if daemon.process.poll() is None:
            daemon.signal()
            assert await daemon.wait_exit() == 0, str(daemon.log)
        else:
            await daemon.wait_exit()
        daemon.assert_nothing_left()
    finally:
        daemon.close()


async def post(client: httpx.AsyncClient, graph: Graph, **fields: Any) -> httpx.Response:
    """Post a prompt and wait for its answer."""
    return await client.post("/prompt", json={"prompt": graph, **fields})


@attrs.define(eq=False)
class Posted:
    """A request on its way. *answer* is there once :meth:`wait` has returned."""

    job_id: str
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    answer: httpx.Response | None = None
    ended_at: float = 0.0
    _done: trio.Event = attrs.field(factory=trio.Event)

    async def run(self, client: httpx.AsyncClient, graph: Graph, fields: Mapping[str, Any]) -> None:
        try:
            with self.scope:
                self.answer = await post(client, graph, id=self.job_id, **fields)
        finally:
            self.ended_at = trio.current_time()
            self._done.set()

    async def wait(self, within_s: float = END_WAIT_S) -> httpx.Response:
        with trio.fail_after(within_s):
            await self._done.wait()
        assert self.answer is not None, "the request was cancelled"
        return self.answer

    def leave(self) -> None:
        """Close the connection without waiting for the answer, as a client that gives up does."""
        self.scope.cancel("the client leaves")


_numbers = itertools.count(1)


async def submit(
    daemon: Daemon, nursery: trio.Nursery, client: httpx.AsyncClient, graph: Graph, **fields: Any
) -> Posted:
    """Post a prompt in a task of its own; return when the daemon has accepted it."""
    posted = Posted(fields.pop("id", None) or f"job-{next(_numbers)}")
    nursery.start_soon(posted.run, client, graph, fields)
    await daemon.log.wait("job.accepted", job_id=posted.job_id)
    return posted


async def wait_state(
    daemon: Daemon, job_id: str, state: str, *, node_id: str | None = None, within_s: float = LOG_WAIT_S
) -> Event:
    """Follow an accepted job's events until it is in *state* (and at node *node_id*), and return that event.

    HTTP 1.0, because its answer is the plain stream up to the end, and no HTTP client's generators have to be closed.
    """
    seen: list[Event] = []
    with trio.move_on_after(within_s):
        async with await trio.open_tcp_stream("127.0.0.1", daemon.port) as stream:
            await stream.send_all(f"GET /jobs/{job_id}/events HTTP/1.0\r\n\r\n".encode())
            rest = b""
            async for piece in stream:
                *lines, rest = (rest + piece).split(b"\n")
                seen += [json.loads(line[6:]) for line in lines if line.startswith(b"data: ")]
                for event in seen:
                    if event["state"] == state and node_id in (None, event.get("node_id")):
                        return event
    raise AssertionError(f"{job_id} was not {state} within {within_s:g} s: {seen}; the log:\n{daemon.log}")


def problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """Check that an answer is a problem document of that status and type, and return it."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    document: dict[str, Any] = answer.json()
    assert (document["type"], document["status"]) == (kind, status), document
    return document


# --- graphs

_colours = itertools.count(1)


def picture(*, seconds: float = 0.0, uninterruptible: bool = False, prefix: str = "test", size_px: int = 16) -> Graph:
    """A graph that makes and saves a small picture, taking *seconds*. No two are equal, so none is cached."""
    graph: Graph = {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": size_px, "height": size_px, "batch_size": 1, "color": next(_colours)},
        },
        "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }
    if seconds:
        inputs = {"seconds": seconds, "uninterruptible": uninterruptible, "value": ["1", 0]}
        graph["2"] = {"class_type": "Sleep", "inputs": inputs}
        graph["3"]["inputs"]["images"] = ["2", 0]
    return graph


def faulty(fault: Mapping[str, Any], **options: Any) -> Graph:
    """A picture's graph that ``flaky_engine.py`` meets with *fault*; *options* are those of :func:`picture`."""
    graph = picture(**options)
    graph["1"]["_meta"] = {"title": "Empty", "flaky": dict(fault)}
    return graph


def large_file(size_mb: float) -> Graph:
    """A graph that writes a file of so many MiB."""
    inputs = {"size_mb": size_mb, "filename_prefix": f"large-{next(_colours)}"}
    return {"1": {"class_type": "SaveBytes", "inputs": inputs}}


def raising(message: str = "raised on demand") -> Graph:
    """A graph whose node 2 raises."""
    graph = picture()
    graph["2"] = {"class_type": "Raise", "inputs": {"message": message, "enabled": True, "value": ["1", 0]}}
    graph["3"]["inputs"]["images"] = ["2", 0]
    return graph


# --- the rest


def free_port() -> int:
    """Find a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(name: str, *arguments: object) -> str:
    """Return the command line (for CMD) of one of the programs, with what is installed at its disposal."""
    return " ".join([sys.executable, str(PROGRAMS / f"{name}.py"), *map(str, arguments)])


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "(gone)"
