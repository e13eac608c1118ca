"""Outputs that stay after their job's end, for whoever asks later and for webhooks that are still to be sent.

They are moved into a folder of ours below OUTPUT_DIR: on the same disk a move is a rename, whatever the size, and
ComfyUI, which lists OUTPUT_DIR at every save, does not get slower by them. Everything here blocks: called in threads.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO, Final, Self

import attrs

from comfyd.media.collect import OutputFile
from comfyd.media.files import claim_folder, remove_abandoned

PARENT: Final = "comfyd"
_MEMORY: Final = "memory-"
"""Before the name of a folder whose journal is in memory only: nobody knows of its files once its daemon is gone."""


@attrs.define(eq=False)
class KeptOutputs:
    """This daemon's folder of kept outputs. It is made when the first output is kept."""

    root: Path
    _lock: IO[bytes] | None = None

    @classmethod
    def of_journal(cls, output_dir: Path, identity: str, *, durable: bool) -> Self:
        """The folder that belongs to the journal *identity*; what daemons without a journal on disk left is removed."""
        parent = output_dir / PARENT
        if parent.is_dir():
            remove_abandoned(parent, _MEMORY)
        return cls(root=parent / (identity if durable else f"{_MEMORY}{uuid.uuid4().hex}"))

    def folder(self, key: str) -> Path:
        """Where the outputs of the job *key* are, or would be."""
        return self.root / key

    def keep(self, key: str, outputs: tuple[OutputFile, ...]) -> tuple[OutputFile, ...]:
        """Move *outputs* to the folder of their job, numbered by their place.

        Raises:
            OSError: one of them could not be moved; the job has to be run again, or fails.
        """
        folder = self.folder(key)
        self._make(folder)
        kept = []
        for place, output in enumerate(outputs):
            target = folder / f"{place:05d}{output.path.suffix}"
            shutil.move(output.path, target)
            kept.append(attrs.evolve(output, path=target))
        return tuple(kept)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove the outputs of these jobs."""
        for key in keys:
            shutil.rmtree(self.folder(key), ignore_errors=True)

    def only(self, key: str, paths: Collection[Path]) -> None:
        """Remove what was kept of a job but *paths*: pictures that were converted need not stay as they were."""
        folder = self.folder(key)
        if not paths:
            self.remove([key])
        elif folder.is_dir():
            for path in folder.iterdir():
                if path.is_file() and path not in paths:
                    path.unlink(missing_ok=True)

    def keys(self) -> frozenset[str]:
        """The keys of the jobs of which something is kept."""
        if not self.root.is_dir():
            return frozenset()
        return frozenset(entry for entry in os.listdir(self.root) if not entry.startswith("."))

    def close(self) -> None:
        """Remove the folder if nothing is in it, or nobody could ask for what is in it after this daemon's end."""
        if self._lock is not None:
            shutil.rmtree(self.root, ignore_errors=True)
            self._lock.close()
        for folder in (self.root, self.root.parent):
            with contextlib.suppress(OSError):  # not there, or not empty: kept outputs, or another daemon's
                folder.rmdir()

    def _make(self, folder: Path) -> None:
        if self._lock is None and self.root.name.startswith(_MEMORY):
            self._lock = claim_folder(self.root)
        folder.mkdir(parents=True, exist_ok=True)
