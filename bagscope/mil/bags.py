"""Bags in memory: the tiles of several cases end to end, and what an aggregator makes of them.

Letters: T tiles of all bags, B bags, D features, C logits, K columns of scores, E embedding,
S slides. There is no padding anywhere: `cu_seqlens` holds the borders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bagscope.kernels.segments import bag_of_tile, borders_of

ScoreKind = Literal["logit", "log_weight", "instance_logit"]
"""What a tile's score is: a logit of its own, a logit of attention (the weight is its softmax over
the bag), or the logit of a class for this tile alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bags:
    """A batch of bags.

    Attributes:
        features: (T, D).
        cu_seqlens: (B + 1,) int32; bag b holds the rows cu_seqlens[b] to cu_seqlens[b + 1].
        bag_ids: (B,) names.
        coords_l0: (T, 2) int32 level-0 (x, y), None where any slide has none.
        grid: (T, 2) int32 (column, row), None where any slide has none.
        parent: (T,) int64, which coarser tile of its bag holds each tile, numbers of any kind; None
            where the features are of one resolution.
        slide_ids: (S,) the slides of all bags.
        tile_slide: (T,) int32, index into `slide_ids`.
        tile_row: (T,) int32, the row in that slide's feature file.
        tile_um: (S,) float64, side of a tile in micrometres, NaN where it is not known.
        mpp_l0: (S,) float64, micrometres per level-0 pixel, NaN where it is not known.
        targets: (B, w) float64 by name (see `bagscope.mil.targets`), NaN where missing.
        seed: of the run; with `step` and a bag's name it keys every draw made for that bag.
        step: of the training.
        progress: share of the training that is done, from 0 to 1, for what changes on the way.
        bag_keys: (B,) int64, the bags' names as numbers for keyed draws.
    """

    features: Tensor
    cu_seqlens: Tensor
    bag_ids: tuple[str, ...]
    coords_l0: Tensor | None = None
    grid: Tensor | None = None
    parent: Tensor | None = None
    slide_ids: tuple[str, ...] = ()
    tile_slide: Tensor | None = None
    tile_row: Tensor | None = None
    tile_um: Tensor | None = None
    mpp_l0: Tensor | None = None
    targets: Mapping[str, Tensor] | None = None
    seed: int = 0
    step: int = 0
    progress: float = 0.0
    bag_keys: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Here, since a compiled forward pass can neither hash names nor may depend on them.
        keys = [key_of(name) for name in self.bag_ids]
        found = torch.tensor(keys, dtype=torch.int64, device=self.cu_seqlens.device)
        object.__setattr__(self, "bag_keys", found)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @classmethod
    def of(
        cls,
        features: Sequence[Tensor],
        *,
        bag_ids: Sequence[str] | None = None,
        targets: Mapping[str, Tensor] | None = None,
        grid: Sequence[Tensor] | None = None,
        seed: int = 0,
        step: int = 0,
    ) -> Bags:
        """Lay bags of (n, D) end to end; they are named by their place where no names are given."""
        if not features:
            raise ValueError("no bags; give at least one")
        lengths = torch.tensor([0, *(len(bag) for bag in features)])
        return cls(
            features=torch.cat(list(features)),
            cu_seqlens=lengths.cumsum(0).to(torch.int32).to(features[0].device),
            bag_ids=tuple(bag_ids) if bag_ids else tuple(map(str, range(len(features)))),
            grid=None if grid is None else torch.cat(list(grid)),
            targets=targets,
            seed=seed,
            step=step,
        )

    @property
    def lengths(self) -> Tensor:
        """Return the number of tiles of each bag: (B,) int32."""
        return self.cu_seqlens.diff()

    @property
    def class_index(self) -> Tensor | None:
        """Return each bag's class (B,) int64, -1 where missing; None without a single target.

        For losses on tiles that need to know the class, as CLAM's.
        """
        if self.targets is None or len(self.targets) != 1:
            return None
        (values,) = self.targets.values()
        if values.shape[1] != 1:
            return None
        return torch.where(values.isnan(), -1.0, values)[:, 0].long()

    def one(self, bag: int) -> Bags:
        """Return one bag as a batch of its own; it views the same memory."""
        start, stop = self.cu_seqlens[bag : bag + 2].tolist()
        return replace(
            self,
            features=self.features[start:stop],
            cu_seqlens=self.cu_seqlens.new_tensor([0, stop - start]),
            bag_ids=self.bag_ids[bag : bag + 1],
            coords_l0=_cut(self.coords_l0, start, stop),
            grid=_cut(self.grid, start, stop),
            parent=_cut(self.parent, start, stop),
            tile_slide=_cut(self.tile_slide, start, stop),
            tile_row=_cut(self.tile_row, start, stop),
            targets=None
            if self.targets is None
            else {name: values[bag : bag + 1] for name, values in self.targets.items()},
        )

    def picked(self, rows: Tensor, cu_seqlens: Tensor) -> Bags:
        """Return the same bags with only some of their tiles, or with some of them again.

        Args:
            rows: (t,) int64, the tiles, each bag's together and bags in order.
            cu_seqlens: (B + 1,) int32, borders of the bags among them.
        """
        per_tile: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[rows]
            for name in ("coords_l0", "grid", "parent", "tile_slide", "tile_row")
        }
        return replace(self, features=self.features[rows], cu_seqlens=cu_seqlens, **per_tile)

    def where(self, is_kept: Tensor) -> Bags:
        """Return the same bags with the tiles that a mask (T,) bool keeps."""
        bag = bag_of_tile(self.cu_seqlens, len(is_kept))
        counts = torch.zeros(len(self), dtype=torch.int64, device=bag.device)
        counts = counts.index_add_(0, bag, is_kept.long())
        return self.picked(is_kept.nonzero()[:, 0], borders_of(counts))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Bags:
        """Return the batch on a device, its features in a dtype."""
        moved: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value.to(device)
            for name in (
                "coords_l0",
                "grid",
                "parent",
                "tile_slide",
                "tile_row",
                "tile_um",
                "mpp_l0",
            )
        }
        targets = self.targets
        return replace(
            self,
            features=self.features.to(device=device, dtype=dtype or self.features.dtype),
            cu_seqlens=self.cu_seqlens.to(device),
            targets=targets and {name: values.to(device) for name, values in targets.items()},
            **moved,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BagOutput:
    """What an aggregator says of a batch.

    Attributes:
        logits: (B, C).
        embedding: (B, E), what the logits are a function of.
        scores: (T, K), one or more numbers per tile; higher is more of what `score_kind` says.
        score_kind: what a score is.
        branch_logits: (B, M, C) of branches that are to be right each by itself.
        entropy: (B, K) of the attention over the bag, for objectives that reward it.
        losses: (B,) by name, unreduced: terms that only the aggregator can know.
    """

    logits: Tensor
    embedding: Tensor
    scores: Tensor
    score_kind: ScoreKind
    branch_logits: Tensor | None = None
    entropy: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolingTerms:
    """What attention pooling adds up: logits = bias + Σ_k Σ_i softmax_i(scores_k)_i values_ik.

    Attributes:
        scores: (T, K) logits of attention.
        values: (T, K, C) what each tile would contribute at weight 1.
        bias: (C,).
    """

    scores: Tensor
    values: Tensor
    bias: Tensor

    def logits(self, cu_seqlens: Tensor) -> Tensor:
        """Return the logits (B, C) that the terms add up to."""
        bags = len(cu_seqlens) - 1
        index = torch.repeat_interleave(
            torch.arange(bags, device=cu_seqlens.device), cu_seqlens.diff().long()
        )
        weights = segment_softmax(self.scores, index, bags)
        parts = torch.einsum("tk,tkc->tc", weights, self.values)
        return self.bias + parts.new_zeros(bags, parts.shape[1]).index_add_(0, index, parts)


def segment_softmax(scores: Tensor, index: Tensor, bags: int) -> Tensor:
    """Return the softmax (T, K) of scores within each bag; `index` (T,) says whose each row is."""
    top = scores.new_full((bags, scores.shape[1]), -torch.inf)
    top = top.scatter_reduce(0, index[:, None].expand_as(scores), scores.detach(), "amax")
    weights = (scores - top[index]).exp()
    return weights / scores.new_zeros(top.shape).index_add(0, index, weights)[index]


def key_of(name: str) -> int:
    """Return a name as a number of 63 bits, the same on every machine."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _cut(tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if tensor is None else tensor[start:stop]
