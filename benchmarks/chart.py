"""The picture of a run: bars that compare comfyd with the others, as an SVG that reads on light and on dark paper.

``python -m benchmarks.chart RESULTS.json PICTURE.svg`` draws a run anew. Written by hand, as a library for bars would
be larger than all the rest of the benchmarks.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from benchmarks.report import Row, read_json, shown

SHOWN: Final[Sequence[tuple[str, str, str]]] = (
    ("one-client", "added at median", "One client: added to the engine's own time"),
    ("real-client", "p90", "One client, ComfyUI, 512 px: p90"),
    ("in-flight", "32 callers, processor", "32 in flight: processor time"),
    ("in-flight", "500 callers, prompts", "500 in flight: throughput (longer is better)"),
    ("in-flight", "500 callers, growth", "500 in flight: growth in memory"),
    ("large-output", "time, run and delivered", "An output of 200 MB: run and delivered"),
    ("large-output", "growth of RSS", "An output of 200 MB: growth in memory"),
    ("outputs-at-once", "longest delay of a probe", "Four outputs of 64 MB at once: longest delay of a probe"),
    ("conversions", "8 to JPEG", "8 pictures of 3000 px to JPEG"),
    ("base64-input", "growth of RSS", "60 MB of base64 as input: growth in memory"),
    ("accepted", "jobs, to the last webhook", "Async, webhook for each job (longer is better)"),
    ("start", "beyond the engine's own", "Start to ready, beyond the engine's own"),
    ("start", "idle RSS", "Idle: memory"),
)
"""Scenario and measure of what is drawn if it was measured, in this order, and what it is called there."""

_NAMES: Final = {"comfyd": "comfyd", "peer": "peer", "raw": "raw client"}
_WIDTH: Final = 760
_LEFT: Final = 90
_BARS: Final = 540
_BAR: Final = 13
_BETWEEN: Final = 14
_TITLE: Final = 19
_STYLE: Final = """
  text { font: 12px system-ui, sans-serif; fill: #1f2328; }
  .title { font-weight: 600; }
  .small { font-size: 11px; fill: #59636e; }
  .comfyd { fill: #0969da; }
  .peer { fill: #afb8c1; }
  .raw { fill: #d8dee4; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .small { fill: #9198a1; }
    .comfyd { fill: #4493f8; }
    .peer { fill: #656c76; }
    .raw { fill: #3d444d; }
  }
"""
"""No background of its own: the page's shows through, in either scheme."""


def draw(rows: Sequence[Row], footnote: str) -> str:
    """Draw what :data:`SHOWN` names; each group has a scale of its own, as units differ."""
    found = {(row.scenario, row.measure): row for row in rows}
    parts: list[str] = []
    top = 10.0
    for scenario, measure, title in SHOWN:
        row = found.get((scenario, measure))
        medians = {} if row is None else _medians(row)
        if row is None or "comfyd" not in medians or len(medians) < 2:
            continue  # a bar alone compares nothing
        top += _TITLE - 6
        parts.append(_text(0, top, title, "title"))
        top += 6
        most = max(medians.values())
        for contender, value in medians.items():
            width = max(1.0, _BARS * max(0.0, value) / most) if most > 0 else 1.0
            middle = top + _BAR - 3
            parts.append(_text(0, middle, _NAMES[contender], "small"))
            parts.append(
                f'<rect class="{contender}" x="{_LEFT}" y="{top:g}" width="{width:.1f}" height="{_BAR - 2}" rx="2"/>'
            )
            parts.append(_text(_LEFT + width + 6, middle, f"{shown(value)} {row.unit}", "small"))
            top += _BAR
        top += _BETWEEN
    parts.append(_text(0, top + 6, footnote, "small"))
    height = round(top + 16)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        ' role="img" aria-label="Benchmarks of comfyd beside a peer and a raw client">'
    )
    return "\n".join([head, f"<style>{_STYLE}</style>", *parts, "</svg>", ""])


def _medians(row: Row) -> dict[str, float]:
    """Return who was measured, comfyd first."""
    medians = {contender: row.median(contender) for contender in _NAMES}
    return {contender: value for contender, value in medians.items() if value is not None}


def _text(left: float, baseline: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{left:g}" y="{baseline:g}">{escape(text)}</text>'


def main() -> int:
    """Draw a run that was written before; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chart", description="Draw a run as a picture.")
    parser.add_argument("results", type=Path, nargs="+", help="JSON of one run, or of several that measured parts")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    options = parser.parse_args()
    rows: list[Row] = []
    footnote = ""
    for path in options.results:
        read, footnote = read_json(path)
        rows += read
    options.picture.write_text(draw(rows, footnote), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
