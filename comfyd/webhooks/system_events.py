"""ComfyUI's own events, POSTed to the operator's receiver: in order, one at a time, and never in a job's way.

An event is encoded when it is published and waits in an :class:`EventQueue`; one task sends. While the receiver is
slow or away, progress coalesces and the rest waits, within bounds. What a receiver does not take after its retries is
given up and counted, and the next one has its turn: these events are news, and the results of jobs go another way.
"""

import base64
import math
import time
from collections.abc import AsyncIterator, Hashable, Mapping
from contextlib import suppress
from typing import Any, Final, NoReturn
from uuid import uuid4

import attrs
import httpx
import msgspec
import structlog
import trio

from comfyd import __version__
from comfyd.net import GuardedTransport, PolicyMode, UrlPolicy, UrlRefused, display_url, open_body
from comfyd.net.policy import check_parsed, parse_url
from comfyd.texts import hide_paths
from comfyd.webhooks.event_queue import EventQueue, QueuedEvent
from comfyd.webhooks.retry import RetryPolicy, parse_retry_after
from comfyd.webhooks.signature import Signer
from comfyd.wire import encode_json

log = structlog.get_logger("comfyd.webhooks")

_PRIVATE: Final = frozenset({"traceback", "current_inputs", "current_outputs"})
"""Of ``execution_error`` (ComfyUI 0.3.64, execution.py): paths of the server, and inputs, which may be secrets."""

_LIMITS: Final = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=4)
"""One sender. Node.js closes a connection that rests for 5 s; one that we use just then costs a retry."""

_REST_BYTES: Final = 64 * 1024  # of an answer's body, which nobody looks at: reading it saves the next connection
_REST_S: Final = 1.0
_DROPS_EVERY_S: Final = 60.0


@attrs.frozen(kw_only=True)
class SystemEventsConfig:
    """Where events go and which. *events* are ComfyUI's types, without ``comfy.``; *metadata* is sent with each.

    *tracebacks* sends what a node that raised was given and where. *retries* counts those after the first attempt,
    with delays from *first_delay_s* doubling to *max_delay_s*; *attempt_timeout_s* bounds each attempt until the head
    of the answer is there.
    """

    url: str = attrs.field(repr=False)  # may carry a password
    events: frozenset[str]
    metadata: Mapping[str, str] = attrs.field(repr=False)  # the operator's own, whatever it is
    tracebacks: bool = False
    secrets: tuple[bytes, ...] = attrs.field(default=(), repr=False)
    retries: int = 3
    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    attempt_timeout_s: float = 30.0


async def serve_system_events(
    config: SystemEventsConfig, *, task_status: trio.TaskStatus["SystemEvents"] = trio.TASK_STATUS_IGNORED
) -> None:
    """Send what is published until cancelled; what waits then is lost, and the log says how much.

    Raises:
        UrlRefused: *config*'s URL is none that can be sent to.
    """
    # The transport without httpx's client around it, which logs whole URLs and takes a fifth of the time (2026, 3.11).
    async with GuardedTransport(UrlPolicy(mode=PolicyMode.OPEN), limits=_LIMITS) as transport:
        receiver = _Receiver(config, transport)
        events = SystemEvents(config=config, receiver_name=receiver.name)
        task_status.started(events)
        try:
            await events.send_all(receiver)
        finally:
            events.tell_end()


