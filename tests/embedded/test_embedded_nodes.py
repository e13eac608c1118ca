"""What each image and text node computes, down to the pixel."""

import threading
from pathlib import Path
from typing import Any

import pytest
import pyvips

from comfyd.embedded.models import Models
from comfyd.embedded.nodes import NODE_TYPES
from comfyd.embedded.nodes.pictures import Images, batch
from comfyd.embedded.nodes.registry import Interrupted, Library, NodeContext, Progress
from comfyd.embedded.settings import parse_command_line


class Recorder(Progress):
    def __init__(self) -> None:
        self.steps: list[tuple[int, int, bytes | None]] = []
        self.texts: list[str] = []

    def update(self, value: Any, maximum: Any, preview_jpeg: Any) -> None:
        self.steps.append((value, maximum, preview_jpeg))

    def text(self, text: Any) -> None:
        self.texts.append(text)


@pytest.fixture
def context(tmp_path: Path) -> Any:
    settings = parse_command_line(["--base-directory", str(tmp_path), "--step-delay-s", "0"])
    settings.folders.make()
    return NodeContext(
        node_id="1",
        prompt_id="p",
        prompt={"1": {"class_type": "X", "inputs": {"text": "ünïcode"}}},
        extra_data={"extra_pnginfo": {"workflow": {"nodes": []}}},
        settings=settings,
        library=Library(folders=settings.folders, models=Models()),
        interrupted=threading.Event(),
        progress=Recorder(),
    )


@pytest.fixture
def call(context: NodeContext) -> Any:
    return lambda name, **inputs: NODE_TYPES[name].run(context, **inputs)


def plain(*colours: Any, width: Any = 8, height: Any = 6) -> Any:
    """A batch of one-colour pictures."""
    return batch(
        [
            (pyvips.Image.black(width, height, bands=3) + list(colour)).cast("uchar").copy(interpretation="srgb")
            for colour in colours
        ]
    )


def gradient(width: Any = 16, height: Any = 4) -> Any:
    """Red grows by 10 per column, green by 20 per row, blue is 5."""
    place = pyvips.Image.xyz(width, height)
    colours = (place.extract_band(0) * 10).bandjoin([place.extract_band(1) * 20, place.extract_band(0) * 0 + 5])
    return batch([colours.cast("uchar").copy(interpretation="srgb")])


def at(images: Any, x: Any, y: Any, index: Any = 0) -> Any:
    return images.pictures[index](x, y)


def only(result: Any) -> Any:
    (value,) = result.outputs
    return value


def test_empty_image_is_of_one_colour_in_a_batch(call: Any) -> None:
    images = only(call("EmptyImage", width=3, height=2, batch_size=2, color=0x10FF03))
    assert (images.width_px, images.height_px, len(images)) == (3, 2, 2)
    assert at(images, 2, 1, 1) == [0x10, 0xFF, 0x03]


def test_invert(call: Any) -> None:
    assert at(only(call("ImageInvert", image=plain((0, 100, 255)))), 0, 0) == [255, 155, 0]


@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("width", "height", "expected"), [(24, 12, (24, 12)), (3, 2, (3, 2)), (16, 0, (16, 12)), (0, 3, (4, 3))]
)
def test_scale_gives_exactly_the_size(call: Any, method: Any, width: Any, height: Any, expected: Any) -> None:
    scaled = only(
        call(
            "ImageScale", image=plain((9, 99, 199)), upscale_method=method, width=width, height=height, crop="disabled"
        )
    )
    assert (scaled.width_px, scaled.height_px) == expected
    assert at(scaled, expected[0] - 1, expected[1] - 1) == [9, 99, 199]


def test_scale_with_crop_keeps_the_middle(call: Any) -> None:
    scaled = only(
        call("ImageScale", image=gradient(), upscale_method="nearest-exact", width=4, height=4, crop="center")
    )
    assert [at(scaled, x, 0)[0] for x in range(4)] == [60, 70, 80, 90]


