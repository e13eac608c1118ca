"""The image nodes: ComfyUI's names, inputs and bounds; pixels by libvips."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from comfyd.embedded.files import OutsideFolder
from comfyd.embedded.nodes.pictures import Images, as_srgb, batch, resized, to_uchar, vips
from comfyd.embedded.nodes.registry import (
    MAX_RESOLUTION_PX,
    Input,
    Library,
    NodeContext,
    NodeResult,
    NodeType,
    choice,
    combo,
    integer,
    link,
    number,
)

_UPSCALE_METHODS: Final = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")
_CROP_METHODS: Final = ("disabled", "center")
_BLEND_MODES: Final = ("normal", "multiply", "screen", "overlay", "soft_light", "difference")
_CHANNELS: Final = ("alpha", "red", "green", "blue")
_PICTURE_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})

# A decompression bomb would take the engine's memory before the first pixel is looked at; ComfyUI (Pillow) refuses
# at about 179 megapixels too.
_MAX_LOAD_PX: Final = 178_956_970


def load_image(ctx: NodeContext, *, image: str) -> NodeResult:
    """Decode a file, all frames of it, and its alpha as a mask (opaque is 0; without alpha 64 x 64 of 0)."""
    return with_masks(decode(ctx.library.folders.locate(image), image))


def with_masks(frames: list[Any]) -> NodeResult:
    """Make the IMAGE and the MASK of decoded *frames*, which have one size."""
    masks = [_hidden_part(frame) for frame in frames if frame.hasalpha()]
    if len(masks) != len(frames):
        masks = [vips().Image.black(64, 64) for _ in frames]
    return NodeResult(outputs=(batch([as_srgb(frame) for frame in frames]), batch([to_uchar(mask) for mask in masks])))


def load_image_mask(ctx: NodeContext, *, image: str, channel: str) -> NodeResult:
    """Decode a file and keep one channel; alpha is inverted, as ComfyUI's masks are."""
    frame = decode(ctx.library.folders.locate(image), image)[0]
    if channel == "alpha":
        mask = _hidden_part(frame) if frame.hasalpha() else vips().Image.black(64, 64)
    else:
        mask = as_srgb(frame).extract_band(_CHANNELS.index(channel) - 1)
    return NodeResult(outputs=(batch([to_uchar(mask)]),))


def _hidden_part(picture: Any) -> Any:
    """The alpha band, inverted: 0 where the picture is opaque."""
    alpha = picture.extract_band(picture.bands - 1)
    return (alpha.cast("uchar", shift=True) if alpha.format == "ushort" else alpha).invert()


def decode(path: Path, name: str) -> list[Any]:
    """Open a picture; more than one frame if it is an animation. *name* is for messages."""
    picture = vips().Image.new_from_file(str(path), fail_on="truncated")
    pages = picture.get("n-pages") if picture.get_typeof("n-pages") else 1
    if picture.width * picture.height * pages > _MAX_LOAD_PX:
        raise ValueError(f"{name}: {picture.width} x {picture.height} pixels is more than this engine loads")
    loader = picture.get("vips-loader")
    if pages > 1 and loader.startswith(("gif", "webp")):
        picture = vips().Image.new_from_file(str(path), n=-1, fail_on="truncated")
        height = picture.get("page-height")
        return [picture.crop(0, index * height, picture.width, height) for index in range(pages)]
    return [picture.autorot()]


def file_exists(library: Library, value: Any) -> str | None:
    """Say what is wrong with *value* as the name of a file; None if nothing is."""
    wrong = f"Invalid image file: {value}"
    try:
        return None if library.folders.locate(value).exists() else wrong
    except OutsideFolder:
        return wrong


def file_fingerprint(library: Library, value: Any, cheap: bool) -> str:
    """What is in the file (ComfyUI hashes it at each run), or with *cheap* what the directory says of it."""
    return fingerprint_of(library.folders.locate(value), cheap)


