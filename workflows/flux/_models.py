"""The four files of a Flux model, and the nodes that load them."""

from typing import Annotated, Protocol

from comfyd.workflow import Field, Graph, Link, installed_model, models

Unet = Annotated[str, models("diffusion_models"), Field(description="The model.")]
ClipL = Annotated[str, models("text_encoders"), Field(description="The small text encoder, CLIP-L.")]
T5 = Annotated[str, models("text_encoders"), Field(description="The large text encoder, T5-XXL.")]
Vae = Annotated[str, models("vae"), Field(description="The VAE.")]
Guidance = Annotated[float, Field(description="How closely the prompt is followed.", ge=0, le=100)]

unet = installed_model("diffusion_models", "flux")
clip_l = installed_model("text_encoders", "clip_l", "clip-l")
t5 = installed_model("text_encoders", "t5xxl")
vae = installed_model("vae", "ae.safetensors", "flux", "vae")


class Files(Protocol):
    """An input that names the files."""

    @property
    def unet(self) -> str: ...
    @property
    def clip_l(self) -> str: ...
    @property
    def t5(self) -> str: ...
    @property
    def vae(self) -> str: ...


def load(graph: Graph, files: Files) -> tuple[Link, Link, Link]:
    """Load model, text encoders and VAE."""
    model = graph.node("UNETLoader", unet_name=files.unet, weight_dtype="default")
    clip = graph.node("DualCLIPLoader", clip_name1=files.t5, clip_name2=files.clip_l, type="flux")
    return model[0], clip[0], graph.node("VAELoader", vae_name=files.vae)[0]
