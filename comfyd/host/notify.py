"""systemd's notification protocol: readiness, a status line, the watchdog, and more time where we need it.

The protocol is sd_notify(3)'s: datagrams of ``NAME=value`` lines to the Unix socket in ``NOTIFY_SOCKET``. A dozen lines
of our own instead of a binding, as the bindings need a compiler or are dead.

**When comfyd is ready.** ``READY=1`` goes out once the engine is up and its first warm-up is done, not when the port
listens: ``systemctl start`` and units ordered after comfyd then wait for a daemon that can make pictures, and an engine
that cannot be started fails the start with comfyd's own exit code. Loading models may take minutes, so until then the
start timeout is extended again and again, each time by little: when the event loop hangs, systemd takes over within
:data:`EXTENSION_S`. An engine that restarts after that is no change of readiness for systemd, which has no word for it;
the status line and ``/ready`` tell.

The engine never sees these variables: ``comfyd.host.environment`` keeps them from it.
"""

import os
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from enum import Enum
from typing import Final

import attrs
import structlog
import trio

log = structlog.get_logger("comfyd.notify")

TICK_S: Final = 1.0
"""How often the status is looked at. It is text from several places, none of which says when it changes."""
EXTENSION_S: Final = 30.0
"""How much longer the start may take, counted from each extension: what a loop that hangs then costs at most."""
EXTEND_EVERY_S: Final = 10.0
"""Often enough that two lost datagrams in a row do no harm."""
START_LIMIT_S: Final = 3600.0
"""After this we ask for no more time. An engine that fails more slowly than the restart limit counts would otherwise
be "activating" for ever, where neither ``Restart=`` nor an operator's alert sees it."""
MAX_STATUS_CHARACTERS: Final = 300
"""It is shown on one line of ``systemctl status``; the reason of an engine's failure may be a page."""


class Phase(Enum):
    """What systemd was told, or is about to be told, of our life."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


@attrs.frozen(kw_only=True)
class NotifyTarget:
    """Whom to notify. *address* is as the kernel takes it; *watchdog_s* is None when nobody watches."""

    address: bytes
    watchdog_s: float | None = None


def read_notify(environ: Mapping[str, str]) -> NotifyTarget | None:
    """Read ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID``; None if nobody listens.

    What makes no sense is logged and otherwise as if it were not there, as systemd's own library does it: a variable
    that a strange parent left behind is no reason not to start.
    """
    value = environ.get("NOTIFY_SOCKET", "")
    if not value:
        return None
    if value[0] not in "/@":  # vsock:, since systemd 254: for a virtual machine as a whole, not for one service
        log.warning("notify.ignored", variable="NOTIFY_SOCKET", value=value)
        return None
    address = os.fsencode(value)
    if address.startswith(b"@"):
        address = b"\0" + address[1:]
    return NotifyTarget(address=address, watchdog_s=_read_watchdog(environ))


def meant_for_us(pid: str) -> bool:
    """Whether *pid*, the value of ``WATCHDOG_PID`` or ``LISTEN_PID``, is this process.

    In a one-file build it is our parent: PyInstaller's bootloader is what systemd started, and it only waits for us.
    """
    mine = {os.getpid(), os.getppid()} if getattr(sys, "frozen", False) else {os.getpid()}
    return pid.isascii() and pid.isdigit() and int(pid) in mine


@attrs.define(eq=False)
class Notifier:
    """Tells systemd where we are in our life. Its methods never wait and never raise; without a target they do nothing.

    Lost datagrams do no harm: what must arrive is sent again with each tick until the kernel takes it.
    """

    _target: NotifyTarget | None
    _socket: socket.socket | None = None
    _phase: Phase = Phase.STARTING
    _unsent: list[str] = attrs.field(init=False, factory=list)  # one entry per phase, so at most two
    _complained: bool = attrs.field(init=False, default=False)

    @property
    def phase(self) -> Phase:
        """What the last call said."""
        return self._phase

    def ready(self) -> None:
        """Say that we do our work: what waits for us may go on. Only the first call counts, and none after the stop."""
        if self._phase is Phase.STARTING:
            self._announce(Phase.READY, "READY=1")

    def stopping(self, within_s: float) -> None:
        """Say that we are stopping, and that it takes at most *within_s*: the drain and the engine's own stop.

        One extension for all of it, unlike during the start: a stop has an end that we know, and one that hangs is
        then killed although the event loop still turns.
        """
        if self._phase is not Phase.STOPPING:
            self._announce(Phase.STOPPING, f"STOPPING=1\nEXTEND_TIMEOUT_USEC={_microseconds(within_s)}")

    def send(self, text: str) -> bool:
        """Send lines now; return whether the kernel took them."""
        if self._socket is None or self._target is None:
            return False
        try:
            self._socket.sendto(text.encode(errors="replace"), self._target.address)
        except BlockingIOError:  # systemd is busy or being reloaded; the next tick will do
            return False
        except OSError as exc:
            if not self._complained:  # once, as we try each second
                log.warning("notify.failed", reason=exc.strerror or str(exc), target=os.fsdecode(self._target.address))
            self._complained = True
            return False
        self._complained = False
        return True

    def send_unsent(self) -> None:
        """Send, in order, what must arrive and did not yet."""
        while self._unsent and self.send(self._unsent[0]):
            del self._unsent[0]

    def _announce(self, phase: Phase, text: str) -> None:
        self._phase = phase
        if self._socket is not None:
            self._unsent.append(text)
            self.send_unsent()


async def serve_notify(
    target: NotifyTarget | None,
    status: Callable[[], str],
    alive: Callable[[], Awaitable[bool]],
    *,
    task_status: trio.TaskStatus[Notifier] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep systemd informed until cancelled; without a *target* return at once, after ``started()`` like otherwise.

    ``started()`` gives the `Notifier`. *status* makes the text of the status line; it is called each second, and must
    not block. *alive* is asked before each watchdog message: systemd kills us after ``WatchdogSec=`` in which it said
    no, or did not answer, or the event loop hung.
    """
    if target is None:
        task_status.started(Notifier(None))
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        notifier = Notifier(target, sock)
        async with trio.open_nursery() as nursery:
            if target.watchdog_s is not None:
                nursery.start_soon(_feed_watchdog, notifier, target.watchdog_s / 2, alive)
            task_status.started(notifier)
            await _tell_status(notifier, status)


