"""Process 1's duty: reap every orphan, and never take an exit code from whoever started the child.

In a container comfyd is often process 1, and then each process whose parent dies becomes its child: what ``docker
exec`` left behind, or the engine's processes should their guard be killed. Not reaped, they fill the process table.
Elsewhere comfyd asks to be a *subreaper* (prctl(2)), so that its own descendants come to it and not to an init that
does not reap, such as the shell of a start script.

Reaping whatever has ended (``waitpid(-1)``) is wrong: it takes the exit codes of our own children, and ``subprocess``
then reports 0 (198 of 200, measured). Skipping known children is wrong too, as a child may end before its pid is known
(72 of 200). Two rules make it right:

- Who starts a child says so, by :class:`OwnChildren`: nothing is reaped while a child is being started, and none that
  has an owner.
- A process that nobody registered is reaped only after it has been a zombie for :data:`LINGER_S`. A library may start
  one behind our back, as botocore does for ``credential_process``; it waits for its child at once, and so gets the
  exit code.

Which children have ended is read from all of ``/proc``, in a thread, and only when ``waitid`` says that one has. The
shorter way, ``/proc/self/task/*/children``, needs CONFIG_PROC_CHILDREN, which Firecracker's kernels lack.
"""

import ctypes
import math
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import attrs
import structlog
import trio

from comfyd.engine.guard import read_processes

log = structlog.get_logger("comfyd.reaper")

LINGER_S: Final = 2.0
"""How long a zombie of unknown origin is left to whoever may be about to wait for it. Meanwhile it costs a pid."""

# linux/prctl.h
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37


@attrs.define(eq=False)
class OwnChildren:
    """The children that somebody in this process waits for. Any thread may call any method."""

    _owned: set[int] = attrs.field(init=False, factory=set)
    _spawning: int = attrs.field(init=False, default=0)
    _changed: Callable[[], None] | None = attrs.field(init=False, default=None)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock)

    @contextmanager
    def spawning(self) -> Iterator[None]:
        """Start a child within this block, and :meth:`own` it there; nothing is reaped meanwhile, so be quick."""
        with self._lock:
            self._spawning += 1
        try:
            yield
        finally:
            with self._lock:
                self._spawning -= 1
            self._tell()

    def own(self, pid: int) -> None:
        """Say that this child is waited for by whoever calls."""
        with self._lock:
            self._owned.add(pid)

    def disown(self, pid: int) -> None:
        """Say that it was waited for, or never will be. Once per :meth:`own`: the kernel gives pids anew."""
        with self._lock:
            self._owned.discard(pid)
        self._tell()

    def unowned(self, pids: set[int]) -> set[int]:
        """Return those of *pids* that may be reaped now: none while a child is being started."""
        with self._lock:
            return set() if self._spawning else pids - self._owned

    def reap(self, pid: int) -> int | None:
        """Reap *pid* if it has ended and nobody owns it; return its exit code, negative for a signal, else None."""
        with self._lock:  # held over both, so that no child can be started between the look and the deed
            if self._spawning or pid in self._owned:
                return None
            try:
                reaped, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # whoever started it was just in time
                return None
        return os.waitstatus_to_exitcode(status) if reaped else None

    @contextmanager
    def watched(self, changed: Callable[[], None]) -> Iterator[None]:
        """Have *changed* called, from any thread, whenever more may be reaped than before."""
        if self._changed is not None:
            raise RuntimeError("two reapers would take turns at the same orphans")
        self._changed = changed
        try:
            yield
        finally:
            self._changed = None

    def _tell(self) -> None:
        changed = self._changed
        if changed is not None:
            changed()


OWN_CHILDREN: Final = OwnChildren()
"""Those of this process. Module state, as children are: the kernel keeps one list for the whole process."""


