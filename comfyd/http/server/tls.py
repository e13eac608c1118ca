"""TLS as a translator between bytes and bytes, and the bound on handshakes.

Not ``trio.SSLStream``: it may be cut short in the middle of a write by a cancellation, and is broken from then on,
while ``transport`` promises that a writer may be cancelled at any time; and it costs a lock and a checkpoint more for
each read and write. Here nothing waits. What was encrypted is queued by the transport like any other bytes.
"""

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import structlog

log = structlog.get_logger("comfyd.http")

#: What a TLS record may hold (RFC 8446, section 5.1): more than one of them is never returned by one read.
RECORD_BYTES: Final = 16 * 1024
#: Answers that a client can provoke without asking anything (to key updates, to renegotiation) leave with our next
#: bytes. One that provokes more than this before we have any to send is up to no good.
MAX_UNASKED_BYTES: Final = 64 * 1024
#: An answer to who speaks plain HTTP to this port, which is what people do by mistake.
NOT_HTTPS: Final = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/problem+json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s"
)
_NOT_HTTPS_BODY: Final = (
    b'{"type":"about:blank","title":"Bad Request","status":400,"detail":"this port speaks HTTPS, not plain HTTP"}'
)


class HandshakeFailed(Exception):
    """There will be no TLS with this client.

    *malformed*: it sent something that is no handshake. *last_words* are bytes to send before the close.
    """

    def __init__(self, reason: str, *, malformed: bool = False, last_words: bytes = b"") -> None:
        super().__init__(reason)
        self.malformed = malformed
        self.last_words = last_words


class TlsLayer:
    """The server's side of one TLS connection, without the connection."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._ended = False
        self._midway = False

    def shake_hands(self, data: bytes) -> bool:
        """Take bytes of the client's; whether the handshake is done. :meth:`take` holds what is to be sent to it.

        Raises:
            HandshakeFailed: it failed.
        """
        self._incoming.write(data)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as exc:
            last_words = self.take()
            if exc.reason == "HTTP_REQUEST":
                last_words = NOT_HTTPS % (len(_NOT_HTTPS_BODY), _NOT_HTTPS_BODY)
            raise HandshakeFailed(_reason(exc), malformed=True, last_words=last_words) from exc
        return True

    @property
    def ready(self) -> bool:
        """Whether :meth:`open` has something to say without new bytes: what came right behind the handshake."""
        return self._ended or bool(self._incoming.pending)

    @property
    def holds_bytes(self) -> bool:
        """Whether the client has sent something that nobody has seen yet, be it a part of a record."""
        return self._midway or self.ready

    def open(self, data: bytes) -> bytes | None:
        """Decrypt *data*. ``b""`` is the end of the client's side, None that no record is whole yet.

        An end without TLS's own farewell counts as one with it: many clients omit it, and HTTP tells by itself whether
        a request is whole.
        """
        self._incoming.write(data)
        pieces: list[bytes] = []
        try:
            while not self._ended:
                piece = self._object.read(RECORD_BYTES)
                if piece:
                    pieces.append(piece)
                else:
                    self._ended = True
        except ssl.SSLWantReadError:
            pass  # all whole records were read
        except ssl.SSLError as exc:
            if not isinstance(exc, ssl.SSLZeroReturnError):
                log.info("http.tls_malformed", reason=_reason(exc))
            self._ended = True
        if self._outgoing.pending > MAX_UNASKED_BYTES:
            log.info("http.tls_malformed", reason="too many questions of TLS itself")
            self._ended = True
        self._midway = not pieces and not self._ended
        if pieces:
            return b"".join(pieces)
        return b"" if self._ended else None

    def seal(self, data: memoryview) -> bytes:
        """Encrypt *data*, behind whatever TLS itself has to say.

        Raises:
            ssl.SSLError: the client has broken the connection already.
        """
        while data:
            data = data[self._object.write(data) :]
        return self.take()

    def farewell(self) -> bytes:
        """What tells the client that nothing follows, and that nothing was cut off; to be sent last."""
        with suppress(ssl.SSLError):  # it wants the client's own farewell, for which nobody waits, or has lost it
            self._object.unwrap()
        return self.take()

    def take(self) -> bytes:
        """What is to be sent now."""
        return self._outgoing.read()


def _reason(exc: ssl.SSLError) -> str:
    """OpenSSL's own words, such as "wrong version number"."""
    return (exc.reason or str(exc)).lower().replace("_", " ")


class Handshakes:
    """Those under way, bounded: whoever connects and says nothing must not keep others out.

    The oldest gives way to the newest. An honest client needs two round trips; to be overtaken by so many others
    meanwhile takes more newcomers than one core can sign for.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._under_way: dict[int, Callable[[], None]] = {}  # in the order of their beginning
        self._count = 0

    @contextmanager
    def one_more(self, cut: Callable[[], None]) -> Iterator[None]:
        """Have one under way in this block; *cut* must end it at once when it is called."""
        if len(self._under_way) >= self._most:
            oldest = next(iter(self._under_way))
            log.info("http.handshake_overtaken", under_way=len(self._under_way))
            self._under_way.pop(oldest)()
        self._count = number = self._count + 1
        self._under_way[number] = cut
        try:
            yield
        finally:
            self._under_way.pop(number, None)
