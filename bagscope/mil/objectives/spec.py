"""What an objective may be asked to do: the `objective:` block of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from bagscope.specs import Spec

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ClassWeight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _word_or_numbers(value: Any) -> str:
    """Tell which of the two was meant, so that an error speaks of that one alone."""
    return "word" if isinstance(value, str) else "numbers"


ClassWeights = Annotated[
    Annotated[Literal["none", "balanced"], Tag("word")]
    | Annotated[tuple[ClassWeight, ...], Tag("numbers")],
    Discriminator(_word_or_numbers),
]

DEFAULT_BINS = 4
"""Four, as the field's survival scripts have it."""


class EntropySpec(Spec):
    """The reward for attention that spreads (AEM): weight · Σ a log a, the mean over columns."""

    weight: Weight = Field(default=0.0, description="of the term, at the start")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="how the weight moves from `weight` to `end`"
    )
    end: Weight = Field(default=0.0, description="of a cosine, the weight at the end")
    per_log_n: bool = Field(
        default=False, description="whether each bag's entropy is divided by log of its tiles"
    )

    @model_validator(mode="after")
    def _used(self) -> EntropySpec:
        if self.schedule == "constant" and self.end != 0:
            raise ValueError("end belongs to schedule: cosine, and the schedule is constant")
        return self

    @property
    def is_on(self) -> bool:
        """Return whether the term has a weight at any time."""
        return self.weight > 0 or self.end > 0


class ObjectiveSpec(Spec):
    """How the loss is made of labels, logits and the terms that an aggregator brings."""

    class_weights: ClassWeights = Field(
        default="none",
        description="of classes, ordinal and multilabel: none, balanced (n / (k · n_c) of the "
        "training cases), or one number per class",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="of classes and multilabel: share given to all alike"
    )
    focal_gamma: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="of classes and multilabel: the loss times (1 - p of the truth) to this power",
    )
    ordinal: Literal["corn"] = Field(
        default="corn", description="of ordinal: a logit per step, P(y > j) = Π σ (Shi et al. 2023)"
    )
    regression: Literal["mse", "huber", "mae"] = Field(
        default="mse", description="of regression, in standard deviations of the training labels"
    )
    survival: Literal["nll", "cox", "ce_surv"] = Field(
        default="nll", description="discrete-time likelihood, Cox's partial one, or cross-entropy"
    )
    bins: int = Field(
        default=DEFAULT_BINS, ge=2, le=100, description="of nll and ce_surv: number of time bins"
    )
    nll_alpha: float = Field(
        default=0.0, ge=0, le=1, description="of nll and ce_surv: extra weight of observed events"
    )
    terms: Mapping[str, Weight] = Field(
        default_factory=dict, description="weight of each term of the loss; 1 where not given"
    )
    entropy: EntropySpec = Field(default=EntropySpec(), description="of the attention")

    @model_validator(mode="after")
    def _used(self) -> ObjectiveSpec:
        if self.class_weights == ():
            raise ValueError("class_weights is empty; give one number per class, or none")
        if self.survival == "cox" and (self.bins != DEFAULT_BINS or self.nll_alpha != 0):
            raise ValueError("bins and nll_alpha belong to nll and ce_surv, and survival is cox")
        if "entropy" in self.terms:
            raise ValueError("terms names entropy; its weight is entropy.weight")
        named = sorted(name for name in self.terms if name.startswith("bag/"))
        if named:
            raise ValueError(f"terms names {named[0]}; the weight of a target stands in the target")
        return self
