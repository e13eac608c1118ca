"""The engine on its addresses, through the daemon's own HTTP server."""

import sys

import structlog
import trio

from comfyd.embedded.app import Engine
from comfyd.http.server import HttpServerConfig, serve_http


async def serve_engine(
    engine: Engine, stop: trio.Event, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer on every address of the settings until *stop* is set. ``started()`` gets the base URLs.

    Raises (in an exception group):
        StartupFailed: an address cannot be had.
    """
    settings = engine.settings
    # ComfyUI sends previews and history of any size, and closes no connection for having served many requests.
    configs = [
        HttpServerConfig(
            host=host,
            port=settings.port,
            max_body_bytes=settings.max_upload_bytes,
            max_requests_per_connection=sys.maxsize,
        )
        for host in settings.hosts
    ]
    async with trio.open_nursery() as nursery:
        urls = [await nursery.start(serve_http, engine, config, stop) for config in configs]
        task_status.started(urls)


def log_plainly(level: int) -> None:
    """Let the HTTP server's events be lines on stderr like all others, and only those worth a warning."""
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
