"""Notifying systemd, over real datagram sockets.

The clock is virtual all the same: a datagram between Unix sockets has arrived when ``sendto`` returns.
"""

import itertools
import os
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import attrs
import pytest
import trio
from structlog.testing import LogCapture
from trio.testing import MockClock

from comfyd.host.notify import (
    EXTEND_EVERY_S,
    EXTENSION_S,
    MAX_STATUS_CHARACTERS,
    START_LIMIT_S,
    TICK_S,
    Notifier,
    NotifyTarget,
    Phase,
    read_notify,
    serve_notify,
)

EXTENSION: Final = f"EXTEND_TIMEOUT_USEC={EXTENSION_S * 1e6:.0f}"


@attrs.frozen
class Systemd:
    """The receiving end, at *value* as ``NOTIFY_SOCKET`` says it."""

    sock: socket.socket
    value: str

    def target(self, **environ: str) -> NotifyTarget:
        target = read_notify({"NOTIFY_SOCKET": self.value, **environ})
        assert target is not None
        return target

    def take(self) -> list[str]:
        """Return what has arrived since the last call, one text per datagram."""
        texts = []
        while True:
            try:
                texts.append(self.sock.recv(4096).decode())
            except BlockingIOError:
                return texts


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    value = str(tmp_path / "notify") if request.param == "path" else f"@comfyd-test-{uuid.uuid4().hex}"
    with bound(value) as sock:
        yield Systemd(sock, value)


def bound(value: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind("\0" + value[1:] if value.startswith("@") else value)
    return sock


async def always_alive() -> bool:
    return True


@asynccontextmanager
async def serving(
    target: NotifyTarget, status: Callable[[], str] = str, alive: Callable[[], object] = always_alive
) -> AsyncIterator[Notifier]:
    async with trio.open_nursery() as nursery:
        notifier: Notifier = await nursery.start(serve_notify, target, status, alive)
        await trio.testing.wait_all_tasks_blocked()
        yield notifier
        nursery.cancel_scope.cancel("the test is over")


# --- with nobody to notify


def test_without_a_socket_there_is_no_target() -> None:
    assert read_notify({"WATCHDOG_USEC": "1000000"}) is None
    assert read_notify({"NOTIFY_SOCKET": ""}) is None


def test_a_virtual_machines_socket_is_not_ours(log_output: LogCapture) -> None:
    assert read_notify({"NOTIFY_SOCKET": "vsock:2:1234"}) is None
    assert [event["event"] for event in log_output.entries] == ["notify.ignored"]


async def test_without_a_target_no_task_is_left_and_the_notifier_does_nothing() -> None:
    def unexpected() -> str:
        raise AssertionError("nobody asked for a status")

    async with trio.open_nursery() as nursery:
        notifier: Notifier = await nursery.start(serve_notify, None, unexpected, always_alive)
        await trio.testing.wait_all_tasks_blocked()
        assert not nursery.child_tasks
    notifier.ready()
    notifier.stopping(1.0)
    assert notifier.phase is Phase.STOPPING


# --- readiness and stop


async def test_ready_is_told_once_and_not_before(systemd: Systemd, autojump_clock: MockClock) -> None:
    async with serving(systemd.target()) as notifier:
        await trio.sleep(5)
        assert "READY=1" not in systemd.take()
        notifier.ready()
        notifier.ready()
        assert systemd.take() == ["READY=1"], "at once, not with the next tick"
        await trio.sleep(5)
        assert systemd.take() == []


async def test_a_stop_says_how_long_it_takes_and_no_readiness_follows(
    systemd: Systemd, autojump_clock: MockClock
) -> None:
    async with serving(systemd.target()) as notifier:
        systemd.take()
        notifier.stopping(42.5)
        notifier.stopping(1.0)
        notifier.ready()
        assert systemd.take() == ["STOPPING=1\nEXTEND_TIMEOUT_USEC=42500000"]
        await trio.sleep(60)
        assert systemd.take() == [], "a stop that hangs is not extended"


# --- more time while starting


async def test_the_start_is_extended_in_time_until_ready(systemd: Systemd, autojump_clock: MockClock) -> None:
    sent_at = []
    async with serving(systemd.target()) as notifier:
        for _ in range(1000):
            sent_at += [trio.current_time()] * systemd.take().count(EXTENSION)
            await trio.sleep(0.1)
        gaps = [after - before for before, after in itertools.pairwise(sent_at)]
        assert len(gaps) >= 8
        assert EXTEND_EVERY_S - 0.2 < min(gaps) <= max(gaps) < EXTENSION_S / 2
        notifier.ready()
        systemd.take()
        await trio.sleep(100)
        assert systemd.take() == []


async def test_a_start_is_not_extended_for_ever(systemd: Systemd, autojump_clock: MockClock) -> None:
    extensions = 0
    async with serving(systemd.target()):
        for _ in range(int(START_LIMIT_S) // 10 + 10):
            await trio.sleep(10)
            extensions += len(systemd.take())
        assert START_LIMIT_S / 10 * 0.8 < extensions <= START_LIMIT_S / 10
        await trio.sleep(100)
        assert systemd.take() == []


# --- status


async def test_the_status_is_told_when_it_changes_and_at_most_each_second(
    systemd: Systemd, autojump_clock: MockClock
) -> None:
    status = "loading"
    async with serving(systemd.target(), lambda: status) as notifier:
        notifier.ready()
        assert systemd.take() == ["STATUS=loading", EXTENSION, "READY=1"]
        await trio.sleep(10)
        assert systemd.take() == []
        for number in range(30):  # changes each 0.1 s for 3 s
            status = f"{number} jobs"
            await trio.sleep(TICK_S / 10)
        await trio.sleep(2 * TICK_S)
        told = systemd.take()
        assert told[-1] == "STATUS=29 jobs"
        assert 3 <= len(told) <= 5


async def test_a_status_cannot_hold_another_assignment_or_fill_the_screen(
    systemd: Systemd, autojump_clock: MockClock
) -> None:
    async with serving(systemd.target(), lambda: "failed:\nREADY=1\r\n" + "x" * 10_000 + "\udcff"):
        text = systemd.take()[0]
    assert text.startswith("STATUS=failed: READY=1 xxx")
    assert "\n" not in text
    assert len(text) == len("STATUS=") + MAX_STATUS_CHARACTERS


# --- watchdog


@pytest.mark.parametrize("has_pid", [True, False])
async def test_the_watchdog_is_fed_each_half_of_its_period(
    systemd: Systemd, autojump_clock: MockClock, has_pid: bool
) -> None:
    environ = {"WATCHDOG_PID": str(os.getpid())} if has_pid else {}
    async with serving(systemd.target(WATCHDOG_USEC="4000000", **environ)):
        assert "WATCHDOG=1" in systemd.take(), "the first one at once"
        await trio.sleep(0.5)
        for _ in range(5):
            await trio.sleep(2)
            assert systemd.take().count("WATCHDOG=1") == 1


async def test_the_watchdog_starves_while_we_are_not_alive(
    systemd: Systemd, autojump_clock: MockClock, log_output: LogCapture
) -> None:
    is_alive = False

    async def alive() -> bool:
        return is_alive

    async with serving(systemd.target(WATCHDOG_USEC="4000000"), alive=alive):
        await trio.sleep(20)
        assert "WATCHDOG=1" not in systemd.take()
        assert [event["event"] for event in log_output.entries] == ["notify.watchdog_withheld"], "told once"
        is_alive = True
        await trio.sleep(4)
        assert "WATCHDOG=1" in systemd.take()


async def test_the_watchdog_starves_while_the_question_hangs_and_the_status_goes_on(
    systemd: Systemd, autojump_clock: MockClock
) -> None:
    hangs = True

    async def alive() -> bool:
        if hangs:
            await trio.sleep_forever()
        return True

    async with serving(systemd.target(WATCHDOG_USEC="4000000"), lambda: f"{trio.current_time():.0f}", alive):
        for _ in range(10):
            await trio.sleep(2)
            texts = systemd.take()
            assert "WATCHDOG=1" not in texts
            assert any(text.startswith("STATUS=") for text in texts)
        hangs = False
        await trio.sleep(4.5)
        assert "WATCHDOG=1" in systemd.take()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": str(os.getppid())},
        {"WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "x"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-5"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "٣"},
    ],
)
def test_there_is_no_watchdog_unless_it_is_ours(environ: dict[str, str]) -> None:
    assert read_notify({"NOTIFY_SOCKET": "/run/x", **environ}) == NotifyTarget(address=b"/run/x")


