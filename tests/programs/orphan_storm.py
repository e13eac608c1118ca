"""A process that reaps orphans while children of its own end around them; it prints what it saw as JSON.

Arguments: how many children of its own, how many orphans, seconds of lingering.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

import structlog
import trio

from comfyd.engine.guard import read_processes
from comfyd.host.reaper import OWN_CHILDREN, serve_reaper

ORPHANS_PER_PARENT = 100
ORPHAN_EXIT_CODE = 3
MAKE_ORPHANS = f"""
import os, random, time
for i in range({ORPHANS_PER_PARENT}):
    if os.fork() == 0:
        time.sleep(random.random() * 0.5)
        os._exit({ORPHAN_EXIT_CODE})
os._exit(5)
"""


class Counts:
    def __init__(self, orphans: int) -> None:
        self.wrong: list[str] = []
        self.right = 0
        self.reaped: list[int] = []
        self.orphans = orphans
        self.all_reaped = trio.Event()

    def check(self, what: str, returncode: int | None, expected: int) -> None:
        if returncode == expected:
            self.right += 1
        else:
            self.wrong.append(f"{what}: {returncode} instead of {expected}")

    def log(self, _logger: object, _name: str, event: MutableMapping[str, Any]) -> str:
        if event["event"] == "reaper.reaped":
            self.reaped.append(event["returncode"])
            if self.reaped.count(ORPHAN_EXIT_CODE) == self.orphans:
                self.all_reaped.set()
        raise structlog.DropEvent


def spawn(argv: list[str], pause_s: float = 0.0) -> "subprocess.Popen[bytes]":
    """Start one; with *pause_s* as in a thread that the scheduler leaves aside: the child ends before we know of it."""
    with OWN_CHILDREN.spawning():
        process = subprocess.Popen(argv)
        time.sleep(pause_s)
        OWN_CHILDREN.own(process.pid)
    return process


async def own_child(counts: Counts, number: int, linger_s: float) -> None:
    """Start one, from this thread or another, and ask for its exit code at once or long after its end."""
    expected = number % 200 + 1
    argv = ["sh", "-c", f"exit {expected}"]
    process = await trio.to_thread.run_sync(spawn, argv, 0.05) if number % 2 else spawn(argv)
    with suppress(ProcessLookupError):  # somebody else reaped it: the exit code will be wrong
        pidfd = os.pidfd_open(process.pid)
        await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)
    await trio.sleep(random.choice([0.0, 0.05, linger_s + 0.3]))
    counts.check("own", process.poll(), expected)
    OWN_CHILDREN.disown(process.pid)


async def strangers_child(counts: Counts) -> None:
    """Do as a library does that knows nothing of the reaper."""

    def run() -> int:
        with subprocess.Popen(["sh", "-c", "exit 7"]) as process:
            time.sleep(0.05)  # as above
            return process.wait()

    counts.check("unregistered", await trio.to_thread.run_sync(run), 7)


async def make_orphans(counts: Counts) -> None:
    process = spawn([sys.executable, "-S", "-c", MAKE_ORPHANS])
    counts.check("parent of orphans", await trio.to_thread.run_sync(process.wait), 5)
    OWN_CHILDREN.disown(process.pid)


async def main(own: int, orphans: int, linger_s: float) -> None:
    counts = Counts(orphans)
    structlog.configure(processors=[counts.log])
    began = time.monotonic()
    async with trio.open_nursery() as reaping:
        await reaping.start(lambda task_status: serve_reaper(linger_s=linger_s, task_status=task_status))
        async with trio.open_nursery() as nursery:
            for _ in range(orphans // ORPHANS_PER_PARENT):
                nursery.start_soon(make_orphans, counts)
            for number in range(own):
                nursery.start_soon(own_child, counts, number, linger_s)
                if number % 8 == 0:
                    nursery.start_soon(strangers_child, counts)
        with trio.move_on_after(30):
            await counts.all_reaped.wait()
        reaping.cancel_scope.cancel()
    report = {
        "pid": os.getpid(),
        "right": counts.right,
        "wrong": counts.wrong,
        "reaped": len(counts.reaped),
        "orphans": counts.reaped.count(ORPHAN_EXIT_CODE),
        "children_left": sum(process.parent == os.getpid() for process in read_processes()),
        "took_s": round(time.monotonic() - began, 2),
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
