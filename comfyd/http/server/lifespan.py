"""The app's start and end (ASGI lifespan 2.0)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
import trio
from hypercorn.typing import ASGIFramework

from comfyd.errors import StartupFailed
from comfyd.http.server.config import HttpServerConfig

log = structlog.get_logger("comfyd.http")


@asynccontextmanager
async def open_lifespan(app: ASGIFramework, config: HttpServerConfig) -> AsyncIterator[dict[str, Any]]:
    """Start *app*, yield its state, and end it.

    Not Hypercorn's: that one fails when an app simply returns from the lifespan scope, and lets the end take a minute.
    An app that raises or returns before it answered has no lifespan, as the specification says.

    Raises:
        StartupFailed: the app says so, or takes longer than ``config.lifespan_startup_timeout_s``.
    """
    state: dict[str, Any] = {}
    to_app, from_server = trio.open_memory_channel[Any](2)  # two events exist: startup and shutdown
    started, ended = trio.Event(), trio.Event()
    failure: list[str] = []

    async def hear(message: Any) -> None:
        kind = message["type"]
        if kind.endswith(".failed"):
            failure.append(message.get("message", ""))
        (started if kind.startswith("lifespan.startup") else ended).set()
        await trio.lowlevel.checkpoint()

    async def live() -> None:
        scope: Any = {"type": "lifespan", "asgi": {"spec_version": "2.0", "version": "3.0"}, "state": state}
        try:
            await app(scope, from_server.receive, hear)
        except* Exception as group:  # noqa: BLE001 -- any kind; an app without a lifespan announces it by raising
            level = "warning" if started.is_set() else "debug"
            getattr(log, level)("http.lifespan_failed", exc_info=group)
        finally:
            started.set()
            ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        to_app.send_nowait({"type": "lifespan.startup"})
        with trio.move_on_after(config.lifespan_startup_timeout_s) as patience:
            await started.wait()
        ready = not failure and not patience.cancelled_caught
        if ready:
            yield state
            to_app.send_nowait({"type": "lifespan.shutdown"})
            with trio.move_on_after(config.lifespan_shutdown_timeout_s) as patience:
                await ended.wait()
            if failure or patience.cancelled_caught:
                log.warning("http.lifespan_end_failed", reason=failure[0] if failure else "too slow")
        nursery.cancel_scope.cancel("lifespan over")
    if not ready:
        raise StartupFailed(f"the HTTP app did not start: {failure[0] if failure else 'it took too long'}")
