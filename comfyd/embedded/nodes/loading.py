"""Loaders for trying and testing how media come to a node: by folder, by path, as a sound or film, by another name.

The names and inputs are those of ComfyUI (0.3.64) and of ComfyUI-VideoHelperSuite (load_images_nodes.py,
load_video_nodes.py). Folders and pictures are really read. Sounds and films are passed through as the files that they
are, because this engine has no decoder for them.
"""

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Final

import attrs

from comfyd.embedded.files import OutsideFolder, inside, place_output
from comfyd.embedded.nodes.image import (
    decode,
    file_exists,
    file_fingerprint,
    fingerprint_of,
    free_load,
    input_files,
    input_pictures,
    load_image,
    pictures_in,
    with_masks,
)
from comfyd.embedded.nodes.pictures import Images, resized
from comfyd.embedded.nodes.registry import (
    Choices,
    Input,
    Library,
    NodeContext,
    NodeResult,
    NodeType,
    choice,
    combo,
    integer,
    link,
    text,
)

_BIGMAX: Final = 2**53 - 1  # VideoHelperSuite, utils.py
_TRYING: Final = "For trying and testing."
_FROM_VHS: Final = f"{_TRYING} Reads pictures as the node of this name in ComfyUI-VideoHelperSuite does."
_COPIES: Final = f"{_TRYING} Passes the file on as it is; nothing is decoded."
_CATEGORY_VHS: Final = "Video Helper Suite"


@attrs.frozen(kw_only=True)
class MediaFile:
    """An AUDIO or VIDEO as these nodes pass it on: the file itself."""

    path: Path


def text_node(ctx: NodeContext, *, image: str) -> NodeResult:
    """Pass on a text that happens to be called like a picture."""
    del ctx
    return NodeResult(outputs=(image,))


def load_picture(ctx: NodeContext, *, picture: str) -> NodeResult:
    """Do what LoadImage does."""
    return load_image(ctx, image=picture)


def load_image_path(ctx: NodeContext, *, image: str) -> NodeResult:
    """Decode the file at a path."""
    return with_masks(decode(_at_path(ctx.library, image), os.path.basename(image)))


def load_images(
    ctx: NodeContext, *, directory: str, image_load_cap: int = 0, skip_first_images: int = 0, select_every_nth: int = 1
) -> NodeResult:
    """Decode the pictures in a folder of the input folder, by the order of their names, as one batch."""
    folder = ctx.library.folders.locate(directory)
    return _load_folder(ctx, folder, image_load_cap, skip_first_images, select_every_nth)


def load_images_path(
    ctx: NodeContext, *, directory: str, image_load_cap: int = 0, skip_first_images: int = 0, select_every_nth: int = 1
) -> NodeResult:
    """Do what :func:`load_images` does, with the folder at a path."""
    folder = _at_path(ctx.library, directory)
    return _load_folder(ctx, folder, image_load_cap, skip_first_images, select_every_nth)


def _load_folder(ctx: NodeContext, folder: Path, cap: int, skip: int, every: int) -> NodeResult:
    names = _selected(folder, cap, skip, every)
    frames = []
    for name in names:
        ctx.raise_if_interrupted()
        frames.append(decode(folder / name, name)[0])
    # Those of another size than most are made to fit, as in VideoHelperSuite.
    ((width, height), _), *_ = Counter((frame.width, frame.height) for frame in frames).most_common()
    fitted = [
        frame if (frame.width, frame.height) == (width, height) else resized(frame, width, height, "lanczos", "center")
        for frame in frames
    ]
    return NodeResult(outputs=(*with_masks(fitted).outputs, len(fitted)))


def _selected(folder: Path, cap: int, skip: int, every: int) -> list[str]:
    names = pictures_in(folder)[skip::every]
    if not names:
        raise FileNotFoundError(f"No files in directory '{folder.name}'.")
    return names[:cap] if cap else names


def _at_path(library: Library, path: str) -> Path:
    """Find what lies at *path*, which is looked for from the process's working folder, as VideoHelperSuite does.

    Raises:
        OutsideFolder: it is not below the input folder, which is where this engine stops.
    """
    return inside(library.folders.input, os.path.abspath(path), "input")


