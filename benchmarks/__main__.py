"""``python -m benchmarks``: run the scenarios; print a table of medians and ratios; write JSON and a picture."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import attrs

from benchmarks.chart import draw
from benchmarks.contenders import has_peer
from benchmarks.effort import FULL, QUICK, Effort
from benchmarks.report import Machine, Row, table, this_machine, write_json
from benchmarks.scenarios import SCENARIOS


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    options = _parser().parse_args()
    effort = QUICK if options.quick else FULL
    if options.rounds is not None:
        effort = attrs.evolve(effort, rounds=options.rounds)
    # Contenders are in sessions of their own, so whoever stops this program has to stop them through it.
    signal.signal(signal.SIGTERM, _stop)
    if not has_peer():
        print("PEER_COMMAND is not set: what is wanted in comparison with a peer has no verdict", file=sys.stderr)
    load_before = os.getloadavg()[0]
    rows: list[Row] = []
    try:
        for name in options.scenarios or SCENARIOS:
            began = time.monotonic()
            found = SCENARIOS[name](effort)
            took = f"{time.monotonic() - began:.0f} s" if found else "left out, as COMFYUI_DIR is not set"
            print(f"{name}: {took}", file=sys.stderr, flush=True)
            rows += found
    finally:  # what was measured before something failed or somebody lost patience took its time too
        if rows:
            _report(rows, this_machine(load_before), options.json, options.chart)
    missed = [row for row in rows if row.kept is False]
    return 1 if options.check and missed else 0


def _report(rows: list[Row], machine: Machine, results: Path | None, picture: Path | None) -> None:
    path = write_json(rows, machine, results)
    drawn = picture or path.with_suffix(".svg")
    drawn.write_text(draw(rows, str(machine)), encoding="utf-8")
    print(f"{table(rows)}\n\n{machine}\n{path}\n{drawn}", flush=True)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    described = "\n".join(f"  {name:16}{_first_line(run)}" for name, run in SCENARIOS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"scenarios (default: all):\n{described}\n\n"
        "environment:\n"
        "  COMFYUI_DIR, COMFYUI_PYTHON   ComfyUI's folder and interpreter, for real-client\n"
        "  PEER_COMMAND                  starts another server of POST /prompt in the foreground, which obeys\n"
        "                                PORT, COMFYUI_PORT_HOST, CMD, INPUT_DIR, OUTPUT_DIR and, for what they are\n"
        "                                about, SYSTEM_WEBHOOK_URL and SYSTEM_WEBHOOK_EVENTS; keeps its files in\n"
        "                                PEER_DATA and stops on SIGINT; without it, what is compared with the peer\n"
        "                                has no verdict\n\n"
        "All contenders of a scenario run at the same time and take turns. Measure on a machine that does nothing\n"
        "else; the load averages before and after are written beside the results.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="*", choices=SCENARIOS, default=[], metavar="SCENARIO")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and prompts: to see that it works")
    parser.add_argument("--rounds", type=_at_least_one, metavar="N", help="instead of 5, or 2 with --quick")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a wanted bound is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there (benchmarks/results/...)")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the picture there (beside the results)")
    return parser


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _first_line(scenario: Callable[[Effort], list[Row]]) -> str:
    return (scenario.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
