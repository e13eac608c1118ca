"""The bytes of one connection: every wait has an end, and a cut ends all of them at once."""

import select
import ssl
from collections import deque
from math import inf

import structlog
import trio

from comfyd.http.server.tls import HandshakeFailed, TlsLayer

log = structlog.get_logger("comfyd.http")

RECEIVE_BYTES = 64 * 1024
#: What is worth copying to save a system call.
PIECE_BYTES = 64 * 1024
#: How many messages may wait whose senders were cancelled.
MAX_ABANDONED_PIECES = 1000


class Transport:
    """A socket with one reader and any number of writers.

    It uses the socket, not the stream above it: a third less work per read and write, and a ``send`` that can be
    cancelled without doubt about what was sent.

    Bytes leave in the order in which they were queued, whoever writes them. A writer may be cancelled at any moment:
    what it could not write stays queued for the next one, so that no message is ever cut in two. Trio's ``send_all``
    cannot promise that, which is why Hypercorn shields it, and so hangs on a client that stopped reading.

    After :meth:`secure` what is read is decrypted and what is written encrypted, PIECE_BYTES at a time.
    """

    def __init__(self, stream: trio.SocketStream, send_timeout_s: float) -> None:
        self.stream = stream
        self.gone = False
        self._send_timeout_s = send_timeout_s
        self._writing = trio.Lock()
        self._unsent: deque[bytes | memoryview] = deque()
        self._tls: TlsLayer | None = None
        self._sealed: bytes | memoryview = b""  # what was encrypted and is not written yet; it goes before _unsent
        self._reading: trio.CancelScope | None = None
        self._woken = False

    @property
    def secured(self) -> bool:
        """Whether TLS is spoken."""
        return self._tls is not None

    async def secure(self, tls: TlsLayer, deadline: float) -> None:
        """Do the handshake. To be called before anything is read or written.

        Raises:
            HandshakeFailed: it failed, or the client left.
            trio.TooSlowError: it was not done by *deadline*.
        """
        done = False
        with trio.fail_at(deadline):
            while not done:
                try:
                    data = await self.stream.socket.recv(RECEIVE_BYTES)
                except (OSError, trio.ClosedResourceError):  # reset by the client, or cut by us
                    data = b""
                if not data:
                    raise HandshakeFailed("the connection was closed")
                done = tls.shake_hands(data)
                self.hold(tls.take())
                await self.flush()
        self._tls = tls

    def hold(self, *pieces: bytes) -> None:
        """Queue *pieces* for the next flush.

        The queue is bounded by its writers, each of which waits in flush() until its own bytes are out; an app that
        gives up waiting again and again, as the client does not read, loses the client.
        """
        self._unsent.extend(piece for piece in pieces if piece)
        if len(self._unsent) > MAX_ABANDONED_PIECES:
            log.info("http.client_stalled", abandoned_pieces=len(self._unsent))
            self.cut()

    async def flush(self) -> None:
        """Write what is queued; always a checkpoint. Nothing is raised if the client left: see ``gone``."""
        if self.gone or not self.unsent:
            self._unsent.clear()
            await trio.lowlevel.checkpoint()
            return
        try:
            self._writing.acquire_nowait()  # the usual case, without a turn of the scheduler
        except trio.WouldBlock:
            await self._writing.acquire()
        try:
            while (self._unsent or self._sealed) and not self.gone:
                await self._write_some()
        finally:
            self._writing.release()

    async def _write_some(self) -> None:
        """One write of the first piece; a piece leaves the queue as far as it was written."""
        if not self._sealed:
            self._join_small_pieces()
            if self._tls is not None and not self._seal(self._tls):
                return
        view = memoryview(self._sealed or self._unsent[0])
        sent = 0
        with trio.CancelScope(deadline=trio.current_time() + self._send_timeout_s) as patience:
            try:
                sent = await self.stream.socket.send(view)
            except (OSError, trio.ClosedResourceError):
                self.cut()
        if patience.cancelled_caught:
            log.info("http.client_stalled", waited_s=self._send_timeout_s)
            self.cut()
        elif not sent or self.gone:
            return
        elif self._sealed:
            self._sealed = view[sent:]
        else:
            self._unsent.popleft()
            if sent < len(view):
                self._unsent.appendleft(view[sent:])

    def _seal(self, tls: TlsLayer) -> bool:
        """Encrypt the next PIECE_BYTES; False if the client has broken TLS. Nothing can come between: nothing waits."""
        piece = memoryview(self._unsent.popleft())
        if len(piece) > PIECE_BYTES:
            self._unsent.appendleft(piece[PIECE_BYTES:])
        try:
            self._sealed = tls.seal(piece[:PIECE_BYTES])
        except ssl.SSLError:  # its fault was logged when it was read
            self.cut()
            return False
        return True

    def _join_small_pieces(self) -> None:
        """Put a header and a short body together, so that they leave in one packet."""
        joined: list[bytes | memoryview] = []
        size = 0
        while self._unsent and size + len(self._unsent[0]) <= PIECE_BYTES:
            joined.append(self._unsent.popleft())
            size += len(joined[-1])
        if joined:
            self._unsent.appendleft(joined[0] if len(joined) == 1 else b"".join(joined))

    @property
    def unsent(self) -> bool:
        """Whether a flush would write something."""
        return bool(self._unsent or self._sealed)

    def readable(self) -> bool:
        """Whether the kernel, or TLS, holds bytes (or the end) that were not received yet."""
        if self._tls is not None and self._tls.holds_bytes:
            return True
        poll = select.poll()
        poll.register(self.stream.socket.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def receive(self, deadline: float) -> bytes | None:
        """Wait for bytes. ``b""`` is the end of the client's side, None means :meth:`wake` was called.

        Raises:
            trio.TooSlowError: nothing came until *deadline*.
        """
        return await self._wait(deadline, read=True)

    async def wait_woken(self, deadline: float) -> None:
        """Leave the socket alone until :meth:`wake` is called.

        Raises:
            trio.TooSlowError: it was not called until *deadline*.
        """
        await self._wait(deadline, read=False)

    async def _wait(self, deadline: float, *, read: bool) -> bytes | None:
        data: bytes | None = None
        if not self._woken:
            with trio.CancelScope(deadline=deadline) as self._reading:
                try:
                    if read:
                        data = await self._receive_some()
                    else:
                        await trio.sleep_forever()
                except (OSError, trio.ClosedResourceError):
                    data = b""  # reset by the client, or cut by us: the end in either case
            timed_out = self._reading.cancelled_caught and not self._woken
            self._reading = None
            if timed_out:
                raise trio.TooSlowError
        self._woken = False
        return data

    async def _receive_some(self) -> bytes:
        if self._tls is None:
            return await self.stream.socket.recv(RECEIVE_BYTES)
        plain = self._tls.open(b"") if self._tls.ready else None
        while plain is None:
            data = await self.stream.socket.recv(RECEIVE_BYTES)
            plain = self._tls.open(data) if data else b""
        return plain

    def wake(self) -> None:
        """End the wait of the reader, or its next one, without losing bytes."""
        self._woken = True
        if self._reading is not None:
            self._reading.cancel("the state of the connection changed")

    def read_until(self, deadline: float) -> None:
        """Give the reader, if it waits just now, another deadline."""
        if self._reading is not None:
            self._reading.deadline = deadline

    async def linger(self, linger_s: float) -> None:
        """Say that we are done and drop what still comes, until the client closes too.

        To close with unread bytes would reset the connection, and a reset makes the client's kernel throw away an
        answer that was not read yet (RFC 9112, section 9.6).
        """
        await self.say_farewell(linger_s)
        try:
            await self.stream.send_eof()
            with trio.move_on_after(linger_s):
                while await self.stream.receive_some(RECEIVE_BYTES):
                    pass
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            return  # nobody is left to be polite to, or a stalled writer keeps the socket: it will be closed anyway

    async def say_farewell(self, patience_s: float) -> None:
        """Tell a TLS client that all was said: without it, one that reads to the close takes it for an attack."""
        if self._tls is None:
            return
        with trio.move_on_after(patience_s):
            await self.flush()
            if not self.unsent and not self.gone:
                self._sealed = self._tls.farewell()
                await self.flush()

    def cut(self) -> None:
        """Close the socket now and wake everyone who waits on it. Does not wait; may be called twice."""
        self.gone = True
        self._unsent.clear()
        self._sealed = b""
        self.stream.socket.close()
        self.wake()


NEVER = inf
