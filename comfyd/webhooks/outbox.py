"""The outbox: tells every receiver what it is to be told, as often as it takes, and no longer than it was promised.

At-least-once: that a webhook was taken is told to the journal at once, and a daemon that dies before that is on disk
sends it again, with the same ``webhook-id`` and body. What is in memory of a pending event is its row, never its body:
that is built from the job's record and its files for each attempt.
"""

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Final, NoReturn

import attrs
import structlog
import trio

from comfyd.host.logging import bind_job
from comfyd.journal import Journal, JournalUnavailable, WebhookRow
from comfyd.media.json_files import FileChanged
from comfyd.net import UrlPolicy, UrlRefused
from comfyd.net.policy import parse_url, port_of
from comfyd.webhooks.bodies import NoSuchEvent, build_body
from comfyd.webhooks.delivery import Courier, Failed, Result, Taken, open_courier
from comfyd.webhooks.retry import RetryPolicy
from comfyd.webhooks.schedule import Schedule, Turn

log = structlog.get_logger("comfyd.webhooks")

_JOURNAL_PAUSE_S: Final = 5.0  # before a journal that could not be read is asked again
_BUILDING_THREADS: Final = 4  # JSON holds the interpreter lock: more would not be faster
_CHECKPOINT_EACH: Final = 100  # rows put in line between two turns of other tasks


def retry_policy(retries: int) -> RetryPolicy:
    """The schedule of webhooks: 1 s, doubling to 5 minutes; a receiver may ask for up to an hour."""
    return RetryPolicy(retries=retries, first_delay_s=1.0, max_delay_s=300.0, max_retry_after_s=3600.0)


@attrs.frozen(kw_only=True)
class OutboxConfig:
    """What may be sent where, and how much at once.

    *at_once* bounds what is on its way to receivers that answer, *suspects_at_once* to those that did not the last
    time: each holds a connection and a piece of its body, under 1 MB. *stall_s* is the longest silence in an attempt.
    Beyond *max_pending* events, of about 1 KB each, the rest waits in the journal.
    """

    urls: UrlPolicy
    secrets: tuple[bytes, ...] = attrs.field(default=(), repr=False)
    retry: RetryPolicy = attrs.field(factory=lambda: retry_policy(3))
    per_receiver: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    at_once: int = attrs.field(default=64, validator=attrs.validators.ge(1))
    suspects_at_once: int = attrs.field(default=16, validator=attrs.validators.ge(1))
    stall_s: float = 30.0
    max_pending: int = attrs.field(default=50_000, validator=attrs.validators.ge(1))


async def serve_outbox(
    config: OutboxConfig, journal: Journal, *, task_status: trio.TaskStatus["Outbox"] = trio.TASK_STATUS_IGNORED
) -> None:
    """Send what is pending in *journal*, and what is posted, until cancelled. ``started()`` gives the outbox."""
    at_once = config.at_once + config.suspects_at_once
    async with open_courier(config.urls, config.secrets, stall_s=config.stall_s, at_once=at_once) as courier:
        outbox = Outbox(config=config, journal=journal, courier=courier)
        try:
            await outbox.load()
            task_status.started(outbox)
            await outbox.keep_sending()
        finally:
            outbox.say_what_is_left()


