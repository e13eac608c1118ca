"""Watches the folder of the workflows and keeps the catalogue that requests see."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import attrs
import structlog
import trio

from comfyd.workflows.catalogue import (
    Listing,
    WorkflowCatalogue,
    WorkflowProblem,
    list_folder,
    load_listed,
    new_problems,
)

log = structlog.get_logger("comfyd.workflows")

T = TypeVar("T")

LOOK_EVERY_S: Final = 1.0
"""The folder is looked at, not watched by inotify: that tells nothing of network disks and of what a container's host
does to a mounted folder. A look at 200 files costs about 1 ms, in a thread."""
LOAD_TIMEOUT_S: Final = 60.0
"""A file that waits for ever when it runs is told of then; nothing else takes a second."""
_LOADING_THREADS: Final = 4
"""A thread that hangs in a file cannot be ended; so many changes of such a file are tried before no more are read."""


@attrs.define(eq=False)
class Workflows:
    """The catalogue as it is now. A request takes :attr:`current` once and keeps to it."""

    current: WorkflowCatalogue = attrs.field(factory=WorkflowCatalogue)
    loaded: trio.Event = attrs.field(factory=trio.Event, repr=False)
    """Set once the folder was read for the first time; until then :attr:`current` has nothing."""
    _changed: trio.Event = attrs.field(factory=trio.Event, repr=False)

    async def wait_changed(self) -> WorkflowCatalogue:
        """Wait until there is another catalogue, and return it."""
        await self._changed.wait()
        return self.current

    def replace(self, catalogue: WorkflowCatalogue) -> None:
        """Let new requests see *catalogue*; those under way keep theirs."""
        self.current = catalogue
        changed, self._changed = self._changed, trio.Event()
        changed.set()


async def serve_workflows(
    folder: Path,
    *,
    required: bool = True,
    look_every_s: float = LOOK_EVERY_S,
    load_timeout_s: float = LOAD_TIMEOUT_S,
    task_status: trio.TaskStatus[Workflows] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Load *folder*, then again after each change, until cancelled.

    ``started()`` at once: a file that hangs must not keep the daemon from listening. A folder that is missing is told
    of only if it is *required*; one that appears later is read then. A change is taken up when two looks have seen the
    same: files that are being copied are not read half written.
    """
    threads = trio.CapacityLimiter(_LOADING_THREADS)
    look = partial(list_folder, folder, required=required)
    workflows = Workflows()
    task_status.started(workflows)
    loaded: Listing | None = None
    seen: Listing | None = None
    while True:
        now = await _in_thread(look, threads, load_timeout_s)
        if now is None:
            loaded = None
            _take(workflows, _not_read(workflows.current, load_timeout_s))
        elif now != loaded and (now == seen or not workflows.loaded.is_set()):
            loaded = now
            load = partial(load_listed, folder, now, workflows.current)
            catalogue = await _in_thread(load, threads, load_timeout_s)
            _take(workflows, catalogue or _not_read(workflows.current, load_timeout_s))
        workflows.loaded.set()
        seen = now
        await trio.sleep(look_every_s)


async def _in_thread(function: Callable[[], T], threads: trio.CapacityLimiter, timeout_s: float) -> T | None:
    """Run *function* in a thread; None when it takes too long (a network disk that hangs, a file that waits)."""
    with trio.move_on_after(timeout_s):
        return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=threads)
    return None


def _not_read(current: WorkflowCatalogue, timeout_s: float) -> WorkflowCatalogue:
    message = f"was not read within {timeout_s:g} s, does a file wait for something? What was there before is kept"
    return attrs.evolve(current, problems=(WorkflowProblem(file=".", message=message),))


def _take(workflows: Workflows, catalogue: WorkflowCatalogue) -> None:
    before = workflows.current
    if (catalogue.workflows, catalogue.problems) == (before.workflows, before.problems):
        return  # nothing that anybody could see
    workflows.replace(catalogue)
    for problem in new_problems(before.problems, catalogue.problems):
        facts = {} if problem.traceback_text is None else {"traceback": problem.traceback_text}
        log.error("workflow.broken", file=problem.file, reason=problem.message, **facts)
    log.info("workflows.loaded", workflows=len(catalogue.workflows), broken=len(catalogue.problems))
