"""What the tests of processes share: the misbehaving programs, a recorder of lines, and eyes on ``/proc``."""

import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from comfyd.engine.guard import read_processes, read_stat
from comfyd.engine.output import OutputLine, StreamName
from comfyd.engine.process import EngineProcess, ProcessConfig, open_process

PROGRAMS = Path(__file__).parent / "programs"


def program(name: str, *arguments: object) -> tuple[str, ...]:
    """Return the command of one of the programs."""
    return (sys.executable, "-S", str(PROGRAMS / f"{name}.py"), *map(str, arguments))


@attrs.define(eq=False)
class Lines:
    """Record lines as an ``on_line``, and wait for one."""

    seen: list[OutputLine] = attrs.field(factory=list)
    _more: trio.Event = attrs.field(init=False, factory=trio.Event)

    def __call__(self, line: OutputLine) -> None:
        self.seen.append(line)
        self._more.set()
        self._more = trio.Event()

    def texts(self, stream: StreamName | None = None) -> list[str]:
        return [line.text for line in self.seen if stream in (None, line.stream)]

    async def wait_for(self, text: str) -> None:
        while text not in self.texts():
            await self._more.wait()


@asynccontextmanager
async def opened(config: ProcessConfig, on_line: Callable[[OutputLine], None]) -> AsyncIterator[EngineProcess]:
    """Open the process, and fail what hangs, long before pytest's own limit."""
    with trio.fail_after(25):
        async with open_process(config, on_line) as engine:
            yield engine


@attrs.define(eq=False)
class Family:
    """Processes recognised by a mark in their environment, which all their descendants inherit."""

    mark: str = attrs.field(factory=lambda: f"PROCESS_TEST={uuid.uuid4().hex}")

    def env(self) -> dict[str, str]:
        name, _, value = self.mark.partition("=")
        return {"PATH": os.environ["PATH"], name: value}

    def config(
        self, *argv: str, stop_grace_s: float = 5.0, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> ProcessConfig:
        return ProcessConfig(argv=argv, env={**self.env(), **(env or {})}, cwd=cwd, stop_grace_s=stop_grace_s)

    def alive(self) -> Iterator[int]:
        for process in read_processes():
            try:
                environ = Path(f"/proc/{process.pid}/environ").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if self.mark.encode() in environ.split(b"\0") and is_alive(process.pid):
                yield process.pid


def is_alive(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.state != b"Z"


def children() -> set[int]:
    """Return the pids of this process's children, zombies included."""
    return {process.pid for process in read_processes() if process.parent == os.getpid()}


def parent_of(pid: int) -> int:
    stat = read_stat(pid)
    assert stat is not None
    return stat.parent


async def wait_vanished(pidfds: list[int]) -> None:
    """Wait until each of the processes has ended, and close the descriptors."""
    try:
        for pidfd in pidfds:
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
