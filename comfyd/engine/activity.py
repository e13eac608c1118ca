"""What the kernel says of an engine's processes: whether they work, and whether it killed one for want of memory.

An engine that says nothing may be in the middle of a long node. Then its processes use the CPU, or read and write, or
wait for a disk; all of it is in ``/proc`` (proc(5)), costs the engine nothing, and cannot be held up by its GIL.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs

from comfyd.engine.guard import read_processes, read_stat, with_descendants

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_IO_FIELDS: Final = (b"rchar", b"wchar", b"read_bytes", b"write_bytes")
"""Through system calls, and by the block layer: what is read through a memory map is only in the latter."""


@attrs.frozen(kw_only=True)
class Work:
    """What processes did: CPU time, bytes read and written, and page faults that had to wait for a disk.

    A model that is read through a memory map from a network disk shows in the faults, whatever the file system.
    """

    cpu_s: float = 0.0
    io_bytes: int = 0
    faults: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            cpu_s=self.cpu_s + other.cpu_s, io_bytes=self.io_bytes + other.io_bytes, faults=self.faults + other.faults
        )

    def __sub__(self, other: "Work") -> "Work":
        return Work(
            cpu_s=self.cpu_s - other.cpu_s, io_bytes=self.io_bytes - other.io_bytes, faults=self.faults - other.faults
        )


@attrs.frozen(kw_only=True)
class Snapshot:
    """All that the processes of an engine had done at one moment, each since it began.

    *wants*: one of their threads was waiting for a disk (state D), or for a CPU that it may not have got (state R).
    The keys of *done* are pid and start time, which tells a pid from its later namesake.
    """

    done: Mapping[tuple[int, int], Work]
    wants: bool = False

    def since(self, earlier: "Snapshot") -> Work:
        """Return what was done between the two, by processes of either."""
        nothing = Work()
        return sum((work - earlier.done.get(process, nothing) for process, work in self.done.items()), nothing)


def read_snapshot(engine_pid: int) -> Snapshot:
    """Read what the engine and all that it started have done. Blocks for milliseconds: ``/proc`` is read whole.

    The guard is everybody's parent in the end (it is a subreaper), so nothing that the engine started escapes.
    """
    engine = read_stat(engine_pid)
    if engine is None:
        return Snapshot(done={})
    done, wants = {}, False
    for process in with_descendants({engine.parent}, read_processes()):
        if process.pid != engine.parent and process.state != b"Z":
            work = _read_work(process.pid)
            if work is not None:
                done[process.pid, process.started] = work
                wants = wants or _wants(process.pid)
    return Snapshot(done=done, wants=wants)


def read_oom_kills() -> int | None:
    """Read how many processes the kernel has killed so far for want of memory; None if it does not say.

    Of our own cgroup where that is told (it counts kills for the whole machine's sake too, see
    Documentation/admin-guide/cgroup-v2.rst), else of the machine.
    """
    for path, name in (*_cgroup_counters(), (Path("/proc/vmstat"), b"oom_kill")):
        try:
            lines = path.read_bytes().splitlines()
        except OSError:  # no such controller; or hidden from a container
            continue
        for line in lines:
            field, _, value = line.partition(b" ")
            if field == name:
                return int(value)
    return None


def _cgroup_counters() -> list[tuple[Path, bytes]]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    root = Path("/sys/fs/cgroup")
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            found.append((root / path.lstrip("/") / "memory.events", b"oom_kill"))
        elif "memory" in controllers.split(","):  # version 1
            found.append((root / "memory" / path.lstrip("/") / "memory.oom_control", b"oom_kill"))
    return found


def _read_work(pid: int) -> Work | None:
    """Read what one process and its children that it has waited for have done; None if it is gone or hidden."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    majflt, cmajflt, *ticks = map(int, fields[9:15])  # then utime, stime, cutime, cstime
    return Work(cpu_s=sum(ticks) / _TICKS_PER_S, io_bytes=_read_io_bytes(pid), faults=majflt + cmajflt)


def _read_io_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_bytes().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone; or not dumpable, see ptrace(2)
        return 0
    pairs = (line.split(b": ") for line in lines)
    return sum(int(value) for name, value in pairs if name in _IO_FIELDS)


def _wants(pid: int) -> bool:
    """Whether a thread of the process is in state R or D."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    for thread in threads:
        try:
            stat = Path(f"/proc/{pid}/task/{thread}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if stat[stat.rindex(b")") + 2 :][:1] in (b"R", b"D"):
            return True
    return False
