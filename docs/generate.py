"""Writes into the docs what comes from the code: the table of variables. ``make docs``, or ``python docs/generate.py``.

With ``--check`` nothing is written; the exit code is 1 if something would be.
"""

import re
import sys
from pathlib import Path
from typing import Final

from comfyd.config import variables_table

PAGE: Final = Path(__file__).parent / "configuration.md"
_PART: Final = re.compile(
    r"(?P<begin><!-- variables: [^\n]*-->\n)(?P<table>.*?)(?P<end><!-- /variables -->)", re.DOTALL
)


def with_tables(page: str) -> str:
    """Return *page* with the table that holds now between its markers.

    Raises:
        ValueError: the markers are not there, or more than once.
    """
    new, parts = _PART.subn(lambda part: f"{part['begin']}\n{variables_table()}\n{part['end']}", page)
    if parts != 1:
        raise ValueError(f"{PAGE.name} must have the markers of the table once, has them {parts} times")
    return new


def main(arguments: list[str]) -> int:
    """Write the page, or look at it; return the exit code."""
    old = PAGE.read_text(encoding="utf-8")
    new = with_tables(old)
    if new == old:
        return 0
    if arguments == ["--check"]:
        sys.stderr.write(f"{PAGE.name} is not what the code says; run: make docs\n")
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
