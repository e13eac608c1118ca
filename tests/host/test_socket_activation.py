"""Taking over listening sockets: from systemd's own tool, from a launcher of ours, and what must be refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from process_support import PROGRAMS

from comfyd.errors import StartupFailed
from comfyd.host.socket_activation import FIRST_FD, MAX_FDS, take_inherited_sockets

SHOW: Final = (sys.executable, str(PROGRAMS / "show_inherited_sockets.py"))
STANDARD_FDS: Final = "['0', '1', '2', '3']"  # 3 is what listdir itself opens


# --- whole processes


@asynccontextmanager
async def running(*argv: str) -> AsyncIterator[trio.Process]:
    """Run a program with its output in a pipe; kill it at the end if it has not ended."""
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(partial(trio.run_process, argv, stdout=subprocess.PIPE, check=False))
            yield process
            await process.wait()
            assert process.returncode == 0


async def read_report(process: trio.Process) -> dict[str, Any]:
    assert process.stdout is not None
    text = b""
    while not text.endswith(b"\n"):
        piece = await process.stdout.receive_some()
        assert piece, "it ended without a report"
        text += piece
    report: dict[str, Any] = json.loads(text)
    return report


async def ask(address: Any) -> str:
    """Connect, and return what the program says before it closes."""
    if isinstance(address, str):
        return await read_to_the_end(await trio.open_unix_socket(address))
    return await read_to_the_end(await trio.open_tcp_stream(address[0], address[1]))


async def read_to_the_end(stream: trio.SocketStream) -> str:
    async with stream:
        return b"".join([piece async for piece in stream]).decode()


async def connect_once_it_listens(path: str) -> trio.SocketStream:
    """Try until it works: the tool says that it listens to its terminal, and not to us."""
    while True:
        try:
            return await trio.open_unix_socket(path)
        except OSError:
            await trio.sleep(0.01)


async def test_sockets_of_each_family_are_taken_over_and_kept_from_children(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    async with running(sys.executable, "-S", str(PROGRAMS / "pass_sockets.py"), path, *SHOW) as process:
        report = await read_report(process)
        sockets = report["sockets"]
        assert [(each["name"], each["family"], each["tcp"]) for each in sockets] == [
            ("v4", "AF_INET", True),
            *([("v6", "AF_INET6", True)] if socket.has_dualstack_ipv6() else []),
            ("unknown", "AF_UNIX", False),
        ]
        assert [each["fd"] for each in sockets] == list(range(FIRST_FD, FIRST_FD + len(sockets)))
        assert not any(each["blocking"] for each in sockets)
        assert report["variables"] == []
        assert report["childs_fds"] == STANDARD_FDS
        for each in sockets:
            assert await ask(each["address"]) == each["name"]


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="there is no systemd-socket-activate")
async def test_systemds_own_tool_is_understood(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    environ = [f"--setenv={name}={os.environ[name]}" for name in ("PATH", "PYTHONPATH") if name in os.environ]
    launcher = ("systemd-socket-activate", f"--listen={path}", "--fdname=http", *environ)
    async with running(*launcher, *SHOW) as process, trio.open_nursery() as nursery:

        async def expect_answer() -> None:
            stream = await connect_once_it_listens(path)
            assert await read_to_the_end(stream) == "http", "the connection that woke the program waited for it"

        nursery.start_soon(expect_answer)
        report = await read_report(process)
        assert [(each["name"], each["family"]) for each in report["sockets"]] == [("http", "AF_UNIX")]
        assert report["variables"] == []


# --- what is passed, in this process


@pytest.fixture
def passed() -> Iterator[list[int]]:
    """Descriptors that a test passes to itself; closed at the end, whoever owns them then."""
    fds: list[int] = []
    yield fds
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


def environ_for(count: int | str, *, pid: int | str | None = None) -> dict[str, str]:
    return {"LISTEN_FDS": str(count), "LISTEN_PID": str(os.getpid() if pid is None else pid), "OTHER": "stays"}


def test_nothing_is_passed_when_there_are_no_variables() -> None:
    environ = {"OTHER": "stays"}
    assert take_inherited_sockets(environ) == ()
    assert environ == {"OTHER": "stays"}


@pytest.mark.parametrize("pid", [os.getppid(), "", "me", "-1", "²"])
def test_another_processs_sockets_are_left_alone_and_their_variables_removed(pid: int | str, passed: list[int]) -> None:
    passed.append(socket.create_server(("127.0.0.1", 0)).detach())
    os.set_inheritable(passed[0], True)
    environ = environ_for(1, pid=pid)
    assert take_inherited_sockets(environ, first_fd=passed[0]) == ()
    assert environ == {"OTHER": "stays"}
    assert os.get_inheritable(passed[0])


@pytest.mark.parametrize("count", ["x", "-1", "1.5", str(MAX_FDS + 1), "9" * 30])
def test_a_count_that_is_none_is_a_failure(count: str) -> None:
    with pytest.raises(StartupFailed, match="LISTEN_FDS="):
        take_inherited_sockets(environ_for(count))


def test_a_count_of_zero_is_no_sockets() -> None:
    assert take_inherited_sockets(environ_for(0)) == ()


def test_a_descriptor_that_is_not_open_is_a_failure(passed: list[int]) -> None:
    closed = os.dup(0)
    os.close(closed)
    with pytest.raises(StartupFailed, match=f"descriptor {closed}, which is not open"):
        take_inherited_sockets(environ_for(1), first_fd=closed)


def _file() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def _datagram() -> int:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock.detach()


def _connection() -> int:
    """What a socket unit with Accept=yes passes."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (_file, "is not a socket"),
        (_datagram, "is not a TCP or Unix stream socket"),
        (_connection, "does not listen; .* Accept=no"),
    ],
)
def test_what_is_no_listening_socket_is_refused_and_not_closed(
    make: Any, complaint: str, passed: list[int], recwarn: pytest.WarningsRecorder
) -> None:
    passed.append(make())
    os.set_inheritable(passed[0], True)
    with pytest.raises(StartupFailed, match=complaint):
        take_inherited_sockets(environ_for(1), first_fd=passed[0])
    assert not os.get_inheritable(passed[0])
    os.fstat(passed[0])  # raises if it is closed
