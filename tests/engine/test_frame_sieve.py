"""The sieve in front of trio-websocket: what is heard, what is passed on, and that wsproto alone hears the same."""

import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Final, cast

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import memory_stream_pair
from trio_websocket import ConnectionClosed, WebSocketRequest, WebSocketServer, serve_websocket, wrap_client_stream
from wsproto import ConnectionType, WSConnection
from wsproto.connection import Connection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Message,
    Ping,
    Pong,
    Request,
    TextMessage,
)

from comfyd.engine.frame_sieve import FrameSieve, Hearer

MAX_MESSAGE_BYTES: Final = 1 << 20
Heard = tuple[str, bytes]
"""Kind and payload of a message, whoever heard it."""


@attrs.define(eq=False)
class Pieces(trio.abc.ReceiveStream):
    """A stream that comes in given pieces, one for each call, and then ends."""

    pieces: deque[bytes]
    ended: bool = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self.pieces:
            self.ended = True
            return b""
        piece = self.pieces.popleft()
        if max_bytes is not None and len(piece) > max_bytes:
            self.pieces.appendleft(piece[max_bytes:])
        return piece[:max_bytes]

    async def aclose(self) -> None:
        raise NotImplementedError("nothing here closes it")


@attrs.define(eq=False)
class Ear:
    """A hearer that copies what it is told."""

    heard: list[Heard] = attrs.field(factory=list)

    def text(self, message: memoryview) -> None:
        self.heard.append(("text", bytes(message)))

    def binary(self, message: memoryview) -> None:
        self.heard.append(("binary", bytes(message)))


def shaken_hands() -> tuple[WSConnection, bytes]:
    """A client that has asked, and the answer it waits for; its length is always the same."""
    client, server = WSConnection(ConnectionType.CLIENT), WSConnection(ConnectionType.SERVER)
    server.receive_data(client.send(Request(host="engine", target="/ws")))
    assert [type(event) for event in server.events()] == [Request]
    return client, server.send(AcceptConnection())


HEAD: Final = shaken_hands()[1]


@attrs.define(eq=False)
class Judge:
    """wsproto as a client, which makes messages and other events of bytes, as trio-websocket has it do."""

    client: WSConnection
    heard: list[Heard] = attrs.field(factory=list)
    others: list[Event] = attrs.field(factory=list)
    _message: bytearray = attrs.field(factory=bytearray)

    def feed(self, data: bytes | bytearray) -> None:
        self.client.receive_data(bytes(data))
        for event in self.client.events():
            if not isinstance(event, Message):
                self.others.append(event)
                continue
            self._message += event.data.encode() if isinstance(event, TextMessage) else event.data
            if event.message_finished:
                kind = "text" if isinstance(event, TextMessage) else "binary"
                self.heard.append((kind, bytes(self._message)))
                self._message.clear()


def judged_alone(frames: bytes) -> Judge:
    """What wsproto makes of *frames* when nothing stands before it."""
    client, head = shaken_hands()
    judge = Judge(client)
    judge.feed(head + frames)
    return judge


async def sieved(
    pieces: Iterable[bytes],
    hearer: Hearer,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    at_once: int | None = None,
    pass_on: Callable[[bytes | bytearray], None] | None = None,
) -> bytes:
    """Read to the end through a sieve; return what it passed on, and give *pass_on* each part of it as it comes."""
    source = Pieces(deque(pieces))
    # In place of a socket's stream: only its receive_some is called here.
    sieve = FrameSieve(cast("trio.SocketStream", source), hearer, max_message_bytes)
    passed = bytearray()
    while part := await sieve.receive_some(at_once):
        assert not source.ended
        if pass_on is not None:
            pass_on(part)
        passed += part
    assert source.ended, "it said that the stream had ended, and it had not"
    assert await sieve.receive_some(at_once) == b""
    return bytes(passed)


def cut(stream: bytes, places: Iterable[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(place for place in places if 0 < place < len(stream))})
    return [stream[begin:end] for begin, end in pairwise(edges)]


def cuttings(stream: bytes, *, begin: int = len(HEAD)) -> Iterator[list[bytes]]:
    """The stream in one piece, byte by byte, and in two pieces that meet anywhere from *begin* on."""
    yield [stream]
    yield cut(stream, range(len(stream)))
    for place in range(max(1, begin), len(stream)):
        yield cut(stream, [place])


