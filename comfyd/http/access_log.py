"""The access log: one line for each request that reached the application, and what is counted of it.

What the server itself refuses (malformed heads, time-outs before a request is whole) reaches no application; the
server logs it.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

import attrs
import structlog
import trio
from hypercorn.typing import ASGIFramework, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope

from comfyd.http.server import DISCONNECT

log = structlog.get_logger("comfyd.http.access")

OTHER: Final = "other"
_EXACT: Final = frozenset(
    {"/prompt", "/health", "/ready", "/metrics", "/models", "/interrupt", "/jobs", "/docs", "/openapi.json"}
)
_FOLDERS: Final = {"workflow": "/workflow/{path}", "workflows": "/workflow/{path}", "docs": "/docs/{path}"}
_OF_A_JOB: Final = {
    (): "/jobs/{id}",
    ("events",): "/jobs/{id}/events",
    ("outputs",): "/jobs/{id}/outputs",
}
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET: Final = frozenset({"/health", "/ready", "/metrics"})  # asked several times a second, by machines
_NO_ANSWER: Final = 0
_NO_SUCH_JOB: Final = frozenset({401, 404})


@attrs.frozen(kw_only=True)
class Access:
    """One request and how it ended. *route*, *method* and *status* have few values each, whatever clients send.

    *status* is 0 if no answer began. *body_bytes* were handed to the server for the answer's body.
    """

    route: str
    method: str
    status: int
    body_bytes: int
    took_s: float


@attrs.define
class _Noted:
    """What is found out about a request while it is served."""

    status: int = _NO_ANSWER
    body_bytes: int = 0
    whole: bool = False
    gone: bool = False
    job_id: str | None = None


_noted: ContextVar[_Noted | None] = ContextVar("comfyd_request", default=None)


def note_job(job_id: str) -> None:
    """Say that the request which is being served is about this job. Without effect where none is being served."""
    noted = _noted.get()
    if noted is not None:
        noted.job_id = job_id


def route_of(path: str) -> str:
    """The route that *path* belongs to: one of a few, and ``other`` for what there is not."""
    if path in _EXACT:
        return path
    _, first, *rest = path.split("/", 5) if path.startswith("/") else ("", path)
    if first == "jobs" and rest:
        match tuple(rest[1:]):
            case ("outputs", _):
                return "/jobs/{id}/outputs/{place}"
            case more:
                return _OF_A_JOB.get(more, OTHER)
    return _FOLDERS.get(first, OTHER)


@attrs.frozen
class AccessLog:
    """An ASGI application around another: logs each request at its end, and tells *count* of it.

    Websockets and the lifespan pass through.
    """

    app: ASGIFramework
    count: Callable[[Access], None] | None = None

    @property
    def bounds_bodies(self) -> bool:
        """What :func:`comfyd.http.server.serve_http` asks an application: whether it bounds bodies itself."""
        return bool(getattr(self.app, "bounds_bodies", False))

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Serve one request by the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        noted = _Noted()

        async def noted_receive() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect" and not noted.whole:
                noted.gone = True
            return message

        async def noted_send(message: ASGISendEvent) -> None:
            try:
                await send(message)
            except OSError:  # ASGI 2.4: the client has left
                noted.gone = True
                raise
            if message["type"] == "http.response.body":
                noted.body_bytes += len(message["body"])
                noted.whole = not message["more_body"]
            elif message["type"] == "http.response.start":
                noted.status = message["status"]

        def note_gone() -> None:
            noted.gone = not noted.whole

        extension: Any = scope.get("extensions", {}).get(DISCONNECT)
        if extension is not None:
            extension["on_disconnect"](note_gone)
        ended = "failed"
        token = _noted.set(noted)
        try:
            await self.app(scope, noted_receive, noted_send)
        except BaseException as exc:
            if _is_cancelled(exc):
                ended = "cancelled"
            raise
        finally:
            _noted.reset(token)
            self._tell(scope, noted, ended, time.perf_counter() - began)

    def _tell(self, scope: Any, noted: _Noted, ended: str, took_s: float) -> None:
        method, path = scope["method"], scope["path"]
        route = route_of(path)
        body_bytes = 0 if method == "HEAD" else noted.body_bytes  # which the server drops
        if self.count is not None:
            self.count(
                Access(
                    route=route,
                    method=method if method in _METHODS else OTHER,
                    status=noted.status,
                    body_bytes=body_bytes,
                    took_s=took_s,
                )
            )
        fields: dict[str, Any] = {}
        if noted.job_id is not None:
            fields["job_id"] = noted.job_id
        elif route.startswith("/jobs/") and noted.status not in _NO_SUCH_JOB:
            fields["job_id"] = path.split("/", 3)[2]
        if not noted.whole:
            fields["cut"] = "disconnected" if noted.gone else ended
        client = scope["client"]
        tell = log.debug if route in _QUIET else log.info
        tell(
            "http.request",
            method=method,
            path=path,  # without the query, in which tokens travel
            status=noted.status or None,
            bytes=body_bytes,
            took_ms=round(took_s * 1000, 3),
            client=client[0] if client else None,  # the peer's own: X-Forwarded-For says what anybody likes
            **fields,
        )


def _is_cancelled(exc: BaseException) -> bool:
    """Whether *exc* is a cancellation and nothing else; an application's own nurseries may have made a group of it."""
    if isinstance(exc, BaseExceptionGroup):
        return exc.split(trio.Cancelled)[1] is None
    return isinstance(exc, trio.Cancelled)
