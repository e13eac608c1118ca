"""What the tests of the HTTP contract share: graphs, pictures, and a look at the daemon's folders."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pyvips
import trio
from daemon_support import Daemon

Graph = dict[str, dict[str, Any]]
WITHIN_S = 20.0


@asynccontextmanager
async def open_client(daemon: Daemon) -> AsyncIterator[httpx.AsyncClient]:
    with trio.fail_after(WITHIN_S):
        async with daemon.client() as client:
            yield client


async def prompt(client: httpx.AsyncClient, graph: Graph, **fields: Any) -> httpx.Response:
    return await client.post("/prompt", json={"prompt": graph, **fields})


def graph_of(*nodes: Graph) -> Graph:
    """Join one-node graphs, in their order."""
    return {node_id: node for graph in nodes for node_id, node in graph.items()}


def blank(node_id: str, *, color: int = 0x0000FF, batch_size: int = 1, size_px: int = 8) -> Graph:
    inputs = {"width": size_px, "height": size_px, "batch_size": batch_size, "color": color}
    return {node_id: {"class_type": "EmptyImage", "inputs": inputs}}


def saver(node_id: str, source: str, *, prefix: Any = "x") -> Graph:
    return {node_id: {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": prefix}}}


def rest(node_id: str, source: str, seconds: float, title: str = "A rest") -> Graph:
    inputs = {"value": [source, 0], "seconds": seconds, "uninterruptible": False}
    return {node_id: {"class_type": "Sleep", "inputs": inputs, "_meta": {"title": title}}}


def loader(node_id: str, value: Any) -> Graph:
    return {node_id: {"class_type": "LoadImage", "inputs": {"image": value}}}


def png(*, colour: tuple[int, int, int] = (10, 20, 30), size_px: int = 8) -> bytes:
    image = (pyvips.Image.black(size_px, size_px, bands=3) + list(colour)).cast("uchar")
    data: bytes = image.copy(interpretation="srgb").pngsave_buffer()
    return data


def pixel(data: bytes) -> tuple[int, ...]:
    """The colour of the first pixel of an encoded picture."""
    return tuple(int(value) for value in pyvips.Image.new_from_buffer(data, "")(0, 0)[:3])


async def wait_folders_clean(daemon: Daemon) -> None:
    """Wait until no file of a job is left; the daemon's own lock file in INPUT_DIR may stay."""
    with trio.fail_after(WITHIN_S):
        while left := [path for path in daemon.job_files() if not path.endswith("/.lock")]:  # noqa: ASYNC110
            assert left
            await trio.sleep(0.01)  # the cleaning task is told by nobody that we look
