"""The daemon as its client sees it: takes a request, tells of a job, gives its outputs; and is away at times.

Everything here can be said again: a job has an id from the start, so a request that is posted twice is one job; events
go on after the last one that was heard; and of a file the part that is missing is asked for.
"""

import json
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

import attrs
import httpx
import trio

from comfyd import __version__
from comfyd.cli.sse import BadEventStream, EventParser, ServerEvent
from comfyd.cli.submit.body import Body, Sending
from comfyd.cli.submit.errors import BadUse, JobFailed, NotSaved, Refused, Unreachable, passes
from comfyd.errors import InvalidValue

_TIMEOUT: Final = httpx.Timeout(connect=10.0, read=45.0, write=45.0, pool=None)
"""Between two pieces. An event stream is never silent for longer than 15 s, nor does a daemon need longer to take or to
read something; who is silent for 45 s is gone."""
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0
_CUT_POSTS: Final = 3
"""So often a request is sent again whose connection was cut: it may be the request that the way cannot take."""
_LARGE_BODY_BYTES: Final = 1 << 20
_MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""Of an answer that is no file; the largest are results of jobs with thousands of outputs."""
_AFTER_RESULT_S: Final = 2.0
"""The daemon ends the stream after the result; a proxy may not."""
_CANCEL_WITHIN_S: Final = 15.0
_CANCEL_PAUSES_S: Final = (0.0, 0.1, 0.3, 0.6, 1.0)
"""A request that was cut off may be taken a moment later."""


@attrs.frozen(kw_only=True)
class Patience:
    """How long to bear with a daemon: *ready_s* until it takes the request, *away_s* once it has."""

    ready_s: float
    away_s: float


class _NotNow(Exception):
    """It may go on later; the text says what is in the way, *after_s* when the daemon wants to be asked again."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


@attrs.define(eq=False)
class Absence:
    """Counts how long the daemon is away, and says so once."""

    limit_s: float
    say: Callable[[str], None]
    _since: float | None = None
    _pause_s: float = _FIRST_PAUSE_S

    def over(self) -> None:
        """The daemon is back."""
        if self._since is not None and self._pause_s > _FIRST_PAUSE_S:
            self.say("the daemon is back")
        self._since, self._pause_s = None, _FIRST_PAUSE_S

    async def pause(self, reason: str, at_least_s: float = 0.0) -> None:
        """Wait before the next attempt, longer each time.

        Raises:
            Unreachable: it has been away for too long.
        """
        now = trio.current_time()
        if self._since is None:
            self._since = now
            if self.limit_s:
                self.say(f"{reason}; trying again for {self.limit_s:g} s")
        left_s = self._since + self.limit_s - now
        if left_s <= 0 or at_least_s > left_s:
            raise Unreachable(reason)
        await trio.sleep(min(max(self._pause_s, at_least_s), left_s))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


