"""The art: a procedural painter that stands in for diffusion.

It needs no model and invents nothing: it repaints a picture as brush strokes that follow the picture's own contours and
a seeded swirl, layer upon layer, wide strokes first. Without a picture it makes one, of warped noise in colours taken
from the text. Everything follows from the seed, the text and the numbers given; libvips does the pixels.

Strokes are noise smeared along a flow field (line-integral convolution). Smearing over 2^n pixels takes n look-ups, not
2^n, because flow maps compose: where a pixel is carried in 2k steps is where it is carried in k steps, twice.
"""

import cmath
import math
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, Final

import attrs

from comfyd.embedded.nodes.pictures import vips

# The painter's measures are for a picture of this side; others scale with the root of their area.
_REFERENCE_SIDE_PX: Final = 640

# Strokes are at most 2**6 pixels of the half-size picture long; those painted at full size, 2**5.
_DOUBLINGS: Final = 6
_FINE_DOUBLINGS: Final = 5

# Strokes up to this half-width are painted at full size.
_FINE_PX: Final = 2.2

# Words that say a colour, as (hue in degrees of CIE LCh). Other words give a hue by their hash.
_HUES: Final = {
    "red": 35, "rose": 10, "fire": 50, "sunset": 55, "autumn": 60, "orange": 60, "gold": 80, "golden": 80, "sun": 85,
    "yellow": 95, "spring": 115, "forest": 140, "green": 140, "jade": 165, "sea": 225, "ocean": 235, "water": 230,
    "sky": 255, "blue": 270, "winter": 260, "night": 285, "violet": 305, "purple": 310, "dream": 315, "pink": 350,
}  # fmt: skip


_RIM_PX: Final = 3

# Ranges of hills in a landscape.
_RANGES: Final = 6

# Lightness and chroma of a palette, from shade to light.
_STOPS: Final = ((12, 20), (32, 40), (54, 52), (76, 44), (94, 14))


@attrs.frozen(kw_only=True)
class Brief:
    """What to paint, and how. *strength* is 0 (leave the picture) to 1; *boldness* scales the strokes, 1 is usual."""

    text: str
    seed: int
    strength: float = 1.0
    guidance: float = 7.0
    boldness: float = 1.0


@attrs.frozen(kw_only=True)
class Painting:
    """A painting at some stage.

    *subject* is the picture painted from, None before there is one; *canvas* the colours put down so far, both float,
    0..255, three bands; *relief* how thick the paint lies, one float band around 0.
    """

    width_px: int
    height_px: int
    subject: Any = attrs.field(default=None, repr=False)
    canvas: Any = attrs.field(default=None, repr=False)
    relief: Any = attrs.field(default=None, repr=False)


def paint(painting: Painting, brief: Brief, *, first: int, last: int, steps: int) -> Iterator[Painting]:
    """Paint the layers *first* to *last* (exclusive) of *steps*, yielding the painting after each one.

    Wide strokes are painted at half size, which takes a quarter of the time and shows no difference.
    """
    subject = painting.subject
    if subject is None:
        subject = _imagine(painting.width_px, painting.height_px, brief)
    side = math.sqrt(painting.width_px * painting.height_px) / _REFERENCE_SIDE_PX * brief.boldness
    lively = _livelier(subject, brief)
    half_easel = _Easel.at_half(lively, brief, side)
    easel = half_easel
    canvas = subject if painting.canvas is None else painting.canvas
    relief = vips().Image.black(subject.width, subject.height) if painting.relief is None else painting.relief
    for step in range(first, last):
        left = 1 - (step + 1) / steps
        width = max(0.7, side * (1.1 + (1.5 + 9.0 * brief.strength) * left**1.5))  # half a stroke's width, in pixels
        if width <= _FINE_PX and easel is half_easel:
            easel = half_easel.doubled(lively)
        canvas, relief = _layer(easel, _sized(canvas, easel.subject), _sized(relief, easel.subject), width, left, step)
        yield attrs.evolve(painting, subject=subject, canvas=canvas, relief=relief)


