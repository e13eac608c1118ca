"""The events that wait for their receiver: in order, bounded, and of progress only what is still news.

What leaves the queue is always a part of what went in, in the same order and unchanged; only whole events are left
out. Progress is left out when it is outdated: a newer one of the same kind, job and node is appended at the end and
the older one goes, unless an event of another kind of that job (a state change) lies between. So at each state change
the receiver knows exactly the progress that it would know without coalescing, and between two of them the last one.
Putting the newer in the older one's place would be wrong: it would overtake what happened between them.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

import attrs

MAX_EVENTS: Final = 10_000
"""About 400 jobs' state changes of a graph of 10 nodes (ComfyUI sends 2 to 3 for a node): a receiver that is restarted
misses nothing, and the contract names the number."""

MAX_BYTES: Final = 64 * 1024 * 1024
"""Of bodies. ``progress_state`` and ``executed`` grow with the graph (20 kB for 100 nodes): a count alone bounds no
memory, and 10,000 events of the usual size (300 bytes) are 3 MB."""


@attrs.frozen(kw_only=True)
class QueuedEvent:
    """An event as it will be sent.

    *section* is what it tells about: a job, or None for the engine as a whole. *outdates* names, within its section,
    what a newer event of the same name makes worthless; None for an event that is news for ever (a state change).
    """

    body: bytes = attrs.field(repr=False)
    section: str | None
    outdates: Hashable | None = None


@attrs.define(eq=False)
class EventQueue:
    """See the module. Each operation takes the same time however long the queue is, evictions aside."""

    max_events: int = MAX_EVENTS
    max_bytes: int = MAX_BYTES
    size_bytes: int = 0
    _next_number: int = 0
    _events: OrderedDict[int, QueuedEvent] = attrs.field(factory=OrderedDict)  # a dict's first is found in O(removed)
    _progress: OrderedDict[int, None] = attrs.field(factory=OrderedDict)  # the numbers of those that may be outdated
    # Of each section the progress after its last state change: what a newer event may still replace.
    _newest: dict[str | None, dict[Hashable, int]] = attrs.field(factory=dict)

    def __len__(self) -> int:
        return len(self._events)

    def append(self, event: QueuedEvent) -> int:
        """Add *event*, and return how many events were given up because of the bounds, itself perhaps among them.

        What it outdates is not counted: nothing is lost by that. At a bound the oldest progress goes first, and the
        oldest event of all when there is no progress.
        """
        number = self._next_number
        self._next_number += 1
        if event.outdates is None:
            self._newest.pop(event.section, None)
            self._newest.pop(None, None)  # status, too, is told as it was at each state change
        else:
            newest = self._newest.setdefault(event.section, {})
            if (older := newest.get(event.outdates)) is not None:
                self._remove(older)
            self._newest.setdefault(event.section, newest)[event.outdates] = number
            self._progress[number] = None
        self._events[number] = event
        self.size_bytes += len(event.body)
        if len(event.body) > self.max_bytes:  # else it would push out everything, and then itself
            self._remove(number)
            return 1
        dropped = 0
        while len(self._events) > self.max_events or self.size_bytes > self.max_bytes:
            self._remove(next(iter(self._progress or self._events)))
            dropped += 1
        return dropped

    def pop_first(self) -> QueuedEvent:
        """Take the oldest event out; nothing outdates it any more.

        Raises:
            IndexError: there is none.
        """
        if not self._events:
            raise IndexError("no event waits")
        return self._remove(next(iter(self._events)))

    def _remove(self, number: int) -> QueuedEvent:
        event = self._events.pop(number)
        self.size_bytes -= len(event.body)
        if event.outdates is not None:
            del self._progress[number]
            newest = self._newest.get(event.section)
            if newest is not None and newest.get(event.outdates) == number:
                del newest[event.outdates]
                if not newest:  # else a job that is over would be remembered for ever
                    del self._newest[event.section]
        return event