def test_scale_by_a_factor(call: Any) -> None:
    scaled = only(call("ImageScaleBy", image=plain((1, 2, 3)), upscale_method="lanczos", scale_by=1.5))
    assert (scaled.width_px, scaled.height_px) == (12, 9)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("normal", [200, 100, 0]),
        ("multiply", [78, 39, 0]),
        ("screen", [222, 161, 100]),
        ("overlay", [157, 78, 0]),
        ("difference", [0, 0, 100]),
    ],
)
def test_blend_modes(call: Any, mode: Any, expected: Any) -> None:
    blended = only(
        call(
            "ImageBlend", image1=plain((100, 100, 100)), image2=plain((200, 100, 0)), blend_factor=1.0, blend_mode=mode
        )
    )
    assert at(blended, 0, 0) == expected


def test_blend_factor_mixes_and_sizes_are_fitted(call: Any) -> None:
    other = plain((200, 0, 100), width=20, height=20)
    blended = only(
        call("ImageBlend", image1=plain((100, 100, 100)), image2=other, blend_factor=0.25, blend_mode="normal")
    )
    assert (blended.width_px, blended.height_px) == (8, 6)
    assert at(blended, 3, 3) == [125, 75, 100]


def test_soft_light_of_mid_grey_changes_nothing_much(call: Any) -> None:
    args = {"image2": plain((128, 128, 128)), "blend_factor": 1.0, "blend_mode": "soft_light"}
    assert at(only(call("ImageBlend", image1=plain((90, 40, 210)), **args)), 0, 0) == [90, 40, 210]


def test_an_unknown_blend_mode_fails_at_run_time(call: Any) -> None:
    with pytest.raises(ValueError, match="Unsupported blend mode: nope"):
        call("ImageBlend", image1=plain((0, 0, 0)), image2=plain((0, 0, 0)), blend_factor=1.0, blend_mode="nope")


def test_blur_spreads_a_point_evenly_and_keeps_its_sum(call: Any) -> None:
    point = pyvips.Image.black(9, 9, bands=3).draw_rect([255, 255, 255], 4, 4, 1, 1).copy(interpretation="srgb")
    blurred = only(call("ImageBlur", image=batch([point]), blur_radius=2, sigma=1.0))
    assert at(blurred, 4, 4)[0] > at(blurred, 3, 4)[0] == at(blurred, 5, 4)[0] > at(blurred, 2, 4)[0] > 0
    assert at(blurred, 1, 4) == [0, 0, 0]
    assert abs(blurred.pictures[0].extract_band(0).avg() * 81 - 255) < 15  # rounding of 25 pixels


def test_blur_and_sharpen_leave_a_flat_colour(call: Any) -> None:
    flat = plain((10, 120, 250))
    assert at(only(call("ImageBlur", image=flat, blur_radius=3, sigma=2.0)), 0, 0) == [10, 120, 250]
    assert at(only(call("ImageSharpen", image=flat, sharpen_radius=1, sigma=1.0, alpha=1.0)), 0, 0) == [10, 120, 250]


def test_sharpen_widens_the_step_at_an_edge(call: Any) -> None:
    edge = pyvips.Image.black(8, 4, bands=3) + 100
    edge = edge.draw_rect([150, 150, 150], 4, 0, 4, 4, fill=True).cast("uchar").copy(interpretation="srgb")
    sharp = only(call("ImageSharpen", image=batch([edge]), sharpen_radius=1, sigma=1.0, alpha=0.1))
    assert at(sharp, 3, 1)[0] < 100
    assert at(sharp, 4, 1)[0] > 150
    assert (at(sharp, 0, 1)[0], at(sharp, 7, 1)[0]) == (100, 150)


def test_crop_is_cut_off_at_the_picture(call: Any) -> None:
    cropped = only(call("ImageCrop", image=gradient(), width=100, height=2, x=14, y=1))
    assert (cropped.width_px, cropped.height_px) == (2, 2)
    assert at(cropped, 0, 0) == [140, 20, 5]


def test_batches_are_joined_and_repeated(call: Any) -> None:
    joined = only(call("ImageBatch", image1=plain((1, 1, 1)), image2=plain((2, 2, 2), (3, 3, 3), width=40, height=30)))
    assert [at(joined, 0, 0, index)[0] for index in range(len(joined))] == [1, 2, 3]
    repeated = only(call("RepeatImageBatch", image=joined, amount=2))
    assert [at(repeated, 0, 0, index)[0] for index in range(len(repeated))] == [1, 2, 3, 1, 2, 3]