def finished(painting: Painting) -> Any:
    """Light the paint from the upper left and return the picture: uchar sRGB, three bands."""
    if painting.canvas is None and painting.subject is None:
        picture = vips().Image.black(painting.width_px, painting.height_px, bands=3) + 127
    elif painting.canvas is None:
        picture = painting.subject + 0.5
    else:
        slope = painting.relief.conv(_matrix([[-2, -1, 0], [-1, 0, 1], [0, 1, 2]]), precision="float")
        wide, high = slope.width, slope.height  # at the rim the strokes come from nowhere, and would glitter
        slope = slope.crop(_RIM_PX, _RIM_PX, wide - 2 * _RIM_PX, high - 2 * _RIM_PX)
        slope = slope.embed(_RIM_PX, _RIM_PX, wide, high, extend="copy")
        lit = painting.canvas * (1 + slope * 0.055) + slope * 3.2 + 0.5
        picture = lit.resize(painting.width_px / lit.width, vscale=painting.height_px / lit.height, kernel="cubic")
    return picture.cast("uchar").copy(interpretation="srgb")


def _layer(easel: "_Easel", canvas: Any, relief: Any, width: float, left: float, step: int) -> tuple[Any, Any]:
    """Put one layer of strokes down. The brush grows finer, and fine strokes go where there is something to say."""
    brief, subject = easel.brief, easel.subject
    width = width / easel.pixel
    length = max(2, min(len(easel.forwards), round(math.log2(width * 7))))
    # Noise for the strokes, for the bristles in them, and for their tint; and the colours the brush picks up.
    loaded = easel.noise(f"strokes {step}", width * 0.6).bandjoin(
        [
            easel.noise(f"bristles {step}", easel.side * 0.55 / easel.pixel),
            easel.noise(f"tint {step}", width * 1.3),
            _softened(subject, width * 0.7),
        ]
    )
    stroked = easel.smeared(loaded, length)
    strokes, bristles, tint = (_standard(stroked.extract_band(band)) for band in range(3))
    shade = bristles * (2.2 + 2.0 * brief.strength)
    warmth = tint * (2.0 + 4.0 * brief.strength * left)
    colour = stroked.extract_band(3, n=3) + (shade + warmth * 0.7).bandjoin([shade + warmth * 0.2, shade - warmth])
    # Coverage: all of it at first, then strokes on top of strokes, then only where the subject still differs.
    need = _softened((subject - canvas).abs().bandmean(), width) - 5.0 * left
    mask = ((strokes + 0.6 - 2.0 * (1 - left) + (need / 11.0).clamp(min=-0.5, max=2.4)) * 2.2).clamp(min=0, max=1)
    mask = (mask * min(1.0, brief.strength * 1.4)).copy_memory()
    canvas = (canvas + (colour - canvas) * mask).clamp(min=0, max=255).copy_memory()
    thickness = (bristles * 0.55 + strokes * 0.45) * (0.55 + 0.45 * left)
    return canvas, (relief + (thickness - relief) * mask).copy_memory()


