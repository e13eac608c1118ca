"""A progress bar on a terminal; plain lines where there is none."""

import os
import sys
import unicodedata
from typing import Final, TextIO

import attrs

_WIDTH: Final = 32
_MIN_WIDTH: Final = 8
_MIN_LABEL: Final = 16
_AROUND: Final = 13
"""Columns beside the bar and the label: indent, percentage, gaps, and the last column, which stays empty."""
_USUAL_COLUMNS: Final = 81
_PLAIN_STEP: Final = 20.0
"""Percent between two lines where the output is no terminal."""


@attrs.define
class ProgressBar:
    """Draws one bar over itself. Call :meth:`close` before printing anything else.

    It is as wide as the terminal allows, has a colour unless ``NO_COLOR`` is set (no-color.org), and is plain lines
    where the output is no terminal, or one that cannot go back in its line (``TERM=dumb``).
    """

    stream: TextIO = attrs.field(factory=lambda: sys.stdout)
    _drawn: bool = False
    _told: float = -_PLAIN_STEP

    @property
    def is_drawn_over(self) -> bool:
        """Whether this is a bar, and not plain lines."""
        return self.stream.isatty() and os.environ.get("TERM") != "dumb"

    def update(self, percent: float, label: str) -> None:
        """Show *percent* (0 to 100) and what is being done."""
        if self.is_drawn_over:
            self.stream.write(f"\r\x1b[2K{self._line(percent, label)}")
            self._drawn = True
        elif percent >= self._told + _PLAIN_STEP or (percent >= 100 > self._told):
            self.stream.write(f"  {percent:5.1f} %  {label}\n")
            self._told = percent
        self.stream.flush()

    def close(self) -> None:
        """End the bar's line."""
        if self._drawn:
            self.stream.write("\n")
            self.stream.flush()
            self._drawn = False

    def clear(self) -> None:
        """Remove the bar, so that something else can stand in its line."""
        if self._drawn:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()
            self._drawn = False

    def _line(self, percent: float, label: str) -> str:
        space = _columns(self.stream) - _AROUND
        width = max(_MIN_WIDTH, min(_WIDTH, space - _MIN_LABEL))
        full, empty = ("█", "░") if _can_write(self.stream, "█░") else ("#", ".")
        filled = round(width * percent / 100)
        done, left = full * filled, empty * (width - filled)
        if not os.environ.get("NO_COLOR"):
            done = f"\x1b[36m{done}\x1b[m"
        return f"  {done}{left} {percent:5.1f} %  {_cut(label, space - width)}"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or _USUAL_COLUMNS
    except (OSError, ValueError):  # io.UnsupportedOperation is both
        return _USUAL_COLUMNS


def _can_write(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _cut(text: str, columns: int) -> str:
    """Cut *text* to so many columns; those of East Asia take two for a character, and accents none."""
    taken = 0
    for place, character in enumerate(text):
        if not unicodedata.combining(character):
            taken += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if taken > columns:
            return text[:place]
    return text
