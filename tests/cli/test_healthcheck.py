"""``comfyd healthcheck``: 0 if the daemon of this environment is well, 1 and a line for everything else."""

import argparse
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio
from daemon_support import Daemon, free_port, start_daemon
from fetch_servers import self_signed
from webhook_receiver import Cut, Reply, webhook_receiver

from comfyd.cli.healthcheck import Unreachable, add_parser, address_of, healthcheck_command


@attrs.frozen
class Run:
    code: int
    err: str


Command = Callable[..., Awaitable[Run]]

WELL = Reply(body=b'{"version": "1", "status": "healthy"}')


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``comfyd healthcheck`` with these arguments and variables, in a thread of this process."""

    async def run(*arguments: str, **environ: object) -> Run:
        parser = argparse.ArgumentParser(prog="comfyd")
        add_parser(parser.add_subparsers(dest="command"))
        options = parser.parse_args(["healthcheck", *arguments])
        variables = {name: str(value) for name, value in environ.items()}
        with trio.fail_after(20):
            code = await trio.to_thread.run_sync(healthcheck_command, options, variables)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == (code != 0), "one line where it is not well, and else none"
        return Run(code, captured.err)

    return run


async def test_a_daemon_that_runs_is_healthy_and_ready(shared_daemon: Daemon, command: Command) -> None:
    assert await command(HOST="127.0.0.1", PORT=shared_daemon.port) == Run(0, "")
    assert await command("--ready", HOST="127.0.0.1", PORT=shared_daemon.port) == Run(0, "")


async def test_a_daemon_without_its_engine_is_not_and_says_why(tmp_path: Path, command: Command) -> None:
    cmd = f"{sys.executable} -c 'import time; time.sleep(1000)'"
    daemon = start_daemon(tmp_path, cmd=cmd, environ={"STARTUP_CHECK_MAX_TRIES": "100"})
    try:
        port = await trio.to_thread.run_sync(lambda: daemon.port)
        unhealthy = await command(PORT=port)
        assert unhealthy == Run(1, "comfyd healthcheck: GET /health answered 503: not healthy\n")
        assert (await command("--ready", PORT=port)).err.startswith(
            "comfyd healthcheck: GET /ready answered 503: the engine "
        )
        assert await trio.to_thread.run_sync(daemon.stop) == 0
    finally:
        daemon.close()


@pytest.mark.parametrize("host", ["::", "0.0.0.0", "", "127.0.0.1", "localhost"])
async def test_any_address_to_listen_on_is_asked_on_this_machine(command: Command, host: str) -> None:
    async with webhook_receiver(WELL) as receiver:
        assert await command(HOST=host, PORT=receiver.port) == Run(0, "")
        (request,) = receiver.received
        assert (request.method, request.path, request.headers["host"]) == ("GET", "/health", "localhost")


async def test_the_answer_decides_and_its_reason_is_told_on_one_line(command: Command) -> None:
    answer = {"version": "1", "status": "not ready", "reason": "busy\n\x1b[2J" + "x" * 5000}
    async with webhook_receiver(Reply(status=503, body=json.dumps(answer).encode())) as receiver:
        run = await command("--ready", PORT=receiver.port)
        assert run.code == 1
        assert run.err.startswith("comfyd healthcheck: GET /ready answered 503: busy  [2Jxxx")
        assert len(run.err) < 600
        assert receiver.received[0].path == "/ready"


@pytest.mark.parametrize("status", [200, 404, 503])
@pytest.mark.parametrize("body", [b"ok", b"[]", b"", b"[" * 60_000, b'{"status": "healthy"}'], ids=repr)
async def test_somebody_else_on_the_port_is_not_the_daemon(command: Command, status: int, body: bytes) -> None:
    async with webhook_receiver(Reply(status=status, body=body)) as receiver:
        run = await command(PORT=receiver.port)
        assert run.code == 1
        assert f"GET /health answered {status}, and not as comfyd does" in run.err


async def test_a_body_without_an_end_is_cut(command: Command) -> None:
    async with webhook_receiver(Reply(endless=True)) as receiver:
        assert (await command(PORT=receiver.port)).code == 1


async def test_nobody_at_the_port_is_told(command: Command) -> None:
    port = free_port()
    run = await command(PORT=port)
    assert run == Run(1, f"comfyd healthcheck: port {port} of 127.0.0.1: Connection refused\n")


async def test_one_who_never_answers_is_given_up(command: Command) -> None:
    async with webhook_receiver(Reply(never=True)) as receiver:
        run = await command("--timeout", "0.2", PORT=receiver.port)
        assert run == Run(1, f"comfyd healthcheck: no answer on port {receiver.port} within 0.2 s\n")


@pytest.mark.parametrize("cut", list(Cut))
async def test_a_connection_that_breaks_off_is_told(command: Command, cut: Cut) -> None:
    async with webhook_receiver(Reply(cut=cut)) as receiver:
        assert (await command(PORT=receiver.port)).code == 1


@asynccontextmanager
async def garbage_server(greeting: bytes) -> AsyncIterator[int]:
    async def greet(stream: trio.SocketStream) -> None:
        try:
            await stream.send_all(greeting)
            await stream.receive_some()
        except trio.BrokenResourceError:
            pass  # it may reset the connection once it has seen what this is

    async with trio.open_nursery() as nursery:
        listeners: list[trio.SocketListener] = await nursery.start(partial(trio.serve_tcp, greet, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel("the test is over")


@pytest.mark.parametrize(
    "greeting", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\x15\x03\x01\x00\x02\x02\x46", b"HTTP/1.1 abc\r\n\r\n"]
)
async def test_what_speaks_no_http_is_not_the_daemon(command: Command, greeting: bytes) -> None:
    async with garbage_server(greeting) as port:
        run = await command(PORT=port)
        assert run.code == 1
        assert "speaks no HTTP; does it speak TLS? TLS_CERT_FILE is not set here" in run.err


async def test_with_tls_the_name_of_the_certificate_does_not_matter_here(command: Command, tmp_path: Path) -> None:
    context, certificate = self_signed(tmp_path)
    async with webhook_receiver(WELL, tls=context) as receiver:
        assert await command(PORT=receiver.port, TLS_CERT_FILE=certificate) == Run(0, "")
    async with webhook_receiver() as plain:
        run = await command(PORT=plain.port, TLS_CERT_FILE=certificate)
        assert run.code == 1
        assert f"port {plain.port} of 127.0.0.1: " in run.err


@pytest.fixture
def other_address(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that is not known for loopback, though it leads there."""
    real = socket.getaddrinfo

    def resolve(host: object, *arguments: object, **named: object) -> object:
        return real("127.0.0.1" if host == "machine.example" else host, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return "machine.example"


async def test_away_from_loopback_only_the_daemons_own_certificate_is_trusted(
    command: Command, tmp_path: Path, other_address: str
) -> None:
    context, certificate = self_signed(tmp_path)
    another = tmp_path / "another.pem"
    await trio.run_process(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=another", "-keyout", str(tmp_path / "key"), "-out", str(another)),
        ],
        capture_stderr=True,
    )
    async with webhook_receiver(WELL, tls=context) as receiver:
        assert await command(HOST=other_address, PORT=receiver.port, TLS_CERT_FILE=certificate) == Run(0, "")
        wrong = await command(HOST=other_address, PORT=receiver.port, TLS_CERT_FILE=another)
        assert wrong.code == 1
        assert "verify failed" in wrong.err.lower()
        missing = await command(HOST=other_address, PORT=receiver.port, TLS_CERT_FILE=tmp_path / "none.pem")
        assert missing == Run(1, "comfyd healthcheck: TLS_CERT_FILE cannot be read: No such file or directory\n")
        nonsense = await command(HOST=other_address, PORT=receiver.port, TLS_CERT_FILE=__file__)
        assert nonsense.err.startswith("comfyd healthcheck: TLS_CERT_FILE cannot be read: ")


