"""Whoever dies, in whatever way: no process of an engine is left, not even one that hid in a session of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from process_support import Family, Lines, children, is_alive, opened, parent_of, program, wait_vanished

from comfyd.engine.guard import ProcessStat, kill_process, read_stat, with_descendants

# A daemon in small, to be killed: its argument is the file for the grandchildren's pids.
DAEMON = """
import os, sys, trio
from comfyd.engine.process import ProcessConfig, open_process

async def main():
    config = ProcessConfig(argv=tuple(sys.argv[1:]), env=dict(os.environ), stop_grace_s=5.0)
    async with open_process(config, lambda line: print(line.text, flush=True)) as engine:
        print("engine", engine.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.fixture
def family() -> Iterator[Family]:
    """Mark the processes of a test, and hold it to leaving no process and no zombie."""
    children_before = children()
    family = Family()
    yield family
    assert list(family.alive()) == []
    assert children() <= children_before


@pytest.fixture
def pid_file(tmp_path: Path) -> Path:
    return tmp_path / "pids"


def read_pids(pid_file: Path) -> list[int]:
    pids = [int(line) for line in pid_file.read_text().split()]
    assert len(pids) == 2
    return pids


def read_grandchildren(pid_file: Path) -> list[int]:
    """Return the pids of the plain child and of the one in a session of its own, in this order."""
    pids = read_pids(pid_file)
    assert all(is_alive(pid) for pid in pids)
    return sorted(pids, key=lambda pid: parent_of(pid) == os.getsid(parent_of(pid)))  # whose parent is the guard


async def test_stop_takes_the_grandchildren_along_that_ignore_sigterm(family: Family, pid_file: Path) -> None:
    lines = Lines()
    async with opened(family.config(*program("fork_grandchildren", pid_file)), lines) as engine:
        await lines.wait_for("ready")
        pids = read_grandchildren(pid_file)
        assert len({os.getsid(pid) for pid in [*pids, engine.pid]}) == 2  # one is in a session of its own
        assert await engine.stop() == -signal.SIGTERM
        assert not any(is_alive(pid) for pid in pids)


async def test_what_is_orphaned_comes_to_the_guard_and_is_reaped_while_the_engine_lives(
    family: Family, pid_file: Path
) -> None:
    lines = Lines()
    async with opened(family.config(*program("fork_grandchildren", pid_file)), lines) as engine:
        await lines.wait_for("ready")
        _child, hidden = read_grandchildren(pid_file)
        assert parent_of(hidden) == parent_of(engine.pid)
        pidfd = os.pidfd_open(hidden)
        os.kill(hidden, signal.SIGKILL)
        await wait_vanished([pidfd])
        while read_stat(hidden) is not None:  # noqa: ASYNC110 - nothing tells of a stranger's zombie being reaped
            await trio.sleep(0.001)
        assert is_alive(engine.pid)


@pytest.mark.parametrize("code", [0, 3])
async def test_grandchildren_do_not_outlive_an_engine_that_exits_by_itself(
    family: Family, pid_file: Path, code: int
) -> None:
    lines = Lines()
    async with opened(family.config(*program("fork_grandchildren", pid_file, code)), lines) as engine:
        assert await engine.wait() == code
        assert await engine.stop() == code
        pids = read_pids(pid_file)
        assert not any(is_alive(pid) for pid in pids)


async def test_grandchildren_do_not_outlive_an_engine_that_is_killed(family: Family, pid_file: Path) -> None:
    lines = Lines()
    async with opened(family.config(*program("fork_grandchildren", pid_file)), lines) as engine:
        await lines.wait_for("ready")
        pids = read_grandchildren(pid_file)
        os.kill(engine.pid, signal.SIGSEGV)
        assert await engine.wait() == -signal.SIGSEGV
        await engine.stop()
        assert not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize("arguments", [(), ("setsid",)])
async def test_descendants_that_change_their_pid_every_millisecond_do_not_escape(
    family: Family, arguments: tuple[str, ...]
) -> None:
    lines = Lines()
    async with opened(family.config(*program("moving_target", *arguments)), lines) as engine:
        await lines.wait_for("ready")
        with trio.fail_after(5):
            engine.kill()
            await engine.stop()
        assert list(family.alive()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
async def test_the_guard_does_not_heed_signals_meant_for_the_daemon(family: Family, number: signal.Signals) -> None:
    lines = Lines()
    async with opened(family.config(*program("ignore_sigterm")), lines) as engine:
        await lines.wait_for("ready")
        os.kill(parent_of(engine.pid), number)
        engine.kill()  # answered by a guard that is still there
        assert await engine.wait() == -signal.SIGKILL
    assert not any("guard was killed" in text for text in lines.texts())


async def test_a_killed_guard_takes_engine_and_grandchildren_along_and_is_an_exit(
    family: Family, pid_file: Path
) -> None:
    lines = Lines()
    async with opened(family.config(*program("fork_grandchildren", pid_file)), lines) as engine:
        await lines.wait_for("ready")
        pids = [engine.pid, *read_grandchildren(pid_file)]
        os.kill(parent_of(engine.pid), signal.SIGKILL)
        with trio.fail_after(1):
            assert await engine.wait() == -signal.SIGKILL
        assert not any(is_alive(pid) for pid in pids)
        assert engine.last_lines[-1].text == "[comfyd: the engine's guard was killed, the engine with it]"
        assert await engine.stop() == -signal.SIGKILL


class Daemon:
    """A small daemon in a process of its own, with an engine and two grandchildren."""

    def __init__(self, family: Family, *command: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", DAEMON, *command], env=family.env(), stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid

    def wait_for(self, beginning: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(beginning):
                return line
        raise AssertionError(f"the daemon ended without a line {beginning!r}")

    def end(self) -> int:
        assert self._process.stdout is not None
        self._process.kill()
        self._process.stdout.close()
        return self._process.wait()


@pytest.mark.parametrize("stopped_first", [False, True])
async def test_a_daemon_killed_by_sigkill_leaves_nothing_within_a_second(
    family: Family, pid_file: Path, stopped_first: bool
) -> None:
    """Also when the engine is stopped (SIGSTOP), and so could not react to anything itself."""
    daemon = Daemon(family, *program("fork_grandchildren", pid_file))
    try:
        engine = int(daemon.wait_for("engine").split()[1])
        daemon.wait_for("ready")
        pids = [engine, parent_of(engine), *read_grandchildren(pid_file)]
        if stopped_first:
            os.kill(engine, signal.SIGSTOP)
        pidfds = [os.pidfd_open(pid) for pid in pids]
        os.kill(daemon.pid, signal.SIGKILL)
        with trio.fail_after(1):
            await wait_vanished(pidfds)
        assert list(family.alive()) == []
    finally:
        assert daemon.end() == -signal.SIGKILL


async def test_a_daemon_killed_while_it_stops_the_engine_leaves_nothing(family: Family) -> None:
    daemon = Daemon(family, *program("ignore_sigterm"))
    try:
        engine = int(daemon.wait_for("engine").split()[1])
        daemon.wait_for("ready")
        os.kill(daemon.pid, signal.SIGINT)  # trio turns it into KeyboardInterrupt, and the ladder begins
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.1):
            await wait_vanished([os.pidfd_open(engine)])
        pidfds = [os.pidfd_open(pid) for pid in (engine, parent_of(engine))]
        os.kill(daemon.pid, signal.SIGKILL)
        with trio.fail_after(1):
            await wait_vanished(pidfds)
    finally:
        assert daemon.end() == -signal.SIGKILL


# The pieces


def stat(pid: int, parent: int) -> ProcessStat:
    return ProcessStat(pid=pid, state=b"S", parent=parent, session=1, started=0)


def test_descendants_are_found_parents_first_and_without_strangers() -> None:
    processes = [stat(5, 4), stat(1, 0), stat(4, 2), stat(3, 2), stat(2, 1), stat(9, 1), stat(10, 9)]
    assert [process.pid for process in with_descendants({2}, processes)] == [2, 4, 3, 5]
    assert with_descendants({77}, processes) == []


def test_a_circle_of_parents_as_a_torn_reading_can_show_ends() -> None:
    assert [p.pid for p in with_descendants({1}, [stat(1, 2), stat(2, 1)])] == [1, 2]


def test_a_reused_pid_is_not_killed() -> None:
    process = subprocess.Popen(["sleep", "100"])
    try:
        now = read_stat(process.pid)
        assert now is not None
        for pid, started in ((now.pid, now.started - 1), (2**22 - 1, now.started)):  # nobody has the second pid
            kill_process(ProcessStat(pid=pid, state=b"S", parent=1, session=1, started=started))
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        kill_process(now)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()


def test_a_process_whose_name_looks_like_its_own_record_is_read_rightly(tmp_path: Path) -> None:
    program_file = tmp_path / ") R 1 1 1"
    program_file.symlink_to("/bin/sleep")
    process = subprocess.Popen([program_file, "100"])
    try:
        found = read_stat(process.pid)
        assert found is not None
        assert found.parent == os.getpid()
        assert found.session == os.getsid(0)
    finally:
        process.kill()
        process.wait()
    assert read_stat(process.pid) is None
