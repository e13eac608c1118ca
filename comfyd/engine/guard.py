"""The guard: a small process between the daemon and its engine, so that no process outlives the daemon.

``daemon -> guard -> engine -> whatever the engine starts``

The kernel offers no "kill all of these when I die" without a cgroup of one's own. The guard makes one from three parts:

- It is a *subreaper* (prctl(2)), so a descendant that forks twice and leaves the session still becomes its child.
  Having no child left therefore means that no descendant is left, whatever the engine's custom nodes do.
- It holds one end of a socket to the daemon. End of file there means that the daemon is gone, even by SIGKILL; the
  guard then kills every descendant and leaves. No signal is involved, so there is none to lose.
- The engine has a *parent death signal*, so it dies with the guard. That signal is tied to the *thread* that forked,
  not to the process: set from Trio's worker thread it fires when that thread retires, ten seconds later. The guard has
  one thread.

The guard runs as a file under ``python -I -S``, so it imports the standard library only, and little of it, to start
fast. Once the engine runs, the guard holds no end of its pipes, so it never delays output.

On the socket: the daemon sends one request (``encode_request``), then single bytes, ``TERMINATE`` and ``KILL``. The
guard answers in lines: ``started PID`` or ``failed STEP ERRNO``, later ``exited RETURNCODE``, and end of file when
nothing is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys

TYPE_CHECKING = False  # what type checkers take for true; importing typing itself costs 4 ms and 0.9 MB
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import NoReturn

TERMINATE = b"t"
KILL = b"k"
ENGINE_ID_VARIABLE = "COMFYD_ENGINE_ID"

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

_HEADER_BYTES = 8
_FIRST_PAUSE_MS = 1
_LONGEST_PAUSE_MS = 500  # for what survives SIGKILL, in the kernel's hands; a scan costs milliseconds

_libc = ctypes.CDLL(None, use_errno=True)


class Request:
    """What to run: bytes throughout, as the kernel takes them."""

    __slots__ = ("argv", "cwd", "env")

    def __init__(self, argv: tuple[bytes, ...], env: dict[bytes, bytes], cwd: bytes) -> None:
        self.argv = argv
        self.env = env
        self.cwd = cwd


class ProcessStat:
    """What we use of ``/proc/PID/stat``, see proc_pid_stat(5). *started* tells a pid from its later namesake."""

    __slots__ = ("parent", "pid", "session", "started", "state")

    def __init__(self, *, pid: int, state: bytes, parent: int, session: int, started: int) -> None:
        self.pid = pid
        self.state = state
        self.parent = parent
        self.session = session
        self.started = started


def encode_request(argv: Sequence[str], env: Mapping[str, str], cwd: str) -> bytes:
    """Return the request as the guard reads it: a length, then fields ended by NUL, which none of them can hold.

    Raises:
        ValueError: a field holds a NUL, or a variable's name an equals sign.
    """
    for name in env:
        if not name or "=" in name:
            raise ValueError(f"not a name for an environment variable: {name!r}")
    fields = [str(len(argv)), *argv, cwd, *(f"{name}={value}" for name, value in env.items())]
    for field in fields:
        if "\0" in field:
            raise ValueError(f"a NUL character cannot be passed to a process: {field.partition('=')[0]!r}")
    body = b"".join(os.fsencode(field) + b"\0" for field in fields)
    return len(body).to_bytes(_HEADER_BYTES, "big") + body


def decode_request(body: bytes) -> Request:
    """Return what `encode_request` was given; *body* is without the length."""
    fields = body.split(b"\0")[:-1]
    count = int(fields[0])
    pairs = (field.partition(b"=") for field in fields[count + 2 :])
    return Request(
        argv=tuple(fields[1 : count + 1]),
        cwd=fields[count + 1],
        env={name: value for name, _, value in pairs},
    )


def read_stat(pid: int) -> ProcessStat | None:
    """Return the state of one process, or None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or hidden from us (hidepid)
        return None
    # The command name stands in parentheses and may itself hold spaces and parentheses.
    fields = text[text.rindex(b")") + 2 :].split()
    return ProcessStat(pid=pid, state=fields[0], parent=int(fields[1]), session=int(fields[3]), started=int(fields[19]))


