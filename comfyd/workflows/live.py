"""What the engine has at the moment, as far as a workflow may ask for it: node classes, models, samplers.

Everything comes from ``GET /object_info`` (ComfyUI 0.3.64, ``server.py`` node_info), so custom samplers and models of
custom nodes are there too. A :class:`LiveInfo` is a snapshot: whoever asks the engine again makes a new one.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, Self

import attrs

from comfyd.config import Config
from comfyd.engine import MediaInput, NodeClasses

_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})

MODEL_INPUTS: Final = MappingProxyType(
    {
        ("CheckpointLoaderSimple", "ckpt_name"): "checkpoints",
        ("LoraLoader", "lora_name"): "loras",
        ("LoraLoaderModelOnly", "lora_name"): "loras",
        ("VAELoader", "vae_name"): "vae",
        ("UNETLoader", "unet_name"): "diffusion_models",
        ("CLIPLoader", "clip_name"): "text_encoders",
        ("DualCLIPLoader", "clip_name1"): "text_encoders",
        ("CLIPVisionLoader", "clip_name"): "clip_vision",
        ("StyleModelLoader", "style_model_name"): "style_models",
        ("DiffusersLoader", "model_path"): "diffusers",
        ("ControlNetLoader", "control_net_name"): "controlnet",
        ("GLIGENLoader", "gligen_name"): "gligen",
        ("UpscaleModelLoader", "model_name"): "upscale_models",
        ("HypernetworkLoader", "hypernetwork_name"): "hypernetworks",
        ("PhotoMakerLoader", "photomaker_model_name"): "photomaker",
        ("ModelPatchLoader", "name"): "model_patches",
        ("AudioEncoderLoader", "audio_encoder_name"): "audio_encoders",
    }
)
"""Which loader's choices are the models of which type (ComfyUI 0.3.64: ``nodes.py``, ``comfy_extras``)."""


def input_spec(object_info: Mapping[str, Any], class_type: str, name: str) -> tuple[Any, Mapping[str, Any]] | None:
    """Return the type and the options of a class's input, None where the engine has no such class or input."""
    info = object_info.get(class_type)
    groups = info.get("input") if isinstance(info, dict) else None
    for group in ("required", "optional"):
        inputs = groups.get(group) if isinstance(groups, dict) else None
        spec = inputs.get(name) if isinstance(inputs, dict) else None
        if isinstance(spec, list | tuple) and spec:
            options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else _NOTHING
            return spec[0], options
    return None


def choices_of(spec: tuple[Any, Mapping[str, Any]]) -> tuple[Any, ...] | None:
    """Return the choices of an input of either shape: the list as its type, or ``COMBO`` with options."""
    kind, options = spec
    listed = kind if isinstance(kind, list | tuple) else options.get("options") if kind == "COMBO" else None
    return tuple(listed) if isinstance(listed, list | tuple) else None


@attrs.frozen(kw_only=True, eq=False)  # compared by identity: a new one is a new answer of the engine
class LiveInfo:
    """What the engine has. Empty where the engine has not been asked yet: nothing is known then, and nothing refused.

    *models* are file names by type (``checkpoints``, ``loras``, ...). *warmup_checkpoint* is the checkpoint of the
    warm-up prompt, the natural default. *config* is the daemon's own configuration.
    """

    object_info: Mapping[str, Any] = attrs.field(default=_NOTHING, repr=False)
    models: Mapping[str, tuple[str, ...]] = _NOTHING
    samplers: tuple[str, ...] = ()
    schedulers: tuple[str, ...] = ()
    warmup_checkpoint: str | None = None
    config: Config | None = attrs.field(default=None, repr=False)
    media: Mapping[str, Mapping[str, MediaInput]] = attrs.field(default=_NOTHING, repr=False)

    @classmethod
    def from_object_info(
        cls,
        object_info: Mapping[str, Any],
        *,
        models: Mapping[str, Iterable[str]] = _NOTHING,
        warmup_prompt: Mapping[str, Any] | None = None,
        config: Config | None = None,
    ) -> Self:
        """Read the engine's answer. *models* are further ones, from ``GET /models``. About 1 ms for 400 classes."""
        found: dict[str, tuple[str, ...]] = {}
        for (class_type, name), kind in MODEL_INPUTS.items():
            listed = _strings(object_info, class_type, name)
            if listed is not None:
                found.setdefault(kind, listed)
        found.update({kind: tuple(names) for kind, names in models.items()})
        return cls(
            object_info=object_info,
            models=found,
            samplers=_strings(object_info, "KSampler", "sampler_name") or (),
            schedulers=_strings(object_info, "KSampler", "scheduler") or (),
            warmup_checkpoint=_checkpoint_of(warmup_prompt or _NOTHING),
            config=config,
            media=NodeClasses.from_object_info(object_info).media,
        )

    def choices(self, source: str) -> tuple[Any, ...] | None:
        """Return what may be chosen from *source*, None where nothing is known of it.

        A source is ``samplers``, ``schedulers``, ``models:<type>`` or ``node:<class>.<input>``.
        """
        if source == "samplers":
            return self.samplers or None
        if source == "schedulers":
            return self.schedulers or None
        kind, _, name = source.partition(":")
        if kind == "models":
            return self.models.get(name)
        class_type, _, input_name = name.rpartition(".")
        spec = input_spec(self.object_info, class_type, input_name)
        return None if spec is None else choices_of(spec)


def _strings(object_info: Mapping[str, Any], class_type: str, name: str) -> tuple[str, ...] | None:
    spec = input_spec(object_info, class_type, name)
    choices = None if spec is None else choices_of(spec)
    return None if choices is None else tuple(each for each in choices if isinstance(each, str))


def _checkpoint_of(prompt: Mapping[str, Any]) -> str | None:
    for node in prompt.values():
        if isinstance(node, dict) and str(node.get("class_type")).startswith("CheckpointLoader"):
            name = (node.get("inputs") or {}).get("ckpt_name")
            if isinstance(name, str):
                return name
    return None
