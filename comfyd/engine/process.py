"""The engine's process: started, watched and stopped so that nothing of it is ever left behind.

The daemon's only child is the guard (``guard.py``), which owns the engine and all that the engine starts. What we know
of the engine we know from the guard's socket. No exit code is read from ``waitpid`` here, so a reaper of orphans beside
us (comfyd as PID 1) cannot take one away.
"""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import trio

from comfyd.engine import guard
from comfyd.engine.output import OutputLine, StreamName, Tail, forward_lines
from comfyd.errors import EngineError, StartupFailed
from comfyd.host.reaper import OWN_CHILDREN

KILL_WAIT_S: Final = 10.0  # a driver takes seconds to free tens of GB of pinned and device memory
OUTPUT_WAIT_S: Final = 1.0  # for the end of the output after the exit; a pipe may have been handed to a stranger
GUARD_WAIT_S: Final = 1.0  # for the guard, when it has nothing left to do
LEFTOVERS_WAIT_S: Final = 1.0


class EngineStuck(EngineError):
    """Processes of the engine survive SIGKILL: they hang inside the kernel, as with a dead GPU driver."""

    cause = "stuck"

    def __init__(self, pid: int, waited_s: float) -> None:
        super().__init__(f"the engine (pid {pid}) still has processes {waited_s:g} s after SIGKILL")
        self.pid = pid
        self.waited_s = waited_s


@attrs.frozen(kw_only=True)
class ProcessConfig:
    """What to run and how long to let it end.

    *env* is the whole environment; only ``COMFYD_ENGINE_ID`` is added, a mark that descendants inherit. A name in
    *argv* without a slash is looked for on the ``PATH`` of *env*. *cwd* None is the daemon's own.
    """

    argv: tuple[str, ...] = attrs.field(validator=attrs.validators.min_len(1))
    env: Mapping[str, str]
    cwd: Path | None = None
    stop_grace_s: float = attrs.field(default=10.0, validator=attrs.validators.ge(0))


@attrs.define(eq=False)
class EngineProcess:
    """A running engine, from `open_process`. *pid* is the engine's own; *returncode* is None until it has ended."""

    pid: int
    _link: "_GuardLink"
    _stop_grace_s: float
    returncode: int | None = attrs.field(init=False, default=None)
    _tail: Tail = attrs.field(init=False, factory=Tail)
    _stop_asked_at: float | None = attrs.field(init=False, default=None)
    _outputs_open: int = attrs.field(init=False, default=2)
    _output_ended: trio.Event = attrs.field(init=False, factory=trio.Event)
    _exited: trio.Event = attrs.field(init=False, factory=trio.Event)
    _gone: trio.Event = attrs.field(init=False, factory=trio.Event)

    @property
    def last_lines(self) -> tuple[OutputLine, ...]:
        """The last lines of output, oldest first; complete once `wait` has returned."""
        return self._tail.lines

    async def wait(self) -> int:
        """Wait until the engine has ended and its output is read; return its exit code, negative for a signal."""
        await self._exited.wait()
        return self._known_returncode()

    async def stop(self) -> int:
        """Send SIGTERM to the engine's group, after the grace period SIGKILL to all of it; return its exit code.

        Returns when no process of the engine is left. Any number of tasks may call this, at any time; each sees the
        one ladder through, whichever of them is cancelled.

        Raises:
            EngineStuck: not even SIGKILL ended it.
        """
        if self._stop_asked_at is None:
            self._stop_asked_at = trio.current_time()
            self._link.command(guard.TERMINATE)
        with trio.move_on_at(self._stop_asked_at + self._stop_grace_s):
            await self._gone.wait()
        if not self._gone.is_set():
            self.kill()
            with trio.move_on_after(KILL_WAIT_S):
                await self._gone.wait()
        if not self._gone.is_set():
            raise EngineStuck(self.pid, KILL_WAIT_S)
        return self._known_returncode()

    def kill(self) -> None:
        """Have SIGKILL sent to the engine and all its descendants, wherever they moved to. Does not wait."""
        self._link.command(guard.KILL)

    async def _watch(self, emit: Callable[[OutputLine], None]) -> None:
        """Follow the guard's reports until nothing is left of the engine."""
        report = await self._link.read_report()
        try:
            if report.startswith("exited "):
                self.returncode = int(report.removeprefix("exited "))
            else:
                await self._link.wait_exited()
                await self._link.kill_leftovers()
                emit(OutputLine(stream="stderr", text="[comfyd: the engine's guard was killed, the engine with it]"))
            with trio.move_on_after(OUTPUT_WAIT_S):
                await self._output_ended.wait()
            self._set_exited()
            await self._link.wait_exited()  # the guard leaves when no process is left
        finally:
            self._set_gone()

    async def _forward(
        self, source: trio.abc.ReceiveStream, stream: StreamName, emit: Callable[[OutputLine], None]
    ) -> None:
        """Forward one of the outputs to its end."""
        try:
            await forward_lines(source, stream, emit)
        finally:
            self._outputs_open -= 1
            if self._outputs_open == 0:
                self._output_ended.set()

    def _set_exited(self) -> None:
        """Release who waits for the exit. One that nobody reported is the parent death signal's: SIGKILL."""
        if self.returncode is None:
            self.returncode = -signal.SIGKILL
        self._exited.set()

    def _set_gone(self) -> None:
        self._set_exited()
        self._gone.set()

    def _known_returncode(self) -> int:
        assert self.returncode is not None  # noqa: S101 - set before either event
        return self.returncode


