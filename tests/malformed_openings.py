"""What broken and hostile clients send first: HTTP/1, HTTP/2 with prior knowledge, h2c upgrades and websockets.

Those marked ``fatal`` end stock Hypercorn 0.18: the exception leaves the connection and takes ``serve()`` along. To see
it, run ``python tests/malformed_openings.py``, which tries every opening on stock Hypercorn.
"""

import struct
from contextlib import suppress
from functools import partial
from typing import Any, Final

import attrs
import hpack
import hyperframe.frame as frames
import trio
from http_server_kit import masked_frame, websocket_request

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GOAWAY: Final = bytes.fromhex("000000 04 00 00000000  000008 07 00 00000000 00000000 0000000d")


@attrs.frozen
class Opening:
    """What is sent, in pieces between which the server may act, and how each kind of app's server must answer.

    *answers* are the status codes allowed (0: closed without any), None where any is as good as another.
    """

    name: str
    pieces: tuple[bytes, ...]
    answers: frozenset[int] | None = None
    fatal: bool = False


def _h1(name: str, data: bytes, *answers: int, fatal: bool = False) -> Opening:
    return Opening("h1: " + name, (data,), frozenset(answers) or None, fatal)


def _get(*lines: bytes, target: bytes = b"/hello", version: bytes = b"1.1", method: bytes = b"GET") -> bytes:
    return b"\r\n".join([method + b" " + target + b" HTTP/" + version, b"Host: test", *lines, b"", b""])


HTTP1: Final = (
    _h1("garbage", b"\x00\x01\x02\x03garbage\r\n\r\n", 400),
    _h1("TLS hello on a plain port", bytes.fromhex("16030100c2010000be0303") + b"\x11" * 64 + b"\r\n\r\n", 400),
    _h1("only line ends", b"\r\n" * 50, 0, 400),
    _h1("ssh banner", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 400),
    _h1("HTTP/0.9", b"GET /hello\r\n\r\n", 400),
    _h1("no host", b"GET /hello HTTP/1.1\r\n\r\n", 400),
    _h1("two hosts", _get(b"Host: other"), 400),
    _h1("version 1.2", _get(version=b"1.2"), 505),
    _h1("version 2.0", _get(version=b"2.0"), 505),
    _h1("version 9.9", _get(version=b"9.9"), 505),
    _h1("lower-case protocol", b"GET /hello http/1.1\r\nHost: test\r\n\r\n", 400),
    _h1("space before colon", b"GET /hello HTTP/1.1\r\nHost : test\r\n\r\n", 400),
    _h1("header without colon", _get(b"nonsense"), 400),
    _h1("empty header name", _get(b": value"), 400),
    _h1("null byte in header", _get(b"X: a\0b"), 400),
    _h1("null byte in path", _get(target=b"/a\0b"), 400),
    _h1("raw utf-8 in path", _get(target="/päth".encode()), 400),
    _h1("header folded", _get(b"X: a", b" b"), 200),
    _h1("8-bit header value", _get(b"X: \xff\xfe\xfd"), 200),
    _h1("percent nonsense in path", _get(target=b"/%ff%zz%00"), 404),
    _h1("empty path with a query", _get(target=b"?x=1"), 400),
    _h1("path without slash", _get(target=b"hello"), 400),
    _h1("star with GET", _get(target=b"*"), 400),
    _h1("star with OPTIONS", _get(target=b"*", method=b"OPTIONS"), 404),
    _h1("absolute form", _get(target=b"http://test/hello"), 200),
    _h1("absolute form without a path", _get(target=b"http://test"), 404),
    _h1("proxy connect", _get(target=b"test:443", method=b"CONNECT"), 501),
    _h1("connect with body", _get(b"Content-Length: 3", target=b"x:1", method=b"CONNECT") + b"abc", 501),
    _h1("unknown method", _get(method=b"BREW"), 200, 405),
    _h1("very long method", _get(method=b"A" * 5000), 200, 405),
    _h1("very long path", _get(target=b"/" + b"a" * 20_000), 404),
    _h1("header too large", _get(b"X: " + b"a" * 40_000), 431),
    _h1("too many headers", _get(*(b"X-%d: %s" % (i, b"v" * 90) for i in range(400))), 431),
    _h1("header that never ends", b"GET /hello HTTP/1.1\r\nHost: test\r\nX: " + b"a" * 40_000, 431),
    _h1("negative length", _get(b"Content-Length: -1", method=b"POST"), 400),
    _h1("length not a number", _get(b"Content-Length: ten", method=b"POST"), 400),
    _h1("length with plus", _get(b"Content-Length: +3", method=b"POST") + b"abc", 400),
    _h1("length enormous", _get(b"Content-Length: " + b"9" * 20, method=b"POST", target=b"/echo"), 400, 413),
    _h1("two lengths", _get(b"Content-Length: 3", b"Content-Length: 4", method=b"POST") + b"abc", 400),
    _h1("length and chunked", _get(b"Content-Length: 3", b"Transfer-Encoding: chunked", method=b"POST"), 400),
    _h1("unknown transfer encoding", _get(b"Transfer-Encoding: gzip", method=b"POST"), 501),
    _h1("chunked twice", _get(b"Transfer-Encoding: chunked, chunked", method=b"POST"), 501),
    _h1("chunked in HTTP/1.0", _get(b"Transfer-Encoding: chunked", method=b"POST", version=b"1.0") + b"0\r\n\r\n", 400),
    _h1("bad chunk size", _get(b"Transfer-Encoding: chunked", method=b"POST", target=b"/echo") + b"zz\r\n", 400),
    _h1("negative chunk size", _get(b"Transfer-Encoding: chunked", method=b"POST", target=b"/echo") + b"-1\r\n", 400),
    _h1(
        "chunk longer than said",
        _get(b"Transfer-Encoding: chunked", method=b"POST", target=b"/echo") + b"1\r\nabc\r\n",
        400,
    ),
    _h1(
        "chunk size of 30 digits",
        _get(b"Transfer-Encoding: chunked", method=b"POST", target=b"/echo") + b"f" * 30 + b"\r\n",
        400,
    ),
    _h1("bytes after the request", _get() + b"\r\n\r\n\x00\x01garbage\r\n\r\n", 200),
    _h1("early end of body", _get(b"Content-Length: 10", method=b"POST", target=b"/echo") + b"abc"),
    _h1("expectation unknown", _get(b"Expect: the-impossible"), 200),
    _h1("upgrade to unknown", _get(b"Connection: Upgrade", b"Upgrade: spdy/3"), 200),
)


