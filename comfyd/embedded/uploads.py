"""Files that clients send: ``POST /upload/image`` and ``/upload/mask`` (server.py, ``image_upload``, 0.3.64)."""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

import attrs
import msgspec
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from comfyd.embedded.files import Folders, OutsideFolder, inside
from comfyd.embedded.nodes.pictures import as_srgb, vips

# A part is kept in memory up to this size, then on disk.
_SPOOL_BYTES: Final = 1024 * 1024
# Text fields are names and a short JSON; werkzeug refuses a form whose texts are larger.
_MAX_FIELDS_BYTES: Final = 256 * 1024


class BadUpload(Exception):
    """The form cannot be used; *status* is the HTTP status to answer with."""

    def __init__(self, status: int = 400) -> None:
        super().__init__(f"upload refused with {status}")
        self.status = status


@attrs.define(eq=False)
class Form:
    """A multipart form as it arrives: texts in memory, files spooled. Close it to drop the files."""

    fields: dict[str, str] = attrs.field(factory=dict)
    files: dict[str, tuple[str, IO[bytes]]] = attrs.field(factory=dict)
    _decoder: MultipartDecoder = attrs.field(init=False)
    _name: str = ""
    _target: IO[bytes] | bytearray | None = None

    @classmethod
    def begin(cls, content_type: str) -> "Form":
        """Begin to read a form.

        Raises:
            BadUpload: it is none.
        """
        kind, options = parse_options_header(content_type)
        boundary = options.get("boundary")
        if kind != "multipart/form-data" or not boundary:
            raise BadUpload
        form = cls()
        form._decoder = MultipartDecoder(boundary.encode(), max_form_memory_size=_MAX_FIELDS_BYTES, max_parts=64)
        return form

    def feed(self, data: bytes | None) -> None:
        """Take the next bytes of the body, None at its end.

        Raises:
            BadUpload: the form is malformed.
        """
        try:
            self._decoder.receive_data(data)
            while not isinstance(event := self._decoder.next_event(), (NeedData, Epilogue)):
                self._take(event)
        except ValueError as exc:
            raise BadUpload from exc

    def _take(self, event: Any) -> None:
        match event:
            case File(name=name, filename=filename):
                file: IO[bytes] = tempfile.SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115 - close() closes it
                self.files[name] = (filename, file)
                self._target = file
            case Field(name=name):
                self._name = name
                self._target = bytearray()
            case Data(data=data, more_data=more_data):
                if isinstance(self._target, bytearray):
                    self._target += data
                    if not more_data:
                        self.fields[self._name] = self._target.decode("utf-8", "replace")
                elif self._target is not None:
                    self._target.write(data)
            case _:
                pass  # the preamble carries nothing

    def close(self) -> None:
        """Drop the files."""
        for _, file in self.files.values():
            file.close()


def store_upload(form: Form, folders: Folders, *, mask: bool) -> Mapping[str, str]:
    """Put the uploaded file in its folder; blocking. A file that is there with other content keeps its name.

    Returns the name, subfolder and type under which it can be named.

    Raises:
        BadUpload: no file, an unknown type, or a path outside the folder.
    """
    upload = form.files.get("image")
    kind = form.fields.get("type", "input")
    base = folders.named(kind)
    if upload is None or base is None or not upload[0]:
        raise BadUpload
    filename, content = upload
    subfolder = form.fields.get("subfolder", "")
    try:
        path = inside(base, f"{subfolder}/{filename}" if subfolder else filename, kind)
    except OutsideFolder as exc:
        raise BadUpload from exc
    path.parent.mkdir(parents=True, exist_ok=True)
    if form.fields.get("overwrite") not in ("true", "1"):
        path, there = _free_name(path, content)
        if there:
            return {"name": path.name, "subfolder": subfolder, "type": kind}
    content.seek(0)
    if mask:
        _store_mask(form, folders, content, path)
    else:
        with path.open("wb") as target:
            shutil.copyfileobj(content, target, _SPOOL_BYTES)
    return {"name": path.name, "subfolder": subfolder, "type": kind}


def _free_name(path: Path, content: IO[bytes]) -> tuple[Path, bool]:
    """Return a name that is not taken, such as "a (1).png"; or one that holds this very content, and True."""
    candidate, number = path, 0
    while candidate.exists():
        if _digest_of(candidate) == _digest(content):
            return candidate, True
        number += 1
        candidate = path.with_name(f"{path.stem} ({number}){path.suffix}")
    return candidate, False


def _digest_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _digest(content: IO[bytes]) -> bytes:
    content.seek(0)
    digest = hashlib.sha256()
    while block := content.read(_SPOOL_BYTES):
        digest.update(block)
    return digest.digest()


def _store_mask(form: Form, folders: Folders, content: IO[bytes], path: Path) -> None:
    """Write the picture that ``original_ref`` names, with the alpha of the uploaded one."""
    try:
        reference = msgspec.json.decode(form.fields.get("original_ref", ""), type=dict[str, str])
        original = folders.locate(
            "/".join(part for part in (reference.get("subfolder"), reference["filename"]) if part),
            reference.get("type", "output"),
        )
    except (msgspec.DecodeError, KeyError, ValueError) as exc:
        raise BadUpload from exc
    except OutsideFolder as exc:
        raise BadUpload(403) from exc
    if not original.is_file():
        return  # as in ComfyUI, nothing is written and the answer is 200 all the same
    pyvips = vips()
    picture = as_srgb(pyvips.Image.new_from_file(str(original)))
    mask = pyvips.Image.new_from_buffer(content.read(), "")
    alpha = mask.extract_band(mask.bands - 1) if mask.hasalpha() else pyvips.Image.black(mask.width, mask.height) + 255
    picture.bandjoin(alpha.cast("uchar")).pngsave(str(path), compression=4)
