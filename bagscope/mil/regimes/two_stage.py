"""Two stages: a coarse look says where, a fine look there says what (after Li et al. 2019).

A bag's tiles are fine ones; each vector is [fine ‖ coarse], the coarse part that of the tile's
parent in an aligned tiling (features FINE::COARSE).

coarse     an aggregator of its own, trained first on the parents alone, then left as it is
choice     `tiles` parents of each bag, by clusters and attention (see `choosing`)
fine       the aggregator of the recipe, on the children of those parents

Training and evaluation do the same. A tile under a parent that was not chosen has no weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.kernels.segments import bag_of_tile, borders_of
from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms, segment_softmax
from bagscope.mil.objectives.fitted import FittedObjective, Losses
from bagscope.mil.recipe import AggregatorSpec, TrainSpec
from bagscope.mil.regimes.choosing import chosen_tiles
from bagscope.mil.regimes.coarse_view import CoarseView
from bagscope.mil.regimes.ranking import own_scores
from bagscope.mil.regimes.regime import BuildInner, Judge, Preparation, Regime
from bagscope.mil.regimes.registry import refuse_impossible, register_regime, without_regime
from bagscope.mil.targets import TargetSpec
from bagscope.specs import Spec, parse_spec

_UNSEEN = 50.0
"""So far below the lowest score of the tiles that were looked at, and e⁻⁵⁰ is no weight."""


class TwoStageOptions(Spec):
    """Options of the two stages."""

    coarse: AggregatorSpec = Field(
        default=AggregatorSpec(), description="aggregator of the coarse stage, and its options"
    )
    coarse_width: int | None = Field(
        default=None, ge=1, description="of a coarse tile's vector; half of both if not set"
    )
    tiles: int = Field(default=64, ge=1, description="coarse tiles of a bag that are looked at")
    clusters: int = Field(
        default=8, ge=1, description="of a bag's coarse tiles; 1 takes the most attended"
    )
    components: int = Field(default=32, ge=1, description="principal ones, for the clusters")
    negative: tuple[str, ...] = Field(
        default=(),
        description="classes that the coarse stage tells from all others; if none are named, it "
        "learns the same classes as the fine one",
    )


@register_regime(
    "two_stage",
    TwoStageOptions,
    summary="a coarse stage chooses the tiles that a fine stage judges",
    reference="Li et al., An attention-based multi-resolution model for prostate whole slide image "
    "classification and localization, CVPR workshops 2019",
)
class TwoStage(Regime):
    """A frozen coarse stage that chooses, and an aggregator on what it chose."""

    def __init__(
        self, features: int, outputs: int, options: TwoStageOptions, build_inner: BuildInner
    ) -> None:
        super().__init__()
        self.options = options
        self.coarse_width = options.coarse_width or features // 2
        if (options.coarse_width is None and features % 2) or self.coarse_width >= features:
            raise ConfigError(
                f"regime two_stage: vectors are {features} wide, fine and coarse together, and the "
                f"coarse part is to be {options.coarse_width or 'half of them'}; set coarse_width "
                "to the coarse encoder's, and give features as FINE::COARSE"
            )
        self.inner = build_inner(features - self.coarse_width, outputs)
        coarse = options.coarse
        self.coarse = build_aggregator(
            coarse.name, self.coarse_width, 2 if options.negative else outputs, coarse.options
        )
        self.coarse.requires_grad_(False).eval()
        if self.coarse.needs_grid:
            raise ConfigError(
                f"regime two_stage: the coarse aggregator {coarse.name} with these options goes by "
                "places, and coarse tiles bring none; choose options that do without"
            )
        self._targets: tuple[TargetSpec, ...] = ()

    def train(self, mode: bool = True) -> TwoStage:
        """Set the fine stage's mode; the coarse one is done with learning."""
        super().train(mode)
        self.coarse.eval()
        return self

    def begin(self, objective: FittedObjective) -> None:
        """Keep the targets, which the coarse stage's labels are made of."""
        self._targets = objective.targets

    def forward(self, bags: Bags) -> BagOutput:
        """Return what the fine stage says; tiles that it did not see have the lowest scores."""
        return self._asked(bags)[0]

    def losses(self, bags: Bags, judge: Judge) -> Losses:
        """Return what a batch costs in training."""
        output, lengths = self._asked(bags)
        return judge(output, bags.targets or {}, lengths)

    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:
        """Return None: without a tile, others may be chosen, so the sum does not hold."""
        return None

    def rollout(self, bags: Bags) -> Tensor | None:
        """Return None: it would be of the tiles that were looked at alone."""
        return None

    def preparation(self, recipe: TrainSpec) -> Preparation:
        """Return the training of the coarse stage."""
        plain = without_regime(recipe)
        first = plain.model_copy(
            update={
                "aggregator": self.options.coarse,
                # Terms that only the fine stage's aggregator has would be refused.
                "objective": plain.objective.model_copy(update={"terms": {}}),
            }
        )
        negative = self.options.negative
        return Preparation(
            recipe=first,
            seen=lambda source: CoarseView(source, self.coarse_width, self._targets, negative),
            targets=_two_classes(self._targets) if negative else None,
        )

    def prepared(self, trained: Aggregator) -> None:
        """Take the coarse stage as it was trained."""
        self.coarse.load_state_dict(trained.state_dict())

    @property
    def needs_parents(self) -> bool:
        """Return True: what is chosen are parents."""
        return True

    @classmethod
    def refuse(cls, recipe: TrainSpec, targets: Sequence[TargetSpec]) -> None:
        """Refuse what either stage can't learn, and a scale that fits one resolution only.

        Raises:
            ConfigError: says which.
        """
        options = parse_spec(TwoStageOptions, recipe.regime.options, where="regime two_stage")
        if recipe.bags.standardise:
            raise ConfigError(
                "regime two_stage: bags.standardise takes means over fine tiles, which coarse ones "
                "are counted several times in; leave it out"
            )
        coarse = without_regime(recipe).model_copy(update={"aggregator": options.coarse})
        if not options.negative:
            refuse_impossible(coarse, targets)
            return
        if len(targets) != 1 or not targets[0].is_categorical:
            raise ConfigError(
                "regime two_stage: negative names classes, and the run has no single target of "
                "classes; leave it out"
            )
        unknown = sorted(set(options.negative) - set(targets[0].classes))
        if unknown or set(options.negative) == set(targets[0].classes):
            raise ConfigError(
                f"regime two_stage: negative is {', '.join(options.negative)}, and the classes of "
                f"{targets[0].name} are {', '.join(targets[0].classes)}; name some of them"
            )
        if not isinstance(recipe.objective.class_weights, str):
            raise ConfigError(
                "regime two_stage: objective.class_weights has a number per class, and with "
                "negative the coarse stage tells two kinds apart; take balanced or none"
            )
        refuse_impossible(coarse, _two_classes(targets))

    def _asked(self, bags: Bags) -> tuple[BagOutput, Tensor]:
        """Return what the fine stage says, with a score for every tile, and the tiles it saw."""
        is_seen = self.looked_at(bags)
        bag = bag_of_tile(bags.cu_seqlens, len(is_seen))
        shown = replace(bags, features=bags.features[:, : -self.coarse_width]).where(is_seen)
        output = self.inner(shown)
        lowest = output.scores.new_full((len(bags), output.scores.shape[1]), torch.inf)
        own = bag[is_seen][:, None].expand_as(output.scores)
        lowest = lowest.scatter_reduce(0, own, output.scores.detach(), "amin")
        scores = (lowest - _UNSEEN)[bag].masked_scatter(is_seen[:, None], output.scores)
        return replace(output, scores=scores), shown.lengths

    @torch.no_grad()
    def looked_at(self, bags: Bags) -> Tensor:
        """Return which tiles the fine stage sees: (T,) bool.

        Raises:
            ConfigError: the tiles have no parents.
        """
        if bags.parent is None:
            raise ConfigError(
                f"regime two_stage: the features of {bags.bag_ids[0]} are of one resolution; give "
                "those of two aligned tilings, as FINE::COARSE (bagscope tile --coarser-mpp)"
            )
        tiles = len(bags.features)
        bag = bag_of_tile(bags.cu_seqlens, tiles)
        most = int(bags.parent.max()) + 1
        keys, whose = torch.unique(bag * most + bags.parent, return_inverse=True)
        rows = torch.arange(tiles, device=bag.device)
        first = rows.new_full((len(keys),), tiles).scatter_reduce(0, whose, rows, "amin")
        borders = borders_of(torch.bincount(bag[first], minlength=len(bags)))
        coarse = replace(
            bags,
            features=bags.features[first, -self.coarse_width :],
            cu_seqlens=borders,
            coords_l0=None,
            grid=None,
            parent=None,
            tile_slide=None,
            tile_row=None,
            targets=None,
        )
        output = self.coarse(coarse)
        of_bag = bag_of_tile(borders, len(keys))
        weights = segment_softmax(own_scores(output).double(), of_bag, len(bags)).mean(1)
        chosen = chosen_tiles(
            coarse.features.float(),
            weights,
            borders,
            budget=self.options.tiles,
            clusters=self.options.clusters,
            components=self.options.components,
        )
        return chosen[whose]


def _two_classes(targets: Sequence[TargetSpec]) -> tuple[TargetSpec, ...]:
    named: Mapping[str, Any] = {"task": "classes", "classes": ("negative", "positive")}
    return tuple(target.model_copy(update=dict(named)) for target in targets)
