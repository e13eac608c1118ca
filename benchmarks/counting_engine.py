"""The embedded engine, counting which routes are asked; ``GET /benchmark/requests`` tells."""

import sys
from collections import Counter
from typing import Any

import trio

from comfyd.embedded.__main__ import run
from comfyd.embedded.app import Engine
from comfyd.embedded.asgi import Receive, Scope, Send, json_answer
from comfyd.embedded.settings import parse_command_line


class CountingEngine(Engine):
    """An engine that notes each request before it serves it."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.requests: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or websocket."""
        if scope["type"] == "http":
            if scope["path"] == "/benchmark/requests":
                await json_answer(dict[str, Any](self.requests)).send(send)
                return
            folder = "/" + scope["path"].split("/")[1]  # /history/<id> counts as /history
            self.requests[f"{scope['method']} {folder}"] += 1
        await super().__call__(scope, receive, send)


if __name__ == "__main__":
    trio.run(run, CountingEngine(parse_command_line(sys.argv[1:])), trio.Event())