def fingerprint_of(path: Path, cheap: bool) -> str:
    """Do what :func:`file_fingerprint` does, for a file that has been found."""
    if cheap:
        stat = path.stat()
        return f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_pictures(library: Library) -> list[str]:
    """Names of the pictures in the input folder."""
    return pictures_in(library.folders.input)


def pictures_in(folder: Path) -> list[str]:
    """Names of the pictures in *folder*, sorted."""
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_file() and entry.suffix.lower() in _PICTURE_SUFFIXES
    )


def input_files(library: Library) -> list[str]:
    """Names of all files in the input folder."""
    return sorted(entry.name for entry in library.folders.input.iterdir() if entry.is_file())


def _file_input(choices: Callable[[Library], Sequence[str]]) -> Input:
    options = {"image_upload": True}
    return Input(name="image", type="COMBO", choices=choices, listed=True, options=options, check=file_exists)


def empty_image(ctx: NodeContext, *, width: int, height: int, batch_size: int = 1, color: int = 0) -> NodeResult:
    """Make pictures of one colour, given as 0xRRGGBB."""
    del ctx
    rgb = [color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF]
    picture = (vips().Image.black(width, height, bands=3) + rgb).cast("uchar").copy(interpretation="srgb").copy_memory()
    return NodeResult(
        outputs=(Images(width_px=width, height_px=height, count=batch_size, pictures=(picture,) * batch_size),)
    )


def image_scale(
    ctx: NodeContext, *, image: Images, upscale_method: str, width: int, height: int, crop: str
) -> NodeResult:
    """Scale to a size; a side of 0 follows from the other one, both 0 change nothing."""
    del ctx
    width, height = scaled_size(image, width, height)
    if (width, height) == (image.width_px, image.height_px):
        return NodeResult(outputs=(image,))
    return NodeResult(
        outputs=(batch([resized(picture, width, height, upscale_method, crop) for picture in image.pictures]),)
    )


def scaled_size(image: Images, width: int, height: int) -> tuple[int, int]:
    """Fill in a side of 0 so that the aspect ratio stays."""
    if width == 0 and height == 0:
        return image.width_px, image.height_px
    if width == 0:
        return max(1, round(image.width_px * height / image.height_px)), height
    if height == 0:
        return width, max(1, round(image.height_px * width / image.width_px))
    return width, height


def image_scale_by(ctx: NodeContext, *, image: Images, upscale_method: str, scale_by: float) -> NodeResult:
    """Scale by a factor."""
    width, height = max(1, round(image.width_px * scale_by)), max(1, round(image.height_px * scale_by))
    return image_scale(ctx, image=image, upscale_method=upscale_method, width=width, height=height, crop="disabled")


def image_invert(ctx: NodeContext, *, image: Images) -> NodeResult:
    """Turn each channel to 255 minus itself."""
    del ctx
    return NodeResult(outputs=(batch([picture.invert() for picture in image.pictures]),))


def image_batch(ctx: NodeContext, *, image1: Images, image2: Images) -> NodeResult:
    """Join two batches; the second takes the size of the first."""
    del ctx
    return NodeResult(outputs=(batch([*image1.pictures, *_fitted(image2, image1, "bilinear")]),))


def _fitted(images: Images, like: Images, method: str) -> list[Any]:
    if (images.width_px, images.height_px) == (like.width_px, like.height_px):
        return list(images.pictures)
    return [resized(picture, like.width_px, like.height_px, method, "center") for picture in images.pictures]


def repeat_image_batch(ctx: NodeContext, *, image: Images, amount: int) -> NodeResult:
    """Repeat the batch as a whole."""
    del ctx
    return NodeResult(
        outputs=(
            Images(
                width_px=image.width_px,
                height_px=image.height_px,
                count=image.count * amount,
                pictures=image.pictures * amount,
            ),
        )
    )


