"""PackMIL: a step sees a share of every bag, packed; the other tiles make hyperslides.

main       a random share of each bag's tiles, each bag by itself: the loss of bags
residual   the other tiles, of several bags in a pack: a hyperslide, with a label made of theirs
total = loss of the bags + `objective.terms.residual` · mean loss of the hyperslides

Both go through one downsampler, where there is one (see `downsampler`), and one aggregator. There
is no padding: borders per bag isolate the bags of a pack, borders per pack make it a hyperslide. In
evaluation the aggregator is asked about whole bags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.kernels.segments import borders_of
from bagscope.mil.aggregators.layers import xavier
from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms
from bagscope.mil.objectives.discrete_time import DiscreteTimeCriterion
from bagscope.mil.objectives.fitted import FittedObjective, Losses
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes import hyperslides
from bagscope.mil.regimes.downsampler import Downsampler
from bagscope.mil.regimes.draws import ordered, uniforms
from bagscope.mil.regimes.packing import Part, capacity_of, cut, kept, next_fit, split
from bagscope.mil.regimes.packmil_options import TERM, PackMILOptions, refuse_packing
from bagscope.mil.regimes.regime import BuildInner, Judge, Regime
from bagscope.mil.regimes.registry import register_regime
from bagscope.mil.regimes.tile_norm import TileNorm
from bagscope.mil.targets import TargetSpec
from bagscope.specs import parse_spec

MAIN, RESIDUAL = 0, 1
SPLIT, COMPRESS, KEEP = 0, 1, 3
"""What draws are for; those after the split are one more in the residual part."""
_OTHER_SEED = 1 << 40
"""What the residual part's dropout is drawn by, beside the seed."""


