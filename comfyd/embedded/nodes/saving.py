"""The nodes that write pictures, with the prompt inside, and never over a file that is there."""

import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any, Final

from comfyd.embedded.files import SavePlace, place_output
from comfyd.embedded.nodes.pictures import SMALL_PNG, Images, vips
from comfyd.embedded.nodes.registry import (
    NodeContext,
    NodeResult,
    NodeType,
    boolean,
    choice,
    integer,
    link,
    number,
    text,
)

_METADATA: Final = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
_WEBP_EFFORT: Final = {"default": 4, "fastest": 0, "slowest": 6}
_AFTER_HEADER: Final = 33  # bytes of a PNG's signature and IHDR chunk


def save_image(ctx: NodeContext, *, images: Images, filename_prefix: str = "ComfyUI", **_hidden: Any) -> NodeResult:
    """Write PNG files with the prompt in a text chunk, numbered on from those that are there."""
    return _save_pngs(ctx, images, filename_prefix, ctx.library.folders.output, "output", compression=4)


def preview_image(ctx: NodeContext, *, images: Images, **_hidden: Any) -> NodeResult:
    """Write PNG files into the temp folder, under a name that no other preview has."""
    return _save_pngs(ctx, images, _preview_prefix(), ctx.library.folders.temp, "temp", compression=1)


def _preview_prefix() -> str:
    return "ComfyUI_temp_" + "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=5))  # noqa: S311 - not a secret


def _save_pngs(ctx: NodeContext, images: Images, prefix: str, base: Path, kind: str, *, compression: int) -> NodeResult:
    place = place_output(base, prefix, width_px=images.width_px, height_px=images.height_px)
    chunks = _text_chunks(ctx)
    records = []
    for index, picture in enumerate(images.pictures):
        ctx.raise_if_interrupted()
        png = picture.pngsave_buffer(compression=compression, keep="none")
        name = place.name(index, "png")
        with (place.folder / name).open("xb") as file:
            file.writelines((png[:_AFTER_HEADER], chunks, png[_AFTER_HEADER:]))
        records.append({"filename": name, "subfolder": place.subfolder, "type": kind})
    return NodeResult(ui={"images": records})


def _text_chunks(ctx: NodeContext) -> bytes:
    """The prompt, and whatever the caller's ``extra_pnginfo`` holds, as PNG tEXt chunks.

    libvips would compress its comments (zTXt), which ComfyUI's front end does not read.
    """
    if ctx.settings.disable_metadata:
        return b""
    comments = {"prompt": ctx.prompt, **(ctx.extra_data.get("extra_pnginfo") or {})}
    return b"".join(_text_chunk(key, json.dumps(value)) for key, value in comments.items())


def _text_chunk(key: str, ascii_text: str) -> bytes:
    body = b"tEXt" + key.encode("latin-1", "replace") + b"\0" + ascii_text.encode("ascii")
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def save_animated_webp(
    ctx: NodeContext,
    *,
    images: Images,
    filename_prefix: str,
    fps: float,
    lossless: bool,
    quality: int,
    method: str,
    **_hidden: Any,
) -> NodeResult:
    """Write all pictures as the frames of one WebP file."""
    place = place_output(
        ctx.library.folders.output, filename_prefix, width_px=images.width_px, height_px=images.height_px
    )
    pyvips = vips()
    frames = pyvips.Image.arrayjoin(list(images.pictures), across=1).copy()
    frames.set_type(pyvips.GValue.gint_type, "page-height", images.height_px)
    frames.set_type(pyvips.GValue.array_int_type, "delay", [int(1000.0 / fps)] * len(images))
    name = place.name(0, "webp")
    frames.webpsave(str(place.folder / name), lossless=lossless, Q=quality, effort=_WEBP_EFFORT[method])
    record = {"filename": name, "subfolder": place.subfolder, "type": "output"}
    return NodeResult(ui={"images": [record], "animated": [True]})


# What --cost none runs instead: the protocol's part of a save, and a constant file.


def _free_save(ctx: NodeContext, *, images: Images, filename_prefix: str = "ComfyUI", **_others: Any) -> NodeResult:
    return _save_constant(images, filename_prefix, ctx.library.folders.output, "output")


def _free_preview(ctx: NodeContext, *, images: Images, **_hidden: Any) -> NodeResult:
    return _save_constant(images, _preview_prefix(), ctx.library.folders.temp, "temp")


def _free_animation(ctx: NodeContext, *, images: Images, filename_prefix: str, **_others: Any) -> NodeResult:
    one = Images(width_px=images.width_px, height_px=images.height_px, count=1)
    saved = _save_constant(one, filename_prefix, ctx.library.folders.output, "output")
    return NodeResult(ui={**(saved.ui or {}), "animated": [True]})


def _save_constant(images: Images, prefix: str, base: Path, kind: str) -> NodeResult:
    """Write the constant PNG. The folder is listed only when number 1 is taken; unique prefixes never pay for it."""
    place = place_output(base, prefix, width_px=images.width_px, height_px=images.height_px, count=False)
    try:
        return _write_constants(images, place, kind)
    except FileExistsError:
        place = place_output(base, prefix, width_px=images.width_px, height_px=images.height_px)
        return _write_constants(images, place, kind)
    except FileNotFoundError:
        place.folder.mkdir(parents=True, exist_ok=True)
        return _write_constants(images, place, kind)


def _write_constants(images: Images, place: SavePlace, kind: str) -> NodeResult:
    records = []
    for index in range(images.count):
        name = place.name(index, "png")
        with open(f"{place.folder}/{name}", "xb", buffering=0) as file:
            file.write(SMALL_PNG)
        records.append({"filename": name, "subfolder": place.subfolder, "type": kind})
    return NodeResult(ui={"images": records})


NODES: Final = (
    NodeType(
        name="SaveImage",
        display_name="Save Image",
        category="image",
        description="Saves the input images to your ComfyUI output directory.",
        run=save_image,
        costless=_free_save,
        threaded=True,
        is_output=True,
        inputs=(
            link("images", "IMAGE", tooltip="The images to save."),
            text(
                "filename_prefix",
                "ComfyUI",
                tooltip="The start of the file name. %width%, %height%, %year%, %month%, %day%, %hour%, %minute% and "
                "%second% are filled in; a/b/c makes subfolders.",
            ),
        ),
        hidden=_METADATA,
    ),
    NodeType(
        name="PreviewImage",
        display_name="Preview Image",
        category="image",
        description="Saves the input images to your ComfyUI output directory.",
        run=preview_image,
        costless=_free_preview,
        threaded=True,
        is_output=True,
        inputs=(link("images", "IMAGE"),),
        hidden=_METADATA,
    ),
    NodeType(
        name="SaveAnimatedWEBP",
        display_name="SaveAnimatedWEBP",
        category="image/animation",
        run=save_animated_webp,
        costless=_free_animation,
        threaded=True,
        is_output=True,
        inputs=(
            link("images", "IMAGE"),
            text("filename_prefix", "ComfyUI"),
            number("fps", 6.0, min=0.01, max=1000.0, step=0.01),
            boolean("lossless", True),
            integer("quality", 80, min=0, max=100),
            choice("method", tuple(_WEBP_EFFORT)),
        ),
        hidden=_METADATA,
    ),
)
