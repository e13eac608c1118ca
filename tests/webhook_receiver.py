"""A real HTTP receiver of webhooks on loopback that does what a test tells it to, and keeps what it was sent.

It takes many connections and keeps them alive; bodies may be chunked and of any size. What it answers is a
:class:`Reply` for each request: a status after a delay or at a word of the test, nothing ever, a cut connection.
"""

import contextlib
import hashlib
import json
import socket
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from enum import Enum
from typing import Any

import attrs
import h11
import trio


class Cut(Enum):
    """Where a connection ends without an answer."""

    AT_HEAD = "reset once the head is here, the body unread"
    AT_BODY = "closed once the body is here, before any answer"
    IN_ANSWER = "closed in the middle of the answer's head"


@attrs.frozen(kw_only=True)
class Reply:
    """What one request is answered.

    *delay_s* passes, and *hold* is waited for, before the answer. *never*: nothing is said until the client hangs up.
    *early*: the answer leaves when the head is here, and the body is not read. *endless*: a body without an end.
    """

    status: int = 200
    headers: Mapping[str, str] = attrs.field(factory=dict)
    body: bytes = b""
    delay_s: float = 0.0
    hold: trio.Event | None = None
    never: bool = False
    early: bool = False
    endless: bool = False
    cut: Cut | None = None


@attrs.define(eq=False, kw_only=True)
class Received:
    """One request. *headers* have lower-case names; *at* is trio's clock when the head was here.

    *body* is what was read, at most the receiver's ``keep_bytes``; *size_bytes* and *sha256* are of all of it.
    *complete* once the body ended. *connection* counts connections from 0.
    """

    connection: int
    at: float
    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""
    size_bytes: int = 0
    sha256: str = ""
    complete: bool = False
    status: int | None = None  # what it was answered, once it was

    @property
    def path(self) -> str:
        """The path without the query."""
        return self.target.partition("?")[0]

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


Answer = Reply | Callable[[Received], Reply]
"""A reply, or what chooses one when the body is here (so it cannot be *early*, nor cut at the head)."""

OK = Reply()


