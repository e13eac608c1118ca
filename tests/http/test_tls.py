"""TLS: who speaks it is served as on a plain port, who does not harms nobody, and the certificate can be renewed."""

import hashlib
import os
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import malformed_openings
import pytest
import trio
from http_server_kit import (
    GOOD_REQUEST,
    Server,
    Watched,
    ask_hello,
    masked_frame,
    open_websocket,
    quart_app,
    quick_config,
    raw_app,
    read_all,
    read_until,
    serving,
    status_of,
)
from malformed_openings import GOAWAY, Opening

from comfyd.errors import StartupFailed
from comfyd.http.server import HttpServerConfig, TlsFiles, serve_http
from comfyd.http.server.certificate import Certificate
from comfyd.http.server.tls import TlsLayer
from comfyd.http.server.transport import Transport

APPS = {"raw": raw_app, "quart": quart_app}


def make_certificate(folder: Path, name: str) -> TlsFiles:
    """A certificate for 127.0.0.1 that signs itself."""
    files = TlsFiles(certificate=folder / f"{name}.pem", key=folder / f"{name}.key")
    run_openssl(
        f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
        f" -addext subjectAltName=IP:127.0.0.1 -keyout {files.key} -out {files.certificate}"
    )
    return files


def run_openssl(arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_certificate(tmp_path_factory.mktemp("tls"), "first")


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_certificate(tmp_path_factory.mktemp("tls"), "second")


def tls_config(files: TlsFiles, **changes: Any) -> HttpServerConfig:
    return quick_config(tls=files, **changes)


def trusting(files: TlsFiles) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=files.certificate)


async def connect(server: Server, context: ssl.SSLContext, *, https_compatible: bool = True) -> Any:
    """A TLS client. Any, because the kit's helpers are for plain streams, and serve these as well."""
    stream = trio.SSLStream(
        await server.connect(), context, server_hostname="127.0.0.1", https_compatible=https_compatible
    )
    with trio.fail_after(5):
        await stream.do_handshake()
    return stream


async def assert_served(server: Server, context: ssl.SSLContext) -> None:
    async with await connect(server, context) as stream:
        await ask_hello(stream)


def client_hello(context: ssl.SSLContext) -> bytes:
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


# -- speaking it