@asynccontextmanager
async def open_process(config: ProcessConfig, on_line: Callable[[OutputLine], None]) -> AsyncIterator[EngineProcess]:
    """Start the engine; on leaving, by whatever way, stop it, and leave no process, task or file descriptor.

    *on_line* is called for each line of output, on Trio's thread, and must not block. Leaving is shielded from
    cancellation; it takes a few milliseconds if the engine has ended, else at most the grace period and about 12 s.

    Raises:
        StartupFailed: the command cannot be executed. It comes as it is; what the block raises comes in a group.
        EngineStuck: the engine survived SIGKILL (in a group).
    """
    async with _open_guard() as link:
        engine = EngineProcess(pid=await link.start_engine(config), link=link, stop_grace_s=config.stop_grace_s)

        def emit(line: OutputLine) -> None:
            engine._tail.add(line)
            on_line(line)

        # They outlast a cancellation from outside: an engine whose output nobody reads cannot stop in peace. Three
        # scopes, so that one whose on_line raises leaves the others at work.
        background = tuple(trio.CancelScope(shield=True) for _ in range(3))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_run_within, background[0], engine._watch, emit)
            nursery.start_soon(_run_within, background[1], engine._forward, link.stdout, "stdout", emit)
            nursery.start_soon(_run_within, background[2], engine._forward, link.stderr, "stderr", emit)
            try:
                yield engine
            finally:
                try:
                    bound_s = config.stop_grace_s + KILL_WAIT_S + GUARD_WAIT_S
                    with trio.move_on_after(bound_s, shield=True):
                        await engine.stop()
                finally:
                    engine._set_gone()  # for whoever waits for one that is stuck
                    for scope in background:
                        scope.cancel("the engine has stopped")


async def _run_within(scope: trio.CancelScope, function: Callable[..., Awaitable[None]], *arguments: object) -> None:
    with scope:
        await function(*arguments)


