"""What was measured, as a table for people and as JSON for comparing runs."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import attrs

RESULTS: Final = Path(__file__).parent / "results"


@attrs.frozen(kw_only=True)
class Bound:
    """What is wanted of comfyd: its own value, or its ratio to another contender's, at most or at least *limit*."""

    limit: float
    ratio: bool = False
    to: str = "raw"
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}{f'x {self.to}' if self.ratio else ''}"


@attrs.frozen(kw_only=True)
class Row:
    """One measure of one scenario: by contender, a value for each round."""

    scenario: str
    measure: str
    unit: str
    values: dict[str, list[float]]
    bound: Bound | None = None

    def median(self, contender: str) -> float | None:
        """Return the median over the rounds, or None where a contender was not measured."""
        values = self.values.get(contender)
        return statistics.median(values) if values else None

    def ratio(self, contender: str = "comfyd", to: str = "raw") -> float | None:
        """Return a contender's median by that of another, the raw client if not said."""
        value, other = self.median(contender), self.median(to)
        return value / other if value is not None and other else None

    @property
    def kept(self) -> bool | None:
        """Whether the bound is kept; None where nothing is wanted."""
        if self.bound is None:
            return None
        value = self.ratio(to=self.bound.to) if self.bound.ratio else self.median("comfyd")
        if value is None:
            return None
        return value >= self.bound.limit if self.bound.at_least else value <= self.bound.limit

    def as_json(self) -> dict[str, Any]:
        """Return everything about it."""
        return {
            "scenario": self.scenario,
            "measure": self.measure,
            "unit": self.unit,
            "rounds": self.values,
            "medians": {contender: self.median(contender) for contender in self.values},
            "ratios_to_raw": {contender: self.ratio(contender) for contender in self.values},
            "ratio_to_peer": self.ratio(to="peer"),
            "wanted": None if self.bound is None else str(self.bound),
            "kept": self.kept,
        }


_COLUMNS: Final = ("scenario", "measure", "raw", "comfyd", "peer", "to raw", "peer to raw", "to peer", "wanted", "")


def table(rows: Sequence[Row]) -> str:
    """Write the rows as a table; values are medians over the rounds."""
    lines = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    def shown(value: float | None, after: str = "") -> str:
        return "-" if value is None else f"{value:.{0 if abs(value) >= 100 else 2}f}{after}"

    kept = {None: "", True: "kept", False: "MISSED"}[row.kept]
    return (
        row.scenario,
        f"{row.measure} ({row.unit})",
        shown(row.median("raw")),
        shown(row.median("comfyd")),
        shown(row.median("peer")),
        shown(row.ratio(), "x"),
        shown(row.ratio("peer"), "x"),
        shown(row.ratio(to="peer"), "x"),
        "" if row.bound is None else str(row.bound),
        kept,
    )


def write_json(rows: Sequence[Row]) -> Path:
    """Write the rows and what they were measured on to a file of their own; return its path."""
    RESULTS.mkdir(exist_ok=True)
    now = datetime.now(UTC)
    document = {
        "at": now.isoformat(),
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "rows": [row.as_json() for row in rows],
    }
    path = RESULTS / f"{now:%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path
