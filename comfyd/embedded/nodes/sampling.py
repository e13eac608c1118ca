"""The diffusion chain, as ComfyUI's graphs spell it, with a painter in place of the model.

Nothing here is diffusion, and no model is opened: checkpoints, encoders and VAEs are names, conditioning is the text
itself, a latent is a painting, and a sampler step is a layer of paint (:mod:`comfyd.embedded.painting`). Inputs, types
and bounds are those of ComfyUI 0.3.64, so that the usual sd1.5, sdxl and flux graphs run.
"""

import sys
from hashlib import blake2b
from typing import Any, Final

import attrs

from comfyd.embedded.nodes.pictures import Images, batch, jpeg
from comfyd.embedded.nodes.registry import (
    MAX_RESOLUTION_PX,
    SEED_MAX,
    Input,
    NodeContext,
    NodeFunction,
    NodeResult,
    NodeType,
    choice,
    integer,
    link,
    model_choice,
    number,
    text,
)
from comfyd.embedded.painting import Brief, Painting, finished, paint

_SAMPLERS: Final = (
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "dpm_2",
    "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu",
    "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm",
    "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "er_sde", "seeds_2",
    "seeds_3", "sa_solver", "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2",
)  # fmt: skip
_SCHEDULERS: Final = (
    "simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic",
    "kl_optimal",
)  # fmt: skip
_CLIP_TYPES: Final = (
    "stable_diffusion", "stable_cascade", "sd3", "stable_audio", "mochi", "ltxv", "pixart", "cosmos", "lumina2",
    "wan", "hidream", "chroma", "ace", "omnigen2", "qwen_image", "hunyuan_image",
)  # fmt: skip
_STAND_IN: Final = "A procedural stand-in: a pattern painter, not diffusion. "


@attrs.frozen(kw_only=True)
class Model:
    """What stands for a MODEL: its name and those of its LoRAs, with their strengths."""

    name: str
    loras: tuple[tuple[str, float], ...] = ()

    @property
    def boldness(self) -> float:
        """How wide its strokes are: each model and LoRA has its own hand, between 0.8 and 1.25."""
        bold = _hand(self.name)
        for name, strength in self.loras:
            bold *= _hand(name) ** max(-2.0, min(2.0, strength))
        return max(0.5, min(2.0, bold))


@attrs.frozen(kw_only=True)
class Named:
    """What stands for a CLIP or a VAE: its name."""

    name: str


@attrs.frozen(kw_only=True)
class Conditioning:
    """What stands for a CONDITIONING: the text, and the guidance of a Flux model if it was given."""

    text: str
    guidance: float | None = None


@attrs.frozen(kw_only=True)
class Latent:
    """What stands for a LATENT: one painting per picture; none when no pixels are computed, and *count* tells."""

    width_px: int
    height_px: int
    count: int
    paintings: tuple[Painting, ...] = attrs.field(default=(), repr=False)


def _hand(name: str) -> float:
    if "bold" in name:
        return 1.35
    if "fine" in name:
        return 0.72
    return 0.85 + 0.4 * blake2b(name.encode(), digest_size=1).digest()[0] / 255 if name else 1.0


def load_checkpoint(ctx: NodeContext, *, ckpt_name: str) -> NodeResult:
    """Name a model, its text encoder and its VAE."""
    del ctx
    return NodeResult(outputs=(Model(name=ckpt_name), Named(name=ckpt_name), Named(name=ckpt_name)))


def load_unet(ctx: NodeContext, *, unet_name: str, weight_dtype: str) -> NodeResult:
    """Name a model."""
    del ctx, weight_dtype
    return NodeResult(outputs=(Model(name=unet_name),))


def load_vae(ctx: NodeContext, *, vae_name: str) -> NodeResult:
    """Name a VAE."""
    del ctx
    return NodeResult(outputs=(Named(name=vae_name),))


