"""Reading Server-Sent Events, as far as comfyd sends them."""

from typing import Any

import attrs

from comfyd.wire import decode_json


@attrs.frozen
class ServerEvent:
    """One event: its name and its JSON data."""

    name: str
    data: Any


@attrs.define
class EventParser:
    """Turns the lines of a ``text/event-stream`` into events. Comments are passed over."""

    _name: str = "message"
    _data: str = ""

    def feed(self, line: str) -> ServerEvent | None:
        """Take in one line without its end; the event that it completes, if it does."""
        if line.startswith("event:"):
            self._name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            self._data += line.removeprefix("data:").strip()
        elif not line:
            name, data = self._name, self._data
            self._name, self._data = "message", ""
            if data:
                return ServerEvent(name, decode_json(data.encode()))
        return None