def frame(first: int, payload: bytes = b"", *, length: bytes | None = None) -> bytes:
    """A frame by hand: *first* has FIN, the reserved bits and the opcode; *length* is for what no server may say."""
    if length is None:
        size = len(payload)
        if size < 126:
            length = bytes([size])
        else:
            length = b"\x7e" + struct.pack(">H", size) if size < 1 << 16 else b"\x7f" + struct.pack(">Q", size)
    return bytes([first]) + length + payload


TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A


# Any conversation, in any pieces


@attrs.frozen(kw_only=True)
class Conversation:
    """What a server says after the handshake, frame by frame, and where it is cut (counted from the answer on)."""

    events: tuple[Event, ...]
    frames: tuple[bytes, ...]
    cuts: frozenset[int]

    def passed_on(self) -> bytes:
        """What is left for trio-websocket, from what the sieve promises and not from how it works."""
        passed = b""
        fragmented = False
        for event, sent in zip(self.events, self.frames, strict=True):
            fragmented = fragmented or (isinstance(event, Message) and not event.message_finished)
            if fragmented or not isinstance(event, Message):
                passed += sent
        return passed


SIZES = st.sampled_from([0, 1, 2, 124, 125, 126, 127, 128, 65534, 65535, 65536, 65537]) | st.integers(0, 70_000)
# Letters of several lengths, which wsproto's server side never cuts; bytes that look like frames, and like the
# handshake.
LETTERS = st.sampled_from(["é画🎨", "ß字🚀", "nine char", "\0\r\n\r\nнн\x81"])
BYTES = st.sampled_from([b"\r\n\r\n", b"\x81\x01", b"\x89\x00", b"\x88\x02\x03\xe8", b"\x00", b"HTTP/1.1 101 "])
KINDS: st.SearchStrategy[type[Event]] = st.just(TextMessage) | st.just(BytesMessage)
CONTROLS: st.SearchStrategy[Event] = st.builds(Ping, payload=st.binary(max_size=125)) | st.builds(
    Pong, payload=st.binary(max_size=125)
)
CLOSES = st.builds(
    CloseConnection, code=st.sampled_from([1000, 1001, 1011, 3000, 4999]), reason=st.sampled_from([None, "", "später"])
)


