"""An engine's process from its start to its end: what it gets, how it is stopped, what is told of it."""

import errno
import itertools
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from process_support import Family, Lines, children, is_alive, opened, parent_of, program

from comfyd.engine import guard as guard_module
from comfyd.engine import process as process_module
from comfyd.engine.process import EngineProcess, EngineStuck, ProcessConfig, open_process
from comfyd.errors import StartupFailed

NOT_DEADLY = {
    signal.SIGCHLD,
    signal.SIGCONT,
    signal.SIGURG,
    signal.SIGWINCH,
    signal.SIGSTOP,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
}
DEADLY = sorted(set(signal.Signals) - NOT_DEADLY)


@pytest.fixture
def family() -> Iterator[Family]:
    """Mark the processes of a test, and hold it to leaving no process, zombie or file descriptor."""
    children_before, descriptors_before = children(), os.listdir("/proc/self/fd")
    family = Family()
    yield family
    assert list(family.alive()) == []
    assert children() <= children_before
    assert os.listdir("/proc/self/fd") == descriptors_before


async def returncode_of(config: ProcessConfig, lines: Lines | None = None) -> int:
    async with opened(config, lines or Lines()) as engine:
        return await engine.wait()


# Exit codes


@pytest.mark.parametrize("code", [0, 1, 2, 77, 127, 128, 255])
async def test_exit_code_is_reported_exactly(family: Family, code: int) -> None:
    assert await returncode_of(family.config(*program("exit_at_once", code))) == code


async def test_every_deadly_signal_is_reported_as_its_negative_number(family: Family) -> None:
    assert len(DEADLY) > 20
    for number in DEADLY:
        assert await returncode_of(family.config(*program("exit_at_once", -number))) == -number, number


async def test_an_exit_is_told_to_every_waiter_and_to_those_who_come_later(family: Family) -> None:
    codes = []
    async with opened(family.config(*program("sleep_then_exit", 0.05, 3)), Lines()) as engine:
        assert engine.returncode is None

        async def wait() -> None:
            codes.append(await engine.wait())

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(wait)
        assert codes == [3] * 10
        assert await engine.wait() == 3
        assert engine.returncode == 3


async def test_a_waiter_can_be_cancelled_without_harm_to_the_engine(family: Family) -> None:
    async with opened(family.config(*program("hang")), Lines()) as engine:
        with trio.move_on_after(0.01) as scope:
            await engine.wait()
        assert scope.cancelled_caught
        assert is_alive(engine.pid)


def reap_at_once(pid: int) -> None:
    """Wait for a child and reap it; in a plain function, as it is to happen before any of our tasks can run."""
    assert os.waitpid(pid, 0) == (pid, 0)


async def test_exit_codes_survive_a_reaper_that_takes_every_child(family: Family) -> None:
    """As PID 1 we reap orphans; even one that steals all there is cannot take an engine's exit code."""
    lines = Lines()
    async with opened(family.config(*program("ignore_sigterm")), lines) as engine:
        await lines.wait_for("ready")
        guard = parent_of(engine.pid)
        os.kill(engine.pid, signal.SIGUSR1)
        reap_at_once(guard)
        assert await engine.wait() == -signal.SIGUSR1
        assert await engine.stop() == -signal.SIGUSR1


# What cannot be started


async def test_missing_command_is_named_together_with_the_path_searched(family: Family) -> None:
    with pytest.raises(StartupFailed, match=r"'no-such-command': No such file.*PATH='/nowhere'"):
        await returncode_of(family.config("no-such-command", env={"PATH": "/nowhere"}))