def test_get_image_size(call: Any, context: NodeContext) -> None:
    assert call("GetImageSize", image=plain((0, 0, 0), (0, 0, 0))).outputs == (8, 6, 2)
    assert isinstance(context.progress, Recorder)
    assert context.progress.texts == ["width: 8, height: 6\n batch size: 2"]


def test_save_image_counts_on_fills_in_tokens_and_makes_subfolders(call: Any, context: NodeContext) -> Any:
    def names(prefix: Any) -> Any:
        return [
            record["filename"]
            for record in call("SaveImage", images=plain((1, 2, 3)), filename_prefix=prefix).ui["images"]
        ]

    assert names("a/b-%width%x%height%") == ["b-8x6_00001_.png"]
    assert names("a/b-%width%x%height%") == ["b-8x6_00002_.png"]
    (context.settings.folders.output / "a" / "b-8x6_00041_.png").touch()
    result = call("SaveImage", images=plain((1, 2, 3), (4, 5, 6)), filename_prefix="a/b-8x6").ui
    assert result["images"] == [
        {"filename": "b-8x6_00042_.png", "subfolder": "a", "type": "output"},
        {"filename": "b-8x6_00043_.png", "subfolder": "a", "type": "output"},
    ]
    saved = pyvips.Image.new_from_file(str(context.settings.folders.output / "a" / "b-8x6_00043_.png"))
    assert saved(0, 0) == [4, 5, 6]


def test_a_saved_picture_tells_its_prompt(call: Any, context: NodeContext) -> None:
    call("SaveImage", images=plain((1, 2, 3)), filename_prefix="x")
    png = (context.settings.folders.output / "x_00001_.png").read_bytes()
    assert b'tEXtprompt\0{"1": {"class_type": "X", "inputs": {"text": "\\u00fcn\\u00efcode"}}}' in png
    assert b'tEXtworkflow\0{"nodes": []}' in png
    assert pyvips.Image.new_from_buffer(png, "")(0, 0) == [1, 2, 3]


@pytest.mark.parametrize("prefix", ["../x", "/tmp/x", "a/../../x"])
def test_a_prefix_that_leaves_the_folder_is_refused_at_run_time(call: Any, prefix: Any) -> None:
    with pytest.raises(Exception, match="outside the output folder"):
        call("SaveImage", images=plain((0, 0, 0)), filename_prefix=prefix)


def test_preview_image_writes_into_temp(call: Any, context: NodeContext) -> None:
    (record,) = call("PreviewImage", images=plain((7, 8, 9))).ui["images"]
    assert record["type"] == "temp"
    assert (context.settings.folders.temp / record["filename"]).is_file()


def test_animated_webp_holds_all_frames_and_their_time(call: Any, context: NodeContext) -> None:
    inputs = {"fps": 5.0, "lossless": True, "quality": 80, "method": "fastest", "filename_prefix": "anim"}
    ui = call("SaveAnimatedWEBP", images=plain((255, 0, 0), (0, 255, 0), (0, 0, 255)), **inputs).ui
    assert ui == {"images": [{"filename": "anim_00001_.webp", "subfolder": "", "type": "output"}], "animated": [True]}
    saved = pyvips.Image.new_from_file(str(context.settings.folders.output / "anim_00001_.webp"), n=-1)
    assert (saved.get("n-pages"), saved.get("delay")) == (3, [200, 200, 200])
    assert saved(0, 8)[:3] == [0, 255, 0]


def test_load_image_returns_colours_and_the_inverted_alpha(call: Any, context: NodeContext) -> None:
    rgba = pyvips.Image.black(4, 4, bands=4).linear(1, [10, 20, 30, 55]).cast("uchar").copy(interpretation="srgb")
    (context.settings.folders.input / "job").mkdir()
    rgba.pngsave(str(context.settings.folders.input / "job" / "a.png"))
    images, mask = call("LoadImage", image="job/a.png").outputs
    assert at(images, 1, 1) == [10, 20, 30]
    assert at(mask, 1, 1) == [200]
    assert at(only(call("LoadImageMask", image="job/a.png", channel="alpha")), 0, 0) == [200]
    assert at(only(call("LoadImageMask", image="job/a.png", channel="green")), 0, 0) == [20]