@attrs.define(eq=False)
class Remote:
    """One daemon. Made by :func:`open_remote`."""

    http: httpx.AsyncClient
    base: httpx.URL
    patience: Patience
    say: Callable[[str], None]

    @property
    def shown(self) -> str:
        """Its URL without what is secret in it."""
        return str(self.base.copy_with(username=None, password=None, query=None)).rstrip("/")

    def url_of(self, path: str) -> httpx.URL:
        """Where *path*, which begins with a slash, is; the daemon may be below a path of somebody else's server."""
        return self.base.copy_with(raw_path=self.base.raw_path.rstrip(b"/") + path.encode())

    # --- taking a request

    async def post(self, path: str, body: Body) -> None:
        """Post a request until the daemon has promised to do it.

        Raises:
            Refused: it does not take it.
            Unreachable: it did not answer, or was not ready, for as long as our patience lasted.
            BadUse: a file of the request is not what it was.
        """
        not_ready = Absence(self.patience.ready_s, self.say)
        away = Absence(self.patience.away_s, self.say)
        cuts = 0
        while True:
            try:
                await self._post_once(path, body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
                # Once it was there, it may come back; it is no use to wait for what was never there.
                await (away if cuts else not_ready).pause(self._words(exc))
            except _NotNow as exc:
                await not_ready.pause(str(exc), exc.after_s)
            except httpx.LocalProtocolError:
                raise  # a bug of ours
            except httpx.TransportError as exc:
                cuts += 1
                if cuts > _CUT_POSTS:
                    raise Unreachable(f"{self._words(exc)}{_size_hint(body)}") from exc
                await away.pause(self._words(exc))
            else:
                return

    async def _post_once(self, path: str, body: Body) -> None:
        headers = {
            "content-type": "application/json",
            "content-length": str(body.length),
            "prefer": "respond-async",
        }
        request = self.http.build_request("POST", self.url_of(path), headers=headers)
        request.stream = _Stream(body)  # given to build_request it would become an async generator
        response = await self.http.send(request, stream=True)
        try:
            # The body of a 202 is the graph as we sent it, with the pictures in it.
            if response.status_code != HTTPStatus.ACCEPTED:
                await self._refuse(response)
        finally:
            await response.aclose()

    async def _refuse(self, response: httpx.Response) -> None:
        """Raise for an answer that is not the one that is wanted; it is not read yet."""
        document = await _problem_of(response)
        if passes(response.status_code):
            raise _NotNow(_passing_words(document, self.shown), _retry_after_s(response))
        raise Refused(document, response.status_code)

    # --- following a job

    async def follow(self, job_id: str, watch: Callable[[ServerEvent], None]) -> dict[str, Any]:
        """Call *watch* with each event of a job until it has ended; return the result.

        Raises:
            JobFailed: the daemon does not know the job any more.
            Refused: it does not tell of it.
            Unreachable: it was away for too long.
        """
        parser = EventParser()
        away = Absence(self.patience.away_s, self.say)
        while True:
            try:
                result = await self._listen(job_id, parser, watch, away)
            except (httpx.TransportError, BadEventStream, InvalidValue) as exc:
                await away.pause(self._words(exc))
            except _NotNow as exc:
                await away.pause(str(exc), exc.after_s)
            else:
                if result is not None:
                    return result
                await away.pause(f"{self.shown} ended the event stream")
            parser.begin()

    async def _listen(
        self, job_id: str, parser: EventParser, watch: Callable[[ServerEvent], None], away: Absence
    ) -> dict[str, Any] | None:
        """Listen on one connection; return the result, None if it did not come."""
        headers = {"accept": "text/event-stream"}
        if parser.last_id:
            headers["last-event-id"] = parser.last_id
        result: dict[str, Any] | None = None
        async with self.http.stream("GET", self.url_of(f"/jobs/{quote(job_id)}/events"), headers=headers) as response:
            if response.status_code == HTTPStatus.NO_CONTENT:  # we have heard the end, and lost what it was
                return await self.look(job_id)
            if response.status_code == HTTPStatus.NOT_FOUND:
                raise JobFailed(_forgotten(self.shown))
            if response.status_code != HTTPStatus.OK:
                await self._refuse(response)

            async def take(data: bytes, enough: trio.CancelScope) -> None:
                nonlocal result
                for event in parser.feed_bytes(data):
                    away.over()
                    if event.name == "result" and isinstance(event.data, dict):
                        result = event.data
                        enough.deadline = trio.current_time() + _AFTER_RESULT_S
                    watch(event)

            await _each_piece(response, take)
        return result

    async def look(self, job_id: str) -> dict[str, Any] | None:
        """Ask what the daemon knows of a job: once; None if it knows nothing.

        Raises:
            Refused: it does not tell.
            httpx.TransportError: it does not answer.
        """
        async with self.http.stream("GET", self.url_of(f"/jobs/{quote(job_id)}")) as response:
            if response.status_code == HTTPStatus.NOT_FOUND:
                return None
            if response.status_code != HTTPStatus.OK:
                raise Refused(await _problem_of(response), response.status_code)
            view = _json_of(await _read_bounded(response))
            return view if isinstance(view, dict) else None

    async def cancel(self, job_id: str, *, perhaps_posted: bool) -> str:
        """Cancel a job on its way; return what came of it, in a clause.

        ``POST /interrupt`` does it, which leaves a job alone that has just ended; ``DELETE`` would throw away what it
        has made. If it is not sure that the job was *posted*, it is asked for a little longer.
        """
        with trio.move_on_after(_CANCEL_WITHIN_S):
            try:
                for pause_s in _CANCEL_PAUSES_S if perhaps_posted else (0.0,):
                    await trio.sleep(pause_s)
                    answer = await self.http.post(self.url_of("/interrupt"), json={"id": job_id}, timeout=_TIMEOUT)
                    if answer.status_code == HTTPStatus.OK:
                        return "cancelled"
                view = await self.look(job_id)
            except httpx.TransportError as exc:
                return f"not cancelled: {self._words(exc)}"
            except Refused as exc:
                return f"not cancelled: {exc}"
            if view is None:
                return "not submitted" if perhaps_posted else "the daemon does not know it any more"
            if "outputs" in view:
                return f"it had just succeeded; its outputs are at {self.shown}/jobs/{job_id}/outputs"
            return f"the job is {view.get('state')}"
        return f"not cancelled: {self.shown} did not answer within {_CANCEL_WITHIN_S:g} s"

    # --- getting outputs

    async def download(self, href: str, size_bytes: int, file: Any, told: Callable[[int], None]) -> None:
        """Write an output to *file* (a :func:`trio.wrap_file` of a binary one, empty), going on where it was cut.

        *told* is called with the bytes that are there, after each piece.

        Raises:
            NotSaved: the daemon does not have it, or not as it told.
            Unreachable: it was away for too long.
            OSError: the disk does not take it.
        """
        away = Absence(self.patience.away_s, self.say)
        transfer = _Transfer(href, size_bytes, file, told)
        while True:
            try:
                await self._fetch_on(transfer, away)
            except httpx.TransportError as exc:
                await away.pause(self._words(exc))
            except _NotNow as exc:
                await away.pause(str(exc), exc.after_s)
            else:
                if transfer.done == size_bytes:
                    return
                if transfer.done > size_bytes:
                    raise NotSaved(f"{href} is larger than the {size_bytes} bytes that the daemon told of")
                await away.pause(f"{self.shown} sent a part of {href} only")

    async def _fetch_on(self, transfer: "_Transfer", away: Absence) -> None:
        headers = {"accept-encoding": "identity"}
        if transfer.done and transfer.etag:
            headers |= {"range": f"bytes={transfer.done}-", "if-range": transfer.etag}
        async with self.http.stream("GET", self.url_of(transfer.href), headers=headers) as response:
            if response.status_code == HTTPStatus.OK:
                await transfer.begin(response.headers.get("etag", ""))
            elif response.status_code != HTTPStatus.PARTIAL_CONTENT or not transfer.goes_on_with(response):
                if passes(response.status_code):
                    await self._refuse(response)
                document = await _problem_of(response)
                raise NotSaved(f"{transfer.href}: {document['detail']}")

            async def take(data: bytes, enough: trio.CancelScope) -> None:
                away.over()
                if not await transfer.take(data):
                    enough.cancel("there is more than was told")

            await _each_piece(response, take)

    def _words(self, exc: Exception) -> str:
        match exc:
            case httpx.ConnectTimeout():
                return f"{self.shown} does not answer"
            case httpx.ConnectError():
                return f"{self.shown} is not reachable{_cause_words(exc)}"
            case httpx.TimeoutException():
                return f"{self.shown} was silent for {_TIMEOUT.read:g} s"
            case httpx.TransportError():
                return f"the connection to {self.shown} was cut"
            case _:
                return f"{self.shown} does not speak as comfyd does: {exc}"


@attrs.define(eq=False)
class _Stream(httpx.AsyncByteStream):
    """A body for httpx that is no generator: it may be left in the middle."""

    body: Body

    def __aiter__(self) -> AsyncIterator[bytes]:
        return Sending(self.body)


@attrs.define(eq=False)
class _Transfer:
    """One output on its way to us."""

    href: str
    size_bytes: int
    file: Any
    told: Callable[[int], None]
    done: int = 0
    etag: str = ""

    async def begin(self, etag: str) -> None:
        """Begin (again) at the first byte."""
        if self.done:
            await self.file.seek(0)
            await self.file.truncate()
        self.done, self.etag = 0, etag

    def goes_on_with(self, response: httpx.Response) -> bool:
        """Whether a 206 begins where we are."""
        given: str = response.headers.get("content-range", "")
        return given.startswith(f"bytes {self.done}-")

    async def take(self, data: bytes) -> bool:
        """Write a piece; False if there are too many."""
        self.done += len(data)
        if self.done > self.size_bytes:
            return False
        await self.file.write(data)
        self.told(self.done)
        return True


@asynccontextmanager
async def open_remote(
    url: str, api_key: str | None, patience: Patience, say: Callable[[str], None]
) -> AsyncIterator[Remote]:
    """Be a client of the daemon at *url*. Nothing is sent yet.

    Raises:
        BadUse: it is no URL.
    """
    base = _parsed(url)
    headers = {"user-agent": f"comfyd-submit/{__version__}", "accept-encoding": "identity"}
    if api_key is not None:
        if not api_key.isascii() or not api_key.isprintable():
            raise BadUse("COMFYD_API_KEY has characters that no API key has")
        headers["x-api-key"] = api_key
    local = base.host == "localhost" or base.host.startswith("127.") or base.host == "::1"
    # A proxy of the environment is the way to elsewhere, not to this machine.
    async with httpx.AsyncClient(headers=headers, timeout=_TIMEOUT, trust_env=not local) as http:
        yield Remote(http, base, patience, say)


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError):
        parsed = httpx.URL("")
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise BadUse("the daemon's URL (--url, COMFYD_URL) must be http://host:port or https://...")
    return parsed.copy_with(fragment=None, query=None)


