"""``GET /metrics``, in the format that the scraper prefers."""

from typing import Final

import attrs

from comfyd.host.metrics import Metrics
from comfyd.http.asgi import Exchange, by_method, header, send_whole, split_outside_quotes

OPENMETRICS_TYPE: Final = b"application/openmetrics-text; version=1.0.0; charset=utf-8"
TEXT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
_WORTH_PACKING: Final = 1400
"""Bytes that go in one packet as they are."""


@attrs.frozen
class MetricsEndpoint:
    """The endpoint, as a plain ASGI application. No key is asked for: it tells of numbers, not of jobs."""

    metrics: Metrics

    async def __call__(self, exchange: Exchange) -> None:
        """Serve one request."""
        await by_method(exchange, {"GET": self._scrape})

    async def _scrape(self, exchange: Exchange) -> None:
        openmetrics = prefers_openmetrics(header(exchange.scope, b"accept") or "")
        packed = takes_gzip(header(exchange.scope, b"accept-encoding") or "")
        body = await self.metrics.render(openmetrics=openmetrics, pack_above_bytes=_WORTH_PACKING if packed else None)
        headers = [(b"cache-control", b"no-store"), (b"vary", b"accept, accept-encoding")]
        if body.packed:
            headers.append((b"content-encoding", b"gzip"))
        await send_whole(exchange.send, 200, body.data, OPENMETRICS_TYPE if openmetrics else TEXT_TYPE, headers)


def prefers_openmetrics(accept: str) -> bool:
    """Whether an ``Accept`` header ranks OpenMetrics above the older text format (RFC 9110, section 12.5.1)."""
    ranks = _ranks(accept)
    wanted = ranks.get("application/openmetrics-text", 0.0)
    return wanted > 0 and wanted >= max(ranks.get(name, 0.0) for name in ("text/plain", "text/*"))


def takes_gzip(accept_encoding: str) -> bool:
    """Whether an ``Accept-Encoding`` header allows gzip (RFC 9110, section 12.5.3)."""
    ranks = _ranks(accept_encoding)
    return ranks.get("gzip", ranks.get("*", 0.0)) > 0


def _ranks(field: str) -> dict[str, float]:
    """The quality of each member of a header field; of one that comes more than once, the best."""
    ranks: dict[str, float] = {}
    for member in split_outside_quotes(field, ","):
        name, *parameters = (part.strip().lower() for part in split_outside_quotes(member, ";"))
        rank = next((_quality(text[2:]) for text in parameters if text.startswith("q=")), 1.0)
        ranks[name] = max(rank, ranks.get(name, 0.0))
    return ranks


def _quality(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0
