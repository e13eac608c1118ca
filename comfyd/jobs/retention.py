"""Forgets ended jobs and what is kept of them, by age and by size."""

import time
from collections.abc import Sequence
from typing import Final, NoReturn

import attrs
import structlog
import trio

from comfyd.config import JobsConfig
from comfyd.journal import Journal, JournalUnavailable
from comfyd.media.kept import KeptOutputs

log = structlog.get_logger("comfyd.jobs")

_EVERY_S: Final = 60.0
_MAX_JOBS: Final = 100_000
"""Ended jobs that are remembered at most, whatever their age: some kilobytes of disk each."""
_REMOVED_AT_ONCE: Final = 64
_LAST_REMOVAL_S: Final = 1.0
"""What is left after it goes with the next start's sweep."""
_REMOVING: Final = trio.CapacityLimiter(1)


@attrs.define(eq=False)
class Retention:
    """Removes what nobody needs any more. The same thread removes what callers have deleted."""

    config: JobsConfig
    journal: Journal
    kept: KeptOutputs
    _removed: list[str] = attrs.field(factory=list)
    _woken: trio.Event = attrs.field(factory=trio.Event)

    def remove(self, keys: Sequence[str]) -> None:
        """Remove the kept outputs of these jobs soon; their rows are gone already."""
        self._removed.extend(keys)
        self._woken.set()

    async def serve(self) -> NoReturn:
        """Look every minute, until cancelled. What a killed daemon left behind of forgotten jobs goes first."""
        swept = False
        try:
            while True:
                try:
                    if not swept:
                        await self._sweep()
                        swept = True
                    await self._forget_expired()
                except JournalUnavailable as exc:
                    log.warning("retention.not_possible", reason=str(exc))
                with trio.move_on_after(_EVERY_S):
                    while True:
                        await self._remove_deleted()
                        await self._woken.wait()
        finally:  # who was told that they are gone must not find them after our end
            with trio.move_on_after(_LAST_REMOVAL_S, shield=True):
                await self._remove_deleted()

    async def _remove_deleted(self) -> None:
        self._woken = trio.Event()
        while self._removed:
            keys = tuple(self._removed[:_REMOVED_AT_ONCE])  # a thread cannot be cut off, only followed by no other
            await trio.to_thread.run_sync(self.kept.remove, keys, limiter=_REMOVING)
            del self._removed[: len(keys)]

    async def _sweep(self) -> None:
        # In this order: a job that comes meanwhile is known before anything is kept of it.
        kept = await trio.to_thread.run_sync(self.kept.keys, limiter=_REMOVING)
        nobodys = kept - await self.journal.known_keys()
        if nobodys:
            log.info("retention.swept", folders=len(nobodys))
            await trio.to_thread.run_sync(self.kept.remove, nobodys, limiter=_REMOVING)

    async def _forget_expired(self) -> None:
        while gone := await self.journal.forget_expired(
            now=time.time(),
            jobs_s=self.config.retention_s,
            dead_s=self.config.dead_letter_retention_s,
            max_kept_bytes=self.config.retention_bytes,
            max_jobs=_MAX_JOBS,
        ):
            log.info("retention.forgotten", jobs=len(gone))
            await trio.to_thread.run_sync(self.kept.remove, [key for _, key in gone], limiter=_REMOVING)
