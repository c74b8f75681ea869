"""What an encoder is, as facts: where its weights come from, what it sees, what it returns.

The name of an encoder does not identify its embedding: the same network gives other vectors with
another crop, other constants or another pooling. So the whole of `EncoderSpec.identity` goes into
the fingerprint of every feature file, together with the hash of the weights.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import Field, field_serializer, model_validator

from bagscope.artifacts import Json
from bagscope.specs import Spec

Rgb = tuple[float, float, float]

IMAGENET_MEAN: Rgb = (0.485, 0.456, 0.406)
IMAGENET_STD: Rgb = (0.229, 0.224, 0.225)
HALF: Rgb = (0.5, 0.5, 0.5)
CLIP_MEAN: Rgb = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Rgb = (0.26862954, 0.26130258, 0.27577711)

Source = Literal["bagscope", "timm", "transformers", "open_clip", "remote-code", "package"]
"""Who builds the network. "remote-code" runs code of the model's repository, "package" needs a
package that bagscope does not depend on; the others are native."""

Pooling = Literal["output", "token", "token+mean", "mean", "map"]
"""How a vector is made of what the network returns.

output      the network's own (B, D)
token       the first (class) token of (B, tokens, D)
token+mean  the class token beside the mean of the patch tokens: (B, 2 D)
mean        the mean of the patch tokens
map         the mean over the places of a feature map (B, D, h, w)

Patch tokens are those after the `num_prefix_tokens` of the network (class and registers).
"""

_UNPORTABLE = re.compile(r"[^A-Za-z0-9._+-]+")
# Facts for people; they don't change a number.
_NOT_IDENTITY = (
    "title", "synonyms", "package", "tile_px", "mpp",
    "licence", "commercial_use", "gated", "card", "run_here",
)  # fmt: skip


class EncoderSpec(Spec):
    """All that is known of one embedding."""

    name: str = Field(description="what the user types; one name for one embedding")
    title: str = Field(default="", description="what the authors call it")
    synonyms: tuple[str, ...] = Field(
        default=(), description="its names in other tools; suggested, never taken for the name"
    )
    source: Source = Field(description="who builds the network")
    architecture: str = Field(
        default="", description="timm or open_clip architecture, transformers class"
    )
    builder_args: dict[str, Any] = Field(
        default_factory=dict, description="arguments that the network is built with"
    )
    hub_id: str | None = Field(
        default=None, description="repository of the weights; datasets/... for a data set"
    )
    revision: str | None = Field(default=None, description="commit of that repository, if pinned")
    weights_file: str | None = Field(
        default=None, description="file of that repository, or path of a local checkpoint"
    )
    package: str | None = Field(
        default=None, description='what to install where source is "package"'
    )

    input_px: int = Field(ge=8, description="edge of what the network sees")
    resize_px: int | None = Field(
        default=None,
        description="tiles are resized to this before the centre crop to input_px; None: input_px",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bicubic", description="of the resize; always antialiased, rounded to 8 bits"
    )
    mean: Rgb = Field(default=IMAGENET_MEAN, description="subtracted from RGB in 0 ... 1")
    std: Rgb = Field(default=IMAGENET_STD, description="divided by afterwards")
    stain: Literal["none", "macenko", "reinhard"] = Field(
        default="none", description="stain normalisation of the tile before everything else"
    )
    pooling: Pooling = Field(default="output", description="how the vector is made")
    prefix_tokens: int = Field(
        default=0, ge=0, description="class and register tokens before the patch tokens"
    )
    normalise: bool = Field(default=False, description="vectors are scaled to length 1")
    dimension: int = Field(ge=1, description="length of the vector")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the matrix products on a GPU, as the authors use it"
    )

    tile_px: int = Field(default=256, description="recommended tile edge")
    mpp: float = Field(default=0.5, description="recommended micrometres per tile pixel")
    licence: str = Field(default="", description="of the weights, as stated on the card")
    commercial_use: bool | None = Field(
        default=None, description="whether the licence allows it; None where not clear"
    )
    gated: bool | None = Field(
        default=None, description="whether access must be granted; None where not known"
    )
    card: str = Field(default="", description="model card, where access is asked for")
    run_here: bool = Field(
        default=False, description="run with its real weights by the project, not only built"
    )

    @field_serializer("weights_file", when_used="json")
    def _without_folder(self, value: str | None) -> str | None:
        # JSON goes into artefacts, where a folder of this machine has no place.
        return PurePath(value).name if value and PurePath(value).is_absolute() else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.resize_px is not None and self.resize_px < self.input_px:
            raise ValueError(f"resize_px {self.resize_px} is below input_px {self.input_px}")
        if self.source == "package" and not self.package:
            raise ValueError('source "package" needs the name of the package')
        return self

    @property
    def is_native(self) -> bool:
        """Return whether bagscope's own dependencies or extras build the network."""
        return self.source not in ("remote-code", "package")

    @property
    def folder(self) -> str:
        """Return the name as a portable folder name: `timm:vit_tiny` is `timm-vit_tiny`."""
        name = _UNPORTABLE.sub("-", self.name).strip("-.")
        return name if self.stain == "none" else f"{name}+{self.stain}"

    def identity(self) -> dict[str, Json]:
        """Return the fields that change the vector, as JSON."""
        return self.model_dump(mode="json", exclude=set(_NOT_IDENTITY))
