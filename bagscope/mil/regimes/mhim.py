"""MHIM-MIL (Tang et al. 2023, 2024): a teacher hides the easy tiles, the student learns the others.

Per step, with a student S and a teacher T of the same shape, T's dropout on and no gradient in it:

    F_t, scores = T(all tiles);  masked = by rank of the scores, and by chance   (see `masks`)
    logits, F_s = S(unmasked tiles [, some of them recycled]),                   (see `recycle`)
    consistency = −Σ_j softmax(F_t / τ)_j · log softmax(F_s / τ_s)_j   over the embedding
    loss = loss of the logits + α · consistency,   α = objective.terms.consistency
    T ← μ T + (1 − μ) S

T begins as the plain model, trained first on the same bags. In evaluation S sees all tiles.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms, segment_softmax
from bagscope.mil.objectives.fitted import Losses
from bagscope.mil.recipe import RegimeSpec, TrainSpec
from bagscope.mil.regimes.draws import uniforms
from bagscope.mil.regimes.embedded import Embedded, EmbeddingSpec
from bagscope.mil.regimes.masks import MaskSpec, masked_tiles
from bagscope.mil.regimes.ranking import own_scores
from bagscope.mil.regimes.recycle import Recycle, RecycleSpec
from bagscope.mil.regimes.regime import BuildInner, Judge, Preparation, Regime
from bagscope.mil.regimes.registry import register_regime, without_regime
from bagscope.mil.targets import TargetSpec
from bagscope.specs import Spec, parse_spec

_RECYCLED = 3
"""What a draw is for, after those of the masks."""
_TEACHER_SEED = 0x7EAC4E5
"""The teacher drops other units than the student."""


class MHIMOptions(Spec):
    """Options of MHIM-MIL."""

    embedding: EmbeddingSpec | None = Field(
        default=None, description="a layer before the aggregator; recycled tiles lie behind it"
    )
    masks: MaskSpec = Field(default=MaskSpec(), description="which tiles are not shown")
    score: Literal["attention", "class_aware"] = Field(
        default="attention",
        description="of a tile, for masks: the teacher's own score, or the highest probability of "
        "a class for what the tile adds to the logits",
    )
    recycle: RecycleSpec | None = Field(
        default=None, description="tokens made of more tiles that are taken away; none if not set"
    )
    consistency: bool = Field(
        default=True,
        description="whether the student's embedding is held to the teacher's; its weight is "
        "objective.terms.consistency",
    )
    temperature: float = Field(default=0.1, gt=0, description="of the teacher's embedding")
    student_temperature: float = Field(default=1.0, gt=0, description="of the student's")
    momentum: float = Field(default=0.9999, ge=0, le=1, description="of the teacher's weights")
    momentum_schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="of the momentum: constant, or a cosine that ends at 1"
    )
    warm_epochs: int | None = Field(
        default=None,
        ge=0,
        description="epochs of the plain training that the teacher comes from; as many as of the "
        "student's if not set, 0 for a teacher that begins as the student",
    )
    student_start: Literal["none", "embedding", "all"] = Field(
        default="none", description="what the student takes of the plain training's weights"
    )
    answer: Literal["student", "teacher"] = Field(
        default="student", description="who answers in evaluation"
    )

    @model_validator(mode="after")
    def _consistent(self) -> MHIMOptions:
        if self.student_start == "embedding" and self.embedding is None:
            raise ValueError("student_start is embedding, and there is none; set embedding")
        if self.student_start != "none" and self.warm_epochs == 0:
            raise ValueError(
                f"student_start is {self.student_start}, of a plain training of no epochs; change "
                "warm_epochs"
            )
        return self

    @property
    def asks_teacher(self) -> bool:
        """Return whether a step needs the teacher."""
        return self.consistency or self.masks.are_any

    @property
    def uses_plain_training(self) -> bool:
        """Return whether anything comes of what the plain training learns."""
        return self.asks_teacher or self.answer == "teacher" or self.student_start != "none"


@register_regime(
    "mhim",
    MHIMOptions,
    summary="a teacher hides the tiles that are easy, the student learns the others",
    reference="Tang et al., Multiple Instance Learning Framework with Masked Hard Instance Mining, "
    "ICCV 2023, and its second version",
    terms=("consistency",),
)
class MHIM(Regime):
    """A student, and a teacher that follows it."""

    def __init__(
        self, features: int, outputs: int, options: MHIMOptions, build_inner: BuildInner
    ) -> None:
        super().__init__()
        self.options = options
        self.inner: Embedded = Embedded(features, outputs, options.embedding, build_inner)
        self.recycle = None
        if options.recycle is not None:
            if self.inner.needs_grid:
                raise ConfigError(
                    "regime mhim: recycled tokens have no place, and this aggregator goes by the "
                    "tiles' places on the lattice; leave out recycle, or choose options of the "
                    "aggregator that do without places"
                )
            self.recycle = Recycle(self.inner.width, options.recycle)
        # A copy draws nothing, so the student is what it would be without a teacher.
        self.teacher = copy.deepcopy(self.inner).requires_grad_(False)
        self._progress = 0.0
        if options.score == "class_aware":
            self._require_classes(features, outputs)

    def forward(self, bags: Bags) -> BagOutput:
        """Return what the student says, in training of what it is shown.

        In training, scores are those of the tiles and tokens that it saw, and the loss
        "consistency" is there.
        """
        return self._shown_and_asked(bags)[0] if self.training else self._answering(bags)

    def losses(self, bags: Bags, judge: Judge) -> Losses:
        """Return what a batch costs in training."""
        output, lengths = self._shown_and_asked(bags)
        return judge(output, bags.targets or {}, lengths)

    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:
        """Return those of whoever answers."""
        return self._answering.pooling_terms(bags)

    def rollout(self, bags: Bags) -> Tensor | None:
        """Return that of whoever answers."""
        return self._answering.rollout(bags)

    def after_step(self) -> None:
        """Let the teacher and the recycling queries follow the student."""
        self.inner.after_step()
        if self.recycle is not None:
            self.recycle.after_step()
        share = 1 - momentum_at(self.options, self._progress)
        followed = zip(self.teacher.parameters(), self.inner.parameters(), strict=True)
        with torch.no_grad():
            for own, of_student in followed:
                own.lerp_(of_student, share)

    def preparation(self, recipe: TrainSpec) -> Preparation | None:
        """Return the plain training that the teacher begins as; None where nobody uses it."""
        options = self.options
        if options.warm_epochs == 0 or not options.uses_plain_training:
            return None
        embedding = None if options.embedding is None else options.embedding.model_dump()
        # Without masks, terms and tokens, this regime is the plain one behind the embedding.
        alone = RegimeSpec(name="mhim", options={"embedding": embedding, "consistency": False})
        epochs = options.warm_epochs or recipe.training.epochs
        training = recipe.training.model_copy(update={"epochs": epochs})
        plain = without_regime(recipe)
        return Preparation(recipe=plain.model_copy(update={"regime": alone, "training": training}))

    def prepared(self, trained: Aggregator) -> None:
        """Let the teacher begin as the plain model, and the student as far as asked for."""
        assert isinstance(trained, MHIM), "what `preparation` asked for"
        self.teacher.load_state_dict(trained.inner.state_dict())
        if self.options.student_start == "all":
            self.inner.load_state_dict(trained.inner.state_dict())
        elif self.options.student_start == "embedding":
            assert self.inner.embedding is not None
            assert trained.inner.embedding is not None
            self.inner.embedding.load_state_dict(trained.inner.embedding.state_dict())

    @classmethod
    def refuse(cls, recipe: TrainSpec, targets: Sequence[TargetSpec]) -> None:
        """Refuse a weight for a term that is switched off.

        Raises:
            ConfigError: says so.
        """
        options = parse_spec(MHIMOptions, recipe.regime.options, where="regime mhim")
        if not options.consistency and "consistency" in recipe.objective.terms:
            raise ConfigError(
                "objective: terms gives a weight to consistency, and regime mhim has "
                "consistency: false; leave one of them out"
            )

    @property
    def _answering(self) -> Embedded:
        return self.teacher if self.options.answer == "teacher" else self.inner

    def _shown_and_asked(self, bags: Bags) -> tuple[BagOutput, Tensor]:
        """Return what the student says in training, and how many tiles of each bag it saw (B,)."""
        options = self.options
        self._progress = bags.progress
        shown, of_teacher = bags, None
        if options.asks_teacher:
            of_teacher, scores = self._taught(bags)
            if options.masks.are_any:
                shown = self._unmasked(bags, scores)
        tokens = self.inner.embedded(shown)
        if self.recycle is not None:
            tokens = self.recycle(tokens, uniforms(tokens, _RECYCLED))
        output = self.inner.aggregator(tokens)
        if of_teacher is not None and options.consistency:
            apart = consistency(
                output.embedding,
                of_teacher,
                temperature=options.temperature,
                student_temperature=options.student_temperature,
            )
            output = replace(output, losses={**output.losses, "consistency": apart})
        return output, tokens.lengths

    def _taught(self, bags: Bags) -> tuple[Tensor, Tensor]:
        """Return the teacher's embedding of all tiles (B, E), and its scores of them (T, K)."""
        seen = replace(bags, seed=bags.seed + _TEACHER_SEED)
        with torch.no_grad():
            embedded = self.teacher.embedded(seen)
            output = self.teacher.aggregator(embedded)
            if self.options.score == "attention":
                return output.embedding, own_scores(output)
            terms = self.teacher.aggregator.pooling_terms(embedded)
            assert terms is not None, "refused when it was built"
            return output.embedding, class_aware_scores(terms, bags.cu_seqlens)

    def _unmasked(self, bags: Bags, scores: Tensor) -> Bags:
        def draw(use: int) -> Tensor:
            return uniforms(bags, use)

        is_seen = ~masked_tiles(
            scores, bags.cu_seqlens, self.options.masks, draw, progress=bags.progress
        )
        return bags.where(is_seen)

    def _require_classes(self, features: int, outputs: int) -> None:
        where = "regime mhim: score is class_aware, "
        if outputs < 2:
            raise ConfigError(
                f"{where}and there is a single logit, no classes; take score: attention"
            )
        places = torch.zeros(1, 2, dtype=torch.int32)
        one = Bags(
            features=torch.zeros(1, features),
            cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
            bag_ids=("one tile",),
            grid=places,
            coords_l0=places,
            slide_ids=("one tile",),
            tile_slide=places[:, 0],
            tile_row=places[:, 0],
            tile_um=torch.full((1,), 128.0, dtype=torch.float64),
            mpp_l0=torch.full((1,), 0.5, dtype=torch.float64),
        )
        with torch.no_grad():
            terms = self.teacher.eval().pooling_terms(one)
        self.teacher.train()
        if terms is None:
            raise ConfigError(
                f"{where}and this aggregator's logits are no weighted sum over tiles; take score: "
                "attention, or another aggregator"
            )


def class_aware_scores(terms: PoolingTerms, cu_seqlens: Tensor) -> Tensor:
    """Return the highest class probability (T, 1) of what each tile adds to the logits.

    In float64: what a tile adds is small, so the probabilities differ in late digits.
    """
    bag = bag_of_tile(cu_seqlens, len(terms.scores))
    weights = segment_softmax(terms.scores.double(), bag, len(cu_seqlens) - 1)
    added = torch.einsum("tk,tkc->tc", weights, terms.values.double())
    return added.softmax(1).amax(1, keepdim=True)


def consistency(
    student: Tensor, teacher: Tensor, *, temperature: float, student_temperature: float = 1.0
) -> Tensor:
    """Return the cross-entropy (B,) of the student's embedding (B, E) under the teacher's."""
    wanted = (teacher.detach() / temperature).softmax(1)
    return -(wanted * (student / student_temperature).log_softmax(1)).sum(1)


def momentum_at(options: MHIMOptions, progress: float) -> float:
    """Return the momentum of the teacher's weights at a time of the training, from 0 to 1."""
    if options.momentum_schedule == "constant":
        return options.momentum
    return 1 - (1 - options.momentum) * (1 + math.cos(math.pi * progress)) / 2
