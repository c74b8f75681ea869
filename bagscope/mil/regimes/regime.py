"""What a regime is: an aggregator around an aggregator, which learns in its own way.

In evaluation it answers as the aggregator inside does; predictions, heatmaps and explanations know
nothing of it. In training it may show the aggregator other tiles than the bag has, ask it several
times, add terms to the loss (`BagOutput.losses`, weighted by `objective.terms`), keep a teacher,
or need a training of its own before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bagscope.mil.objectives.fitted import FittedObjective, Losses
    from bagscope.mil.recipe import TrainSpec
    from bagscope.mil.sources import BagSource
    from bagscope.mil.targets import TargetSpec

BuildInner = Callable[[int, int], Aggregator]
"""From the width of a tile's vector and the number of logits to a fresh aggregator inside."""


class Judge(Protocol):
    """The objective, as a step of training sees it."""

    def __call__(
        self, output: BagOutput, targets: Mapping[str, Tensor], lengths: Tensor | None = None
    ) -> Losses:
        """Return what an output costs.

        Args:
            output: of the aggregator, a row per bag.
            targets: (B, w) by name, a row per bag.
            lengths: (B,) tiles of each bag.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """A training that comes first, on the same side of the same split.

    Attributes:
        recipe: of it, without a regime that needs one itself.
        seen: what it sees of a source.
        targets: that it learns; the run's if None.
    """

    recipe: TrainSpec
    seen: Callable[[BagSource], BagSource] = lambda source: source
    targets: tuple[TargetSpec, ...] | None = None


class Regime(Aggregator):
    """An aggregator around another, which is `inner`.

    A subclass is built as `cls(features, outputs, options, build_inner)`.

    Attributes:
        inner: the aggregator that answers in evaluation.
        whole_steps: whether the bags of a step are needed together.
    """

    inner: Aggregator
    whole_steps: bool = False

    def forward(self, bags: Bags) -> BagOutput:
        """Return what the aggregator inside says of whole bags; subclasses differ in training."""
        return self.inner(bags)

    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:
        """Return those of the aggregator inside."""
        return self.inner.pooling_terms(bags)

    def rollout(self, bags: Bags) -> Tensor | None:
        """Return that of the aggregator inside."""
        return self.inner.rollout(bags)

    def begin(self, objective: FittedObjective) -> None:
        """Hear of the objective, before the first step."""

    def losses(self, bags: Bags, judge: Judge) -> Losses:
        """Return what a batch costs in training."""
        return judge(self(bags), bags.targets or {}, bags.lengths)

    def after_step(self) -> None:
        """Let the aggregator inside follow a change of the weights."""
        self.inner.after_step()

    def preparation(self, recipe: TrainSpec) -> Preparation | None:
        """Return the training that comes first; None where none is needed."""
        return None

    def prepared(self, trained: Aggregator) -> None:
        """Take what the training that came first has learnt."""
        raise NotImplementedError

    @property
    def needs_grid(self) -> bool:
        """Return whether tiles without places on a lattice are refused."""
        return self.inner.needs_grid

    @property
    def needs_micrometres(self) -> bool:
        """Return whether tiles without places in micrometres are refused."""
        return self.inner.needs_micrometres

    @classmethod
    def refuse(cls, recipe: TrainSpec, targets: Sequence[TargetSpec]) -> None:
        """Refuse a recipe or targets that this regime can't go with.

        Raises:
            ConfigError: says what does not go together.
        """