@register_regime(
    "packmil",
    PackMILOptions,
    summary="a share of every bag, and hyperslides of the rest with labels made for them",
    reference="Tang et al., Revisiting Data Challenges of Computational Pathology, 2025",
    terms=(TERM,),
)
class PackMIL(Regime):
    """Learns from packed parts of bags and from hyperslides; answers for whole bags."""

    whole_steps = True

    def __init__(
        self, features: int, outputs: int, options: PackMILOptions, build_inner: BuildInner
    ) -> None:
        super().__init__()
        self.options = options
        self.inner = build_inner(features, outputs)
        self.downsampler = (
            None if options.downsampler == "none" else Downsampler(features, options.r)
        )
        if self.downsampler is not None and self.inner.needs_grid:
            raise ConfigError(
                "regime packmil: the downsampler makes one of several tiles, which has no place on "
                "the lattice that this aggregator goes by; set downsampler: none, or choose "
                "options of the aggregator that do without"
            )
        self.norm = None if options.norm == "none" else TileNorm(features)
        self.predictor: nn.Linear | None = None
        if options.dual:
            self.predictor = nn.Linear(_embedding_width(self.inner, features), outputs)
            xavier(self.predictor)
        self._objective: FittedObjective | None = None

    def forward(self, bags: Bags) -> BagOutput:
        """Return what the aggregator says of whole bags; no tile is left out or compressed."""
        return self.inner(self._whole(bags))

    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:
        """Return those of the aggregator; behind a downsampler they hold of the bag as it is."""
        return self.inner.pooling_terms(self._whole(bags))

    def rollout(self, bags: Bags) -> Tensor | None:
        """Return that of the aggregator, about whole bags."""
        return self.inner.rollout(self._whole(bags))

    def begin(self, objective: FittedObjective) -> None:
        """Keep the objective, which hyperslides get their labels from."""
        self._objective = objective

    def losses(self, bags: Bags, judge: Judge) -> Losses:
        """Return what the main parts and the hyperslides of a step cost."""
        main, residual = self.parts(bags)
        shown = self._normed(self._compressed(bags if main is None else bags.picked(*main), MAIN))
        output = self.inner(shown)
        if residual is not None and self.options.has_residual:
            term = self._residual_loss(bags, residual)
            output = replace(output, losses={**output.losses, TERM: term})
        return judge(output, bags.targets or {}, shown.lengths)

    def parts(self, bags: Bags) -> tuple[Part | None, Part | None]:
        """Return the tiles that a step shows of each bag by itself, and in hyperslides.

        None stands for whole bags, and for no hyperslides.
        """
        spec = self.options
        if not spec.share:
            return None, None
        order = ordered(uniforms(bags, SPLIT), bags.cu_seqlens)
        found = split(
            order, bags.cu_seqlens, spec.share, shortest=self._shortest, borrow=spec.borrow
        )
        most = self._capacity(bags) * self._r
        main, residual = (self._within(part, most) for part in found)
        return main, residual

    @classmethod
    def refuse(cls, recipe: TrainSpec, targets: Sequence[TargetSpec]) -> None:
        """Refuse steps of one bag, and targets that hyperslides have no label for.

        Raises:
            ConfigError: says which.
        """
        options = parse_spec(PackMILOptions, recipe.regime.options, where="regime packmil")
        refuse_packing(options, recipe, targets)

    @property
    def _r(self) -> int:
        return 1 if self.downsampler is None else self.downsampler.r

    @property
    def _shortest(self) -> int:
        return self.options.shortest * self._r

    def _capacity(self, bags: Bags) -> int:
        """Return the tiles of a pack."""
        spec = self.options
        return capacity_of(int(bags.lengths.max()), spec.share, spec.capacity, spec.r)

    def _within(self, part: Part, most: int) -> Part:
        """Return a part of at most so many tiles of each bag."""
        if int(part.lengths.max()) > most:
            part = cut(part, most)
        if self.downsampler is not None:
            return part
        # In the order of the bag again, for aggregators that go by it.
        return Part(part.rows.sort().values, part.cu_seqlens)

    def _whole(self, bags: Bags) -> Bags:
        if self.downsampler is not None:
            bags = replace(bags, features=self.downsampler(bags.features, bags.cu_seqlens))
        return self._normed(bags)

    def _normed(self, bags: Bags) -> Bags:
        if self.norm is None:
            return bags
        return replace(bags, features=self.norm(bags.features))

    def _compressed(self, bags: Bags, which: int) -> Bags:
        """Return a part with r tiles as one, of bags longer than `shortest`."""
        if self.downsampler is None:
            return bags
        is_long = bags.lengths > self._shortest
        filled = self.downsampler.padded(bags.cu_seqlens, is_long)
        order = ordered(uniforms(_places(bags, filled), COMPRESS + which), filled)
        coordinates = None
        if self.options.downsampler == "random":
            width = bags.features.shape[1]
            values = torch.arange(len(bags) + 1, device=filled.device) * (width * self._r)
            drawn = uniforms(_places(bags, values), KEEP + which).view(len(bags), -1)
            coordinates = drawn.argsort(dim=1, stable=True)[:, :width].sort(1).values
        features, borders = self.downsampler.compressed(
            bags.features, bags.cu_seqlens, is_long=is_long, order=order, coordinates=coordinates
        )
        # What several tiles became has no place of its own.
        return replace(
            bags,
            features=features,
            cu_seqlens=borders,
            grid=None,
            parent=None,
            coords_l0=None,
            tile_slide=None,
            tile_row=None,
        )

    def _residual_loss(self, bags: Bags, part: Part) -> Tensor:
        """Return what hyperslides cost, (B,), shared out so that its mean is that over packs.

        A bag without its label is in no hyperslide, as the label would not speak of it.
        """
        assert self._objective is not None, "no objective; call begin first"
        (target,) = self._objective.targets
        labels = (bags.targets or {})[target.name]
        has = ~labels.isnan().any(1)
        found = torch.zeros(len(bags), device=bags.features.device)
        if not bool(has.any()):
            return found
        shown = self._compressed(bags.picked(*kept(part, has)), RESIDUAL)
        lengths = shown.lengths[has]
        pack = torch.tensor(next_fit(lengths.tolist(), self._capacity(bags)), device=has.device)
        packs = _hyperslides(shown, has, pack)
        output = self.inner(packs if self.options.ban_norm else self._normed(packs))
        logits = output.logits if self.predictor is None else self.predictor(output.embedding)
        weights = lengths if self.options.use_counts else torch.ones_like(lengths)
        each = self._loss_of(logits, labels[has], pack, weights.to(logits.dtype))
        shares = len(bags) / (len(packs) * torch.bincount(pack))
        return found.to(each.dtype).masked_scatter(has, (each * shares)[pack])

    def _loss_of(self, logits: Tensor, labels: Tensor, pack: Tensor, weights: Tensor) -> Tensor:
        """Return the loss of each hyperslide, (P,)."""
        assert self._objective is not None
        (target,), (criterion,) = self._objective.targets, self._objective.criteria
        loss = self.options.loss_of(target.task)
        if isinstance(criterion, DiscreteTimeCriterion):
            bins, censored = criterion.bins_of(labels), labels[:, 1] == 0
            label = hyperslides.merged_survival(bins, censored, pack, weights)
            return hyperslides.survival_nll(logits, label, alpha=criterion.alpha)
        if target.task == "ordinal":
            logits = hyperslides.log_probabilities(logits)
        if self.options.grade:
            benign = self.options.benign or "alone"
            merged = hyperslides.merged_grades(labels[:, 0].long(), pack, weights, benign)
        else:
            if target.task != "multilabel":
                labels = functional.one_hot(labels[:, 0].long(), len(target.classes))
            by: Literal["largest", "sum"] = "sum" if loss == "ce" else "largest"
            merged = hyperslides.merged_classes(labels.to(logits.dtype), pack, weights, by=by)
        if loss == "asl":
            return hyperslides.asymmetric(logits, merged.argmax(1))
        return _SOFT[loss](logits, merged)