def _frame(frame: frames.Frame) -> bytes:
    return frame.serialize()


def _headers(*headers: tuple[bytes, bytes], stream: int = 1, end: bool = True) -> bytes:
    frame = frames.HeadersFrame(stream, hpack.Encoder().encode(headers), flags=["END_HEADERS"])
    if end:
        frame.flags.add("END_STREAM")
    return _frame(frame)


def _request(
    *more: tuple[bytes, bytes], path: bytes = b"/hello", method: bytes = b"GET", end: bool = True, stream: int = 1
) -> bytes:
    pseudo = ((b":method", method), (b":scheme", b"http"), (b":authority", b"test"), (b":path", path))
    return _headers(*pseudo, *more, stream=stream, end=end)


SETTINGS: Final = _frame(frames.SettingsFrame(0))


def _h2(name: str, *pieces: bytes, fatal: bool = False) -> Opening:
    # HTTP/2 is off: whatever follows the preface, the client is told to use HTTP/1.1. See connection.py.
    return Opening("h2: " + name, (PREFACE + SETTINGS + pieces[0], *pieces[1:]), frozenset({-2}), fatal)


_DATA = _frame(frames.DataFrame(1, b"x" * 16000))
HTTP2: Final = (
    _h2("good request", _request()),
    Opening("h2: preface only", (PREFACE,), frozenset({-2})),
    Opening("h2: half a preface", (PREFACE[:18],), frozenset({-2})),
    Opening("h2: preface, then garbage", (PREFACE + b"\xff" * 64,), frozenset({-2})),
    _h2("non-ASCII path", _request(path=b"/p\xc3\xa4th"), fatal=True),
    _h2("non-ASCII method", _request(method=b"G\xc3\x84T"), fatal=True),
    _h2("connect", _headers((b":method", b"CONNECT"), (b":authority", b"test:443")), fatal=True),
    _h2("extended connect without version", _request((b":protocol", b"websocket"), method=b"CONNECT", end=False)),
    _h2("data after an early answer", _request(method=b"POST", path=b"/none", end=False), _DATA, fatal=True),
    _h2(
        "1100 priorities",
        b"".join(_frame(frames.PriorityFrame(i * 2 + 1, depends_on=0, stream_weight=1)) for i in range(1, 1101)),
        fatal=True,
    ),
    _h2("priority on itself", _frame(frames.PriorityFrame(3, depends_on=3, stream_weight=1))),
    _h2("no path", _headers((b":method", b"GET"), (b":scheme", b"http"))),
    _h2("no method", _headers((b":path", b"/"), (b":scheme", b"http"))),
    _h2("upper-case header", _request((b"X-Upper", b"1"))),
    _h2("pseudo header late", _headers((b"x", b"1"), (b":method", b"GET"), (b":path", b"/"), (b":scheme", b"http"))),
    _h2("even stream", _request(stream=2)),
    _h2("stream 0", struct.pack(">HBBBL", 0, 1, 0, 0, 0) + b"x"),
    _h2("data on idle stream", _frame(frames.DataFrame(5, b"x"))),
    _h2("continuation alone", _frame(frames.ContinuationFrame(1, b"x"))),
    _h2("broken hpack", _frame(frames.HeadersFrame(1, b"\xff\xff\xff\xff\xff", flags=["END_HEADERS"]))),
    _h2("frame too large", struct.pack(">BHBBL", 1, 0xFFFF, 0, 0, 1) + b"x" * 70_000),
    _h2("window overflow", _frame(frames.WindowUpdateFrame(0, 2**31 - 1))),
    _h2("window zero", b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00"),
    _h2("ping of 7 bytes", b"\x00\x00\x07\x06\x00\x00\x00\x00\x00" + b"x" * 7),
    _h2("push from client", _frame(frames.PushPromiseFrame(1, 2, b""))),
    _h2("goaway", _frame(frames.GoAwayFrame(0))),
    _h2("reset at once", _request(end=False) + _frame(frames.RstStreamFrame(1, 8))),
    _h2("200 resets", b"".join(_request(stream=i) + _frame(frames.RstStreamFrame(i, 8)) for i in range(1, 400, 2))),
    _h2("settings nonsense", _frame(frames.SettingsFrame(0, {4: 2**31}))),
    _h2("header list huge", _request(*((b"x-%d" % i, b"v" * 100) for i in range(100)))),
    _h2("content-length wrong", _request((b"content-length", b"5"), method=b"POST", end=False) + _DATA),
)


def _h2c(name: str, settings: bytes | None, *more: bytes, after: bytes = b"", fatal: bool = False) -> Opening:
    # The upgrade is not taken, so the HTTP/1.1 request is answered.
    lines = [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", *more]
    if settings is not None:
        lines.append(b"HTTP2-Settings: " + settings)
    return Opening("h2c: " + name, (_get(*lines), after) if after else (_get(*lines),), frozenset({200}), fatal)


H2C: Final = (
    _h2c("good upgrade", b"AAMAAABkAAQAoAAAAAIAAAAA"),
    _h2c("bad settings", b"!!!not base64!!!", fatal=True),
    _h2c("settings of one letter", b"A", fatal=True),
    _h2c("settings of odd length", b"AAMAAABkAA", fatal=True),
    _h2c("no settings", None),
    _h2c("settings nonsense", b"AAT_____", fatal=True),
    _h2c("then garbage", b"AAMAAABkAAQAoAAAAAIAAAAA", after=b"\xff" * 100),
    _h2c("then a preface", b"AAMAAABkAAQAoAAAAAIAAAAA", after=PREFACE + SETTINGS),
    _h2c("upper case", b"AAMAAABk", b"upgrade: H2C"),
)


def _ws(name: str, pieces: tuple[bytes, ...], *answers: int, fatal: bool = False) -> Opening:
    # 404 is HardenedQuart's, which serves no websockets
    return Opening("ws: " + name, pieces, frozenset(answers) | {404} if answers else None, fatal)


def _handshake_without(header: bytes) -> bytes:
    return b"\r\n".join(line for line in websocket_request().split(b"\r\n") if not line.startswith(header))


_OPEN = websocket_request()
WEBSOCKET: Final = (
    _ws("no key", (_handshake_without(b"Sec-WebSocket-Key"),), 400),
    _ws("no version", (_handshake_without(b"Sec-WebSocket-Version"),), 400),
    _ws("old version", (_OPEN.replace(b"Version: 13", b"Version: 8"),), 400),
    _ws("HTTP/1.0", (_OPEN.replace(b"HTTP/1.1", b"HTTP/1.0"),), 400),
    _ws("POST", (_OPEN.replace(b"GET", b"POST"),), 404),
    _ws("with a body", (websocket_request(b"/ws", b"Content-Length: 5") + b"hello",), 400, fatal=True),
    _ws("with a body later", (websocket_request(b"/ws", b"Content-Length: 5"), b"hello"), 400),
    _ws(
        "with a chunked body",
        (websocket_request(b"/ws", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",),
        400,
        fatal=True,
    ),
    _ws("frames before the accept", (_OPEN + masked_frame(1, b"early"),), 101, fatal=True),
    _ws("garbage before the accept", (_OPEN + b"\xff" * 200,), 101, fatal=True),
    _ws("frame not masked", (_OPEN, b"\x81\x05hello"), 101),
    _ws("reserved bits", (_OPEN, masked_frame(1, b"x", rsv=7)), 101),
    _ws("unknown opcode", (_OPEN, masked_frame(11, b"x")), 101),
    _ws("control frame too long", (_OPEN, b"\x89\xfe\x00\xff\0\0\0\0" + b"x" * 255), 101),
    _ws("control frame in parts", (_OPEN, masked_frame(9, b"x", fin=False)), 101),
    _ws("continuation of nothing", (_OPEN, masked_frame(0, b"x")), 101),
    _ws("text not utf-8", (_OPEN, masked_frame(1, b"\xff\xfe")), 101),
    _ws("two messages mixed", (_OPEN, masked_frame(1, b"a", fin=False) + masked_frame(2, b"b")), 101),
    _ws("close of one byte", (_OPEN, masked_frame(8, b"x")), 101),
    _ws("close with a forbidden code", (_OPEN, masked_frame(8, struct.pack(">H", 1005))), 101),
    _ws("close with a bad reason", (_OPEN, masked_frame(8, struct.pack(">H", 1000) + b"\xff")), 101),
    _ws("close twice", (_OPEN, masked_frame(8, b"") * 2), 101),
    _ws("message after close", (_OPEN, masked_frame(8, b"") + masked_frame(1, b"late")), 101),
    _ws("message of 2**63 bytes", (_OPEN, b"\x82\xff" + struct.pack(">Q", 2**63) + b"\0\0\0\0"), 101),
    _ws("message too large", (_OPEN, b"\x82\xff" + struct.pack(">Q", 300_000) + b"\0\0\0\0" + b"x" * 300_000), 101),
    _ws("1000 pings", (_OPEN, masked_frame(9, b"p") * 1000), 101),
    _ws(
        "extension nonsense",
        (websocket_request(b"/ws", b"Sec-WebSocket-Extensions: permessage-deflate; x=\xff"),),
        400,
        fatal=True,
    ),
    _ws("subprotocol nonsense", (websocket_request(b"/ws", b"Sec-WebSocket-Protocol: ,,\xff"),), 400, fatal=True),
    _ws("raw bytes in path", (websocket_request(b"/w\xc3\xa4"),), 400),
)

ALL: Final = (*HTTP1, *HTTP2, *H2C, *WEBSOCKET)


async def survives_stock_hypercorn(opening: Opening) -> bool:
    """Whether Hypercorn as shipped still serves a good request after *opening*."""
    import hypercorn.config
    import hypercorn.trio
    from http_server_kit import ask_hello, raw_app

    served = raw_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError  # for Hypercorn cannot bear an app that returns from its lifespan
        await served(scope, receive, send)

    config = hypercorn.config.Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    config.graceful_timeout = 0.1
    stop = trio.Event()
    fell = True
    try:
        async with trio.open_nursery() as nursery:
            serve = partial(hypercorn.trio.serve, app, config, shutdown_trigger=stop.wait)
            urls = await nursery.start(serve)
            port = int(urls[0].rpartition(":")[2])
            with trio.move_on_after(5) as patience:
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    with suppress(trio.BrokenResourceError):
                        for piece in opening.pieces:
                            await stream.send_all(piece)
                            await trio.sleep(0.1)  # the server's move; it may have none that one could wait for
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    await ask_hello(stream)
            fell = patience.cancelled_caught
            nursery.cancel_scope.cancel()
    except* Exception as group:  # noqa: BLE001 -- any is a finding
        print(f"{opening.name}: {_innermost(group)!r}", flush=True)
    return not fell


def _innermost(error: BaseException) -> BaseException:
    return _innermost(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def main() -> None:
    """Try every opening on stock Hypercorn, and say which were not survived."""
    fallen = [opening.name for opening in ALL if not trio.run(survives_stock_hypercorn, opening)]
    print(f"stock Hypercorn fell to {len(fallen)} of {len(ALL)}: {fallen}")
    print("marked and survived:", [o.name for o in ALL if o.fatal and o.name not in fallen])
    print("fallen and not marked:", [o.name for o in ALL if not o.fatal and o.name in fallen])


if __name__ == "__main__":
    main()