async def test_file_that_is_not_executable_is_told_from_a_missing_one(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "engine"
    file.write_text("#!/bin/sh\n")
    with pytest.raises(StartupFailed, match=r"engine': Permission denied .*is it executable"):
        await returncode_of(family.config(str(file)))


async def test_missing_interpreter_is_told_from_a_missing_file(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "engine"
    file.write_text("#!/no/such/python\n")
    file.chmod(0o755)
    with pytest.raises(StartupFailed, match=r"engine': No such file .*interpreter that it names"):
        await returncode_of(family.config(str(file)))


async def test_a_folder_as_command_is_called_one(family: Family, tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match="Is a directory"):
        await returncode_of(family.config(str(tmp_path)))


async def test_a_file_of_no_known_format_is_refused(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "engine"
    file.write_bytes(b"\x00\x01\x02")
    file.chmod(0o755)
    with pytest.raises(StartupFailed, match="Exec format error"):
        await returncode_of(family.config(str(file)))


async def test_missing_folder_is_named(family: Family, tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match=r"folder '.*gone': No such file"):
        await returncode_of(family.config("true", cwd=tmp_path / "gone"))


async def test_arguments_that_the_kernel_refuses_are_a_failed_start(family: Family) -> None:
    with pytest.raises(StartupFailed, match="Argument list too long"):
        await returncode_of(family.config("true", "x" * 3_000_000))


@pytest.mark.parametrize(
    ("argv", "env"), [(("true", "a\0b"), {}), (("true",), {"A": "a\0b"}), (("true",), {"A=B": ""})]
)
async def test_what_no_process_can_be_given_is_a_failed_start(
    family: Family, argv: tuple[str, ...], env: dict[str, str]
) -> None:
    with pytest.raises(StartupFailed, match=r"NUL|not a name"):
        await returncode_of(family.config(*argv, env=env))


def test_an_empty_command_is_refused_when_configured() -> None:
    with pytest.raises(ValueError, match="argv"):
        ProcessConfig(argv=(), env={})


async def test_guard_that_cannot_start_is_reported_with_its_last_words(
    family: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(guard_module, "__file__", str(tmp_path / "missing.py"))
    with pytest.raises(StartupFailed, match=r"guard ended: .*missing\.py"):
        await returncode_of(family.config("true"))


@pytest.mark.parametrize("call", ["pipe", "pidfd_open"])
async def test_a_lack_of_descriptors_is_a_failed_start_that_leaves_nothing(
    family: Family, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StartupFailed, match="Too many open files"):
            await returncode_of(family.config("true"))


# What it is given


async def facts_of(config: ProcessConfig) -> dict[str, Any]:
    lines = Lines()
    assert await returncode_of(config, lines) == 0
    facts: dict[str, Any] = json.loads(lines.texts("stdout")[0])
    return facts


async def test_environment_folder_and_arguments_arrive_exactly(family: Family, tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "EMPTY": "", "EQUALS": "a=b=c", "TEXT": "ü \n\t\udcff", "LC_ALL": "C.UTF-8"}
    config = attrs.evolve(
        family.config(*program("show_self", "", "two words", "-x", "--", "$HOME"), cwd=tmp_path, env=env),
    )
    facts = await facts_of(config)
    mark = facts["env"].pop("COMFYD_ENGINE_ID")
    assert len(mark) == 32
    assert facts["env"] == config.env
    assert facts["cwd"] == str(tmp_path)
    assert facts["argv"] == ["", "two words", "-x", "--", "$HOME"]


async def test_without_a_folder_it_runs_in_ours(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (await facts_of(family.config(*program("show_self"))))["cwd"] == str(tmp_path)


async def test_it_starts_with_clean_signals_descriptors_and_a_group_of_its_own(family: Family) -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        facts = await facts_of(family.config(*program("show_self")))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR2, before)
    # What the Python of the program ignores by itself, from the kernel's point of view: SIGPIPE and SIGXFSZ.
    own = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)
    # Signals 32 and 33 are glibc's own: it lets nobody change them, so whoever started us may have left them ignored.
    assert int(facts["ignored"], 16) & 0x7FFF_FFFF == own
    assert int(facts["blocked"], 16) == 0
    assert facts["stdin"] == "/dev/null"
    assert facts["descriptors"] == [0, 1, 2, 3]  # 3 is the program's own look into /proc
    assert facts["group"] == facts["pid"]
    assert facts["session"] == facts["parent"] != os.getsid(0)


async def test_pid_is_the_engines_own_and_its_death_is_tied_to_the_guard(family: Family) -> None:
    lines = Lines()
    async with opened(family.config(*program("show_self")), lines) as engine:
        await engine.wait()
        facts = json.loads(lines.texts()[0])
        assert facts["pid"] == engine.pid
        assert facts["parent"] != os.getpid()
        assert facts["death_signal"] == signal.SIGKILL


async def test_the_guard_holds_no_end_of_the_engines_output(family: Family) -> None:
    async with opened(family.config(*program("hang")), Lines()) as engine:
        guard = parent_of(engine.pid)
        held = {os.readlink(f"/proc/{guard}/fd/{number}") for number in os.listdir(f"/proc/{guard}/fd")}
        outputs = {os.readlink(f"/proc/{engine.pid}/fd/{number}") for number in (1, 2)}
        assert len(outputs) == 2
        assert not held & outputs


async def test_the_engine_outlives_the_thread_that_started_its_guard(family: Family) -> None:
    """The trap: a parent death signal fires when the forking *thread* ends, ten seconds later for Trio's workers.

    Here the guard is started in a thread that has ended before the engine starts. The engine's own death signal is tied
    to the guard's only thread.
    """
    started = []
    with ExitStack() as stack:
        thread = threading.Thread(target=lambda: started.append(process_module._start_guard(stack)))
        thread.start()
        thread.join()
        (link,) = started
        pid = await link.start_engine(family.config(*program("exit_at_once", 5)))
        assert len(os.listdir(f"/proc/{parent_of(pid)}/task")) == 1
        assert await link.read_report() == "exited 5"
        await link.wait_exited()


# How it is stopped


async def test_stop_sends_sigterm_and_returns_at_once_when_obeyed(family: Family) -> None:
    async with opened(family.config(*program("hang"), stop_grace_s=20), Lines()) as engine:
        started_at = trio.current_time()
        assert await engine.stop() == -signal.SIGTERM
        assert trio.current_time() - started_at < 2


async def test_leaving_the_block_stops_the_engine(family: Family) -> None:
    async with opened(family.config(*program("hang")), Lines()) as engine:
        assert is_alive(engine.pid)
    assert engine.returncode == -signal.SIGTERM
    assert not is_alive(engine.pid)


async def test_sigkill_follows_when_the_grace_period_is_over_and_not_before(family: Family) -> None:
    lines = Lines()
    async with opened(family.config(*program("ignore_sigterm"), stop_grace_s=0.3), lines) as engine:
        await lines.wait_for("ready")
        started_at = trio.current_time()
        assert await engine.stop() == -signal.SIGKILL
        assert 0.3 <= trio.current_time() - started_at < 2


async def test_a_stopped_process_is_continued_so_that_it_sees_sigterm(family: Family) -> None:
    async with opened(family.config(*program("hang")), Lines()) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        assert await engine.stop() == -signal.SIGTERM


async def test_stops_from_many_tasks_are_one_ladder_and_outlast_the_first_callers_cancellation(family: Family) -> None:
    lines = Lines()
    codes = []
    async with opened(family.config(*program("ignore_sigterm"), stop_grace_s=0.3), lines) as engine:
        await lines.wait_for("ready")
        started_at = trio.current_time()
        with trio.move_on_after(0.1):
            await engine.stop()

        async def stop() -> None:
            codes.append(await engine.stop())

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(stop)
        assert codes == [-signal.SIGKILL] * 5
        assert trio.current_time() - started_at < 2
        assert await engine.stop() == -signal.SIGKILL


async def test_kill_is_immediate_whatever_the_grace_period(family: Family) -> None:
    lines = Lines()
    async with opened(family.config(*program("ignore_sigterm"), stop_grace_s=20), lines) as engine:
        await lines.wait_for("ready")
        engine.kill()
        engine.kill()
        assert await engine.wait() == -signal.SIGKILL
        engine.kill()


async def test_an_engine_that_hands_in_its_exit_code_on_sigterm_keeps_it(family: Family) -> None:
    command = ("sh", "-c", "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.01; done")
    lines = Lines()
    async with opened(family.config(*command), lines) as engine:
        await lines.wait_for("ready")
        assert await engine.stop() == 7
    assert lines.texts("stdout") == ["ready", "bye"]


async def test_an_error_in_the_block_stops_the_engine_and_comes_out(family: Family) -> None:
    with pytest.RaisesGroup(ZeroDivisionError):
        async with opened(family.config(*program("hang")), Lines()) as engine:
            raise ZeroDivisionError
    assert not is_alive(engine.pid)


async def test_an_error_in_on_line_stops_the_engine_and_comes_out(family: Family) -> None:
    def fail(_line: object) -> None:
        raise ZeroDivisionError

    started_at = trio.current_time()
    with pytest.RaisesGroup(ZeroDivisionError):
        async with opened(family.config(*program("flood_stdout")), fail) as engine:
            await trio.sleep_forever()
    assert engine.returncode == -signal.SIGTERM
    assert trio.current_time() - started_at < 3


async def test_cancellation_from_outside_still_gives_the_grace_period_and_reads_the_output(family: Family) -> None:
    code = "trap 'sleep 0.2; seq 20000; echo bye; exit 7' TERM; echo ready; while :; do sleep 0.01; done"
    lines = Lines()
    with trio.CancelScope() as scope:
        async with opened(family.config("sh", "-c", code), lines) as engine:
            await lines.wait_for("ready")
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert engine.returncode == 7
    assert lines.texts()[-1] == "bye"


class CancelAtStep(trio.abc.Instrument):
    """Cancel *scope* as its task begins its nth step, which is delivered at the next checkpoint that can take it."""

    def __init__(self, step: int) -> None:
        self.scope = trio.CancelScope()
        self._task = trio.lowlevel.current_task()
        self._steps_left = step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._steps_left -= 1
            if self._steps_left == 0:
                self.scope.cancel()

    @property
    def happened(self) -> bool:
        return self._steps_left <= 0


async def test_cancellation_at_every_await_leaves_nothing(family: Family) -> None:
    reached = 0
    for step in itertools.count(1):
        canceller = CancelAtStep(step)
        trio.lowlevel.add_instrument(canceller)
        try:
            with trio.fail_after(5), canceller.scope:
                async with open_process(family.config("sleep", "100"), Lines()) as engine:
                    reached += 1
                    await trio.lowlevel.checkpoint()
                    await engine.stop()
        finally:
            trio.lowlevel.remove_instrument(canceller)
        assert list(family.alive()) == [], f"cancelled at step {step}"
        if not canceller.happened:
            break
    assert step - reached >= 3  # so many cancels came before the engine was there
    assert reached >= 3  # and so many while it was


# What hangs in the kernel


async def test_what_survives_sigkill_is_reported_and_waited_for_no_longer(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard that is stopped stands for one that waits on a process which the kernel cannot end."""
    for name in ("KILL_WAIT_S", "GUARD_WAIT_S"):
        monkeypatch.setattr(process_module, name, 0.2)
    engines, waited = trio.open_memory_channel[EngineProcess](1), []

    async def wait_for_it() -> None:
        engine = await engines[1].receive()
        waited.append(await engine.wait())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_it)
        with pytest.RaisesGroup(EngineStuck):
            async with opened(family.config(*program("hang"), stop_grace_s=0.1), Lines()) as engine:
                os.kill(parent_of(engine.pid), signal.SIGSTOP)
                await engines[0].send(engine)
    assert waited == [-signal.SIGKILL]
    assert not is_alive(engine.pid)  # the guard was killed in the end, and the engine with it


async def test_fifty_starts_and_stops_leave_no_descriptor_and_no_child(family: Family) -> None:
    await returncode_of(family.config("true"))
    descriptors, ours = os.listdir("/proc/self/fd"), children()
    for _ in range(50):
        assert await returncode_of(family.config("true")) == 0
    assert os.listdir("/proc/self/fd") == descriptors
    assert children() == ours


@pytest.fixture
def removed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in a folder that no longer exists."""
    folder = tmp_path / "removed"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()


@pytest.mark.usefixtures("removed_folder")
async def test_a_daemon_without_a_working_folder_says_so(family: Family) -> None:
    with pytest.raises(StartupFailed, match="working folder was removed"):
        await returncode_of(family.config("true"))