@attrs.define(eq=False, kw_only=True)
class Outbox:
    """The handle of :func:`serve_outbox`.

    *attempts* counts what came of each: ``taken``, ``failed`` (to be tried again) and ``dead``. *dead* is the number of
    dead letters in the journal.
    """

    _config: OutboxConfig
    _journal: Journal
    _courier: Courier
    attempts: Counter[str] = attrs.field(factory=lambda: Counter(taken=0, failed=0, dead=0))
    dead: int = 0
    _schedule: Schedule = attrs.field(init=False)
    _changed_meanwhile: set[str] = attrs.field(factory=set)
    """Events that were tried since the journal was last asked: what it answers may be of before that."""
    _loading: trio.Lock = attrs.field(factory=trio.Lock)
    _behind: bool = False
    """The journal has pending events that are not here."""
    _woken: trio.Event = attrs.field(factory=trio.Event)
    _passed: trio.Event = attrs.field(factory=trio.Event)
    _room: trio.Event = attrs.field(factory=trio.Event)
    _building: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(_BUILDING_THREADS))

    def __attrs_post_init__(self) -> None:
        """Make the empty schedule."""
        self._schedule = Schedule(
            receiver_of=lambda row: _receiver(row.url),
            per_receiver=self._config.per_receiver,
            at_once=self._config.at_once,
            suspects=self._config.suspects_at_once,
        )

    @property
    def pending(self) -> int:
        """Events that were neither taken nor given up."""
        return len(self._schedule)

    @property
    def busy(self) -> bool:
        """Whether something is on its way, or could be at once."""
        return self._schedule.in_flight > 0 or self._schedule.due > 0

    def post(self, rows: Sequence[WebhookRow]) -> None:
        """Send *rows*, which are in the journal, in their order. Never waits."""
        if len(self._schedule) + len(rows) > self._config.max_pending:
            self._behind = True  # they are read from the journal when there is room
            return
        for row in rows:
            if row.id not in self._schedule:  # the journal was read again between their commit and now
                self._schedule.add(row)
        self._woken.set()

    async def wait_drained(self) -> None:
        """Return when all is sent that can be sent now; what waits for its next attempt is kept in the journal.

        A journal in memory keeps nothing: then it is waited for as well, for as long as the caller likes.
        """
        while self.busy or (len(self._schedule) and not self._journal.durable):
            await self.wait_changed()

    async def wait_changed(self) -> None:
        """Return when something was posted, sent or given up, or is on its way since."""
        await self._passed.wait()

    async def keep_sending(self) -> NoReturn:
        """Send for ever. For :func:`serve_outbox`, as the two around it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow, self._journal.wait_changed_outside)
            nursery.start_soon(self._follow, self._wait_room)
            while True:
                self._woken = trio.Event()
                self._schedule.release(trio.current_time())
                while (turn := self._schedule.take()) is not None:
                    nursery.start_soon(self._attempt, turn)
                if self._behind and len(self._schedule) <= self._config.max_pending // 2:
                    self._room.set()
                self._passed.set()
                self._passed = trio.Event()
                with trio.move_on_at(self._schedule.next_due):
                    await self._woken.wait()

    def say_what_is_left(self) -> None:
        """Log at the end what was not told."""
        if not self.pending:
            return
        if self._journal.durable:
            log.info("outbox.kept", events=self.pending)
        else:
            log.error("outbox.lost", events=self.pending, reason="STATE_DIR is empty: the journal is in memory only")

    # -- the journal ------------------------------------------------------------------------------------------------

    async def _follow(self, wait_changed: Callable[[], Awaitable[None]]) -> None:
        while True:
            await wait_changed()
            await self.load()

    async def _wait_room(self) -> None:
        await self._room.wait()
        self._room = trio.Event()

    async def load(self) -> None:
        """Make what is here equal to what is pending in the journal; what was replayed is due at once."""
        async with self._loading:
            rows, before = await self._read()
            resting = before.intersection(self._schedule.ids_at_rest()) - self._changed_meanwhile
            for webhook_id in resting.difference(row.id for row in rows):
                self._schedule.drop(webhook_id)
                log.info("webhook.dropped", webhook_id=webhook_id)
            self._behind = False
            for number, row in enumerate(rows, 1):
                if len(self._schedule) >= self._config.max_pending:
                    self._behind = True
                    break
                if row.id in self._changed_meanwhile:
                    continue
                if row.id not in self._schedule:
                    self._schedule.add(row)
                elif row.id in resting and row.attempts < self._schedule.row(row.id).attempts:  # replayed
                    self._schedule.hasten(row)
                if not number % _CHECKPOINT_EACH:
                    await trio.lowlevel.checkpoint()
        self._woken.set()

    async def _read(self) -> tuple[list[WebhookRow], set[str]]:
        """Read what is pending; also gives the ids that were here, at rest, when it was asked for."""
        while True:
            self._changed_meanwhile.clear()
            before = set(self._schedule.ids_at_rest())
            try:
                rows = await self._journal.pending_webhooks()
                _, self.dead = await self._journal.count_webhooks()
            except JournalUnavailable as exc:
                log.warning("outbox.journal_unavailable", reason=str(exc), next_try_s=_JOURNAL_PAUSE_S)
                await trio.sleep(_JOURNAL_PAUSE_S)
            else:
                return rows, before

    # -- one attempt ------------------------------------------------------------------------------------------------

    async def _attempt(self, turn: Turn) -> None:
        row = attrs.evolve(turn.row, attempts=turn.row.attempts + 1)
        with bind_job(row.job_id, row.attempts):
            began = trio.current_time()
            try:
                result = await self._try(row)
            except JournalUnavailable as exc:  # no attempt: nobody was asked
                log.warning("webhook.postponed", reason=str(exc), next_try_s=_JOURNAL_PAUSE_S)
                self._schedule.put_back(turn, turn.row, trio.current_time() + _JOURNAL_PAUSE_S, reached=None)
            else:
                self._conclude(turn, row, result, round((trio.current_time() - began) * 1000, 1))
        self._woken.set()

    async def _try(self, row: WebhookRow) -> Result:
        job = await self._journal.find_job(row.job_id)
        if job is None:
            return _never("the record of its job is gone")
        try:
            body = await trio.to_thread.run_sync(build_body, row, job, limiter=self._building)
            del job  # with a graph of megabytes, which the body has as well
            return await self._courier.deliver(row.url, row.id, body)
        except NoSuchEvent as exc:
            return _never(str(exc))
        except FileChanged as exc:
            if exc.passing:
                return Failed(reason=f"the output {exc.filename} could not be read", answered=None)
            return _never(f"the output {exc.filename} is gone or not what it was")

    def _conclude(self, turn: Turn, row: WebhookRow, result: Result, took_ms: float) -> None:
        if self._loading.locked():
            self._changed_meanwhile.add(row.id)
        fields = {"webhook_id": row.id, "kind": row.kind, "receiver": _host(row.url), "took_ms": took_ms}
        if isinstance(result, Taken):
            self._journal.webhook_taken(row.id)
            self._schedule.settle(turn, reached=True)
            self.attempts["taken"] += 1
            log.info("webhook.taken", **fields, attempts=row.attempts)
            return
        delay_s = None
        if not result.final:
            delay_s = self._config.retry.delay_s(row.attempts, retry_after_s=result.retry_after_s)
        now = time.time()
        if delay_s is None:
            self._journal.webhook_dead(row.id, at=now, attempts=row.attempts, error=result.reason)
            self._schedule.settle(turn, reached=result.answered)
            self.attempts["dead"] += 1
            self.dead += 1
            log.error("webhook.dead", **fields, attempts=row.attempts, reason=result.reason)
            return
        row = attrs.evolve(row, next_at=now + delay_s, last_error=result.reason)
        self._journal.webhook_tried(row.id, attempts=row.attempts, next_at=now + delay_s, error=result.reason)
        self._schedule.put_back(turn, row, trio.current_time() + delay_s, reached=result.answered)
        self.attempts["failed"] += 1
        log.warning(
            "webhook.failed", **fields, attempts=row.attempts, reason=result.reason, next_try_s=round(delay_s, 3)
        )


def _never(reason: str) -> Failed:
    """A webhook that cannot be built: its receiver was not asked."""
    return Failed(reason=reason, answered=None, final=True)


@lru_cache(maxsize=1024)
def _receiver(url: str) -> tuple[str, str, int]:
    """What has a fate of its own: a scheme, host and port."""
    try:
        parsed = parse_url(url)
    except UrlRefused:
        return ("", url, 0)  # refused by whoever tries to send it
    return (parsed.scheme, parsed.raw_host.decode("ascii"), port_of(parsed))


def _host(url: str) -> str:
    """The receiver for the log: paths hold tokens as often as queries do."""
    _, host, port = _receiver(url)
    return f"{host}:{port}" if port else "(not a URL)"