@attrs.define(eq=False)
class SystemEvents:
    """What :func:`serve_system_events` gives: where events are published.

    *sent* events were taken by the receiver, *failed* ones given up after their retries (or at once, at a 410), and
    *dropped* ones given up at the queue's bounds. Progress that newer progress outdated is in none of them.
    """

    _config: SystemEventsConfig
    _receiver_name: str  # for logs
    _queue: EventQueue = attrs.field(factory=EventQueue)
    sent: int = 0
    failed: int = 0
    dropped: int = 0
    _sending: bool = False
    _published: trio.Event = attrs.field(factory=trio.Event)
    _drained: trio.Event = attrs.field(factory=trio.Event)
    _outage: "_Outage | None" = None
    _dropped_told: int = 0
    _tell_drops_at: float = -math.inf

    def publish(
        self,
        type: str,  # noqa: A002  # ComfyUI's word for it
        data: Mapping[str, Any],
        sid: str | None,
        job_id: str | None,
        prompt_id: str | None,
    ) -> None:
        """Queue one event of ComfyUI's websocket; never waits, never raises. To be called on the Trio thread.

        *data* is ``data`` of its message, which is not changed and not kept. *job_id* is what the receiver knows
        *prompt_id*, the engine's id of the attempt, by; None for what concerns no job of ours, whose data go as they
        are. An event that is not wanted costs the look-up in a set.
        """
        if type not in self._config.events:
            return
        try:
            event = QueuedEvent(
                body=self._body(type, data, sid, job_id),
                section=prompt_id if job_id is None else job_id,
                outdates=_outdates(type, data),
            )
        except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
            self._drop(1)  # it is not from JSON, then, which the next event may be
            return
        self._drop(self._queue.append(event))
        self._published.set()

    @property
    def pending(self) -> int:
        """How many events wait or are being sent."""
        return len(self._queue) + self._sending

    async def wait_drained(self) -> None:
        """Return once nothing is left to send: all was taken or given up. Only while events are served."""
        while self.pending:
            self._drained = trio.Event() if self._drained.is_set() else self._drained
            await self._drained.wait()

    def _body(self, kind: str, data: Mapping[str, Any], sid: str | None, job_id: str | None) -> bytes:
        message: dict[str, Any] = {"type": kind, "data": _told(kind, data, job_id, tracebacks=self._config.tracebacks)}
        if sid is not None:  # as in ComfyUI's message, which mostly has none
            message["sid"] = sid
        return encode_json({"event": f"comfy.{kind}", "data": message, "metadata": self._config.metadata})

    async def send_all(self, receiver: "_Receiver") -> NoReturn:
        """Send what is published, for ever. The service's own; there is one sender."""
        config = self._config
        policy = RetryPolicy(retries=config.retries, first_delay_s=config.first_delay_s, max_delay_s=config.max_delay_s)
        while True:
            while not self._queue:
                self._published = trio.Event()
                await self._published.wait()
            self._sending = True
            await self._deliver(self._queue.pop_first().body, receiver, policy)
            self._sending = False
            if not self.pending:
                self._drained.set()
            self._tell_drops()

    async def _deliver(self, body: bytes, receiver: "_Receiver", policy: RetryPolicy) -> None:
        """Have *receiver* take *body*, or give it up. Those behind it wait: order is worth more than speed."""
        webhook_id = f"evt_{uuid4().hex}"
        attempt = 0
        while True:
            attempt += 1
            answer = await receiver.post(webhook_id, body)
            if answer.taken:
                self.sent += 1
                self._tell_up()
                return
            delay_s = None if answer.gone else policy.delay_s(attempt, retry_after_s=answer.retry_after_s)
            log.debug("system_events.not_taken", reason=answer.text, attempt=attempt, retry_in_s=delay_s)
            if delay_s is None:
                self.failed += 1
                self._tell_down(answer.text, attempt)
                return
            await trio.sleep(delay_s)

    # What the log is told: a line when an outage begins and one when it ends, drops once a minute, and the end.

    def _tell_down(self, reason: str, attempts: int) -> None:
        if self._outage is None:
            self._outage = _Outage(began=trio.current_time())
            log.warning(
                "system_events.not_delivered", receiver=self._receiver_name, reason=reason, attempts=attempts,
                pending=self.pending,
            )  # fmt: skip
        self._outage.lost += 1

    def _tell_up(self) -> None:
        if self._outage is not None:
            lasted_s = round(trio.current_time() - self._outage.began, 3)
            log.warning(
                "system_events.delivered_again", receiver=self._receiver_name, lost=self._outage.lost, lasted_s=lasted_s
            )
            self._outage = None

    def _drop(self, number: int) -> None:
        if number:
            self.dropped += number
            self._tell_drops()

    def _tell_drops(self) -> None:
        now = trio.current_time()
        if self.dropped > self._dropped_told and now >= self._tell_drops_at:
            log.warning(
                "system_events.dropped", receiver=self._receiver_name, dropped=self.dropped - self._dropped_told,
                total=self.dropped, pending=self.pending,
            )  # fmt: skip
            self._dropped_told = self.dropped
            self._tell_drops_at = now + _DROPS_EVERY_S

    def tell_end(self) -> None:
        """Log what is lost by ending now."""
        if self.pending or self._outage is not None or self.dropped > self._dropped_told:
            log.warning(
                "system_events.ended", receiver=self._receiver_name, unsent=self.pending, sent=self.sent,
                failed=self.failed, dropped=self.dropped,
            )  # fmt: skip


