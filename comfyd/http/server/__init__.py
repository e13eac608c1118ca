"""The HTTP server: Hypercorn's and Quart-Trio's translators on connections of our own.

``sockets`` listens, ``serve`` accepts and stops, ``connection``, ``head``, ``transport`` and ``tls`` hold one client,
``certificate`` is what TLS shows, ``streams`` shows a client to the app, ``lifespan`` starts and ends the app,
``quart`` is the app class with bounds, and ``pins`` refuses library versions that were not tested.

Quart is imported when :class:`HardenedQuart` is first asked for: it takes half of the import time, and the embedded
engine, a raw ASGI app that is started often, does without.
"""

from typing import TYPE_CHECKING, Any

from comfyd.http.server import pins

pins.check(("hypercorn",), pins.SERVER_MODULES)

from comfyd.http.server.config import HttpServerConfig, TlsFiles  # noqa: E402 -- what follows relies on what was checked
from comfyd.http.server.serve import serve_http  # noqa: E402
from comfyd.http.server.streams import DISCONNECT, FRAMES_TOGETHER  # noqa: E402

if TYPE_CHECKING:
    from comfyd.http.server.quart import HardenedQuart

__all__ = ["DISCONNECT", "FRAMES_TOGETHER", "HardenedQuart", "HttpServerConfig", "TlsFiles", "serve_http"]


def __getattr__(name: str) -> Any:
    if name == "HardenedQuart":
        from comfyd.http.server.quart import HardenedQuart

        return HardenedQuart
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
