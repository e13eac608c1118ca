"""Text to image, with the refiner.

Generate a picture from a prompt with Stable Diffusion XL; the last steps are the refiner's.
"""

from typing import Annotated

from comfyd.workflow import Checkpoint, Field, Graph, InputRefused, inputs, installed_model, random_seed

from .._shared import Cfg, NegativePrompt, NoiseSeed, Pixels, Prompt, SamplerName, SchedulerName, Steps


@inputs
class Input:
    """What a caller may choose."""

    prompt: Prompt
    negative_prompt: NegativePrompt = "text, watermark"
    width: Pixels = 1024
    height: Pixels = 1024
    seed: NoiseSeed = random_seed()
    steps: Steps = 25
    base_steps: Annotated[int, Field(description="So many of the steps are the base model's.", ge=1, le=100)] = 20
    cfg_scale: Cfg = 8.0
    sampler_name: SamplerName = "euler"
    scheduler: SchedulerName = "normal"
    base_checkpoint: Annotated[Checkpoint, Field(description="The base model.")] = installed_model(
        "checkpoints", "xl_base", "xl-base", "sdxl"
    )
    refiner_checkpoint: Annotated[Checkpoint, Field(description="The refiner.")] = installed_model(
        "checkpoints", "refiner"
    )


def workflow(given: Input) -> Graph:
    """Write the graph: two samplers on one latent, the second going on where the first ends."""
    if given.base_steps > given.steps:
        raise InputRefused("base_steps", f"must be <= steps ({given.steps}), got {given.base_steps}")
    graph = Graph()
    common = {
        "noise_seed": given.seed,
        "steps": given.steps,
        "cfg": given.cfg_scale,
        "sampler_name": given.sampler_name,
        "scheduler": given.scheduler,
    }
    model, clip, _ = graph.node("CheckpointLoaderSimple", ckpt_name=given.base_checkpoint).outputs(3)
    refiner, refiner_clip, vae = graph.node("CheckpointLoaderSimple", ckpt_name=given.refiner_checkpoint).outputs(3)
    base = graph.node(
        "KSamplerAdvanced",
        model=model,
        positive=graph.node("CLIPTextEncode", text=given.prompt, clip=clip),
        negative=graph.node("CLIPTextEncode", text=given.negative_prompt, clip=clip),
        latent_image=graph.node("EmptyLatentImage", width=given.width, height=given.height, batch_size=1),
        add_noise="enable",
        start_at_step=0,
        end_at_step=given.base_steps,
        return_with_leftover_noise="enable",
        **common,
    )
    refined = graph.node(
        "KSamplerAdvanced",
        model=refiner,
        positive=graph.node("CLIPTextEncode", text=given.prompt, clip=refiner_clip),
        negative=graph.node("CLIPTextEncode", text=given.negative_prompt, clip=refiner_clip),
        latent_image=base,
        add_noise="disable",
        start_at_step=given.base_steps,
        end_at_step=10000,
        return_with_leftover_noise="disable",
        **common,
    )
    picture = graph.node("VAEDecode", samples=refined, vae=vae)
    graph.node("SaveImage", images=picture, filename_prefix="txt2img-with-refiner")
    return graph
