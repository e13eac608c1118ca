"""``python -m comfyd.embedded``: a process that takes ComfyUI's flags and speaks its protocol."""

import logging
import shutil
import sys

import trio

from comfyd.embedded.app import COMFYUI_VERSION, PATTERNS_NOT_DIFFUSION, Engine
from comfyd.embedded.nodes.pictures import vips
from comfyd.embedded.serving import log_plainly, serve_engine
from comfyd.embedded.settings import Cost, Settings, parse_command_line
from comfyd.errors import StartupFailed

_log = logging.getLogger(__name__)


def main() -> int:
    """Run the engine. SIGINT ends it with 0; SIGTERM is left as it is and kills the process, as in ComfyUI (E6)."""
    settings = parse_command_line(sys.argv[1:])
    _set_up_logging(settings)
    _log.info("Python version: %s", sys.version)
    _log.info("ComfyUI version: %s", COMFYUI_VERSION)
    _log.info("%s", PATTERNS_NOT_DIFFUSION)
    if settings.cost is not Cost.NONE:
        vips()  # load libvips now: the first prompt must not pay for it
    shutil.rmtree(settings.folders.temp, ignore_errors=True)
    engine = Engine(settings)
    if settings.quick_test:
        return 0
    code = 0
    try:
        trio.run(run, engine, trio.Event())
    except* KeyboardInterrupt:
        _log.info("\nStopped server")
    except* StartupFailed as group:
        _log.error("%s", _first(group))
        code = 1
    shutil.rmtree(settings.folders.temp, ignore_errors=True)
    return code


async def run(engine: Engine, stop: trio.Event) -> None:
    """Serve and work until *stop* is set or cancelled, or until an address cannot be had."""
    async with trio.open_nursery() as worker_nursery:
        worker_nursery.start_soon(engine.work)
        async with trio.open_nursery() as nursery:
            for url in await nursery.start(serve_engine, engine, stop):
                # A line of ComfyUI's, read by people and by scripts; it also tells which port 0 became.
                print(f"To see the GUI go to: {url}", flush=True)
        worker_nursery.cancel_scope.cancel("nobody can ask any more")


def _first(failure: BaseException) -> BaseException:
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure


def _set_up_logging(settings: Settings) -> None:
    """Plain lines on stderr, as ComfyUI logs; with ``--log-stdout`` on stdout."""
    stream = sys.stdout if settings.log_to_stdout else sys.stderr
    logging.getLogger("pyvips").setLevel(logging.WARNING)  # it tells of each thread pool
    log_plainly(max(settings.log_level, logging.WARNING))
    logging.basicConfig(level=settings.log_level, format="%(message)s", stream=stream)


if __name__ == "__main__":
    sys.exit(main())
