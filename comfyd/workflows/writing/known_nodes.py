"""Where a writer of workflows learns what node classes take: an engine that runs, its saved answer, or ours."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from comfyd.errors import ComfydError, InvalidValue
from comfyd.wire import decode_json, encode_json

ASK_TIMEOUT_S: Final = 30.0
"""As of the daemon: 0.7 s were measured with 20,000 model files, more on network disks."""
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""ComfyUI alone answers some 300 kB; the rest is for custom nodes and for long lists of models."""


class NoNodeClasses(ComfydError):
    """There is no /object_info where it should be; the text says why."""


def ask_engine(url: str) -> dict[str, Any]:
    """``GET /object_info`` of the ComfyUI at *url*. Blocks.

    Raises:
        NoNodeClasses: no such answer.
    """
    address = f"{url.rstrip('/').removesuffix('/object_info')}/object_info"
    body = bytearray()
    try:
        with httpx.stream("GET", address, timeout=ASK_TIMEOUT_S, follow_redirects=True) as response:
            if response.status_code != 200:
                hint = "; is it comfyd's own address? Give ComfyUI's" if response.status_code in (401, 404) else ""
                raise NoNodeClasses(f"{address} answered {response.status_code}{hint}")
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise NoNodeClasses(f"{address} answered more than {MAX_ANSWER_BYTES} bytes")
    except httpx.InvalidURL as exc:
        raise NoNodeClasses(f"{address} is no URL: {exc}") from exc
    except httpx.HTTPError as exc:
        raise NoNodeClasses(f"{address} does not answer: {str(exc) or type(exc).__name__}") from exc
    return _understood(bytes(body), address)


def read_classes(path: Path) -> dict[str, Any]:
    """Read an answer of ``GET /object_info`` that was saved to a file.

    Raises:
        NoNodeClasses: it is no such file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_ANSWER_BYTES + 1)
    except OSError as exc:
        raise NoNodeClasses(f"{path} cannot be read: {exc.strerror}") from exc
    if len(data) > MAX_ANSWER_BYTES:
        raise NoNodeClasses(f"{path} has more than {MAX_ANSWER_BYTES} bytes")
    return _understood(data.removeprefix(b"\xef\xbb\xbf"), str(path))


def _understood(data: bytes, source: str) -> dict[str, Any]:
    try:
        answer = decode_json(data)
    except InvalidValue as exc:
        raise NoNodeClasses(f"{source}: {exc}") from None
    if not isinstance(answer, dict) or not any(isinstance(info, dict) and "input" in info for info in answer.values()):
        raise NoNodeClasses(f"{source} is no answer of GET /object_info: it has no node class")
    return answer


def built_in_classes() -> dict[str, Any]:
    """Return what the embedded engine answers: ComfyUI's commonest classes with their true bounds, pretend models."""
    from comfyd.embedded.files import Folders
    from comfyd.embedded.models import Models
    from comfyd.embedded.nodes import NODE_TYPES
    from comfyd.embedded.nodes.registry import Library

    with tempfile.TemporaryDirectory(prefix="comfyd-workflow-") as name:  # no input files are listed
        folder = Path(name)
        library = Library(folders=Folders(input=folder, output=folder, temp=folder, user=folder), models=Models())
        info = {class_type: node_type.info(library) for class_type, node_type in NODE_TYPES.items()}
    answer: dict[str, Any] = decode_json(encode_json(info))  # lists in the place of tuples, as over HTTP
    return answer


def unknown_classes(graph: Mapping[str, Any], object_info: Mapping[str, Any]) -> list[str]:
    """List the graph's node classes of which nothing is known; the types of their inputs are those of the values."""
    return sorted({node["class_type"] for node in graph.values()} - object_info.keys())
