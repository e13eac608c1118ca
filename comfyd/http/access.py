"""Who may ask for what: API keys, and which routes are on which port.

Plain ASGI wrappers, put around the app only when they have something to do. Each looks at the header alone: a request
without a key costs no byte of its body, which a client that sends ``Expect: 100-continue`` never sends.

A browser's ``EventSource`` cannot send a header. There is no key in the query for it: URLs end up in the logs and
histories of everything on the way. ``fetch`` reads event streams too, and does send headers.
"""

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any, Final

import structlog
from hypercorn.typing import ASGIFramework, ASGIReceiveCallable, ASGISendCallable, Scope

from comfyd.errors import Failure, FailureKind
from comfyd.http.asgi import send_failure
from comfyd.http.cors import Cors
from comfyd.http.problems import CONTENT_TYPE, not_found, problem

log = structlog.get_logger("comfyd.http")

METRICS: Final = "/metrics"
#: What balancers and Prometheus ask for; nothing in them tells of a job. Compared as the app itself does, so that no
#: other spelling of a path is open here and another route there.
OPEN_ROUTES: Final = frozenset({"/health", "/ready", METRICS})
DOCS: Final = "/docs"
DOCS_ASSETS: Final = "/docs/assets/"
"""The page of the docs is open as well: a browser shows no key when it goes somewhere. It is the same for every comfyd,
and asks for a key before it asks for the document, which is not open."""

Headers = Sequence[tuple[bytes, bytes]]


class Wrapper:
    """An ASGI app around another one. It speaks for that one about bodies (see ``serve_http``)."""

    def __init__(self, app: ASGIFramework) -> None:
        self._app = app
        self.bounds_bodies: bool = bool(getattr(app, "bounds_bodies", False))


class RequireKey(Wrapper):
    """Lets only those through who show one of *keys*, but for :data:`OPEN_ROUTES`.

    Raises:
        ValueError: there is no key, or an empty one.
    """

    def __init__(self, app: ASGIFramework, keys: Sequence[str]) -> None:
        super().__init__(app)
        if not keys or not all(keys):
            raise ValueError("keys must be given, and none of them empty")
        # Digests have one length, so that comparing tells nothing about a key, not even how long it is.
        self._digests = tuple(_digest(key.encode()) for key in keys)

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "lifespan" or _is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        shown = _keys_shown(scope["headers"])
        # All are compared, whatever comes out: the time that it takes tells nothing about which one it was.
        if sum(hmac.compare_digest(_digest(key), known) for key in shown for known in self._digests):
            await self._app(scope, receive, send)
            return
        log.info("http.unauthorized", path=scope["path"], client=scope["client"], key_shown=bool(shown))
        if shown:
            detail, challenge = "the key is not one of comfyd's", b'Bearer error="invalid_token"'  # RFC 6750, 3.1
        else:
            detail, challenge = "a key is needed: Authorization: Bearer KEY, or X-API-Key: KEY", b"Bearer"
        failure = Failure(kind=FailureKind.UNAUTHORIZED, detail=detail)
        await _refuse(scope, send, failure, [(b"www-authenticate", challenge), (b"cache-control", b"no-store")])


class MetricsElsewhere(Wrapper):
    """The app on its main port, when the metrics have one of their own."""

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Pass the request on, unless it is for the metrics."""
        if scope["type"] != "lifespan" and scope["path"] == METRICS:
            await _refuse(scope, send, not_found("such route"))
        else:
            await self._app(scope, receive, send)


class OpenRoutesOnly(Wrapper):
    """The app on the port of the metrics. Its lifespan belongs to the main port."""

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Pass the request on if it is for one of :data:`OPEN_ROUTES`."""
        if scope["type"] == "lifespan":
            return
        if scope["type"] == "http" and scope["path"] in OPEN_ROUTES:
            await self._app(scope, receive, send)
        else:
            await _refuse(scope, send, not_found("such route"))


def guard_app(
    app: ASGIFramework,
    *,
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    metrics_elsewhere: bool = False,
) -> ASGIFramework:
    """Put around *app* what the configuration asks for; *app* itself if that is nothing.

    CORS is outermost: a browser asks for permission without the key, and must be able to read a 401.
    """
    if metrics_elsewhere:
        app = MetricsElsewhere(app)
    if api_keys:
        app = RequireKey(app, api_keys)
    if cors_origins:
        app = Cors(app, cors_origins)
    return app


def _is_open(path: str) -> bool:
    return path in OPEN_ROUTES or path == DOCS or path.startswith(DOCS_ASSETS)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _keys_shown(headers: Any) -> list[bytes]:
    """What a request shows as keys, at most one by each header; a second one of the same name does not count."""
    authorization = api_key = b""
    for name, value in headers:
        if name == b"authorization":
            authorization = authorization or value
        elif name == b"x-api-key":
            api_key = api_key or value
    scheme, _, token = authorization.partition(b" ")
    bearer = token if scheme.lower() == b"bearer" else b""  # Basic is somebody else's, a proxy's
    return [key.strip() for key in (bearer, api_key) if key.strip()]


async def _refuse(scope: Scope, send: ASGISendCallable, failure: Failure, headers: Headers = ()) -> None:
    """Answer a request, or in place of the answer to a websocket's handshake (ASGI's Websocket Denial Response)."""
    if scope["type"] == "http":
        await send_failure(send, failure, headers=headers)
        return
    answer = problem(failure)
    all_headers = [
        (b"content-type", CONTENT_TYPE.encode()),
        (b"content-length", b"%d" % len(answer.body)),
        (b"connection", b"close"),
        *headers,
    ]
    await send({"type": "websocket.http.response.start", "status": answer.status, "headers": all_headers})
    await send({"type": "websocket.http.response.body", "body": answer.body, "more_body": False})
