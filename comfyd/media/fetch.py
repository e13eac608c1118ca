"""Inputs that a job names by URL: downloaded beside the queue, each URL once for all that wait for it.

A download belongs to the :class:`Fetcher`, not to a job: its jobs come and go, each takes a hard link, and when the
last has gone the download is stopped, or its file removed. Nothing is kept beyond that: the same URL asked for later is
asked for again (comfyui-api never fetched a URL twice, and served what was there on the first day).
"""

import os
import random
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final

import attrs
import httpx
import structlog
import trio

from comfyd.config import MediaConfig
from comfyd.errors import ComfydError
from comfyd.media.images import CHECKED, UnreadablePicture, picture_size
from comfyd.media.spool import HEAD_BYTES, PIECE_BYTES, ContentRefused, SpoolFile
from comfyd.net import UrlPolicy, UrlRefused, check_url, display_url, open_body, open_client, open_get
from comfyd.net.guarded import ConnectFailed, Resolver
from comfyd.net.policy import parse_url

log = structlog.get_logger("comfyd.media")

DOWNLOADS_AT_ONCE: Final = 32
"""Enough to hide slow servers; more would only slow the connection pool down and take 1 MiB of memory each."""
_ATTEMPTS: Final = 3
_BACKOFF_S: Final = 0.25  # before the second attempt; doubled for the third, and up to half as much added by chance
_DISK_THREADS: Final = 4  # a disk gets no faster by more
_PASSING_STATUS: Final = frozenset({502, 503, 504})
_GOOD_STATUS: Final = frozenset({200, 203})  # 203: a proxy on the way changed it, which is what proxies do

# Both give one exception class for all that is wrong with an answer.
_NO_ANSWER: Final = "disconnected without sending a response"  # httpcore 1.0.9, _async/http11.py
_TRUNCATED: Final = ("without sending complete message body", "incomplete chunked read")  # h11 0.16, _readers.py


class InputNotFetched(ComfydError):
    """An input cannot be fetched, or is not what it should be. The text is for the caller, and without secrets.

    *url* is the URL as displayed; *reason* is what follows it in the text.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} {reason}")
        self.url = url
        self.reason = reason


class _PassingTrouble(Exception):
    """An attempt failed before the answer's first byte, in a way that the next may not. The text is the reason."""


@attrs.frozen(kw_only=True)
class FetchLimits:
    """Bounds of one download.

    *stall_s* is the longest silence, also before the first byte. *total_s* begins when the download has a slot, and
    holds for all its attempts together.
    """

    max_bytes: int
    max_megapixels: int
    total_s: float
    stall_s: float = 30.0
    connect_s: float = 10.0

    @classmethod
    def of(cls, config: MediaConfig) -> "FetchLimits":
        """Take what is configured, the rest as it is by default."""
        return cls(
            max_bytes=config.max_input_bytes,
            max_megapixels=config.max_input_megapixels,
            total_s=config.input_timeout_s,
        )


@attrs.define(eq=False)
class _Download:
    """One URL on its way to disk. *waiters* counts the jobs' calls that want it; the last to leave ends it."""

    url: str
    shown: str
    path: Path
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    waiters: int = 0
    ended: trio.Event = attrs.field(factory=trio.Event)
    released: trio.Event = attrs.field(factory=trio.Event)
    ending: str = ""
    size_bytes: int = 0
    failure: str | None = "was not fetched: comfyd is stopping"
    disk_error: tuple[int, str] | None = None  # one exception cannot be raised in several tasks


