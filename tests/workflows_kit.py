"""What tests of workflows share: an engine's /object_info without an engine, and files in a folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

from comfyd.embedded.files import Folders
from comfyd.embedded.models import Models
from comfyd.embedded.nodes import NODE_TYPES
from comfyd.embedded.nodes.registry import Library
from comfyd.workflows import LiveInfo, Workflow, WorkflowCatalogue, load_catalogue

WARMUP = {"4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "pattern-v1.safetensors"}}}

MINIMAL = '''
"""A summary.

A description.
"""
from comfyd.workflow import Graph, inputs


@inputs
class Input:
    width: int = 512


def workflow(given: Input) -> Graph:
    graph = Graph()
    graph.node("SaveImage", images=graph.node("EmptyImage", width=given.width), filename_prefix="x")
    return graph
'''


def node(class_type: str, title: str | None = None, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}


def txt2img(**changed: Any) -> dict[str, Any]:
    """The graph that ComfyUI opens with, as its Export (API) writes it."""
    return {
        "3": node(
            "KSampler", "KSampler", seed=156680208700286, steps=20, cfg=8.0, sampler_name="euler", scheduler="normal",
            denoise=1.0, model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0],
        ),
        "4": node("CheckpointLoaderSimple", "Load Checkpoint", ckpt_name="pattern-v1.safetensors"),
        "5": node("EmptyLatentImage", "Empty Latent Image", width=512, height=512, batch_size=1),
        "6": node("CLIPTextEncode", "CLIP Text Encode (Prompt)", text="a galaxy in a bottle", clip=["4", 1]),
        "7": node("CLIPTextEncode", "CLIP Text Encode (Prompt)", text="text, watermark", clip=["4", 1]),
        "8": node("VAEDecode", "VAE Decode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", "Save Image", filename_prefix="ComfyUI", images=["8", 0]),
        **changed,
    }  # fmt: skip


def object_info(folder: Path) -> dict[str, Any]:
    """What the embedded engine answers to GET /object_info, with *folder* as its input folder."""
    library = Library(folders=Folders(input=folder, output=folder, temp=folder, user=folder), models=Models())
    info = {name: node_type.info(library) for name, node_type in NODE_TYPES.items()}
    return json.loads(json.dumps(info))  # type: ignore[no-any-return]  # as over HTTP: lists, no tuples


def live_info(folder: Path, **classes: Any) -> LiveInfo:
    """An engine's answer, with further *classes*."""
    return LiveInfo.from_object_info({**object_info(folder), **classes}, warmup_prompt=WARMUP)


def node_class(**required: Any) -> dict[str, Any]:
    """One class of /object_info."""
    return {"input": {"required": required}, "output_node": False}


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    """Write files: text as it is, without its indentation; anything else as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(content) if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def load(folder: Path, files: Mapping[str, Any]) -> WorkflowCatalogue:
    return load_catalogue(write(folder, files))


def load_one(folder: Path, files: Mapping[str, Any], route: str = "w") -> Workflow:
    """Load files of which one is a workflow without a problem."""
    catalogue = load(folder, files)
    assert catalogue.problems == ()
    workflow = catalogue.get(route)
    assert workflow is not None
    return workflow


def reasons(catalogue: WorkflowCatalogue) -> dict[str, str]:
    return {problem.file: problem.message for problem in catalogue.problems}