@attrs.frozen(kw_only=True)
class _Easel:
    """What one size of a picture is painted with. *pixel* is how many pixels of the picture one pixel here stands for.

    The maps say where each pixel is carried along the field by 1, 2, 4, ... pixels, forwards and backwards.
    """

    brief: Brief
    subject: Any
    side: float
    pixel: int
    white: Any
    forwards: tuple[Any, ...]
    backwards: tuple[Any, ...]

    @classmethod
    def at_half(cls, full: Any, brief: Brief, side: float) -> "_Easel":
        """Set up at half size, with directions from the picture's contours, and from a swirl where it has none."""
        subject = full.resize(0.5, kernel="linear").copy_memory()
        field = _directions(subject, brief, side / 2)
        here = _here(subject)
        return cls(
            brief=brief,
            subject=subject,
            side=side,
            pixel=2,
            white=_white(subject, brief, "half"),
            forwards=_doublings(_inside(here + field)),
            backwards=_doublings(_inside(here - field)),
        )

    def doubled(self, full: Any) -> "_Easel":
        """The same at full size. A pixel here is half a pixel there, so the maps are those of half the way."""
        return attrs.evolve(
            self,
            subject=full,
            pixel=1,
            white=_white(full, self.brief, "full"),
            forwards=self._doubled_maps(self.forwards, full),
            backwards=self._doubled_maps(self.backwards, full),
        )

    def _doubled_maps(self, maps: tuple[Any, ...], full: Any) -> tuple[Any, ...]:
        here, coarse = _here(full), _here(self.subject)
        # Fine strokes are short: the long maps are not needed at this size.
        ways = [_sized(map_ - coarse, full) for map_ in maps[:_FINE_DOUBLINGS]]
        return tuple(_inside(here + way).copy_memory() for way in (ways[0], *(way * 2 for way in ways[:-1])))

    def noise(self, tag: str, grain_px: float) -> Any:
        """Smooth noise with grains of that size: a random piece of the prepared white noise, blown up."""
        zoom = max(1.0, grain_px * 1.5)
        columns = min(self.white.width, math.ceil(self.subject.width / zoom) + 2)
        rows = min(self.white.height, math.ceil(self.subject.height / zoom) + 2)
        x = int(_fraction(self.brief, f"{tag} x") * (self.white.width - columns))
        y = int(_fraction(self.brief, f"{tag} y") * (self.white.height - rows))
        piece = self.white.crop(x, y, columns, rows)
        piece = piece.resize(zoom, kernel="cubic") if zoom > 1 else piece.gaussblur(max(0.4, grain_px))
        return piece.crop(0, 0, self.subject.width, self.subject.height)

    def smeared(self, picture: Any, doublings: int) -> Any:
        """Average along the field, over 2**doublings pixels with each pixel in the middle."""
        picture = _looked_up(picture.copy_memory(), self.backwards[doublings - 1]).copy_memory()
        for map_ in self.forwards[:doublings]:
            picture = ((picture + _looked_up(picture, map_)) * 0.5).copy_memory()
        return picture


def _directions(subject: Any, brief: Brief, side: float) -> Any:
    """A unit vector for each pixel, two bands: along contours where they are clear, along the swirl elsewhere."""
    across, down = _swirl(subject, brief, side)
    grey = _softened(subject.bandmean(), 1.6 * side)
    gx = grey.conv(_sobel(), precision="float")
    gy = grey.conv(_sobel().rot90(), precision="float")
    tensor = _softened((gx * gx).bandjoin([gx * gy, gy * gy]), 3.2 * side).copy_memory()
    xx, xy, yy = (tensor.extract_band(band) for band in range(3))
    angle = (xy * 2).atan2(xx - yy) * 0.5 + 90  # degrees; contours run at right angles to the gradient
    cx, cy = angle.cos(), angle.sin()
    # A contour has no sense of direction; that of the swirl is taken, so that neighbours agree.
    sense = ((cx * across + cy * down) < 0).ifthenelse(-1.0, 1.0)
    energy = (xx + yy).clamp(min=0, max=1e9) ** 0.5
    trust = energy / (energy + 26.0)
    vx = _softened(cx * sense * trust + across * (1 - trust) * 0.5, 1.2 * side)
    vy = _softened(cy * sense * trust + down * (1 - trust) * 0.5, 1.2 * side)
    size = (vx * vx + vy * vy) ** 0.5 + 1e-4
    return (vx / size).bandjoin(vy / size).copy_memory()


def _doublings(one_pixel: Any) -> tuple[Any, ...]:
    maps = [one_pixel.copy_memory()]
    while len(maps) < _DOUBLINGS:
        maps.append(_looked_up(maps[-1], maps[-1]).copy_memory())
    return tuple(maps)


def _looked_up(picture: Any, where: Any) -> Any:
    return picture.mapim(where, interpolate=vips().Interpolate.new("bilinear"), extend="copy")


