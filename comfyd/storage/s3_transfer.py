"""One conversation with S3 about one object. Everything here blocks: called in threads only, by :class:`S3Store`."""

import os
import random
import threading
import uuid
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import attrs
import structlog

from comfyd.storage.s3_config import MIB, S3Config
from comfyd.storage.s3_errors import LocalFileError, StorageFailed, Trouble, diagnose, handled_errors

log = structlog.get_logger("comfyd.storage")

T = TypeVar("T")

MAX_PARTS: Final = 10_000  # of one multipart upload, in S3
_PIECE_BYTES: Final = 256 * 1024  # of a download: what is in memory at a time, and how often a cancel is looked for


class Stopped(Exception):
    """The caller no longer waits; what was begun is undone."""


@attrs.frozen(kw_only=True)
class Transfer:
    """The object, the client, and *stop*, which the caller sets to end it early."""

    client: Any
    config: S3Config
    bucket: str
    key: str
    stop: threading.Event

    def upload(self, path: Path, content_type: str) -> None:
        """Write *path* to the object. When this returns, the store has confirmed all of it.

        Raises:
            StorageFailed: it is not there, and no part of it is left.
            Stopped: *stop* was set; no part of it is left.
        """
        try:
            with path.open("rb") as file:
                size_bytes = os.fstat(file.fileno()).st_size
                if size_bytes < self.config.multipart_from_bytes:
                    self._attempt(partial(self._put, file, size_bytes, content_type))
                else:
                    self._upload_in_parts(file, size_bytes, content_type)
        except OSError as exc:
            raise self._failed(Trouble.LOCAL_FILE, f"the output file cannot be read ({exc.strerror})") from exc

    def download(self, path: Path, max_bytes: int) -> int:
        """Write the object to *path*, which is there only once it is whole. Returns its size in bytes.

        Raises:
            StorageFailed: it cannot be had, or is larger than *max_bytes*; nothing is left on disk.
            Stopped: *stop* was set; nothing is left on disk.
        """
        unfinished = path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            size_bytes = self._attempt(partial(self._fetch, unfinished, max_bytes))
            if self.stop.is_set():
                raise Stopped
            unfinished.replace(path)
        except OSError as exc:
            raise self._failed(Trouble.LOCAL_FILE, f"cannot be written to disk ({exc.strerror})") from exc
        finally:
            unfinished.unlink(missing_ok=True)
        return size_bytes

    def presign(self, expires_s: int) -> str:
        """Return an http(s) URL by which anybody may GET the object for *expires_s* seconds.

        Made without asking the store; only credentials that are leased may have to be renewed.
        """
        return self._attempt(
            lambda: str(self.client.generate_presigned_url("get_object", Params=self._names, ExpiresIn=expires_s))
        )

    def _put(self, file: IO[bytes], size_bytes: int, content_type: str) -> None:
        piece = Piece(file=file, start=0, size_bytes=size_bytes, stop=self.stop)
        self.client.put_object(**self._names, Body=piece, ContentLength=size_bytes, ContentType=content_type)

    def _upload_in_parts(self, file: IO[bytes], size_bytes: int, content_type: str) -> None:
        """Upload part by part, and from the start once more if the store forgets the upload on the way.

        One reason for that is that it did complete it and only the answer was lost: the same bytes under the same key
        again do no harm, and to take what is there for ours would be a guess.
        """
        try:
            self._multipart(file, size_bytes, content_type)
        except StorageFailed as exc:
            if exc.trouble is not Trouble.NO_SUCH_UPLOAD:
                raise
            log.warning("s3_upload_restarted", bucket=self.bucket, key=self.key)
            self._multipart(file, size_bytes, content_type)

    def _multipart(self, file: IO[bytes], size_bytes: int, content_type: str) -> None:
        """Do one multipart upload. Where a part fails for good, or we are stopped, the store is told to forget it."""
        created = self._attempt(lambda: self.client.create_multipart_upload(**self._names, ContentType=content_type))
        upload = {**self._names, "UploadId": created["UploadId"]}
        try:
            parts = self._upload_all_parts(file, size_bytes, upload)
            self._attempt(lambda: self.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}))
        except BaseException:
            self._abort(upload)
            raise

    def _upload_all_parts(self, file: IO[bytes], size_bytes: int, upload: dict[str, str]) -> list[dict[str, Any]]:
        part_bytes = part_size(size_bytes, self.config.part_bytes)
        parts: list[dict[str, Any]] = []
        for number, start in enumerate(range(0, size_bytes, part_bytes), start=1):
            length = min(part_bytes, size_bytes - start)
            etag = self._attempt(partial(self._upload_part, file, start, length, number, upload))
            parts.append({"PartNumber": number, "ETag": etag})
        return parts

    def _upload_part(self, file: IO[bytes], start: int, size_bytes: int, number: int, upload: dict[str, str]) -> str:
        piece = Piece(file=file, start=start, size_bytes=size_bytes, stop=self.stop)
        answer = self.client.upload_part(**upload, PartNumber=number, Body=piece, ContentLength=size_bytes)
        return str(answer["ETag"])

    def _abort(self, upload: dict[str, str]) -> None:
        """Have the store forget the parts, for which their owner would pay. Tried twice, as nobody else will."""
        for last in (False, True):
            try:
                self.client.abort_multipart_upload(**upload)
            except handled_errors() as exc:
                diagnosis = diagnose(exc, self.client.meta.endpoint_url)
                if diagnosis.trouble is Trouble.NO_SUCH_UPLOAD:
                    return
                if last or not diagnosis.passes:
                    log.warning(
                        "s3_parts_left",
                        bucket=self.bucket,
                        key=self.key,
                        upload_id=upload["UploadId"],
                        reason=diagnosis.trouble.value,
                        cause=diagnosis.cause,
                    )
                    return
            else:
                return

    def _fetch(self, unfinished: Path, max_bytes: int) -> int:
        answer = self.client.get_object(**self._names)
        received_bytes = 0
        with closing(answer["Body"]) as body:
            if (answer.get("ContentLength") or 0) > max_bytes:
                raise self._too_large(max_bytes)
            with unfinished.open("wb") as file:
                # Raises IncompleteReadError at the end if that came before ContentLength.
                for piece in body.iter_chunks(_PIECE_BYTES):
                    if self.stop.is_set():
                        raise Stopped
                    received_bytes += len(piece)
                    if received_bytes > max_bytes:
                        raise self._too_large(max_bytes)
                    file.write(piece)
        return received_bytes

    def _attempt(self, request: Callable[[], T]) -> T:
        """Make *request* until it succeeds, as often as the config and the kind of failure allow."""
        for attempt in range(1, self.config.attempts + 1):
            if self.stop.is_set():
                raise Stopped
            try:
                return request()
            except handled_errors() as exc:
                if self.stop.is_set():
                    raise Stopped from exc
                diagnosis = diagnose(exc, self.client.meta.endpoint_url)
                if not diagnosis.passes or attempt == self.config.attempts:
                    tried = f" (after {attempt} attempts)" if attempt > 1 else ""
                    raise self._failed(diagnosis.trouble, diagnosis.cause + tried, diagnosis.region) from exc
                wait_s = self.config.delay_s(attempt, random.random())  # noqa: S311  # jitter, not a secret
                log.warning(
                    "s3_retry",
                    bucket=self.bucket,
                    key=self.key,
                    reason=diagnosis.trouble.value,
                    cause=diagnosis.cause,
                    attempt=attempt,
                    wait_s=round(wait_s, 2),
                )
            self.stop.wait(wait_s)
        raise AssertionError("the last attempt returns or raises")

    @property
    def _names(self) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.key}

    def _failed(self, trouble: Trouble, cause: str, region: str | None = None) -> StorageFailed:
        return StorageFailed(self.bucket, self.key, trouble, cause, region=region)

    def _too_large(self, max_bytes: int) -> StorageFailed:
        return self._failed(Trouble.TOO_LARGE, f"is larger than {max_bytes / MIB:g} MB")


