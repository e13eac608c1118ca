"""An embedded engine for one test: served on a free port of loopback, with clients that speak its protocol."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import trio
from trio_websocket import WebSocketConnection, open_websocket_url

from comfyd.embedded.app import Engine
from comfyd.embedded.serving import serve_engine
from comfyd.embedded.settings import parse_command_line

Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def picture_graph(prefix: str = "out", **empty: Any) -> Graph:
    """EmptyImage -> SaveImage."""
    sizes = {"width": 16, "height": 16, "batch_size": 1, "color": 0x3366CC, **empty}
    return {"1": node("EmptyImage", **sizes), "2": node("SaveImage", images=["1", 0], filename_prefix=prefix)}


def sleep_graph(seconds: float, **more: Any) -> Graph:
    return {"1": node("Sleep", seconds=seconds, **more), "2": node("PreviewAny", source=["1", 0])}


@attrs.define(eq=False)
class Listener:
    """One websocket of a client. Binary frames are kept apart, in :attr:`binary`."""

    websocket: WebSocketConnection
    binary: list[bytes] = attrs.field(factory=list)

    async def event(self) -> dict[str, Any]:
        """Wait for the next JSON event."""
        while True:
            frame = await self.websocket.get_message()
            if isinstance(frame, str):
                return json.loads(frame)  # type: ignore[no-any-return]  # the protocol's events are objects
            self.binary.append(frame)

    async def until(self, kind: str, **data: Any) -> list[dict[str, Any]]:
        """Return all events up to the first of that type whose data holds the given members."""
        seen = []
        while True:
            event = await self.event()
            seen.append(event)
            if event["type"] == kind and all(event["data"].get(key) == value for key, value in data.items()):
                return seen

    async def until_ended(self, prompt_id: str) -> list[dict[str, Any]]:
        return await self.until("executing", node=None, prompt_id=prompt_id)


@attrs.define(eq=False)
class Peer:
    """A served engine and an HTTP client of it."""

    engine: Engine
    url: str
    http: httpx.AsyncClient
    folder: Path

    @asynccontextmanager
    async def listening(self, client_id: str | None = "me", *, features: bool = True) -> AsyncIterator[Listener]:
        query = "" if client_id is None else f"?clientId={client_id}"
        async with open_websocket_url(
            f"{self.url.replace('http', 'ws', 1)}/ws{query}", message_queue_size=64
        ) as socket:
            if features:
                flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
                await socket.send_message(json.dumps(flags))
            yield Listener(socket)

    async def submit(
        self, graph: Any, prompt_id: str = "p", client_id: str | None = "me", *, status: int = 200, **body: Any
    ) -> httpx.Response:
        identity = {} if client_id is None else {"client_id": client_id}
        answer = await self.http.post("/prompt", json={"prompt": graph, "prompt_id": prompt_id, **identity, **body})
        assert answer.status_code == status, answer.text
        return answer

    async def run(self, graph: Graph, prompt_id: str = "p", **body: Any) -> dict[str, Any]:
        """Run a graph to its end and return its history entry; its client id is its own ("runner")."""
        async with self.listening("runner") as listener:
            await self.submit(graph, prompt_id, "runner", **body)
            await listener.until_ended(prompt_id)
        return await self.history(prompt_id)

    async def history(self, prompt_id: str) -> dict[str, Any]:
        entries = (await self.http.get(f"/history/{prompt_id}")).json()
        return entries[prompt_id]  # type: ignore[no-any-return]  # JSON

    def saved(self, entry: dict[str, Any], node_id: str, key: str = "images") -> list[Path]:
        """Return the files that a node of a finished prompt recorded."""
        folders = self.engine.settings.folders
        paths = []
        for record in entry["outputs"][node_id][key]:
            base = folders.named(record["type"])
            assert base is not None
            paths.append(base / record["subfolder"] / record["filename"])
        return paths


@asynccontextmanager
async def open_embedded(folder: Path, *flags: str) -> AsyncIterator[Peer]:
    """Serve an engine for at most half a minute."""
    engine = Engine(parse_command_line(["--port", "0", "--base-directory", str(folder), "--step-delay-s", "0", *flags]))
    stop = trio.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.work)
            urls = await nursery.start(serve_engine, engine, stop)
            async with httpx.AsyncClient(base_url=urls[0], timeout=20) as http:
                yield Peer(engine, urls[0], http, folder)
            nursery.cancel_scope.cancel("the test is over")
