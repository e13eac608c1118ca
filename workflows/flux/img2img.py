"""Image to image.

Repaint a picture after a prompt with Flux.
"""

from comfyd.workflow import Graph, inputs, random_seed

from .._shared import (
    Crop,
    Denoise,
    FluxPixels,
    Interpolation,
    NoiseSeed,
    Prompt,
    SamplerName,
    SchedulerName,
    SourceImage,
    Steps,
)
from . import _models


@inputs
class Input:
    """What a caller may choose."""

    prompt: Prompt
    image: SourceImage
    width: FluxPixels = 1024
    height: FluxPixels = 1024
    interpolation: Interpolation = "lanczos"
    crop: Crop = "center"
    seed: NoiseSeed = random_seed()
    steps: Steps = 20
    guidance: _models.Guidance = 3.5
    denoise: Denoise = 0.75
    sampler_name: SamplerName = "euler"
    scheduler: SchedulerName = "simple"
    unet: _models.Unet = _models.unet
    clip_l: _models.ClipL = _models.clip_l
    t5: _models.T5 = _models.t5
    vae: _models.Vae = _models.vae


def workflow(given: Input) -> Graph:
    """Write the graph. Flux takes its guidance with the prompt; cfg 1 means that there is no negative prompt."""
    graph = Graph()
    model, clip, vae = _models.load(graph, given)
    text = graph.node("CLIPTextEncode", text=given.prompt, clip=clip).titled("Prompt")
    scaled = graph.node(
        "ImageScale",
        image=graph.node("LoadImage", image=given.image),
        upscale_method=given.interpolation,
        width=given.width,
        height=given.height,
        crop=given.crop,
    )
    sampled = graph.node(
        "KSampler",
        model=model,
        positive=graph.node("FluxGuidance", conditioning=text, guidance=given.guidance),
        negative=graph.node("ConditioningZeroOut", conditioning=text),
        latent_image=graph.node("VAEEncode", pixels=scaled, vae=vae),
        seed=given.seed,
        steps=given.steps,
        cfg=1.0,
        sampler_name=given.sampler_name,
        scheduler=given.scheduler,
        denoise=given.denoise,
    )
    picture = graph.node("VAEDecode", samples=sampled, vae=vae)
    graph.node("SaveImage", images=picture, filename_prefix="flux-img2img")
    return graph