@attrs.define(eq=False)
class Fetcher:
    """Downloads inputs; from :func:`open_fetcher`."""

    policy: UrlPolicy
    limits: FetchLimits
    spool: Path
    on_fetched: Callable[[str, int | None], None] | None
    """Hears the URL and the size in bytes of each download, None of one that failed."""
    _client: httpx.AsyncClient
    _nursery: trio.Nursery
    _slots: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(DOWNLOADS_AT_ONCE))
    _disk: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(_DISK_THREADS))
    _in_flight: dict[str, _Download] = attrs.field(factory=dict)
    _count: int = 0

    async def fetch(self, url: str, folder: Path, stem: str) -> Path:
        """Give *folder* a file named *stem* with the content of *url*, its ending told by that content.

        Who asks for a URL that is on its way already shares that download, and its remaining time. The file is the
        caller's: removing it concerns nobody else.

        Raises:
            InputNotFetched: with the cause, for the caller.
            OSError: it cannot be written to disk, or *folder* has such a file.
        """
        download = self._join(url)
        try:
            await download.ended.wait()
            if download.disk_error is not None:
                raise OSError(*download.disk_error)
            if download.failure is not None:
                raise InputNotFetched(download.shown, download.failure)
            path = folder / (stem + download.ending)
            await trio.to_thread.run_sync(_give, download.path, path, limiter=self._disk)
            return path
        finally:
            self._leave(download)

    def _join(self, url: str) -> _Download:
        try:
            check_url(url, self.policy)
            key = str(parse_url(url).copy_with(fragment=None))
        except UrlRefused as exc:
            raise InputNotFetched(display_url(url), f"is refused: {exc.reason}") from exc
        download = self._in_flight.get(key)
        if download is None:
            self._count += 1
            download = _Download(url=key, shown=display_url(url), path=self.spool / f"{self._count:08d}")
            self._in_flight[key] = download
            self._nursery.start_soon(self._run, download)
        download.waiters += 1
        return download

    def _leave(self, download: _Download) -> None:
        download.waiters -= 1
        if download.waiters == 0:
            download.released.set()
            if not download.ended.is_set():
                self._forget(download)  # now: the next to ask must not join what is being stopped
                download.scope.cancel("no job waits for it any more")

    def _forget(self, download: _Download) -> None:
        if self._in_flight.get(download.url) is download:
            del self._in_flight[download.url]

    async def _run(self, download: _Download) -> None:
        """Own *download* from the first byte until its file is removed."""
        began = time.perf_counter()
        try:
            with download.scope:
                async with self._slots:
                    await self._fetch_in_time(download)
        except OSError as exc:  # the disk is full, or gone
            download.disk_error = (exc.errno or 0, exc.strerror or type(exc).__name__)
        except Exception:  # what a stranger's server answers must not end the daemon, whatever bug it finds
            log.exception("input.fetch_failed", url=download.shown)
            download.failure = "cannot be fetched: a fault of comfyd's own; its log has more"
        finally:
            self._forget(download)
            download.ended.set()
        log.debug(
            "input.fetched" if download.failure is None else "input.not_fetched",
            url=download.shown,
            reason=download.failure,
            took_s=round(time.perf_counter() - began, 3),
        )
        if self.on_fetched is not None and not download.scope.cancelled_caught:
            failed = download.failure is not None or download.disk_error is not None
            self.on_fetched(download.url, None if failed else download.size_bytes)
        await download.released.wait()
        try:
            await trio.to_thread.run_sync(partial(download.path.unlink, missing_ok=True), limiter=self._disk)
        except OSError as exc:
            log.warning("input.not_removed", path=str(download.path), reason=exc.strerror)

    async def _fetch_in_time(self, download: _Download) -> None:
        try:
            with trio.fail_after(self.limits.total_s):
                await self._fetch_with_retries(download)
        except trio.TooSlowError:
            download.failure = f"cannot be fetched: it took longer than {self.limits.total_s:g} s (INPUT_TIMEOUT_S)"
        except (UrlRefused, ContentRefused, UnreadablePicture) as exc:
            download.failure = _refusal(exc)
        except httpx.TransportError as exc:
            download.failure = f"cannot be fetched: {_reason(exc, self.limits)}"
        else:
            download.failure = None

    async def _fetch_with_retries(self, download: _Download) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await self._fetch_once(download)
            except _PassingTrouble as exc:
                if attempt == _ATTEMPTS:
                    raise ContentRefused(f"{exc} ({attempt} attempts)") from exc
                log.debug("input.fetch_again", url=download.shown, reason=str(exc), attempt=attempt)
                delay_s = _BACKOFF_S * 2.0 ** (attempt - 1)
                await trio.sleep(delay_s + random.uniform(0, delay_s / 2))  # noqa: S311  # no secret
            else:
                return

    async def _fetch_once(self, download: _Download) -> None:
        limits = self.limits
        timeout = httpx.Timeout(limits.stall_s, connect=limits.connect_s, pool=None)
        answered = False
        try:
            async with open_get(self._client, download.url, timeout=timeout) as response:
                answered = True
                self._check_head(response)
                await self._store(response, download)
        except httpx.TransportError as exc:
            if answered or not _may_pass(exc):
                raise
            raise _PassingTrouble(f"cannot be fetched: {_reason(exc, limits)}") from exc

    def _check_head(self, response: httpx.Response) -> None:
        status = response.status_code
        if status in _PASSING_STATUS:
            raise _PassingTrouble(f"answered {_status_text(status)}")
        if status not in _GOOD_STATUS:
            raise ContentRefused(f"answered {_status_text(status)}")
        length = response.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and len(length) < 20 and int(length) > self.limits.max_bytes:
            raise ContentRefused(_too_large(self.limits.max_bytes))

    async def _store(self, response: httpx.Response, download: _Download) -> None:
        """Stream the body to disk, 1 MiB at a time, and look at what came."""
        file = SpoolFile(
            path=download.path,
            max_bytes=self.limits.max_bytes,
            coding=response.headers.get("content-encoding", ""),
            too_large=_too_large(self.limits.max_bytes),
        )
        try:
            pieces = bytearray()
            enough = HEAD_BYTES  # the first write tells the type: a web page ends here, however long it is
            async with open_body(response) as chunks:
                async for chunk in chunks:
                    pieces += chunk
                    if len(pieces) >= enough:
                        await trio.to_thread.run_sync(file.write, pieces, limiter=self._disk)
                        pieces, enough = bytearray(), PIECE_BYTES
            await trio.to_thread.run_sync(file.finish, pieces, limiter=self._disk)
            download.size_bytes = file.written_bytes
        finally:
            file.close()
        assert file.media_type is not None  # noqa: S101  # for mypy: finish() sees to it
        if file.media_type.name in CHECKED:
            await trio.to_thread.run_sync(_check_pixels, download.path, self.limits, limiter=self._disk)
        download.ending = file.media_type.ending