@pytest.mark.parametrize("port", ["0", "http", "-1", "65536", "٣", "99999999999999999999"])
async def test_a_port_that_says_nothing_is_told(command: Command, port: str) -> None:
    run = await command(PORT=port)
    assert run.code == 1
    assert run.err.startswith("comfyd healthcheck: PORT is ")


@pytest.mark.parametrize("host", ["a b", "a\nb", "x" * 64 + ".example", "a..b"])
async def test_a_host_that_is_none_is_told(command: Command, host: str) -> None:
    run = await command(HOST=host, PORT=free_port())
    assert run == Run(1, "comfyd healthcheck: HOST is neither an address nor a name\n")


def test_empty_variables_count_as_unset() -> None:
    assert address_of({}) == address_of({"HOST": "", "PORT": ""}) == ("127.0.0.1", 3000)
    assert address_of({"HOST": " 10.0.0.7 ", "PORT": "+80"}) == ("10.0.0.7", 80)
    with pytest.raises(Unreachable):
        address_of({"PORT": "1 2"})


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon", "4000"])
async def test_a_timeout_that_makes_no_sense_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["healthcheck", f"--timeout={seconds}"])
    assert "--timeout" in capsys.readouterr().err


def test_it_loads_next_to_nothing() -> None:
    """It runs every few seconds beside a busy GPU; the configuration alone would take it half a second."""
    program = (
        "import argparse, sys; from comfyd.cli.healthcheck import add_parser, healthcheck_command\n"
        "parser = argparse.ArgumentParser(); add_parser(parser.add_subparsers())\n"
        "code = healthcheck_command(parser.parse_args(['healthcheck']), {'PORT': sys.argv[1]})\n"
        "heavy = ('attrs', 'trio', 'httpx', 'structlog', 'msgspec', 'comfyd.config', 'comfyd.errors')\n"
        "print(code, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(free_port())], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.strip() == "1 []"
