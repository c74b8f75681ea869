"""What CLAM's two variants share: their options, their attention and their loss on tiles."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bagscope.mil.aggregators.gated_attention import GatedAttention
from bagscope.mil.aggregators.instance_loss import InstanceLoss, TileLoss
from bagscope.specs import Spec

_ATTENTION = {"small": 256, "big": 384}


class CLAMOptions(Spec):
    """Options of CLAM."""

    size: Literal["small", "big"] = Field(
        default="small", description="width of the attention's hidden layer: small 256, big 384"
    )
    hidden: int = Field(default=512, ge=1, description="width of the projected tile")
    attention: int | None = Field(
        default=None, ge=1, description="width of the attention's hidden layer, in place of size"
    )
    dropout: float = Field(default=0.25, ge=0, lt=1, description="of the tile and of the gates")
    k: int = Field(default=8, ge=1, description="tiles at either end of attention that are judged")
    subtyping: bool = Field(
        default=False, description="whether the classes exclude each other within a bag"
    )
    instance_loss: TileLoss = Field(
        default="svm", description="loss of a judged tile: smooth SVM or cross-entropy"
    )


def attention_of(features: int, branches: int, options: CLAMOptions) -> GatedAttention:
    """Return CLAM's gated attention."""
    return GatedAttention(
        features,
        options.hidden,
        options.attention or _ATTENTION[options.size],
        branches,
        dropout=options.dropout,
        gate_dropout=options.dropout,
    )


def instance_loss_of(outputs: int, options: CLAMOptions) -> InstanceLoss:
    """Return CLAM's loss on tiles."""
    return InstanceLoss(
        options.hidden,
        outputs,
        k=options.k,
        subtyping=options.subtyping,
        tile_loss=options.instance_loss,
    )
