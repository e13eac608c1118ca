"""Image to image.

Repaint a picture after a prompt with Stable Diffusion XL.
"""

from typing import Annotated

from comfyd.workflow import Checkpoint, Field, Graph, inputs, installed_model, random_seed

from .._shared import (
    Cfg,
    Crop,
    Denoise,
    Interpolation,
    NegativePrompt,
    NoiseSeed,
    Pixels,
    Prompt,
    SamplerName,
    SchedulerName,
    SourceImage,
    Steps,
)


@inputs
class Input:
    """What a caller may choose."""

    prompt: Prompt
    image: SourceImage
    negative_prompt: NegativePrompt = "text, watermark"
    width: Pixels = 1024
    height: Pixels = 1024
    interpolation: Interpolation = "lanczos"
    crop: Crop = "center"
    seed: NoiseSeed = random_seed()
    steps: Steps = 20
    cfg_scale: Cfg = 8.0
    sampler_name: SamplerName = "euler"
    scheduler: SchedulerName = "normal"
    denoise: Denoise = 0.75
    checkpoint: Annotated[Checkpoint, Field(description="The model.")] = installed_model(
        "checkpoints", "xl_base", "xl-base", "sdxl"
    )


def workflow(given: Input) -> Graph:
    """Write the graph."""
    graph = Graph()
    model, clip, vae = graph.node("CheckpointLoaderSimple", ckpt_name=given.checkpoint).outputs(3)
    source = graph.node("LoadImage", image=given.image)
    scaled = graph.node(
        "ImageScale",
        image=source,
        upscale_method=given.interpolation,
        width=given.width,
        height=given.height,
        crop=given.crop,
    )
    latent = graph.node("VAEEncode", pixels=scaled, vae=vae)
    positive = graph.node("CLIPTextEncode", text=given.prompt, clip=clip).titled("Prompt")
    negative = graph.node("CLIPTextEncode", text=given.negative_prompt, clip=clip).titled("Negative prompt")
    sampled = graph.node(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=given.seed,
        steps=given.steps,
        cfg=given.cfg_scale,
        sampler_name=given.sampler_name,
        scheduler=given.scheduler,
        denoise=given.denoise,
    )
    picture = graph.node("VAEDecode", samples=sampled, vae=vae)
    graph.node("SaveImage", images=picture, filename_prefix="img2img")
    return graph
