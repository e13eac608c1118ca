"""What was measured, as a table for people and as JSON for comparing runs."""

import json
import os
import platform
import re
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

    def kept(self, value: float | None) -> bool | None:
        """Whether *value* is within it; None where there is none."""
        if value is None:
            return None
        return value >= self.limit if self.at_least else value <= self.limit


@attrs.frozen(kw_only=True)
class Row:
    """One measure of one scenario: by contender, a value for each round."""

    scenario: str
    measure: str
    unit: str
    values: dict[str, list[float]]
    bounds: tuple[Bound, ...] = ()

    def median(self, contender: str) -> float | None:
        """Return the median over the rounds, or None where a contender was not measured."""
        values = self.values.get(contender)
        return statistics.median(values) if values else None

    def ratio(self, contender: str = "comfyd", to: str = "raw") -> float | None:
        """Return a contender's median by that of another, the raw client if not said.

        None if there is no other, or if what it has is zero or, of a difference, below: that is no scale.
        """
        value, other = self.median(contender), self.median(to)
        return value / other if value is not None and other is not None and other > 0 else None

    @property
    def kept(self) -> bool | None:
        """Whether all bounds are kept that can be judged; None where nothing is wanted, or what it is compared with."""
        judged = [
            bound.kept(self.ratio(to=bound.to) if bound.ratio else self.median("comfyd")) for bound in self.bounds
        ]
        known = [verdict for verdict in judged if verdict is not None]
        return all(known) if known else None

    @property
    def wanted(self) -> str:
        """The bounds as text; empty where nothing is wanted."""
        return ", ".join(map(str, self.bounds))

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
            "wanted": self.wanted or None,
            "kept": self.kept,
        }


@attrs.define(eq=False)
class Values:
    """What a scenario gathers, round by round: for each measure and contender its values, in order."""

    scenario: str
    _of: dict[str, dict[str, list[float]]] = attrs.field(factory=dict)

    def add(self, measure: str, contender: str, value: float) -> None:
        """Add what one round found."""
        self._of.setdefault(measure, {}).setdefault(contender, []).append(value)

    def row(self, measure: str, unit: str, *bounds: Bound) -> Row:
        """Make the row of a measure; an empty one if nobody could be measured."""
        return Row(
            scenario=self.scenario, measure=measure, unit=unit, values=self._of.get(measure, {}), bounds=tuple(bounds)
        )


_COLUMNS: Final = ("scenario", "measure", "raw", "comfyd", "peer", "to raw", "peer to raw", "to peer", "wanted", "")


def shown(value: float | None, after: str = "") -> str:
    """Write a number as briefly as it can be compared; a dash where there is none."""
    return "-" if value is None else f"{value:.{0 if abs(value) >= 100 else 2}f}{after}"


def table(rows: Sequence[Row]) -> str:
    """Write the rows as a table; values are medians over the rounds."""
    lines = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
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
        row.wanted,
        kept,
    )


@attrs.frozen(kw_only=True)
class Machine:
    """Where and when it was measured. The load averages (getloadavg(3)) tell who else was at work."""

    at: datetime
    python: str
    processor: str
    processors: int
    memory_mb: int
    load_before: float
    load_after: float

    def __str__(self) -> str:
        return (
            f"{self.at:%Y-%m-%d %H:%M} UTC, Python {self.python}, {self.processors} x {self.processor},"
            f" {self.memory_mb / 1024:.0f} GiB; load average {self.load_before:.1f} before, {self.load_after:.1f} after"
        )


def this_machine(load_before: float) -> Machine:
    """Say where this program runs."""
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return Machine(
        at=datetime.now(UTC),
        python=platform.python_version(),
        processor=model[1] if model else platform.machine(),
        processors=len(os.sched_getaffinity(0)),
        memory_mb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        load_before=load_before,
        load_after=os.getloadavg()[0],
    )


def write_json(rows: Sequence[Row], machine: Machine, path: Path | None = None) -> Path:
    """Write the rows and what they were measured on to *path*, or to a file of their own; return where."""
    if path is None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{machine.at:%Y%m%dT%H%M%SZ}.json"
    about = attrs.asdict(machine) | {"at": machine.at.isoformat(), "argv": sys.argv[1:]}
    document = about | {"rows": [row.as_json() for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def read_json(path: Path) -> tuple[list[Row], str]:
    """Read what :func:`write_json` wrote: the rows, without their bounds, and when they were measured.

    Raises:
        KeyError, TypeError, ValueError: it was not written by this version.
        OSError: it cannot be read.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        Row(scenario=row["scenario"], measure=row["measure"], unit=row["unit"], values=row["rounds"])
        for row in document["rows"]
    ]
    return rows, f"{document['at'][:10]}, Python {document['python']}, {document['processors']} processors"