async def _problem_of(response: httpx.Response) -> dict[str, Any]:
    """The problem document in an answer; made up where there is none, as a proxy's answer has none."""
    document = _json_of(await _read_bounded(response))
    if isinstance(document, dict) and isinstance(document.get("detail"), str) and isinstance(document.get("type"), str):
        return document
    reason = f"{response.status_code} {response.reason_phrase}".strip()
    return {
        "type": "unexpected-answer",
        "title": "An answer that is not comfyd's",
        "status": response.status_code,
        "detail": f"{response.request.method} {response.request.url.path} was answered {reason}",
    }


async def _each_piece(response: httpx.Response, take: Callable[[bytes, trio.CancelScope], Awaitable[None]]) -> None:
    """Give the pieces of an answer to *take* as they arrive; it cancels the scope when it has enough.

    httpx reads through generators within generators, which nobody closes when a loop over them is left. So the loop
    below never is: every end of it, also by a cancel, comes from within them. A cancel of the
    caller's waits for *take*, which writes to a disk at most, and is sure to end.
    """
    failure: Exception | None = None
    with trio.CancelScope() as enough:
        async for data in response.aiter_raw():
            with trio.CancelScope(shield=True):
                try:
                    await take(data, enough)
                except (OSError, BadEventStream, InvalidValue) as exc:
                    failure = exc
                    enough.cancel("a piece could not be used")
    if failure is not None:
        raise failure