def part_size(size_bytes: int, part_bytes: int) -> int:
    """The size of a part: *part_bytes*, or as many MiB as it takes to need no more than 10,000 of them."""
    least = -(-size_bytes // MAX_PARTS)
    return max(part_bytes, -(-least // MIB) * MIB)


@attrs.define(eq=False)
class Piece:
    """A range of a file as a body that botocore can send, and send again (it seeks back after a redirect).

    Never more than what was asked for is in memory. It reads by position, so pieces of one file do not disturb each
    other. Once *stop* is set it fails, which ends the request in the middle.
    """

    file: IO[bytes]
    start: int
    size_bytes: int
    stop: threading.Event
    _offset: int = 0

    def read(self, amount: int | None = -1) -> bytes:
        """Read up to *amount* bytes, or all that is left if that is None or negative."""
        if self.stop.is_set():
            raise Stopped
        left = self.size_bytes - self._offset
        wanted = left if amount is None or amount < 0 else min(amount, left)
        if wanted == 0:
            return b""
        try:
            data = os.pread(self.file.fileno(), wanted, self.start + self._offset)
        except OSError as exc:
            raise LocalFileError(f"the output file cannot be read ({exc.strerror})") from exc
        if not data:  # or the peer would wait for the rest until it times out
            raise LocalFileError("the output file became shorter while it was uploaded")
        self._offset += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move as a file does, within the piece."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self.size_bytes}[whence]
        self._offset = min(max(origin + offset, 0), self.size_bytes)
        return self._offset

    def tell(self) -> int:
        """Where in the piece the next read begins."""
        return self._offset
