"""Where files lie, and which of them a name may reach.

ComfyUI 0.3.64 lets LoadImage read any path (``../../x``, ``/etc/x``: folder_paths.py, ``get_annotated_filepath``). Here
every name stays inside the folder it belongs to; subfolders are fine.
"""

import os
import time
from pathlib import Path
from typing import Final

import attrs

from comfyd.errors import ComfydError

_ANNOTATIONS: Final = ("input", "output", "temp")


class OutsideFolder(ComfydError):
    """A name points outside the folder it belongs to."""

    def __init__(self, name: str, folder: str) -> None:
        super().__init__(f"{name!r} is outside the {folder} folder; that is not allowed")
        self.name = name


@attrs.frozen(kw_only=True)
class Folders:
    """ComfyUI's folders, absolute. :meth:`make` creates them."""

    input: Path
    output: Path
    temp: Path
    user: Path

    def make(self) -> None:
        """Create the folders that nodes read and write."""
        for folder in (self.input, self.output, self.temp):
            folder.mkdir(parents=True, exist_ok=True)

    def named(self, kind: str) -> Path | None:
        """Return the folder of a ``type`` as it stands in output records and /view, None for an unknown type."""
        match kind:
            case "input":
                return self.input
            case "output":
                return self.output
            case "temp":
                return self.temp
            case _:
                return None

    def split_annotation(self, name: str) -> tuple[str, str | None]:
        """Split ``"a.png [output]"`` into name and folder type (folder_paths.py, ``annotated_filepath``)."""
        for kind in _ANNOTATIONS:
            if name.endswith(f"[{kind}]"):
                return name[: -len(kind) - 2].rstrip(" "), kind
        return name, None

    def locate(self, name: str, default: str = "input") -> Path:
        """Find the file that a loader node's value names.

        Raises:
            OutsideFolder: the name leaves its folder.
        """
        bare, kind = self.split_annotation(name)
        kind = kind or default
        folder = self.named(kind)
        if folder is None:
            raise ValueError(f"there is no folder of type {kind!r}")
        return inside(folder, bare, kind)


def inside(folder: Path, name: str, kind: str) -> Path:
    """Join *name* to *folder*, textually: links that the operator laid inside a folder are followed as in ComfyUI.

    Raises:
        OutsideFolder: the result is not within the folder.
    """
    joined = os.path.normpath(os.path.join(folder, name))
    if "\0" in name or os.path.commonpath((folder, joined)) != str(folder):
        raise OutsideFolder(name, kind)
    return Path(joined)


@attrs.frozen(kw_only=True)
class SavePlace:
    """Where a save node writes its next file: ``folder/filename_00001_.ext``, counted on from *counter*."""

    folder: Path
    filename: str
    counter: int
    subfolder: str

    def name(self, index: int, extension: str) -> str:
        """Return the name of the file number *index* (from 0) of this save."""
        stem = self.filename.replace("%batch_num%", str(index))
        return f"{stem}_{self.counter + index:05}_.{extension}"


def expand_prefix(prefix: str, width_px: int, height_px: int) -> str:
    """Fill in ``%width%``, ``%height%`` and the parts of the local date (folder_paths.py, ``get_save_image_path``)."""
    if "%" not in prefix:
        return prefix
    now = time.localtime()
    values = {
        "width": str(width_px),
        "height": str(height_px),
        "year": str(now.tm_year),
        "month": f"{now.tm_mon:02}",
        "day": f"{now.tm_mday:02}",
        "hour": f"{now.tm_hour:02}",
        "minute": f"{now.tm_min:02}",
        "second": f"{now.tm_sec:02}",
    }
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", value)
    return prefix


def place_output(base: Path, prefix: str, *, width_px: int = 0, height_px: int = 0, count: bool = True) -> SavePlace:
    """Work out where the files of one save go, and create the folder. Existing files are never overwritten.

    Lists the folder, as ComfyUI does, to count on from the highest number; with *count* false it does not, and
    numbers start at 1.

    Raises:
        OutsideFolder: the prefix is absolute or climbs out with ``..``.
    """
    wanted = os.path.normpath(expand_prefix(prefix, width_px, height_px))
    folder = inside(base, os.path.dirname(wanted), "output")
    filename = os.path.basename(wanted)
    try:
        taken = os.listdir(folder) if count else []
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        taken = []
    counter = 1 + max((_number(name, f"{filename}_") for name in taken), default=0)
    return SavePlace(folder=folder, filename=filename, counter=counter, subfolder=os.path.dirname(wanted))


def _number(name: str, start: str) -> int:
    digits = name[len(start) :].partition("_")[0] if name.startswith(start) else ""
    return int(digits) if digits.isdecimal() else 0
