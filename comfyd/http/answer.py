"""The 200 of ``/prompt``: JSON with the files in it as base64, written piece by piece as the files are read.

The length is known before the first byte, so a client can tell a whole answer from one that was cut off; and a video of
1 GB costs a piece of memory, not a gigabyte.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

import trio
from hypercorn.typing import ASGISendCallable

from comfyd.errors import NO_FACTS
from comfyd.http.asgi import JSON, send_whole, start
from comfyd.jobs import Success
from comfyd.media.collect import OutputFile
from comfyd.wire import encode_json

_WHOLE_BYTES: Final = 1 << 20
"""Answers with so many bytes of files or fewer are made in one go: one thread hop, one write."""
_PIECE_BYTES: Final = 3 * (1 << 18)
"""Read at once; a multiple of three, so that the pieces' base64 joins to the base64 of the whole."""
_READING_THREADS: Final = 8
"""Reading is bound by the disk; each reader holds one piece."""

_limiter = trio.CapacityLimiter(_READING_THREADS)


class FileChanged(Exception):
    """An output file is not what it was when it was collected; the answer cannot be completed."""


async def send_success(
    send: ASGISendCallable, job_id: str, success: Success, echo: Mapping[str, Any] = NO_FACTS
) -> None:
    """Send the whole answer; *echo* are blocks of the request that it repeats.

    Raises:
        FileChanged: a file vanished or shrank. If the answer had begun, it is cut off short of its stated length.
    """
    document = {**result_document(job_id, success), **echo}
    outputs = success.outputs
    if any(output.object_url is not None for output in outputs):
        head = {"id": document.pop("id"), "prompt": document.pop("prompt")}
        urls = {"images": [output.object_url for output in outputs]}
        await send_whole(send, 200, encode_json(head | urls | document))
        return
    before, after = _frame(document)
    read_along = [output.base64 for output in outputs if output.base64 is not None]
    if len(read_along) == len(outputs):
        await send_whole(send, 200, before + b",".join(b'"%b"' % text for text in read_along) + after)
        return
    if sum(output.size_bytes for output in outputs) <= _WHOLE_BYTES:
        body = await trio.to_thread.run_sync(_whole, before, outputs, after, limiter=_limiter)
        await send_whole(send, 200, body)
        return
    encoded = sum(_base64_length(output.size_bytes) + 2 for output in outputs) + max(0, len(outputs) - 1)
    length = len(before) + encoded + len(after)
    await start(send, 200, JSON, [(b"content-length", str(length).encode())])
    await _send_piece(send, before)
    for place, output in enumerate(outputs):
        await _send_piece(send, b',"' if place else b'"')
        await _send_file(send, output)
        await _send_piece(send, b'"')
    await send({"type": "http.response.body", "body": after, "more_body": False})


def result_document(job_id: str, success: Success) -> dict[str, Any]:
    """Everything of the 200 but the files themselves."""
    return {
        "id": job_id,
        "prompt": success.graph,
        "filenames": [output.filename for output in success.outputs],
        "outputs": [output_document(output) for output in success.outputs],
        "stats": success.stats.as_dict(),
    }


def output_document(output: OutputFile) -> Mapping[str, Any]:
    """One member of ``outputs``."""
    document: dict[str, Any] = {
        "filename": output.filename,
        "node_id": output.node_id,
        "media_type": output.media_type,
        "size_bytes": output.size_bytes,
    }
    if output.converted is not None:
        document["converted"] = output.converted
    if output.url is not None:
        document["url"] = output.url
    return document


def _frame(document: dict[str, Any]) -> tuple[bytes, bytes]:
    """What comes before and after the images, written so that the images need not be in memory."""
    head = encode_json({"id": document.pop("id"), "prompt": document.pop("prompt")})
    return head[:-1] + b',"images":[', b"]," + encode_json(document)[1:]


def _whole(before: bytes, outputs: tuple[OutputFile, ...], after: bytes) -> bytes:
    images = b",".join(b'"' + base64.b64encode(_read_whole(output)) + b'"' for output in outputs)
    return before + images + after


def _read_whole(output: OutputFile) -> bytes:
    try:
        data = output.path.read_bytes()
    except OSError as exc:
        raise FileChanged(output.filename) from exc
    if len(data) != output.size_bytes:
        raise FileChanged(output.filename)
    return data


async def _send_file(send: ASGISendCallable, output: OutputFile) -> None:
    file = await trio.to_thread.run_sync(_open, output.path, limiter=_limiter)
    with file:
        left = output.size_bytes
        while left:
            piece = await trio.to_thread.run_sync(_read_piece, file, min(left, _PIECE_BYTES), limiter=_limiter)
            left -= min(left, _PIECE_BYTES)
            await _send_piece(send, piece)


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb", buffering=0)
    except OSError as exc:
        raise FileChanged(path.name) from exc


def _read_piece(file: IO[bytes], size_bytes: int) -> bytes:
    """Read exactly so many bytes and encode them."""
    data = bytearray()
    while len(data) < size_bytes:
        some = file.read(size_bytes - len(data))
        if not some:
            raise FileChanged(Path(str(file.name)).name)
        data += some
    return base64.b64encode(data)


async def _send_piece(send: ASGISendCallable, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _base64_length(size_bytes: int) -> int:
    return (size_bytes + 2) // 3 * 4
