"""Where outputs are put: in one folder, under the names that the daemon tells, never over a file that is there.

Each is written beside its place and put there when it is whole, so that who watches the folder sees whole files only.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

import attrs

from comfyd.cli.submit.errors import BadUse

_LONGEST_NAME_BYTES: Final = 240
"""Of the 255 that file systems take: "-2" and the like must still fit."""
_NAMELESS: Final = "output"


@attrs.define(eq=False)
class OutputFolder:
    """A folder on this machine. With *force*, files that were there before are replaced."""

    path: Path
    force: bool = False
    _ours: set[Path] = attrs.field(factory=set)
    """What this job has put there, which is not replaced: its nodes may save files of one name in several folders."""

    @classmethod
    def make(cls, path: Path, *, force: bool = False) -> "OutputFolder":
        """Make the folder if it is not there. Blocks.

        Raises:
            BadUse: it cannot be written: better told before the job is run than after.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise BadUse(f"{path} cannot be used for the outputs: {exc.strerror}") from exc
        if not os.access(path, os.W_OK | os.X_OK):
            raise BadUse(f"{path} cannot be used for the outputs: it cannot be written")
        return cls(path, force)

    @contextmanager
    def incoming(self) -> Iterator[tuple[BinaryIO, Path]]:
        """Open a file to write an output to; it is removed at the end of the block unless it was put to its place."""
        descriptor, name = tempfile.mkstemp(prefix=".comfyd-", suffix=".part", dir=self.path)
        path = Path(name)
        try:
            os.fchmod(descriptor, 0o666 & ~_umask())  # mkstemp's are for their owner alone
            with open(descriptor, "wb") as file:
                yield file, path
        finally:
            with suppress(FileNotFoundError):
                path.unlink()

    def put(self, incoming: Path, told: str) -> Path:
        """Put a whole file to its place; return the path. Blocks.

        Raises:
            OSError: the disk does not want it.
        """
        number = 1
        while True:
            place = self.path / numbered(safe_name(told), number)
            number += 1
            if place in self._ours:
                continue
            if self.force:
                incoming.replace(place)
            elif not _link(incoming, place):
                continue
            self._ours.add(place)
            return place


def safe_name(told: str) -> str:
    """Make of the name that a daemon tells one that stays in its folder, is shown as it is, and is not too long."""
    name = told.replace("\\", "/").rpartition("/")[2]
    name = "".join(c if c.isprintable() else "_" for c in name)
    if not name.strip(". "):
        return _NAMELESS
    if len(os.fsencode(name)) <= _LONGEST_NAME_BYTES:
        return name
    stem, ending = os.path.splitext(name)
    ending = ending if len(os.fsencode(ending)) <= 32 else ""  # no ending is that long
    cut = os.fsencode(stem)[: _LONGEST_NAME_BYTES - len(os.fsencode(ending))]
    return cut.decode("utf-8", "ignore") + ending


def numbered(name: str, number: int) -> str:
    """Give the name itself for 1, ``name-2.png`` for 2, and so on."""
    stem, ending = os.path.splitext(name)
    return name if number == 1 else f"{stem}-{number}{ending}"


def _link(incoming: Path, place: Path) -> bool:
    """Give a whole file the name *place*; False if that name is taken."""
    try:
        os.link(incoming, place)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: the name is taken first, and the file put over it
        try:
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        incoming.replace(place)
    return True


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask
