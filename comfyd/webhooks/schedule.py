"""Which webhook goes next: in order for one job at one receiver, and fair between receivers. No clock, no I/O.

A *lane* holds what one job has to tell one receiver; its first event is the only one that can be on its way. Lanes
whose first event is due stand in line at their receiver, and receivers with such lanes stand in line for a slot.

A receiver that hangs keeps what it was given for a whole time-out, so it is given little: one event at a time until it
has taken one, then several; and one that could not be reached competes for other slots than those which answer.
"""

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator

import attrs

from comfyd.journal import WebhookRow

_KEPT_RECEIVERS = 1024
"""Receivers without events that we still know what to think of: an entry takes under 1 KB."""


@attrs.define(eq=False)
class _Receiver:
    key: Hashable
    proved: bool = False
    """Its last event was answered, by whatever status."""
    suspect: bool = False
    """It could not be reached the last time, or said nothing."""
    in_flight: int = 0
    ready: deque["_Lane"] = attrs.field(factory=deque)
    lanes: int = 0
    in_line: bool = False


@attrs.define(eq=False)
class _Lane:
    receiver: _Receiver
    job_key: str
    rows: list[WebhookRow] = attrs.field(factory=list)
    in_flight: bool = False
    delay: int = 0
    """Number of the back-off that its first event is in; 0: in none."""


@attrs.define(eq=False)
class _Slots:
    """Slots for receivers of one kind, and the line of those that wait for one."""

    size: int
    taken: int = 0
    line: deque[_Receiver] = attrs.field(factory=deque)


@attrs.frozen(kw_only=True, eq=False)
class Turn:
    """An event that is on its way: end it by :meth:`Schedule.settle` or :meth:`Schedule.put_back`."""

    row: WebhookRow
    _lane: _Lane
    _slots: _Slots


