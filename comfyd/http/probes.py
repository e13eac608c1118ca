"""``GET /health`` and ``GET /ready``, as plain ASGI: balancers ask often, and should not slow down what they watch."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from hypercorn.typing import ASGISendCallable

from comfyd import __version__
from comfyd.http import problems
from comfyd.http.asgi import send_failure, send_whole
from comfyd.jobs import JobService
from comfyd.wire import encode_json


async def health(service: JobService, send: ASGISendCallable) -> None:
    """Say whether a warm-up was ever completed, whatever the engine does later."""
    status, word = (200, "healthy") if service.healthy else (503, "not healthy")
    await send_whole(send, status, encode_json({"version": __version__, "status": word}))


async def ready(service: JobService, send: ASGISendCallable) -> None:
    """Say whether more work should be sent here, and if not, why."""
    reason = service.not_ready_reason()
    if reason is None:
        await send_whole(send, 200, encode_json({"version": __version__, "status": "ready"}))
    else:
        await send_whole(send, 503, encode_json({"version": __version__, "status": "not ready", "reason": reason}))


async def probe(path: str, method: str, service: JobService, send: ASGISendCallable) -> None:
    """Answer a request for one of :data:`PROBES`."""
    if method in {"GET", "HEAD"}:
        await PROBES[path](service, send)
    else:
        await send_failure(send, problems.method_not_allowed("GET, HEAD"), headers=[(b"allow", b"GET, HEAD")])


PROBES: Final[Mapping[str, Callable[[JobService, ASGISendCallable], Awaitable[None]]]] = {
    "/health": health,
    "/ready": ready,
}