async def _tell_status(notifier: Notifier, status: Callable[[], str]) -> None:
    """Send the status when it changed, ask for more time while we start, and repeat what did not get through."""
    told = ""
    began = trio.current_time()
    extend_at = began
    while True:
        notifier.send_unsent()
        text = one_line(status())
        if text != told and notifier.send(f"STATUS={text}"):
            told = text
        now = trio.current_time()
        if notifier.phase is Phase.STARTING and now >= extend_at and now - began < START_LIMIT_S:
            notifier.send(f"EXTEND_TIMEOUT_USEC={_microseconds(EXTENSION_S)}")
            extend_at = now + EXTEND_EVERY_S
        await trio.sleep(TICK_S)


async def _feed_watchdog(notifier: Notifier, interval_s: float, alive: Callable[[], Awaitable[bool]]) -> None:
    """Send ``WATCHDOG=1`` every *interval_s* as long as *alive* says so within that time."""
    withheld = False
    while True:
        next_at = trio.current_time() + interval_s
        answer = False
        with trio.move_on_at(next_at):
            answer = await alive()
        if answer:
            notifier.send("WATCHDOG=1")
        elif not withheld:
            log.error("notify.watchdog_withheld", consequence="systemd will kill this process")
        withheld = not answer
        await trio.sleep_until(next_at)


def one_line(text: str) -> str:
    """Make *text* fit for ``STATUS=``: a line break would begin another assignment."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_STATUS_CHARACTERS else line[: MAX_STATUS_CHARACTERS - 1] + "…"


def _read_watchdog(environ: Mapping[str, str]) -> float | None:
    """Return the watchdog's period in seconds if there is one and it is ours (sd_watchdog_enabled(3))."""
    value = environ.get("WATCHDOG_USEC", "")
    pid = environ.get("WATCHDOG_PID", "")
    if not value or (pid and not meant_for_us(pid)):
        return None
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        log.warning("notify.ignored", variable="WATCHDOG_USEC", value=value)
        return None
    return int(value) / 1e6


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