@attrs.define(eq=False)
class WebhookReceiver:
    """What :func:`webhook_receiver` started.

    *begun* has every request whose head came, in that order; *received* those whose body came as well, in the order in
    which their bodies ended. *default* answers what :meth:`script` does not.
    """

    port: int
    scheme: str
    keep_bytes: int
    _nursery: trio.Nursery
    _tls: ssl.SSLContext | None
    default: Answer = OK
    begun: list[Received] = attrs.field(factory=list)
    received: list[Received] = attrs.field(factory=list)
    connections: int = 0
    open_connections: int = 0
    _scripts: dict[str | None, deque[Answer]] = attrs.field(factory=dict)
    _changed: trio.Event = attrs.field(factory=trio.Event)
    _up: trio.CancelScope | None = None

    def url(self, path: str = "/hook", *, user_info: str = "") -> str:
        """The URL of *path*, with ``user:password`` if wanted."""
        return f"{self.scheme}://{user_info and user_info + '@'}127.0.0.1:{self.port}{path}"

    def script(self, *answers: Answer, path: str | None = None) -> None:
        """Answer the next requests by *answers*, one each, in order of arrival; of *path* only, or whatever the path.

        What was scripted for a request's own path comes first.
        """
        self._scripts.setdefault(path, deque()).extend(answers)

    @property
    def script_left(self) -> int:
        """How many scripted answers nobody has asked for yet."""
        return sum(len(answers) for answers in self._scripts.values())

    async def wait_until(self, true: Callable[[], bool]) -> None:
        """Return once *true*, which is asked whenever something changed here."""
        while not true():
            self._changed = trio.Event() if self._changed.is_set() else self._changed
            await self._changed.wait()

    async def wait_received(self, number: int) -> list[Received]:
        """Return once *number* whole requests are here; gives all that are."""
        await self.wait_until(lambda: len(self.received) >= number)
        return self.received

    async def wait_begun(self, number: int) -> list[Received]:
        """Return once the heads of *number* requests are here; gives all that are."""
        await self.wait_until(lambda: len(self.begun) >= number)
        return self.begun

    async def go_up(self) -> None:
        """Listen (again), at the same port."""
        assert self._up is None
        listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")  # connections are taken from here on
        self._up = trio.CancelScope()
        self._nursery.start_soon(self._listen, listeners, self._up)

    async def go_down(self) -> None:
        """Close all connections and refuse new ones until :meth:`go_up`; the port stays ours."""
        assert self._up is not None
        self._up.cancel("the receiver goes down")
        await self.wait_until(lambda: self._up is None)

    async def _listen(self, listeners: list[trio.SocketListener], scope: trio.CancelScope) -> None:
        try:
            with scope:
                await trio.serve_listeners(self._serve, listeners)
        finally:
            self._up = None
            self._tell()

    async def _serve(self, stream: trio.SocketStream) -> None:
        number = self.connections
        self.connections += 1
        self.open_connections += 1
        wire: trio.abc.Stream = stream
        if self._tls is not None:
            wire = trio.SSLStream(stream, self._tls, server_side=True, https_compatible=True)
        try:
            connection = h11.Connection(h11.SERVER)
            while await self._serve_one(number, connection, stream, wire):
                connection.start_next_cycle()
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            pass  # the client hung up, or gave up in the middle of a body, which is what many tests are about
        finally:
            self.open_connections -= 1
            self._tell()
            await trio.aclose_forcefully(wire)

    async def _serve_one(
        self, number: int, connection: h11.Connection, stream: trio.SocketStream, wire: trio.abc.Stream
    ) -> bool:
        """Answer one request; say whether the connection can take another."""
        head = await _next_event(connection, wire)
        if not isinstance(head, h11.Request):
            return False
        received = Received(
            connection=number,
            at=trio.current_time(),
            method=head.method.decode(),
            target=head.target.decode(),
            headers={name.decode(): value.decode("latin-1") for name, value in head.headers},
        )
        answer = self._next_answer(received.path)
        self.begun.append(received)
        self._tell()
        reply = answer if isinstance(answer, Reply) else None
        if reply is not None and reply.cut is Cut.AT_HEAD:
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if reply is None or not reply.early:
            await self._read_body(received, connection, wire)
        if not isinstance(answer, Reply):
            reply = answer(received)
            assert not reply.early, "chosen when the body was read already"
            assert reply.cut is not Cut.AT_HEAD, "chosen when the body was read already"
        assert reply is not None
        return await self._answer(reply, received, connection, wire)

    def _next_answer(self, path: str) -> Answer:
        for scripted in (self._scripts.get(path), self._scripts.get(None)):
            if scripted:
                return scripted.popleft()
        return self.default

    async def _read_body(self, received: Received, connection: h11.Connection, wire: trio.abc.Stream) -> None:
        digest, kept = hashlib.sha256(), bytearray()
        while isinstance(event := await _next_event(connection, wire), h11.Data):
            digest.update(event.data)
            received.size_bytes += len(event.data)
            kept += event.data[: self.keep_bytes - len(kept)]
        if not isinstance(event, h11.EndOfMessage):
            raise h11.RemoteProtocolError("the client left in the middle of its body")
        received.body, received.sha256, received.complete = bytes(kept), digest.hexdigest(), True
        self.received.append(received)
        self._tell()

    async def _answer(
        self, reply: Reply, received: Received, connection: h11.Connection, wire: trio.abc.Stream
    ) -> bool:
        if reply.delay_s:
            await trio.sleep(reply.delay_s)
        if reply.hold is not None:
            await reply.hold.wait()
        if reply.never:
            while await wire.receive_some(65536):
                pass
            return False
        if reply.cut is Cut.AT_BODY:
            return False
        if reply.cut is Cut.IN_ANSWER:
            await wire.send_all(b"HTTP/1.1 200 OK\r\nContent-Le")
            return False
        headers = [(name.encode(), value.encode("latin-1")) for name, value in reply.headers.items()]
        if not reply.endless:
            headers.append((b"content-length", str(len(reply.body)).encode()))
        answer = connection.send(h11.Response(status_code=reply.status, headers=headers)) or b""
        if reply.endless:
            await wire.send_all(answer)
            received.status = reply.status
            self._tell()
            while True:
                await wire.send_all(connection.send(h11.Data(data=bytes(65536))) or b"")
        answer += connection.send(h11.Data(data=reply.body)) or b""
        answer += connection.send(h11.EndOfMessage()) or b""
        await wire.send_all(answer)
        received.status = reply.status
        self._tell()
        if reply.early:  # closing now would reset what the client has not read yet (RFC 9112, 9.6)
            if self._tls is None:
                await wire.send_eof()  # type: ignore[attr-defined]  # a SocketStream without TLS
            while await wire.receive_some(65536):
                pass
            return False
        return connection.our_state is h11.DONE and connection.their_state is h11.DONE

    def _tell(self) -> None:
        self._changed.set()


async def _next_event(connection: h11.Connection, wire: trio.abc.Stream) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        if connection.they_are_waiting_for_100_continue:
            await wire.send_all(connection.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        connection.receive_data(bytes(await wire.receive_some(65536)))
    return event


@asynccontextmanager
async def webhook_receiver(
    default: Answer = OK, *, up: bool = True, tls: ssl.SSLContext | None = None, keep_bytes: int = 64 * 1024 * 1024
) -> AsyncIterator[WebhookReceiver]:
    """Receive webhooks until the block is left. With *up* false it refuses connections until ``go_up()``."""
    # Bound and not listening: nobody else gets the port while the receiver is down (not even the client itself, whose
    # own port it could become), and a connection to it is refused.
    with contextlib.closing(socket.socket()) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        async with trio.open_nursery() as nursery:
            receiver = WebhookReceiver(
                port=holder.getsockname()[1],
                scheme="https" if tls else "http",
                keep_bytes=keep_bytes,
                nursery=nursery,
                tls=tls,
                default=default,
            )
            if up:
                await receiver.go_up()
            yield receiver
            nursery.cancel_scope.cancel("the test is over")