@st.composite
def parts(draw: st.DrawFn, kind: type[Event], *, last: bool = True) -> Event:
    """A message, or a fragment of one."""
    size = draw(SIZES)
    if kind is BytesMessage:
        pattern = draw(BYTES)
        return BytesMessage(data=(pattern * (size // len(pattern) + 1))[:size], message_finished=last)
    letters = draw(LETTERS)
    width = len(letters.encode())
    return TextMessage(data=letters * (size // width) + "-" * (size % width), message_finished=last)


@st.composite
def fragmented_messages(draw: st.DrawFn) -> list[Event]:
    """A message in fragments, with pings and pongs between them."""
    kind = draw(KINDS)
    said: list[Event] = []
    for _ in range(draw(st.integers(1, 3))):
        said.append(draw(parts(kind, last=False)))
        said += draw(st.lists(CONTROLS, max_size=2))
    return [*said, draw(parts(kind))]


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Whole messages, pings and pongs; now and then a fragmented message, and the same again; a close or none."""
    few = st.lists(st.one_of(parts(TextMessage), parts(BytesMessage), CONTROLS), min_size=1, max_size=5)
    said = draw(few)
    if draw(st.booleans()):
        said += draw(fragmented_messages()) + draw(few)
    if draw(st.booleans()):
        said.append(draw(CLOSES))
    server = Connection(ConnectionType.SERVER)
    frames = [server.send(event) for event in said]

    begins = [len(HEAD)]
    for sent in frames:
        begins.append(begins[-1] + len(sent))
    if draw(st.booleans()):  # in the middle of everything that is looked at
        cuts = [begin + offset for begin in begins for offset in range(-1, 12)]
    else:
        near = st.builds(int.__add__, st.sampled_from(begins), st.integers(-3, 14))
        cuts = draw(st.lists(near | st.integers(1, begins[-1]), max_size=8))
    return Conversation(events=tuple(said), frames=tuple(frames), cuts=frozenset(cuts))


@settings(deadline=None, max_examples=100)
@given(conversation=conversations(), at_once=st.sampled_from([None, 256 * 1024, 4096]))
async def test_the_same_messages_are_heard_in_the_same_order_as_by_wsproto_alone(
    conversation: Conversation, at_once: int | None
) -> None:
    frames = b"".join(conversation.frames)
    alone = judged_alone(frames)
    client, head = shaken_hands()
    ear, behind = Ear(), Judge(client)
    behind.heard = ear.heard  # one list for both: the order in which they hear is part of the promise
    pieces = cut(head + frames, conversation.cuts)
    passed = await sieved(pieces, ear, at_once=at_once, pass_on=behind.feed)
    assert ear.heard == alone.heard
    assert behind.others == alone.others
    assert passed == head + conversation.passed_on()


# The answer to the handshake


async def test_the_answer_to_the_handshake_may_come_in_any_pieces_and_with_the_first_frames() -> None:
    ping = frame(PING, b"there?")
    stream = HEAD + frame(TEXT, b"first") + ping + frame(BINARY, b"second\r\n\r\n") + frame(TEXT)
    for pieces in cuttings(stream, begin=1):
        ear = Ear()
        assert await sieved(pieces, ear) == HEAD + ping
        assert ear.heard == [("text", b"first"), ("binary", b"second\r\n\r\n"), ("text", b"")]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.0 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD,
        b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
    ],
)
async def test_an_answer_that_does_not_upgrade_is_passed_on_with_all_that_follows(answer: bytes) -> None:
    stream = answer + frame(TEXT, b"\r\n\r\n") + frame(TEXT, b"body, not a message")
    for pieces in cuttings(stream, begin=1):
        ear = Ear()
        assert await sieved(pieces, ear) == stream
        assert ear.heard == []


async def test_the_answer_ends_where_h11_lets_it_end() -> None:
    client, head = shaken_hands()
    head = head.replace(b"\r\n", b"\n")  # h11 takes bare newlines
    frames = frame(BINARY, b"looks like the end\r\n\r\n\x81\x05of it") + frame(TEXT, b"after")
    judge = Judge(client)
    judge.feed(head + frames)
    assert len(judge.heard) == 2
    for pieces in cuttings(head + frames, begin=1):
        ear = Ear()
        assert await sieved(pieces, ear) == head
        assert ear.heard == judge.heard


@pytest.mark.parametrize(("head_bytes", "heard"), [(60_000, [("text", b"hi")]), (70_000, [])])
async def test_an_answer_without_end_is_given_up(head_bytes: int, heard: list[Heard]) -> None:
    begin, end, hi = b"HTTP/1.1 101 Switching Protocols\r\nA: ", b"\r\n\r\n", frame(TEXT, b"hi")
    head = begin + b"b" * (head_bytes - len(begin))
    ear = Ear()
    passed = await sieved([*cut(head, range(0, head_bytes, 4096)), end + hi], ear)
    assert ear.heard == heard
    assert passed == head + end + (b"" if heard else hi)


# What the sieve does not take

MASK: Final = b"\x00\x00\x00\x00"


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(frame(TEXT, MASK + b"abc", length=b"\x83"), id="masked text"),
        pytest.param(frame(BINARY, MASK, length=b"\x80"), id="masked and empty"),
        pytest.param(frame(BINARY, b"\x00\x80" + MASK + b"a" * 128, length=b"\xfe"), id="masked, long"),
        pytest.param(frame(PING, MASK + b"a", length=b"\x81"), id="masked ping"),
        *(pytest.param(frame(TEXT | bit, b"abc"), id=f"reserved bit {bit:#x}") for bit in (0x40, 0x20, 0x10)),
        *(pytest.param(frame(PONG | bit, b"abc"), id=f"pong, reserved bit {bit:#x}") for bit in (0x40, 0x20, 0x10)),
        *(pytest.param(frame(0x80 | code, b"abc"), id=f"reserved opcode {code}") for code in range(3, 8)),
        *(pytest.param(frame(0x80 | code, b"abc"), id=f"reserved control opcode {code}") for code in range(11, 16)),
        pytest.param(frame(0x09, b"abc"), id="ping in fragments"),
        pytest.param(frame(PING, b"a" * 126), id="over-long ping"),
        pytest.param(frame(PONG, b"a" * 65536), id="over-long pong"),
        pytest.param(frame(CLOSE, b"\x03\xe8" + b"a" * 124), id="over-long close"),
        pytest.param(frame(0x00, b"abc"), id="fragment of nothing"),
        pytest.param(frame(0x80, b"abc"), id="last fragment of nothing"),
        pytest.param(frame(TEXT, b"abc", length=b"\x7e\x00\x03"), id="16 bits of length for 7"),
        pytest.param(frame(TEXT, b"a" * 125, length=b"\x7e\x00\x7d"), id="16 bits of length for 125"),
        pytest.param(frame(BINARY, b"abc", length=b"\x7f" + bytes(7) + b"\x03"), id="64 bits of length for 7"),
        pytest.param(frame(TEXT, b"a" * 126, length=b"\x7f" + bytes(7) + b"\x7e"), id="64 bits of length for 16"),
        pytest.param(
            frame(BINARY, b"a" * 65535, length=b"\x7f" + bytes(6) + b"\xff\xff"), id="64 bits of length for 65535"
        ),
        pytest.param(frame(TEXT, b"abc", length=b"\x7f\x80" + bytes(6) + b"\x03"), id="a negative length"),
        pytest.param(frame(CLOSE, b"a"), id="close with half a code"),
    ],
)
async def test_from_a_malformed_frame_on_all_is_passed_on(bad: bytes) -> None:
    before, after = frame(TEXT, b"before"), frame(TEXT, b"after") + frame(PING)
    alone = judged_alone(before + bad + after)
    refusal = alone.others[-1]
    assert isinstance(refusal, CloseConnection)
    assert refusal.code == 1002
    stream = HEAD + before + bad + after
    some = cuttings(stream) if len(stream) < 1000 else [[stream], cut(stream, range(len(HEAD), 400))]
    for pieces in some:
        ear = Ear()
        assert await sieved(pieces, ear) == HEAD + bad + after
        assert ear.heard == alone.heard == [("text", b"before")]


@pytest.mark.parametrize("limit", [0, 124, 125, 126, 127, 1000, 65535, 65536, 65537])
@pytest.mark.parametrize("kind", [TEXT, BINARY])
async def test_from_a_message_on_that_is_too_long_all_is_passed_on(kind: int, limit: int) -> None:
    longest = frame(kind, b"a" * limit)
    too_long = frame(kind, b"a" * (limit + 1))
    after = frame(TEXT) + frame(PING)
    header_begins = len(HEAD) + len(longest)
    for place in range(header_begins - 1, header_begins + 13):
        ear = Ear()
        pieces = cut(HEAD + longest + too_long + after, [place])
        assert await sieved(pieces, ear, max_message_bytes=limit) == HEAD + too_long + after
        assert ear.heard == [("text" if kind == TEXT else "binary", b"a" * limit)]


async def test_a_frame_that_is_too_long_is_passed_on_before_it_has_come() -> None:
    """Else whoever announces a terabyte is waited for."""
    header = frame(BINARY, length=b"\x7f" + struct.pack(">Q", 1 << 40))
    assert await sieved([HEAD + header], Ear()) == HEAD + header


@pytest.mark.parametrize("reason", [b"", b"\x03\xe8", b"\x03\xe9going away"])
async def test_nothing_is_heard_after_a_close(reason: bytes) -> None:
    before, close, after = frame(TEXT, b"before"), frame(CLOSE, reason), frame(TEXT, b"after")
    alone = judged_alone(before + close + after)
    for pieces in cuttings(HEAD + before + close + after):
        ear = Ear()
        assert await sieved(pieces, ear) == HEAD + close + after
        assert ear.heard == alone.heard == [("text", b"before")]


@pytest.mark.parametrize("text", [b"\xff", b"caf\xc3", b"\xed\xa0\x80", b"\xc0\x80"])
async def test_text_that_is_not_utf_8_is_heard_as_it_is(text: bytes) -> None:
    stream = HEAD + frame(TEXT, text) + frame(TEXT, b"after")
    for pieces in cuttings(stream):
        ear = Ear()
        assert await sieved(pieces, ear) == HEAD
        assert ear.heard == [("text", text), ("text", b"after")]


# Ends


@pytest.mark.parametrize(
    ("first", "size"),
    [*((kind, size) for kind in (TEXT, BINARY) for size in (0, 5, 125, 126, 300)), (PING, 0), (PONG, 9)],
)
async def test_what_has_come_of_a_frame_when_the_stream_ends_is_forgotten(first: int, size: int) -> None:
    begun = frame(first, b"a" * size)
    for end in range(len(begun)):
        for pieces in ([HEAD + begun[:end]], [HEAD, begun[:end]], [HEAD + begun[:1], begun[1:end]]):
            ear = Ear()
            assert await sieved([piece for piece in pieces if piece], ear) == HEAD
            assert ear.heard == []


async def test_the_stream_may_end_within_the_answer() -> None:
    for end in range(len(HEAD)):
        assert await sieved(cut(HEAD[:end], [end // 2]) if end else [], Ear()) == HEAD[:end]


async def test_a_cancelled_receive_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    server, client = memory_stream_pair()
    ear = Ear()
    sieve = FrameSieve(cast("trio.SocketStream", client), ear, MAX_MESSAGE_BYTES)
    message, ping = frame(TEXT, b"a" * 200), frame(PING, b"b")
    await server.send_all(HEAD)
    assert await sieve.receive_some() == HEAD
    for place in range(len(message)):
        await server.send_all(message[place : place + 1])
        with trio.move_on_after(1) as patience:
            await sieve.receive_some()
        assert patience.cancelled_caught
    await server.send_all(ping)
    assert await sieve.receive_some() == ping
    assert ear.heard == [("text", b"a" * 200)]


# The hearer's views


@attrs.define(eq=False)
class Keeper:
    """A hearer that keeps its views, which it must not."""

    views: list[memoryview] = attrs.field(factory=list)
    seen: list[bytes] = attrs.field(factory=list)

    def text(self, message: memoryview) -> None:
        self.views.append(message)
        self.seen.append(bytes(message))

    binary = text


async def test_a_view_is_released_after_the_call() -> None:
    stream = HEAD + frame(TEXT, b"one") + frame(BINARY, b"two") + frame(TEXT)
    for pieces in cuttings(stream):
        keeper = Keeper()
        await sieved(pieces, keeper)
        assert keeper.seen == [b"one", b"two", b""]
        for view in keeper.views:
            with pytest.raises(ValueError, match="released"):
                bytes(view)


# The rest of the stream, and the real thing


async def test_what_is_sent_goes_to_the_stream_and_so_does_the_close() -> None:
    server, client = memory_stream_pair()
    sieve = FrameSieve(cast("trio.SocketStream", client), Ear(), MAX_MESSAGE_BYTES)
    await sieve.wait_send_all_might_not_block()
    await sieve.send_all(b"up")
    assert await server.receive_some() == b"up"
    await sieve.aclose()
    assert await server.receive_some() == b""
    with pytest.raises(trio.ClosedResourceError):
        await sieve.receive_some()


async def test_close_closes_the_socket_at_once_and_again() -> None:
    ours, theirs = trio.socket.socketpair()
    with theirs, trio.fail_after(5):
        sieve = FrameSieve(trio.SocketStream(ours), Ear(), MAX_MESSAGE_BYTES)
        sieve.close()
        assert ours.fileno() == -1
        assert await theirs.recv(1) == b""
        sieve.close()
        await sieve.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await sieve.receive_some()


async def test_trio_websocket_answers_pings_and_knows_the_close_while_messages_are_heard() -> None:
    said: list[str | bytes] = []
    long = "lang ä " * 20_000

    async def engine(request: WebSocketRequest) -> None:
        socket = await request.accept()
        said.append(await socket.get_message())
        await socket.send_message("hello")
        await socket.ping(b"there?")  # returns when it is answered
        await socket.send_message(b"\x00preview")
        await socket.ping()
        await socket.send_message(long)
        said.append("answered")
        await socket.aclose(1001, "gone")

    ear = Ear()
    serve = partial(serve_websocket, engine, "127.0.0.1", 0, ssl_context=None)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            server: WebSocketServer = await nursery.start(serve)
            tcp = await trio.open_tcp_stream("127.0.0.1", server.port)
            sieve = FrameSieve(tcp, ear, MAX_MESSAGE_BYTES)
            async with sieve:
                socket = await wrap_client_stream(
                    nursery,
                    sieve,  # type: ignore[arg-type]  # as the listener does
                    "127.0.0.1",
                    "/ws",
                )
                await socket.send_message("flags")
                with pytest.raises(ConnectionClosed) as closed:
                    await socket.get_message()
            nursery.cancel_scope.cancel("the test is over")
    assert closed.value.reason is not None
    assert (closed.value.reason.code, closed.value.reason.reason) == (1001, "gone")
    assert said == ["flags", "answered"]
    assert ear.heard == [("text", b"hello"), ("binary", b"\x00preview"), ("text", long.encode())]