@attrs.define(eq=False)
class _GuardLink:
    """Our end of a guard: its process, its socket, and the engine's output."""

    stdout: trio.lowlevel.FdStream
    stderr: trio.lowlevel.FdStream
    _process: subprocess.Popen[bytes]
    _pidfd: int
    _control: socket.socket
    _mark: str = attrs.field(init=False, factory=lambda: uuid.uuid4().hex)
    _received: bytes = attrs.field(init=False, default=b"")

    async def start_engine(self, config: ProcessConfig) -> int:
        """Have the guard start the engine; return the engine's pid.

        Raises:
            StartupFailed: it cannot be started.
        """
        env = {**config.env, guard.ENGINE_ID_VARIABLE: self._mark}
        try:
            request = guard.encode_request(config.argv, env, str(config.cwd or Path.cwd()))
        except ValueError as error:
            raise StartupFailed(f"cannot start the engine: {error}") from error
        except FileNotFoundError as error:
            raise StartupFailed("cannot start the engine: our own working folder was removed") from error
        await self._send(request)
        match (await self.read_report()).split():
            case ["started", pid]:
                return int(pid)
            case ["failed", step, number]:
                raise StartupFailed(_explain(config, step, int(number)))
            case _:
                raise StartupFailed(f"cannot start the engine: its guard ended: {await self._last_words()}")

    def command(self, command: bytes) -> None:
        """Send one of the guard's commands; nothing happens if it has ended. A few bytes always fit, so never waits."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(command)

    async def read_report(self) -> str:
        """Return the guard's next line, or nothing at the end of file."""
        await trio.lowlevel.checkpoint()
        while b"\n" not in self._received:
            await trio.lowlevel.wait_readable(self._control)
            try:
                data = self._control.recv(1000)
            except ConnectionResetError:  # it left with a command of ours unread
                data = b""
            if not data:
                return ""
            self._received += data
        report, _, self._received = self._received.partition(b"\n")
        return report.decode()

    async def wait_exited(self) -> None:
        """Wait until the guard's process has ended, and reap it if nobody did."""
        await trio.lowlevel.wait_readable(self._pidfd)
        self._process.poll()

    async def kill_leftovers(self) -> None:
        """Kill what a killed guard left behind: descendants of the engine, known by what they inherited."""
        await trio.to_thread.run_sync(_kill_leftovers, self._process.pid, self._mark, limiter=trio.CapacityLimiter(1))

    async def end(self) -> None:
        """Close our end, upon which the guard kills what is left and leaves; if it does not, do it ourselves.

        Takes milliseconds, at most the sum of the three waits.
        """
        self._control.close()
        with trio.move_on_after(KILL_WAIT_S):
            await self.wait_exited()
        if self._process.returncode is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            with trio.move_on_after(GUARD_WAIT_S):
                await self.wait_exited()
            await self.kill_leftovers()

    async def _send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # then its report will be missing
            while data:
                await trio.lowlevel.wait_writable(self._control)
                data = data[self._control.send(data) :]

    async def _last_words(self) -> str:
        """Return the last line of what an ended guard wrote, such as the error of its interpreter."""
        with trio.move_on_after(GUARD_WAIT_S):
            text = bytes(await self.stderr.receive_some()).decode(errors="replace")
            return text.strip().rpartition("\n")[2] or "it said nothing"
        return "it said nothing"


@asynccontextmanager
async def _open_guard() -> AsyncIterator[_GuardLink]:
    """Start a guard; on leaving, make sure that it has ended, and whatever it guards with it.

    Raises:
        StartupFailed: the system refuses a process or a file descriptor.
    """
    with contextlib.ExitStack() as stack:
        try:
            link = _start_guard(stack)
        except OSError as error:
            raise StartupFailed(f"cannot start a process: {error}") from error
        try:
            yield link
        finally:
            with trio.move_on_after(KILL_WAIT_S + GUARD_WAIT_S + LEFTOVERS_WAIT_S, shield=True):
                await link.end()