def load_clip(ctx: NodeContext, *, clip_name: str, **_kind: Any) -> NodeResult:
    """Name a text encoder."""
    del ctx
    return NodeResult(outputs=(Named(name=clip_name),))


def load_two_clips(ctx: NodeContext, *, clip_name1: str, clip_name2: str, **_kind: Any) -> NodeResult:
    """Name a pair of text encoders."""
    del ctx
    return NodeResult(outputs=(Named(name=f"{clip_name1} + {clip_name2}"),))


def load_lora(
    ctx: NodeContext, *, model: Model, lora_name: str, strength_model: float, clip: Any = None, strength_clip: float = 0
) -> NodeResult:
    """Add a LoRA to a model: it changes the width of the strokes, with its strength."""
    del ctx, strength_clip
    changed = attrs.evolve(model, loras=(*model.loras, (lora_name, strength_model)))
    return NodeResult(outputs=(changed, clip))


def same_clip(ctx: NodeContext, *, clip: Any, **_layer: Any) -> NodeResult:
    """Pass the text encoder on; it has no layers."""
    del ctx
    return NodeResult(outputs=(clip,))


def encode_text(ctx: NodeContext, *, clip: Any, text: str, **_sizes: Any) -> NodeResult:
    """Take the text as it is."""
    del ctx, clip
    return NodeResult(outputs=(Conditioning(text=text),))


def encode_sdxl(ctx: NodeContext, *, clip: Any, text_g: str, text_l: str, **_sizes: Any) -> NodeResult:
    """Take both texts; one that says the same twice is taken once."""
    del ctx, clip
    return NodeResult(outputs=(Conditioning(text=text_g if text_g == text_l else f"{text_g} {text_l}"),))


def encode_flux(ctx: NodeContext, *, clip: Any, clip_l: str, t5xxl: str, guidance: float) -> NodeResult:
    """Take both texts, and the guidance."""
    del ctx, clip
    both = clip_l if clip_l == t5xxl else f"{clip_l} {t5xxl}"
    return NodeResult(outputs=(Conditioning(text=both, guidance=guidance),))


def flux_guidance(ctx: NodeContext, *, conditioning: Conditioning, guidance: float) -> NodeResult:
    """Set the guidance."""
    del ctx
    return NodeResult(outputs=(attrs.evolve(conditioning, guidance=guidance),))


def zero_out(ctx: NodeContext, *, conditioning: Conditioning) -> NodeResult:
    """Forget the text."""
    del ctx
    return NodeResult(outputs=(attrs.evolve(conditioning, text=""),))


def empty_latent(ctx: NodeContext, *, width: int, height: int, batch_size: int = 1) -> NodeResult:
    """Make blank paintings; sizes are cut to multiples of 8 pixels, as latents are."""
    del ctx
    wide, high = width // 8 * 8, height // 8 * 8
    blank = Painting(width_px=wide, height_px=high)
    return NodeResult(
        outputs=(Latent(width_px=wide, height_px=high, count=batch_size, paintings=(blank,) * batch_size),)
    )


