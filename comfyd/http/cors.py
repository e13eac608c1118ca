"""Cross-origin requests of browsers (the Fetch standard, "CORS protocol"), off unless origins are named.

What is not named is answered as before, without the headers; it is the browser that then keeps the answer from the
page. CORS keeps nobody out who is not a browser: that is what API keys are for.
"""

import re
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import structlog
from hypercorn.typing import ASGIFramework, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, HTTPScope, Scope

from comfyd.http.asgi import send_empty

log = structlog.get_logger("comfyd.http")

ANY_ORIGIN: Final = "*"
METHODS: Final = b"GET, HEAD, POST, DELETE"
#: Headers of our answers that a page may read beside the few that it always may.
EXPOSED: Final = (
    b"Location, Retry-After, Preference-Applied, Link, ETag, Content-Range, Content-Disposition, WWW-Authenticate"
)
#: How long a browser may keep a permission. Chrome keeps none for longer.
MAX_AGE_S: Final = 7200
#: A header's name (RFC 9110, section 5.6.2). What a page asks to send is echoed: a page that is trusted to run jobs is
#: trusted with headers, whose names (of tracing tools, of proxies) nobody can list.
_NAMES: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:[ \t]*,[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")
_HOST: Final = re.compile(r"[0-9a-z._-]+|[0-9a-f:.]+")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


def parse_origin(text: str) -> str:
    """Read one of CORS_ORIGINS into the form that browsers send; ``*`` stays.

    Raises:
        ValueError: it is not an origin: no http or https URL, or one with a path.
    """
    text = text.strip()
    if text == ANY_ORIGIN:
        return text
    try:
        origin = _origin_of(urlsplit(text)) if not re.search(r"[\s@?#]", text) else None
    except ValueError:  # of urllib, for a port or an IPv6 address that is none
        origin = None
    if origin is None:
        raise ValueError(f"{text!r} is not an origin such as https://app.example.com")
    return origin


def _origin_of(parts: SplitResult) -> str | None:
    """The origin as browsers write it. None for ``null`` too, which sandboxed frames send: that is nobody."""
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or parts.path not in {"", "/"}:
        return None
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
    if not _HOST.fullmatch(host):
        return None
    port = "" if parts.port in {None, _DEFAULT_PORTS[parts.scheme]} else f":{parts.port}"
    return f"{parts.scheme}://[{host}]{port}" if ":" in host else f"{parts.scheme}://{host}{port}"


class Cors:
    """Lets pages of *origins* read what *app* answers.

    Args:
        app: what answers.
        origins: as :func:`parse_origin` gives them. With ``*`` among them every page may, but never with the browser's
            own credentials (cookies of a proxy in front of us); named ones may use these, as an ``EventSource`` must.
    """

    def __init__(self, app: ASGIFramework, origins: Sequence[str]) -> None:
        if not origins:
            raise ValueError("origins must be given")
        self._app = app
        self.bounds_bodies: bool = bool(getattr(app, "bounds_bodies", False))
        self._any = ANY_ORIGIN in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Answer a preflight; add the headers to any other answer."""
        if scope["type"] != "http":  # CORS does not apply to websockets
            await self._app(scope, receive, send)
            return
        origin, method, names = _asked(scope)
        permission = self._permission(origin)
        vary = [] if self._any else [(b"vary", b"Origin")]
        if scope["method"] == "OPTIONS" and origin and method:
            if not permission:
                log.info("http.cors_refused", origin=origin.decode("latin-1")[:200])
            await send_empty(send, 204, [*vary, *permission, *(_preflight(names) if permission else ())])
            return
        added = [*vary, *permission, *([(b"access-control-expose-headers", EXPOSED)] if permission else [])]

        async def with_permission(message: ASGISendEvent) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await self._app(scope, receive, with_permission)

    def _permission(self, origin: bytes) -> list[tuple[bytes, bytes]]:
        """The headers by which a page of *origin* may read an answer; none if it may not."""
        if self._any:
            return [(b"access-control-allow-origin", b"*")]
        if origin in self._origins:
            return [(b"access-control-allow-origin", origin), (b"access-control-allow-credentials", b"true")]
        return []


def _preflight(names: bytes) -> list[tuple[bytes, bytes]]:
    """What a browser may send for the page, said before it does so. It sends no key here, and none is asked for."""
    headers = [(b"access-control-allow-methods", METHODS), (b"access-control-max-age", b"%d" % MAX_AGE_S)]
    if _NAMES.fullmatch(names):
        headers.append((b"access-control-allow-headers", names))
    return headers


def _asked(scope: HTTPScope) -> tuple[bytes, bytes, bytes]:
    """The page's origin, and the method and the header names that a preflight asks for; empty if not there."""
    found: dict[Any, bytes] = {}
    for name, value in scope["headers"]:
        if name in {b"origin", b"access-control-request-method", b"access-control-request-headers"}:
            found.setdefault(name, value.strip())
    return (
        found.get(b"origin", b""),
        found.get(b"access-control-request-method", b""),
        found.get(b"access-control-request-headers", b""),
    )
