"""A coarse stage that chooses, a fine one that judges: what is seen, learnt, scored and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagscope.errors import ConfigError
from bagscope.mil.cases import Case
from bagscope.mil.explain.pools import packed, with_donors
from bagscope.mil.inference import outputs
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.recipe import BagSpec, TrainSpec
from bagscope.mil.regimes.coarse_view import CoarseView
from bagscope.mil.regimes.registry import build_model, refuse_impossible
from bagscope.mil.regimes.two_stage import TwoStage
from bagscope.mil.sources import ArraySource
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.history import Epoch
from bagscope.mil.training.trainer import Trained, Trainer
from tests.mil.made_bags import made_recipe

FINE, COARSE, CHILDREN = 5, 3, 4
GRADES = TargetSpec(column="grade", classes=("benign", "low", "high"))
OPTIONS: dict[str, Any] = {
    "coarse": {"name": "abmil", "options": {"hidden": 8, "attention": 4}},
    "coarse_width": COARSE,
    "tiles": 2,
    "clusters": 2,
    "negative": ["benign"],
}


def recipe_of(**options: Any) -> TrainSpec:
    return made_recipe(
        regime={"name": "two_stage", "options": {**OPTIONS, **options}},
        optimiser={"lr": 2e-2},
        training={"epochs": 12},
    )


def source_of(count: int, seed: int = 0, *, parents: bool = True) -> ArraySource:
    """Return bags whose grade shows in the fine vectors under the coarse tile that stands out."""
    generator = np.random.default_rng(seed)
    bags, cases, holders = [], [], []
    for place in range(count):
        grade = place % 3
        coarse = generator.normal(size=(generator.integers(3, 9), COARSE))
        if grade:
            coarse[0, 0] += 6
        parent = np.repeat(np.arange(len(coarse)), CHILDREN)
        order = generator.permutation(len(parent))
        fine = generator.normal(size=(len(parent), FINE))
        fine[:CHILDREN, 1] += {0: 0.0, 1: 5.0, 2: -5.0}[grade]
        bags.append(np.concatenate([fine, coarse[parent]], axis=1)[order].astype(np.float32))
        holders.append(7 + parent[order])
        name = f"c{place:03d}"
        cases.append(
            Case(
                case_id=name,
                patient_id=name,
                slide_ids=(name,),
                targets={"grade": (float(grade),)},
            )
        )
    return ArraySource(bags, cases, parents=holders if parents else None)


def killed(epoch: Epoch) -> None:
    if epoch.number == 2:
        raise KeyboardInterrupt


def trained(
    folder: Path | None = None, on_epoch: Callable[[Epoch], None] = lambda _: None
) -> Trained:
    return Trainer(
        recipe_of(),
        [GRADES],
        source_of(24),
        source_of(9, seed=1),
        seed=3,
        folder=folder,
        on_epoch=on_epoch,
    ).run()


def test_the_coarse_view_has_every_coarse_tile_once() -> None:
    source = source_of(6)
    view = CoarseView(source, COARSE, [GRADES], ["benign"])
    assert [case.targets["grade"][0] for case in view.cases] == [0, 1, 1, 0, 1, 1]
    for place in range(6):
        bag, whole = view.read(place), source.read(place)
        assert whole.parent is not None
        kinds = np.unique(whole.parent)
        assert len(bag.features) == len(kinds) == view.lengths[place]
        wanted = [whole.features[whole.parent == kind][0, FINE:] for kind in kinds]
        found = sorted(map(tuple, bag.features.tolist()))
        assert found == sorted(tuple(row.tolist()) for row in wanted)
        some = view.read(place, np.array([0, 2]))
        assert np.array_equal(some.features, bag.features[[0, 2]])


def test_it_learns_where_to_look_and_what_to_say_there() -> None:
    found = trained()
    assert isinstance(found.model, TwoStage)
    test = source_of(30, seed=2)
    right = seen = 0
    for bags, output in outputs(found.model, test, BagSpec()):
        right += int((output.logits.argmax(1) == bags.class_index).sum())
        is_seen = found.model.looked_at(bags)
        # Its children are looked at together, and no more parents than asked for.
        for bag in range(len(bags)):
            one = bags.one(bag)
            own = found.model.looked_at(one)
            assert one.parent is not None
            kinds = one.parent[own].unique()
            assert len(kinds) == 2
            assert bool(own[torch.isin(one.parent, kinds)].all())
            seen += int(7 in kinds.tolist())
        weights = (output.scores - output.scores.max()).exp()
        assert float(weights[~is_seen].max()) < 1e-15
    assert right >= 27
    assert seen >= 20, "two thirds of the bags have a tile that stands out"


def test_a_killed_training_ends_at_the_same_bits(tmp_path: Path) -> None:
    whole = trained()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, killed)
    again = trained(tmp_path)
    assert all(torch.equal(again.weights[name], whole.weights[name]) for name in whole.weights)


def test_packed_is_one_by_one_and_the_coarse_stage_does_not_learn() -> None:
    torch.manual_seed(0)
    model = build_model(recipe_of(), FINE + COARSE, 3)
    assert isinstance(model, TwoStage)
    source = source_of(4)
    packed = [
        (bags, output) for bags, output in outputs(model, source, BagSpec(batch_tiles=10_000))
    ]
    ((bags, together),) = packed
    for bag in range(4):
        alone = model.eval()(bags.one(bag))
        torch.testing.assert_close(together.logits[bag : bag + 1], alone.logits)
    model.train()(bags).logits.sum().backward()
    assert all(weight.grad is None for weight in model.coarse.parameters())
    assert all(weight.grad is not None for weight in model.inner.classifier.parameters())  # type: ignore[operator,union-attr]
    assert not model.coarse.training


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="are of one resolution; give those of two aligned"):
        Trainer(recipe_of(), [GRADES], source_of(6, parents=False), None, seed=0).run()
    with pytest.raises(ConfigError, match="coarse part is to be half of them"):
        build_model(recipe_of(coarse_width=None), 7, 3)
    with pytest.raises(ConfigError, match="negative is tumor, and the classes of grade are benign"):
        refuse_impossible(recipe_of(negative=["tumor"]), [GRADES])
    scaled = recipe_of().model_copy(update={"bags": BagSpec(standardise=True)})
    with pytest.raises(ConfigError, match="standardise takes means over fine tiles"):
        refuse_impossible(scaled, [GRADES])


def test_what_the_coarse_stage_cannot_learn_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="are of one resolution; give those of two aligned"):
        Trainer(recipe_of(), [GRADES], source_of(6, parents=False), None, seed=0)
    with pytest.raises(ConfigError, match=r"aggregator ins learns from .* given grade"):
        refuse_impossible(recipe_of(coarse={"name": "ins"}, negative=()), [GRADES])
    weighted = recipe_of().model_copy(
        update={"objective": ObjectiveSpec(class_weights=(1.0, 2.0, 3.0))}
    )
    with pytest.raises(ConfigError, match="class_weights has a number per class"):
        refuse_impossible(weighted, [GRADES])


def test_tiles_taken_out_or_brought_in_keep_their_parents() -> None:
    source = source_of(2)
    torch.manual_seed(0)
    model = build_model(recipe_of(), FINE + COARSE, 3).eval()
    ((bags, together),) = list(outputs(model, source, BagSpec()))
    one, other = bags.one(0), bags.one(1)
    again = packed(one, [np.arange(len(one.features)), np.arange(2, len(one.features))])
    torch.testing.assert_close(model(again).logits[:1], together.logits[:1])
    # The two slides number their coarse tiles alike; side by side they are different ones.
    joint = with_donors(one, other)
    assert joint.parent is not None and one.parent is not None and other.parent is not None
    kinds = len(one.parent.unique()) + len(other.parent.unique())
    assert len(joint.parent.unique()) == kinds
