"""What becomes of a picture: its colours, its transparency, its frames, what is beside the pixels; and failures."""

import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from convert_kit import (
    avif_subsampling,
    difference,
    filled,
    film,
    jpeg_sampling,
    jpeg_segments,
    never,
    opened,
    picture,
    pixel,
    png_chunks,
    ramp,
    to,
    webp_chunks,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from media_kit import png, wav

from comfyd.media.convert import ConversionFailed, Unchanged, convert, delivery_names
from comfyd.media.convert_options import parse_convert
from comfyd.media.images import libvips

FORMATS = ["jpeg", "webp", "png", "avif"]
LOSSLESS: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "png": {}}
WORKFLOW = json.dumps({"nodes": [{"id": 1, "title": "caf\\u00e9 (a, b)"}]})
PROMPT = json.dumps({"1": {"class_type": "KSampler", "inputs": {"seed": 2**63}}})


def saved(path: Path, image: Any, saver: str = "pngsave", **arguments: Any) -> Path:
    getattr(image, saver)(str(path), **arguments)
    return path


def failure(source: Path, format_: str, max_pixels: int | None = None, **options: Any) -> ConversionFailed:
    """Fail to convert, and check that nothing is left."""
    target = source.with_name("target")
    spec = parse_convert({"format": format_, "options": options})
    with pytest.raises(ConversionFailed) as failed:
        convert(source, target, spec, never, **({} if max_pixels is None else {"max_pixels": max_pixels}))
    assert not target.exists()
    assert failed.value.filename == source.name
    assert str(source.parent) not in str(failed.value)
    return failed.value


# Colour


@pytest.mark.parametrize("format_", FORMATS)
def test_every_kind_of_picture_becomes_8_bit_srgb(tmp_path: Path, format_: str) -> None:
    rgb = picture()
    wide = (rgb.cast("ushort") * 257).cast("ushort").copy(interpretation="rgb16")
    grey = rgb.colourspace("b-w")
    sources = {
        "rgb": (saved(tmp_path / "rgb.png", rgb), rgb),
        "16 bit": (saved(tmp_path / "rgb16.png", wide), rgb),
        "grey": (saved(tmp_path / "grey.png", grey), grey.colourspace("srgb")),
        "16 bit grey": (saved(tmp_path / "grey16.png", grey.colourspace("grey16")), grey.colourspace("srgb")),
        "palette": (saved(tmp_path / "palette.png", rgb, palette=True), opened(tmp_path / "palette.png")),
        "lab": (saved(tmp_path / "lab.tiff", rgb.colourspace("lab"), "tiffsave"), rgb),
        "float": (saved(tmp_path / "float.tiff", rgb.colourspace("scrgb"), "tiffsave"), rgb),
    }
    for name, (source, meant) in sources.items():
        done = opened(to(source, format_, **LOSSLESS.get(format_, {"quality": 95, "chromaSubsampling": "4:4:4"})))
        assert (done.interpretation, done.format, done.bands) == ("srgb", "uchar", 3), name
        assert difference(done, meant) < (1 if format_ in LOSSLESS else 4), name


@pytest.mark.parametrize("format_", ["webp", "png", "avif"])
def test_transparency_stays_where_the_format_has_it(tmp_path: Path, format_: str) -> None:
    alpha = ramp()
    wide = (alpha.cast("ushort") * 257).cast("ushort")
    rgb16 = (picture().cast("ushort") * 257).cast("ushort").copy(interpretation="rgb16")
    sources = [
        saved(tmp_path / "rgba.png", picture().bandjoin(alpha)),
        saved(tmp_path / "rgba16.png", rgb16.bandjoin(wide).copy(interpretation="rgb16")),
        saved(tmp_path / "greya.png", picture().colourspace("b-w").bandjoin(alpha).copy(interpretation="b-w")),
    ]
    for source in sources:
        done = opened(to(source, format_, **LOSSLESS.get(format_, {"quality": 95})))
        assert (done.bands, done.hasalpha()) == (4, 1), source.name
        assert difference(done[3], alpha) < 1, source.name


