"""Names of things in S3: what a request may say, and how a key and an ``s3://`` URL are made and read."""

import re
from typing import Annotated, Final

import attrs
from msgspec import Meta

from comfyd.wire import quoted, wire_field

MAX_PREFIX_BYTES: Final = 900
"""S3 takes keys of 1024 bytes. This leaves 124 for the file's name; a longer key S3 refuses (KeyTooLongError)."""

# What botocore takes as a bucket (botocore/handlers.py, VALID_BUCKET), less names that begin with a dot. Amazon's own
# rules for new buckets are narrower, but old buckets and compatible stores have capitals, underscores and long names.
_BUCKET: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{2,254}$"
_BUCKET_WORDS: Final = "be the name of a bucket: 3 to 255 letters, digits, dots, hyphens and underscores"
_SCHEME: Final = "s3://"


@attrs.frozen(kw_only=True)
class S3Target:
    """Where in S3 a request wants its outputs: the ``s3`` block, echoed as sent."""

    bucket: Annotated[str, Meta(pattern=_BUCKET, extra={"must": _BUCKET_WORDS}, description="Name of the bucket.")]
    prefix: Annotated[
        str,
        Meta(
            max_length=MAX_PREFIX_BYTES,
            pattern="^[^\\x00-\\x1f\\x7f]*$",
            extra={"must": "have no control characters"},
            description="Put before the file's name as it is, to make the key; no slash is added.",
        ),
    ] = ""
    is_async: Annotated[bool, Meta(description="Answer 202 at once, and upload when the job is done.")] = wire_field(
        "async", default=False
    )
    presign_s: (
        Annotated[
            int,
            Meta(ge=1, le=604_800, description="Also presign a URL for each output's `url`, good for so many seconds."),
        ]
        | None
    ) = None

    def __attrs_post_init__(self) -> None:
        """Hold the prefix against the bound in bytes, which JSON Schema cannot say."""
        try:
            size_bytes = len(self.prefix.encode())
        except UnicodeEncodeError:
            raise ValueError("prefix must be valid Unicode; it holds half of a surrogate pair") from None
        if size_bytes > MAX_PREFIX_BYTES:
            raise ValueError(f"prefix must have at most {MAX_PREFIX_BYTES} bytes in UTF-8, got {size_bytes}")

    def place(self, filename: str) -> "S3Object":
        """Where the output called *filename* goes."""
        return S3Object(bucket=self.bucket, key=key_of(self.prefix, filename))


@attrs.frozen(kw_only=True)
class S3Object:
    """An object by its names. *key* is verbatim: no character of it is encoded, decoded or normalised, ever."""

    bucket: str
    key: str

    @property
    def url(self) -> str:
        """Its ``s3://`` URL."""
        return s3_url(self.bucket, self.key)


class BadS3Url(ValueError):
    """A text is no usable ``s3://`` URL. The text is for the caller."""


def key_of(prefix: str, filename: str) -> str:
    """The key of an output: *prefix* and *filename* with nothing between them, as comfyui-api's clients expect."""
    return prefix + filename


def s3_url(bucket: str, key: str) -> str:
    """The ``s3://`` URL of an object, with the key verbatim, so that ``aws s3 cp`` takes it."""
    return f"{_SCHEME}{bucket}/{key}"


def parse_s3_url(url: str) -> S3Object:
    """Read ``s3://bucket/key``. All after the slash is the key: spaces, ``#``, ``?`` and ``%20`` mean themselves.

    Raises:
        BadS3Url: it has another scheme, or lacks the bucket or the key.
    """
    if url[: len(_SCHEME)].lower() != _SCHEME:
        raise BadS3Url(f"is not an s3:// URL, got {quoted(url)}")
    bucket, _, key = url[len(_SCHEME) :].partition("/")
    if not bucket:
        raise BadS3Url(f"names no bucket (s3://bucket/key), got {quoted(url)}")
    if not re.fullmatch(_BUCKET.strip("^$"), bucket):
        raise BadS3Url(f"names a bucket that cannot be ({quoted(bucket)}); it must {_BUCKET_WORDS}")
    if not key:
        raise BadS3Url(f"names no object (s3://bucket/key), got {quoted(url)}")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise BadS3Url("is not valid Unicode; it holds half of a surrogate pair") from None
    return S3Object(bucket=bucket, key=key)
