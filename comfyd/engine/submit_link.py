"""One kept-alive HTTP/1.1 connection, for the request that every job makes: ``POST /prompt``.

httpx does everything else towards the engine. On this one request it cost 1.2 ms of processor time, a quarter of what
a small job costs us (py-spy, 500 in flight), most of it in its pool, its redirects, its cookies and its models. h11 on
a Trio stream took 230 us of the 1,750 that a prompt costs us in all; a head that is written once and llhttp, which
parses in C, take 60. The runner submits one prompt at a time, so one connection is all there is.
"""

import select
from typing import Final

import attrs
import trio
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from comfyd.errors import EngineUnavailable

_READ_BYTES: Final = 64 * 1024
_MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""A refusal names every fault of every node; beyond this it is no answer of ComfyUI's."""


@attrs.frozen
class Answer:
    """A whole answer."""

    status: int
    body: bytes


class _BadAnswer(Exception):
    """What came is no answer."""


class _Parser:
    """Parses one answer; the methods are what llhttp calls. *answer* is set when it is whole."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.keep_alive = False
        self._body = bytearray()
        self._parser = HttpResponseParser(self)

    def feed(self, data: bytes | bytearray) -> None:
        """Take in what was received.

        Raises:
            _BadAnswer: this is no answer, or a larger one than there should be.
        """
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as exc:
            raise _BadAnswer(f"the engine's answer is not HTTP/1.1: {exc}") from exc
        if len(self._body) > _MAX_ANSWER_BYTES:
            raise _BadAnswer("the engine's answer is too large")

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._body += data

    def on_message_complete(self) -> None:
        """The end of the answer, or of one that announces it (100)."""
        status = self._parser.get_status_code()
        if status >= 200 and self.answer is None:
            self.answer = Answer(status, bytes(self._body))
            self.keep_alive = self._parser.should_keep_alive()


@attrs.define(eq=False)
class SubmitLink:
    """Posts JSON to one path of one server, one request at a time."""

    host: str
    port: int
    path: str
    _stream: trio.SocketStream | None = None
    _head: bytes = attrs.field(init=False)
    _busy: trio.Lock = attrs.field(factory=trio.Lock)
    _ended: bool = False

    def __attrs_post_init__(self) -> None:
        """Write what all requests have in common."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        fields = f"host: {host}:{self.port}\r\ncontent-type: application/json\r\ncontent-length: "
        self._head = f"POST {self.path} HTTP/1.1\r\n{fields}".encode("ascii")

    async def post(self, body: bytes) -> Answer:
        """Send *body* and receive the whole answer. A kept connection that the server has closed is opened anew.

        Raises:
            EngineUnavailable: no connection, or no answer of HTTP/1.1. What was sent may have been taken all the same.
        """
        try:
            self._busy.acquire_nowait()  # the usual case, without a turn of the scheduler
        except trio.WouldBlock:
            await self._busy.acquire()
        try:
            if self._ended:
                raise EngineUnavailable(f"POST {self.path}: the engine is gone")
            parser = _Parser()
            try:
                if self._stream is not None and _closed_by_peer(self._stream):
                    self.close()
                if self._stream is None:
                    self._stream = await trio.open_tcp_stream(self.host, self.port)
                answer = await self._exchange(self._stream, body, parser)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, _BadAnswer) as exc:
                self.close()
                raise EngineUnavailable(f"POST {self.path}: {str(exc) or type(exc).__name__}") from exc
            except BaseException:  # cancelled in the middle: what comes next on this connection is not ours
                self.close()
                raise
            if not parser.keep_alive:
                self.close()
            return answer
        finally:
            self._busy.release()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._stream is not None:
            self._stream.socket.close()
            self._stream = None

    def end(self) -> None:
        """Close for good: the engine has ended."""
        self._ended = True
        self.close()

    async def _exchange(self, stream: trio.SocketStream, body: bytes, parser: _Parser) -> Answer:
        await stream.send_all(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        while parser.answer is None:
            data = await stream.receive_some(_READ_BYTES)
            if not data:
                raise _BadAnswer("the engine closed the connection without an answer")
            parser.feed(data)
        return parser.answer


def _closed_by_peer(stream: trio.SocketStream) -> bool:
    """Whether the server has closed a connection that lay idle: there is something to read then, namely its end."""
    poll = select.poll()
    poll.register(stream.socket.fileno(), select.POLLIN)
    return bool(poll.poll(0))
