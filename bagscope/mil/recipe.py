"""A recipe: aggregator × regime × objective, and how it is trained, as one frozen block of options.

The published methods are points in this space. `configs/` holds them, one YAML file each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from bagscope.errors import ConfigError
from bagscope.mil.cases import Per
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.specs import Spec

Precision = Literal["float32", "bfloat16", "float16"]
Sampling = Literal["uniform", "spatial"]
FULL = "full"
"""The plain regime: a step learns from the bags as they are presented."""


class AggregatorSpec(Spec):
    """Which aggregator, and its own options."""

    name: str = Field(default="abmil", description="of a registered aggregator")
    options: Mapping[str, Any] = Field(default={}, description="its own options")


class RegimeSpec(Spec):
    """What is done around the aggregator while it learns, and its own options."""

    name: str = Field(default=FULL, description="of a regime; full shows whole bags")
    options: Mapping[str, Any] = Field(default={}, description="its own options")


class BagSpec(Spec):
    """How bags are presented."""

    per: Per = Field(default="slide", description="what a bag is of: slide or patient")
    bags_per_step: int = Field(default=1, ge=1, description="bags that one step learns from")
    batch_tiles: int = Field(
        default=65_536, ge=1, description="tiles worked on at a time; bounds memory, not results"
    )
    sample_tiles: int | None = Field(
        default=None, ge=1, description="tiles of a bag that a training step sees; all if not set"
    )
    sampling: Sampling = Field(
        default="uniform", description="how they are drawn: uniform or spatial"
    )
    first_tiles: int | None = Field(
        default=None,
        ge=1,
        description="tiles of a bag that the first steps see: a curriculum, which grows to "
        "sample_tiles, or to whole bags; none if not set",
    )
    grow_share: float = Field(
        default=0.5, gt=0, le=1, description="share of the epochs over which first_tiles grows"
    )
    tile_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of a bag's tiles that a training step leaves out",
    )
    standardise: bool = Field(
        default=False, description="bring tiles to the training tiles' mean 0 and deviation 1"
    )
    feature_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of feature values set to zero in training"
    )
    noise: float = Field(
        default=0.0, ge=0, description="noise on training features, in standard deviations of a bag"
    )
    balanced: bool = Field(
        default=False, description="draw training bags so that every class comes equally often"
    )

    @model_validator(mode="after")
    def _grows(self) -> BagSpec:
        first, last = self.first_tiles, self.sample_tiles
        if first is not None and last is not None and first > last:
            raise ValueError(f"first_tiles is {first} and is to grow to sample_tiles, {last}")
        if self.sampling == "spatial" and first is None and last is None:
            raise ValueError(
                "sampling is spatial, and steps see all tiles; set sample_tiles, or leave it out"
            )
        if self.grow_share != type(self).model_fields["grow_share"].default and first is None:
            raise ValueError("grow_share is of first_tiles, and there are none; set first_tiles")
        return self


class OptimiserSpec(Spec):
    """How the weights are changed."""

    name: Literal["adamw", "adam", "radam", "sgd"] = Field(
        default="adamw", description="adamw, adam, radam or sgd"
    )
    lr: float = Field(default=1e-4, gt=0, description="learning rate after warm-up")
    weight_decay: float = Field(default=1e-5, ge=0, description="weight decay")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="of the Adam family's running means"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd")
    schedule: Literal["constant", "cosine", "plateau"] = Field(
        default="cosine", description="of the learning rate: constant, cosine or plateau"
    )
    warmup_epochs: float = Field(default=0.0, ge=0, description="of linear rise from zero")
    min_lr: float = Field(default=0.0, ge=0, description="where cosine and plateau end")
    plateau_patience: int = Field(
        default=5, ge=1, description="epochs without improvement before plateau halves the rate"
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="largest norm of a step's gradient; none if not set"
    )

    @field_validator("betas")
    @classmethod
    def _within(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both must be at least 0 and below 1")
        return betas


class TrainingSpec(Spec):
    """How long is trained, what is kept of it, and in which arithmetic."""

    epochs: int = Field(default=50, ge=1, description="most epochs")
    patience: int | None = Field(
        default=10, ge=1, description="epochs without improvement before stopping; never if not set"
    )
    min_epochs: int = Field(default=5, ge=0, description="epochs before stopping may begin")
    monitor: Literal["loss", "metric"] = Field(
        default="loss",
        description="what is watched on the inner validation part: its loss, or the first target's "
        "AUROC, κ, R² or C-index",
    )
    checkpoint: Literal["best", "last", "averaged"] = Field(
        default="best", description="the weights that are kept: best, last or averaged"
    )
    average_epochs: int = Field(
        default=5, ge=1, description="last epochs whose weights `averaged` takes the mean of"
    )
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="of an exponential mean of the weights; none if unset"
    )
    precision: Precision = Field(
        default="float32", description="of the products: float32, bfloat16 or float16 (GPU)"
    )
    keep_mib: int = Field(
        default=1024,
        ge=0,
        description="activations that an attention keeps for the way back, in MiB; what is beyond "
        "is computed anew, which takes longer: 0 trains the longest bags",
    )
    compile: bool = Field(default=False, description="whether torch.compile is used")
    calibrate: bool = Field(
        default=True, description="fit a temperature on the inner validation part where it is large"
    )
    threshold: Literal["youden", "half"] = Field(
        default="youden",
        description="decision threshold of two classes, from the inner validation part, or ½",
    )

    def require_device(self, device: str) -> None:
        """Refuse a device that can't multiply in the precision.

        Raises:
            ConfigError: says what to use.
        """
        if self.precision == "float16" and device == "cpu":
            raise ConfigError(
                "training.precision is float16, which CPUs do not multiply; use float32, or a GPU "
                "with --device cuda"
            )


class TrainSpec(Spec):
    """A recipe."""

    aggregator: AggregatorSpec = AggregatorSpec()
    regime: RegimeSpec = RegimeSpec()
    bags: BagSpec = BagSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    optimiser: OptimiserSpec = OptimiserSpec()
    training: TrainingSpec = TrainingSpec()
