"""The embedded engine, answering everything and running nothing: what is left of ComfyUI when its worker is dead.

``--lives N``: only the first N starts are like that, counted by files in the working folder. The address comes from the
environment that comfyd sets for its child.
"""

import argparse
import itertools
import os
from pathlib import Path

import hypercorn.trio
import trio
from hypercorn.config import Config

from comfyd.embedded.app import Engine
from comfyd.embedded.settings import parse_command_line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lives", type=int, default=1)
    options = parser.parse_args()
    folders = itertools.chain.from_iterable(
        (f"--{kind}-directory", os.environ[f"{kind.upper()}_DIR"]) for kind in ("input", "output")
    )
    settings = parse_command_line([*folders, "--base-directory", str(Path.cwd() / "engine")])
    trio.run(serve, Engine(settings), count_life() > options.lives)


def count_life() -> int:
    """Return the number of this start, from 1."""
    for number in itertools.count(1):
        try:
            Path(f"idle-life-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return number
    raise AssertionError("endless")


async def serve(engine: Engine, works: bool) -> None:
    """Serve until the process is ended; run prompts only if it *works*."""
    config = Config()
    config.bind = [f"{os.environ['DIRECT_ADDRESS']}:{os.environ['COMFYUI_PORT_HOST']}"]
    config.loglevel = "ERROR"
    async with trio.open_nursery() as nursery:
        if works:
            nursery.start_soon(engine.work)
        await hypercorn.trio.serve(engine, config)  # type: ignore[arg-type]  # our ASGI types are looser than hypercorn's
        nursery.cancel_scope.cancel("stopped")


if __name__ == "__main__":
    main()