def test_in_a_one_file_build_the_watchdog_of_the_unpacking_parent_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    environ = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getppid())}
    assert read_notify(environ) == NotifyTarget(address=b"\0x", watchdog_s=1.5)


# --- a receiver in trouble


async def test_readiness_and_stop_arrive_in_order_once_a_full_receiver_is_read_again(
    systemd: Systemd, autojump_clock: MockClock
) -> None:
    async with serving(systemd.target()) as notifier:
        full = 0
        while notifier.send("X=1"):
            full += 1
        notifier.ready()
        notifier.stopping(1.0)
        await trio.sleep(10)
        assert systemd.take()[-full:] == ["X=1"] * full, "and nothing blocked meanwhile"
        await trio.sleep(2 * TICK_S)
        assert systemd.take() == ["READY=1", "STOPPING=1\nEXTEND_TIMEOUT_USEC=1000000"]


async def test_readiness_arrives_although_systemd_was_away(
    tmp_path: Path, autojump_clock: MockClock, log_output: LogCapture
) -> None:
    value = str(tmp_path / "late")
    async with serving(NotifyTarget(address=os.fsencode(value))) as notifier:
        notifier.ready()
        await trio.sleep(60)
        assert [event["event"] for event in log_output.entries] == ["notify.failed"], "told once, not each second"
        with bound(value) as sock:
            await trio.sleep(2 * TICK_S)
            assert Systemd(sock, value).take() == ["READY=1"]


async def test_an_address_that_is_too_long_harms_nobody(autojump_clock: MockClock, log_output: LogCapture) -> None:
    async with serving(NotifyTarget(address=b"/" + b"x" * 500)) as notifier:
        notifier.ready()
        await trio.sleep(10)
    assert [event["event"] for event in log_output.entries] == ["notify.failed"]
