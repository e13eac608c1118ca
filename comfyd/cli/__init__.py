"""The command line: which command is meant, and its exit code.

Only the module of the command that is named is imported: a health check must not wait for the daemon's imports.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from comfyd import __version__

_COMMANDS: Final = {
    "run": "run the daemon (the default)",
    "demo": "run a real prompt end to end on the built-in engine",
    "config": "show the effective configuration, or check it",
    "doctor": "look at everything that comfyd needs, and say what to do about it",
    "healthcheck": "ask the daemon on this machine whether it is healthy",
    "openapi": "write the OpenAPI document of this configuration",
    "submit": "run a graph or a workflow on a daemon, and fetch what it makes",
    "webhooks": "list, replay or drop webhooks that were not taken",
    "workflow": "write workflow files from graphs, check them, list them",
}
"""Each has a module of its name, with ``add_parser(subparsers)`` and ``<name>_command(options) -> exit code``."""


def run(arguments: Sequence[str]) -> int:
    """Run the command that *arguments* name, ``run`` if they name none; return its exit code."""
    named = next((argument for argument in arguments if not argument.startswith("-")), "run")
    module = import_module(f"comfyd.cli.{named}") if named in _COMMANDS else None
    parser = argparse.ArgumentParser(
        prog="comfyd",
        description="The daemon that turns ComfyUI into a production API. Without a command it runs the daemon, "
        "which is configured by environment variables.",
    )
    parser.add_argument("--version", action="version", version=f"comfyd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in _COMMANDS.items():
        if module is not None and name == named:
            module.add_parser(commands)
        else:
            commands.add_parser(name, help=text)
    options = parser.parse_args(arguments or ["run"])
    exit_code: int = getattr(module, f"{named}_command")(options)
    return exit_code
