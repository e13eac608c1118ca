"""What the tests of storage share: moto and Swift as child processes, and a proxy to them that misbehaves."""

import configparser
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from comfyd.storage import S3Config, S3Store

MIB: Final = 1 << 20

QUICK: Final = S3Config(connect_timeout_s=5, read_timeout_s=5, first_delay_s=0.02, max_delay_s=0.05)
"""As in production, but that nothing waits long before it tries again."""

# --- peers ---------------------------------------------------------------------------------------------------------

_MOTO: Final = """
import os, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # ends when the test session does, however that ends
os._exit(0)
"""


@attrs.frozen(kw_only=True)
class Peer:
    """A server that speaks S3, and what it wants to see."""

    port: int
    access_key: str = "access"
    secret_key: str = "secret"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, **more: str) -> dict[str, str]:
        """The variables by which boto3 finds it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            **more,
        }

    @contextmanager
    def client(self) -> Iterator[Any]:
        """A boto3 client of our own, to look at what is there."""
        import boto3.session
        from botocore.config import Config

        client = boto3.session.Session(
            aws_access_key_id=self.access_key, aws_secret_access_key=self.secret_key, region_name="us-east-1"
        ).client("s3", endpoint_url=self.url, config=Config(signature_version="s3v4", s3={"addressing_style": "path"}))
        with closing(client):
            yield client


@contextmanager
def running_moto(folder: Path) -> Iterator[Peer]:
    """Moto's server: the whole of S3's protocol in memory, but that it checks no signature."""
    small_parts = os.environ | {"S3_UPLOAD_PART_MIN_SIZE": "1000"}  # 5 MB in S3, which would make slow tests
    with (folder / "moto.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _MOTO],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,
            env=small_parts,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        line = process.stdout.readline()
        try:
            if not line.strip().isdigit():
                raise RuntimeError(f"moto did not start:\n{(folder / 'moto.log').read_text()[-2000:]}")
            yield Peer(port=int(line))
        finally:
            process.kill()
            process.wait()


# The environment that may hold settings of the machine on which the tests run.
NO_SETTINGS: Final = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "*",
}


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """*environ* without any way to S3 or a proxy."""
    proxies = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}
    kept = {k: v for k, v in environ.items() if not k.startswith("AWS_") and k.lower() not in proxies}
    return {**kept, **NO_SETTINGS}


@contextmanager
def open_store(config: S3Config = QUICK) -> Iterator[S3Store]:
    """A store whose connections are closed at the end."""
    with closing(S3Store(config)) as store:
        yield store


# --- Swift ---------------------------------------------------------------------------------------------------------

SWIFT_MISSING: Final = "needs OpenStack Swift: apt-get install swift-proxy swift-account swift-container swift-object"


def swift_is_there() -> bool:
    """Whether Swift can be started: its programs, and root, as whom its Debian packages run without more set-up."""
    return shutil.which("swift-proxy-server") is not None and os.geteuid() == 0


_SWIFT_KEY: Final = "comfyd:tester"
_SWIFT_SECRET: Final = "a-secret-that-is-checked"


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago: Swift's rings hold port numbers, so they must be known before it starts."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def running_swift(folder: Path) -> Iterator[Peer]:
    """OpenStack Swift with its s3api: one replica on a local folder. It checks signatures, and stores for real."""
    proxy_port, *storage_ports = _free_ports(4)
    ports = dict(zip(("account", "container", "object"), storage_ports, strict=True))
    etc, disk = folder / "etc", folder / "devices" / "disk"
    etc.mkdir()
    disk.mkdir(parents=True)
    _write_ini(etc / "swift.conf", {"swift-hash": {"swift_hash_path_prefix": "a", "swift_hash_path_suffix": "b"}})
    for name, port in ports.items():
        ring = etc / f"{name}.builder"
        for words in (("create", "4", "1", "1"), ("add", f"r1z1-127.0.0.1:{port}/disk", "1"), ("rebalance",)):
            _run_swift_tool(["swift-ring-builder", str(ring), *words])
        _write_ini(etc / f"{name}-server.conf", _storage_server(name, port, etc, disk.parent))
    _write_ini(etc / "proxy-server.conf", _proxy_server(proxy_port, etc))
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "swift.log").open("wb"))
        servers = []
        for name in (*ports, "proxy"):
            server = subprocess.Popen(
                [f"swift-{name}-server", str(etc / f"{name}-server.conf"), "-v"],
                stdout=log,
                stderr=log,
                env=_system_environment(),
                start_new_session=True,  # it kills its whole group when it stops
            )
            stack.callback(_stop_group, server)
            servers.append(server)
        _wait_answering(proxy_port, servers, folder / "swift.log")
        yield Peer(port=proxy_port, access_key=_SWIFT_KEY, secret_key=_SWIFT_SECRET)


def _system_environment() -> dict[str, str]:
    """For programs of the system's Python: nothing that leads it to the packages of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _write_ini(path: Path, sections: Mapping[str, Mapping[str, str]]) -> None:
    ini = configparser.RawConfigParser()
    ini.read_dict(sections)
    with path.open("w") as file:
        ini.write(file)


