"""Text to image.

Generate a picture from a prompt with Stable Diffusion 1.5.
"""

from typing import Annotated

from comfyd.workflow import Checkpoint, Field, Graph, inputs, random_seed, warmup_checkpoint

from .._shared import Cfg, Denoise, NegativePrompt, NoiseSeed, Pixels, Prompt, SamplerName, SchedulerName, Steps


@inputs
class Input:
    """What a caller may choose."""

    prompt: Prompt
    negative_prompt: NegativePrompt = "text, watermark"
    width: Pixels = 512
    height: Pixels = 512
    seed: NoiseSeed = random_seed()
    steps: Steps = 20
    cfg_scale: Cfg = 8.0
    sampler_name: SamplerName = "euler"
    scheduler: SchedulerName = "normal"
    denoise: Denoise = 1.0
    checkpoint: Annotated[Checkpoint, Field(description="The model.")] = warmup_checkpoint()


def workflow(given: Input) -> Graph:
    """Write the graph."""
    graph = Graph()
    model, clip, vae = graph.node("CheckpointLoaderSimple", ckpt_name=given.checkpoint).outputs(3)
    latent = graph.node("EmptyLatentImage", width=given.width, height=given.height, batch_size=1)
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
    graph.node("SaveImage", images=picture, filename_prefix="txt2img")
    return graph
