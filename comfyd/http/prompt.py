"""``POST /prompt``: run a graph."""

from functools import partial
from typing import Any

import attrs

from comfyd.http.asgi import Exchange, by_method, wants_async
from comfyd.http.submission import Submission, digest_of, receive_parsed, submit_and_answer
from comfyd.jobs import JobService, parse_request
from comfyd.wire import decode_json


@attrs.frozen
class PromptEndpoint:
    """The endpoint, as a plain ASGI application. It holds nothing between two requests."""

    service: JobService
    max_body_bytes: int

    async def __call__(self, exchange: Exchange) -> None:
        """Serve one request."""
        await by_method(exchange, {"POST": self._post})

    async def _post(self, exchange: Exchange) -> None:
        parse = partial(_parse, respond_async=wants_async(exchange.scope))
        await submit_and_answer(self.service, exchange, await receive_parsed(exchange, self.max_body_bytes, parse))


def _parse(body: bytearray, *, respond_async: bool) -> Submission:
    value: Any = decode_json(body)
    request = parse_request(value)
    if respond_async:
        request = attrs.evolve(request, respond_async=True)
    text = bytes(body) if request.detached else None
    body.clear()  # a body can be 100 MB; what it said is in *value*
    return Submission(request=request, digest=digest_of(request, value), body=text)