def _run_swift_tool(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=_system_environment())
    if done.returncode not in (0, 1):  # 1 is its code for "done, with a warning": one replica is few
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def _storage_server(name: str, port: int, etc: Path, devices: Path) -> dict[str, dict[str, str]]:
    return {
        "DEFAULT": {
            "bind_ip": "127.0.0.1",
            "bind_port": str(port),
            "user": "root",
            "swift_dir": str(etc),
            "devices": str(devices),
            "mount_check": "false",
            "workers": "0",
        },
        "pipeline:main": {"pipeline": f"{name}-server"},
        f"app:{name}-server": {"use": f"egg:swift#{name}", "allow_versions": "true"},
    }


def _proxy_server(port: int, etc: Path) -> dict[str, dict[str, str]]:
    user = _SWIFT_KEY.replace(":", "_")
    return {
        "DEFAULT": {
            "bind_ip": "127.0.0.1",
            "bind_port": str(port),
            "user": "root",
            "swift_dir": str(etc),
            "workers": "0",
        },
        "pipeline:main": {
            "pipeline": "catch_errors gatekeeper cache listing_formats bulk s3api tempauth slo dlo proxy-server"
        },
        "filter:catch_errors": {"use": "egg:swift#catch_errors"},
        "filter:gatekeeper": {"use": "egg:swift#gatekeeper"},
        "filter:cache": {"use": "egg:swift#memcache", "memcache_servers": "127.0.0.1:1"},
        "filter:listing_formats": {"use": "egg:swift#listing_formats"},
        "filter:bulk": {"use": "egg:swift#bulk"},
        "filter:s3api": {"use": "egg:swift#s3api", "location": "us-east-1", "min_segment_size": "1048576"},
        "filter:tempauth": {"use": "egg:swift#tempauth", f"user_{user}": f"{_SWIFT_SECRET} .admin"},
        "filter:slo": {"use": "egg:swift#slo"},
        "filter:dlo": {"use": "egg:swift#dlo"},
        "app:proxy-server": {
            "use": "egg:swift#proxy",
            "allow_account_management": "true",
            "account_autocreate": "true",
        },
    }


def _wait_answering(port: int, servers: list["subprocess.Popen[bytes]"], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and all(server.poll() is None for server in servers):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)  # a foreign program: it has no event to wait for
    raise RuntimeError(f"Swift did not start:\n{log.read_text()[-3000:]}")


def _stop_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- a proxy that misbehaves ---------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Asked:
    """A request as the proxy saw it. *target* is path and query, as they were sent. *nth* counts from 1, over all."""

    nth: int
    method: str
    target: str
    headers: Mapping[str, str]

    @property
    def length(self) -> int:
        return int(self.headers.get("content-length", "0"))


@attrs.frozen(kw_only=True)
class Reply:
    """Answer in the server's place, at once."""

    status: int
    code: str = ""
    headers: Mapping[str, str] = attrs.field(factory=dict)
    body: bytes | None = None

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{self.code}</Code>'
            "<Message>AKIDSECRET wants arn:aws:iam::1234:user/x</Message></Error>"
        ).encode()


@attrs.frozen(kw_only=True)
class ResetInBody:
    """Take so many bytes of the request's body, then reset the connection."""

    after_bytes: int


@attrs.frozen(kw_only=True)
class Hang:
    """Take the request's head, and never do anything again. *reached* is set when it begins."""

    reached: trio.Event = attrs.field(factory=trio.Event)


@attrs.frozen(kw_only=True)
class CutAnswer:
    """Forward the request, and reset the connection after so many bytes of the answer, its head included."""

    after_bytes: int = 0


@attrs.frozen(kw_only=True)
class StallAnswer:
    """Forward the request, and stop after so many bytes of the answer; *reached* is set then."""

    after_bytes: int
    reached: trio.Event = attrs.field(factory=trio.Event)


@attrs.frozen(kw_only=True)
class Trickle:
    """Forward body and answer in little pieces, with a wait after each. *reached* is set after *mark_bytes* of one."""

    piece_bytes: int
    wait_s: float
    mark_bytes: int = 0
    reached: trio.Event = attrs.field(factory=trio.Event)


Fault = Reply | ResetInBody | Hang | CutAnswer | StallAnswer | Trickle
Plan = Callable[[Asked], Fault | None]


