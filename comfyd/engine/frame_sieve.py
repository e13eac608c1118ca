"""Takes the messages of a websocket out of its bytes before trio-websocket sees them.

A prompt has ten or so small frames. trio-websocket and wsproto below it take 40 us for each, most of what they cost
going into objects and turns of the loop that an unmasked, unfragmented frame from a server does not need: 32 % of
comfyd's processor time with an engine that costs nothing. So trio-websocket has the handshake, pings, the close and
all errors, and what it has in common with every server; whole frames go straight to whoever hears them.
"""

import re
from struct import Struct
from typing import Final, Protocol

import trio

_WHOLE_TEXT: Final = 0x81  # FIN and opcode 1; no bit is set that stands for an extension (RFC 6455, section 5.2)
_WHOLE_BINARY: Final = 0x82
_WHOLE_CONTROL: Final = (0x89, 0x8A)  # ping and pong. Not the close: what follows it is no message, whatever it says
_MAX_CONTROL_BYTES: Final = 125
_LENGTH_16: Final = 126
_LENGTH_64: Final = 127
_MAX_LENGTH_16: Final = 0xFFFF
_MASKED: Final = 0x80
_UINT16: Final = Struct(">H")
_UINT64: Final = Struct(">Q")
_UPGRADED: Final = b"HTTP/1.1 101"
_HEAD_END: Final = re.compile(rb"\n\r?\n")  # as h11 has it, which takes bare newlines
_MAX_HEAD_BYTES: Final = 64 * 1024
"""Of the answer to the handshake; h11 gives up long before."""


class Hearer(Protocol):
    """Who hears messages. The views are only valid during the call, and nothing is waited for."""

    def text(self, message: memoryview, /) -> None:
        """A text message, which nobody has looked at: it need not even be UTF-8."""

    def binary(self, message: memoryview, /) -> None:
        """A binary message."""


class FrameSieve(trio.abc.Stream):
    """A client's stream for :func:`trio_websocket.wrap_client_stream`, which gives *hearer* every whole message.

    What is passed on: the handshake; pings and pongs; and everything from the first frame on that is a close, part of
    a larger message, longer than *max_message_bytes*, or malformed. Its order is kept by that: a message is either
    heard here, or comes after all those that were.
    """

    def __init__(self, stream: trio.SocketStream, hearer: Hearer, max_message_bytes: int) -> None:
        self._stream = stream
        self._hearer = hearer
        self._max_message_bytes = max_message_bytes
        self._head: bytearray | None = bytearray()  # the answer to the handshake so far; None: it is over
        self._passing = False  # everything from here on is trio-websocket's
        self._after_head: bytes | bytearray = b""  # what came with its end
        self._held = bytearray()  # the beginning of a frame
        self._wanted = 0  # how long that has to be before it is worth looking at again

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive what is not for the hearer; ``b""`` at the end. *max_bytes* is read at once from the socket.

        Raises:
            trio.BrokenResourceError: the connection was lost.
            trio.ClosedResourceError: it was closed by us.
        """
        while True:
            data = self._after_head
            if data:
                self._after_head = b""
            else:
                data = await self._stream.receive_some(max_bytes)
            if not data or self._passing:
                return data
            if self._head is not None:
                head = self._take_head(self._head, data)
                # Heard when trio-websocket asks for more, as it may yet refuse what answered the handshake.
                self._after_head = data[len(head) :]
                return head
            passed = self._sift(data)
            if passed:
                return passed

    def _sift(self, data: bytes | bytearray) -> bytes | bytearray:
        passed = bytearray()
        if self._held:
            self._held += data
            if len(self._held) < self._wanted:
                return passed
            data, self._held = self._held, bytearray()
        with memoryview(data) as view:
            place = 0
            while place < len(view):
                span = self._measure(view, place)
                if span is None:
                    self._passing = True
                    passed += view[place:]
                    break
                begin, end = span
                if end > len(view):
                    self._wanted = end - place
                    self._held += view[place:]
                    break
                kind = view[place]
                with view[begin:end] as message:
                    if kind == _WHOLE_TEXT:
                        self._hearer.text(message)
                    elif kind == _WHOLE_BINARY:
                        self._hearer.binary(message)
                    else:
                        passed += view[place:end]
                place = end
        return passed

    def _take_head(self, head: bytearray, data: bytes | bytearray) -> bytes | bytearray:
        """Give what of *data* belongs to the answer to the handshake, of which *head* has come."""
        before = len(head)
        head += data
        end = _HEAD_END.search(head, max(0, before - 2))
        if end is None:
            self._passing = len(head) > _MAX_HEAD_BYTES
            return data
        if not head.startswith(_UPGRADED):
            self._passing = True
            return data
        self._head = None
        return data[: end.end() - before]

    def _measure(self, view: memoryview, place: int) -> tuple[int, int] | None:
        """Find where the payload of the frame at *place* begins and ends; None for a frame that is not ours.

        While the frame is not whole, the end lies beyond the view's, and is where more can be told.
        """
        here = len(view) - place
        if here < 2:
            return place, place + 2
        first, length = view[place], view[place + 1]
        begin = place + 2
        if first in _WHOLE_CONTROL:
            known = length <= _MAX_CONTROL_BYTES
        else:
            known = first in (_WHOLE_TEXT, _WHOLE_BINARY) and not length & _MASKED
        if not known:
            return None
        if length == _LENGTH_16:
            begin += _UINT16.size
            if here < begin - place:
                return begin, begin
            (length,) = _UINT16.unpack_from(view, place + 2)
            if length <= _MAX_CONTROL_BYTES:  # shorter would have done, which section 5.2 demands
                return None
        elif length == _LENGTH_64:
            begin += _UINT64.size
            if here < begin - place:
                return begin, begin
            (length,) = _UINT64.unpack_from(view, place + 2)
            if length <= _MAX_LENGTH_16:
                return None
        if length > self._max_message_bytes:
            return None
        return begin, begin + length

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send *data*."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until sending is possible."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    def close(self) -> None:
        """Close the connection without waiting."""
        self._stream.socket.close()
