"""Conditions and ranges of a download: which part of it is asked for, if any (RFC 9110, sections 13 and 14)."""

import re
from typing import Final

import attrs
from hypercorn.typing import HTTPScope

from comfyd.http.asgi import header

_ONE_RANGE: Final = re.compile(r"bytes[ \t]*=[ \t]*([0-9]{0,19})-([0-9]{0,19})[ \t]*", re.IGNORECASE)


@attrs.frozen
class Part:
    """The bytes from *begin* to before *end*."""

    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """How many they are."""
        return self.end - self.begin


class Unsatisfiable(Exception):
    """The range begins after the end."""


def not_modified(scope: HTTPScope, etag: str) -> bool:
    """Whether the client has what *etag* names already (``If-None-Match``)."""
    given = header(scope, b"if-none-match")
    if given is None:
        return False
    return given.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in given.split(","))


def wanted_part(scope: HTTPScope, etag: str, size_bytes: int) -> Part | None:
    """The part that a GET asks for; None for the whole.

    What a server may ignore is ignored: several ranges at once, other units, and ranges that are not well-formed. A
    range with ``If-Range`` counts only for the very same content; a date never is, as we send none.

    Raises:
        Unsatisfiable: there is nothing at that place.
    """
    given = header(scope, b"range")
    if scope["method"] != "GET" or given is None or header(scope, b"if-range") not in {None, etag}:
        return None
    match = _ONE_RANGE.fullmatch(given.strip())
    if match is None:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:  # so many bytes from the end
        length = int(last)
        if not length:
            raise Unsatisfiable
        return Part(max(0, size_bytes - length), size_bytes) if size_bytes else None
    begin = int(first)
    if last and int(last) < begin:
        return None
    if begin >= size_bytes:
        raise Unsatisfiable
    return Part(begin, min(size_bytes, int(last) + 1) if last else size_bytes)
