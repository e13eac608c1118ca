"""What stands before the pixels of a PNG, of which libvips makes nothing or something else. Blocks."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import attrs

_SIGNATURE_BYTES: Final = 8
_FRAME_BYTES: Final = 12
"""Of each chunk beside its data: length, type, checksum."""
_MAX_CHUNKS: Final = 1000
"""So many are looked at. A PNG of ComfyUI has three before its pixels, four if it is animated."""
_MAX_TEXT_BYTES: Final = 8 << 20
"""A larger text is left behind; libpng would not read it either."""
_TEXTS: Final = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_RAW_PROFILE: Final = b"Raw profile type "


@attrs.frozen
class _Chunk:
    kind: bytes
    at: int
    size_bytes: int
    """With its frame."""


def is_animated(path: Path) -> bool:
    """Whether a PNG has more than one frame, as its ``acTL`` chunk tells (PNG, third edition, 11.3.4)."""
    with path.open("rb") as file:
        for chunk in _before_pixels(file):
            if chunk.kind == b"acTL":
                file.seek(chunk.at + 8)
                return int.from_bytes(file.read(4)) > 1
    return False


def copy_with_texts(pixels: Path, texts: Path, target: Path) -> None:
    """Write the PNG *pixels* to *target*, with the texts of the PNG *texts* added just as they are.

    libvips would compress them (``zTXt``), and ComfyUI's page looks for its workflow in ``tEXt`` and ``iTXt`` only.
    ImageMagick's raw profiles are left behind: they are EXIF and IPTC, which libvips carries over.
    """
    with pixels.open("rb") as written, texts.open("rb") as told, target.open("wb") as file:
        header = next(_before_pixels(written))
        written.seek(0)
        file.write(written.read(header.at + header.size_bytes))
        for chunk in _before_pixels(told):
            if chunk.kind in _TEXTS and chunk.size_bytes <= _MAX_TEXT_BYTES:
                told.seek(chunk.at)
                whole = told.read(chunk.size_bytes)
                if not whole[8:].startswith(_RAW_PROFILE):
                    file.write(whole)
        shutil.copyfileobj(written, file, 1 << 20)


def _before_pixels(file: IO[bytes]) -> Iterator[_Chunk]:
    at = _SIGNATURE_BYTES
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        head = file.read(8)
        if len(head) < 8 or head[4:] in (b"IDAT", b"IEND"):
            return
        chunk = _Chunk(head[4:], at, int.from_bytes(head[:4]) + _FRAME_BYTES)
        yield chunk
        at += chunk.size_bytes
