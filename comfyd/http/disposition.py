"""How a browser is to treat a file that a graph made: its name, its type, and that it may do nothing here.

The files are a caller's content under our own origin. One that a browser would run as a program (a page, a vector
drawing, a script) would act there with all rights of whoever looks at it, so only what is merely looked at or listened
to is shown; everything else is saved.
"""

import re
from typing import Final
from urllib.parse import quote

_MEDIA_TYPE: Final = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,63}/[a-z0-9][a-z0-9!#$&^_.+-]{0,63}")
_SHOWN_KINDS: Final = {"image", "audio", "video"}
_UNSAFE: Final = re.compile(r"[^ !#-$&-.0-\[\]-~]")
"""For the plain ``filename``: not ASCII, or one of ``"`` ``\\`` ``/`` ``%``, which agents read differently (RFC 6266,
appendix D)."""
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f/\\]")
_LONGEST_NAME: Final = 255
_SANDBOX: Final = b"sandbox; default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'"
"""No scripts, forms or plug-ins, and an origin of its own; the rest lets browsers show pictures and films."""

SAFETY_HEADERS: Final = ((b"x-content-type-options", b"nosniff"), (b"content-security-policy", _SANDBOX))


def content_type(media_type: str) -> bytes:
    """The value of ``Content-Type``; what is no media type is some bytes."""
    media_type = media_type.lower()
    if not _MEDIA_TYPE.fullmatch(media_type):
        return b"application/octet-stream"
    return (f"{media_type}; charset=utf-8" if media_type.startswith("text/") else media_type).encode()


def content_disposition(filename: str, media_type: str) -> bytes:
    """The value of ``Content-Disposition``, for any *filename* (RFC 6266, RFC 8187)."""
    kind, _, subtype = media_type.lower().partition("/")
    shown = (kind in _SHOWN_KINDS and not subtype.endswith("xml")) or media_type.lower() == "text/plain"
    name = _CONTROL.sub("_", filename)[:_LONGEST_NAME]
    plain = _UNSAFE.sub("_", name)
    value = f'{"inline" if shown else "attachment"}; filename="{plain}"'
    if plain != name:
        value += f"; filename*=UTF-8''{quote(name, safe='', errors='replace')}"
    return value.encode("ascii")
