"""What the tests of the HTTP contract share: graphs, pictures, and a look at the daemon's folders."""

import base64
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import httpx
import pyvips
import trio
from daemon_support import Daemon, running_daemon
from storage_support import NO_SETTINGS, Peer

Graph = dict[str, dict[str, Any]]
WITHIN_S = 20.0

ACCESS_KEY: Final = "AKIDOFTHEDAEMON"
SECRET_KEY: Final = "the-secret-key-of-the-daemon"
URL_SECRET: Final = "the-token-in-a-query"
URL_PASSWORD: Final = "the-password-in-a-url"
SECRETS: Final = (ACCESS_KEY, SECRET_KEY, URL_SECRET, URL_PASSWORD)
"""What no answer and no line of a daemon's log may hold."""
INPUT_TIMEOUT_S: Final = 3
MAX_INPUT_MB: Final = 1


@asynccontextmanager
async def open_client(daemon: Daemon) -> AsyncIterator[httpx.AsyncClient]:
    with trio.fail_after(WITHIN_S):
        async with daemon.client() as client:
            yield client


@contextmanager
def running_media_daemon(folder: Path, s3_server: Peer) -> Iterator[Daemon]:
    """A daemon that may fetch from 127.0.0.1, has an S3, and logs all it can. At its end, its log held no secret."""
    with running_daemon(folder, environ=media_environment(s3_server)) as daemon:
        yield daemon
    assert_no_secret(str(daemon.log))


def media_environment(s3_server: Peer, **more: str) -> dict[str, str]:
    """The environment of such a daemon; *more* adds to it and replaces."""
    peer = attrs.evolve(s3_server, access_key=ACCESS_KEY, secret_key=SECRET_KEY)
    return {
        **NO_SETTINGS,
        **peer.environment(AWS_REGION="us-east-1"),
        "URL_ALLOW": "127.0.0.1",
        "INPUT_TIMEOUT_S": str(INPUT_TIMEOUT_S),
        "MAX_INPUT_SIZE_MB": str(MAX_INPUT_MB),
        "LOG_LEVEL": "debug",
        **more,
    }


def assert_no_secret(text: str) -> None:
    assert not [secret for secret in SECRETS if secret in text]


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


def node(node_id: str, class_type: str, **inputs: Any) -> Graph:
    return {node_id: {"class_type": class_type, "inputs": inputs}}


def load_and_save(values: list[Any]) -> Graph:
    """Load each of *values* by a node of its own (``load-0`` ...), and save what came of it."""
    graph: Graph = {}
    for number, value in enumerate(values):
        graph |= loader(f"load-{number}", value)
        graph |= saver(f"save-{number}", f"load-{number}", prefix=f"p{number}")
    return graph


def images(response: httpx.Response) -> list[bytes]:
    """The files of a 200, decoded. No secret is in the answer, however it ended."""
    assert_no_secret(response.text)
    assert response.status_code == 200, response.text[:2000]
    return [base64.b64decode(image) for image in response.json()["images"]]


def faults(document: dict[str, Any]) -> dict[str, str]:
    """The faults of a problem, in their order: place to message."""
    return {fault["location"]: fault["message"] for fault in document["errors"]}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


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
        while _left_files(daemon):  # noqa: ASYNC110  # the cleaning task is told by nobody that we look
            await trio.sleep(0.01)


def _left_files(daemon: Daemon) -> list[str]:
    """The files of jobs. ``os.walk`` passes over folders that vanish while it looks, as ``rglob`` does not."""
    folders = (daemon.input_dir, daemon.output_dir)
    return [name for folder in folders for _, _, names in os.walk(folder) for name in names if name != ".lock"]