def _inside(where: Any) -> Any:
    """Keep a map within the picture: beyond it, libvips finds black."""
    across, down = (where.extract_band(band).clamp(min=0, max=size - 1) for band, size in enumerate(_size(where)))
    return across.bandjoin(down)


def _size(picture: Any) -> tuple[int, int]:
    return picture.width, picture.height


def _here(like: Any) -> Any:
    return vips().Image.xyz(like.width, like.height).cast("float")


def _sized(picture: Any, like: Any) -> Any:
    if (picture.width, picture.height) == (like.width, like.height):
        return picture
    across, down = like.width / picture.width, like.height / picture.height
    sized = picture.resize(across, vscale=down, kernel="linear")
    return sized.embed(0, 0, like.width, like.height, extend="copy").copy_memory()


def _softened(picture: Any, radius_px: float) -> Any:
    """Blur. Wide blurs shrink and enlarge, for a Gaussian of float pixels is slow in proportion to its width."""
    if radius_px < 1.5:
        return picture.gaussblur(radius_px) if radius_px >= 0.4 else picture
    factor = min(radius_px * 1.4, picture.width / 4, picture.height / 4)
    small = picture.resize(1 / factor, kernel="linear")
    return _sized(small, picture)


def _white(like: Any, brief: Brief, tag: str) -> Any:
    """White noise, larger than the picture, to cut pieces from."""
    width, height = like.width + 256, like.height + 256
    return vips().Image.gaussnoise(width, height, mean=0, sigma=1, seed=_seed(brief, f"white {tag}")).copy_memory()


def _matrix(rows: list[list[float]], scale: float = 1.0) -> Any:
    return vips().Image.new_from_array(rows, scale=scale)


def _sobel() -> Any:
    return _matrix([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], scale=4)


def _swirl(subject: Any, brief: Brief, side: float) -> tuple[Any, Any]:
    """A smooth unit field of eddies: along the level lines of low-frequency noise."""
    hills = _cloud(subject.width, subject.height, brief, "swirl", 190 * side) + 0.22 * _cloud(
        subject.width, subject.height, brief, "eddies", 80 * side
    )
    dx = hills.conv(_sobel(), precision="float")
    dy = hills.conv(_sobel().rot90(), precision="float")
    size = (dx * dx + dy * dy) ** 0.5 + 1e-6
    return dy / size * -1, dx / size


def _cloud(width: int, height: int, brief: Brief, tag: str, grain_px: float) -> Any:
    """Smooth noise with features of about *grain_px*, mean about 0, deviation about 1."""
    cell = max(4, round(grain_px))
    return vips().Image.perlin(width, height, cell_size=cell, seed=_seed(brief, tag)) * 3.6


def _standard(picture: Any) -> Any:
    """Shift and scale to mean 0 and deviation 1."""
    return (picture - picture.avg()) / max(1e-6, picture.deviate())


