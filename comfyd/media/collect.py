"""From what nodes reported to files that can be delivered, in an order that never changes."""

import mimetypes
import os
import stat
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from comfyd.media.files import confined_to

_MORE_TYPES: Final = {
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".flac": "audio/flac",
    ".opus": "audio/ogg",
    ".mkv": "video/x-matroska",
    ".glb": "model/gltf-binary",
    ".gltf": "model/gltf+json",
    ".safetensors": "application/octet-stream",
    ".latent": "application/octet-stream",
    ".exr": "image/x-exr",
}


@attrs.frozen(kw_only=True)
class Record:
    """A file that a node reported, and where it has to be. *path* is None if that is outside of OUTPUT_DIR."""

    node_id: str
    filename: str
    path: Path | None


@attrs.frozen(kw_only=True)
class OutputFile:
    """A file that the graph made and that is there. *path* never leaves the daemon."""

    path: Path
    filename: str
    node_id: str
    media_type: str
    size_bytes: int
    converted: bool | None = None
    """Whether it was converted; None where no conversion was asked for."""
    object_url: str | None = None
    """The ``s3://`` URL of the object that it was stored as."""
    url: str | None = None
    """The URL by which to get it: a presigned one if that was asked for, else the same."""
    base64: bytes | None = attrs.field(default=None, repr=False)
    """Its content as base64, where it is small and was read along: a thread hop less for the answer."""


@attrs.frozen(kw_only=True)
class Collection:
    """What came of a node's reports: *found* in delivery order, *missing* and *refused* as ``(node id, name)``."""

    found: tuple[OutputFile, ...]
    missing: tuple[tuple[str, str], ...]
    refused: tuple[tuple[str, str], ...]


def collect(
    graph: Mapping[str, Any], outputs: Mapping[str, Mapping[str, Any]], output_dir: Path, *, read_along_bytes: int = 0
) -> Collection:
    """Find every reported file. Blocks: it looks at the disk.

    If all of them together have at most *read_along_bytes*, they are read at once.

    Order: the graph's nodes as the caller wrote them, then each node's own order. A file that is reported twice is
    delivered once, at its first place.
    """
    found: dict[Path, OutputFile] = {}
    missing: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    for record in records(graph, outputs, output_dir):
        if record.path is None:
            refused.append((record.node_id, record.filename))
            continue
        size_bytes = _size_bytes(record.path)
        if size_bytes is None:
            missing.append((record.node_id, record.filename))
        elif record.path not in found:
            found[record.path] = OutputFile(
                node_id=record.node_id,
                filename=record.filename,
                path=record.path,
                media_type=media_type(record.filename),
                size_bytes=size_bytes,
            )
    files = tuple(found.values())
    if not missing and not refused and sum(file.size_bytes for file in files) <= read_along_bytes:
        files = tuple(_read_along(file) for file in files)
    return Collection(found=files, missing=tuple(missing), refused=tuple(refused))


def _size_bytes(path: Path) -> int | None:
    """The size of the file at *path*; None if there is none, or something else."""
    try:
        found = os.stat(path)  # each output of each job comes by here, and this takes half the time
    except (OSError, ValueError):  # the latter: a name that no file system could have
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _read_along(file: OutputFile) -> OutputFile:
    try:
        data = file.path.read_bytes()
    except OSError:
        return file  # whoever delivers it finds out, and says so
    return attrs.evolve(file, size_bytes=len(data), base64=b64encode(data))


def records(graph: Mapping[str, Any], outputs: Mapping[str, Mapping[str, Any]], output_dir: Path) -> Iterator[Record]:
    """Walk over the file-like records of *outputs*: anything with a ``filename``, under any key of any node.

    Custom nodes use keys of their own (``gifs``, ``result``, ...). Files of type ``temp`` are previews and ``input``
    files are not made by the job; both are passed over.
    """
    real_root = os.path.realpath(output_dir)
    order = {node_id: place for place, node_id in enumerate(graph)}
    for node_id in sorted(outputs, key=lambda node: (order.get(node, len(order)), node)):
        for items in outputs[node_id].values():
            for item in items if isinstance(items, list) else ():
                if not isinstance(item, dict) or item.get("type", "output") != "output":
                    continue
                filename, subfolder = item.get("filename"), item.get("subfolder") or ""
                if isinstance(filename, str) and filename and isinstance(subfolder, str):
                    path = confined_to(real_root, subfolder, filename)
                    name = Path(filename).name if "/" in filename else filename
                    yield Record(node_id=node_id, filename=name, path=path)


def media_type(filename: str) -> str:
    """The media type that *filename*'s ending stands for; ``application/octet-stream`` if it is not known."""
    ending = os.path.splitext(filename)[1].lower()  # a fifth of the time
    return _MORE_TYPES.get(ending) or mimetypes.types_map.get(ending) or "application/octet-stream"
