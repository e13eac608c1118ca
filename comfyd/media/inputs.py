"""Media that a job brings: from what the caller wrote into a loader node to a file that ComfyUI finds."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import unquote, unquote_to_bytes

import attrs

from comfyd.config import MediaConfig
from comfyd.engine import MediaInput, MediaKind, NodeClasses, is_link
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
_REMOTE: Final = frozenset({"http", "https", "s3"})
_TELLING_NAMES: Final = {
    "image": MediaKind.IMAGE,
    "mask": MediaKind.IMAGE,
    "video": MediaKind.VIDEO,
    "audio": MediaKind.AUDIO,
}
_DATA_URL: Final = re.compile(r"data:[^,;]*(?:;[^,;]+)*?(?P<base64>;base64)?,", re.IGNORECASE)
_MEDIA_DATA_URL: Final = re.compile(r"data:(?:image|video|audio)/[^,;]+[;,]", re.IGNORECASE)
# ComfyUI reads "name [folder]" as a file of that folder (0.3.64, folder_paths.py, annotated_filepath).
_ANNOTATED: Final = re.compile(r"^(?P<name>.*?) ?\[(?P<folder>input|output|temp)\]$", re.DOTALL)


@attrs.frozen(kw_only=True)
class Candidate:
    """A value in a loader node's media input, as the caller wrote it."""

    node_id: str
    input_name: str
    value: str | tuple[str, ...]
    """A tuple where a folder is to be made of several."""
    media: MediaInput

    @property
    def location(self) -> str:
        """Its place in the request."""
        return f"prompt.{self.node_id}.inputs.{self.input_name}"


class InputRefused(Exception):
    """An input that cannot be used. The text is for the caller."""


def candidates(graph: Mapping[str, Any], known: NodeClasses) -> Iterator[Candidate]:
    """Find the media inputs of *graph* that have to be looked at: texts that ComfyUI does not list, lists for folders.

    Links are left alone. An input of a class that does not say what it takes is looked at only if it is called like
    media and plainly is a URL or media itself: a text that happens to be called ``image`` stays a text.
    """
    for node_id, node in graph.items():
        media_inputs = known.media.get(node["class_type"], {})
        for name, value in node["inputs"].items():
            media = media_inputs.get(name)
            if isinstance(value, str):
                if media is None and name in _TELLING_NAMES and _is_plainly_media(value):
                    media = MediaInput(kind=_TELLING_NAMES[name])
                if media is not None and media.is_folder and (is_remote(value) or is_content(value)):
                    yield Candidate(node_id=node_id, input_name=name, value=(value,), media=media)
                elif media is not None and value not in media.listed:
                    yield Candidate(node_id=node_id, input_name=name, value=value, media=media)
            elif media is not None and media.is_folder and isinstance(value, list) and not is_link(value):
                yield Candidate(node_id=node_id, input_name=name, value=tuple(value), media=media)


def resolve_inputs(
    found: tuple[Candidate, ...], store: InputStore, folder_key: str, limits: MediaConfig
) -> tuple[dict[tuple[str, str], str], Path | None]:
    """Give each candidate that needs no network, and is one text, the value by which ComfyUI finds it. Blocks.

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
            value = str(candidate.value)
            if not is_content(value):
                check_name(value, store.input_dir, is_folder=candidate.media.is_folder)
                continue
            if value not in written:
                if folder is None:
                    folder = store.new_folder(folder_key)
                path = write_content(value, folder / f"{len(written) + 1:03d}", limits)
                written[value] = store.name_for_comfyui(path)
            values[candidate.node_id, candidate.input_name] = written[value]
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


def _is_plainly_media(value: str) -> bool:
    """Whether *value* is a URL or media whatever its input is for; a text may begin with ``data:``."""
    return is_remote(value) or _MEDIA_DATA_URL.match(value) is not None or media_type_of_text(value) is not None


def is_content(value: str) -> bool:
    """Whether *value* is media itself: a ``data:`` URL, or base64 of a type that we know."""
    return value[:5].lower() == "data:" or media_type_of_text(value) is not None


def is_remote(value: str) -> bool:
    """Whether *value* says where media are to be fetched from."""
    scheme = _SCHEME.match(value)
    return scheme is not None and scheme[1].lower() in _REMOTE


def check_name(value: str, input_dir: Path, *, is_folder: bool = False) -> None:
    """Accept *value* as the name of a file (or folder) in INPUT_DIR.

    Raises:
        InputRefused: it is none.
    """
    if not value.strip():
        raise InputRefused("is empty; the name of an input file, base64 or a data: URL is expected")
    if scheme := _SCHEME.match(value):
        raise InputRefused(f"{scheme[1]}:// is not accepted; http, https, s3 and data: URLs are")
    if (annotated := _ANNOTATED.match(value)) and annotated["folder"] != "input":
        raise InputRefused("files of other folders than INPUT_DIR are not accepted")
    name = plain_name(value)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise InputRefused(f"must lie in INPUT_DIR; absolute paths and .. are not accepted, got {quoted(value)}")
    if looks_like_base64(value):
        raise InputRefused("is base64 of something that is no picture, video or sound that comfyd knows")
    inside = confined(input_dir, name)
    try:
        exists = inside is not None and (inside.is_dir() if is_folder else inside.is_file())
    except OSError:  # a name that no file system takes
        exists = False
    if not exists:
        what = "folder" if is_folder else "file"
        raise InputRefused(f"there is no input {what} {quoted(value)}, and it is no URL or base64 of media")


def plain_name(value: str) -> str:
    """Give the name in *value*, which may have ComfyUI's annotation behind it: ``a.png [input]`` is ``a.png``."""
    annotated = _ANNOTATED.match(value)
    return value if annotated is None else annotated["name"]


def write_content(value: str, stem: Path, limits: MediaConfig) -> Path:
    """Write what *value* holds to a file named *stem*, its ending told by the content. Blocks.

    Raises:
        InputRefused: it is no media that we know, damaged, or too large; nothing is left on disk.
    """
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
        check_picture(path, media_type, limits)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def check_picture(path: Path, media_type: MediaType, limits: MediaConfig) -> None:
    """Look at a picture's header before anybody decodes it. Blocks.

    Raises:
        InputRefused: it is damaged or has too many pixels.
    """
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
