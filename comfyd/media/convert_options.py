"""What a caller may ask of ``convert_output``: the formats, and for each its own options.

Names, defaults and shorthands are sharp's (0.35, ``output.js``), as comfyui-api passes them to it; so that an option
means here what it means there. Each class also says what its options are called in libvips.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import attrs
from msgspec import Meta

from comfyd.wire import json_schema, structure, wire_field

Format = Literal["jpeg", "jpg", "webp", "png", "avif"]
Byte = Annotated[int, Meta(ge=0, le=255)]
Colour = tuple[int, int, int]
OPTIMIZE_CODING_PIXELS: Final = 4096 * 4096
"""Up to here a JPEG's coding is optimised unless the caller says no: that holds 6 bytes a pixel, so 100 MB."""
SaverArguments = Mapping[str, Any]
"""Keyword arguments of a saver of libvips."""


@attrs.frozen(kw_only=True)
class JpegOptions:
    """How a JPEG is written. Where there are two spellings and both are given, the American one counts, as in sharp.

    A field is None where the caller left it out, if a shorthand then decides: mozjpeg sets only what was not given.
    """

    quality: Annotated[int, Meta(ge=1, le=100, description="1 is the smallest file, 100 the best picture.")] = 80
    progressive: Annotated[bool | None, Meta(description="Several scans, coarse to fine. False unless implied.")] = None
    chroma_subsampling: Annotated[
        Literal["4:2:0", "4:4:4"], Meta(description="4:4:4 keeps colour at full resolution.")
    ] = wire_field("chromaSubsampling", default="4:2:0")
    optimize_coding: Annotated[
        bool | None,
        Meta(description="Huffman tables made for this picture. True by default, up to 4096 x 4096 pixels."),
    ] = wire_field("optimizeCoding", default=None)
    optimise_coding: Annotated[bool | None, Meta(description="The same as optimizeCoding.")] = wire_field(
        "optimiseCoding", default=None
    )
    mozjpeg: Annotated[
        bool,
        Meta(
            description="Smaller and slower: progressive, trellisQuantisation, overshootDeringing, optimizeScans and "
            "quantisationTable 3, each where it is not given by itself."
        ),
    ] = False
    trellis_quantisation: Annotated[bool | None, Meta(description="False unless mozjpeg.")] = wire_field(
        "trellisQuantisation", default=None
    )
    trellis_quantization: Annotated[bool | None, Meta(description="The same as trellisQuantisation.")] = wire_field(
        "trellisQuantization", default=None
    )
    overshoot_deringing: Annotated[bool | None, Meta(description="False unless mozjpeg.")] = wire_field(
        "overshootDeringing", default=None
    )
    optimize_scans: Annotated[bool | None, Meta(description="Implies progressive. False unless mozjpeg.")] = wire_field(
        "optimizeScans", default=None
    )
    optimise_scans: Annotated[bool | None, Meta(description="The same as optimizeScans.")] = wire_field(
        "optimiseScans", default=None
    )
    quantisation_table: Annotated[
        Annotated[int, Meta(ge=0, le=8)] | None, Meta(description="Which of mozjpeg's tables. 0 unless mozjpeg.")
    ] = wire_field("quantisationTable", default=None)
    quantization_table: Annotated[
        Annotated[int, Meta(ge=0, le=8)] | None, Meta(description="The same as quantisationTable.")
    ] = wire_field("quantizationTable", default=None)
    background: Annotated[
        Annotated[str, Meta(pattern="^#[0-9A-Fa-f]{6}$", extra={"must": "be a colour such as #ff8000"})]
        | tuple[Byte, Byte, Byte],
        Meta(description="What shows through where the picture is transparent: #rrggbb or [r, g, b]."),
    ] = "#000000"

    @property
    def background_rgb(self) -> Colour:
        """The colour as red, green and blue, each 0 to 255."""
        if isinstance(self.background, tuple):
            return self.background
        red, green, blue = bytes.fromhex(self.background[1:])
        return red, green, blue

    def saver_arguments(self) -> SaverArguments:
        """These options in libvips' words (``jpegsave``)."""
        optimize_scans = _first(self.optimize_scans, self.optimise_scans, self.mozjpeg)
        return {
            "Q": self.quality,
            # sharp: the two shorthands make it progressive even where "progressive": false stands beside them.
            "interlace": bool(self.progressive or self.mozjpeg or optimize_scans),
            "subsample_mode": _subsample_mode(self.chroma_subsampling),
            "optimize_coding": _first(self.optimize_coding, self.optimise_coding, True),
            "trellis_quant": _first(self.trellis_quantization, self.trellis_quantisation, self.mozjpeg),
            "overshoot_deringing": _first(self.overshoot_deringing, self.mozjpeg),
            "optimize_scans": optimize_scans,
            "quant_table": _first(self.quantization_table, self.quantisation_table, 3 if self.mozjpeg else 0),
        }


