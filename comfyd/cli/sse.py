"""Reading Server-Sent Events, as far as comfyd sends them."""

from collections.abc import Iterator
from typing import Any, Final

import attrs

from comfyd.wire import decode_json

MAX_LINE_BYTES: Final = 64 * 1024 * 1024
"""Of one line. The longest is a result: some 200 bytes for each of a job's outputs, and for each of its nodes."""


class BadEventStream(Exception):
    """What came is no event stream of comfyd's."""


@attrs.frozen
class ServerEvent:
    """One event: its name and its JSON data."""

    name: str
    data: Any


@attrs.define
class EventParser:
    """Turns a ``text/event-stream`` into events, from its bytes or its lines. Comments are passed over.

    A client whose stream broke off comes back after :attr:`retry_s`, and says :attr:`last_id` in ``Last-Event-ID``.
    """

    last_id: str = ""
    """Of the last event that had one."""
    retry_s: float = 2.0
    _id: str = ""
    _name: str = "message"
    _data: str = ""
    _rest: bytearray = attrs.field(factory=bytearray)

    def begin(self) -> None:
        """Start on a new connection: what the old one left incomplete was not received."""
        self._id, self._name, self._data = self.last_id, "message", ""
        self._rest.clear()

    def feed_bytes(self, data: bytes) -> Iterator[ServerEvent]:
        """Take in what arrived, and give the events that it completes.

        Lines are cut at newlines only: texts in the data may hold any other character that Python takes for the end of
        a line (U+2028 in a node's title).

        Raises:
            BadEventStream: a line has no end, or is not UTF-8.
        """
        *lines, rest = data.split(b"\n")
        for line in lines:
            whole = bytes(self._rest + line).removesuffix(b"\r")
            self._rest.clear()
            try:
                event = self.feed(whole.decode())
            except UnicodeDecodeError as exc:
                raise BadEventStream("the event stream is not UTF-8") from exc
            if event is not None:
                yield event
        self._rest += rest
        if len(self._rest) > MAX_LINE_BYTES:
            raise BadEventStream(f"an event has a line of more than {MAX_LINE_BYTES} bytes")

    def feed(self, line: str) -> ServerEvent | None:
        """Take in one line without its end; the event that it completes, if it does."""
        if line.startswith("event:"):
            self._name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            self._data += line.removeprefix("data:").strip()
        elif line.startswith("id:"):
            self._id = line.removeprefix("id:").strip()
        elif line.startswith("retry:"):
            milliseconds = line.removeprefix("retry:").strip()
            if milliseconds.isascii() and milliseconds.isdecimal():
                self.retry_s = int(milliseconds) / 1000
        elif not line:
            self.last_id = self._id  # only now: an event that was cut off was not received
            name, data = self._name, self._data
            self._name, self._data = "message", ""
            if data:
                return ServerEvent(name, decode_json(data.encode()))
        return None