@attrs.define(eq=False, kw_only=True)
class Schedule:
    """All pending events. *receiver_of* gives what tells a row's receiver from others.

    At most *per_receiver* events are on their way to one receiver, *at_once* to those that answer, and *suspects* to
    those that did not.
    """

    _receiver_of: Callable[[WebhookRow], Hashable]
    _per_receiver: int
    _at_once: int
    _suspects: int
    _lanes: dict[tuple[Hashable, str], _Lane] = attrs.field(factory=dict)
    _lane_of: dict[str, _Lane] = attrs.field(factory=dict)
    _receivers: OrderedDict[Hashable, _Receiver] = attrs.field(factory=OrderedDict)
    _waiting: list[tuple[float, int, str]] = attrs.field(factory=list)
    _delays: int = 0
    _due: int = 0
    _good_slots: _Slots = attrs.field(init=False)
    _suspect_slots: _Slots = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        """Make the slots."""
        self._good_slots = _Slots(self._at_once)
        self._suspect_slots = _Slots(self._suspects)

    def __len__(self) -> int:
        return len(self._lane_of)

    def __contains__(self, webhook_id: str) -> bool:
        return webhook_id in self._lane_of

    @property
    def in_flight(self) -> int:
        """Events on their way."""
        return self._good_slots.taken + self._suspect_slots.taken

    @property
    def due(self) -> int:
        """Lanes whose first event could go at once if there were a slot."""
        return self._due

    @property
    def next_due(self) -> float:
        """When the first event in back-off is due; infinity without one. May be early, if that one was taken out."""
        return self._waiting[0][0] if self._waiting else math.inf

    def ids_at_rest(self) -> Iterator[str]:
        """The ids of all events that are not on their way."""
        for webhook_id, lane in self._lane_of.items():
            if not (lane.in_flight and lane.rows[0].id == webhook_id):
                yield webhook_id

    def add(self, row: WebhookRow) -> None:
        """Put *row* at the end of its lane. Once; one that is here already is a bug of the caller."""
        key = self._receiver_of(row)
        lane = self._lanes.get((key, row.job_key))
        if lane is None:
            receiver = self._receivers.get(key)
            if receiver is None:
                receiver = self._receivers[key] = _Receiver(key)
            receiver.lanes += 1
            lane = self._lanes[key, row.job_key] = _Lane(receiver, row.job_key)
        lane.rows.append(row)
        self._lane_of[row.id] = lane
        if len(lane.rows) == 1:
            self._make_ready(lane)

    def take(self) -> Turn | None:
        """Give the next event that may go now, and count it as on its way."""
        for slots in (self._good_slots, self._suspect_slots):
            while slots.taken < slots.size and slots.line:
                receiver = slots.line.popleft()
                receiver.in_line = False
                if self._may_take(receiver):  # it may have lost what it stood there for
                    return self._start(receiver, slots)
        return None

    def settle(self, turn: Turn, *, reached: bool | None) -> None:
        """The event of *turn* is over. *reached*: whether the receiver answered; None: it was not asked."""
        lane = turn._lane
        self._land(turn, reached)
        lane.rows.pop(0)
        del self._lane_of[turn.row.id]
        self._go_on(lane)

    def put_back(self, turn: Turn, row: WebhookRow, until: float, *, reached: bool | None) -> None:
        """Let *row*, which is *turn*'s with what has changed, wait until then, and its lane with it."""
        lane = turn._lane
        self._land(turn, reached)
        lane.rows[0] = row
        self._delays += 1
        lane.delay = self._delays
        heapq.heappush(self._waiting, (until, lane.delay, row.id))
        self._line_up(lane.receiver)

    def release(self, now: float) -> None:
        """Make due what has waited long enough."""
        while self._waiting and self._waiting[0][0] <= now:
            _, delay, webhook_id = heapq.heappop(self._waiting)
            lane = self._lane_of.get(webhook_id)
            if lane is not None and lane.delay == delay:  # neither dropped nor hastened meanwhile
                self._make_ready(lane)

    def row(self, webhook_id: str) -> WebhookRow:
        """Give an event's row as it is known here."""
        return next(row for row in self._lane_of[webhook_id].rows if row.id == webhook_id)

    def hasten(self, row: WebhookRow) -> None:
        """Put *row* in the place of the one at rest with its id; if it is in back-off, it is due."""
        lane = self._lane_of[row.id]
        lane.rows = [row if each.id == row.id else each for each in lane.rows]
        if lane.delay and lane.rows[0].id == row.id:
            self._make_ready(lane)

    def drop(self, webhook_id: str) -> None:
        """Forget an event that is at rest."""
        lane = self._lane_of.pop(webhook_id)
        was_first = lane.rows[0].id == webhook_id
        lane.rows = [row for row in lane.rows if row.id != webhook_id]
        if was_first:
            if lane in lane.receiver.ready:
                lane.receiver.ready.remove(lane)
                self._due -= 1
            self._go_on(lane)

    def _go_on(self, lane: _Lane) -> None:
        receiver = lane.receiver
        if lane.rows:
            self._make_ready(lane)
        else:
            del self._lanes[receiver.key, lane.job_key]
            receiver.lanes -= 1
            self._line_up(receiver)
            self._forget_some()

    def _make_ready(self, lane: _Lane) -> None:
        lane.delay = 0
        lane.receiver.ready.append(lane)
        self._due += 1
        self._line_up(lane.receiver)

    def _line_up(self, receiver: _Receiver) -> None:
        if not receiver.in_line and self._may_take(receiver):
            receiver.in_line = True
            self._slots_of(receiver).line.append(receiver)

    def _may_take(self, receiver: _Receiver) -> bool:
        return bool(receiver.ready) and receiver.in_flight < (self._per_receiver if receiver.proved else 1)

    def _slots_of(self, receiver: _Receiver) -> _Slots:
        return self._suspect_slots if receiver.suspect else self._good_slots

    def _start(self, receiver: _Receiver, slots: _Slots) -> Turn:
        lane = receiver.ready.popleft()
        self._due -= 1
        lane.in_flight = True
        receiver.in_flight += 1
        slots.taken += 1
        self._line_up(receiver)
        return Turn(row=lane.rows[0], lane=lane, slots=slots)

    def _land(self, turn: Turn, reached: bool | None) -> None:
        lane = turn._lane
        receiver = lane.receiver
        lane.in_flight = False
        receiver.in_flight -= 1
        turn._slots.taken -= 1
        if reached is None:
            return
        receiver.proved = reached
        if receiver.suspect is reached:  # it is not what it was taken for
            if receiver.in_line:
                self._slots_of(receiver).line.remove(receiver)
                receiver.in_line = False
            receiver.suspect = not reached
            self._line_up(receiver)

    def _forget_some(self) -> None:
        """Forget the receiver that is idle for longest, if there are many. Looks at a few only."""
        while len(self._receivers) > _KEPT_RECEIVERS:
            key, oldest = next(iter(self._receivers.items()))
            if oldest.lanes:
                self._receivers.move_to_end(key)
                return
            del self._receivers[key]
