"""Pictures into the format that a caller asked for, with libvips. :func:`convert` blocks; :class:`Converter` does not.

What happens to a picture is what sharp does to it, since that is what callers of comfyui-api know: an embedded colour
profile is applied and the result is sRGB, 16 bits become 8, grey becomes colour, and JPEG, which has no transparency,
shows the background through it. The EXIF orientation is not applied: sharp does not, and a picture that ComfyUI made
is upright (its pixels come out of a tensor; what it loads, it turns upright first).

Unlike sharp as comfyui-api calls it, an animation stays one where the target is WebP; the other targets get its first
frame. And a failure is a failure: nobody who asked for a JPEG is sent a PNG without being told.

Memory: rows stream from file to file. Some encoders hold the whole picture; measured for each pixel: AVIF 32 bytes,
JPEG with optimizeCoding or progressive 6, a WebP frame 5, an interlaced PNG 4.
"""

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final

import attrs
import trio

from comfyd.errors import ComfydError
from comfyd.media.convert_options import (
    OPTIMIZE_CODING_PIXELS,
    AvifOptions,
    ConvertOutput,
    Format,
    JpegOptions,
    Options,
    PngOptions,
    SaverArguments,
    WebpOptions,
)
from comfyd.media.images import libvips
from comfyd.media.png_chunks import copy_with_texts, is_animated
from comfyd.media.sniff import HEAD_BYTES, sniff

MAX_PIXELS: Final = 16383 * 16383
"""Of a whole animation, if it is one: sharp's limit, about 268 million."""

_LOADERS: Final = {
    "image/png": "pngload",
    "image/jpeg": "jpegload",
    "image/gif": "gifload",
    "image/webp": "webpload",
    "image/tiff": "tiffload",
    "image/avif": "heifload",
}
"""What is converted, each type by the loader of its own. The rest is passed on as it is."""
_ANIMATED: Final = frozenset({"image/gif", "image/webp"})
_SAVERS: Final = {
    JpegOptions: "jpegsave",
    WebpOptions: "webpsave",
    PngOptions: "pngsave",
    AvifOptions: "heifsave",
}
_LONGEST_SIDE_PX: Final = {JpegOptions: 65_535, WebpOptions: 16_383, AvifOptions: 16_384}
"""What the format can say, or (AVIF) what decoders take."""
_NO_ROOM_BYTES: Final = 1 << 20


@attrs.frozen(kw_only=True)
class Converted:
    """A picture as it was asked for. The caller owns the file."""

    path: Path
    media_type: str
    size_bytes: int


@attrs.frozen(kw_only=True)
class Unchanged:
    """Nothing was converted and nothing written: the source is to be delivered as it is."""

    reason: str


class ConversionFailed(ComfydError):
    """A picture could not be made into what was asked for. The texts name no path and nothing of another job."""

    def __init__(self, filename: str, reason: str) -> None:
        super().__init__(f"{filename} could not be converted: {reason}")
        self.filename = filename
        self.reason = reason


