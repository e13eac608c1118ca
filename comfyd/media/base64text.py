"""Base64 as people send it: with line breaks, in the URL-safe alphabet, without padding; large, and sometimes wrong.

Decoded piece by piece, so that 90 MB of text cost a piece and not another 90 MB, and the interpreter lock is given back
between two pieces.
"""

import binascii
import re
from collections.abc import Iterator
from typing import Final

from comfyd.media.sniff import HEAD_BYTES, MediaType, sniff

_PIECE_CHARACTERS: Final = 1 << 20
_URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")
_WHITE: Final = b" \t\r\n"
_ALPHABET: Final = re.compile(r"[A-Za-z0-9+/_\-\s]*={0,2}\s*", re.ASCII)


class NotBase64(ValueError):
    """The text is not base64; the message says what is wrong with it."""


def media_type_of_text(text: str) -> MediaType | None:
    """What *text* holds if it is base64 of a media file, by its beginning; None if it is anything else."""
    head = text[: 2 * HEAD_BYTES]
    if not _ALPHABET.fullmatch(head):
        return None
    packed = head.encode("ascii").translate(_URL_SAFE, _WHITE).rstrip(b"=")
    try:
        return sniff(binascii.a2b_base64(packed[: len(packed) // 4 * 4]))
    except binascii.Error:
        return None


def looks_like_base64(text: str) -> bool:
    """Whether *text* begins and ends in base64's alphabet, and is longer than a word."""
    ends = text[:4096], text[-64:]
    return len(text) >= 64 and all(_ALPHABET.fullmatch(end) is not None for end in ends)


def decoded_size(text: str) -> int:
    """At most so many bytes come out of *text*."""
    return len(text) * 3 // 4


def decode_pieces(text: str) -> Iterator[bytes]:
    """Decode *text* piece by piece.

    Raises:
        NotBase64: a character does not belong there, or the end is cut off.
    """
    carried = b""
    ended = False
    for start in range(0, len(text), _PIECE_CHARACTERS):
        try:
            piece = text[start : start + _PIECE_CHARACTERS].encode("ascii")
        except UnicodeEncodeError as exc:
            raise NotBase64(f"character {start + exc.start} is not of base64's alphabet") from exc
        packed = carried + piece.translate(_URL_SAFE, _WHITE)
        stripped = packed.rstrip(b"=")
        if ended:
            if stripped:
                raise NotBase64("there is text after the padding")
            continue
        if b"=" in stripped:  # also where a piece ends just so that the decoder would take it for padding
            raise NotBase64("a character in it is not of base64's alphabet")
        ended = len(stripped) < len(packed)
        whole = len(stripped) if ended else len(stripped) // 4 * 4
        carried = stripped[whole:]
        yield _decode(stripped[:whole])
    if carried:
        yield _decode(carried)


def _decode(packed: bytes) -> bytes:
    if len(packed) % 4 == 1:
        raise NotBase64("it is cut off: one character is left over")
    try:
        return binascii.a2b_base64(packed + b"=" * (-len(packed) % 4), strict_mode=True)
    except binascii.Error as exc:
        raise NotBase64("a character in it is not of base64's alphabet") from exc