def test_a_picture_without_alpha_has_an_empty_mask(call: Any, context: NodeContext) -> None:
    plain((1, 2, 3)).pictures[0].jpegsave(str(context.settings.folders.input / "a.jpg"))
    _, mask = call("LoadImage", image="a.jpg").outputs
    assert (mask.width_px, mask.height_px, at(mask, 5, 5)) == (64, 64, [0])


def test_grey_and_16_bit_pictures_become_8_bit_colour(call: Any, context: NodeContext) -> None:
    grey = (pyvips.Image.black(4, 4) + 257 * 77).cast("ushort").copy(interpretation="grey16")
    grey.pngsave(str(context.settings.folders.input / "grey.png"))
    images, _ = call("LoadImage", image="grey.png").outputs
    assert at(images, 0, 0) == [77, 77, 77]


def test_the_alpha_of_a_16_bit_picture_is_scaled(call: Any, context: NodeContext) -> None:
    rgba = pyvips.Image.black(4, 4, bands=4).linear(1, [0, 0, 0, 257 * 55]).cast("ushort").copy(interpretation="rgb16")
    rgba.pngsave(str(context.settings.folders.input / "deep.png"))
    _, mask = call("LoadImage", image="deep.png").outputs
    assert at(mask, 0, 0) == [200]


def test_a_truncated_file_fails_in_the_load_node(call: Any, context: NodeContext) -> None:
    noise = pyvips.Image.gaussnoise(64, 64, seed=1).cast("uchar").pngsave_buffer()
    (context.settings.folders.input / "cut.png").write_bytes(noise[: len(noise) // 2])
    with pytest.raises(pyvips.Error):
        call("LoadImage", image="cut.png")


def test_an_animation_is_loaded_as_a_batch(call: Any, context: NodeContext) -> None:
    inputs = {"fps": 5.0, "lossless": True, "quality": 80, "method": "fastest", "filename_prefix": "anim"}
    call("SaveAnimatedWEBP", images=plain((255, 0, 0), (0, 255, 0)), **inputs)
    images, _ = call("LoadImage", image="anim_00001_.webp [output]").outputs
    assert len(images) == 2
    assert at(images, 0, 0, 1) == [0, 255, 0]


def test_a_corrupt_file_fails_in_the_load_node(call: Any, context: NodeContext) -> None:
    (context.settings.folders.input / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(pyvips.Error):
        call("LoadImage", image="bad.png")


def test_text_nodes(call: Any) -> None:
    assert call("PrimitiveString", value="a").outputs == ("a",)
    assert call("StringConcatenate", string_a="a", string_b="b", delimiter="-").outputs == ("a-b",)
    assert call("PreviewAny", source="x").ui == {"text": ["x"]}
    assert call("PreviewAny", source=1.5).ui == {"text": ["1.5"]}
    assert call("PreviewAny", source=[1, "a"]).ui == {"text": ['[1, "a"]']}
    assert call("PreviewAny", source=Images(width_px=1, height_px=2, count=3)).ui["text"][0].startswith("Images(")


def test_save_text_file(call: Any, context: NodeContext) -> None:
    ui = call("SaveTextFile", text="grüße", filename_prefix="t/x").ui
    assert ui == {"text_files": [{"filename": "x_00001_.txt", "subfolder": "t", "type": "output"}]}
    assert (context.settings.folders.output / "t" / "x_00001_.txt").read_text(encoding="utf-8") == "grüße"


def test_save_bytes_writes_exactly_that_much(call: Any, context: NodeContext) -> None:
    (record,) = call("SaveBytes", size_mb=2.5, filename_prefix="big").ui["images"]
    assert (context.settings.folders.output / record["filename"]).stat().st_size == 2.5 * 1024 * 1024


def test_an_interrupt_ends_a_sleep_and_a_long_write(call: Any, context: NodeContext) -> None:
    context.interrupted.set()
    with pytest.raises(Interrupted):
        call("Sleep", seconds=60.0)
    with pytest.raises(Interrupted):
        call("SaveBytes", size_mb=1.0, filename_prefix="x")


def test_sleep_and_raise_pass_values_through(call: Any) -> None:
    assert call("Sleep", seconds=0.0, value="x").outputs == ("x",)
    assert call("Raise", message="no", enabled=False, value="y").outputs == ("y",)
