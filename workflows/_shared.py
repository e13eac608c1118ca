"""Inputs that the examples have in common: a type, its bounds, and what the docs say of it."""

from typing import Annotated, Literal

from comfyd.workflow import Field, Image, Sampler, Scheduler, Seed

Prompt = Annotated[str, Field(description="What the picture shall show.", min_length=1)]
NegativePrompt = Annotated[str, Field(description="What it shall not show.")]
Pixels = Annotated[int, Field(description="Pixels; a multiple of 8.", ge=64, le=4096, multiple_of=8)]
FluxPixels = Annotated[int, Field(description="Pixels; a multiple of 16.", ge=64, le=4096, multiple_of=16)]
NoiseSeed = Annotated[Seed, Field(description="The same seed gives the same picture.")]
Steps = Annotated[int, Field(description="Steps of the sampler.", ge=1, le=100)]
Cfg = Annotated[float, Field(description="How closely the prompt is followed.", ge=0, le=20)]
Denoise = Annotated[float, Field(description="How much is painted anew: 1 is all of it.", ge=0, le=1)]
SamplerName = Annotated[Sampler, Field(description="The sampler.")]
SchedulerName = Annotated[Scheduler, Field(description="How the noise goes down from step to step.")]
SourceImage = Annotated[Image, Field(description="The picture to start from: a URL, base64, or a file's name.")]
Interpolation = Annotated[
    Literal["nearest-exact", "bilinear", "area", "bicubic", "lanczos"], Field(description="How it is scaled.")
]
Crop = Annotated[
    Literal["disabled", "center"], Field(description="Whether it is cropped to the proportions asked for.")
]