@pytest.mark.parametrize(
    ("background", "shown"),
    [(None, [0, 0, 0]), ("#ff8000", [255, 128, 0]), ([0, 64, 255], [0, 64, 255]), ("#FFFFFF", [255, 255, 255])],
)
def test_jpeg_shows_the_background_through_transparency(tmp_path: Path, background: Any, shown: list[int]) -> None:
    options = {} if background is None else {"background": background}
    clear = saved(tmp_path / "clear.png", filled(200, 200, 200, 0))
    half = saved(tmp_path / "half.png", filled(200, 200, 200, 128))
    solid = saved(tmp_path / "solid.png", filled(200, 200, 200, 255))
    grey = saved(tmp_path / "grey.png", filled(200, 0))
    for source, meant in (
        (clear, shown),
        (grey, shown),
        (half, [round((200 * 128 + band * 127) / 255) for band in shown]),
        (solid, [200, 200, 200]),
    ):
        assert pixel(to(source, "jpeg", quality=100, **options)) == pytest.approx(meant, abs=2), source.name


def test_a_transparent_gif_is_flattened_and_an_opaque_one_is_not_touched(tmp_path: Path) -> None:
    clear = saved(tmp_path / "clear.gif", filled(10, 200, 30, 0), "gifsave")
    opaque = saved(tmp_path / "opaque.gif", filled(10, 200, 30), "gifsave")
    assert pixel(to(clear, "jpeg", background="#0000ff", quality=100)) == pytest.approx([0, 0, 255], abs=3)
    assert pixel(to(opaque, "jpeg", background="#0000ff", quality=100)) == pytest.approx([10, 200, 30], abs=3)


@pytest.mark.parametrize("metadata", ["strip", "keep"])
@pytest.mark.parametrize("profile", [True, False])
def test_cmyk_becomes_rgb_and_its_profile_never_stays(tmp_path: Path, metadata: str, profile: bool) -> None:
    cmyk = filled(150, 110, 100).icc_transform("cmyk", input_profile="srgb")
    source = saved(tmp_path / "print.jpg", cmyk, "jpegsave", Q=95, keep="icc" if profile else "none")
    assert opened(source).interpretation == "cmyk"
    done = to(source, "jpeg", metadata, quality=95)
    assert len(jpeg_sampling(done)) == 3
    assert pixel(done) == pytest.approx([150, 110, 100], abs=8)  # which ink can show
    assert b"CMYK" not in done.read_bytes()


def test_an_embedded_profile_is_applied_unless_it_is_kept(tmp_path: Path) -> None:
    colour = [200, 80, 60]
    p3 = filled(*colour).icc_transform("p3", input_profile="srgb")
    source = saved(tmp_path / "p3.png", p3)
    stored = [round(band) for band in p3.getpoint(0, 0)]
    assert max(abs(one - other) for one, other in zip(stored, colour, strict=True)) > 10
    for format_ in ("png", "webp"):
        applied, kept = (to(source, format_, metadata, **LOSSLESS[format_]) for metadata in ("strip", "keep"))
        assert pixel(applied) == pytest.approx(colour, abs=1)
        assert opened(applied).get_typeof("icc-profile-data") == 0
        assert pixel(kept) == stored
        assert opened(kept).get("icc-profile-data") == p3.get("icc-profile-data")


def with_profile(jpeg: Path, profile: bytes) -> Path:
    """Put *profile* into a JPEG as it is; libvips would not write one that does not fit."""
    parts = [profile[at : at + 65_000] for at in range(0, len(profile), 65_000)]
    segments = b""
    for number, part in enumerate(parts, start=1):
        segment = b"ICC_PROFILE\0" + bytes([number, len(parts)]) + part
        segments += b"\xff\xe2" + struct.pack(">H", len(segment) + 2) + segment
    data = jpeg.read_bytes()
    jpeg.write_bytes(data[:2] + segments + data[2:])
    return jpeg


