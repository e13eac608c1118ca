"""Who hears what: the websockets, and the frames sent to them (server.py, 0.3.64)."""

import struct
from collections import deque
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final

import attrs
import msgspec
import trio

# A reader that falls this far behind is disconnected: dropping single events would leave a client waiting for ever,
# and ComfyUI's way, to wait for it, stops every other client. The engine sends about a dozen frames per prompt, so the
# number is a thousand prompts; the bytes are for previews.
MAX_FRAMES_WAITING: Final = 16_384
MAX_BYTES_WAITING: Final = 64 * 1024 * 1024


class BinaryKind(IntEnum):
    """The first four bytes of a binary frame (protocol.py)."""

    PREVIEW_IMAGE = 1
    TEXT = 3
    PREVIEW_IMAGE_WITH_METADATA = 4


_JPEG: Final = 1  # format of a plain preview, after its kind


@attrs.define(eq=False, kw_only=True)
class Socket:
    """One client's websocket, as seen by those who send."""

    sid: str
    features: Mapping[str, Any] = attrs.field(factory=dict)
    overrun: bool = False
    _waiting: deque[str | bytes] = attrs.field(factory=deque)
    _waiting_bytes: int = 0
    _arrived: trio.Event = attrs.field(factory=trio.Event)

    def offer(self, frame: str | bytes) -> None:
        """Queue a frame; never waits. A socket that is too far behind is marked, and its writer ends it."""
        if self.overrun:
            return
        self._waiting.append(frame)
        self._waiting_bytes += len(frame)
        if len(self._waiting) > MAX_FRAMES_WAITING or self._waiting_bytes > MAX_BYTES_WAITING:
            self.overrun = True
            self._waiting.clear()
        self._arrived.set()

    async def take(self) -> deque[str | bytes]:
        """Wait for frames and return all of them; none means that the socket was overrun."""
        await self._arrived.wait()
        taken, self._waiting = self._waiting, deque()
        self._waiting_bytes = 0
        if not self.overrun:
            self._arrived = trio.Event()
        return taken


@attrs.define(eq=False)
class Hub:
    """The connected sockets by client id. All methods belong to the event loop."""

    sockets: dict[str, Socket] = attrs.field(factory=dict)

    def connect(self, sid: str) -> Socket:
        """Register a socket. One with the same id loses its place and hears nothing more."""
        socket = Socket(sid=sid)
        self.sockets[sid] = socket
        return socket

    def disconnect(self, sid: str) -> None:
        """Forget the client id, whichever socket holds it now.

        That a closed socket takes a newer one of the same id with it is ComfyUI's behaviour (the reconnect trap).
        """
        self.sockets.pop(sid, None)

    def supports(self, sid: str | None, feature: str) -> bool:
        """Whether a client said that it understands a feature."""
        socket = None if sid is None else self.sockets.get(sid)
        return socket is not None and socket.features.get(feature) is True

    def send(self, event: str, data: Mapping[str, Any], sid: str | None = None) -> None:
        """Send a JSON event to one client, or to all when *sid* is None. Encoded once, and not at all for nobody."""
        if self.sockets if sid is None else sid in self.sockets:
            self._deliver(msgspec.json.encode({"type": event, "data": data}).decode(), sid)

    def send_preview(self, jpeg: bytes, metadata: Mapping[str, Any], sid: str | None) -> None:
        """Send a preview, with the ids it belongs to if the client said that it understands them."""
        if self.supports(sid, "supports_preview_metadata"):
            head = msgspec.json.encode({**metadata, "image_type": "image/jpeg"})
            body = struct.pack(">II", BinaryKind.PREVIEW_IMAGE_WITH_METADATA, len(head)) + head + jpeg
        else:
            body = struct.pack(">II", BinaryKind.PREVIEW_IMAGE, _JPEG) + jpeg
        self._deliver(body, sid)

    def send_text(self, node_id: str, text: str) -> None:
        """Send a line of text that a node shows; ComfyUI 0.3.64 sends it to every client."""
        node = node_id.encode()
        self._deliver(struct.pack(">II", BinaryKind.TEXT, len(node)) + node + text.encode(), None)

    def _deliver(self, frame: str | bytes, sid: str | None) -> None:
        sockets = self.sockets.values() if sid is None else [self.sockets[sid]] if sid in self.sockets else ()
        for socket in sockets:
            socket.offer(frame)
