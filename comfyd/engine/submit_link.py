"""One kept-alive HTTP/1.1 connection, for the request that every job makes: ``POST /prompt``.

httpx does everything else towards the engine. On this one request it cost 1.2 ms of processor time, a quarter of what
a small job costs us (py-spy, 500 in flight), most of it in its pool, its redirects, its cookies and its models; h11 on
a Trio stream needs a fraction of that. The runner submits one prompt at a time, so one connection is all there is.
"""

import select
from typing import Final

import attrs
import h11
import trio

from comfyd.errors import EngineUnavailable

_READ_BYTES: Final = 64 * 1024
_MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""A refusal names every fault of every node; beyond this it is no answer of ComfyUI's."""


@attrs.frozen
class Answer:
    """A whole answer."""

    status: int
    body: bytes


@attrs.define(eq=False)
class SubmitLink:
    """Posts JSON to one path of one server, one request at a time."""

    host: str
    port: int
    path: str
    _stream: trio.SocketStream | None = None
    _h11: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.CLIENT))
    _busy: trio.Lock = attrs.field(factory=trio.Lock)
    _ended: bool = False

    async def post(self, body: bytes) -> Answer:
        """Send *body* and receive the whole answer. A kept connection that the server has closed is opened anew.

        Raises:
            EngineUnavailable: no connection, or no answer of HTTP/1.1. What was sent may have been taken all the same.
        """
        async with self._busy:
            if self._ended:
                raise EngineUnavailable(f"POST {self.path}: the engine is gone")
            try:
                if self._stream is not None and _closed_by_peer(self._stream):
                    self.close()
                if self._stream is None:
                    self._stream = await trio.open_tcp_stream(self.host, self.port)
                    self._h11 = h11.Connection(h11.CLIENT)
                answer = await self._exchange(self._stream, body)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError) as exc:
                self.close()
                raise EngineUnavailable(f"POST {self.path}: {str(exc) or type(exc).__name__}") from exc
            except BaseException:  # cancelled in the middle: what comes next on this connection is not ours
                self.close()
                raise
            if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
                self._h11.start_next_cycle()
            else:
                self.close()
            return answer

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._stream is not None:
            self._stream.socket.close()
            self._stream = None

    def end(self) -> None:
        """Close for good: the engine has ended."""
        self._ended = True
        self.close()

    async def _exchange(self, stream: trio.SocketStream, body: bytes) -> Answer:
        head = self._h11.send(
            h11.Request(
                method="POST",
                target=self.path,
                headers=[
                    ("host", f"{self.host}:{self.port}"),
                    ("content-type", "application/json"),
                    ("content-length", str(len(body))),
                ],
            )
        )
        data = self._h11.send(h11.Data(data=body))
        self._h11.send(h11.EndOfMessage())
        await stream.send_all((head or b"") + (data or b""))
        status = 0
        received = bytearray()
        while True:
            event = self._h11.next_event()
            if event is h11.NEED_DATA:
                self._h11.receive_data(await stream.receive_some(_READ_BYTES))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                received += event.data
                if len(received) > _MAX_ANSWER_BYTES:
                    raise h11.RemoteProtocolError("the answer is too large")
            elif isinstance(event, h11.EndOfMessage):
                return Answer(status, bytes(received))
            elif isinstance(event, h11.ConnectionClosed):
                raise h11.RemoteProtocolError("the engine closed the connection without an answer")


def _closed_by_peer(stream: trio.SocketStream) -> bool:
    """Whether the server has closed a connection that lay idle: there is something to read then, namely its end."""
    poll = select.poll()
    poll.register(stream.socket.fileno(), select.POLLIN)
    return bool(poll.poll(0))