async def serve_reaper(
    children: OwnChildren = OWN_CHILDREN,
    *,
    linger_s: float = LINGER_S,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Reap orphans until cancelled. Their exit codes are logged, at debug level; nobody else wants them.

    From ``started()`` on orphans come to us, those that were there before included.
    """
    bell = _Bell()
    token = trio.lowlevel.current_trio_token()

    def ring_from_any_thread() -> None:
        token.run_sync_soon(bell.ring, idempotent=True)

    with (
        _adopting_orphans(),
        # A handler also undoes SIG_IGN, which a parent may have left us and with which the kernel keeps no exit codes.
        trio.open_signal_receiver(signal.SIGCHLD) as signals,
        children.watched(ring_from_any_thread),
    ):
        # Python's handlers interrupt system calls, and C code in our threads (libvips, SQLite, a GPU's driver) need
        # not expect that. Trio wakes by its file descriptor all the same.
        signal.siginterrupt(signal.SIGCHLD, False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_ring_on_signals, signals, bell)
            task_status.started()
            await _reap_orphans(children, bell, linger_s)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask comfyd to stop: SIGTERM, SIGINT, SIGQUIT, and SIGHUP unless it is ignored.

    A signal without a handler kills the daemon in the middle of its jobs; for process 1 the kernel drops it, and
    ``docker stop`` with an image's ``STOPSIGNAL SIGQUIT`` (nginx's, and of images made from it) would wait its ten
    seconds and kill. A terminal that is closed sends SIGHUP; under ``nohup`` it is ignored, and that is respected.
    There is nothing to reload: the configuration is the environment. Other signals keep the kernel's default.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT) + (() if ignored else (signal.SIGHUP,))


@attrs.define(eq=False)
class _Bell:
    """That there may be something to reap. Begins rung, for what ended before we came."""

    _rung: trio.Event = attrs.field(init=False, factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self._rung.set()

    def ring(self) -> None:
        self._rung.set()

    async def wait(self) -> None:
        await self._rung.wait()
        self._rung = trio.Event()


async def _ring_on_signals(signals: AsyncIterator[int], bell: _Bell) -> NoReturn:
    async for _number in signals:
        bell.ring()
    raise RuntimeError("the signal receiver ended by itself")


async def _reap_orphans(children: OwnChildren, bell: _Bell, linger_s: float) -> NoReturn:
    """Look at the children that have ended whenever the bell rings, and when one has lingered long enough."""
    limiter = trio.CapacityLimiter(1)  # our own: the readers of pictures may keep the default one busy for minutes
    since: dict[tuple[int, int], float] = {}  # (pid, start time): when it was first seen ended; at most all processes
    look_at = math.inf
    while True:
        with trio.move_on_at(look_at):
            await bell.wait()
        ended = await trio.to_thread.run_sync(_ended_children, limiter=limiter) if _has_ended_child() else set()
        candidates = children.unowned({pid for pid, _started in ended})
        now = trio.current_time()
        since = {key: since.get(key, now) for key in ended if key[0] in candidates}
        for pid, _started in [key for key, seen_at in since.items() if now - seen_at >= linger_s]:
            returncode = children.reap(pid)
            if returncode is not None:
                log.debug("reaper.reaped", pid=pid, returncode=returncode)
        look_at = min((seen_at + linger_s for seen_at in since.values() if now - seen_at < linger_s), default=math.inf)


def _has_ended_child() -> bool:
    """Whether any child waits to be reaped; does not reap it."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _ended_children() -> set[tuple[int, int]]:
    """Return pid and start time of each child that waits to be reaped. Blocks for some milliseconds."""
    me = os.getpid()
    return {(each.pid, each.started) for each in read_processes() if each.parent == me and each.state == b"Z"}


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Be who orphans come to. Process 1 is that already; else become a subreaper, and on leaving what we were."""
    if os.getpid() == 1:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int(0)
    _prctl(libc, _PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    _prctl(libc, _PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
    try:
        yield
    finally:
        _prctl(libc, _PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(before.value))


def _prctl(libc: ctypes.CDLL, option: int, argument: object) -> None:
    zero = ctypes.c_ulong(0)  # variadic: without a type the upper half of the register is anything
    if libc.prctl(ctypes.c_int(option), argument, zero, zero, zero) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