def _folder_exists(library: Library, value: Any) -> str | None:
    try:
        return _no_pictures(library.folders.locate(value), value)
    except OutsideFolder:
        return f"Directory '{value}' cannot be found."


def _folder_exists_at_path(library: Library, value: Any) -> str | None:
    try:
        return _no_pictures(_at_path(library, value), value)
    except OutsideFolder:
        return f"Directory '{value}' cannot be found."


def _no_pictures(folder: Path, value: str) -> str | None:
    if not folder.is_dir():
        return f"Directory '{value}' cannot be found."
    return None if any(folder.iterdir()) else f"No files in directory '{value}'."


def _path_exists(library: Library, value: Any) -> str | None:
    wrong = f"Invalid file path: {value}"
    try:
        return None if _at_path(library, value).is_file() else wrong
    except OutsideFolder:
        return wrong


def _folder_fingerprint(library: Library, value: Any, cheap: bool) -> str:
    return _fingerprints(library.folders.locate(value), cheap)


def _folder_fingerprint_at_path(library: Library, value: Any, cheap: bool) -> str:
    return _fingerprints(_at_path(library, value), cheap)


def _path_fingerprint(library: Library, value: Any, cheap: bool) -> str:
    return fingerprint_of(_at_path(library, value), cheap)


def _fingerprints(folder: Path, cheap: bool) -> str:
    return "|".join(f"{name} {fingerprint_of(folder / name, cheap)}" for name in pictures_in(folder))


def _input_folders(library: Library) -> list[str]:
    return sorted(entry.name for entry in library.folders.input.iterdir() if entry.is_dir())


def load_file(ctx: NodeContext, **named: str) -> NodeResult:
    """Pass the file that the only input names on as it is."""
    (name,) = named.values()
    return NodeResult(outputs=(MediaFile(path=ctx.library.folders.locate(name)),))


def save_audio(ctx: NodeContext, *, audio: MediaFile, filename_prefix: str = "audio/ComfyUI") -> NodeResult:
    """Copy a sound; it is recorded under ``audio``, as by ComfyUI."""
    return NodeResult(ui={"audio": [_copy(ctx, audio, filename_prefix)]})


def save_video(
    ctx: NodeContext, *, video: MediaFile, filename_prefix: str = "video/ComfyUI", **_coding: str
) -> NodeResult:
    """Copy a film; it is recorded under ``images``, as by ComfyUI."""
    return NodeResult(ui={"images": [_copy(ctx, video, filename_prefix)], "animated": [True]})


def _copy(ctx: NodeContext, file: MediaFile, prefix: str) -> dict[str, str]:
    place = place_output(ctx.library.folders.output, prefix)
    name = place.name(0, file.path.suffix[1:] or "bin")
    with file.path.open("rb") as source, (place.folder / name).open("xb") as target:
        shutil.copyfileobj(source, target)
    return {"filename": name, "subfolder": place.subfolder, "type": "output"}


# What --cost none runs instead: a look at the folder, and pictures without pixels.


def _free_picture(ctx: NodeContext, *, picture: str) -> NodeResult:
    return free_load(ctx, image=picture)


def _free_path(ctx: NodeContext, *, image: str) -> NodeResult:
    return _free_batch([str(_at_path(ctx.library, image))])


def _free_folder(
    ctx: NodeContext, *, directory: str, image_load_cap: int = 0, skip_first_images: int = 0, select_every_nth: int = 1
) -> NodeResult:
    folder = ctx.library.folders.locate(directory)
    return _free_batch(_selected(folder, image_load_cap, skip_first_images, select_every_nth), count=True)


def _free_folder_at_path(
    ctx: NodeContext, *, directory: str, image_load_cap: int = 0, skip_first_images: int = 0, select_every_nth: int = 1
) -> NodeResult:
    folder = _at_path(ctx.library, directory)
    return _free_batch(_selected(folder, image_load_cap, skip_first_images, select_every_nth), count=True)


def _free_batch(names: list[str], *, count: bool = False) -> NodeResult:
    images = Images(width_px=8, height_px=8, count=len(names))
    return NodeResult(outputs=(images, images, *([len(names)] if count else [])))


