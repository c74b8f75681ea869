"""`check_aggregator` takes right aggregators and catches wrong ones, each with its own sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.registry import Aggregator, AggregatorEntry
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms, segment_softmax
from bagscope.specs import Spec
from bagscope.testing import check_aggregator

FEATURES, OUTPUTS = 6, 2


class Plain(Aggregator):
    """Attention with one linear layer: the logits are the weighted mean of the tiles' logits."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.attention = nn.Linear(features, 1)
        self.classifier = nn.Linear(features, outputs)

    def forward(self, bags: Bags) -> BagOutput:
        features = bags.features.to(self.classifier.weight.dtype)
        scores = self.attention(features)
        index = torch.repeat_interleave(torch.arange(len(bags)), bags.lengths.long())
        weights = segment_softmax(scores, index, len(bags))
        pooled = torch.zeros(len(bags), features.shape[1], dtype=features.dtype)
        pooled = pooled.index_add(0, index, weights * features)
        return BagOutput(
            logits=self.classifier(pooled),
            embedding=pooled,
            scores=scores,
            score_kind="log_weight",
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:
        features = bags.features.to(self.classifier.weight.dtype)
        values = features @ self.classifier.weight.T
        return PoolingTerms(
            scores=self.attention(features), values=values[:, None], bias=self.classifier.bias
        )


def check(build: Any, **settings: Any) -> None:
    check_aggregator(build, features=FEATURES, outputs=OUTPUTS, **settings)


def test_a_right_aggregator_passes() -> None:
    check(Plain)


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    check(Plain)
    assert torch.equal(torch.rand(1), wanted)


def altered(change: Callable[[BagOutput, Bags], BagOutput]) -> type[Plain]:
    """Return the plain aggregator with its output changed."""

    class Altered(Plain):
        def forward(self, bags: Bags) -> BagOutput:
            return change(super().forward(bags), bags)

        def pooling_terms(self, bags: Bags) -> None:
            return None

    return Altered


def logits(change: Callable[[Tensor, Bags], Tensor]) -> type[Plain]:
    return altered(lambda found, bags: replace(found, logits=change(found.logits, bags)))


def scores(change: Callable[[Tensor, Bags], Tensor]) -> type[Plain]:
    return altered(lambda found, bags: replace(found, scores=change(found.scores, bags)))


def sees_class(value: Tensor, bags: Bags) -> Tensor:
    """Add the label, as a loss computed in the wrong place would."""
    classes = bags.class_index
    return value if classes is None else value + classes[:, None]


class DropsTiles(Plain):
    """Looks at the first 32 tiles of a bag, and gives the others the score of none."""

    def forward(self, bags: Bags) -> BagOutput:
        found = super().forward(bags)
        kept = [super(DropsTiles, self).forward(short(bags.one(bag))) for bag in range(len(bags))]
        return replace(
            found,
            logits=torch.cat([part.logits for part in kept]),
            embedding=torch.cat([part.embedding for part in kept]),
        )

    def pooling_terms(self, bags: Bags) -> None:
        return None


class DropsTilesInTurn(DropsTiles):
    """The same, and shows by its terms what the logits should have been."""

    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:  # type: ignore[override]
        return Plain.pooling_terms(self, bags)


def short(bags: Bags) -> Bags:
    return Bags.of([bags.features[:32]])


class Squeezes(Plain):
    """Loses the axis of tiles where there is one."""

    def forward(self, bags: Bags) -> BagOutput:
        found = super().forward(bags)
        return replace(found, scores=found.scores.squeeze()[:, None])


class NeedsEight(Plain):
    """Takes eight tiles out of every bag."""

    def forward(self, bags: Bags) -> BagOutput:
        for bag in range(len(bags)):
            bags.one(bag).features.topk(8, dim=0)
        return super().forward(bags)


class Remembers(Plain):
    """Keeps a weight that is not in its state."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs)
        self.factor = float(torch.rand(()))

    def forward(self, bags: Bags) -> BagOutput:
        found = super().forward(bags)
        return replace(found, logits=found.logits * self.factor)

    def pooling_terms(self, bags: Bags) -> None:
        return None


class DrawsInTraining(Plain):
    """Masks tiles by draws that depend on what was drawn before."""

    def forward(self, bags: Bags) -> BagOutput:
        if self.training:
            bags = replace(bags, features=bags.features * (torch.rand(len(bags.features), 1) > 0.5))
        return super().forward(bags)


class ChangesFeatures(Plain):
    """Normalises the features where they lie."""

    def forward(self, bags: Bags) -> BagOutput:
        with torch.no_grad():
            bags.features.mul_(2)
        return super().forward(bags)


class Stays16(Plain):
    """Answers in the dtype of the features."""

    def forward(self, bags: Bags) -> BagOutput:
        found = super().forward(bags)
        return replace(found, logits=found.logits.to(bags.features.dtype))


class Halves(Plain):
    def __init__(self, features: int, outputs: int) -> None:
        super().__init__(features, outputs)
        self.classifier.half()


class RootOfNothing(Plain):
    """0 · √0 is 0, and its gradient is not a number."""

    def forward(self, bags: Bags) -> BagOutput:
        found = super().forward(bags)
        nothing = (self.classifier.weight * 0).sum()
        return replace(found, logits=found.logits + 0 * nothing.sqrt())


class OtherTerms(Plain):
    def pooling_terms(self, bags: Bags) -> PoolingTerms | None:
        terms = super().pooling_terms(bags)
        assert terms is not None
        return replace(terms, bias=terms.bias + 1)


class OtherScores(Plain):
    """Shows twice the logits of its attention."""

    def forward(self, bags: Bags) -> BagOutput:
        found = super().forward(bags)
        return replace(found, scores=found.scores * 2)


class WrongEntropy(Plain):
    def forward(self, bags: Bags) -> BagOutput:
        found = super().forward(bags)
        return replace(found, entropy=torch.ones(len(bags), 1, dtype=found.logits.dtype))


class LossOfMany(Plain):
    """Has a loss only where there is more than one bag."""

    def forward(self, bags: Bags) -> BagOutput:
        found = super().forward(bags)
        return replace(found, losses={"x": found.logits[:, 0]} if len(bags) > 1 else {})


class OtherWhenCompiled(Plain):
    def forward(self, bags: Bags) -> BagOutput:
        found = super().forward(bags)
        if torch.compiler.is_compiling():
            return replace(found, logits=found.logits + 1)
        return found


def of_first_bag(value: Tensor, bags: Bags) -> Tensor:
    return value + value[:1]


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (logits(lambda v, b: v - v.mean(0)), "logits of a packed batch and of its bags one by one"),
        (logits(of_first_bag), "logits of a packed batch and of its bags one by one, in eval"),
        (DropsTiles, "logits when a bag's tiles come in another order"),
        (logits(lambda v, b: v + torch.rand(1)), "a second call in evaluation gave other logits"),
        (logits(lambda v, b: v + b.step), "another seed and step in evaluation gave other logits"),
        (logits(sees_class), "others when the targets are not there"),
        (logits(lambda v, b: v[:, :1]), r"logits are \(6, 1\), expected \(6, 2\)"),
        (logits(lambda v, b: v / 0), "logits holds NaN or infinity"),
        (logits(lambda v, b: v + b.features[0, 0]), "in another order|one by one"),
        (scores(lambda v, b: v[:, 0]), r"scores are \(183,\), expected one or more for each of"),
        (scores(lambda v, b: v[1:]), r"scores are \(182, 1\), expected one or more for each of"),
        (scores(lambda v, b: v.sort(0).values), "scores when a bag's tiles come in another order"),
        (scores(lambda v, b: v + torch.arange(len(v))[:, None]), "scores when a bag's tiles"),
        (altered(lambda f, b: replace(f, score_kind="weight")), "score_kind is 'weight'"),  # type: ignore[arg-type]
        (altered(lambda f, b: replace(f, losses={"x": f.logits.sum()})), r"loss 'x' is \(\)"),
        (altered(lambda f, b: f.logits), "forward returned Tensor, expected a BagOutput"),  # type: ignore[arg-type, return-value]
        (altered(lambda f, b: replace(f, entropy=f.scores)), r"entropy is \(183, 1\)"),
        (Squeezes, "fails for a bag of 1 tiles with IndexError"),
        (NeedsEight, r"fails for bags \[40, 1, 7, 130, 2, 3\] with RuntimeError"),
        (Remembers, "saving and loading gave other logits"),
        (DrawsInTraining, "packed batch and of its bags one by one, in training"),
        (ChangesFeatures, "changed the features of the bags"),
        (Stays16, "logits of bfloat16 features are torch.bfloat16, expected float32"),
        (Halves, r"parameter classifier.weight is torch.float16, expected float32"),
        (logits(lambda v, b: v.detach()), "no gradient of the logits reaches a parameter"),
        (RootOfNothing, "gradient of .* holds NaN or infinity"),
        (OtherTerms, "logits and what pooling_terms add to"),
        (OtherScores, "the weights that scores and that pooling_terms tell"),
        (WrongEntropy, "entropy and that of the scores' softmax"),
        (LossOfMany, "gives .* loss 'x' for a packed batch, and .*scores bag by bag"),
        (OtherWhenCompiled, "logits with and without torch.compile"),
        (lambda features, outputs: 3, "what was built is int, expected a torch.nn.Module"),
    ],
)
def test_a_fault_is_caught(build: Any, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check(build)


def test_tiles_that_are_dropped_are_caught_where_order_matters() -> None:
    with pytest.raises(AssertionError, match="logits and what pooling_terms add to"):
        check(DropsTilesInTurn, is_order_free=False)


@pytest.mark.slow
def test_what_mixes_bags_or_heeds_order_by_design_may_do_so() -> None:
    check(logits(lambda v, b: v - v.mean(0)), mixes_bags=True)
    check(DropsTiles, is_order_free=False)


class NoOptions(Spec):
    """No options."""


class WithDropout(Spec):
    """One option."""

    dropout: float = Field(default=0.5, description="of the features")


class Undescribed(Spec):
    """An option that says nothing."""

    width: int = 3


class Drops(Plain):
    """Drops features by torch's own draws, which no bag has a key to."""

    def __init__(self, features: int, outputs: int, options: WithDropout) -> None:
        super().__init__(features, outputs)
        self.p = options.dropout

    def forward(self, bags: Bags) -> BagOutput:
        features = nn.functional.dropout(bags.features, self.p, self.training)
        return super().forward(replace(bags, features=features))


def entry(build: Any, options: type[Spec] = NoOptions, **changes: Any) -> AggregatorEntry:
    values: dict[str, Any] = {
        "name": "mine",
        "build": build,
        "options": options,
        "summary": "an aggregator of a test",
        "reference": "",
        "is_order_free": True,
        "mixes_bags": False,
    }
    return AggregatorEntry(**(values | changes))


def test_an_entrys_dropout_is_switched_off_where_bags_are_compared() -> None:
    check(entry(Drops, WithDropout))
    with pytest.raises(ConfigError, match="unknown option 'dropuot'"):
        check(entry(Drops, WithDropout), options={"dropuot": 0.1})


def test_layers_of_dropout_are_switched_off_where_bags_are_compared() -> None:
    class WithLayer(Plain):
        def __init__(self, features: int, outputs: int) -> None:
            super().__init__(features, outputs)
            self.drop = nn.Dropout(0.5)

        def forward(self, bags: Bags) -> BagOutput:
            return super().forward(replace(bags, features=self.drop(bags.features)))

    check(WithLayer)


def test_an_entrys_promises_count() -> None:
    def mixing(features: int, outputs: int, options: NoOptions) -> Plain:
        return logits(lambda v, b: v - v.mean(0))(features, outputs)

    check(entry(mixing, mixes_bags=True))
    with pytest.raises(AssertionError, match="aggregator mine: logits of a packed batch"):
        check(entry(mixing))


def test_an_entry_says_what_it_is() -> None:
    def plain(features: int, outputs: int, options: Spec) -> Plain:
        return Plain(features, outputs)

    with pytest.raises(AssertionError, match="its summary is empty"):
        check(entry(plain, summary=" "))
    with pytest.raises(AssertionError, match=r"option \['width'\] has no description"):
        check(entry(plain, Undescribed))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no aggregator 'abmli' \(did you mean 'abmil'"):
        check_aggregator("abmli")
