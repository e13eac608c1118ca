"""The stand-in for diffusion: repeatable, obedient to its numbers, and able to run the usual graphs."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import pytest
import pyvips
from embedded_kit import node, open_embedded

from comfyd.embedded.nodes.pictures import as_srgb
from comfyd.embedded.painting import Brief, Painting, finished, paint

BRIEF = Brief(text="gold over the sea", seed=7)


def painted(brief: Any = BRIEF, painting: Any = None, *, first: Any = 0, last: Any = 4, steps: Any = 4) -> Any:
    painting = painting or Painting(width_px=96, height_px=64)
    for stage in paint(painting, brief, first=first, last=last, steps=steps):
        painting = stage
    return painting


def pixels(painting: Any) -> Any:
    return finished(painting).write_to_memory()


def difference(one: Any, other: Any) -> Any:
    return (finished(one).cast("float") - finished(other).cast("float")).abs().avg()


@pytest.fixture(scope="module")
def subject() -> Any:
    picture = as_srgb(pyvips.Image.new_from_file("comfyd/embedded/demo/input.jpg")).resize(0.125)
    return Painting(width_px=picture.width, height_px=picture.height, subject=picture.cast("float").copy_memory())


def test_the_same_numbers_give_the_same_picture() -> None:
    assert pixels(painted()) == pixels(painted())


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"text": "violet night"}, {"boldness": 1.5}, {"guidance": 25.0}, {"strength": 0.5}]
)
def test_each_number_and_the_text_change_the_picture(change: Any) -> None:
    assert difference(painted(), painted(attrs.evolve(BRIEF, **change))) > 1


def test_every_step_changes_the_picture(subject: Any) -> None:
    stages = list(paint(subject, BRIEF, first=0, last=5, steps=5))
    assert len(stages) == 5
    assert all(difference(before, after) > 0.5 for before, after in pairwise(stages))


def test_strength_0_leaves_the_subject_and_more_strength_leaves_less_of_it(subject: Any) -> None:
    untouched = finished(subject)
    away = [
        (finished(painted(attrs.evolve(BRIEF, strength=strength), subject)).cast("float") - untouched).abs().avg()
        for strength in (0.0, 0.3, 0.9)
    ]
    assert away[0] < 1.5  # colours are put through Lab and back
    assert away[0] < away[1] < away[2]


def test_a_painting_can_be_gone_on_with() -> None:
    half = painted(last=2)
    assert difference(painted(painting=half, first=2), painted()) < 12
    assert difference(half, painted()) > 1


@pytest.mark.parametrize(("width", "height"), [(16, 16), (24, 200), (512, 16), (72, 40)])
def test_any_size_can_be_painted(width: Any, height: Any) -> None:
    picture = finished(painted(painting=Painting(width_px=width, height_px=height), last=3, steps=3))
    assert (picture.width, picture.height, picture.bands, picture.format) == (width, height, 3, "uchar")
    assert picture.deviate() > 3


def sampler(**links: Any) -> Any:
    inputs = {"seed": 5, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return node("KSampler", **(inputs | links))


def advanced(**links: Any) -> Any:
    inputs = {
        "noise_seed": 5,
        "steps": 4,
        "cfg": 7.0,
        "sampler_name": "dpmpp_2m",
        "scheduler": "karras",
        "start_at_step": 0,
        "end_at_step": 10000,
        "add_noise": "enable",
        "return_with_leftover_noise": "disable",
    }
    return node("KSamplerAdvanced", **(inputs | links))


def sd15() -> Any:
    return {
        "ckpt": node("CheckpointLoaderSimple", ckpt_name="pattern-v1.safetensors"),
        "lora": node(
            "LoraLoader",
            model=["ckpt", 0],
            clip=["ckpt", 1],
            lora_name="pattern-bold.safetensors",
            strength_model=0.8,
            strength_clip=1.0,
        ),
        "skip": node("CLIPSetLastLayer", clip=["lora", 1], stop_at_clip_layer=-2),
        "pos": node("CLIPTextEncode", text="forest", clip=["skip", 0]),
        "neg": node("CLIPTextEncode", text="blurry", clip=["skip", 0]),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        "sample": sampler(model=["lora", 0], positive=["pos", 0], negative=["neg", 0], latent_image=["latent", 0]),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["ckpt", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="sd15"),
    }


def sdxl_with_refiner() -> Any:
    sizes = {"width": 1024, "height": 1024, "crop_w": 0, "crop_h": 0, "target_width": 1024, "target_height": 1024}
    refined = {"ascore": 6.0, "width": 1024, "height": 1024, "clip": ["refiner", 1]}
    return {
        "base": node("CheckpointLoaderSimple", ckpt_name="pattern-xl-base.safetensors"),
        "refiner": node("CheckpointLoaderSimple", ckpt_name="pattern-xl-refiner.safetensors"),
        "pos": node("CLIPTextEncodeSDXL", clip=["base", 1], text_g="sea", text_l="sea", **sizes),
        "neg": node("CLIPTextEncodeSDXL", clip=["base", 1], text_g="", text_l="bad", **sizes),
        "rpos": node("CLIPTextEncodeSDXLRefiner", text="sea", **refined),
        "rneg": node("CLIPTextEncodeSDXLRefiner", text="", **refined),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "first": advanced(
            model=["base", 0],
            positive=["pos", 0],
            negative=["neg", 0],
            latent_image=["latent", 0],
            end_at_step=3,
            return_with_leftover_noise="enable",
        ),
        "second": advanced(
            model=["refiner", 0],
            positive=["rpos", 0],
            negative=["rneg", 0],
            latent_image=["first", 0],
            add_noise="disable",
            start_at_step=3,
        ),
        "decode": node("VAEDecode", samples=["second", 0], vae=["refiner", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="sdxl"),
    }


def flux() -> Any:
    return {
        "unet": node("UNETLoader", unet_name="pattern-flux-dev.safetensors", weight_dtype="fp8_e4m3fn"),
        "clip": node(
            "DualCLIPLoader",
            clip_name1="pattern-t5xxl.safetensors",
            clip_name2="pattern-clip-l.safetensors",
            type="flux",
        ),
        "vae": node("VAELoader", vae_name="pattern-vae.safetensors"),
        "pos": node("CLIPTextEncodeFlux", clip=["clip", 0], clip_l="rose", t5xxl="rose garden", guidance=3.5),
        "guided": node("FluxGuidance", conditioning=["pos", 0], guidance=4.0),
        "neg": node("ConditioningZeroOut", conditioning=["pos", 0]),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sample": sampler(
            model=["unet", 0], positive=["guided", 0], negative=["neg", 0], latent_image=["latent", 0], cfg=1.0
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="flux"),
    }


def img2img() -> Any:
    graph = sd15()
    graph["latent"] = node("VAEEncode", pixels=["picture", 0], vae=["ckpt", 2])
    graph["picture"] = node("EmptyImage", width=67, height=50, batch_size=1, color=0x336699)
    graph["sample"]["inputs"]["denoise"] = 0.5
    return graph


@pytest.mark.parametrize(
    ("graph", "pictures", "size"),
    [(sd15, 2, (64, 64)), (sdxl_with_refiner, 1, (64, 64)), (flux, 1, (64, 64)), (img2img, 1, (64, 48))],
)
async def test_the_usual_graphs_run(tmp_path: Path, graph: Any, pictures: Any, size: Any) -> None:
    async with open_embedded(tmp_path) as peer:
        entry = await peer.run(graph())
        assert entry["status"]["completed"] is True, entry["status"]
        saved = [pyvips.Image.new_from_file(str(path)) for path in peer.saved(entry, "save")]
        assert [(picture.width, picture.height) for picture in saved] == [size] * pictures
        if pictures == 2:
            assert saved[0].write_to_memory() != saved[1].write_to_memory()


async def test_the_same_graph_gives_the_same_file_in_another_engine(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        async with open_embedded(tmp_path / name) as peer:
            files.append(peer.saved(await peer.run(flux()), "save")[0].read_bytes())
    assert files[0] == files[1]


async def test_a_sampler_can_be_interrupted_at_a_step(tmp_path: Path) -> None:
    graph = sd15()
    graph["sample"]["inputs"]["steps"] = 10000
    async with open_embedded(tmp_path) as peer, peer.listening() as listener:
        await peer.submit(graph)
        await listener.until("progress")
        await peer.http.post("/interrupt", json={"prompt_id": "p"})
        events = await listener.until_ended("p")
        assert "execution_interrupted" in {event["type"] for event in events}