@asynccontextmanager
async def open_fetcher(
    config: MediaConfig | FetchLimits,
    policy: UrlPolicy,
    spool: Path,
    *,
    resolver: Resolver | None = None,
    on_fetched: Callable[[str, int | None], None] | None = None,
) -> AsyncIterator[Fetcher]:
    """Download inputs until the block is left; downloads that are still under way are then stopped.

    *spool* is a folder of our own, made here and removed at the end. It lies best on the file system of the jobs'
    input folders: a job's file is a hard link then, and a copy otherwise.

    Raises:
        OSError: *spool* cannot be made.
    """
    limits = FetchLimits.of(config) if isinstance(config, MediaConfig) else config
    await trio.to_thread.run_sync(partial(spool.mkdir, parents=True, exist_ok=True))
    try:
        async with open_client(policy, resolver=resolver) as client, trio.open_nursery() as nursery:
            yield Fetcher(
                policy=policy, limits=limits, spool=spool, on_fetched=on_fetched, client=client, nursery=nursery
            )
            nursery.cancel_scope.cancel("the fetcher is closed")
    finally:
        with trio.CancelScope(shield=True):  # ends by itself: a few files at most
            await trio.to_thread.run_sync(partial(shutil.rmtree, spool, ignore_errors=True))


def _give(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # another file system, or one without hard links
        with source.open("rb") as read, target.open("xb") as write:
            shutil.copyfileobj(read, write, PIECE_BYTES)


def _check_pixels(path: Path, limits: FetchLimits) -> None:
    width, height = picture_size(path)
    if width * height > limits.max_megapixels * 1_000_000:
        raise ContentRefused(
            f"has {width} x {height} pixels, more than {limits.max_megapixels} million (MAX_INPUT_MEGAPIXELS)"
        )


def _too_large(max_bytes: int) -> str:
    return f"is larger than {max_bytes / (1 << 20):g} MB (MAX_INPUT_SIZE_MB)"


def _status_text(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"  # not the server's own phrase: anything may stand there
    except ValueError:
        return str(status)


def _may_pass(error: httpx.TransportError) -> bool:
    if isinstance(error, httpx.ConnectError):
        return not isinstance(error.__cause__, ConnectFailed) or error.__cause__.passing
    if isinstance(error, httpx.RemoteProtocolError):
        return _NO_ANSWER in str(error)
    return isinstance(error, httpx.ConnectTimeout | httpx.NetworkError)


def _reason(error: httpx.TransportError, limits: FetchLimits) -> str:
    """Say what went wrong below HTTP; the server's own words are not repeated."""
    text = str(error)
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {limits.connect_s:g} s"
    if isinstance(error, httpx.TimeoutException):
        return f"it sent nothing for {limits.stall_s:g} s"
    if isinstance(error, httpx.ConnectError):
        return error.__cause__.reason if isinstance(error.__cause__, ConnectFailed) else "no connection"
    if isinstance(error, httpx.RemoteProtocolError):
        if any(words in text for words in _TRUNCATED):
            return "it is truncated: the connection was closed before its end"
        if _NO_ANSWER in text:
            return "the connection was closed without an answer"
        return "the answer is not valid HTTP"
    return "the connection was lost"


def _refusal(error: Exception) -> str:
    if isinstance(error, UrlRefused):
        return f"is refused: {error.reason}"
    if isinstance(error, UnreadablePicture):
        return f"cannot be used: {error}"
    return str(error)
