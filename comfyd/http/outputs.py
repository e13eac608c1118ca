"""``GET /jobs/<id>/outputs/<n>``: a file that a job made, as it is, whole or in part.

It is read piece by piece in threads, so a film of 2 GB costs a piece of memory, and a client that stalls holds just
that. The file is opened before anything is answered: if it is removed meanwhile, what is open stays readable.
"""

import os
import stat
from pathlib import Path
from typing import Final
from urllib.parse import quote

import structlog
import trio

from comfyd.errors import Failure, FailureKind, RequestRefused
from comfyd.http import problems
from comfyd.http.asgi import Exchange, send_empty, send_failure, send_json, start, until_client_gone
from comfyd.http.disposition import SAFETY_HEADERS, content_disposition, content_type
from comfyd.http.job_views import keeps, output_documents
from comfyd.http.ranges import Part, Unsatisfiable, not_modified, wanted_part
from comfyd.jobs import Job, Success
from comfyd.media.collect import OutputFile

log = structlog.get_logger("comfyd.http")

_PIECE_BYTES: Final = 1 << 19
"""Of 256 KB to 1 MB none is faster than another by more than a tenth; each reader holds one."""
_READING_THREADS: Final = 8
"""Reading is bound by the disk."""

_URL_CHARACTERS: Final = "%/:=&?~#+!$,;'@()*[]"
"""What a URL is made of beside letters, digits and ``_.-`` (RFC 3986); the rest has no place in a header."""

_limiter = trio.CapacityLimiter(_READING_THREADS)


class FileGone(Exception):
    """The file of an output is not there, or not what it was."""


async def send_outputs(exchange: Exchange, job: Job) -> None:
    """List the outputs of *job*.

    Raises:
        RequestRefused: it has none, or not yet.
    """
    await send_json(exchange.send, 200, {"id": job.id, "outputs": output_documents(job, _success(job))})


async def send_output(exchange: Exchange, job: Job, place: str) -> None:
    """Send output number *place* of *job*, or say where it is.

    Raises:
        RequestRefused: there is no such output, or it is not to be had from here.
    """
    outputs = _success(job).outputs
    if not (place.isascii() and place.isdecimal() and len(place) < 10 and int(place) < len(outputs)):
        raise RequestRefused(problems.not_found(f"such output; the job has {len(outputs)}, counted from 0"))
    output = outputs[int(place)]
    if output.object_url is not None:
        await _send_elsewhere(exchange, output)
        return
    if not keeps(job, output):
        raise RequestRefused(problems.not_found("file of this output here: it went out with the answer of the job"))
    etag = f'"{job.key}-{int(place)}-{output.size_bytes}"'
    try:
        file = await trio.to_thread.run_sync(_open, output, limiter=_limiter)
    except FileGone:
        log.error("http.output_gone", job_id=job.id, file=output.filename)  # noqa: TRY400  # about the disk, no bug
        raise RequestRefused(problems.not_found("file of this output any more")) from None
    try:
        await _send_file(exchange, file, output, etag)
    finally:
        os.close(file)


async def _send_elsewhere(exchange: Exchange, output: OutputFile) -> None:
    url = output.url or ""
    if not url.startswith(("https://", "http://")):
        raise RequestRefused(problems.not_found(f"file of this output here: it was stored as {output.object_url}"))
    location = quote(url, safe=_URL_CHARACTERS).encode("ascii")
    # The URL is for its caller and ends some day: nobody on the way is to keep it.
    await send_empty(exchange.send, 302, [(b"location", location), (b"cache-control", b"no-store")])


async def _send_file(exchange: Exchange, file: int, output: OutputFile, etag: str) -> None:
    # "no-cache": to be kept, but asked for again, as the output can be deleted and the id be used anew.
    validators = [(b"etag", etag.encode()), (b"cache-control", b"private, no-cache")]
    if not_modified(exchange.scope, etag):
        await send_empty(exchange.send, 304, validators)
        return
    whole = Part(0, output.size_bytes)
    try:
        part = wanted_part(exchange.scope, etag, output.size_bytes)
    except Unsatisfiable:
        await _send_unsatisfiable(exchange, output.size_bytes)
        return
    headers = [
        (b"content-length", str((part or whole).size_bytes).encode()),
        (b"content-disposition", content_disposition(output.filename, output.media_type)),
        (b"accept-ranges", b"bytes"),
        *validators,
        *SAFETY_HEADERS,
    ]
    if part is not None:
        headers.append((b"content-range", f"bytes {part.begin}-{part.end - 1}/{output.size_bytes}".encode()))
    await start(exchange.send, 200 if part is None else 206, content_type(output.media_type), headers)
    await until_client_gone(exchange, lambda: _send_part(exchange, file, part or whole))


async def _send_part(exchange: Exchange, file: int, part: Part) -> None:
    place = part.end if exchange.scope["method"] == "HEAD" else part.begin
    while place < part.end:
        wanted = min(_PIECE_BYTES, part.end - place)
        data = await trio.to_thread.run_sync(os.pread, file, wanted, place, limiter=_limiter)
        if not data:
            # Raised with the answer begun, it cuts the answer short of its stated length: the client sees it.
            raise FileGone("an output became shorter while it was sent")
        place += len(data)
        await exchange.send({"type": "http.response.body", "body": data, "more_body": True})
    await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_unsatisfiable(exchange: Exchange, size_bytes: int) -> None:
    detail = f"the range begins after the end; there are {size_bytes} bytes"
    failure = Failure(kind=FailureKind.RANGE_NOT_SATISFIABLE, detail=detail)
    await send_failure(exchange.send, failure, headers=[(b"content-range", f"bytes */{size_bytes}".encode())])


def _success(job: Job) -> Success:
    match job.outcome:
        case Success() as success:
            return success
        case Failure():
            raise RequestRefused(problems.not_found(f"output: the job has {job.state.value}"))
        case _:
            detail = "there is no output yet: the job has not ended"
            raise RequestRefused(Failure(kind=FailureKind.NOT_FOUND, detail=detail))


def _open(output: OutputFile) -> int:
    """Open the file of *output*; the caller closes it."""
    try:
        # Without waiting for the other end, should it be a pipe by now.
        file = os.open(output.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise FileGone(Path(output.path).name) from exc
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size != output.size_bytes:
        os.close(file)
        raise FileGone(Path(output.path).name)
    return file