@pytest.mark.parametrize("metadata", ["strip", "keep"])
@pytest.mark.parametrize("colour", [(120,), (10, 20, 30)])
@pytest.mark.parametrize("kind", ["cmyk", "nonsense"])
def test_a_profile_of_another_kind_of_pixels_counts_for_nothing(
    tmp_path: Path, metadata: str, colour: tuple[int, ...], kind: str
) -> None:
    fitting = filled(1, 2, 3).icc_transform("cmyk", input_profile="srgb").get("icc-profile-data")
    profile = fitting if kind == "cmyk" else b"nonsense" * 40
    source = with_profile(saved(tmp_path / "a.jpg", filled(*colour), "jpegsave", Q=100), profile)
    assert opened(source).get("icc-profile-data") == profile
    for format_, options in LOSSLESS.items():
        done = to(source, format_, metadata, **options)
        assert pixel(done) == pytest.approx(list(colour) * (3 // len(colour)), abs=1)
        assert profile not in done.read_bytes()
        if opened(done).get_typeof("icc-profile-data"):
            assert opened(done).get("icc-profile-data")[16:20] == b"RGB "


# Frames


@pytest.mark.parametrize(("saver", "arguments"), [("webpsave", {"lossless": True}), ("gifsave", {})])
def test_an_animation_stays_one_as_webp_with_its_times(tmp_path: Path, saver: str, arguments: dict[str, Any]) -> None:
    source = saved(tmp_path / "film.bin", film(), saver, **arguments)
    chunks = webp_chunks(to(source, "webp", lossless=True))
    assert [int.from_bytes(data[12:15], "little") for name, data in chunks if name == b"ANMF"] == [50, 120, 200]
    assert int.from_bytes(dict(chunks)[b"ANIM"][4:6], "little") == 4
    done = opened(to(source, "webp", lossless=True), n=-1)
    assert (done.width, done.get_page_height(), done.get("n-pages")) == (24, 16, 3)
    assert difference(done[0:3], opened(source, n=-1)[0:3]) == 0


@pytest.mark.parametrize("format_", ["jpeg", "png", "avif"])
def test_an_animation_becomes_its_first_frame_where_the_format_has_one(tmp_path: Path, format_: str) -> None:
    source = saved(tmp_path / "film.webp", film(), "webpsave", lossless=True)
    done = opened(to(source, format_, quality=95))
    assert (done.width, done.height) == (24, 16)
    assert done.getpoint(12, 8)[:3] == pytest.approx([0, 255, 60], abs=8)


def test_the_pages_of_a_tiff_are_no_animation(tmp_path: Path) -> None:
    source = saved(tmp_path / "pages.tiff", film(), "tiffsave")
    assert [name for name, _ in webp_chunks(to(source, "webp"))] == [b"VP8 "]


def animated_png(path: Path, frames: int) -> Path:
    """A PNG that says it has more frames; they need not follow for it to be read as its first."""
    data = png(4, 3)
    control = struct.pack(">II", frames, 0)
    chunk = struct.pack(">I", 8) + b"acTL" + control + struct.pack(">I", zlib.crc32(b"acTL" + control))
    path.write_bytes(data[:33] + chunk + data[33:])
    return path


@pytest.mark.parametrize("format_", ["webp", "png"])
def test_an_animated_png_is_not_robbed_of_its_frames(tmp_path: Path, format_: str) -> None:
    source = animated_png(tmp_path / "film.png", 2)
    target = tmp_path / "target"
    done = convert(source, target, parse_convert({"format": format_}), never)
    assert isinstance(done, Unchanged)
    assert "animated PNG" in done.reason
    assert not target.exists()
    to(animated_png(tmp_path / "one.png", 1), format_)


def test_an_animated_png_gives_its_first_frame_to_a_format_that_has_one(tmp_path: Path) -> None:
    assert opened(to(animated_png(tmp_path / "film.png", 2), "jpeg")).width == 4


# What is beside the pixels


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A PNG as ComfyUI writes it, with EXIF and XMP besides."""
    vips = libvips()
    image = picture().copy()
    image.set_type(vips.GValue.gstr_type, "png-comment-0-prompt", PROMPT)
    image.set_type(vips.GValue.gstr_type, "png-comment-1-workflow", WORKFLOW)
    image.set_type(vips.GValue.gstr_type, "exif-ifd0-Artist", "Ada")
    image.set_type(vips.GValue.blob_type, "xmp-data", b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")
    return saved(tmp_path / "told.png", image)


@pytest.mark.parametrize("format_", FORMATS)
def test_stripped_files_hold_pixels_only(told: Path, format_: str) -> None:
    done = to(told, format_)
    data = done.read_bytes()
    for secret in (b"KSampler", b"caf", b"Ada", b"xmpmeta", b"prompt"):
        assert secret not in data
    assert not {"exif-data", "xmp-data", "icc-profile-data"} & set(opened(done).get_fields())
    if format_ == "png":
        assert {name for name, _ in png_chunks(done)} <= {b"IHDR", b"pHYs", b"IDAT", b"IEND", b"bKGD"}


@pytest.mark.parametrize("format_", FORMATS)
def test_kept_files_have_exif_and_xmp(told: Path, format_: str) -> None:
    kept = opened(to(told, format_, "keep"))
    assert str(kept.get("exif-ifd0-Artist")).startswith("Ada")
    assert b"xmpmeta" in kept.get("xmp-data")


def test_png_keeps_the_texts_of_comfyui_uncompressed_for_its_page_to_find(told: Path) -> None:
    text = b"".join(
        struct.pack(">I", len(data)) + b"tEXt" + data + struct.pack(">I", zlib.crc32(b"tEXt" + data))
        for data in (b"prompt\0" + PROMPT.encode(), b"workflow\0" + WORKFLOW.encode())
    )
    data = told.read_bytes()
    told.write_bytes(data[:33] + text + data[33:])
    kept = to(told, "png", "keep")
    chunks = png_chunks(kept)
    assert (b"tEXt", b"prompt\0" + PROMPT.encode()) in chunks
    assert (b"tEXt", b"workflow\0" + WORKFLOW.encode()) in chunks
    assert difference(opened(kept), picture()) == 0
    assert not list(told.parent.glob("*.pixels"))


def test_png_keeps_a_profile_once_and_no_text_that_nobody_could_read(tmp_path: Path) -> None:
    image = picture().icc_transform("p3", input_profile="srgb")
    source = saved(tmp_path / "a.png", image)
    huge = b"prompt\0" + bytes([65]) * (8 << 20)
    chunk = struct.pack(">I", len(huge)) + b"tEXt" + huge + struct.pack(">I", zlib.crc32(b"tEXt" + huge))
    data = source.read_bytes()
    source.write_bytes(data[:33] + chunk + data[33:])
    kinds = [kind for kind, _ in png_chunks(to(source, "png", "keep"))]
    assert kinds.count(b"iCCP") == 1
    assert b"tEXt" not in kinds


def test_webp_keeps_the_texts_of_comfyui_where_its_own_webp_has_them(told: Path) -> None:
    exif = dict(webp_chunks(to(told, "webp", "keep")))[b"EXIF"]
    assert f"prompt:{PROMPT}\0".encode() in exif
    assert f"workflow:{WORKFLOW}\0".encode() in exif


@pytest.mark.parametrize("metadata", ["strip", "keep"])
def test_the_exif_orientation_turns_no_pixel(tmp_path: Path, metadata: str) -> None:
    image = picture().copy()
    image.set_type(libvips().GValue.gint_type, "orientation", 6)
    done = to(saved(tmp_path / "turned.jpg", image, "jpegsave"), "jpeg", metadata)
    assert (opened(done).width, opened(done).height) == (96, 64)
    has_exif = any(marker == 0xE1 for marker, _ in jpeg_segments(done))
    assert has_exif == (metadata == "keep")
    assert opened(done).get("orientation") == 6 if metadata == "keep" else True


# Small and large, damaged and not ours


@pytest.mark.parametrize("format_", FORMATS)
def test_a_single_pixel_is_a_picture(tmp_path: Path, format_: str) -> None:
    source = saved(tmp_path / "dot.png", filled(9, 99, 199, width=1, height=1))
    assert pixel(to(source, format_, quality=100)) == pytest.approx([9, 99, 199], abs=3)


def test_an_avif_can_be_read_too(tmp_path: Path) -> None:
    avif = to(saved(tmp_path / "a.png", picture()), "avif", quality=90)
    assert difference(opened(to(avif, "png")), picture()) < 8
    assert avif_subsampling(avif) == (0, 0)


@pytest.mark.parametrize("cut", [16, 40, 300, -200])
@pytest.mark.parametrize("saver", ["pngsave", "jpegsave", "webpsave", "gifsave"])
def test_half_a_picture_is_a_failure_and_leaves_nothing(tmp_path: Path, saver: str, cut: int) -> None:
    source = saved(tmp_path / "whole", picture(), saver)
    source.write_bytes(source.read_bytes()[:cut])
    assert "damaged" in failure(source, "png" if saver != "pngsave" else "webp").reason


def test_flipped_bits_are_a_failure(tmp_path: Path) -> None:
    source = saved(tmp_path / "whole.png", picture())
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 0xFF
    source.write_bytes(data)
    assert "damaged" in failure(source, "jpeg").reason


def test_a_header_that_promises_too_much_is_refused_before_a_pixel_is_read(tmp_path: Path) -> None:
    source = tmp_path / "bomb.png"
    source.write_bytes(png(60_000, 60_000))
    reason = failure(source, "jpeg").reason
    assert reason == "it has 60000 x 60000 pixels, and a picture is limited to 268.4 million"


def test_a_lower_limit_of_pixels_counts_for_all_formats_and_frames(tmp_path: Path) -> None:
    source = saved(tmp_path / "film.webp", film(), "webpsave")
    convert(source, tmp_path / "enough", parse_convert({"format": "webp"}), never, max_pixels=24 * 16 * 3)
    assert "in 3 frames" in failure(source, "webp", max_pixels=24 * 16 * 3 - 1).reason
    convert(source, tmp_path / "first", parse_convert({"format": "jpeg"}), never, max_pixels=24 * 16)
    assert "limited" in failure(source, "jpeg", max_pixels=24 * 16 - 1).reason


@pytest.mark.parametrize(
    ("format_", "options", "width", "height", "text"),
    [
        ("webp", {}, 16_384, 1, "16383"),
        ("jpeg", {}, 1, 65_536, "65535"),
        ("avif", {}, 16_385, 1, "16384"),
        ("avif", {}, 4097, 4096, "AVIF at effort 4 is limited to 16.8 million"),
        ("avif", {"effort": 9}, 1025, 1024, "AVIF at effort 9 is limited to 1.0 million"),
        ("png", {"palette": True}, 4097, 2048, "PNG with a palette is limited to 8.4 million"),
        ("jpeg", {"mozjpeg": True}, 8193, 8192, "JPEG with optimizeScans is limited to 67.1 million"),
        ("webp", {"lossless": True}, 8193, 8192, "lossless WebP is limited to 67.1 million"),
    ],
)
def test_what_a_format_cannot_be_is_refused_in_words(
    tmp_path: Path, format_: str, options: dict[str, Any], width: int, height: int, text: str
) -> None:
    source = tmp_path / "large.png"
    source.write_bytes(png(width, height))
    assert text in failure(source, format_, **options).reason


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("film.mp4", b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2mp41" + bytes(64)),
        ("note.txt", b"hello"),
        ("empty.png", b""),
        ("sound.flac", b"fLaC" + bytes(60)),
        ("sound.wav", wav()),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
        ("old.bmp", b"BM" + bytes(60)),
        ("photo.heic", b"\x00\x00\x00\x18ftypheic" + bytes(60)),
    ],
)
@pytest.mark.parametrize("format_", FORMATS)
def test_what_is_no_picture_of_ours_is_left_alone(tmp_path: Path, name: str, content: bytes, format_: str) -> None:
    source, target = tmp_path / name, tmp_path / "target"
    source.write_bytes(content)
    assert isinstance(convert(source, target, parse_convert({"format": format_}), never), Unchanged)
    assert source.read_bytes() == content
    assert not target.exists()


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.png", picture()).rename(tmp_path / os.fsdecode(b"film\xff.mp4[n=-1]"))
    assert opened(to(source, "jpeg")).width == 96


def test_a_target_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.png", picture())
    (tmp_path / "b").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        convert(source, tmp_path / "b", parse_convert({"format": "png"}), never)
    assert (tmp_path / "b").read_bytes() == b"mine"


def test_a_source_that_is_not_there_is_no_failure_of_the_picture(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "none.png", tmp_path / "b", parse_convert({"format": "png"}), never)


class Stop(Exception):
    """The test has seen enough."""


@pytest.mark.parametrize("asked", [1, 2, 5])
@pytest.mark.parametrize("format_", FORMATS)
def test_what_cancelled_raises_ends_the_work_and_leaves_no_file(tmp_path: Path, format_: str, asked: int) -> None:
    source = saved(tmp_path / "a.png", picture(900, 900))
    questions = 0

    def cancelled() -> None:
        nonlocal questions
        questions += 1
        if questions >= asked:
            raise Stop

    with pytest.raises(Stop):
        convert(
            source,
            tmp_path / "b",
            parse_convert({"format": format_, "options": {"effort": 0} if format_ in ("webp", "avif") else {}}),
            cancelled,
        )
    assert questions == asked
    assert not (tmp_path / "b").exists()


# Any options at all

OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "jpeg": {
        "quality": st.integers(1, 100),
        "progressive": st.booleans(),
        "chromaSubsampling": st.sampled_from(["4:2:0", "4:4:4"]),
        "optimizeCoding": st.booleans(),
        "mozjpeg": st.booleans(),
        "trellisQuantisation": st.booleans(),
        "overshootDeringing": st.booleans(),
        "optimizeScans": st.booleans(),
        "quantisationTable": st.integers(0, 8),
        "background": st.tuples(*[st.integers(0, 255)] * 3).map(list),
    },
    "webp": {
        "quality": st.integers(1, 100),
        "alphaQuality": st.integers(0, 100),
        "lossless": st.booleans(),
        "nearLossless": st.booleans(),
        "smartSubsample": st.booleans(),
        "smartDeblock": st.booleans(),
        "preset": st.sampled_from(["default", "photo", "picture", "drawing", "icon", "text"]),
        "effort": st.integers(0, 6),
        "exact": st.booleans(),
        "minSize": st.booleans(),
        "mixed": st.booleans(),
        "loop": st.integers(0, 65535),
        "delay": st.integers(0, 65535),
    },
    "png": {
        "compressionLevel": st.integers(0, 9),
        "adaptiveFiltering": st.booleans(),
        "progressive": st.booleans(),
        "palette": st.booleans(),
        "quality": st.integers(0, 100),
        "effort": st.integers(1, 10),
        "colours": st.integers(2, 256),
        "dither": st.floats(0, 1),
    },
    "avif": {
        "quality": st.integers(1, 100),
        "effort": st.integers(0, 9),
        "lossless": st.booleans(),
        "chromaSubsampling": st.sampled_from(["4:4:4", "4:2:0"]),
    },
}
ANY_SPEC = st.sampled_from(FORMATS).flatmap(
    lambda format_: st.fixed_dictionaries(
        {"format": st.just(format_), "metadata": st.sampled_from(["strip", "keep"])},
        optional={"options": st.fixed_dictionaries({}, optional=OPTIONS[format_])},
    )
)


@settings(max_examples=60, deadline=None)
@given(value=ANY_SPEC, animated=st.booleans())
def test_any_options_within_their_bounds_convert_to_the_same_size(value: dict[str, Any], animated: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image = film() if animated else picture(24, 16).bandjoin(ramp(24, 16))
        source = saved(Path(folder) / "source.webp", image, "webpsave")
        target = Path(folder) / "target"
        convert(source, target, parse_convert(value), never)
        frames = 3 if animated and value["format"] == "webp" else 1
        done = opened(target, **({"n": -1} if value["format"] == "webp" else {}))
        assert (done.width, done.height) == (24, 16 * frames)


# Names


@pytest.mark.parametrize(
    ("filenames", "converted", "format_", "names"),
    [
        (["a.png"], [True], "jpeg", ["a.jpeg"]),
        (["a.png"], [True], "jpg", ["a.jpg"]),
        (["a.b.png", "plain", ".hidden"], [True] * 3, "webp", ["a.b.webp", "plain.webp", ".hidden.webp"]),
        (["a.png", "a.webp", "a.gif"], [True] * 3, "jpeg", ["a.jpeg", "a-2.jpeg", "a-3.jpeg"]),
        (["a.png", "a.webp", "a-2.png"], [True] * 3, "jpeg", ["a.jpeg", "a-2.jpeg", "a-2-2.jpeg"]),
        (["a.png", "a.mp4"], [True, False], "jpeg", ["a.jpeg", "a.mp4"]),
        (["a.webp", "a.png"], [True, False], "png", ["a-2.png", "a.png"]),
        ([], [], "png", []),
    ],
)
def test_outputs_are_named_after_the_format_and_never_alike(
    filenames: list[str], converted: list[bool], format_: Any, names: list[str]
) -> None:
    assert delivery_names(filenames, converted, format_) == tuple(names)


# Memory

GROWTH = """
import resource, sys
from pathlib import Path
from comfyd.media.convert import convert
from comfyd.media.convert_options import parse_convert

spec = parse_convert({"format": "jpeg"})
folder, warm_up, large = map(Path, sys.argv[1:])
convert(warm_up, folder / "warm.jpeg", spec, lambda: None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(large, folder / "large.jpeg", spec, lambda: None)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_large_png_is_streamed_into_a_jpeg(tmp_path: Path) -> None:
    warm_up = saved(tmp_path / "small.png", picture())
    large = saved(tmp_path / "large.png", picture(600, 600).replicate(10, 10), compression=1)
    command = [sys.executable, "-c", GROWTH, str(tmp_path), str(warm_up), str(large)]
    grown = int(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    assert opened(tmp_path / "large.jpeg").width == 6000
    assert grown < 100_000_000  # 6000 x 6000 x 3 bytes are 108 MB