@pytest.mark.parametrize("kind", APPS)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
async def test_requests_are_answered_and_connections_kept(kind: str, version: ssl.TLSVersion, first: TlsFiles) -> None:
    context = trusting(first)
    context.minimum_version = context.maximum_version = version
    async with serving(APPS[kind](), tls_config(first)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        async with await connect(server, context) as stream:
            for _ in range(3):
                await ask_hello(stream)
            await server.wait_connections(1)
        await server.wait_at_rest()


async def test_a_request_in_the_same_packet_as_the_end_of_the_handshake_is_answered(first: TlsFiles) -> None:
    """What follows the client's last word of the handshake is decrypted without waiting for more."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting(first).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    async with serving(raw_app(), tls_config(first)) as server, await server.connect() as stream:
        while True:
            try:
                client.do_handshake()
            except ssl.SSLWantReadError:
                await stream.send_all(outgoing.read())
                incoming.write(await stream.receive_some(65536))
            else:
                break
        client.write(GOOD_REQUEST)
        await stream.send_all(outgoing.read())
        answer = b""
        with trio.fail_after(5):
            while not answer.endswith(b"hello"):
                incoming.write(await stream.receive_some(65536))
                try:
                    answer += client.read(65536)
                except ssl.SSLWantReadError:
                    continue
        assert status_of(answer) == 200


@pytest.mark.parametrize(
    ("offered", "chosen"), [(["h2", "http/1.1"], "http/1.1"), (["http/1.1"], "http/1.1"), (["h2"], None), ([], None)]
)
async def test_only_http_1_1_is_agreed_upon(offered: list[str], chosen: str | None, first: TlsFiles) -> None:
    context = trusting(first)
    if offered:
        context.set_alpn_protocols(offered)
    async with serving(raw_app(), tls_config(first)) as server, await connect(server, context) as stream:
        assert stream.selected_alpn_protocol() == chosen
        await ask_hello(stream)


async def test_ciphers_of_1_2_keep_the_past_secret(first: TlsFiles) -> None:
    context = (await Certificate.load(first)).context
    old = [cipher for cipher in context.get_ciphers() if cipher["protocol"] != "TLSv1.3"]
    assert old
    assert all("Kx=ECDH" in cipher["description"] and "Mac=AEAD" in cipher["description"] for cipher in old)
    assert context.options & ssl.OP_NO_RENEGOTIATION


async def test_the_app_is_told_the_scheme(first: TlsFiles) -> None:
    schemes: list[str] = []
    served = raw_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        schemes.append(scope.get("scheme", ""))
        await served(scope, receive, send)

    async with serving(app, tls_config(first)) as server, await connect(server, trusting(first)) as stream:
        await ask_hello(stream)
        await open_websocket(stream)
        await stream.send_all(masked_frame(2, b"frame"))
        assert await read_until(stream, b"frame") == b"\x82\x05frame"
    assert schemes == ["", "https", "wss"]


async def test_large_bodies_arrive_whole_in_both_directions(first: TlsFiles) -> None:
    """Pieces larger than a TLS record, and than what is encrypted at once."""
    sent = os.urandom(8 * 1024 * 1024 + 7)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        body = bytearray()
        while (message := await receive())["more_body"]:
            body += message["body"]
        body += message["body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": bytes(body)})

    config = tls_config(first, max_body_bytes=len(sent))
    async with serving(app, config) as server, await connect(server, trusting(first)) as stream:
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(sent) + sent)
        received = b""
        with trio.fail_after(15):
            while len(received.partition(b"\r\n\r\n")[2]) < len(sent):
                received += await stream.receive_some(1 << 20)
    assert hashlib.sha256(received.partition(b"\r\n\r\n")[2]).digest() == hashlib.sha256(sent).digest()


async def test_a_body_in_records_of_one_byte_arrives(first: TlsFiles) -> None:
    async with serving(raw_app(), tls_config(first)) as server, await connect(server, trusting(first)) as stream:
        for byte in b"POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\n12345":
            await stream.send_all(bytes([byte]))
        assert status_of(await read_until(stream, b"12345")) == 200


async def test_a_cancelled_writer_leaves_the_stream_whole(first: TlsFiles) -> None:
    """What the first writer could not write is written by the next, and the client decrypts all of it in order."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    context = (await Certificate.load(first)).context
    first_part, second_part = os.urandom(16 * 1024 * 1024), os.urandom(100_000)
    with trio.fail_after(15):
        async with listeners[0], trio.open_nursery() as nursery:
            plain = await trio.open_tcp_stream(*listeners[0].socket.getsockname())
            client = trio.SSLStream(plain, trusting(first), server_hostname="127.0.0.1", https_compatible=True)
            transport = Transport(await listeners[0].accept(), send_timeout_s=10)
            nursery.start_soon(client.do_handshake)
            await transport.secure(TlsLayer(context), trio.current_time() + 5)
            transport.hold(first_part)
            with trio.move_on_after(0.1) as patience:
                await transport.flush()
            assert patience.cancelled_caught, "more than the kernel takes"
            assert transport.unsent
            received = bytearray()

            async def read() -> None:
                while data := await client.receive_some(1 << 20):
                    received.extend(data)

            nursery.start_soon(read)
            transport.hold(second_part)
            await transport.say_farewell(10)
            transport.cut()
        await trio.aclose_forcefully(client)
    assert bytes(received) == first_part + second_part


# -- ends


@pytest.mark.parametrize("request_line", [b"GET /flat HTTP/1.0", b"GET /flat HTTP/1.1\r\nHost: t\r\nConnection: close"])
async def test_an_answer_that_ends_with_the_connection_ends_with_tls_own_farewell(
    request_line: bytes, first: TlsFiles
) -> None:
    """A strict client would take a mere close for an answer cut off by somebody on the way."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"to the close"})

    async with serving(app, tls_config(first)) as server:
        stream = await connect(server, trusting(first), https_compatible=False)
        await stream.send_all(request_line + b"\r\n\r\n")
        answer = await read_all(stream)
        assert b"to the close" in answer
        assert b"<reset>" not in answer
        await trio.aclose_forcefully(stream)


async def test_an_idle_connection_is_ended_with_tls_own_farewell(first: TlsFiles) -> None:
    config = tls_config(first, keep_alive_timeout_s=0.1)
    async with serving(raw_app(), config) as server:
        stream = await connect(server, trusting(first), https_compatible=False)
        await ask_hello(stream)
        assert await read_all(stream) == b""
        await trio.aclose_forcefully(stream)
        await server.wait_at_rest()


@pytest.mark.parametrize("politely", [True, False])
async def test_an_app_hears_that_its_client_left(politely: bool, first: TlsFiles) -> None:
    watched = Watched()
    async with serving(raw_app(watched), tls_config(first)) as server:
        stream = await connect(server, trusting(first), https_compatible=not politely)
        await stream.send_all(b"GET /wait HTTP/1.1\r\nHost: t\r\n\r\n")
        await watched.started.wait()
        if politely:
            with pytest.raises(trio.BrokenResourceError):  # we close without an answer to the client's farewell
                await stream.unwrap()
        else:
            await trio.aclose_forcefully(stream)
        with trio.fail_after(5):
            await watched.ended.wait()
        await trio.aclose_forcefully(stream)
        await server.wait_at_rest()


async def test_a_client_that_takes_nothing_is_cut(first: TlsFiles) -> None:
    watched = Watched()
    async with serving(raw_app(watched), tls_config(first, send_timeout_s=0.2)) as server:
        async with await connect(server, trusting(first)) as stream:
            await stream.send_all(b"GET /flood HTTP/1.1\r\nHost: t\r\n\r\n")
            with trio.fail_after(5):
                await watched.ended.wait()
        await server.wait_at_rest()


async def test_a_stop_waits_for_answers_and_not_for_the_idle(first: TlsFiles) -> None:
    """Nor for a handshake that has only begun."""
    gate, asked = trio.Event(), trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            asked.set()
            await gate.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
            await send({"type": "http.response.body", "body": b"hello"})

    async with serving(app, tls_config(first, stop_grace_s=5)) as server:
        idle, busy = [await connect(server, trusting(first)) for _ in range(2)]
        silent = await server.connect()
        await busy.send_all(GOOD_REQUEST)
        await asked.wait()
        began_at = trio.current_time()
        server.stop.set()
        assert await read_all(idle) == b""
        assert (await read_all(silent)).replace(b"<reset>", b"") == b""
        gate.set()
        assert (await read_all(busy)).endswith(b"hello")
        await server.ended.wait()
        assert trio.current_time() - began_at < 3
        for stream in (idle, busy, silent):
            await trio.aclose_forcefully(stream)


async def test_a_stop_during_a_handshake_does_not_wait_for_a_request_that_may_never_come(
    first: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that the kernel held at the stop counted as a request; they were the rest of the handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting(first).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    async with serving(raw_app(), tls_config(first, stop_grace_s=5)) as server, await server.connect() as stream:
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        await stream.send_all(outgoing.read())
        incoming.write(await stream.receive_some(65536))
        client.do_handshake()
        with monkeypatch.context() as patch:
            patch.setattr(Transport, "readable", lambda _: True)  # a moment that no client can be made to hit
            server.stop.set()
            await server.wait_connections(0)  # the listener is gone, which was one of two sockets
        await stream.send_all(outgoing.read())
        await read_all(stream, within_s=3)
        with trio.fail_after(3):
            await server.ended.wait()


async def test_at_the_limit_the_idle_make_room_for_newcomers(first: TlsFiles) -> None:
    async with serving(raw_app(), tls_config(first, max_connections=2)) as server:
        streams = [await connect(server, trusting(first)) for _ in range(2)]
        for stream in streams:
            await ask_hello(stream)
        await assert_served(server, trusting(first))
        assert (await read_all(streams[0])).replace(b"<reset>", b"") == b"", "the longest idle one was closed"
        for stream in streams:
            await trio.aclose_forcefully(stream)


# -- not speaking it


#: TLS's alert record: type 21, two bytes after its header; level 2 is fatal.
ALERT = b"\x15\x03"


def hello_1_1(hello: bytes) -> bytes:
    """A client hello of TLS 1.1: the versions are in the record, in the hello, and not in an extension."""
    body = b"\x03\x02" + b"r" * 32 + b"\x00" + b"\x00\x04\xc0\x13\xc0\x14" + b"\x01\x00"
    handshake = b"\x01" + len(body).to_bytes(3) + body
    return b"\x16\x03\x01" + len(handshake).to_bytes(2) + handshake


def spoilt(hello: bytes) -> bytes:
    return hello[:60] + bytes(byte ^ 0xFF for byte in hello[60:100]) + hello[100:]


#: What is sent in place of a handshake, and what the answer begins with. OpenSSL has no alert for what is no TLS.
NO_TLS: dict[str, tuple[Callable[[bytes], bytes], bytes]] = {
    "plain GET": (lambda _: GOOD_REQUEST, b"HTTP/1.1 400 "),
    "plain POST with a body": (
        lambda _: b"POST / HTTP/1.1\r\nContent-Length: 90000\r\n\r\n" + b"x" * 90_000,
        b"HTTP/1.1 400 ",
    ),
    "plain CONNECT": (lambda _: b"CONNECT a:1 HTTP/1.1\r\n\r\n", b""),
    "plain HTTP/2": (lambda _: malformed_openings.PREFACE, b""),
    "garbage": (lambda _: b"\x00\x01\x02\x03garbage\r\n\r\n", b""),
    "ssh banner": (lambda _: b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b""),
    "a megabyte of zeros": (lambda _: b"\0" * 1_000_000, b""),
    "a megabyte of 0xff": (lambda _: b"\xff" * 1_000_000, b""),
    "an alert": (lambda _: b"\x15\x03\x01\x00\x02\x02\x28", b""),
    "data before the handshake": (lambda _: b"\x17\x03\x03\x00\x05hello", ALERT),
    "a record too large": (lambda _: b"\x16\x03\x01\xff\xff" + b"\x01" * 70_000, ALERT),
    "an empty record": (lambda _: b"\x16\x03\x01\x00\x00" * 200, ALERT),
    "SSL 2": (lambda _: b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + b"\x01" * 40, ALERT),
    "TLS 1.1": (hello_1_1, ALERT + b"\x02\x00\x02\x02\x46"),
    "hello spoilt": (spoilt, ALERT),
    "hello twice": (lambda hello: hello * 2, b""),
    "hello and garbage": (lambda hello: hello + b"\x00garbage" * 50, b""),
    "hello and plain HTTP": (lambda hello: hello + GOOD_REQUEST, b""),
    "one byte": (lambda hello: hello[:1], b""),
    "half a record header": (lambda hello: hello[:3], b""),
    "half a hello": (lambda hello: hello[:100], b""),
    "hello and silence": (lambda hello: hello, b""),
    "silence": (lambda _: b"", b""),
}


async def send_ignoring_the_end(stream: trio.SocketStream, data: bytes) -> None:
    try:
        await stream.send_all(data)
    except trio.BrokenResourceError:
        return  # it closed before all was sent, as it may


@pytest.mark.parametrize("leaving", [False, True], ids=["stays", "leaves"])
async def test_who_does_not_speak_tls_is_told_and_closed_and_harms_nobody(leaving: bool, first: TlsFiles) -> None:
    context = trusting(first)
    hello = client_hello(context)
    wrong: list[str] = []
    async with serving(raw_app(), tls_config(first, header_timeout_s=0.2)) as server:
        for name, (make, beginning) in NO_TLS.items():
            async with await server.connect() as stream, trio.open_nursery() as nursery:
                if leaving:
                    await send_ignoring_the_end(stream, make(hello)[:60_000])
                else:
                    nursery.start_soon(send_ignoring_the_end, stream, make(hello))
                    answer = await read_all(stream)
                    if not answer.startswith(beginning):
                        wrong.append(f"{name}: {answer[:60]!r}")
            await server.wait_at_rest()
            await assert_served(server, context)
    assert not wrong, "\n".join(wrong)


async def test_plain_http_is_told_what_this_port_speaks(first: TlsFiles) -> None:
    async with serving(raw_app(), tls_config(first)) as server, await server.connect() as stream:
        await stream.send_all(GOOD_REQUEST)
        assert b"this port speaks HTTPS" in await read_all(stream)


async def test_bytes_that_are_no_record_end_the_connection_of_who_sent_them(first: TlsFiles, log_output: Any) -> None:
    async with serving(raw_app(), tls_config(first)) as server:
        good, bad = [await connect(server, trusting(first)) for _ in range(2)]
        await ask_hello(bad)
        await bad.transport_stream.send_all(b"\x17\x03\x03\x00\x20" + b"forged" * 6)
        await read_all(bad)
        await ask_hello(good)
        for stream in (good, bad):
            await trio.aclose_forcefully(stream)
    assert [entry["event"] for entry in log_output.entries].count("http.tls_malformed") == 1


@pytest.mark.parametrize(
    "openings",
    [
        pytest.param(openings, id=name)
        for name, openings in vars(malformed_openings).items()
        if name in {"HTTP1", "HTTP2", "H2C", "WEBSOCKET"}
    ],
)
async def test_malformed_openings_within_tls_are_answered_as_on_a_plain_port(
    openings: tuple[Opening, ...], first: TlsFiles
) -> None:
    config = tls_config(first, header_timeout_s=0.3, body_timeout_s=0.15, keep_alive_timeout_s=0.08)
    context = trusting(first)
    wrong: list[str] = []
    async with serving(raw_app(), config) as server:
        for opening in openings:
            answer = b""
            stream = await connect(server, context)
            async with trio.open_nursery() as nursery:

                async def send(stream: Any = stream, opening: Opening = opening) -> None:
                    for piece in opening.pieces:
                        await send_ignoring_the_end(stream, piece)
                        await trio.sleep(0.005)  # so that the server may see each piece alone; nothing depends on it

                nursery.start_soon(send)
                if opening.name.startswith("ws: ") and opening.answers and 101 in opening.answers:
                    with trio.move_on_after(0.1):  # an open websocket may stay so
                        answer = await read_all(stream)
                else:
                    answer = await read_all(stream)
                nursery.cancel_scope.cancel()
            await trio.aclose_forcefully(stream)
            code = 0 if not answer.replace(b"<reset>", b"") else -2 if answer.startswith(GOAWAY) else status_of(answer)
            if opening.answers is not None and code not in opening.answers and 101 not in opening.answers:
                wrong.append(f"{opening.name}: answered {code}, allowed {sorted(opening.answers)}")
            await server.wait_at_rest()
            await assert_served(server, context)
    assert not wrong, "\n".join(wrong)


# -- many


@pytest.mark.parametrize("beginning", ["silence", "half a hello", "hello and silence"])
async def test_200_handshakes_that_do_not_go_on_keep_nobody_out_and_leave_nothing(
    beginning: str, first: TlsFiles
) -> None:
    """That each is ended in time is tested above; here none ends by itself while the others are served."""
    context = trusting(first)
    data = NO_TLS[beginning][0](client_hello(context))
    async with serving(raw_app(), tls_config(first, header_timeout_s=60)) as server:
        stalled = [await server.connect() for _ in range(200)]
        for stream in stalled:
            await stream.send_all(data)
        await server.wait_connections(200)
        for _ in range(3):
            await assert_served(server, context)
        await server.wait_connections(200)
        for stream in stalled:
            await stream.aclose()
        await server.wait_at_rest()


async def test_one_handshake_too_many_ends_the_oldest(first: TlsFiles) -> None:
    context = trusting(first)
    async with serving(raw_app(), tls_config(first, max_handshakes=5)) as server:
        await assert_served(server, context)
        stalled = [await server.connect() for _ in range(5)]
        await server.wait_connections(5)
        async with await connect(server, context) as stream:
            await ask_hello(stream)
            assert (await read_all(stalled[0])).replace(b"<reset>", b"") == b""
            await server.wait_connections(5)
        for each in stalled:
            await each.aclose()
        await server.wait_at_rest()


async def test_100_clients_at_once_are_all_served(first: TlsFiles) -> None:
    context = trusting(first)
    async with serving(raw_app(), tls_config(first)) as server:
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(assert_served, server, context)
        await server.wait_at_rest()


# -- the certificate


async def shown_by(server: Server) -> bytes:
    """The certificate that a newcomer is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with await connect(server, context) as stream:
        await ask_hello(stream)
        shown = stream.getpeercert(binary_form=True)
        assert isinstance(shown, bytes)
        return shown


def der_of(files: TlsFiles) -> bytes:
    return ssl.PEM_cert_to_DER_cert(files.certificate.read_text())


def install(files: TlsFiles, at: TlsFiles) -> None:
    """Put *files* in the place of those *at*, as renewers do: each by a rename."""
    for source, target in ((files.certificate, at.certificate), (files.key, at.key)):
        new = target.with_suffix(".new")
        new.write_bytes(source.read_bytes())
        new.rename(target)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(5):
        while not await condition():  # noqa: ASYNC110 -- files change, and nothing sets an event
            await trio.sleep(0.01)


async def test_a_renewed_certificate_is_shown_to_newcomers_and_disturbs_nobody(
    first: TlsFiles, second: TlsFiles, tmp_path: Path, log_output: Any
) -> None:
    files = TlsFiles(certificate=tmp_path / "live.pem", key=tmp_path / "live.key")
    install(first, files)
    config = tls_config(files, tls_check_interval_s=0.02)
    async with serving(raw_app(), config) as server, await connect(server, trusting(first)) as stream:
        await ask_hello(stream)
        assert await shown_by(server) == der_of(first)
        install(second, files)

        async def is_second() -> bool:
            return await shown_by(server) == der_of(second)

        await until(is_second)
        await ask_hello(stream)
    assert [entry["event"] for entry in log_output.entries].count("http.certificate_renewed") == 1


@pytest.mark.parametrize("how", ["garbage", "no key", "another's key"])
async def test_what_makes_no_sense_is_logged_once_and_the_old_certificate_stays(
    how: str, first: TlsFiles, second: TlsFiles, tmp_path: Path, log_output: Any
) -> None:
    files = TlsFiles(certificate=tmp_path / "live.pem", key=tmp_path / "live.key")
    install(first, files)
    certificate = await Certificate.load(files)
    before = certificate.context
    if how == "garbage":
        files.certificate.write_text("not a certificate")
    elif how == "no key":
        files.key.unlink()
    else:
        files.key.write_bytes(second.key.read_bytes())
    for _ in range(3):
        await certificate.renew()
    assert certificate.context is before
    assert [entry["event"] for entry in log_output.entries] == ["http.certificate_unusable"]
    assert log_output.entries[0]["log_level"] == "error"
    install(second, files)
    await certificate.renew()
    assert certificate.context is not before
    assert log_output.entries[-1]["event"] == "http.certificate_renewed"


async def test_nothing_is_read_again_while_nothing_changes(first: TlsFiles) -> None:
    certificate = await Certificate.load(first)
    before = certificate.context
    await certificate.renew()
    assert certificate.context is before


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no certificate", r"live\.pem: No such file"),
        ("no key", r"live\.key: No such file"),
        ("a folder", r"live\.pem: Is a directory"),
        ("garbage", "not a PEM chain and its key"),
        ("another's key", r"the key in .*live\.key is not that of .*live\.pem"),
        ("passphrase", r"the key in .*live\.key wants a passphrase"),
    ],
)
async def test_files_that_cannot_be_served_are_a_startup_failure_that_says_why(
    how: str, message: str, first: TlsFiles, second: TlsFiles, tmp_path: Path
) -> None:
    files = TlsFiles(certificate=tmp_path / "live.pem", key=tmp_path / "live.key")
    install(first, files)
    if how == "no certificate":
        files.certificate.unlink()
    elif how == "no key":
        files.key.unlink()
    elif how == "a folder":
        files.certificate.unlink()
        files.certificate.mkdir()
    elif how == "garbage":
        files.certificate.write_text("not a certificate")
    elif how == "another's key":
        files.key.write_bytes(second.key.read_bytes())
    else:
        run_openssl(f"ec -aes256 -passout pass:secret -in {first.key} -out {files.key}")
    with trio.fail_after(5), pytest.raises(StartupFailed, match=message):
        await serve_http(raw_app(), tls_config(files), trio.Event())
