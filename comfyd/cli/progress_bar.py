"""A progress bar on a terminal; plain lines where there is none."""

import sys
from typing import Final, TextIO

import attrs

_WIDTH: Final = 32
_PLAIN_STEP: Final = 20.0
"""Percent between two lines where the output is no terminal."""


@attrs.define
class ProgressBar:
    """Draws one bar over itself. Call :meth:`close` before printing anything else."""

    stream: TextIO = attrs.field(factory=lambda: sys.stdout)
    _drawn: bool = False
    _told: float = -_PLAIN_STEP

    def update(self, percent: float, label: str) -> None:
        """Show *percent* (0 to 100) and what is being done."""
        if self.stream.isatty():
            filled = round(_WIDTH * percent / 100)
            bar = "█" * filled + "░" * (_WIDTH - filled)
            self.stream.write(f"\r\x1b[2K  {bar} {percent:5.1f} %  {label[:36]}")
            self._drawn = True
        elif percent >= self._told + _PLAIN_STEP or (percent >= 100 > self._told):
            self.stream.write(f"  {percent:5.1f} %  {label}\n")
            self._told = percent
        self.stream.flush()

    def close(self) -> None:
        """End the bar's line."""
        if self._drawn:
            self.stream.write("\n")
            self._drawn = False