@attrs.frozen(kw_only=True)
class WebpOptions:
    """How a WebP is written."""

    quality: Annotated[int, Meta(ge=1, le=100, description="1 is the smallest file, 100 the best picture.")] = 80
    alpha_quality: Annotated[int, Meta(ge=0, le=100, description="Quality of the transparency.")] = wire_field(
        "alphaQuality", default=100
    )
    lossless: Annotated[bool, Meta(description="Every pixel stays as it is.")] = False
    near_lossless: Annotated[
        bool, Meta(description="Lossless coding of pixels slightly changed; quality says how slightly.")
    ] = wire_field("nearLossless", default=False)
    smart_subsample: Annotated[bool, Meta(description="Sharper colour edges, slower.")] = wire_field(
        "smartSubsample", default=False
    )
    smart_deblock: Annotated[bool, Meta(description="Adjusts the deblocking filter, slower.")] = wire_field(
        "smartDeblock", default=False
    )
    preset: Annotated[
        Literal["default", "photo", "picture", "drawing", "icon", "text"],
        Meta(description="What kind of picture it is; tunes the lossy encoder."),
    ] = "default"
    effort: Annotated[int, Meta(ge=0, le=6, description="0 is the fastest, 6 the smallest.")] = 4
    exact: Annotated[bool, Meta(description="Keep the colour of pixels that are wholly transparent.")] = False
    min_size: Annotated[bool, Meta(description="Animations: as small as can be, slow.")] = wire_field(
        "minSize", default=False
    )
    mixed: Annotated[bool, Meta(description="Animations: lossy and lossless frames mixed.")] = False
    loop: Annotated[
        Annotated[int, Meta(ge=0, le=65535)] | None,
        Meta(description="Animations: how often they run, 0 for ever. As in the source by default."),
    ] = None
    delay: Annotated[
        Annotated[int, Meta(ge=0, le=65535)] | None,
        Meta(description="Animations: milliseconds of each frame. As in the source by default."),
    ] = None

    def saver_arguments(self) -> SaverArguments:
        """These options in libvips' words (``webpsave``)."""
        return {
            "Q": self.quality,
            "alpha_q": self.alpha_quality,
            "lossless": self.lossless,
            "near_lossless": self.near_lossless,
            "smart_subsample": self.smart_subsample,
            "smart_deblock": self.smart_deblock,
            "preset": self.preset,
            "effort": self.effort,
            "exact": self.exact,
            "min_size": self.min_size,
            "mixed": self.mixed,
        }


@attrs.frozen(kw_only=True)
class PngOptions:
    """How a PNG is written. Giving any of quality, effort, colours or dither asks for a palette, as in sharp."""

    compression_level: Annotated[int, Meta(ge=0, le=9, description="0 is the fastest, 9 the smallest.")] = wire_field(
        "compressionLevel", default=6
    )
    adaptive_filtering: Annotated[bool, Meta(description="Choose a filter for each row.")] = wire_field(
        "adaptiveFiltering", default=False
    )
    progressive: Annotated[bool, Meta(description="Interlaced, coarse to fine.")] = False
    palette: Annotated[bool | None, Meta(description="At most 256 colours. False unless implied.")] = None
    quality: Annotated[
        Annotated[int, Meta(ge=0, le=100)] | None,
        Meta(description="With a palette: as few colours as this quality needs. 100 by default."),
    ] = None
    effort: Annotated[
        Annotated[int, Meta(ge=1, le=10)] | None,
        Meta(description="With a palette: 1 is the fastest, 10 the best. 7 by default."),
    ] = None
    colours: Annotated[
        Annotated[int, Meta(ge=2, le=256)] | None,
        Meta(description="With a palette: so many colours at most; rounded down to 2, 4, 16 or 256. 256 by default."),
    ] = None
    colors: Annotated[Annotated[int, Meta(ge=2, le=256)] | None, Meta(description="The same as colours.")] = None
    dither: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(description="With a palette: how much errors are spread, 1 by default."),
    ] = None

    @property
    def has_palette(self) -> bool:
        """Whether the colours are to be reduced to a palette."""
        if self.palette is not None:
            return self.palette
        return any(given is not None for given in (self.quality, self.effort, self.colours, self.colors, self.dither))

    def saver_arguments(self) -> SaverArguments:
        """These options in libvips' words (``pngsave``)."""
        arguments: dict[str, Any] = {
            "compression": self.compression_level,
            "filter": "all" if self.adaptive_filtering else "none",
            "interlace": self.progressive,
        }
        if self.has_palette:
            arguments |= {
                "palette": True,
                "Q": _first(self.quality, 100),
                "effort": _first(self.effort, 7),
                "dither": _first(self.dither, 1.0),
                "bitdepth": _palette_bits(_first(self.colours, self.colors, 256)),
            }
        return arguments


