"""Reaping orphans, as process 1 of a real pid namespace and as subreaper, with children of our own in between."""

import ctypes
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import pytest
import trio
from process_support import PROGRAMS
from structlog.testing import LogCapture

from comfyd.host.reaper import OwnChildren, serve_reaper, stop_signals

OWN, ORPHANS, LINGER_S = 200, 1000, 1.0
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37
NEW_NAMESPACE: Final = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
SIGCHLD_IGNORED: Final = ("env", "--ignore-signal=CHLD")


@functools.cache
def no_namespaces() -> str:
    """Return why no pid namespace can be had here, or nothing."""
    if shutil.which("unshare") is None:
        return "there is no unshare(1)"
    tried = subprocess.run([*NEW_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"no pid namespace: {tried.stderr.strip()}"


@pytest.mark.parametrize("launcher", [(), NEW_NAMESPACE, SIGCHLD_IGNORED], ids=["subreaper", "process-1", "ignored"])
async def test_every_orphan_is_reaped_and_no_exit_code_is_lost(launcher: tuple[str, ...]) -> None:
    """With 1,000 orphans, owners that ask early and late, from several threads, and children that nobody registered."""
    if launcher == NEW_NAMESPACE and (reason := no_namespaces()):
        pytest.skip(reason)
    argv = [*launcher, sys.executable, str(PROGRAMS / "orphan_storm.py"), str(OWN), str(ORPHANS), str(LINGER_S)]
    with trio.fail_after(50):
        done = await trio.run_process(argv, capture_stdout=True)
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["wrong"] == []
    assert report["right"] == OWN + OWN // 8 + ORPHANS // 100
    assert report["orphans"] == report["reaped"] == ORPHANS
    assert report["children_left"] == 0
    assert (report["pid"] == 1) is (launcher == NEW_NAMESPACE)


# --- the registry


@contextmanager
def ended_child(returncode: int) -> Iterator[int]:
    """A child of this process that has ended and is not reaped; reaped at the end unless it was before."""
    pid = os.posix_spawnp("sh", ["sh", "-c", f"exit {returncode}"], os.environ)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        yield pid
    finally:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def is_unreaped(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def test_nothing_is_reaped_while_a_child_is_being_started() -> None:
    children = OwnChildren()
    with ended_child(9) as pid:
        with children.spawning():
            with children.spawning():  # in another thread, say
                assert children.reap(pid) is None
            assert children.reap(pid) is None
            assert children.unowned({pid}) == set()
        assert children.unowned({pid}) == {pid}
        assert children.reap(pid) == 9


def test_an_owned_child_is_left_to_its_owner() -> None:
    children = OwnChildren()
    with ended_child(9) as pid:
        children.own(pid)
        assert children.reap(pid) is None
        assert children.unowned({pid}) == set()
        assert os.waitpid(pid, 0) == (pid, 9 << 8)


def test_a_failed_start_does_not_stop_the_reaping_for_ever() -> None:
    children = OwnChildren()
    with ended_child(9) as pid:
        with pytest.raises(FileNotFoundError), children.spawning():
            os.posix_spawn("/nonexistent", ["x"], {})
        assert children.reap(pid) == 9


def test_neither_a_living_child_nor_a_strangers_process_is_waited_for() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        assert OwnChildren().reap(process.pid) is None
        process.communicate()
        assert process.returncode == 0
    assert OwnChildren().reap(1) is None


# --- the service


async def reaped(log_output: LogCapture, pid: int) -> int:
    """Wait until the log says that *pid* was reaped; return its exit code. Nothing announces a line of the log."""
    while True:
        for event in log_output.entries:
            if event["event"] == "reaper.reaped" and event["pid"] == pid:
                return int(event["returncode"])
        await trio.sleep(0.005)


async def test_what_ended_before_is_reaped_and_what_is_disowned_as_well(log_output: LogCapture) -> None:
    children = OwnChildren()
    with ended_child(4) as orphan, ended_child(5) as owned, trio.fail_after(10):
        children.own(owned)
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: serve_reaper(children, linger_s=0.0, task_status=task_status))
            assert await reaped(log_output, orphan) == 4
            assert is_unreaped(owned)
            await trio.to_thread.run_sync(children.disown, owned)
            assert await reaped(log_output, owned) == 5
            nursery.cancel_scope.cancel("the test is over")


async def test_an_orphan_that_ends_during_a_start_is_reaped_after_it(log_output: LogCapture) -> None:
    children = OwnChildren()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: serve_reaper(children, linger_s=0.0, task_status=task_status))
            with ended_child(6) as orphan:
                with children.spawning():
                    await trio.sleep(0.05)  # lets the reaper do wrong if it would; nothing could be waited for
                    assert is_unreaped(orphan)
                assert await reaped(log_output, orphan) == 6
            nursery.cancel_scope.cancel("the test is over")


async def test_the_process_is_left_as_it_was_found() -> None:
    def subreaper() -> int:
        value = ctypes.c_int(-1)
        assert ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(value), 0, 0, 0) == 0
        return value.value

    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0  # whatever ran before in this process
    before = signal.getsignal(signal.SIGCHLD)
    children = OwnChildren()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve_reaper(children, task_status=task_status))
        assert subreaper() == 1
        with pytest.raises(RuntimeError, match="two reapers"), children.watched(lambda: None):
            pass
        nursery.cancel_scope.cancel("the test is over")
    assert subreaper() == 0
    assert signal.getsignal(signal.SIGCHLD) == before
    with children.watched(lambda: None):
        pass


# --- signals


def test_a_hangup_stops_unless_it_is_ignored() -> None:
    everything = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP}
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert set(stop_signals()) == everything
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        assert set(stop_signals()) == everything - {signal.SIGHUP}
    finally:
        signal.signal(signal.SIGHUP, before)
