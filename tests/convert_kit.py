"""Pictures to convert, and looking into what came out: the marks of each format, read by hand."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfyd.media.convert import Converted, convert
from comfyd.media.convert_options import parse_convert
from comfyd.media.images import libvips


def never() -> None:
    """Nobody cancels."""


def to(source: Path, format_: str, metadata: str = "strip", /, **options: Any) -> Path:
    """Convert *source* into a file beside it."""
    target = source.with_name(f"out-{len(list(source.parent.iterdir()))}.{format_}")
    spec = parse_convert({"format": format_, "options": options, "metadata": metadata})
    result = convert(source, target, spec, never)
    assert isinstance(result, Converted)
    assert result.path == target
    assert result.size_bytes == target.stat().st_size
    return target


def picture(width: int = 96, height: int = 64) -> Any:
    """A colour gradient with some grain, 8 bit sRGB; the same each time."""
    vips = libvips()
    place = vips.Image.xyz(width, height)
    grain = vips.Image.gaussnoise(width, height, mean=0, sigma=12, seed=7)
    bands = [place[0] * (255 / width) + grain, place[1] * (255 / height) - grain, 128 + grain * 2]
    return bands[0].bandjoin(bands[1:]).cast("uchar").copy(interpretation="srgb").copy_memory()


def ramp(width: int = 96, height: int = 64) -> Any:
    """Transparency from 0 at the left to 255 at the right."""
    return (libvips().Image.xyz(width, height)[0] * (255 / (width - 1))).rint().cast("uchar")


def filled(*colour: int, width: int = 16, height: int = 12) -> Any:
    """A picture of one colour; two bands are grey and alpha, four are with alpha."""
    space = "b-w" if len(colour) < 3 else "srgb"
    return (libvips().Image.black(width, height) + list(colour)).cast("uchar").copy(interpretation=space)


def film(frames: int = 3, width: int = 24, height: int = 16, delays: tuple[int, ...] = (50, 120, 200)) -> Any:
    """An animation: one long strip that knows the height of its frames."""
    vips = libvips()
    strip = vips.Image.arrayjoin(
        [filled(80 * index, 255 - 80 * index, 60, width=width, height=height) for index in range(frames)], across=1
    ).copy()
    strip.set_type(vips.GValue.gint_type, "page-height", height)
    strip.set_type(vips.GValue.array_int_type, "delay", list(delays[:frames]))
    strip.set_type(vips.GValue.gint_type, "loop", 4)
    return strip


def opened(path: Path, **arguments: Any) -> Any:
    """What libvips reads out of a file."""
    return libvips().Image.new_from_file(str(path), **arguments).copy_memory()


def pixel(path: Path, x: int = 0, y: int = 0) -> list[int]:
    """One pixel's bands."""
    return [round(band) for band in opened(path).getpoint(x, y)]


def difference(one: Any, other: Any) -> float:
    """The mean difference of two pictures' bands, 0 to 255."""
    return float((one.cast("float") - other.cast("float")).abs().avg())


# JPEG


def jpeg_segments(path: Path) -> Iterator[tuple[int, bytes]]:
    """The markers of a JPEG, each with its data."""
    data = path.read_bytes()
    assert data[:2] == b"\xff\xd8"
    at = 2
    while at < len(data):
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF, *range(0xD0, 0xD8)):  # entropy-coded data in between
            at += 1
            continue
        marker = data[at + 1]
        if marker == 0xD9:
            return
        (length,) = struct.unpack_from(">H", data, at + 2)
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + length


def jpeg_is_progressive(path: Path) -> bool:
    """Whether the frame header is SOF2 and not SOF0."""
    (frame,) = [marker for marker, _ in jpeg_segments(path) if marker in (0xC0, 0xC1, 0xC2)]
    return frame == 0xC2


def jpeg_sampling(path: Path) -> list[tuple[int, int]]:
    """The sampling factors of each component."""
    (frame,) = [data for marker, data in jpeg_segments(path) if marker in (0xC0, 0xC1, 0xC2)]
    return [(frame[7 + 3 * index] >> 4, frame[7 + 3 * index] & 15) for index in range(frame[5])]


def jpeg_tables(path: Path, marker: int) -> bytes:
    """Every quantisation (0xDB) or Huffman (0xC4) table."""
    return b"".join(data for each, data in jpeg_segments(path) if each == marker)


def jpeg_scans(path: Path) -> int:
    """How many scans it has."""
    return sum(1 for marker, _ in jpeg_segments(path) if marker == 0xDA)


# PNG and WebP


def png_chunks(path: Path) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG."""
    data, at, chunks = path.read_bytes(), 8, []
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def webp_chunks(path: Path) -> list[tuple[bytes, bytes]]:
    """The chunks of a WebP."""
    data, at, chunks = path.read_bytes(), 12, []
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at + 4)
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return chunks


def avif_subsampling(path: Path) -> tuple[int, int]:
    """Whether colour is halved across and down, from the AV1 configuration (``av1C``)."""
    data = path.read_bytes()
    flags = data[data.index(b"av1C") + 6]
    return flags >> 3 & 1, flags >> 2 & 1