def convert(
    source: Path,
    target: Path,
    spec: ConvertOutput,
    cancelled: Callable[[], None],
    *,
    max_pixels: int = MAX_PIXELS,
) -> Converted | Unchanged:
    """Write the picture *source* to the new file *target*, as *spec* says. Blocks.

    *cancelled* is called often, in this thread or in one of libvips; what it raises stops the work and is raised here.
    (AVIF, a palette, mozjpeg and lossless WebP have a stage that cannot be stopped; their pictures are limited in
    size.) On any error *target* is gone. Beside it, ``<target>.pixels`` may be written for a while.

    Raises:
        ConversionFailed: the source is damaged or too large for the target.
        OSError: *source* cannot be read, or *target* cannot be made or is there already.
    """
    cancelled()
    with source.open("rb") as file:
        media_type = sniff(file.read(HEAD_BYTES))
    if media_type is None or media_type.name not in _LOADERS:
        return Unchanged(reason="it is no picture that comfyd converts")
    if media_type.name == "image/png" and isinstance(spec.options, WebpOptions | PngOptions) and is_animated(source):
        # libvips sees only its first frame, and both targets are for people who want the others as well.
        return Unchanged(reason="it is an animated PNG, which comfyd cannot read as a whole")
    target.open("xb").close()  # so that an error here is the OSError that it is
    keeps_texts = _keeps_texts(media_type.name, spec)
    pixels = target.with_name(f"{target.name}.pixels") if keeps_texts else target
    try:
        _write(source, media_type.name, pixels, spec, _Watch(cancelled), max_pixels)
        if keeps_texts:
            copy_with_texts(pixels, source, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    finally:
        if keeps_texts:
            pixels.unlink(missing_ok=True)
    return Converted(path=target, media_type=spec.media_type, size_bytes=target.stat().st_size)


def _write(source: Path, media_type: str, target: Path, spec: ConvertOutput, watch: "_Watch", max_pixels: int) -> None:
    vips = libvips()
    try:
        image = _load(vips, source, media_type, animated=isinstance(spec.options, WebpOptions))
        if reason := _too_large(image, spec.options, max_pixels):
            raise ConversionFailed(source.name, reason)
        image = _prepare(vips, image, spec)
        image.set_progress(True)
        image.signal_connect("eval", watch)
        save = getattr(image, _SAVERS[type(spec.options)])
        keep = "none" if spec.metadata == "strip" else "exif,iptc,icc" if _keeps_texts(media_type, spec) else "all"
        save(os.fsencode(target), keep=keep, **_saver_arguments(spec.options, image.width * image.height))
    except vips.Error as exc:
        if watch.raised is not None:
            raise watch.raised from None
        # Not libvips' own text: its error buffer is one for all threads, and may hold a path or another job's trouble.
        no_room = shutil.disk_usage(target.parent).free < _NO_ROOM_BYTES
        reason = "there is no room left on the disk" if no_room else "it is damaged, or of a kind that is not supported"
        raise ConversionFailed(source.name, reason) from exc
    if watch.raised is not None:  # at the very end, when there was nothing left to stop
        raise watch.raised


def _keeps_texts(media_type: str, spec: ConvertOutput) -> bool:
    """Whether texts go from PNG to PNG, which libvips cannot do so that ComfyUI's page finds them."""
    return spec.metadata == "keep" and media_type == spec.media_type == "image/png"


@attrs.define(eq=False)
class _Watch:
    """Asks whether to go on, each time that libvips has done some more, and stops it if not."""

    cancelled: Callable[[], None]
    raised: BaseException | None = attrs.field(default=None, init=False)

    def __call__(self, image: Any, _progress: Any) -> None:
        if self.raised is not None:
            return
        try:
            self.cancelled()
        except BaseException as exc:  # noqa: ASYNC103, BLE001  # none passes through libvips: raised behind it
            self.raised = exc
            image.set_kill(True)


def _load(vips: Any, source: Path, media_type: str, *, animated: bool) -> Any:
    """Open *source*: its header is read, its pixels are not yet."""
    # Half a picture is none: like sharp, the loader stops at the first thing that is wrong.
    arguments: dict[str, Any] = {"access": "sequential", "fail_on": "warning"}
    if animated and media_type in _ANIMATED:
        arguments["n"] = -1
    # The loader by name, not new_from_file(): that would read options out of a name that ends in "]".
    return vips.Operation.call(_LOADERS[media_type], os.fsencode(source), **arguments)


def _too_large(image: Any, options: Options, max_pixels: int) -> str | None:
    """Say what about the picture is more than *options* can be; None if nothing is. An animation is one long strip."""
    width, height, frame_height = image.width, image.height, image.get_page_height()
    longest_px = _LONGEST_SIDE_PX.get(type(options))
    if longest_px is not None and max(width, frame_height) > longest_px:
        return f"it has {width} x {frame_height} pixels, and the longest side can have {longest_px}"
    limit, kind = _pixel_limit(options)
    limit = min(limit, max_pixels)
    if width * height > limit:
        frames = f" in {height // frame_height} frames" if height > frame_height else ""
        return f"it has {width} x {frame_height} pixels{frames}, and {kind} is limited to {limit / 1e6:.1f} million"
    return None


def _pixel_limit(options: Options) -> tuple[int, str]:
    """So many pixels at most, and what it is that is limited.

    Where the encoder cannot be stopped, a cancelled job would hold a core for as long as it takes.
    """
    match options:
        case AvifOptions(effort=effort):
            return _AVIF_PIXELS[effort], f"AVIF at effort {effort}"
        case PngOptions(has_palette=True):
            return 4096 * 2048, "PNG with a palette"  # 5.5 s a million, 9.4 s at effort 10
        case JpegOptions() if options.saver_arguments()["optimize_scans"]:
            return 8192 * 8192, "JPEG with optimizeScans"  # 0.5 s a million
        case WebpOptions() if options.lossless or options.near_lossless:
            return 8192 * 8192, "lossless WebP"  # stops late: 2 s a million of noise, between two of its questions
        case _:
            return MAX_PIXELS, "a picture"


def _saver_arguments(options: Options, pixels: int) -> SaverArguments:
    """Give *options* in libvips' words; what the caller left open may depend on the size.

    Tables made for the picture need two passes over it, for which the encoder holds all of it. They save 3 percent.
    """
    arguments = options.saver_arguments()
    if (
        isinstance(options, JpegOptions)
        and pixels > OPTIMIZE_CODING_PIXELS
        and options.optimize_coding is options.optimise_coding is None
        and not arguments["interlace"]  # which has no other way
        and not arguments["trellis_quant"]
    ):
        return {**arguments, "optimize_coding": False}
    return arguments


_AVIF_PIXELS: Final = (*[4096 * 4096] * 5, 4096 * 2048, 2048 * 2048, *[2048 * 1024] * 2, 1024 * 1024)
"""By effort, so that it is a minute of one core. A photograph's million pixels took 3 s at effort 4, 14 s at 6, 60 s
at 9; effort 0 to 4 are limited for their memory."""


def _prepare(vips: Any, image: Any, spec: ConvertOutput) -> Any:
    """Lay on the operations that make *image* 8 bit sRGB, opaque if it has to be. Nothing is computed yet."""
    keep = spec.metadata == "keep"
    image = _as_srgb(image, keep_profile=keep)
    match spec.options:
        case JpegOptions(background_rgb=background) if image.hasalpha():
            return image.flatten(background=list(background))
        case WebpOptions() as options:
            image = image.copy()  # its metadata will be its own
            if options.loop is not None:
                image.set_type(vips.GValue.gint_type, "loop", options.loop)
            if options.delay is not None:
                frames = image.height // image.get_page_height()
                image.set_type(vips.GValue.array_int_type, "delay", [options.delay] * frames)
            if keep:
                _tell_workflow_in_exif(vips, image)
    return image


def _as_srgb(image: Any, *, keep_profile: bool) -> Any:
    """Convert to 8 bit sRGB (height x width x 3, or 4 with alpha), by the embedded profile if there is one.

    A profile can be kept only where it goes on describing the pixels, that is if they are RGB already.
    """
    space = image.interpretation
    has_profile = image.get_typeof("icc-profile-data") != 0
    # One that is for another kind of pixels is left out of account by libvips, here and when it saves.
    by_profile = partial(image.icc_transform, "srgb", embedded=True, depth=8, intent="perceptual")
    if space == "cmyk":
        return by_profile(input_profile="cmyk")
    if has_profile and (space == "b-w" or (space in ("srgb", "rgb16") and not keep_profile)):
        return by_profile()
    return image if space == "srgb" else image.colourspace("srgb", source_space=space)


def _tell_workflow_in_exif(vips: Any, image: Any) -> None:
    """Carry the texts of ComfyUI's PNGs over, to where its own WebP writer puts them and its page looks for them.

    (0.3.64: ``Make`` is ``workflow:<json>`` and ``Model`` is ``prompt:<json>``; comfy_extras/nodes_images.py.)
    """
    for field in image.get_fields():
        if field.startswith("png-comment-"):
            name = field.split("-", 3)[-1]
            tag = {"prompt": "Model", "workflow": "Make"}.get(name)
            if tag is not None:
                image.set_type(vips.GValue.gstr_type, f"exif-ifd0-{tag}", f"{name}:{image.get(field)}")


def delivery_names(filenames: Sequence[str], converted: Sequence[bool], format_: Format) -> tuple[str, ...]:
    """Name a job's outputs, in their order: those that were *converted* end as *format_* says, the others stay.

    The last ending is replaced, and a name without one gets it. Where two would be called the same, the later gets a
    number: ``a.png`` and ``a.webp`` become ``a.jpeg`` and ``a-2.jpeg``. What was not converted keeps its name always.
    """
    taken = {name for name, was in zip(filenames, converted, strict=True) if not was}
    names: list[str] = []
    for filename, was_converted in zip(filenames, converted, strict=True):
        name = filename
        if was_converted:
            stem = PurePosixPath(filename).stem
            name, number = f"{stem}.{format_}", 1
            while name in taken:
                number += 1
                name = f"{stem}-{number}.{format_}"
            taken.add(name)
        names.append(name)
    return tuple(names)


def _one_for_each_core() -> trio.CapacityLimiter:
    return trio.CapacityLimiter(len(os.sched_getaffinity(0)))


@attrs.frozen(kw_only=True)
class Converter:
    """Converts pictures in threads, as many at once as there are cores: libvips gives one of them to each."""

    limiter: trio.CapacityLimiter = attrs.field(factory=_one_for_each_core)
    max_pixels: int = MAX_PIXELS

    async def convert(self, source: Path, target: Path, spec: ConvertOutput) -> Converted | Unchanged:
        """Do as :func:`convert` does, and stop when cancelled: within a moment, and with *target* gone.

        Raises:
            ConversionFailed: the source is damaged or too large for the target.
            OSError: *source* cannot be read, or *target* cannot be made or is there already.
        """
        stop = threading.Event()
        work = partial(_convert_until, stop, source, target, spec, self.max_pixels)
        result: Converted | Unchanged | ConversionFailed | OSError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_set_when_cancelled, stop)
                try:
                    result = await trio.to_thread.run_sync(work, limiter=self.limiter)
                except (ConversionFailed, OSError) as exc:  # kept out of the nursery, which would make a group of it
                    result = exc
                nursery.cancel_scope.cancel("converted")
        except BaseException:
            _discard(result)  # cancelled when it was done, and before anybody could be told
            raise
        match result:
            case Converted() | Unchanged():
                return result
            case Exception():
                raise result
        raise AssertionError("the nursery ended before its block")


def _discard(result: object) -> None:
    if isinstance(result, Converted):
        result.path.unlink(missing_ok=True)


class _Stopped(Exception):
    """Nobody wants the picture any more."""


async def _set_when_cancelled(stop: threading.Event) -> None:
    try:
        await trio.sleep_forever()
    finally:
        stop.set()


def _convert_until(
    stop: threading.Event, source: Path, target: Path, spec: ConvertOutput, max_pixels: int
) -> Converted | Unchanged:
    # libvips asks from threads of its own as well (WebP's encoder does), where trio.from_thread.check_cancelled() is of
    # no use; so it asks for *stop*.
    def cancelled() -> None:
        if stop.is_set():
            raise _Stopped

    try:
        return convert(source, target, spec, cancelled, max_pixels=max_pixels)
    except _Stopped:
        trio.from_thread.check_cancelled()  # raises: *stop* is set only when this call's task is cancelled
        raise
