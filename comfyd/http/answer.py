"""The 200 of ``/prompt``: JSON with the files in it as base64, written piece by piece as the files are read.

The length is known before the first byte, so a client can tell a whole answer from one that was cut off; and a video of
1 GB costs a piece of memory, not a gigabyte.
"""

from collections.abc import Mapping
from typing import Any, Final

from hypercorn.typing import ASGISendCallable

from comfyd.errors import NO_FACTS
from comfyd.http.asgi import JSON, send_whole, start
from comfyd.jobs import Success
from comfyd.jobs.results import output_document, success_json
from comfyd.media.json_files import PIECE_BYTES, FileChanged

__all__ = ["FileChanged", "output_document", "send_success"]

_WHOLE_BYTES: Final = 1 << 20
"""Answers with so many bytes of files or fewer are made in one go: one thread hop, one write."""
_PIECE_BYTES: Final = PIECE_BYTES


async def send_success(
    send: ASGISendCallable, job_id: str, success: Success, echo: Mapping[str, Any] = NO_FACTS
) -> None:
    """Send the whole answer; *echo* are blocks of the request that it repeats.

    Raises:
        FileChanged: a file vanished or shrank. If the answer had begun, it is cut off short of its stated length.
    """
    answer = success_json(job_id, success, echo=echo)
    if (at_hand := answer.joined()) is not None:
        await send_whole(send, 200, at_hand)
        return
    if answer.to_read_bytes <= _WHOLE_BYTES:
        await send_whole(send, 200, await answer.read_whole())
        return
    left = length = answer.length
    await start(send, 200, JSON, [(b"content-length", str(length).encode())])
    with answer.open(_PIECE_BYTES) as pieces:
        async for piece in pieces:
            left -= len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