def read_processes() -> list[ProcessStat]:
    """Return every process that ``/proc`` shows.

    All of them, rather than ``/proc/PID/task/TID/children``: those files need CONFIG_PROC_CHILDREN.
    """
    stats = (read_stat(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [stat for stat in stats if stat is not None]


def with_descendants(roots: set[int], processes: list[ProcessStat]) -> list[ProcessStat]:
    """Return the *roots* and their descendants among *processes*, each parent before its children."""
    children: dict[int, list[ProcessStat]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process)
    found = [process for process in processes if process.pid in roots]
    seen = {process.pid for process in found}
    for process in found:  # grows while we walk it
        for child in children.get(process.pid, ()):
            if child.pid not in seen:
                seen.add(child.pid)
                found.append(child)
    return found


def kill_process(process: ProcessStat) -> None:
    """Send SIGKILL to exactly this process, never to a later one that got its pid."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; or not ours to kill (a setuid program)
        pidfd = os.pidfd_open(process.pid)
        try:
            current = read_stat(process.pid)
            if current is not None and current.started == process.started:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


class _Guard:
    """The guard's life: start the engine, obey and watch, leave nothing."""

    def __init__(self, control: int) -> None:
        self._control = control
        self._engine: int | None = None
        # A signal handler cannot be selected on; a byte in this pipe per SIGCHLD can.
        self._child_died, wakeup = os.pipe()
        os.set_blocking(self._child_died, False)
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def run(self) -> None:
        request = self._read_request()
        if request is None:
            return
        report = self._start(request)
        self._let_go_of_output()
        self._tell(report)
        if self._engine is not None:
            self._watch()
        self._kill_all()

    def _read_request(self) -> Request | None:
        """Return what the daemon asks for, or None if it died first."""
        header = self._read_exactly(_HEADER_BYTES)
        body = self._read_exactly(int.from_bytes(header, "big")) if header else b""
        return decode_request(body) if body else None

    def _read_exactly(self, count: int) -> bytes:
        """Return *count* bytes, or none at all at the end of file."""
        data = b""
        while len(data) < count:
            piece = os.read(self._control, count - len(data))
            if not piece:
                return b""
            data += piece
        return data

    def _start(self, request: Request) -> str:
        """Fork, and wait until the child has become the engine or failed to; return what to tell the daemon."""
        errors, errors_in_child = os.pipe()
        guard = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become_engine(request, guard, errors_in_child)
        os.close(errors_in_child)
        failure = os.read(errors, 100)  # end of file, when exec closes the other end, is success
        os.close(errors)
        if failure:
            return f"failed {failure.decode()}"
        self._engine = pid
        return f"started {pid}"

    def _let_go_of_output(self) -> None:
        """Drop our copies of the pipes, so that their end of file is the engine's."""
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)

    def _watch(self) -> None:
        """Obey the daemon until the engine has ended, is to be killed, or the daemon is gone."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._child_died, select.POLLIN)
        while self._engine is not None:
            ready = [descriptor for descriptor, _events in poll.poll()]
            if self._child_died in ready:
                self._reap()
            elif self._control in ready:
                try:
                    commands = os.read(self._control, 100)
                except ConnectionResetError:  # gone with our reports unread
                    commands = b""
                if not commands or KILL in commands:
                    return
                self._terminate(self._engine)

    def _terminate(self, engine: int) -> None:
        """Send SIGTERM to the engine's group, or to it alone if it joined another; it is not reaped, so it is there."""
        send = os.killpg if os.getpgid(engine) == engine else os.kill
        with contextlib.suppress(PermissionError):  # it changed its user; SIGKILL will fail as well
            send(engine, signal.SIGTERM)
            send(engine, signal.SIGCONT)  # a stopped process sees SIGTERM only once it continues

    def _kill_all(self) -> None:
        """Kill descendants until none is left; one round may miss what is forked during it."""
        pause_ms = _FIRST_PAUSE_MS
        poll = select.poll()
        poll.register(self._child_died, select.POLLIN)
        while self._reap():
            for process in with_descendants({os.getpid()}, read_processes())[1:]:
                if process.state != b"Z":
                    kill_process(process)
            poll.poll(pause_ms)
            pause_ms = min(2 * pause_ms, _LONGEST_PAUSE_MS)

    def _reap(self) -> bool:
        """Reap every child that has ended, report the engine among them, and tell whether any child is left."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._child_died, 1000):
                pass
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return False
            if ended is None:
                return True
            if ended.si_pid == self._engine:
                self._kill_group(self._engine)
            _, status = os.waitpid(ended.si_pid, 0)
            if ended.si_pid == self._engine:
                self._engine = None
                self._tell(f"exited {os.waitstatus_to_exitcode(status)}")

    def _kill_group(self, engine: int) -> None:
        """Kill the engine's group in one act, so that none of it slips away by forking; *engine* is not reaped yet."""
        with contextlib.suppress(PermissionError, ProcessLookupError):  # another user's; or it left its group
            os.killpg(engine, signal.SIGKILL)

    def _tell(self, report: str) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody is left to be told
            os.write(self._control, report.encode() + b"\n")


def _become_engine(request: Request, guard: int, errors: int) -> NoReturn:
    """Turn this fresh child into the engine, or write to *errors* at which step that failed, and why."""
    step = "prepare"
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:  # it died before the line above took effect
            os._exit(1)
        os.setpgid(0, 0)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)  # exec resets handlers, but what is ignored stays ignored
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        step = "chdir"
        os.chdir(request.cwd)
        step = "exec"
        os.execvpe(request.argv[0], request.argv, request.env)  # noqa: S606 - no shell is the point
    except OSError as error:
        os.write(errors, f"{step} {error.errno}".encode())
    finally:
        os._exit(127)  # never back into the guard's own code


def _prctl(option: int, argument: int | bytes) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ignored_signals() -> Iterator[signal.Signals]:
    """Yield what an operator or a terminal may send to all of us; the guard leaves when its work is done."""
    yield from (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
    yield from (signal.SIGPIPE, signal.SIGALRM, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


def main(arguments: Sequence[str]) -> int:
    """Run the guard; *arguments* is the number of the inherited socket."""
    for number in _ignored_signals():
        signal.signal(number, signal.SIG_IGN)
    control = int(arguments[0])
    os.set_inheritable(control, False)
    _prctl(_PR_SET_NAME, b"comfyd-guard")
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _Guard(control).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
