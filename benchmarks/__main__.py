"""``python -m benchmarks``: run the scenarios, print a table of medians and ratios, and write them as JSON."""

import argparse
import sys
import time

from benchmarks.report import Row, table, write_json
from benchmarks.scenarios import FULL, QUICK, SCENARIOS


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    options = _parser().parse_args()
    effort = QUICK if options.quick else FULL
    rows: list[Row] = []
    for name in options.scenarios or SCENARIOS:
        began = time.monotonic()
        found = SCENARIOS[name](effort)
        took = f"{time.monotonic() - began:.0f} s" if found else "left out, as COMFYUI_DIR is not set"
        print(f"{name}: {took}", file=sys.stderr, flush=True)
        rows += found
    print(table(rows))
    print(f"\n{write_json(rows)}")
    missed = [row for row in rows if row.kept is False]
    return 1 if options.check and missed else 0


def _parser() -> argparse.ArgumentParser:
    described = "\n".join(f"  {name:14}{(run.__doc__ or '').splitlines()[0]}" for name, run in SCENARIOS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"scenarios (default: all):\n{described}\n\n"
        "environment:\n"
        "  COMFYUI_DIR, COMFYUI_PYTHON   ComfyUI's folder and interpreter, for real-client\n"
        "  PEER_COMMAND                  starts another server of POST /prompt in the foreground, which obeys\n"
        "                                PORT and COMFYUI_PORT_HOST, and CMD, INPUT_DIR and OUTPUT_DIR if they are\n"
        "                                set, keeps its files in PEER_DATA and stops on SIGINT; without it, what is\n"
        "                                compared with the peer has no verdict",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="*", choices=SCENARIOS, default=[], metavar="SCENARIO")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and prompts: to see that it works")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a wanted bound is missed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
