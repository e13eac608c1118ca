"""A receiver of webhooks that takes everything at once and keeps nothing but counts. It prints its port.

One thread and an epoll, as what receives should take less of the machine than what sends.

- ``POST`` anything: counted, 204.
- ``GET /taken``: how many were taken, and when the last one was, by ``CLOCK_MONOTONIC``, as JSON.
"""

import json
import re
import select
import socket
import time
from typing import Final

import attrs

_HEAD_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"
_READ_BYTES: Final = 1 << 20


@attrs.define(eq=False)
class Sender:
    """A connection of somebody who sends one request after the other."""

    socket: socket.socket
    received: bytearray = attrs.field(factory=bytearray)

    def next_request(self) -> bytes | None:
        """Take the next whole request out of what was received; return its head."""
        end = self.received.find(_HEAD_END)
        if end < 0:
            return None
        head = bytes(self.received[: end + 2])
        end += len(_HEAD_END)
        if _CHUNKED.search(head):  # JSON of one line holds no such end of its own
            last = self.received.find(_LAST_CHUNK, end - 2)
            if last < 0:
                return None
            end = last + len(_LAST_CHUNK)
        elif length := _LENGTH.search(head):
            end += int(length[1])
            if len(self.received) < end:
                return None
        del self.received[:end]
        return head


@attrs.define(eq=False)
class Sink:
    """The server; *listener* is bound and listens."""

    listener: socket.socket
    taken: int = 0
    last_at: float = 0.0
    _senders: dict[int, Sender] = attrs.field(factory=dict)
    _poll: select.epoll = attrs.field(factory=select.epoll)

    def serve(self) -> None:
        """Serve until killed."""
        self._poll.register(self.listener, select.EPOLLIN)
        while True:
            for number, _ in self._poll.poll():
                if number == self.listener.fileno():
                    self._accept()
                else:
                    self._hear(number)

    def _accept(self) -> None:
        connected, _ = self.listener.accept()
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._senders[connected.fileno()] = Sender(connected)
        self._poll.register(connected, select.EPOLLIN)

    def _hear(self, number: int) -> None:
        sender = self._senders[number]
        try:
            data = sender.socket.recv(_READ_BYTES)
            sender.received += data
            while (head := sender.next_request()) is not None:
                sender.socket.sendall(self._answer(head))
        except OSError:
            data = b""
        if not data:
            self._poll.unregister(number)
            self._senders.pop(number).socket.close()

    def _answer(self, head: bytes) -> bytes:
        if head.startswith(b"GET "):
            body = json.dumps({"taken": self.taken, "last_at": self.last_at}).encode()
            return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
                len(body),
                body,
            )
        self.taken += 1
        self.last_at = time.perf_counter()
        return b"HTTP/1.1 204 No Content\r\n\r\n"


def main() -> None:
    """Serve on a free port until killed."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        print(listener.getsockname()[1], flush=True)
        Sink(listener).serve()


if __name__ == "__main__":
    main()
