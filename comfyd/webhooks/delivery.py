"""One attempt to hand a webhook to its receiver.

A body of gigabytes is streamed from its files: read once to be signed, if there are secrets, and once to be sent. What
bounds an attempt is silence and not its length, as a large body over a slow line takes as long as it takes:
``stall_s`` for connecting and the first piece, for each further piece, and for the answer once all is sent.
"""

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs
import httpx
import trio

from comfyd.media.json_files import JsonFiles, Pieces
from comfyd.net import UrlPolicy, UrlRefused, check_url, open_body, open_client
from comfyd.net.guarded import ConnectFailed
from comfyd.webhooks.retry import parse_retry_after
from comfyd.webhooks.signature import Signer

PIECE_BYTES: Final = 3 * (1 << 16)
"""Of a file, for one piece: 256 KiB as base64. Silence is measured for each, so that 9 kB/s are fast enough."""
SMALL_BYTES: Final = 1 << 18
"""A body with so many bytes of files or fewer is read once and held: the thread hops for a picture would cost more."""
_ENCODED_PIECE_BYTES: Final = PIECE_BYTES // 3 * 4
_SIGNED_HERE_BYTES: Final = 1 << 20
"""HMAC does a gigabyte a second: what is larger is signed in a thread."""
_ANSWER_BYTES: Final = 4096
"""Read of an answer's body, so that its connection can serve again; nobody looks at it."""
_KEPT_CONNECTIONS: Final = 32
_KEPT_S: Final = 5.0  # for the next of many; longer, and the receiver closes it under us
_GONE: Final = 410
_STALE_ERRORS: Final = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
_NO_ANSWER: Final = "disconnected without sending a response"  # httpcore 1.0.9, _async/http11.py


@attrs.frozen
class Taken:
    """The receiver has it: it answered 2xx."""


@attrs.frozen(kw_only=True)
class Failed:
    """The receiver does not have it, as far as we know.

    *reason* is for logs and lists, without secrets. *answered*: it is there and said no; None: it was not asked.
    *final*: there is no use in another attempt.
    """

    reason: str
    retry_after_s: float | None = None
    answered: bool | None = False
    final: bool = False


Result = Taken | Failed


@attrs.define(eq=False, kw_only=True)
class Courier:
    """Makes attempts, over connections that are kept for a moment. Opened by :func:`open_courier`."""

    _client: httpx.AsyncClient
    _policy: UrlPolicy
    _secrets: tuple[bytes, ...] = attrs.field(repr=False)
    _stall_s: float

    async def deliver(self, url: str, webhook_id: str, body: JsonFiles) -> Result:
        """Make one attempt. User and password in *url* go as ``Authorization`` (httpx does that).

        Raises:
            FileChanged: a file of *body* is not what it was; the receiver got nothing, or a body that is cut off.
        """
        try:
            check_url(url, self._policy)
        except UrlRefused as exc:  # by its text alone: no name will ever resolve to something better
            return Failed(reason=f"its URL is refused: {exc.reason}", answered=None, final=True)
        whole = body.joined()
        if whole is None and body.to_read_bytes <= SMALL_BYTES:
            whole = await body.read_whole()
        if whole is not None:
            body = JsonFiles((whole,))
        signer = Signer(self._secrets, webhook_id, int(time.time()))
        if self._secrets:
            with body.open(PIECE_BYTES) as pieces:
                async for piece in pieces:
                    await _sign(signer, piece)
        headers = {"Content-Type": "application/json", "Content-Length": str(body.length), **signer.headers()}
        return await self._send(url, headers, body)

    async def _send(self, url: str, headers: dict[str, str], body: JsonFiles) -> Result:
        """Send *body*, again if a kept connection was closed by the receiver just when it was to be used.

        The receiver knows nothing of that one, so it is no attempt; there are no more such connections than are kept.
        """
        for _ in range(_KEPT_CONNECTIONS):
            attempt = _Attempt(url=url, headers=headers, body=body, stall_s=self._stall_s)
            try:
                return await attempt.make(self._client)
            except UrlRefused as exc:
                return Failed(reason=f"its URL is refused: {exc.reason}", answered=None)
            except httpx.TransportError as exc:
                if attempt.connected or not isinstance(exc, _STALE_ERRORS):
                    return Failed(reason=_reason(exc))
        return Failed(reason="the connection was lost")


