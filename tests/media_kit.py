"""Media files made by hand, as small as they can be."""

import struct
import zlib


def png(width: int, height: int) -> bytes:
    """A whole grey PNG. Only its header is true to *width* and *height* if they are large."""
    rows = b"".join(b"\0" + bytes(width) for _ in range(height)) if width * height < 1_000_000 else b""
    return png_header(width, height) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG: signature and IHDR (8 bit, grey)."""
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


def wav(samples: int = 8) -> bytes:
    """A silent sound, 8 bit mono."""
    body = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
    body += b"data" + struct.pack("<I", samples) + b"\x80" * samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
