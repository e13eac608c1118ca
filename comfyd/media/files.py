"""Where a job's files are on disk, and how they go away again. Everything here blocks: called in threads only."""

import contextlib
import fcntl
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Final, Self

import attrs

PARENT: Final = "comfyd"
"""Folder below INPUT_DIR that holds the inputs which jobs bring. Loader nodes do not list subfolders, so however many
jobs there are, ComfyUI's validation stays as fast as it was (0.3.64: 247 ms a graph with 20,000 files listed)."""

_LOCK: Final = ".lock"
_UNBORN: Final = ".new-"
_UNBORN_S: Final = 3600.0
"""A folder that is still being made after so long has no maker any more."""

# What ComfyUI itself replaces in a prefix, each by a number (0.3.64, folder_paths.py, get_save_image_path; nodes.py).
_TOKEN: Final = re.compile(r"%(?:width|height|year|month|day|hour|minute|second|batch_num)%")


@attrs.define(eq=False)
class InputStore:
    """This daemon's own folder below INPUT_DIR, marked as in use by a lock for as long as it lives."""

    root: Path
    input_dir: Path
    _lock: IO[bytes]

    @classmethod
    def open(cls, input_dir: Path) -> Self:
        """Make the folder, and remove those of daemons that are no more.

        Raises:
            OSError: INPUT_DIR cannot be written.
        """
        parent = input_dir / PARENT
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        root = parent / uuid.uuid4().hex
        return cls(root=root, input_dir=input_dir, lock=claim_folder(root))

    def new_folder(self, key: str) -> Path:
        """Make a job's folder, if it is not there yet."""
        folder = self.folder(key)
        folder.mkdir(exist_ok=True)
        return folder

    def folder(self, key: str) -> Path:
        """Where a job's folder is, or would be."""
        return self.root / key

    def name_for_comfyui(self, path: Path) -> str:
        """The value by which a loader node finds *path*."""
        return path.relative_to(self.input_dir).as_posix()

    def close(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.root, ignore_errors=True)
        self._lock.close()
        with contextlib.suppress(OSError):  # another daemon's folder is there, or was never more than ours
            self.root.parent.rmdir()


def claim_folder(folder: Path) -> IO[bytes]:
    """Make *folder*, and hold it as this process's own for as long as the file that is returned is open.

    It comes into being with its lock: one without is nobody's, whatever moment its owner was killed at.
    """
    unborn = folder.with_name(f"{_UNBORN}{folder.name}")
    unborn.mkdir(parents=True)
    lock = (unborn / _LOCK).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    unborn.rename(folder)
    return lock


def remove_abandoned(parent: Path, prefix: str = "") -> None:
    """Remove the folders in *parent*, named *prefix* and a key, that no living process holds. Others are not ours."""
    now = time.time()
    for folder in parent.iterdir():
        if folder.name.startswith(f"{_UNBORN}{prefix}"):
            with contextlib.suppress(OSError):  # gone meanwhile: it was born
                if now - folder.stat().st_mtime > _UNBORN_S:
                    shutil.rmtree(folder, ignore_errors=True)
        elif re.fullmatch(f"{prefix}[0-9a-f]{{32}}", folder.name) and folder.is_dir() and not _is_held(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_held(folder: Path) -> bool:
    try:
        with (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False  # what is left of one that was being removed
    except OSError:
        return True
    return False


def confined(root: Path, *parts: str) -> Path | None:
    """Join *parts* to *root*; None if that leaves *root*, by ``..``, an absolute part or a symbolic link."""
    return confined_to(os.path.realpath(root), *parts)


def confined_to(real_root: str, *parts: str) -> Path | None:
    """Join *parts* to *real_root*, a path without symbolic links, as :func:`confined` does."""
    if any("\0" in part for part in parts):
        return None
    joined = os.path.join(real_root, *parts)
    root = real_root.rstrip("/") + "/"
    # The usual case is a name in the folder or one below it: the root need not be walked from the top again.
    resolved = joined if joined.startswith(root) and _is_plain(root, joined) else os.path.realpath(joined)
    return Path(resolved) if resolved.startswith(root) and resolved != root else None


def _is_plain(root: str, path: str) -> bool:
    """Whether *path*, which begins with *root*, has below it neither ``.``, ``..``, an empty part nor a link."""
    place = root
    for name in path[len(root) :].split("/"):
        if name in {"", ".", ".."}:
            return False
        place += name
        try:
            if stat.S_ISLNK(os.lstat(place).st_mode):
                return False
        except OSError:
            return False
        place += "/"
    return True


def remove_outputs(output_dir: Path, made: Iterable[Path], prefixes: Iterable[str], *, job_id: str) -> None:
    """Remove the files that a job made: those that its nodes reported, and those that begin with one of its prefixes.

    The second are what a node wrote before it failed. *prefixes* may be empty: a job that succeeded has told them all.
    Folders that become empty are removed if their name holds the id, hence are the job's own. Any other stays: ComfyUI
    makes the folder before it encodes the picture, so at this moment the next job may be about to write into it.

    Raises:
        OSError: one of them cannot be removed; the others were.
    """
    folders: set[Path] = set()
    failed: OSError | None = None
    for path in made:
        try:
            path.unlink(missing_ok=True)
        except OSError as exc:
            failed = exc
        folders.add(path.parent)
    for prefix in prefixes:
        folder, _, name = prefix.rpartition("/")
        place = confined(output_dir, folder) if folder else output_dir
        if place is None or not place.is_dir():
            continue
        folders.add(place)
        # ComfyUI's save counter (folder_paths.py, get_save_image_path): five digits between underscores. Asking for it
        # keeps "a" from matching the files of a job named "a_b".
        pattern = re.compile(_TOKEN.sub(r"\\d+", re.escape(name)) + r"_\d{5,}_?\..+", re.DOTALL)
        with os.scandir(place) as entries:
            for entry in entries:
                if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    Path(entry.path).unlink(missing_ok=True)
    for folder_path in folders:
        if folder_path != output_dir and job_id in folder_path.name:
            with contextlib.suppress(OSError):  # not empty: somebody else's files
                folder_path.rmdir()
    if failed is not None:
        raise failed


def remove_folder(folder: Path) -> None:
    """Remove a job's input folder."""
    shutil.rmtree(folder, ignore_errors=True)
