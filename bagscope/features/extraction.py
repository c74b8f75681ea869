"""What an extraction is asked to be: options, the fingerprint of its files. Light to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from bagscope.artifacts import Json
from bagscope.specs import Spec

NUMERICS = 1
"""Raised by hand, with a changelog line, when the same inputs would give other vectors."""

DEFAULT_ENCODERS = ("efficientnet-lite0",)


class ExtractSpec(Spec):
    """How tiles become vectors."""

    encoders: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=DEFAULT_ENCODERS, description="encoders by name, all fed in one pass"
    )
    stain: Literal["none", "macenko", "reinhard"] = Field(
        default="none", description="stain normalisation before the encoder"
    )
    stored_dtype: Literal["float16", "float32"] = Field(
        default="float16", description="of the stored vectors"
    )
    device: str = Field(
        default="auto",
        description="cpu, cuda, mps, or several such as cuda:0,cuda:1; auto takes all GPUs",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the matrix products; auto is the encoder's own"
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="tiles per batch; found once if not set"
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="torch.compile; auto where it pays"
    )
    weights: str | None = Field(
        default=None, description="folder of weights that encoders fetch made"
    )
    trust_remote_code: bool = Field(
        default=False, description="let code of a model's repository run"
    )


def feature_fields(
    tile_fingerprint: str, identity: Mapping[str, Json], weights_sha256: str
) -> dict[str, Json]:
    """Return what the fingerprint of a feature file is made of."""
    return {
        "stage": "extract",
        "numerics": NUMERICS,
        "tiles": tile_fingerprint,
        "encoder": dict(identity),
        "weights_sha256": weights_sha256,
    }