_SOFT: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "focal": hyperslides.focal,
    "bce": hyperslides.binary,
    "ce": hyperslides.soft_cross_entropy,
}


def _hyperslides(parts: Bags, has: Tensor, pack: Tensor) -> Bags:
    """Return parts of bags as hyperslides.

    Args:
        parts: without a tile of the bags that have no label.
        has: (B,) which bags have one.
        pack: whose each of these is.
    """
    counts = torch.zeros_like(torch.bincount(pack)).index_add(0, pack, parts.lengths[has].long())
    names = [name for name, is_there in zip(parts.bag_ids, has.tolist(), strict=True) if is_there]
    begins = pack.diff(prepend=pack[:1] - 1).tolist()
    return replace(
        parts,
        cu_seqlens=borders_of(counts),
        bag_ids=tuple(
            f"hyperslide from {name}"
            for name, is_first in zip(names, begins, strict=True)
            if is_first
        ),
        targets=None,
        seed=parts.seed + _OTHER_SEED,
    )


def _places(bags: Bags, borders: Tensor) -> Bags:
    """Return bags of no features within other borders, which numbers are drawn for."""
    features = bags.features.new_empty(int(borders[-1]), 0)
    return replace(bags, features=features, cu_seqlens=borders.to(torch.int32))


def _embedding_width(inner: Aggregator, features: int) -> int:
    was_training = inner.training
    inner.eval()
    # With all the places that an aggregator may go by.
    bag = Bags.of([torch.zeros(1, features)], grid=[torch.zeros(1, 2, dtype=torch.int32)])
    bag = replace(
        bag,
        coords_l0=bag.grid,
        slide_ids=bag.bag_ids,
        tile_slide=torch.zeros(1, dtype=torch.int32),
        tile_um=torch.ones(1, dtype=torch.float64),
        mpp_l0=torch.ones(1, dtype=torch.float64),
    )
    with torch.no_grad():
        found = inner(bag)
    inner.train(was_training)
    return found.embedding.shape[1]