def image_blend(
    ctx: NodeContext, *, image1: Images, image2: Images, blend_factor: float, blend_mode: str
) -> NodeResult:
    """Blend the second batch onto the first; a batch of one is used for all."""
    del ctx
    if blend_mode not in _BLEND_MODES:
        raise ValueError(f"Unsupported blend mode: {blend_mode}")
    others = _fitted(image2, image1, "bicubic")
    if len(others) not in (1, len(image1)):
        raise ValueError(f"cannot blend a batch of {len(others)} onto one of {len(image1)}")
    blended = []
    for index, picture in enumerate(image1.pictures):
        below, above = picture / 255.0, others[index % len(others)] / 255.0
        mixed = below * (1 - blend_factor) + _blend(below, above, blend_mode) * blend_factor
        blended.append(to_uchar(mixed * 255.0).copy(interpretation="srgb"))
    return NodeResult(outputs=(batch(blended),))


def _blend(below: Any, above: Any, mode: str) -> Any:
    match mode:
        case "multiply":
            return below * above
        case "screen":
            return _screen(below, above)
        case "overlay":
            return (below <= 0.5).ifthenelse(2 * below * above, 1 - 2 * (1 - below) * (1 - above))
        case "soft_light":
            soft = (below <= 0.25).ifthenelse(((16 * below - 12) * below + 4) * below, below**0.5)
            dark = below - (1 - 2 * above) * below * (1 - below)
            return (above <= 0.5).ifthenelse(dark, below + (2 * above - 1) * (soft - below))
        case "difference":
            return below - above
        case _:
            return above


def _screen(below: Any, above: Any) -> Any:
    return 1 - (1 - below) * (1 - above)


def image_blur(ctx: NodeContext, *, image: Images, blur_radius: int, sigma: float) -> NodeResult:
    """Blur with a Gaussian of *sigma* (relative to the radius, as in ComfyUI) cut off at *blur_radius* pixels."""
    del ctx
    row = _gaussian_row(blur_radius, sigma)
    return NodeResult(outputs=(batch([_convolved(picture, row) for picture in image.pictures]),))


def image_sharpen(ctx: NodeContext, *, image: Images, sharpen_radius: int, sigma: float, alpha: float) -> NodeResult:
    """Sharpen by adding ten times *alpha* of what a Gaussian blur takes away."""
    del ctx
    row = _gaussian_row(sharpen_radius, sigma)
    sharpened = []
    for picture in image.pictures:
        blurred = _convolved_float(picture, row)
        sharpened.append(to_uchar(picture + (picture - blurred) * (alpha * 10)).copy(interpretation="srgb"))
    return NodeResult(outputs=(batch(sharpened),))


def _gaussian_row(radius: int, sigma: float) -> Any:
    """One row of the separable kernel: positions run from -1 to 1, whatever the radius."""
    weights = [
        2.718281828459045 ** (-((step / radius) ** 2) / (2 * sigma * sigma)) for step in range(-radius, radius + 1)
    ]
    total = sum(weights)
    return vips().Image.new_from_array([[weight / total for weight in weights]])


def _convolved_float(picture: Any, row: Any) -> Any:
    radius = row.width // 2
    width, height = picture.width, picture.height
    padded = picture.cast("float").embed(radius, radius, width + 2 * radius, height + 2 * radius, extend="mirror")
    return padded.convsep(row, precision="float").crop(radius, radius, width, height)


def _convolved(picture: Any, row: Any) -> Any:
    return to_uchar(_convolved_float(picture, row)).copy(interpretation="srgb")


def image_crop(ctx: NodeContext, *, image: Images, width: int, height: int, x: int, y: int) -> NodeResult:
    """Cut out a rectangle; what lies outside the picture is left away."""
    del ctx
    left, top = min(x, image.width_px - 1), min(y, image.height_px - 1)
    wide, high = min(width, image.width_px - left), min(height, image.height_px - top)
    return NodeResult(outputs=(batch([picture.crop(left, top, wide, high) for picture in image.pictures]),))


