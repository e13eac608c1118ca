"""Pictures as the nodes pass them on, and the one place that imports pyvips.

An IMAGE is :class:`Images`: a batch of equal-sized pyvips images in memory, height x width x 3, uchar, sRGB. A MASK is
the same with one band. Under ``--cost none`` nothing imports pyvips (30 MB of RSS and 50 ms), and a batch has a size
but no pixels.
"""

import os
from functools import cache
from typing import Any, Final

import attrs

# One 8x8 grey PNG, for saves that must cost nothing but should leave a valid picture.
SMALL_PNG: Final = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000080000000808020000004b6d29dc000000"
    "0f4944415478da6368c001188696040082f360012595b3630000000049454e44ae426082"
)


@attrs.frozen(kw_only=True)
class Images:
    """A batch of pictures of one size. *pictures* is empty when no pixels are computed; *count* counts all the same."""

    width_px: int
    height_px: int
    count: int
    pictures: tuple[Any, ...] = attrs.field(default=(), repr=False)

    def __len__(self) -> int:
        return self.count


@cache
def vips() -> Any:
    """Import pyvips, tuned: one thread per pipeline (nodes run one at a time), and no cache of operations.

    The cache would keep pixels of finished prompts alive; the engine has its own, with ComfyUI's rules.
    """
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    import pyvips

    pyvips.cache_set_max(0)
    return pyvips


def batch(pictures: list[Any]) -> Images:
    """Compute pictures into memory as a batch; a lazy pipeline would be computed again by each reader."""
    held = tuple(picture.copy_memory() for picture in pictures)
    return Images(width_px=held[0].width, height_px=held[0].height, count=len(held), pictures=held)


def to_uchar(picture: Any) -> Any:
    """Round to the nearest of 0..255; libvips' own cast truncates."""
    return picture if picture.format == "uchar" else (picture + 0.5).floor().cast("uchar")


def as_srgb(picture: Any) -> Any:
    """Three-band uchar sRGB without alpha, from whatever a loader gave (CMYK, 16 bit, grey, profiles ignored)."""
    if picture.hasalpha():
        picture = picture.extract_band(0, n=picture.bands - 1)
    if picture.interpretation != "srgb" or picture.bands != 3 or picture.format != "uchar":
        picture = picture.colourspace("srgb")
    return to_uchar(picture).copy(interpretation="srgb")


def resized(picture: Any, width_px: int, height_px: int, method: str, crop: str = "disabled") -> Any:
    """Scale to exactly the given size; with crop "center" the aspect ratio is kept and the sides are cut first.

    *method* is one of ComfyUI's upscale methods; "area" averages, "bislerp" (latents) is taken as bicubic.
    """
    if crop == "center":
        ratio, wanted = picture.width / picture.height, width_px / height_px
        keep_w = round(picture.height * wanted) if ratio > wanted else picture.width
        keep_h = round(picture.width / wanted) if ratio < wanted else picture.height
        keep_w, keep_h = max(1, keep_w), max(1, keep_h)
        picture = picture.crop((picture.width - keep_w) // 2, (picture.height - keep_h) // 2, keep_w, keep_h)
    kernel = {
        "nearest-exact": "nearest",
        "bilinear": "linear",
        "area": "linear",
        "bicubic": "cubic",
        "bislerp": "cubic",
    }
    across, down = width_px / picture.width, height_px / picture.height
    scaled = picture.resize(across, vscale=down, kernel=kernel.get(method, "lanczos3"))
    if (scaled.width, scaled.height) != (width_px, height_px):  # rounding inside libvips can miss by a pixel
        scaled = scaled.gravity("centre", width_px, height_px, extend="copy")
    return scaled


def jpeg(picture: Any, longest_px: int) -> bytes:
    """Encode for a preview, no side longer than *longest_px*, quality 95 as ComfyUI's previews."""
    scale = longest_px / max(picture.width, picture.height)
    if scale < 1:
        picture = picture.resize(scale, kernel="linear")
    encoded: bytes = to_uchar(picture).jpegsave_buffer(Q=95, keep="none")
    return encoded