def _upload(name: str, choices: Choices, flag: str) -> Input:
    return Input(name=name, type="COMBO", choices=choices, listed=True, options={flag: True}, check=file_exists)


_WHICH_PICTURES: Final = tuple(
    attrs.evolve(each, required=False)
    for each in (
        integer("image_load_cap", 0, min=0, max=_BIGMAX, step=1),
        integer("skip_first_images", 0, min=0, max=_BIGMAX, step=1),
        integer("select_every_nth", 1, min=1, max=_BIGMAX, step=1),
    )
)

NODES: Final = (
    NodeType(
        name="VHS_LoadImages",
        display_name="Load Images (Upload)",
        category=_CATEGORY_VHS,
        description=_FROM_VHS,
        run=load_images,
        costless=_free_folder,
        threaded=True,
        inputs=(attrs.evolve(choice("directory", _input_folders), check=_folder_exists), *_WHICH_PICTURES),
        outputs=("IMAGE", "MASK", "INT"),
        output_names=("IMAGE", "MASK", "frame_count"),
        fingerprint=("directory", _folder_fingerprint),
    ),
    NodeType(
        name="VHS_LoadImagesPath",
        display_name="Load Images (Path)",
        category=_CATEGORY_VHS,
        description=_FROM_VHS,
        run=load_images_path,
        costless=_free_folder_at_path,
        threaded=True,
        inputs=(
            attrs.evolve(text("directory", placeholder="X://path/to/images"), check=_folder_exists_at_path),
            *_WHICH_PICTURES,
        ),
        outputs=("IMAGE", "MASK", "INT"),
        output_names=("IMAGE", "MASK", "frame_count"),
        fingerprint=("directory", _folder_fingerprint_at_path),
    ),
    NodeType(
        name="VHS_LoadImagePath",
        display_name="Load Image (Path)",
        category=_CATEGORY_VHS,
        description=_FROM_VHS,
        run=load_image_path,
        costless=_free_path,
        threaded=True,
        inputs=(attrs.evolve(text("image", placeholder="X://insert/path/here.png"), check=_path_exists),),
        outputs=("IMAGE", "MASK"),
        fingerprint=("image", _path_fingerprint),
    ),
    NodeType(
        name="LoadAudio",
        display_name="Load Audio",
        category="audio",
        description=_COPIES,
        run=load_file,
        inputs=(_upload("audio", input_files, "audio_upload"),),
        outputs=("AUDIO",),
        fingerprint=("audio", file_fingerprint),
        threaded=True,
    ),
    NodeType(
        name="SaveAudio",
        display_name="Save Audio",
        category="audio",
        description=_COPIES,
        run=save_audio,
        threaded=True,
        is_output=True,
        inputs=(link("audio", "AUDIO"), text("filename_prefix", "audio/ComfyUI")),
    ),
    NodeType(
        name="LoadVideo",
        display_name="Load Video",
        category="image/video",
        description=_COPIES,
        run=load_file,
        inputs=(_upload("file", input_files, "video_upload"),),
        outputs=("VIDEO",),
        fingerprint=("file", file_fingerprint),
        threaded=True,
    ),
    NodeType(
        name="SaveVideo",
        display_name="Save Video",
        category="image/video",
        description=_COPIES,
        run=save_video,
        threaded=True,
        is_output=True,
        inputs=(
            link("video", "VIDEO"),
            text("filename_prefix", "video/ComfyUI"),
            combo("format", ("auto", "mp4"), default="auto"),
            combo("codec", ("auto", "h264"), default="auto"),
        ),
    ),
    NodeType(
        name="TextNode",
        display_name="Text Called Image",
        category="testing",
        description=f"{_TRYING} Has a text that is called like a picture, as some custom nodes have.",
        run=text_node,
        inputs=(text("image", multiline=True),),
        outputs=("STRING",),
    ),
    NodeType(
        name="CustomLoader",
        display_name="Custom Loader",
        category="testing",
        description=f"{_TRYING} Loads a picture by an input of another name, with the flag that says what it is.",
        run=load_picture,
        costless=_free_picture,
        threaded=True,
        inputs=(_upload("picture", input_pictures, "image_upload"),),
        outputs=("IMAGE", "MASK"),
        fingerprint=("picture", file_fingerprint),
    ),
)