def get_image_size(ctx: NodeContext, *, image: Images, **_hidden: Any) -> NodeResult:
    """Return width, height and batch size, and show them at the node."""
    ctx.progress.text(f"width: {image.width_px}, height: {image.height_px}\n batch size: {image.count}")
    return NodeResult(outputs=(image.width_px, image.height_px, image.count))


# What --cost none runs instead: sizes go through the graph, pixels do not.


def _unpainted(width: int, height: int, count: int = 1) -> NodeResult:
    return NodeResult(outputs=(Images(width_px=width, height_px=height, count=count),))


def _free_empty(ctx: NodeContext, *, width: int, height: int, batch_size: int = 1, color: int = 0) -> NodeResult:
    del ctx, color
    return _unpainted(width, height, batch_size)


def free_load(ctx: NodeContext, *, image: str) -> NodeResult:
    """Stand for a picture that is there, without its pixels."""
    if not ctx.library.folders.locate(image).is_file():
        raise FileNotFoundError(image)
    picture = Images(width_px=8, height_px=8, count=1)
    return NodeResult(outputs=(picture, picture))


def _free_load_mask(ctx: NodeContext, *, image: str, channel: str) -> NodeResult:
    del channel
    return free_load(ctx, image=image)


def _free_same(ctx: NodeContext, *, image: Images, **_others: Any) -> NodeResult:
    del ctx
    return NodeResult(outputs=(image,))


def _free_first(ctx: NodeContext, *, image1: Images, **_others: Any) -> NodeResult:
    del ctx
    return NodeResult(outputs=(image1,))


def _free_scale(ctx: NodeContext, *, image: Images, width: int, height: int, **_others: Any) -> NodeResult:
    del ctx
    return _unpainted(*scaled_size(image, width, height), image.count)


def _free_batch(ctx: NodeContext, *, image1: Images, image2: Images) -> NodeResult:
    del ctx
    return _unpainted(image1.width_px, image1.height_px, image1.count + image2.count)


def _free_crop(ctx: NodeContext, *, image: Images, width: int, height: int, x: int, y: int) -> NodeResult:
    del ctx, x, y
    return _unpainted(min(width, image.width_px), min(height, image.height_px), image.count)


_SIDE: Final = {"min": 1, "max": MAX_RESOLUTION_PX, "step": 1}
_SCALED_SIDE: Final = {"min": 0, "max": MAX_RESOLUTION_PX, "step": 1}