def _seed(brief: Brief, tag: str) -> int:
    digest = blake2b(f"{brief.seed}|{brief.text}|{tag}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF  # libvips takes a signed int


def _livelier(subject: Any, brief: Brief) -> Any:
    """Strengthen colour and contrast, as a painter would; more with more guidance."""
    chroma = 1.0 + brief.strength * min(0.5, 0.08 + 0.015 * brief.guidance)
    lch = (subject + 0.5).cast("uchar").copy(interpretation="srgb").colourspace("lch")
    light, colour, hue = lch.extract_band(0), lch.extract_band(1), lch.extract_band(2)
    light = light + (light - 50) * (0.06 * brief.strength)
    lively = light.bandjoin([(colour * chroma), hue]).copy(interpretation="lch")
    return lively.colourspace("srgb").cast("float").copy_memory()


def _imagine(width: int, height: int, brief: Brief) -> Any:
    """Make a subject out of nothing but the text: ranges of hills under a low sun, in the text's colours."""
    side = math.sqrt(width * height) / _REFERENCE_SIDE_PX
    here = vips().Image.xyz(width, height).cast("float")
    down = here.extract_band(1) / height
    horizon = 0.42 + 0.16 * _fraction(brief, "horizon")
    # Values are places in the palette, 0 the darkest; the sky grows lighter towards the horizon.
    wind = _cloud(width, height, brief, "wind x", 190 * side).bandjoin(
        _cloud(width, height, brief, "wind y", 190 * side)
    )
    clouds = _cloud(width, height, brief, "clouds", 150 * side) + 0.5 * _cloud(width, height, brief, "wisps", 60 * side)
    folded = _looked_up(clouds, _inside(here + wind * (45 * side)))
    value = down * (72 / horizon) + folded * (1.25 - down) * 16 + 112
    sun_x, sun_y = 0.2 + 0.6 * _fraction(brief, "sun x"), horizon - 0.06 - 0.16 * _fraction(brief, "sun y")
    aside, above = here.extract_band(0) / width - sun_x, (down - sun_y) * (height / width)
    distance = (aside * aside + above * above) ** 0.5
    glow = (distance * distance * -16.0).exp()
    disc = ((0.052 - distance) * (width / 3.0)).clamp(min=0, max=1)
    value = value + glow * 34 + disc * 70
    for number in range(_RANGES):
        depth = number / (_RANGES - 1)  # 0 is the farthest
        rough = _ridge(width, height, brief, f"range {number}", (260 - 110 * depth) * side)
        crest = horizon + (0.94 - horizon) * depth**1.15 - rough * (0.035 + 0.05 * depth)
        below = down - crest
        ground = 168 - 148 * depth**0.8 + below.clamp(min=0, max=0.3) * (150 - 60 * depth) + glow * 34 * (1 - depth)
        value = value + (ground - value) * (below * (height / 2.0)).clamp(min=0, max=1)
    index = value.clamp(min=0, max=255).cast("uchar")
    colours = index.maplut(_palette(brief)).copy(interpretation="lab").colourspace("srgb").cast("float")
    return (colours + glow * [26, 16, 2]).clamp(min=0, max=255).copy_memory()


def _ridge(width: int, height: int, brief: Brief, tag: str, grain_px: float) -> Any:
    """The outline of a range of hills: a row of noise, repeated downwards."""
    row = sum(
        _cloud(width, 8, brief, f"{tag} {octave}", grain_px / 2**octave).crop(0, 3, width, 1) * 0.5**octave
        for octave in range(4)
    )
    return row.replicate(1, height)


def _palette(brief: Brief) -> Any:
    """A table of 256 Lab colours, dark to light, through the hues that the words give."""
    words = [word.strip(".,;:!?()").lower() for word in brief.text.split()]
    named = [float(_HUES[word]) for word in words if word in _HUES][:3]
    base = 360 * _fraction(brief, "hue", with_seed=False)
    hues = named or [base]
    if len(hues) == 1:
        hues = [hues[0] + 150, hues[0], hues[0] + 40]  # one colour alone is dull: add its near-complement
    hues.sort(key=lambda hue: -abs((hue - 75 + 180) % 360 - 180))  # the light is warm, the shade is not
    points = []
    for number, (light, chroma) in enumerate(_STOPS):
        place = number / (len(_STOPS) - 1) * (len(hues) - 1)
        below = min(int(place), len(hues) - 2)
        start, end = (cmath.rect(chroma, math.radians(hue)) for hue in hues[below : below + 2])
        # Straight through the colour plane, by way of grey if need be: the long way round would be a rainbow.
        colour = start + (end - start) * (place - below)
        points.append((light, colour.real, colour.imag))
    rows = [_matrix([[point[band] for point in points]]) for band in range(3)]
    bands = [row.resize(256 / len(points), vscale=1, kernel="cubic").crop(0, 0, 256, 1) for row in rows]
    return bands[0].bandjoin(bands[1:]).cast("float").copy_memory()


def _fraction(brief: Brief, tag: str, *, with_seed: bool = True) -> float:
    key = brief if with_seed else attrs.evolve(brief, seed=0)
    return _seed(key, tag) / 0x7FFFFFFF