@attrs.define
class _Outage:
    """The time since an event was given up, with none taken."""

    began: float
    lost: int = 0


@attrs.frozen(kw_only=True)
class _Answer:
    """How an attempt ended. *text* is for the log."""

    taken: bool = False
    gone: bool = False
    retry_after_s: float | None = None
    text: str


class _Receiver:
    """One attempt at a time towards the operator's URL, over one connection that is kept."""

    def __init__(self, config: SystemEventsConfig, transport: httpx.AsyncBaseTransport) -> None:
        url = parse_url(config.url)
        check_parsed(url, UrlPolicy(mode=PolicyMode.OPEN))
        self.name = display_url(url)
        self._url = url.copy_with(userinfo=b"")
        self._config = config
        self._transport = transport
        self._headers = {
            "Host": self._url.netloc.decode("ascii"),
            "User-Agent": f"comfyd/{__version__}",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        if url.userinfo:
            credentials = f"{url.username}:{url.password}".encode()
            self._headers["Authorization"] = f"Basic {base64.b64encode(credentials).decode('ascii')}"

    async def post(self, webhook_id: str, body: bytes) -> _Answer:
        """Make one attempt; whatever goes wrong is its answer."""
        now = time.time()
        signer = Signer(self._config.secrets, webhook_id, int(now))
        signer.update(body)
        headers = {**self._headers, "Content-Length": str(len(body)), **signer.headers()}
        request = httpx.Request("POST", self._url, headers=headers, stream=_Body(body))
        try:
            with trio.fail_after(self._config.attempt_timeout_s):
                response = await self._transport.handle_async_request(request)
        except trio.TooSlowError:
            return _Answer(text=f"no answer within {self._config.attempt_timeout_s:g} s")
        except (httpx.TransportError, UrlRefused) as exc:
            return _Answer(text=str(exc) or exc.__class__.__name__)
        await _read_rest(response)
        status = response.status_code
        return _Answer(
            taken=200 <= status < 300,
            gone=status == 410,  # Standard Webhooks: not interested any more
            retry_after_s=parse_retry_after(response.headers.get("retry-after"), now),
            text=f"status {status}",
        )


class _Body(httpx.AsyncByteStream):
    """A request's body in one piece.

    httpx's own is an async generator, which a connection that breaks leaves in the middle; trio then warns of it.
    """

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if (body := self._body) is None:
            raise StopAsyncIteration
        self._body = None
        return body


async def _read_rest(response: httpx.Response) -> None:
    """Read the answer's body if it is short and comes soon, so that the connection can be used again; else close it.

    The answer itself is known: nothing that goes wrong here changes it.
    """
    length = response.headers.get("content-length", "0")  # without one the time is the bound
    if length.isdecimal() and int(length) <= _REST_BYTES:
        with trio.move_on_after(_REST_S), suppress(httpx.TransportError):
            async with open_body(response) as pieces:
                async for _ in pieces:
                    pass
    if not response.is_closed:
        await response.aclose()


def _told(kind: str, data: Mapping[str, Any], job_id: str | None, *, tracebacks: bool) -> Mapping[str, Any]:
    """Give *data* as the receiver may see them: under the job's id, and without what is private."""
    told = data
    if job_id is not None:
        told = {**data, "prompt_id": job_id}
        if kind == "progress_state" and isinstance(nodes := data.get("nodes"), dict):  # each has the prompt's id again
            told["nodes"] = {
                node_id: {**node, "prompt_id": job_id} if isinstance(node, dict) and "prompt_id" in node else node
                for node_id, node in nodes.items()
            }
    if kind == "execution_error":
        told = {key: value for key, value in told.items() if tracebacks or key not in _PRIVATE}
        if isinstance(message := told.get("exception_message"), str):
            told["exception_message"] = hide_paths(message)
    return told


def _outdates(kind: str, data: Mapping[str, Any]) -> Hashable | None:
    """Name what an event of this *kind* outdates: see :class:`QueuedEvent`."""
    if kind == "progress":
        return kind, str(data.get("node"))
    return kind if kind in ("progress_state", "status") else None  # both tell the whole state
