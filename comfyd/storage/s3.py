"""S3, and whatever speaks its protocol, for Trio: boto3 in threads, which a cancel does end."""

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
import structlog
import trio

from comfyd.storage.s3_config import S3Config, make_client
from comfyd.storage.s3_errors import StorageFailed, Trouble, diagnose, handled_errors
from comfyd.storage.s3_transfer import Stopped, Transfer

log = structlog.get_logger("comfyd.storage")

T = TypeVar("T")

MAX_REGIONS: Final = 8
"""Clients at a time: a few MB each, for regions that a store names; beyond that, the failure names the region."""

MAX_MOVED_BUCKETS: Final = 1000
"""Buckets remembered to be in another region than the config's: they exist, but it is callers who name them."""


@attrs.define(eq=False)
class S3Store:
    """Uploads to and downloads from S3. Costs nothing before the first of them, when it imports boto3.

    One for the whole daemon. At most ``max_concurrent`` transfers go on at a time, each in a thread; further ones
    wait, and they are no more than the jobs that are there. Deadlines are the caller's: a transfer that moves has no
    limit of its own, one that does not ends by the config's time-outs.
    """

    config: S3Config = attrs.field(factory=S3Config)
    _limiter: trio.CapacityLimiter = attrs.field(init=False)
    _making: trio.Lock = attrs.field(init=False, factory=trio.Lock)
    _clients: dict[str | None, Any] = attrs.field(init=False, factory=dict)
    _regions: dict[str, str] = attrs.field(init=False, factory=dict)

    @_limiter.default
    def _(self) -> trio.CapacityLimiter:
        return trio.CapacityLimiter(self.config.max_concurrent)

    async def upload(self, path: Path, bucket: str, key: str, content_type: str) -> None:
        """Write the file to the object. Returns once the store has confirmed it; there is no half of it before.

        A cancel ends it within ``stop_grace_s`` and has the store forget the parts that it got. *path* may be removed
        as soon as this has returned or raised.

        Raises:
            StorageFailed: the object was not written.
        """
        await self._run(bucket, key, lambda transfer: transfer.upload(path, content_type))

    async def download(self, bucket: str, key: str, path: Path, *, max_bytes: int) -> int:
        """Write the object to *path* (which must be new) and return its size in bytes.

        *path* is there only if this returned: whatever else happens, nothing is left.

        Raises:
            StorageFailed: it cannot be had, or is larger than *max_bytes*.
        """
        try:
            return await self._run(bucket, key, lambda transfer: transfer.download(path, max_bytes))
        except trio.Cancelled:
            # It may have been done just when the cancel came. Removing a name takes microseconds.
            path.unlink(missing_ok=True)  # noqa: ASYNC240  # and a shielded thread for it would cost more
            raise

    async def presign(self, bucket: str, key: str, expires_s: int) -> str:
        """Return a URL by which anybody may GET the object for *expires_s* seconds (1 to 604,800).

        It ends earlier where the credentials do: those of a role last some hours. It says nothing about whether the
        object is there.

        Raises:
            StorageFailed: comfyd has no credentials to sign with.
        """
        return await self._run(bucket, key, lambda transfer: transfer.presign(expires_s))

    def close(self) -> None:
        """Close the connections that are kept for the next transfer. Call it when no transfer goes on."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    async def _run(self, bucket: str, key: str, work: Callable[[Transfer], T]) -> T:
        """Do *work* in the region where the bucket is, as far as we were told; where we are told another, do it there.

        The first request already fails where the region is wrong, so nothing is done twice.
        """
        region = self._regions.get(bucket, self.config.region)
        try:
            return await self._run_in(region, bucket, key, work)
        except StorageFailed as exc:
            known = exc.region in self._clients or len(self._clients) < MAX_REGIONS
            if exc.region in (None, region) or not known or len(self._regions) >= MAX_MOVED_BUCKETS:
                raise
            told = exc.region
        self._regions[bucket] = told
        log.info("s3_region_followed", bucket=bucket, region=told)
        return await self._run_in(told, bucket, key, work)

    async def _run_in(self, region: str | None, bucket: str, key: str, work: Callable[[Transfer], T]) -> T:
        client = await self._ready_client(region, bucket, key)
        stop = threading.Event()
        transfer = Transfer(client=client, config=self.config, bucket=bucket, key=key, stop=stop)
        try:
            return await run_stoppable(
                partial(work, transfer), stop, limiter=self._limiter, grace_s=self.config.stop_grace_s
            )
        except StorageFailed as exc:
            if exc.trouble is Trouble.NO_CREDENTIALS:
                # A client looks for credentials when it is made, and never again if there were none: a role may just
                # have been late. It made no connection, so there is nothing to close.
                self._clients.pop(region, None)
            raise

    async def _ready_client(self, region: str | None, bucket: str, key: str) -> Any:
        """Make the region's client, once; but again after a failure, since what it reads may have been mended."""
        async with self._making:
            if region not in self._clients:
                self._clients[region] = await trio.to_thread.run_sync(
                    self._make_client, region, bucket, key, abandon_on_cancel=True, limiter=self._limiter
                )  # abandoned, it is a client that nobody uses
            return self._clients[region]

    def _make_client(self, region: str | None, bucket: str, key: str) -> Any:
        try:
            return make_client(attrs.evolve(self.config, region=region))
        except ValueError as exc:  # botocore's word for an endpoint that is no URL
            raise StorageFailed(
                bucket, key, Trouble.MISCONFIGURED, "comfyd's S3 settings do not work (is AWS_ENDPOINT_URL a URL?)"
            ) from exc
        except Exception as exc:
            if not isinstance(exc, handled_errors()):
                raise
            diagnosis = diagnose(exc, "")
            raise StorageFailed(bucket, key, diagnosis.trouble, diagnosis.cause) from exc


async def run_stoppable(
    work: Callable[[], T], stop: threading.Event, *, limiter: trio.CapacityLimiter, grace_s: float
) -> T:
    """Run *work* in a thread. When this is cancelled, *stop* is set and *work* gets *grace_s* to see it and end.

    After that it is left alone: it may sit in a socket call until its time-out. It keeps its place in the limiter, so
    such threads do not add up, and *work* must undo what it did whenever it finds *stop* set.
    """
    started, finished = threading.Event(), trio.Event()
    trio_token = trio.lowlevel.current_trio_token()

    def in_thread() -> T:
        started.set()
        try:
            if stop.is_set():
                raise Stopped
            return work()
        finally:
            with contextlib.suppress(trio.RunFinishedError):  # left alone for longer than the daemon lived
                trio_token.run_sync_soon(finished.set)

    try:
        return await trio.to_thread.run_sync(in_thread, abandon_on_cancel=True, limiter=limiter)
    except trio.Cancelled:
        stop.set()
        # Not started: it waited for the limiter, or it will find *stop* set, which happened before this look.
        if started.is_set():
            with trio.move_on_after(grace_s, shield=True):
                await finished.wait()
        raise