@asynccontextmanager
async def open_courier(
    policy: UrlPolicy, secrets: Sequence[bytes], *, stall_s: float, at_once: int
) -> AsyncIterator[Courier]:
    """Open a courier for *at_once* attempts; its connections are closed when the block is left."""
    ssl_context = await trio.to_thread.run_sync(httpx.create_ssl_context)  # 40 ms: it reads all certificates
    limits = httpx.Limits(
        max_connections=at_once, max_keepalive_connections=_KEPT_CONNECTIONS, keepalive_expiry=_KEPT_S
    )
    async with open_client(policy, limits=limits, ssl_context=ssl_context) as client:
        yield Courier(client=client, policy=policy, secrets=tuple(secrets), stall_s=stall_s)


@attrs.define(eq=False, kw_only=True)
class _Attempt:
    """One request on its way. *connected*: it made a connection of its own."""

    url: str = attrs.field(repr=False)
    headers: dict[str, str]
    body: JsonFiles
    stall_s: float
    connected: bool = False

    async def make(self, client: httpx.AsyncClient) -> Result:
        silence = trio.CancelScope(deadline=trio.current_time() + self.stall_s)
        status: int | None = None
        retry_after: str | None = None
        with self.body.open(PIECE_BYTES) as pieces:
            stream = _Stream(pieces, silence, self.stall_s)
            request = client.build_request(
                "POST", self.url, headers=self.headers, extensions={"trace": self._note_connection}
            )
            request.stream = (
                stream  # given as content, httpx would put a generator around it, which a cancel leaves open
            )
            with silence:
                response = await client.send(request, stream=True)
                status, retry_after = response.status_code, response.headers.get("retry-after")
                try:
                    await _read_some(response)
                finally:
                    await response.aclose()
        if status is None:
            return Failed(reason=stream.silence_reason())
        if 200 <= status < 300:
            return Taken()
        if 300 <= status < 400:
            return Failed(reason=f"it redirects ({status}), which webhooks do not follow", answered=True)
        wait_s = parse_retry_after(retry_after, time.time())
        return Failed(reason=f"it answered {status}", retry_after_s=wait_s, answered=True, final=status == _GONE)

    async def _note_connection(self, name: str, _info: dict[str, Any]) -> None:
        self.connected = self.connected or name == "connection.connect_tcp.started"


class _Stream(httpx.AsyncByteStream):
    """The body as httpcore asks for it; each piece that is asked for proves that the one before went out."""

    def __init__(self, pieces: Pieces, silence: trio.CancelScope, stall_s: float) -> None:
        self._pieces = pieces
        self._silence = silence
        self._stall_s = stall_s
        self._piece = b""
        self._sent_of_piece = 0
        self._began = self._ended = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        self._began = True
        try:
            if self._sent_of_piece >= len(self._piece):
                self._silence.deadline = float("inf")  # reading is ours, and not the receiver's silence
                self._piece, self._sent_of_piece = await anext(self._pieces), 0
        except StopAsyncIteration:
            self._ended = True
            raise
        finally:
            self._silence.deadline = trio.current_time() + self._stall_s
        start = self._sent_of_piece
        self._sent_of_piece = min(start + _ENCODED_PIECE_BYTES, len(self._piece))
        if start == 0 and self._sent_of_piece == len(self._piece):
            return self._piece
        return self._piece[start : self._sent_of_piece]  # of a graph with a picture in it

    def silence_reason(self) -> str:
        """Say what did not happen in time."""
        if not self._began:
            return f"no connection within {self._stall_s:g} s"
        if not self._ended:
            return f"it took nothing more for {self._stall_s:g} s"
        return f"no answer within {self._stall_s:g} s"


async def _sign(signer: Signer, piece: bytes) -> None:
    if len(piece) <= _SIGNED_HERE_BYTES:
        signer.update(piece)
    else:
        await trio.to_thread.run_sync(signer.update, piece)


async def _read_some(response: httpx.Response) -> None:
    """Read an answer's body if it is short. However it ends, the status was said."""
    with contextlib.suppress(httpx.TransportError):
        async with open_body(response) as pieces:
            read_bytes = 0
            async for piece in pieces:
                read_bytes += len(piece)
                if read_bytes > _ANSWER_BYTES:
                    return


def _reason(error: httpx.TransportError) -> str:
    """Say what went wrong below HTTP; the receiver's own words are not repeated."""
    if isinstance(error, httpx.ConnectError):
        return error.__cause__.reason if isinstance(error.__cause__, ConnectFailed) else "no connection"
    if isinstance(error, httpx.RemoteProtocolError):
        if _NO_ANSWER in str(error):
            return "the connection was closed without an answer"
        return "the answer is not valid HTTP"
    return "the connection was lost"