@attrs.frozen(kw_only=True)
class AvifOptions:
    """How an AVIF is written."""

    quality: Annotated[int, Meta(ge=1, le=100, description="1 is the smallest file, 100 the best picture.")] = 50
    effort: Annotated[
        int, Meta(ge=0, le=9, description="0 is the fastest, 9 the smallest; the higher, the fewer pixels are taken.")
    ] = 4
    lossless: Annotated[bool, Meta(description="Keeps (nearly) every pixel as it is; large.")] = False
    chroma_subsampling: Annotated[
        Literal["4:4:4", "4:2:0"], Meta(description="4:2:0 halves the resolution of colour.")
    ] = wire_field("chromaSubsampling", default="4:4:4")

    def saver_arguments(self) -> SaverArguments:
        """These options in libvips' words (``heifsave``)."""
        return {
            "compression": "av1",
            "bitdepth": 8,
            "Q": self.quality,
            "effort": self.effort,
            "lossless": self.lossless,
            "subsample_mode": _subsample_mode(self.chroma_subsampling),
        }


Options = JpegOptions | WebpOptions | PngOptions | AvifOptions
Metadata = Annotated[
    Literal["strip", "keep"],
    Meta(description="What is beside the pixels: EXIF, XMP, colour profile, ComfyUI's prompt and workflow."),
]


@attrs.frozen(kw_only=True)
class ConvertOutput:
    """The ``convert_output`` of a request. Made by :func:`parse_convert`, and then one of the four classes below."""

    format: Format
    options: Options
    metadata: Metadata = "strip"

    @property
    def media_type(self) -> str:
        """The media type of what comes out."""
        return "image/jpeg" if self.format == "jpg" else f"image/{self.format}"


@attrs.frozen(kw_only=True)
class ConvertToJpeg(ConvertOutput):
    """Every picture becomes a JPEG; the two names differ in the ending of the file only."""

    format: Literal["jpeg", "jpg"]
    options: JpegOptions = attrs.field(factory=JpegOptions)


@attrs.frozen(kw_only=True)
class ConvertToWebp(ConvertOutput):
    """Every picture becomes a WebP; animations stay animated."""

    format: Literal["webp"]
    options: WebpOptions = attrs.field(factory=WebpOptions)


@attrs.frozen(kw_only=True)
class ConvertToPng(ConvertOutput):
    """Every picture becomes a PNG."""

    format: Literal["png"]
    options: PngOptions = attrs.field(factory=PngOptions)


@attrs.frozen(kw_only=True)
class ConvertToAvif(ConvertOutput):
    """Every picture becomes an AVIF."""

    format: Literal["avif"]
    options: AvifOptions = attrs.field(factory=AvifOptions)


@attrs.frozen(kw_only=True)
class _ConvertToSomething:
    """What is held against a value whose format is missing or wrong, so that the faults beside it are told too."""

    format: Format
    options: dict[str, Any] = attrs.field(factory=dict)
    metadata: Metadata = "strip"


_SHAPES: Final[Mapping[Any, type[ConvertOutput]]] = {
    "jpeg": ConvertToJpeg,
    "jpg": ConvertToJpeg,
    "webp": ConvertToWebp,
    "png": ConvertToPng,
    "avif": ConvertToAvif,
}


def parse_convert(value: Any, *, location: str = "convert_output") -> ConvertOutput:
    """Structure a decoded ``convert_output``.

    Raises:
        InvalidValue: with every fault, each at its place below *location* (``convert_output.options.quality``).
    """
    format_ = value.get("format") if isinstance(value, dict) else None
    shape = _SHAPES.get(format_) if isinstance(format_, str) else None
    if shape is not None:
        return structure(shape, value, location=location)
    structure(_ConvertToSomething, value, location=location)
    raise AssertionError(f"format {format_!r} passed the schema, and no class is for it")


def convert_schema(*, ref_template: str = "#/components/schemas/{name}") -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the JSON Schema of ``convert_output``, one case for each format, and the components that it refers to."""
    shapes = tuple(dict.fromkeys(_SHAPES.values()))
    cases, components = json_schema(*shapes, ref_template=ref_template)
    references = dict(zip(shapes, cases, strict=True))
    mapping = {format_: references[shape]["$ref"] for format_, shape in _SHAPES.items()}
    schema = {"oneOf": list(cases), "discriminator": {"propertyName": "format", "mapping": mapping}}
    return schema, components


def _first(*candidates: Any) -> Any:
    """The first that is given; the last always is."""
    return next(candidate for candidate in candidates if candidate is not None)


def _subsample_mode(chroma_subsampling: str) -> str:
    # libvips' "auto" would turn subsampling off by itself from a quality of 90 on; sharp does as it is told.
    return "off" if chroma_subsampling == "4:4:4" else "on"


def _palette_bits(colours: int) -> int:
    """Bits of a pixel in a palette of *colours*. PNG has 1, 2, 4 and 8; sharp rounds down, so 8 colours become 4."""
    bits = (colours - 1).bit_length()
    return 1 << (bits.bit_length() - 1)
