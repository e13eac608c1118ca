"""What a file is, by its first bytes and not by its name."""

from typing import Final

import attrs

HEAD_BYTES: Final = 64
"""So many bytes tell every type below."""


@attrs.frozen(kw_only=True)
class MediaType:
    """A media type that loader nodes read. *ending* includes the dot."""

    name: str
    ending: str

    @property
    def is_image(self) -> bool:
        """Whether it is a picture."""
        return self.name.startswith("image/")


def _type(name: str, ending: str) -> MediaType:
    return MediaType(name=name, ending=ending)


_PNG: Final = _type("image/png", ".png")
_STARTS: Final = (
    (b"\x89PNG\r\n\x1a\n", _PNG),
    (b"\xff\xd8\xff", _type("image/jpeg", ".jpg")),
    (b"GIF87a", _type("image/gif", ".gif")),
    (b"GIF89a", _type("image/gif", ".gif")),
    (b"II*\x00", _type("image/tiff", ".tiff")),
    (b"MM\x00*", _type("image/tiff", ".tiff")),
    (b"\x00\x00\x01\x00", _type("image/vnd.microsoft.icon", ".ico")),
    (b"BM", _type("image/bmp", ".bmp")),
    (b"v/1\x01", _type("image/x-exr", ".exr")),
    (b"\x1aE\xdf\xa3", _type("video/webm", ".webm")),
    (b"FLV\x01", _type("video/x-flv", ".flv")),
    (b"fLaC", _type("audio/flac", ".flac")),
    (b"OggS", _type("audio/ogg", ".ogg")),
    (b"ID3", _type("audio/mpeg", ".mp3")),
    (b"\xff\xfb", _type("audio/mpeg", ".mp3")),
    (b"\xff\xf3", _type("audio/mpeg", ".mp3")),
    (b"\xff\xf2", _type("audio/mpeg", ".mp3")),
    (b"\xff\xf1", _type("audio/aac", ".aac")),
    (b"\xff\xf9", _type("audio/aac", ".aac")),
)
_RIFF: Final = {
    b"WEBP": _type("image/webp", ".webp"),
    b"WAVE": _type("audio/wav", ".wav"),
    b"AVI ": _type("video/x-msvideo", ".avi"),
}
_FTYP: Final = {
    b"avif": _type("image/avif", ".avif"),
    b"avis": _type("image/avif", ".avif"),
    b"heic": _type("image/heic", ".heic"),
    b"heix": _type("image/heic", ".heic"),
    b"mif1": _type("image/heic", ".heic"),
    b"qt  ": _type("video/quicktime", ".mov"),
    b"M4A ": _type("audio/mp4", ".m4a"),
    b"M4B ": _type("audio/mp4", ".m4a"),
}
_MP4: Final = _type("video/mp4", ".mp4")


def sniff(head: bytes) -> MediaType | None:
    """Tell the type from the first :data:`HEAD_BYTES` bytes of a file; None if it is none that we know."""
    for start, media_type in _STARTS:
        if head.startswith(start):
            return media_type
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":  # ISO base media: any brand that is not named above is a video of some kind
        return _FTYP.get(head[8:12], _MP4)
    return None
