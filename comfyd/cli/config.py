"""``comfyd config [--check]``: what holds and where it came from, or what is wrong with it."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from comfyd.config import Setting

EXIT_BAD_CONFIGURATION: Final = 2
"""That of ``comfyd run`` for the same environment."""
_HEADINGS: Final = ("NAME", "VALUE", "ORIGIN", "MEANING")
_WRAPPED: Final = frozenset({1, 3})


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line's *subparsers*."""
    parser = subparsers.add_parser(
        "config",
        help="show the effective configuration, or check it",
        description="Every variable with its effective value and where it came from; secrets are masked. What is wrong "
        "is said on stderr, in the words of the start, and the exit code is then 2. Nothing is created or started.",
    )
    parser.add_argument("--check", action="store_true", help="show nothing but what is wrong and what is warned of")
    parser.add_argument("--json", action="store_true", help="as one JSON object: settings, warnings, faults")
    parser.add_argument("--embedded", action="store_true", help="the configuration of `comfyd run --embedded`")


def config_command(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Do what *options* say; return the exit code: 0, or 2 if comfyd would not start with *environ*."""
    from comfyd.config import describe, load_config  # half a second that --help need not take
    from comfyd.errors import BadConfiguration

    settings: Sequence[Setting] = ()
    warnings: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    try:
        config = load_config(environ, embedded=options.embedded)
        settings, warnings = describe(config), config.warnings
    except BadConfiguration as exc:
        faults = exc.faults
    if options.json:
        sys.stdout.write(_document(() if options.check else settings, warnings, faults) + "\n")
    else:
        if settings and not options.check:
            _write_table(settings)
        for text in (*faults, *(f"warning: {warning}" for warning in warnings)):
            sys.stderr.write(f"comfyd: {text}\n")
    return EXIT_BAD_CONFIGURATION if faults else 0


def _document(settings: Sequence["Setting"], warnings: Sequence[str], faults: Sequence[str]) -> str:
    rows = [
        {"name": setting.name, "value": setting.value, "origin": setting.origin, "meaning": setting.meaning}
        for setting in settings
    ]
    return json.dumps({"settings": rows, "warnings": list(warnings), "faults": list(faults)}, indent=2)


def _write_table(settings: Sequence["Setting"]) -> None:
    from comfyd.cli.table import table_lines, terminal_width

    rows = [_HEADINGS, *((each.name, each.value, each.origin, each.meaning) for each in settings)]
    for line in table_lines(rows, width=terminal_width(sys.stdout), wrapped=_WRAPPED):
        sys.stdout.write(line + "\n")
