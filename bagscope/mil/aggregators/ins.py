"""INS: tiles are told apart by contrast and by prototypes, and the bag is their mean.

h = dropout(act(W x + b)),  o = Linear(h),  p = softmax(o)      (T, C)
logits_c = log of the mean of p_c over the bag                  nothing else in evaluation

In training, of at most `tiles` drawn from each bag:
    q, k      = projections of two views, of length 1; k by a running mean of the weights
    Y         = classes that a tile may have: the first one, and its bag's
    class     = argmax p ⊙ Y
    s         = φ uniform(Y) + (1 − φ) onehot(argmax softmax(q μᵀ) ⊙ Y)    μ: prototypes
    instance  = − mean Σ_c s_c log p_c
    contrast  = − mean over tiles of the mean of log softmax(q · / τ) over what has their class;
                in the warm-up over k alone
    warm_up   = cross-entropy of an attention head on the whole bag; 0 after the warm-up
Queue and prototypes: see `ins_memory`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.kernels.segment_softmax_pool import accumulator, segment_softmax_pool
from bagscope.kernels.segments import bag_of_tile
from bagscope.mil.aggregators.ins_memory import ContrastMemory, kept_share
from bagscope.mil.aggregators.layers import Activation, Projection, draw_seed, dropped, linear
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.bags import BagOutput, Bags
from bagscope.mil.regimes.draws import shuffled
from bagscope.specs import Spec

if TYPE_CHECKING:
    from bagscope.mil.recipe import TrainSpec
    from bagscope.mil.targets import TargetSpec

_ATTENTION = 128
_FIRST_VIEW, _SECOND_VIEW, _TILES = 3, 4, 5
"""What a draw of a step is for."""


class INSOptions(Spec):
    """Options of INS."""

    hidden: int = Field(default=512, ge=1, description="width of the projected tile")
    activation: Activation = Field(default="relu", description="of the projection: relu or gelu")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the projected tile")
    embedding: int = Field(default=128, ge=1, description="width of what is contrasted")
    tiles: int = Field(default=64, ge=1, description="of a bag that a step contrasts, at most")
    view_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="share of a tile's features that a view leaves out"
    )
    queue: int = Field(default=8192, ge=1, description="earlier tiles to contrast with")
    temperature: float = Field(default=0.07, gt=0, description="of the contrast")
    encoder_momentum: float = Field(
        default=0.999, ge=0, le=1, description="of the weights that make the second view"
    )
    prototype_momentum: float = Field(default=0.9, ge=0, le=1, description="of the prototypes")
    target_momentum: tuple[float, float] = Field(
        default=(0.95, 0.8), description="φ, what soft targets keep in an epoch: first, last"
    )
    target_epochs: int = Field(
        default=40, ge=1, description="how often soft targets move over the training"
    )
    warm_up: float = Field(
        default=0.025, ge=0, le=1, description="share of the training before prototypes teach"
    )
    faithful_queue: bool = Field(
        default=False,
        description="start with the queue normalised along the wrong axis, as published",
    )


@register(
    "ins",
    INSOptions,
    summary="tiles told apart by contrast and prototypes, and the mean of their probabilities",
    reference="Instance-level contrastive learning with prototypes (INS), on features",
)
class INS(Aggregator):
    """A classifier of tiles that is taught by soft targets; a bag is the mean of its tiles."""

    label_terms = ("instance", "contrast", "warm_up")

    def __init__(self, features: int, outputs: int, options: INSOptions) -> None:
        super().__init__()
        self.options = options
        hidden, width = options.hidden, options.embedding
        self.projection = Projection(
            features, hidden, activation=options.activation, dropout=options.dropout
        )
        self.instance = nn.Linear(hidden, outputs)
        self.projector = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )
        self.v = nn.Linear(hidden, _ATTENTION)
        self.w = nn.Linear(_ATTENTION, 1)
        self.head = nn.Linear(hidden, outputs)
        self.second_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.second_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.memory = ContrastMemory(
            width,
            max(outputs, 2),
            options.queue,
            momentum=options.prototype_momentum,
            faithful_queue=options.faithful_queue,
        )
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._seen_in = 0

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits; scores are those of each tile by itself."""
        h = self.projection(bags.features, draw_seed(bags))
        scores = linear(h, self.instance).to(accumulator(h.dtype))
        logits = mean_logits(scores, bags.cu_seqlens)
        return BagOutput(
            logits=logits,
            embedding=logits,
            scores=scores,
            score_kind="instance_logit",
            losses=self._losses(bags, h) if self.training else {},
        )

    def after_step(self) -> None:
        """Move the second encoder towards the first, and take in the tiles of the step."""
        share = 1 - self.options.encoder_momentum
        with torch.no_grad():
            for slow, fast in zip(self._second_weights(), self._first_weights(), strict=True):
                slow.lerp_(fast, share)
        if self._seen:
            q, k, classes = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            self.memory.learn(q, k, classes)
            self._seen = []

    @classmethod
    def refuse(cls, recipe: TrainSpec, targets: Sequence[TargetSpec]) -> None:
        """Refuse all but one target of two classes.

        Raises:
            ConfigError: says what it is in place of that.
        """
        if len(targets) != 1 or targets[0].task != "classes" or len(targets[0].classes) > 2:
            said = ", ".join(
                f"{one.name} ({one.task}{f', {len(one.classes)}' if one.classes else ''})"
                for one in targets
            )
            raise ConfigError(
                "aggregator ins learns from negative and positive bags, that is one target of two "
                f"classes, and it is given {said}; choose another aggregator, or such a target"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _losses(self, bags: Bags, h: Tensor) -> Mapping[str, Tensor]:
        """Return the losses (B,) by name, 0 of a bag without a class; none without any class."""
        classes = bags.class_index
        # A single output is a number or a risk, never one of two classes.
        if classes is None or self.instance.out_features < 2:
            return {}
        is_known = (classes >= 0) & (classes < self.instance.out_features)
        classes = classes.clamp(0, self.instance.out_features - 1)
        is_warming = bags.progress < self.options.warm_up
        rows, bag = self._drawn(bags, is_known)
        tiles, own = bags.features[rows], classes[bag]
        q = self._view(tiles, bags, _FIRST_VIEW)
        first = self.projection(tiles, draw_seed(bags, _TILES))
        log_p = linear(first, self.instance).to(q.dtype).log_softmax(1)
        with torch.no_grad():
            k = self._view(tiles, bags, _SECOND_VIEW)
            candidates = functional.one_hot(own, log_p.shape[1]).bool()
            candidates[:, 0] = True
            taken_for = (log_p.exp() * candidates).argmax(1)
            soft = self._soft_targets(q, candidates, bags.progress)
        if is_warming:
            contrast = self.memory.instance_contrast(q, k, self.options.temperature)
        else:
            contrast = self.memory.class_contrast(q, k, taken_for, bag, self.options.temperature)
        self._remember(bags.step, q, k, taken_for)
        return {
            "instance": _mean_of(-(soft * log_p).sum(1), bag, len(bags)),
            "contrast": _mean_of(contrast, bag, len(bags)),
            "warm_up": self._head_loss(bags, h, classes) * (is_known & is_warming),
        }

    def _drawn(self, bags: Bags, is_known: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows (t,) that the step contrasts, of bags with a class, and their bags."""
        order = shuffled(bags, _TILES)
        bag = bag_of_tile(bags.cu_seqlens, len(order))
        rank = torch.arange(len(order), device=order.device) - bags.cu_seqlens[:-1].long()[bag]
        chosen = (rank < self.options.tiles) & is_known[bag]
        return order[chosen], bag[chosen]

    def _view(self, tiles: Tensor, bags: Bags, use: int) -> Tensor:
        """Return the embedding (t, E) of a view, by its own encoder."""
        is_first = use == _FIRST_VIEW
        encode = self.projection if is_first else self.second_projection
        project = self.projector if is_first else self.second_projector
        tiles = dropped(tiles, self.options.view_dropout, draw_seed(bags, use))
        h = encode(tiles, draw_seed(bags, use))
        return functional.normalize(project(h.to(self.w.weight.dtype)), dim=1)

    def _soft_targets(self, q: Tensor, candidates: Tensor, progress: float) -> Tensor:
        options = self.options
        allowed = candidates.to(q.dtype)
        even = allowed / allowed.sum(1, keepdim=True)
        kept = kept_share(
            progress, options.warm_up, options.target_epochs, *options.target_momentum
        )
        vote = functional.one_hot(self.memory.votes(q, candidates), candidates.shape[1])
        return kept * even + (1 - kept) * vote.to(q.dtype)

    def _head_loss(self, bags: Bags, h: Tensor, classes: Tensor) -> Tensor:
        """Return the cross-entropy (B,) of attention pooling over the whole bag."""
        scores = linear(linear(h, self.v).tanh(), self.w)
        scores = scores.to(accumulator(h.dtype))
        pooled = segment_softmax_pool(scores, h, bags.cu_seqlens).pooled[:, 0]
        return functional.cross_entropy(self.head(pooled), classes, reduction="none")

    def _first_weights(self) -> list[nn.Parameter]:
        return [*self.projection.parameters(), *self.projector.parameters()]

    def _second_weights(self) -> list[nn.Parameter]:
        return [*self.second_projection.parameters(), *self.second_projector.parameters()]

    def _remember(self, step: int, q: Tensor, k: Tensor, classes: Tensor) -> None:
        """Keep the tiles until the step is done, which may have several batches."""
        if step != self._seen_in:
            self._seen, self._seen_in = [], step
        self._seen.append((q.detach(), k, classes))


def mean_logits(scores: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the logits (B, C) of the mean probability over each bag, of scores (T, C).

    Their softmax is that mean. Of a single column it is the logit of the mean of σ.
    """
    if scores.shape[1] == 1:
        two = torch.cat([torch.zeros_like(scores), scores], 1)
        found = mean_logits(two, cu_seqlens)
        return found[:, 1:] - found[:, :1]
    log_p = scores.log_softmax(1)
    total = segment_softmax_pool(log_p, log_p.detach(), cu_seqlens).lse
    return total - cu_seqlens.diff().clamp(min=1).to(total.dtype).log()[:, None]


def _mean_of(values: Tensor, bag: Tensor, bags: int) -> Tensor:
    """Return the mean (B,) of values (t,) over each bag; 0 where it has none."""
    count = torch.bincount(bag, minlength=bags).clamp(min=1)
    return values.new_zeros(bags).index_add(0, bag, values) / count
