"""``convert_output`` as a caller writes it: what is taken, what is refused and where, and what it means to libvips."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyd.errors import InvalidValue
from comfyd.media.convert_options import ConvertOutput, convert_schema, parse_convert

BOUNDS = [
    ("jpeg", "quality", 1, 100),
    ("jpg", "quantisationTable", 0, 8),
    ("jpeg", "quantizationTable", 0, 8),
    ("webp", "quality", 1, 100),
    ("webp", "alphaQuality", 0, 100),
    ("webp", "effort", 0, 6),
    ("webp", "loop", 0, 65535),
    ("webp", "delay", 0, 65535),
    ("png", "compressionLevel", 0, 9),
    ("png", "quality", 0, 100),
    ("png", "effort", 1, 10),
    ("png", "colours", 2, 256),
    ("png", "colors", 2, 256),
    ("png", "dither", 0, 1),
    ("avif", "quality", 1, 100),
    ("avif", "effort", 0, 9),
]
FLAGS = {
    "jpeg": [
        "progressive",
        "optimizeCoding",
        "optimiseCoding",
        "mozjpeg",
        "trellisQuantisation",
        "trellisQuantization",
        "overshootDeringing",
        "optimizeScans",
        "optimiseScans",
    ],
    "webp": ["lossless", "nearLossless", "smartSubsample", "smartDeblock", "exact", "minSize", "mixed"],
    "png": ["adaptiveFiltering", "progressive", "palette"],
    "avif": ["lossless"],
}


def parse(format_: str, **options: Any) -> ConvertOutput:
    return parse_convert({"format": format_, "options": options})


def saver(format_: str, **options: Any) -> dict[str, Any]:
    return dict(parse(format_, **options).options.saver_arguments())


def faults(value: Any) -> dict[str, str]:
    with pytest.raises(InvalidValue) as refused:
        parse_convert(value)
    return {fault.location: fault.message for fault in refused.value.faults}


# What the defaults and shorthands are


def test_defaults_are_those_of_sharp() -> None:
    assert saver("jpeg") == {
        "Q": 80,
        "interlace": False,
        "subsample_mode": "on",
        "optimize_coding": True,
        "trellis_quant": False,
        "overshoot_deringing": False,
        "optimize_scans": False,
        "quant_table": 0,
    }
    assert saver("webp") == {
        "Q": 80,
        "alpha_q": 100,
        "lossless": False,
        "near_lossless": False,
        "smart_subsample": False,
        "smart_deblock": False,
        "preset": "default",
        "effort": 4,
        "exact": False,
        "min_size": False,
        "mixed": False,
    }
    assert saver("png") == {"compression": 6, "filter": "none", "interlace": False}
    assert saver("avif") == {
        "compression": "av1",
        "bitdepth": 8,
        "Q": 50,
        "effort": 4,
        "lossless": False,
        "subsample_mode": "off",
    }


def test_jpg_is_jpeg_by_another_name() -> None:
    jpg, jpeg = parse("jpg", quality=7), parse("jpeg", quality=7)
    assert (jpg.format, jpg.media_type, jpeg.media_type) == ("jpg", "image/jpeg", "image/jpeg")
    assert jpg.options == jpeg.options


@pytest.mark.parametrize("empty", [{}, {"options": None}, {"options": {}}, {"options": {"quality": None}}])
def test_options_may_be_missing_empty_or_null(empty: dict[str, Any]) -> None:
    assert parse_convert({"format": "webp", **empty}) == parse("webp")


def test_metadata_is_stripped_unless_it_is_to_be_kept() -> None:
    assert parse("png").metadata == "strip"
    assert parse_convert({"format": "png", "metadata": "keep"}).metadata == "keep"


MOZJPEG = {
    "interlace": True,
    "trellis_quant": True,
    "overshoot_deringing": True,
    "optimize_scans": True,
    "quant_table": 3,
}


@pytest.mark.parametrize(
    ("options", "meaning"),
    [
        ({"mozjpeg": True}, MOZJPEG),
        ({"mozjpeg": True, "trellisQuantisation": False}, {**MOZJPEG, "trellis_quant": False}),
        ({"mozjpeg": True, "overshootDeringing": False}, {**MOZJPEG, "overshoot_deringing": False}),
        ({"mozjpeg": True, "quantisationTable": 0}, {**MOZJPEG, "quant_table": 0}),
        # As in sharp, where mozjpeg sets "progressive" after the option of that name.
        ({"mozjpeg": True, "optimizeScans": False, "progressive": False}, {**MOZJPEG, "optimize_scans": False}),
        ({"optimizeScans": True, "progressive": False}, {"optimize_scans": True, "interlace": True}),
        ({"optimiseScans": True}, {"optimize_scans": True, "interlace": True}),
        ({"optimiseCoding": False}, {"optimize_coding": False}),
        ({"optimizeCoding": True, "optimiseCoding": False}, {"optimize_coding": True}),
        ({"trellisQuantization": True}, {"trellis_quant": True}),
        ({"quantizationTable": 5, "quantisationTable": 4}, {"quant_table": 5}),
    ],
)
def test_shorthands_and_spellings_of_jpeg_are_those_of_sharp(options: Any, meaning: dict[str, Any]) -> None:
    assert saver("jpeg", **options) == saver("jpeg") | meaning


@pytest.mark.parametrize("option", [{"quality": 90}, {"effort": 3}, {"colours": 9}, {"colors": 9}, {"dither": 0}])
def test_options_of_a_png_palette_ask_for_one_unless_it_is_refused(option: dict[str, Any]) -> None:
    assert saver("png", **option)["palette"] is True
    assert saver("png", **option, palette=False) == saver("png")


@pytest.mark.parametrize(
    ("colours", "bits"), [(2, 1), (3, 2), (4, 2), (5, 2), (8, 2), (9, 4), (16, 4), (128, 4), (129, 8), (256, 8)]
)
def test_a_palette_has_the_bits_that_sharp_gives_it(colours: int, bits: int) -> None:
    assert saver("png", colours=colours)["bitdepth"] == saver("png", colors=colours)["bitdepth"] == bits


@pytest.mark.parametrize("colour", ["#ff8000", "#FF8000", [255, 128, 0]])
def test_a_background_is_written_in_two_ways(colour: Any) -> None:
    options = parse("jpeg", background=colour).options
    assert getattr(options, "background_rgb", None) == (255, 128, 0)


# What is refused, and where


@pytest.mark.parametrize(("format_", "name", "least", "most"), BOUNDS)
def test_the_bounds_are_taken_and_what_is_beyond_is_refused_at_its_place(
    format_: str, name: str, least: int, most: int
) -> None:
    parse(format_, **{name: least})
    parse(format_, **{name: most})
    place = f"convert_output.options.{name}"
    assert faults({"format": format_, "options": {name: least - 1}}) == {place: f"must be >= {least}, got {least - 1}"}
    assert faults({"format": format_, "options": {name: most + 1}}) == {place: f"must be <= {most}, got {most + 1}"}


@given(bound=st.sampled_from(BOUNDS), value=st.integers())
def test_any_number_is_taken_or_refused_as_the_bounds_say(bound: tuple[str, str, int, int], value: int) -> None:
    format_, name, least, most = bound
    if least <= value <= most:
        parse(format_, **{name: value})
    else:
        assert list(faults({"format": format_, "options": {name: value}})) == [f"convert_output.options.{name}"]


@pytest.mark.parametrize(("format_", "name"), [(format_, name) for format_, names in FLAGS.items() for name in names])
@pytest.mark.parametrize("value", [1, "true", []])
def test_a_flag_is_true_or_false_and_nothing_like_it(format_: str, name: str, value: Any) -> None:
    parse(format_, **{name: True})
    parse(format_, **{name: False})
    (place,) = faults({"format": format_, "options": {name: value}})
    assert place == f"convert_output.options.{name}"


@pytest.mark.parametrize(
    ("format_", "name", "value"),
    [
        ("jpeg", "chromaSubsampling", "4:2:2"),
        ("avif", "chromaSubsampling", "4:2:2"),
        ("webp", "preset", "photos"),
        ("jpeg", "quality", 80.5),
        ("jpeg", "quality", "80"),
        ("jpeg", "background", "red"),
        ("jpeg", "background", "#ff80001"),
        ("jpeg", "background", "#ff8000\n"),
        ("jpeg", "background", [1, 2]),
        ("jpeg", "background", 0),
        ("png", "dither", float("nan")),
        ("png", "dither", "1"),
    ],
)
def test_a_wrong_value_is_refused_at_its_place(format_: str, name: str, value: Any) -> None:
    assert list(faults({"format": format_, "options": {name: value}})) == [f"convert_output.options.{name}"]


def test_a_channel_out_of_range_is_named() -> None:
    found = faults({"format": "jpeg", "options": {"background": [0, 256, 0]}})
    assert found == {"convert_output.options.background.1": "must be <= 255, got 256"}


@pytest.mark.parametrize(
    ("format_", "wrong", "right"),
    [
        ("jpeg", "qualty", "quality"),
        ("jpeg", "optimizeScan", "optimizeScans"),
        ("webp", "nearLosless", "nearLossless"),
        ("png", "compresionLevel", "compressionLevel"),
        ("avif", "efort", "effort"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_known_one(format_: str, wrong: str, right: str) -> None:
    found = faults({"format": format_, "options": {wrong: 1}})
    assert found == {f"convert_output.options.{wrong}": f'unknown field; did you mean "{right}"?'}


@pytest.mark.parametrize(
    ("format_", "foreign"), [("jpeg", "lossless"), ("webp", "mozjpeg"), ("png", "mozjpeg"), ("avif", "progressive")]
)
def test_an_option_of_another_format_is_refused(format_: str, foreign: str) -> None:
    assert list(faults({"format": format_, "options": {foreign: True}})) == [f"convert_output.options.{foreign}"]


def test_every_fault_is_told_at_once() -> None:
    value = {"format": "jpeg", "options": {"quality": 0, "mozjpeg": 1, "qualty": 2}, "metadata": "some", "more": 1}
    assert set(faults(value)) == {
        "convert_output.options.quality",
        "convert_output.options.mozjpeg",
        "convert_output.options.qualty",
        "convert_output.metadata",
        "convert_output.more",
    }


@pytest.mark.parametrize("format_", ["gif", "JPEG", "", 1, None, ["jpeg"], {}])
def test_a_wrong_format_is_refused_together_with_what_else_is_wrong(format_: Any) -> None:
    found = faults({"format": format_, "options": [], "metadata": "some"})
    assert set(found) == {"convert_output.format", "convert_output.options", "convert_output.metadata"}


@pytest.mark.parametrize("value", ["jpeg", ["jpeg"], 1, True])
def test_what_is_no_object_is_refused(value: Any) -> None:
    assert list(faults(value)) == ["convert_output"]


def test_the_location_is_the_callers() -> None:
    with pytest.raises(InvalidValue) as refused:
        parse_convert({"format": "png", "options": {"quality": 101}}, location="input.convert")
    assert refused.value.faults[0].location == "input.convert.options.quality"


# The published schema


def test_the_schema_has_a_case_for_each_format_with_the_bounds_and_no_dangling_reference() -> None:
    schema, components = convert_schema(ref_template="#/parts/{name}")
    mapping = schema["discriminator"]["mapping"]
    assert list(mapping) == ["jpeg", "jpg", "webp", "png", "avif"]
    assert {case["$ref"] for case in schema["oneOf"]} == set(mapping.values())
    for format_, name, least, most in BOUNDS:
        case = components[mapping[format_].removeprefix("#/parts/")]
        assert format_ in case["properties"]["format"]["enum"]
        assert (case["required"], case["additionalProperties"]) == (["format"], False)
        options = components[case["properties"]["options"]["$ref"].removeprefix("#/parts/")]
        assert options["additionalProperties"] is False
        option = options["properties"][name]
        numeric = option["anyOf"][0] if "anyOf" in option else option
        assert (numeric["minimum"], numeric["maximum"]) == (least, most)
        assert option["description"]


def test_the_schema_knows_the_same_options_as_the_parser() -> None:
    schema, components = convert_schema(ref_template="{name}")
    for format_, reference in schema["discriminator"]["mapping"].items():
        options = components[components[reference]["properties"]["options"]["$ref"]]["properties"]
        assert set(FLAGS.get(format_, ())) <= set(options)
        for name in options:
            found = faults({"format": format_, "options": {name: {}}})
            assert list(found) == [f"convert_output.options.{name}"]
            assert "unknown" not in found[f"convert_output.options.{name}"]
