'''What a workflow file imports.

A file ``txt2img.py`` below ``WORKFLOW_DIR`` is ``POST /workflow/txt2img``::

    """Text to image.

    The first line is the summary in the docs, the rest the description.
    """

    from typing import Annotated

    from comfyd.workflow import Checkpoint, Field, Graph, Sampler, Seed, inputs, random_seed, warmup_checkpoint


    @inputs
    class Input:
        prompt: Annotated[str, Field(description="What to paint.")]
        width: Annotated[int, Field(ge=64, le=2048, multiple_of=8)] = 512
        sampler_name: Sampler = "euler"
        seed: Seed = random_seed()
        checkpoint: Checkpoint = warmup_checkpoint()


    def workflow(given: Input) -> Graph:
        graph = Graph()
        model, clip, vae = graph.node("CheckpointLoaderSimple", ckpt_name=given.checkpoint).outputs(3)
        ...
        graph.node("SaveImage", images=picture, filename_prefix="ComfyUI")
        return graph

The function may be ``async`` (it runs on Trio), may take a second parameter, a :class:`Comfy`, and may return any
mapping that is a graph in ComfyUI's API format. Files and folders that begin with ``_`` are no endpoints: they hold
what several workflows share, for ``from ._shared import sizes``. Such files run with the daemon's rights.
'''

from comfyd.workflows.author import (
    SEED_MAX,
    Audio,
    Checkpoint,
    Comfy,
    Field,
    Graph,
    Image,
    InputRefused,
    Link,
    Node,
    Sampler,
    Scheduler,
    Seed,
    Video,
    choices,
    inputs,
    installed_model,
    models,
    random_seed,
    warmup_checkpoint,
)

__all__ = [
    "SEED_MAX",
    "Audio",
    "Checkpoint",
    "Comfy",
    "Field",
    "Graph",
    "Image",
    "InputRefused",
    "Link",
    "Node",
    "Sampler",
    "Scheduler",
    "Seed",
    "Video",
    "choices",
    "inputs",
    "installed_model",
    "models",
    "random_seed",
    "warmup_checkpoint",
]