def encode_pixels(ctx: NodeContext, *, pixels: Images, vae: Any) -> NodeResult:
    """Take pictures as subjects; their middle is kept, cut to multiples of 8 pixels."""
    del ctx, vae
    wide, high = max(8, pixels.width_px // 8 * 8), max(8, pixels.height_px // 8 * 8)
    paintings = []
    for picture in pixels.pictures:
        cut = picture.gravity("centre", wide, high, extend="copy")
        paintings.append(Painting(width_px=wide, height_px=high, subject=cut.cast("float").copy_memory()))
    return NodeResult(
        outputs=(Latent(width_px=wide, height_px=high, count=len(paintings), paintings=tuple(paintings)),)
    )


def decode_pixels(ctx: NodeContext, *, samples: Latent, vae: Any) -> NodeResult:
    """Look at the paintings, in the light."""
    del ctx, vae
    return NodeResult(outputs=(batch([finished(painting) for painting in samples.paintings]),))


def sample(
    ctx: NodeContext,
    *,
    model: Model,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent_image: Latent,
    denoise: float = 1.0,
) -> NodeResult:
    """Paint *steps* layers. Each picture of a batch has strokes of its own; the subject is that of the latent.

    *denoise* is how far the painter leaves the subject; with 0 it is not touched. Previews show the first picture.
    """
    brief = _brief(model, seed, cfg, f"{sampler_name} {scheduler}", positive, negative, denoise)
    afresh = tuple(_taken_as_subject(painting) for painting in latent_image.paintings)
    return _painted(ctx, attrs.evolve(latent_image, paintings=afresh), brief, first=0, last=steps, steps=steps)


def sample_advanced(
    ctx: NodeContext,
    *,
    model: Model,
    add_noise: str,
    noise_seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent_image: Latent,
    start_at_step: int,
    end_at_step: int,
    return_with_leftover_noise: str,
) -> NodeResult:
    """Paint some of the layers; without new noise it goes on where another sampler stopped."""
    del return_with_leftover_noise
    brief = _brief(model, noise_seed, cfg, f"{sampler_name} {scheduler}", positive, negative, 1.0)
    paintings = latent_image.paintings
    if add_noise == "enable":
        paintings = tuple(_taken_as_subject(painting) for painting in paintings)
    last = min(steps, end_at_step)
    first = min(start_at_step, last)
    return _painted(ctx, attrs.evolve(latent_image, paintings=paintings), brief, first=first, last=last, steps=steps)


def _brief(
    model: Model, seed: int, cfg: float, manner: str, positive: Conditioning, negative: Conditioning, denoise: float
) -> Brief:
    guidance = cfg if positive.guidance is None else positive.guidance * 2
    # What is not wanted, and the manner of sampling, change the strokes but not the colours: they go into the seed.
    mixed = blake2b(f"{seed}|{negative.text}|{manner}".encode(), digest_size=8).digest()
    return Brief(
        text=positive.text,
        seed=int.from_bytes(mixed, "big"),
        strength=denoise,
        guidance=guidance,
        boldness=model.boldness,
    )


def _taken_as_subject(painting: Painting) -> Painting:
    if painting.canvas is None:
        return painting
    seen = finished(painting).cast("float").copy_memory()
    return Painting(width_px=painting.width_px, height_px=painting.height_px, subject=seen)


def _painted(ctx: NodeContext, latent: Latent, brief: Brief, *, first: int, last: int, steps: int) -> NodeResult:
    """Run the painters of all pictures side by side, a step at a time, with progress after each step."""
    bar = _ProgressBar(last - first)
    painters = [
        paint(painting, attrs.evolve(brief, seed=brief.seed + number), first=first, last=last, steps=steps)
        for number, painting in enumerate(latent.paintings)
    ]
    paintings = latent.paintings
    for done in range(1, last - first + 1):
        ctx.pause(ctx.settings.step_delay_s)
        paintings = tuple(next(painter) for painter in painters)
        shown = jpeg(finished(paintings[0]), ctx.settings.preview_size_px) if ctx.previews else None
        ctx.progress.update(done, last - first, shown)
        bar.show(done)
    bar.end()
    return NodeResult(outputs=(attrs.evolve(latent, paintings=paintings),))


class _ProgressBar:
    """A line on stderr that is written over and over, as the samplers of ComfyUI (tqdm) do; they are logs to some."""

    def __init__(self, total: int) -> None:
        self._total = total

    def show(self, done: int) -> None:
        filled = "█" * (10 * done // self._total)
        sys.stderr.write(f"\r{100 * done // self._total:3}%|{filled:<10}| {done}/{self._total}")
        sys.stderr.flush()

    def end(self) -> None:
        if self._total:
            sys.stderr.write("\n")
            sys.stderr.flush()


# What --cost none runs instead.


def _free_sample(ctx: NodeContext, *, steps: int, latent_image: Latent, **_others: Any) -> NodeResult:
    return _free_steps(ctx, latent_image, steps)


def _free_sample_advanced(
    ctx: NodeContext, *, steps: int, start_at_step: int, end_at_step: int, latent_image: Latent, **_others: Any
) -> NodeResult:
    return _free_steps(ctx, latent_image, max(0, min(steps, end_at_step) - start_at_step))


def _free_steps(ctx: NodeContext, latent: Latent, steps: int) -> NodeResult:
    for done in range(1, steps + 1):
        ctx.pause(ctx.settings.step_delay_s)
        ctx.progress.update(done, steps, None)
    return NodeResult(outputs=(latent,))


def _free_encode(ctx: NodeContext, *, pixels: Images, vae: Any) -> NodeResult:
    del ctx, vae
    return NodeResult(outputs=(Latent(width_px=pixels.width_px, height_px=pixels.height_px, count=pixels.count),))


def _free_decode(ctx: NodeContext, *, samples: Latent, vae: Any) -> NodeResult:
    del ctx, vae
    return NodeResult(outputs=(Images(width_px=samples.width_px, height_px=samples.height_px, count=samples.count),))


_RESOLUTION: Final = {"min": 0, "max": MAX_RESOLUTION_PX}
_LORA_STRENGTH: Final = {"min": -100.0, "max": 100.0, "step": 0.01}
_SEED: Final = {"min": 0, "max": SEED_MAX, "control_after_generate": True}
_PROMPT_TEXT: Final = {"multiline": True, "dynamicPrompts": True}


def _vae_choice() -> Input:
    return choice("vae_name", lambda library: [*library.models.names("vae"), "pixel_space"])


def _loader(
    name: str, display_name: str, run: NodeFunction, inputs: tuple[Input, ...], *outputs: str, advanced: bool = False
) -> NodeType:
    return NodeType(
        name=name,
        display_name=display_name,
        category="advanced/loaders" if advanced else "loaders",
        description=_STAND_IN + "Loads nothing but the name.",
        run=run,
        inputs=inputs,
        outputs=outputs,
    )


def _encoder(
    name: str, display_name: str, run: NodeFunction, *inputs: Input, category: str = "conditioning"
) -> NodeType:
    return NodeType(
        name=name,
        display_name=display_name,
        category=category,
        description=_STAND_IN + "Takes the text as it is.",
        run=run,
        inputs=inputs,
        outputs=("CONDITIONING",),
    )


def _latent_sizes(default: int, step: int) -> tuple[Input, ...]:
    return (
        integer("width", default, min=16, max=MAX_RESOLUTION_PX, step=step),
        integer("height", default, min=16, max=MAX_RESOLUTION_PX, step=step),
        integer("batch_size", 1, min=1, max=4096),
    )


NODES: Final = (
    _loader(
        "CheckpointLoaderSimple",
        "Load Checkpoint (pattern, not a model)",
        load_checkpoint,
        (model_choice("ckpt_name", "checkpoints", tooltip="The name of the checkpoint (model) to load."),),
        "MODEL",
        "CLIP",
        "VAE",
    ),
    _loader(
        "UNETLoader",
        "Load Diffusion Model (pattern, not a model)",
        load_unet,
        (
            model_choice("unet_name", "diffusion_models"),
            choice("weight_dtype", ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")),
        ),
        "MODEL",
        advanced=True,
    ),
    _loader("VAELoader", "Load VAE (pattern, not a model)", load_vae, (_vae_choice(),), "VAE"),
    _loader(
        "CLIPLoader",
        "Load CLIP (pattern, not a model)",
        load_clip,
        (
            model_choice("clip_name", "text_encoders"),
            choice("type", _CLIP_TYPES),
            choice("device", ("default", "cpu"), required=False, advanced=True),
        ),
        "CLIP",
        advanced=True,
    ),
    _loader(
        "DualCLIPLoader",
        "DualCLIPLoader (pattern, not a model)",
        load_two_clips,
        (
            model_choice("clip_name1", "text_encoders"),
            model_choice("clip_name2", "text_encoders"),
            choice("type", ("sdxl", "sd3", "flux", "hunyuan_video", "hidream", "hunyuan_image")),
            choice("device", ("default", "cpu"), required=False, advanced=True),
        ),
        "CLIP",
        advanced=True,
    ),
    _loader(
        "LoraLoader",
        "Load LoRA (pattern, not a model)",
        load_lora,
        (
            link("model", "MODEL", tooltip="The diffusion model the LoRA will be applied to."),
            link("clip", "CLIP", tooltip="The CLIP model the LoRA will be applied to."),
            model_choice("lora_name", "loras", tooltip="The name of the LoRA."),
            number("strength_model", 1.0, **_LORA_STRENGTH),
            number("strength_clip", 1.0, **_LORA_STRENGTH),
        ),
        "MODEL",
        "CLIP",
    ),
    _loader(
        "LoraLoaderModelOnly",
        "LoraLoaderModelOnly (pattern, not a model)",
        load_lora,
        (link("model", "MODEL"), model_choice("lora_name", "loras"), number("strength_model", 1.0, **_LORA_STRENGTH)),
        "MODEL",
    ),
    NodeType(
        name="CLIPSetLastLayer",
        display_name="CLIP Set Last Layer (no effect)",
        category="conditioning",
        run=same_clip,
        inputs=(link("clip", "CLIP"), integer("stop_at_clip_layer", -1, min=-24, max=-1, step=1)),
        outputs=("CLIP",),
    ),
    _encoder(
        "CLIPTextEncode",
        "CLIP Text Encode (Prompt) (pattern)",
        encode_text,
        text("text", **_PROMPT_TEXT, tooltip="The text to be encoded."),
        link("clip", "CLIP", tooltip="The CLIP model used for encoding the text."),
    ),
    _encoder(
        "CLIPTextEncodeSDXL",
        "CLIPTextEncodeSDXL (pattern)",
        encode_sdxl,
        link("clip", "CLIP"),
        integer("width", 1024, **_RESOLUTION),
        integer("height", 1024, **_RESOLUTION),
        integer("crop_w", 0, **_RESOLUTION),
        integer("crop_h", 0, **_RESOLUTION),
        integer("target_width", 1024, **_RESOLUTION),
        integer("target_height", 1024, **_RESOLUTION),
        text("text_g", **_PROMPT_TEXT),
        text("text_l", **_PROMPT_TEXT),
        category="advanced/conditioning",
    ),
    _encoder(
        "CLIPTextEncodeSDXLRefiner",
        "CLIPTextEncodeSDXLRefiner (pattern)",
        encode_text,
        number("ascore", 6.0, min=0.0, max=1000.0, step=0.01),
        integer("width", 1024, **_RESOLUTION),
        integer("height", 1024, **_RESOLUTION),
        text("text", **_PROMPT_TEXT),
        link("clip", "CLIP"),
        category="advanced/conditioning",
    ),
    _encoder(
        "CLIPTextEncodeFlux",
        "CLIPTextEncodeFlux (pattern)",
        encode_flux,
        link("clip", "CLIP"),
        text("clip_l", **_PROMPT_TEXT),
        text("t5xxl", **_PROMPT_TEXT),
        number("guidance", 3.5, min=0.0, max=100.0, step=0.1),
        category="advanced/conditioning/flux",
    ),
    _encoder(
        "FluxGuidance",
        "FluxGuidance (pattern)",
        flux_guidance,
        link("conditioning", "CONDITIONING"),
        number("guidance", 3.5, min=0.0, max=100.0, step=0.1),
        category="advanced/conditioning/flux",
    ),
    _encoder(
        "ConditioningZeroOut",
        "ConditioningZeroOut (pattern)",
        zero_out,
        link("conditioning", "CONDITIONING"),
        category="advanced/conditioning",
    ),
    NodeType(
        name="EmptyLatentImage",
        display_name="Empty Latent Image (pattern)",
        category="latent",
        description=_STAND_IN + "A blank painting.",
        run=empty_latent,
        inputs=_latent_sizes(512, 8),
        outputs=("LATENT",),
    ),
    NodeType(
        name="EmptySD3LatentImage",
        display_name="EmptySD3LatentImage (pattern)",
        category="latent/sd3",
        description=_STAND_IN + "A blank painting.",
        run=empty_latent,
        inputs=_latent_sizes(1024, 16),
        outputs=("LATENT",),
    ),
    NodeType(
        name="VAEEncode",
        display_name="VAE Encode (pattern)",
        category="latent",
        description=_STAND_IN + "Takes the picture as the painter's subject.",
        run=encode_pixels,
        costless=_free_encode,
        threaded=True,
        inputs=(link("pixels", "IMAGE"), link("vae", "VAE")),
        outputs=("LATENT",),
    ),
    NodeType(
        name="VAEDecode",
        display_name="VAE Decode (pattern)",
        category="latent",
        description=_STAND_IN + "Looks at the painting.",
        run=decode_pixels,
        costless=_free_decode,
        threaded=True,
        inputs=(
            link("samples", "LATENT", tooltip="The latent to be decoded."),
            link("vae", "VAE", tooltip="The VAE model used for decoding the latent."),
        ),
        outputs=("IMAGE",),
    ),
    NodeType(
        name="KSampler",
        display_name="KSampler (pattern, not diffusion)",
        category="sampling",
        description=_STAND_IN + "Paints the latent in as many layers as there are steps.",
        run=sample,
        costless=_free_sample,
        threaded=True,
        inputs=(
            link("model", "MODEL", tooltip="The model used for denoising the input latent."),
            integer("seed", 0, **_SEED, tooltip="The random seed used for creating the noise."),
            integer("steps", 20, min=1, max=10000, tooltip="The number of steps used in the denoising process."),
            number(
                "cfg", 8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="How strong colours and contrast get."
            ),
            choice("sampler_name", _SAMPLERS, tooltip="Another sampler paints other strokes."),
            choice("scheduler", _SCHEDULERS, tooltip="Another scheduler paints other strokes."),
            link("positive", "CONDITIONING", tooltip="What to paint; its words choose the colours."),
            link("negative", "CONDITIONING", tooltip="What not to paint; it changes the strokes."),
            link("latent_image", "LATENT", tooltip="The latent image to denoise."),
            number("denoise", 1.0, min=0.0, max=1.0, step=0.01, tooltip="How far the painting leaves its subject."),
        ),
        outputs=("LATENT",),
        output_tooltips=("The denoised latent.",),
    ),
    NodeType(
        name="KSamplerAdvanced",
        display_name="KSampler (Advanced) (pattern, not diffusion)",
        category="sampling",
        description=_STAND_IN + "Paints some of the layers.",
        run=sample_advanced,
        costless=_free_sample_advanced,
        threaded=True,
        inputs=(
            link("model", "MODEL"),
            choice("add_noise", ("enable", "disable")),
            integer("noise_seed", 0, **_SEED),
            integer("steps", 20, min=1, max=10000),
            number("cfg", 8.0, min=0.0, max=100.0, step=0.1, round=0.01),
            choice("sampler_name", _SAMPLERS),
            choice("scheduler", _SCHEDULERS),
            link("positive", "CONDITIONING"),
            link("negative", "CONDITIONING"),
            link("latent_image", "LATENT"),
            integer("start_at_step", 0, min=0, max=10000),
            integer("end_at_step", 10000, min=0, max=10000),
            choice("return_with_leftover_noise", ("disable", "enable")),
        ),
        outputs=("LATENT",),
    ),
)
