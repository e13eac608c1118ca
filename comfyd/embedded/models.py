"""The models an engine lists. None is ever opened: what stands in for a model is its name."""

from pathlib import Path
from types import MappingProxyType
from typing import Final

import attrs

# Names that the usual graphs of each family choose from; each says what it is. The keys are ComfyUI's folder types.
PRETEND_MODELS: Final = MappingProxyType(
    {
        "checkpoints": (
            "pattern-v1.safetensors",
            "pattern-xl-base.safetensors",
            "pattern-xl-refiner.safetensors",
        ),
        "configs": (),
        "loras": ("pattern-bold.safetensors", "pattern-fine.safetensors"),
        "vae": ("pattern-vae.safetensors",),
        "text_encoders": ("pattern-clip-l.safetensors", "pattern-t5xxl.safetensors"),
        "diffusion_models": ("pattern-flux-dev.safetensors", "pattern-flux-schnell.safetensors"),
        "clip_vision": (),
        "style_models": (),
        "embeddings": ("pattern-negative.safetensors",),
        "diffusers": (),
        "vae_approx": (),
        "controlnet": (),
        "gligen": (),
        "upscale_models": (),
        "hypernetworks": (),
        "photomaker": (),
        "classifiers": (),
        "model_patches": (),
        "audio_encoders": (),
    }
)

_MODEL_SUFFIXES: Final = frozenset({".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"})


@attrs.frozen(kw_only=True)
class Models:
    """Lists models by type: those of a folder with one subfolder per type, or the pretend ones."""

    folder: Path | None = None

    def types(self) -> list[str]:
        """List the types of models: those ComfyUI knows, and further subfolders of the folder."""
        if self.folder is None:
            return list(PRETEND_MODELS)
        found = {entry.name for entry in self.folder.iterdir() if entry.is_dir()}
        return list(dict.fromkeys([*PRETEND_MODELS, *sorted(found)]))

    def names(self, kind: str) -> list[str]:
        """List the models of a type, in subfolders too, as paths relative to the type's folder, sorted."""
        if self.folder is None:
            return list(PRETEND_MODELS.get(kind, ()))
        root = self.folder / kind
        return sorted(
            path.relative_to(root).as_posix()
            for path in root.rglob("*")
            if path.suffix.lower() in _MODEL_SUFFIXES and path.is_file()
        )
