"""What each option does, seen in the files themselves."""

import zlib
from pathlib import Path
from typing import Any

import pytest
from convert_kit import (
    avif_subsampling,
    difference,
    filled,
    film,
    jpeg_is_progressive,
    jpeg_sampling,
    jpeg_scans,
    jpeg_tables,
    opened,
    picture,
    png_chunks,
    ramp,
    to,
    webp_chunks,
)

STANDARD_DC_TABLE = bytes([0x00, 0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
"""Huffman table 0 of the JPEG standard's annex K: its class and id, and how many codes there are of each length."""


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """An opaque PNG with grain."""
    path = tmp_path / "photo.png"
    picture().pngsave(str(path))
    return path


@pytest.fixture
def glass(tmp_path: Path) -> Path:
    """A PNG that is transparent at the left and opaque at the right."""
    path = tmp_path / "glass.png"
    picture().bandjoin(ramp()).pngsave(str(path))
    return path


@pytest.fixture
def animation(tmp_path: Path) -> Path:
    """A WebP of three frames."""
    path = tmp_path / "film.webp"
    film().webpsave(str(path), lossless=True)
    return path


# JPEG


def test_jpeg_defaults_are_baseline_halved_colour_and_tables_of_its_own(photo: Path) -> None:
    jpeg = to(photo, "jpeg")
    assert not jpeg_is_progressive(jpeg)
    assert jpeg_sampling(jpeg) == [(2, 2), (1, 1), (1, 1)]
    assert not jpeg_tables(jpeg, 0xC4).startswith(STANDARD_DC_TABLE)


def test_jpeg_quality_scales_the_quantisation(photo: Path) -> None:
    steps = [sum(jpeg_tables(to(photo, "jpeg", quality=quality), 0xDB)) for quality in (1, 40, 80, 100)]
    assert steps == sorted(steps, reverse=True)
    assert set(jpeg_tables(to(photo, "jpeg", quality=100), 0xDB)[1:65]) == {1}


def test_jpeg_progressive_has_several_scans(photo: Path) -> None:
    jpeg = to(photo, "jpeg", progressive=True)
    assert jpeg_is_progressive(jpeg)
    assert jpeg_scans(jpeg) > jpeg_scans(to(photo, "jpeg"))


@pytest.mark.parametrize("quality", [50, 95])
def test_jpeg_chroma_subsampling_is_as_asked_whatever_the_quality(photo: Path, quality: int) -> None:
    full = to(photo, "jpeg", quality=quality, chromaSubsampling="4:4:4")
    halved = to(photo, "jpeg", quality=quality, chromaSubsampling="4:2:0")
    assert jpeg_sampling(full) == [(1, 1)] * 3
    assert jpeg_sampling(halved) == [(2, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize("name", ["optimizeCoding", "optimiseCoding"])
def test_jpeg_without_optimized_coding_has_the_tables_of_the_standard(photo: Path, name: str) -> None:
    plain = to(photo, "jpeg", **{name: False})
    assert jpeg_tables(plain, 0xC4).startswith(STANDARD_DC_TABLE)
    assert plain.stat().st_size > to(photo, "jpeg").stat().st_size


def test_a_large_jpeg_is_streamed_unless_its_coding_is_to_be_optimized(tmp_path: Path) -> None:
    source = tmp_path / "large.png"
    filled(90, 90, 90, width=4096, height=4097).pngsave(str(source), compression=1)
    assert jpeg_tables(to(source, "jpeg"), 0xC4).startswith(STANDARD_DC_TABLE)
    assert not jpeg_tables(to(source, "jpeg", optimizeCoding=True), 0xC4).startswith(STANDARD_DC_TABLE)


def test_jpeg_trellis_quantisation_makes_it_smaller(photo: Path) -> None:
    for name in ("trellisQuantisation", "trellisQuantization"):
        assert to(photo, "jpeg", **{name: True}).stat().st_size < to(photo, "jpeg").stat().st_size


def test_jpeg_overshoot_deringing_changes_sharp_edges_in_white(tmp_path: Path) -> None:
    source = tmp_path / "text.png"
    filled(255, 255, 255, width=64, height=64).draw_rect([0, 0, 0], 19, 21, 7, 30, fill=True).pngsave(str(source))
    original = opened(source)
    plain, deringed = (opened(to(source, "jpeg", overshootDeringing=on, quality=40)) for on in (False, True))
    assert 0 < difference(deringed, original) < difference(plain, original)


@pytest.mark.parametrize("name", ["optimizeScans", "optimiseScans"])
def test_jpeg_optimized_scans_are_progressive_and_chosen_for_the_picture(photo: Path, name: str) -> None:
    jpeg = to(photo, "jpeg", **{name: True})
    assert jpeg_is_progressive(jpeg)
    assert jpeg_scans(jpeg) != jpeg_scans(to(photo, "jpeg", progressive=True))


def test_jpeg_quantisation_tables_are_nine_different_ones(photo: Path) -> None:
    tables = [jpeg_tables(to(photo, "jpeg", quantisationTable=number), 0xDB) for number in range(9)]
    assert len(set(tables)) == 9
    assert jpeg_tables(to(photo, "jpeg"), 0xDB) == tables[0]
    assert jpeg_tables(to(photo, "jpeg", quantizationTable=3), 0xDB) == tables[3]


def test_mozjpeg_is_its_options_and_they_can_be_changed_one_by_one(photo: Path) -> None:
    mozjpeg = to(photo, "jpeg", mozjpeg=True).read_bytes()
    spelt_out = to(
        photo,
        "jpeg",
        trellisQuantisation=True,
        overshootDeringing=True,
        optimizeScans=True,
        quantisationTable=3,
    )
    assert mozjpeg == spelt_out.read_bytes()
    assert mozjpeg != to(photo, "jpeg", mozjpeg=True, quantisationTable=0).read_bytes()


def test_jpg_and_jpeg_are_the_same_bytes(photo: Path) -> None:
    assert to(photo, "jpg").read_bytes() == to(photo, "jpeg").read_bytes()


# WebP


def test_webp_is_lossy_by_default_and_exact_when_lossless(photo: Path) -> None:
    lossy, lossless = to(photo, "webp"), to(photo, "webp", lossless=True)
    assert [name for name, _ in webp_chunks(lossy)] == [b"VP8 "]
    assert [name for name, _ in webp_chunks(lossless)] == [b"VP8L"]
    assert difference(opened(photo), opened(lossless)) == 0
    assert difference(opened(photo), opened(lossy)) > 0


def test_webp_near_lossless_is_a_little_off_and_smaller(photo: Path) -> None:
    near = to(photo, "webp", nearLossless=True, quality=40)
    assert [name for name, _ in webp_chunks(near)] == [b"VP8L"]
    assert 0 < difference(opened(photo), opened(near)) < difference(opened(photo), opened(to(photo, "webp")))
    assert near.stat().st_size < to(photo, "webp", lossless=True).stat().st_size


def test_webp_quality_costs_bytes(photo: Path) -> None:
    sizes = [to(photo, "webp", quality=quality).stat().st_size for quality in (1, 40, 80, 100)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4


def test_webp_alpha_quality_is_that_of_the_transparency(glass: Path) -> None:
    whole, coarse = (to(glass, "webp", alphaQuality=quality) for quality in (100, 10))
    assert difference(opened(whole)[3], opened(glass)[3]) == 0
    assert difference(opened(coarse)[3], opened(glass)[3]) > 0
    assert dict(webp_chunks(coarse))[b"VP8 "] == dict(webp_chunks(whole))[b"VP8 "]


@pytest.mark.parametrize(
    "option", [{"smartSubsample": True}, {"smartDeblock": True}, {"preset": "text"}, {"effort": 0}]
)
def test_webp_encoder_options_reach_the_encoder(photo: Path, option: dict[str, Any]) -> None:
    assert to(photo, "webp", **option).read_bytes() != to(photo, "webp").read_bytes()


def test_webp_effort_saves_bytes(photo: Path) -> None:
    quick, thorough = (to(photo, "webp", lossless=True, effort=effort).stat().st_size for effort in (0, 6))
    assert thorough < quick


def test_webp_exact_keeps_the_colour_under_full_transparency(tmp_path: Path) -> None:
    source = tmp_path / "hidden.png"
    filled(200, 100, 50, 0).pngsave(str(source))
    assert opened(to(source, "webp", lossless=True, exact=True)).getpoint(3, 3) == [200, 100, 50, 0]
    assert opened(to(source, "webp", lossless=True)).getpoint(3, 3) != [200, 100, 50, 0]


def test_webp_loop_and_delay_are_set_for_the_whole_animation(animation: Path) -> None:
    webp = to(animation, "webp", loop=7, delay=90)
    chunks = webp_chunks(webp)
    assert [int.from_bytes(data[12:15], "little") for name, data in chunks if name == b"ANMF"] == [90, 90, 90]
    assert int.from_bytes(dict(chunks)[b"ANIM"][4:6], "little") == 7


def test_webp_frames_are_lossless_where_that_is_smaller_if_they_may_be_mixed(animation: Path) -> None:
    def codecs(path: Path) -> set[bytes]:
        return {data[16:20] for name, data in webp_chunks(path) if name == b"ANMF"}

    assert codecs(to(animation, "webp")) == {b"VP8 "}
    assert codecs(to(animation, "webp", mixed=True)) == {b"VP8L"}


def test_webp_minimum_size_is_smaller_than_the_rest(tmp_path: Path) -> None:
    source = tmp_path / "film.webp"
    strip = film(frames=8, width=64, height=64, delays=(40,) * 8).bandjoin(0) * 0
    patch = picture(20, 20).bandjoin(255).copy(interpretation="srgb")
    for frame in range(8):  # a patch that jumps about in nothing: what is left behind can be wiped away cheaply
        strip = strip.insert(patch, frame * 37 % 44, 64 * frame + frame * 23 % 44)
    strip.cast("uchar").webpsave(str(source), lossless=True)
    small, plain = to(source, "webp", lossless=True, minSize=True), to(source, "webp", lossless=True)
    assert small.stat().st_size < plain.stat().st_size


# PNG


def png_header(path: Path) -> tuple[int, int, int]:
    """Bits, colour type and interlacing."""
    header = dict(png_chunks(path))[b"IHDR"]
    return header[8], header[9], header[12]


def test_png_is_plain_by_default(photo: Path) -> None:
    png = to(photo, "png")
    assert png_header(png) == (8, 2, 0)
    assert difference(opened(photo), opened(png)) == 0


def test_png_compression_level_costs_no_pixel(photo: Path) -> None:
    none, best = to(photo, "png", compressionLevel=0), to(photo, "png", compressionLevel=9)
    assert best.stat().st_size < 96 * 64 * 3 < none.stat().st_size
    assert difference(opened(none), opened(best)) == 0


def test_png_adaptive_filtering_chooses_filters(photo: Path) -> None:
    def filters(path: Path) -> set[int]:
        rows = zlib.decompress(b"".join(data for name, data in png_chunks(path) if name == b"IDAT"))
        return set(rows[:: 1 + 96 * 3])

    assert filters(to(photo, "png")) == {0}
    assert filters(to(photo, "png", adaptiveFiltering=True)) - {0}


def test_png_progressive_is_interlaced(photo: Path) -> None:
    assert png_header(to(photo, "png", progressive=True)) == (8, 2, 1)


def test_png_palette_has_at_most_256_colours(photo: Path) -> None:
    png = to(photo, "png", palette=True)
    assert png_header(png) == (8, 3, 0)
    assert len(dict(png_chunks(png))[b"PLTE"]) <= 3 * 256


@pytest.mark.parametrize(("colours", "bits"), [(2, 1), (4, 2), (16, 4), (200, 8)])
def test_png_colours_are_the_bits_of_the_palette(photo: Path, colours: int, bits: int) -> None:
    png = to(photo, "png", colours=colours)
    assert png_header(png) == (bits, 3, 0)
    assert len(dict(png_chunks(png))[b"PLTE"]) <= 3 * 2**bits


def test_png_palette_quality_dither_and_effort_reach_the_quantiser(tmp_path: Path) -> None:
    def colours(path: Path) -> int:
        return len(dict(png_chunks(path))[b"PLTE"]) // 3

    source = tmp_path / "smooth.png"
    ramp(256, 256).bandjoin([ramp(256, 256).rot90(), 128]).copy(interpretation="srgb").pngsave(str(source))
    plain = to(source, "png", palette=True)
    assert colours(to(source, "png", quality=10)) < colours(plain) == colours(to(source, "png", quality=100))
    assert to(source, "png", dither=0).read_bytes() != plain.read_bytes()
    assert to(source, "png", effort=1).read_bytes() != plain.read_bytes() == to(source, "png", effort=7).read_bytes()


# AVIF


def test_avif_is_one_with_full_colour_by_default(photo: Path) -> None:
    avif = to(photo, "avif")
    assert avif.read_bytes()[4:12] == b"ftypavif"
    assert avif_subsampling(avif) == (0, 0)
    assert (opened(avif).width, opened(avif).height) == (96, 64)


def test_avif_chroma_subsampling_quality_and_effort_reach_the_encoder(photo: Path) -> None:
    assert avif_subsampling(to(photo, "avif", chromaSubsampling="4:2:0")) == (1, 1)
    assert to(photo, "avif", quality=10).stat().st_size < to(photo, "avif", quality=90).stat().st_size
    assert to(photo, "avif", effort=0).read_bytes() != to(photo, "avif", effort=6).read_bytes()


def test_avif_lossless_is_as_good_as_exact(photo: Path) -> None:
    assert difference(opened(photo), opened(to(photo, "avif", lossless=True))) < 1
    assert difference(opened(photo), opened(to(photo, "avif"))) > 1