NODES: Final = (
    NodeType(
        name="LoadImage",
        display_name="Load Image",
        category="image",
        run=load_image,
        costless=free_load,
        threaded=True,
        inputs=(_file_input(input_pictures),),
        outputs=("IMAGE", "MASK"),
        fingerprint=("image", file_fingerprint),
    ),
    NodeType(
        name="LoadImageMask",
        display_name="Load Image (as Mask)",
        category="mask",
        run=load_image_mask,
        costless=_free_load_mask,
        threaded=True,
        inputs=(_file_input(input_files), choice("channel", _CHANNELS)),
        outputs=("MASK",),
        fingerprint=("image", file_fingerprint),
    ),
    NodeType(
        name="EmptyImage",
        display_name="EmptyImage",
        category="image",
        run=empty_image,
        costless=_free_empty,
        threaded=True,
        inputs=(
            integer("width", 512, **_SIDE),
            integer("height", 512, **_SIDE),
            integer("batch_size", 1, min=1, max=4096),
            integer("color", 0, min=0, max=0xFFFFFF, step=1, display="color"),
        ),
        outputs=("IMAGE",),
    ),
    NodeType(
        name="ImageScale",
        display_name="Upscale Image",
        category="image/upscaling",
        run=image_scale,
        costless=_free_scale,
        threaded=True,
        inputs=(
            link("image", "IMAGE"),
            choice("upscale_method", _UPSCALE_METHODS),
            integer("width", 512, **_SCALED_SIDE),
            integer("height", 512, **_SCALED_SIDE),
            choice("crop", _CROP_METHODS),
        ),
        outputs=("IMAGE",),
    ),
    NodeType(
        name="ImageScaleBy",
        display_name="Upscale Image By",
        category="image/upscaling",
        run=image_scale_by,
        costless=_free_same,
        threaded=True,
        inputs=(
            link("image", "IMAGE"),
            choice("upscale_method", _UPSCALE_METHODS),
            number("scale_by", 1.0, min=0.01, max=8.0, step=0.01),
        ),
        outputs=("IMAGE",),
    ),
    NodeType(
        name="ImageInvert",
        display_name="Invert Image",
        category="image",
        run=image_invert,
        costless=_free_same,
        threaded=True,
        inputs=(link("image", "IMAGE"),),
        outputs=("IMAGE",),
    ),
    NodeType(
        name="ImageBatch",
        display_name="Batch Images",
        category="image",
        run=image_batch,
        costless=_free_batch,
        threaded=True,
        inputs=(link("image1", "IMAGE"), link("image2", "IMAGE")),
        outputs=("IMAGE",),
    ),
    NodeType(
        name="RepeatImageBatch",
        display_name="RepeatImageBatch",
        category="image/batch",
        run=repeat_image_batch,
        inputs=(link("image", "IMAGE"), integer("amount", 1, min=1, max=4096)),
        outputs=("IMAGE",),
    ),
    NodeType(
        name="ImageBlend",
        display_name="Image Blend",
        category="image/postprocessing",
        run=image_blend,
        costless=_free_first,
        threaded=True,
        inputs=(
            link("image1", "IMAGE"),
            link("image2", "IMAGE"),
            number("blend_factor", 0.5, min=0.0, max=1.0, step=0.01),
            combo("blend_mode", _BLEND_MODES),
        ),
        outputs=("IMAGE",),
    ),
    NodeType(
        name="ImageBlur",
        display_name="Image Blur",
        category="image/postprocessing",
        run=image_blur,
        costless=_free_same,
        threaded=True,
        inputs=(
            link("image", "IMAGE"),
            integer("blur_radius", 1, min=1, max=31, step=1),
            number("sigma", 1.0, min=0.1, max=10.0, step=0.1),
        ),
        outputs=("IMAGE",),
    ),
    NodeType(
        name="ImageSharpen",
        display_name="Image Sharpen",
        category="image/postprocessing",
        run=image_sharpen,
        costless=_free_same,
        threaded=True,
        inputs=(
            link("image", "IMAGE"),
            integer("sharpen_radius", 1, min=1, max=31, step=1),
            number("sigma", 1.0, min=0.1, max=10.0, step=0.01),
            number("alpha", 1.0, min=0.0, max=5.0, step=0.01),
        ),
        outputs=("IMAGE",),
    ),
    NodeType(
        name="ImageCrop",
        display_name="Image Crop",
        category="image/transform",
        run=image_crop,
        costless=_free_crop,
        threaded=True,
        inputs=(
            link("image", "IMAGE"),
            integer("width", 512, **_SIDE),
            integer("height", 512, **_SIDE),
            integer("x", 0, **_SCALED_SIDE),
            integer("y", 0, **_SCALED_SIDE),
        ),
        outputs=("IMAGE",),
    ),
    NodeType(
        name="GetImageSize",
        display_name="Get Image Size",
        category="image",
        description="Returns width and height of the image, and passes it through unchanged.",
        run=get_image_size,
        inputs=(link("image", "IMAGE"),),
        outputs=("INT", "INT", "INT"),
        output_names=("width", "height", "batch_size"),
        hidden={"unique_id": "UNIQUE_ID"},
    ),
)