async def _read_bounded(response: httpx.Response) -> bytes:
    data = bytearray()
    async for piece in response.aiter_raw():
        if len(data) <= _MAX_ANSWER_BYTES:
            data += piece
    return bytes(data)


def _json_of(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _cause_words(exc: BaseException) -> str:
    """The operating system's reason for a failed connection: the innermost one, as each library wraps it anew."""
    reason = ""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            # Trio puts the address before the reason; a resolver's numbers are its own, and negative.
            reason = f": {os.strerror(cause.errno) if cause.errno and cause.errno > 0 else cause.strerror}"
        # Trio tries every address of a name, and gives the failures as a group; httpcore hides causes by "from None".
        cause = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__ or cause.__context__
    return reason


def _forgotten(shown: str) -> dict[str, Any]:
    detail = f"{shown} does not know the job any more: it was removed, or the daemon was restarted without a STATE_DIR"
    return {"type": "not-found", "title": "The job is not known", "detail": detail}


def _passing_words(document: Mapping[str, Any], shown: str) -> str:
    return f"{shown} does not take it now: {document['detail']}"


def _retry_after_s(response: httpx.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 7 else 0.0


def _size_hint(body: Body) -> str:
    if body.length < _LARGE_BODY_BYTES:
        return ""
    size_mb = math.ceil(body.length / (1 << 20))
    return f"; the request has {size_mb} MB, the daemon takes MAX_BODY_SIZE_MB (100 by default)"
