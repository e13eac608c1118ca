"""Text to image.

Generate a picture from a prompt with Flux.
"""

from comfyd.workflow import Graph, inputs, random_seed

from .._shared import FluxPixels, NoiseSeed, Prompt, SamplerName, SchedulerName, Steps
from . import _models


@inputs
class Input:
    """What a caller may choose."""

    prompt: Prompt
    width: FluxPixels = 1024
    height: FluxPixels = 1024
    seed: NoiseSeed = random_seed()
    steps: Steps = 20
    guidance: _models.Guidance = 3.5
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
    sampled = graph.node(
        "KSampler",
        model=model,
        positive=graph.node("FluxGuidance", conditioning=text, guidance=given.guidance),
        negative=graph.node("ConditioningZeroOut", conditioning=text),
        latent_image=graph.node("EmptySD3LatentImage", width=given.width, height=given.height, batch_size=1),
        seed=given.seed,
        steps=given.steps,
        cfg=1.0,
        sampler_name=given.sampler_name,
        scheduler=given.scheduler,
        denoise=1.0,
    )
    picture = graph.node("VAEDecode", samples=sampled, vae=vae)
    graph.node("SaveImage", images=picture, filename_prefix="flux-txt2img")
    return graph
