"""Tables and lines for people: columns that line up, wrapped on a terminal, and nothing that moves its cursor."""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Final, TextIO

_MAX_PADDED: Final = 60
"""Where nothing is wrapped, one long cell does not push the rest of all other rows out of sight."""
_GAP: Final = "  "
_MIN_WRAPPED: Final = 12
"""A column is not wrapped to less than this; on a terminal that is narrower still, the terminal breaks the lines."""


def printable(text: str) -> str:
    """Escape what could move a terminal's cursor or begin another line: texts come from engines, peers and paths."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def terminal_width(stream: TextIO) -> int | None:
    """Return the columns of the terminal that *stream* is; None if it is none, where nothing is to be wrapped."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def table_lines(
    rows: Sequence[Sequence[str]], *, width: int | None = None, wrapped: frozenset[int] = frozenset()
) -> Iterator[str]:
    """Give the lines of a table, whose first row are its headings.

    With a *width* (columns of a terminal) the columns in *wrapped*, counted from 0, are wrapped so that all fit; their
    rows then take several lines. Without one each row is a line, as ``grep`` likes it.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    if width is None:
        widths = [min(size, _MAX_PADDED) if place in wrapped else size for place, size in enumerate(widths)]
    else:
        widths = _fitted(widths, width - len(_GAP) * (len(widths) - 1), wrapped)
    for row in rows:
        cells = [
            textwrap.wrap(cell, widths[place], break_on_hyphens=False) if width and place in wrapped else [cell]
            for place, cell in enumerate(row)
        ]
        for parts in zip_longest(*cells, fillvalue=""):
            yield _GAP.join(part.ljust(size) for part, size in zip(parts, widths, strict=True)).rstrip()


def _fitted(widths: Sequence[int], space: int, wrapped: frozenset[int]) -> list[int]:
    """Share what the other columns leave of *space* among the *wrapped* ones: short ones get all that they want."""
    fitted = list(widths)
    left = space - sum(size for place, size in enumerate(widths) if place not in wrapped)
    by_size = sorted(wrapped, key=lambda place: widths[place])
    for count, place in zip(range(len(by_size), 0, -1), by_size, strict=True):
        fitted[place] = max(min(widths[place], left // count), min(widths[place], _MIN_WRAPPED), 1)
        left -= fitted[place]
    return fitted
