"""HTTP servers on loopback that behave as badly as the internet does, one behaviour for each path."""

import gzip
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio

Answer = Callable[[trio.abc.Stream], Awaitable[None]]


@attrs.define(eq=False)
class BadServer:
    """What :func:`bad_server` started. *requests* are the request lines, *heads* the whole heads, in order."""

    port: int
    scheme: str = "http"
    requests: list[str] = attrs.field(factory=list)
    heads: list[str] = attrs.field(factory=list)
    asked: trio.Event = attrs.field(factory=trio.Event)
    open_connections: int = 0
    all_closed: trio.Event = attrs.field(factory=trio.Event)

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        """The URL of *path*."""
        return f"{self.scheme}://{host}:{self.port}{path}"

    @property
    def allow(self) -> str:
        """An URL_ALLOW entry for this server only."""
        return f"127.0.0.1:{self.port}"


@asynccontextmanager
async def bad_server(
    answers: Mapping[str, Answer] | Answer, tls: ssl.SSLContext | None = None
) -> AsyncIterator[BadServer]:
    """Serve *answers* by path (or one for all) until the block is left. Each connection takes one request."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    server = BadServer(port=listeners[0].socket.getsockname()[1], scheme="https" if tls else "http")

    async def serve(stream: trio.SocketStream) -> None:
        server.open_connections += 1
        server.all_closed = trio.Event()
        connection = trio.SSLStream(stream, tls, server_side=True, https_compatible=True) if tls else stream
        try:
            head = await _read_head(connection)
            if not head:
                return
            server.heads.append(head)
            server.requests.append(head.partition("\r\n")[0])
            server.asked.set()
            path = head.split(" ", 2)[1].partition("?")[0]
            await (answers if callable(answers) else answers[path])(connection)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client hung up, which is what many tests are about
        finally:
            server.open_connections -= 1
            if server.open_connections == 0:
                server.all_closed.set()
            await trio.aclose_forcefully(connection)

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, serve, listeners))
        yield server
        nursery.cancel_scope.cancel("the test is over")


async def _read_head(stream: trio.abc.Stream) -> str:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        data = await stream.receive_some(65536)
        if not data:
            return ""
        head += data
    return head.decode("latin-1")


def raw(*pieces: bytes) -> Answer:
    """Send *pieces* as they are, and close."""

    async def answer(stream: trio.abc.Stream) -> None:
        for piece in pieces:
            await stream.send_all(piece)

    return answer


def head(status: str = "200 OK", **headers: str) -> bytes:
    """An answer's head; underscores of header names stand for hyphens."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def whole(body: bytes, status: str = "200 OK", **headers: str) -> Answer:
    """A proper answer."""
    return raw(head(status, Content_Length=str(len(body)), Connection="close", **headers) + body)


def redirect(location: str, status: str = "302 Found") -> Answer:
    """A redirect."""
    return whole(b"", status, Location=location)


def zipped(body: bytes) -> Answer:
    """A proper answer that is compressed, though nobody asked for that."""
    return whole(gzip.compress(body), Content_Encoding="gzip")


def silent() -> Answer:
    """Take the request, and say nothing until the client hangs up."""
    return then_hang()


def then_hang(*pieces: bytes) -> Answer:
    """Send *pieces*, and then nothing until the client hangs up."""

    async def answer(stream: trio.abc.Stream) -> None:
        await raw(*pieces)(stream)
        await stream.receive_some(1)

    return answer


def endless(first: bytes, piece: bytes = b"\0" * 65536, every_s: float = 0.0) -> Answer:
    """Send *piece* again and again, for as long as it is taken."""

    async def answer(stream: trio.abc.Stream) -> None:
        await stream.send_all(first)
        while True:
            await stream.send_all(piece)
            await trio.sleep(every_s)

    return answer


def reset_after(*pieces: bytes) -> Answer:
    """Send *pieces*, then end the connection with a reset."""

    async def answer(stream: trio.abc.Stream) -> None:
        await raw(*pieces)(stream)
        assert isinstance(stream, trio.SocketStream)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()

    return answer


def half_closed(*pieces: bytes) -> Answer:
    """Send *pieces*, close our direction only, and wait for the client to close its."""

    async def answer(stream: trio.abc.Stream) -> None:
        await raw(*pieces)(stream)
        assert isinstance(stream, trio.SocketStream)
        await stream.send_eof()
        await stream.receive_some(1)

    return answer


def in_turn(*answers: Answer) -> Answer:
    """The first answer for the first request, and so on; the last for all others."""
    left = list(answers)

    async def answer(stream: trio.abc.Stream) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(stream)

    return answer


def when(event: trio.Event, answer: Answer) -> Answer:
    """Wait for *event* before answering."""

    async def later(stream: trio.abc.Stream) -> None:
        await event.wait()
        await answer(stream)

    return later


def self_signed(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS context for "inputs.test", and the file of its certificate, valid until 2126."""
    path = folder / "self-signed.pem"
    path.write_text(_SELF_SIGNED)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context, path


# Made for these tests: openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500
#   -subj /CN=inputs.test -addext subjectAltName=DNS:inputs.test
_SELF_SIGNED: Final = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgegli5BLyeZoGkSGV
YA03geamIHEGqTMX/PdD2BYERFChRANCAARmvaP+hkNMQ7Tfe37IemoP230Pr7kl
7lZcsDg26eqm6u467g5e1SdsCvHE8hC6z6g1FMK1qdjAnbfABBnBKXw1
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUeNo6vQ/f4+tgLVXWPow8HeLF8P4wCgYIKoZIzj0EAwIw
FjEUMBIGA1UEAwwLaW5wdXRzLnRlc3QwIBcNMjYxMTIyMTI1OTA3WhgPMjEyNjEw
MjkxMjU5MDdaMBYxFDASBgNVBAMMC2lucHV0cy50ZXN0MFkwEwYHKoZIzj0CAQYI
KoZIzj0DAQcDQgAEZr2j/oZDTEO033t+yHpqD9t9D6+5Je5WXLA4NunqpuruOu4O
XtUnbArxxPIQus+oNRTCtanYwJ23wAQZwSl8NaNrMGkwHQYDVR0OBBYEFAfRIBND
FjJoMySb528Vh1x/dcVUMB8GA1UdIwQYMBaAFAfRIBNDFjJoMySb528Vh1x/dcVU
MA8GA1UdEwEB/wQFMAMBAf8wFgYDVR0RBA8wDYILaW5wdXRzLnRlc3QwCgYIKoZI
zj0EAwIDRwAwRAIgXC/RjPMnHsAD6/maG1PIcs7M7rCiET/mSrf5ZxhrFQkCIDRV
xDh3bZ0crM+GZP121UzyfEczAADqUGkOPE8uxHpm
-----END CERTIFICATE-----
"""
