"""HTTP/1.1 and websocket clients on plain sockets, so cheap that they do not dominate what they measure.

They speak to servers of this machine that we know: answers have a ``content-length``, frames are whole.
"""

import os
import re
import socket
from base64 import b64encode
from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

import attrs

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_HEAD_END: Final = b"\r\n\r\n"
_KEPT_BYTES: Final = 1 << 20
"""Of a body; what is longer is counted and thrown away."""
_READ_BYTES: Final = 1 << 20


class BadAnswer(Exception):
    """A server did not answer as it should; what was measured means nothing."""


def address_of(url: str) -> tuple[str, int]:
    """Return host and port of *url*."""
    parts = urlsplit(url)
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"{url} has no host or no port")
    return parts.hostname, parts.port


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """Write a request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: benchmark\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@attrs.frozen(kw_only=True)
class Answer:
    """A whole answer. *body* is empty if it is longer than 1 MiB; *body_bytes* is its length in any case."""

    status: int
    body: bytes
    body_bytes: int


@attrs.define(eq=False)
class HttpConnection:
    """A connection that is used again for request after request, one at a time."""

    socket: socket.socket
    _received: bytearray = attrs.field(factory=bytearray)
    _status: int = 0
    _body_bytes: int = 0
    _left: int = -1
    """Bytes of the body that have not arrived; -1: its head has not."""

    @classmethod
    def open(cls, url: str) -> "HttpConnection":
        """Connect."""
        connected = socket.create_connection(address_of(url), timeout=120)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(connected)

    def send(self, data: bytes) -> None:
        """Send a request."""
        self.socket.sendall(data)

    def receive(self) -> Answer | None:
        """Receive once; return the answer if that was the end of it."""
        data = self.socket.recv(_READ_BYTES)
        if not data:
            raise BadAnswer("the server closed the connection")
        if self._left < 0:
            self._received += data
            end = self._received.find(_HEAD_END)
            if end < 0:
                return None
            self._read_head(end)
        else:
            self._left -= len(data)
            if self._body_bytes <= _KEPT_BYTES:
                self._received += data
        if self._left > 0:
            return None
        answer = Answer(status=self._status, body=bytes(self._received), body_bytes=self._body_bytes)
        self._received.clear()
        self._left = -1
        return answer

    @property
    def answer_begun(self) -> bool:
        """Whether the head of an answer has arrived, and not all of its body."""
        return self._left >= 0

    def ask(self, data: bytes) -> Answer:
        """Send a request and wait for its answer."""
        self.send(data)
        while True:
            answer = self.receive()
            if answer is not None:
                return answer

    def _read_head(self, end: int) -> None:
        head = bytes(self._received[: end + 2])
        length = _LENGTH.search(head)
        if length is None or not head.startswith(b"HTTP/1."):  # connecting to a free port can reach oneself
            raise BadAnswer(f"no answer with a length: {head[:200]!r}")
        self._status = int(head[9:12])
        self._body_bytes = int(length[1])
        del self._received[: end + len(_HEAD_END)]
        self._left = self._body_bytes - len(self._received)
        if self._body_bytes > _KEPT_BYTES:
            self._received.clear()


def ask_once(url: str, data: bytes) -> Answer:
    """Send one request over a connection of its own, and wait for its answer."""
    connection = HttpConnection.open(url)
    with connection.socket:
        return connection.ask(data)


@attrs.define(eq=False)
class WebSocket:
    """The client end of a websocket that sends one message and then only listens."""

    socket: socket.socket
    _received: bytearray = attrs.field(factory=bytearray)

    @classmethod
    def open(cls, url: str, path: str, first_message: bytes) -> "WebSocket":
        """Connect and send a message of at most 125 bytes."""
        connected = socket.create_connection(address_of(url), timeout=120)
        key = b64encode(os.urandom(16)).decode()
        connected.sendall(
            f"GET {path} HTTP/1.1\r\nHost: benchmark\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        received = bytearray()
        while _HEAD_END not in received:
            data = connected.recv(_READ_BYTES)
            if not data:
                raise BadAnswer("the server refused a websocket")
            received += data
        if not received.startswith(b"HTTP/1.1 101"):
            raise BadAnswer(f"no websocket: {bytes(received[:200])!r}")
        del received[: received.find(_HEAD_END) + len(_HEAD_END)]
        # A client's frames are masked; four zero bytes are a mask that changes nothing.
        connected.sendall(bytes([0x81, 0x80 | len(first_message), 0, 0, 0, 0]) + first_message)
        return cls(connected, received)

    def receive(self) -> Iterator[bytes]:
        """Receive once; yield the text messages that are whole."""
        yield from self._frames()  # what came with the handshake
        data = self.socket.recv(_READ_BYTES)
        if not data:
            raise BadAnswer("the server closed the websocket")
        self._received += data
        yield from self._frames()

    def _frames(self) -> Iterator[bytes]:
        received = self._received
        while len(received) >= 2:
            length, start = received[1] & 0x7F, 2
            if length == 126:
                length, start = int.from_bytes(received[2:4], "big"), 4
            elif length == 127:
                length, start = int.from_bytes(received[2:10], "big"), 10
            if len(received) < start + length:
                return
            text, frame = received[0] == 0x81, bytes(received[start : start + length])
            del received[: start + length]
            if text:
                yield frame