def _start_guard(stack: contextlib.ExitStack) -> _GuardLink:
    """Start the guard's process; *stack* closes our ends of everything.

    This runs on Trio's thread on purpose, though it blocks it for 1 to 5 ms: a spawn is then atomic towards every task
    (no cancellation and no reaper between the fork and its pid being known), and an engine starts seldom.
    ``subprocess`` uses vfork here, so the time does not grow with our memory.
    """
    with contextlib.ExitStack() as theirs:
        control, guards_control = socket.socketpair()
        stack.callback(control.close)
        theirs.callback(guards_control.close)
        control.setblocking(False)
        stdout, guards_stdout = _open_pipe(stack, theirs)
        stderr, guards_stderr = _open_pipe(stack, theirs)
        with OWN_CHILDREN.spawning():
            process = subprocess.Popen(
                [*_guard_command(), str(guards_control.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=guards_stdout,
                stderr=guards_stderr,
                env=_guard_environment(),
                pass_fds=(guards_control.fileno(),),
                start_new_session=True,  # out of reach of the terminal's Ctrl-C, and a mark for _kill_leftovers
            )
            OWN_CHILDREN.own(process.pid)
        stack.callback(OWN_CHILDREN.disown, process.pid)  # after `end`, which has waited for it if it could be
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:  # no descriptor left, or a container's seccomp profile from before Linux 5.3
        control.close()  # so it leaves at once
        process.wait()
        raise
    stack.callback(os.close, pidfd)
    return _GuardLink(stdout=stdout, stderr=stderr, process=process, pidfd=pidfd, control=control)


def _open_pipe(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[trio.lowlevel.FdStream, int]:
    reading, writing = os.pipe()
    theirs.callback(os.close, writing)
    stream = trio.lowlevel.FdStream(reading)
    ours.callback(stream.close)
    return stream, writing


def _guard_environment() -> dict[str, str]:
    """Of our environment, what an interpreter needs to start: the guard has no use for the daemon's secrets."""
    needed = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
    return {
        name: value
        for name, value in os.environ.items()
        if name in needed or name.startswith(("_PYI_", "_MEI"))  # a one-file build finds its files by the last two
    }


def _guard_command() -> list[str]:
    if getattr(sys, "frozen", False):  # a one-file build has no interpreter to run a file with
        return [sys.executable, "__guard__"]
    return [sys.executable, "-I", "-S", guard.__file__]


def _explain(config: ProcessConfig, step: str, number: int) -> str:
    """Say why the command cannot be executed, better than the kernel's one word where we know better."""
    cause = os.strerror(number)
    command = config.argv[0]
    path = (config.cwd or Path()) / command
    if step == "chdir":
        return f"cannot start the engine in the folder {str(config.cwd)!r}: {cause}"
    if "/" not in command:
        cause += f" (looked for on PATH={config.env.get('PATH', os.defpath)!r})"
    elif path.is_dir():
        cause = os.strerror(errno.EISDIR)
    elif number == errno.EACCES and path.is_file():
        cause += " (the file is there; is it executable?)"
    elif number == errno.ENOENT and path.is_file():
        cause += " (the file is there; the interpreter that it names is not)"
    return f"cannot execute the engine's command {command!r}: {cause}"


def _kill_leftovers(session: int, mark: str) -> None:
    """Kill the processes of the guard's *session*, and those elsewhere that carry *mark*, with all below them.

    Blocks for some milliseconds, at most `LEFTOVERS_WAIT_S`. Repeats until a round finds none, as a process may fork
    during it; and once more, as a process in the middle of an exec shows no environment.
    """
    entry = f"{guard.ENGINE_ID_VARIABLE}={mark}".encode()
    give_up_at = time.monotonic() + LEFTOVERS_WAIT_S
    empty_rounds = 0
    while empty_rounds < 2 and time.monotonic() < give_up_at:
        alive = [process for process in guard.read_processes() if process.state != b"Z"]
        roots = {process.pid for process in alive if process.session == session or _carries(process.pid, entry)}
        for process in guard.with_descendants(roots, alive):
            guard.kill_process(process)
        empty_rounds = 0 if roots else empty_rounds + 1
        time.sleep(0.002)


def _carries(pid: int, entry: bytes) -> bool:
    try:
        return entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or another user's
        return False
