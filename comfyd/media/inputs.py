"""Media that a job brings: from what the caller wrote into a loader node to a file that ComfyUI finds."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import unquote, unquote_to_bytes

import attrs

from comfyd.config import MediaConfig
from comfyd.engine import MediaInput, NodeClasses
from comfyd.errors import Failure, FailureKind, Fault
from comfyd.media.base64text import (
    NotBase64,
    decode_pieces,
    decoded_size,
    looks_like_base64,
    media_type_of_text,
)
from comfyd.media.files import InputStore, confined
from comfyd.media.images import CHECKED, UnreadablePicture, picture_size
from comfyd.media.sniff import HEAD_BYTES, MediaType, sniff
from comfyd.wire import quoted

_MIB: Final = 1 << 20
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DATA_URL: Final = re.compile(r"data:[^,;]*(?:;[^,;]+)*?(?P<base64>;base64)?,", re.IGNORECASE)
# ComfyUI reads "name [folder]" as a file of that folder (0.3.64, folder_paths.py, annotated_filepath).
_ANNOTATED: Final = re.compile(r"^(?P<name>.*?) ?\[(?P<folder>input|output|temp)\]$", re.DOTALL)


@attrs.frozen(kw_only=True)
class Candidate:
    """A value in a loader node's media input, as the caller wrote it."""

    node_id: str
    input_name: str
    value: str
    media: MediaInput

    @property
    def location(self) -> str:
        """Its place in the request."""
        return f"prompt.{self.node_id}.inputs.{self.input_name}"


class InputRefused(Exception):
    """An input that cannot be used. The text is for the caller."""


def candidates(graph: Mapping[str, Any], known: NodeClasses) -> Iterator[Candidate]:
    """Find the media inputs of *graph* that have to be looked at: texts (not links) that ComfyUI does not list."""
    for node_id, node in graph.items():
        for name, media in known.media.get(node["class_type"], {}).items():
            value = node["inputs"].get(name)
            if isinstance(value, str) and value not in media.listed:
                yield Candidate(node_id=node_id, input_name=name, value=value, media=media)


def resolve_inputs(
    found: tuple[Candidate, ...], store: InputStore, folder_key: str, limits: MediaConfig
) -> tuple[dict[tuple[str, str], str], Path | None]:
    """Give each candidate the value by which ComfyUI finds it. Blocks: decodes, and writes to disk.

    Returns the new values by ``(node id, input name)`` and the job's folder, if one was needed; the caller removes it.

    Raises:
        InvalidInputs: some cannot be used; nothing is left on disk.
    """
    values: dict[tuple[str, str], str] = {}
    faults: list[Fault] = []
    folder: Path | None = None
    written: dict[str, str] = {}  # the same text in several nodes is one file
    for candidate in found:
        try:
            if not _is_content(candidate.value):
                _check_name(candidate.value, store.input_dir)
                continue
            if candidate.value not in written:
                if folder is None:
                    folder = store.new_folder(folder_key)
                path = _write(candidate.value, folder / f"{len(written) + 1:03d}", limits)
                written[candidate.value] = store.name_for_comfyui(path)
            values[candidate.node_id, candidate.input_name] = written[candidate.value]
        except InputRefused as exc:
            faults.append(Fault(location=candidate.location, message=str(exc)))
    if faults:
        raise InvalidInputs(tuple(faults), folder)
    return values, folder


class InvalidInputs(Exception):
    """One or more inputs cannot be used. *folder* is what was written before that was known."""

    def __init__(self, faults: tuple[Fault, ...], folder: Path | None) -> None:
        super().__init__(f"{len(faults)} inputs cannot be used")
        self.failure = Failure(
            kind=FailureKind.INVALID_INPUT,
            detail=faults[0].message if len(faults) == 1 else f"{len(faults)} inputs cannot be used",
            faults=faults,
        )
        self.folder = folder


def _is_content(value: str) -> bool:
    return value[:5].lower() == "data:" or media_type_of_text(value) is not None


def _check_name(value: str, input_dir: Path) -> None:
    """Accept *value* as the name of a file in INPUT_DIR, or say why not."""
    if not value.strip():
        raise InputRefused("is empty; the name of an input file, base64 or a data: URL is expected")
    if scheme := _SCHEME.match(value):
        raise InputRefused(
            f"{scheme[1]}:// is not accepted here; send base64, a data: URL or the name of an input file"
        )
    name = value
    if annotated := _ANNOTATED.match(value):
        if annotated["folder"] != "input":
            raise InputRefused("files of other folders than INPUT_DIR are not accepted")
        name = annotated["name"]
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise InputRefused(f"must lie in INPUT_DIR; absolute paths and .. are not accepted, got {quoted(value)}")
    if looks_like_base64(value):
        raise InputRefused("is base64 of something that is no picture, video or sound that comfyd knows")
    inside = confined(input_dir, name)
    try:
        exists = inside is not None and inside.is_file()
    except OSError:  # a name that no file system takes
        exists = False
    if not exists:
        raise InputRefused(f"there is no input file {quoted(value)}, and it is no base64 or data: URL of media")


def _write(value: str, stem: Path, limits: MediaConfig) -> Path:
    try:
        if value[:5].lower() != "data:":
            return _write_pieces(decode_pieces(value), decoded_size(value), stem, limits)
        header = _DATA_URL.match(value)
        if header is None:
            raise InputRefused("is not a data: URL (data:<type>;base64,<data>)")
        body = value[header.end() :]
        if header["base64"]:
            if "%" in body:  # a URL may write any character that way, and some write "+", "/" and "=" so
                body = unquote(body)
            return _write_pieces(decode_pieces(body), decoded_size(body), stem, limits)
        raw = unquote_to_bytes(body)
        return _write_pieces(iter((raw,)), len(raw), stem, limits)
    except NotBase64 as exc:
        raise InputRefused(f"is not base64: {exc}") from exc


def _write_pieces(pieces: Iterator[bytes], size_bytes: int, stem: Path, limits: MediaConfig) -> Path:
    """Write a file whose type its first bytes tell; removed again if it turns out to be no good."""
    if size_bytes > limits.max_input_bytes:
        raise InputRefused(f"is larger than {limits.max_input_bytes // _MIB} MB (MAX_INPUT_SIZE_MB)")
    first = next(pieces, b"")
    media_type = sniff(first[:HEAD_BYTES])
    if media_type is None:
        raise InputRefused("holds no picture, video or sound that comfyd knows" if first else "is empty")
    path = stem.with_suffix(media_type.ending)
    try:
        with path.open("xb") as file:
            file.write(first)
            for piece in pieces:
                file.write(piece)
        _check_picture(path, media_type, limits)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _check_picture(path: Path, media_type: MediaType, limits: MediaConfig) -> None:
    if media_type.name not in CHECKED:
        return
    try:
        width, height = picture_size(path)
    except UnreadablePicture as exc:
        raise InputRefused(str(exc)) from exc
    if width * height > limits.max_input_megapixels * 1_000_000:
        raise InputRefused(
            f"has {width} x {height} pixels, more than {limits.max_input_megapixels} million (MAX_INPUT_MEGAPIXELS)"
        )
