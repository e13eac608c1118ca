"""Looking at pictures with libvips, before anybody decodes them. Blocks: called in threads only.

libvips is imported when the first picture is looked at: a daemon that is never sent one need not hold it in memory.
"""

import ctypes
import logging
import os
import threading
from functools import cache
from pathlib import Path
from typing import Any, Final

# What libvips itself opens; the rest (ICO, EXR, HEIC) is left for ComfyUI to judge.
CHECKED: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp", "image/tiff", "image/avif"})

_setting_up: Final = threading.Lock()
_M_MMAP_THRESHOLD: Final = -3  # glibc's malloc.h
_LARGE_BLOCK_BYTES: Final = 4 << 20
"""Above what Python asks for in a hurry, a piece of a file; below what encoders hold of a picture."""


class UnreadablePicture(ValueError):
    """A file that begins like a picture and is none."""


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, of the whole film strip if it is animated, from the header alone.

    Raises:
        UnreadablePicture: the header makes no sense.
    """
    vips = libvips()
    try:
        image = vips.Image.new_from_file(os.fspath(path), access="sequential")
        pages = image.get("n-pages") if "n-pages" in image.get_fields() else 1
        return image.width, image.height * pages
    except vips.Error as exc:
        raise UnreadablePicture("it is damaged, or not the picture that it begins like") from exc


def libvips() -> Any:
    """Give pyvips, set up for pictures that strangers made."""
    # The first pictures come in several threads at once, and while one of them sets libvips up again, its loaders are
    # blocked for the others: a good picture would be called damaged.
    with _setting_up:
        return _set_up_libvips()


@cache
def _set_up_libvips() -> Any:
    # Set before libvips is loaded: our parallelism is several pictures at once, not several threads for one.
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    import pyvips

    _return_large_blocks()
    logging.getLogger("pyvips").setLevel(logging.ERROR)  # what it warns of is the caller's picture, and told to them
    pyvips.cache_set_max(0)  # no two calls are about the same picture; a cache would only hold files open
    # What a caller sends is opened by the plain loaders only: SVG, PDF and the like can do more than show pixels.
    pyvips.operation_block_set("VipsForeignLoad", True)
    for loader in ("Png", "Jpeg", "Nsgif", "Webp", "Tiff", "Heif"):
        pyvips.operation_block_set(f"VipsForeignLoad{loader}", False)
    return pyvips


def _return_large_blocks() -> None:
    """Have a freed block of a picture go back to the system at once, where the C library is glibc.

    By itself it learns to keep blocks of up to 32 MB, and that for each thread: after 16 pictures of 3000 px as WebP we
    held 348 MB, and with this about 115 MB (peak 218 MB), in the same time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
