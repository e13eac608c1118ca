"""The command line: which command is meant, and its exit code."""

import argparse
from collections.abc import Sequence

from comfyd import __version__


def run(arguments: Sequence[str]) -> int:
    """Run the command that *arguments* name, ``run`` if they name none; return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments or ["run"])
    if options.command == "demo":
        from comfyd.cli.demo import demo

        return demo(options.output)
    from comfyd.cli.run import run_command

    return run_command(embedded=options.embedded)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="comfyd",
        description="The daemon that turns ComfyUI into a production API. Without a command it runs the daemon, "
        "which is configured by environment variables.",
    )
    parser.add_argument("--version", action="version", version=f"comfyd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    run_parser = commands.add_parser("run", help="run the daemon (the default)")
    run_parser.add_argument(
        "--embedded", action="store_true", help="with the small built-in engine instead of ComfyUI: for trying it out"
    )
    demo_parser = commands.add_parser("demo", help="run a real prompt end to end on the built-in engine")
    demo_parser.add_argument(
        "-o", "--output", default="demo-output", metavar="DIR", help="where the picture is put (default: %(default)s)"
    )
    return parser