@attrs.define(eq=False)
class FaultyProxy:
    """A running proxy. *plan* says what to do with each request; None is to forward it."""

    port: int
    plan: Plan
    asked: list[Asked] = attrs.field(factory=list)

    def requests(self, method: str) -> list[Asked]:
        return [each for each in self.asked if each.method == method]


@asynccontextmanager
async def open_proxy(peer: Peer, plan: Plan = lambda _: None) -> AsyncIterator[tuple[FaultyProxy, Peer]]:
    """Put a proxy in front of *peer*; yields it, and *peer* as seen through it. One request per connection."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # so that a slow proxy is felt
    port = listener.socket.getsockname()[1]
    proxy = FaultyProxy(port=port, plan=plan)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, partial(_forward, proxy, peer.port), [listener])
        yield proxy, attrs.evolve(peer, port=port)
        nursery.cancel_scope.cancel("the test is over")


async def _forward(proxy: FaultyProxy, upstream_port: int, client: trio.SocketStream) -> None:
    try:
        async with client:
            await _handle(proxy, upstream_port, client)
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # either end may go away at any time


async def _handle(proxy: FaultyProxy, upstream_port: int, client: trio.SocketStream) -> None:
    head, rest = await _read_head(client)
    if not head:
        return
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
    asked = Asked(nth=len(proxy.asked) + 1, method=method, target=target, headers=headers)
    proxy.asked.append(asked)
    fault = proxy.plan(asked)
    if isinstance(fault, Reply):
        await _reply(client, fault, asked)
    elif isinstance(fault, Hang):
        fault.reached.set()
        while await client.receive_some():  # ends when the client leaves
            pass
    elif isinstance(fault, ResetInBody):
        await _reset_in_body(client, fault, headers, rest)
    else:
        kept = [line for line in lines if line and not line.lower().startswith("connection:")]
        one_only = "\r\n".join((first, *kept, "Connection: close", "", "")).encode("latin-1")
        await _pump(client, upstream_port, one_only, rest, asked.length, fault)


async def _read_head(client: trio.SocketStream) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        received = await client.receive_some()
        if not received:
            return b"", b""
        data += received
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


async def _reply(client: trio.SocketStream, reply: Reply, asked: Asked) -> None:
    content = b"" if asked.method == "HEAD" else reply.content()
    headers = {"Content-Type": "application/xml", **reply.headers, "Content-Length": str(len(content))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    await client.send_all(f"HTTP/1.1 {reply.status} X\r\nConnection: close\r\n{lines}\r\n".encode() + content)
    await client.send_eof()
    while await client.receive_some():  # closing with bytes unread would reset, and could take the answer with it
        pass


async def _reset_in_body(
    client: trio.SocketStream, fault: ResetInBody, headers: Mapping[str, str], rest: bytes
) -> None:
    if "expect" in headers:
        await client.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
    taken = len(rest)
    while taken < fault.after_bytes:
        received = await client.receive_some(min(65536, fault.after_bytes - taken))
        if not received:
            return
        taken += len(received)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _pump(
    client: trio.SocketStream, upstream_port: int, head: bytes, rest: bytes, length: int, fault: Fault | None
) -> None:
    """Forward one request with *length* bytes of body, and its answer until the server closes."""
    upstream = await trio.open_tcp_stream("127.0.0.1", upstream_port)
    piece_bytes = fault.piece_bytes if isinstance(fault, Trickle) else 65536

    async def pass_on(data: bytes, to: trio.SocketStream, passed: int) -> int:
        await to.send_all(data)
        if isinstance(fault, Trickle):
            if passed + len(data) >= fault.mark_bytes:
                fault.reached.set()
            await trio.sleep(fault.wait_s)
        return passed + len(data)

    async with upstream, trio.open_nursery() as nursery:

        async def forward_body() -> None:
            await upstream.send_all(head)
            passed = await pass_on(rest, upstream, 0)
            while passed < length:
                data = bytes(await client.receive_some(piece_bytes))
                if not data:
                    nursery.cancel_scope.cancel("the client left")
                    return
                passed = await pass_on(data, upstream, passed)

        async def forward_answer() -> None:
            passed = 0
            while data := bytes(await upstream.receive_some(piece_bytes)):
                if isinstance(fault, CutAnswer | StallAnswer) and passed + len(data) >= fault.after_bytes:
                    await client.send_all(data[: fault.after_bytes - passed])
                    if isinstance(fault, CutAnswer):
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    else:
                        fault.reached.set()
                        while await client.receive_some():  # until the client leaves
                            pass
                    break
                passed = await pass_on(data, client, passed)
            nursery.cancel_scope.cancel("answered")

        nursery.start_soon(forward_body)
        nursery.start_soon(forward_answer)
