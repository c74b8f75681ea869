"""MHIM around aggregators: the contract, its step, its teacher, what it refuses, what it learns."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.mil.bags import BagOutput, Bags
from bagscope.mil.inference import outputs
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes.mhim import MHIM, MHIMOptions, class_aware_scores
from bagscope.mil.regimes.ranking import own_scores
from bagscope.mil.regimes.registry import build_model, refuse_impossible, without_regime
from bagscope.mil.training.trainer import Trained, Trainer
from bagscope.pipeline.recipes import load_recipe
from bagscope.testing import PlantedBags, check_aggregator, planted_bags
from tests.kernels.packed import assert_close_to_float64, normal
from tests.mil.made_bags import TARGET, made_recipe, made_source
from tests.testing.test_planted import source_of

FEATURES = 12
MASKS = {"high": 0.2, "high_within": 0.5, "random": 0.3, "low": 0.1}
RECYCLE = {"queries": 2, "keep": 0.8, "heads": 2, "head": 4, "dropout": 0.0}
BARE = {"projection": False, "attention": 8}
AROUND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "abmil": ({"hidden": 16, "dropout": 0.0}, {"masks": MASKS}),
    "acmil": ({"hidden": 16, "stkim_k": 3}, {"masks": MASKS, "score": "class_aware"}),
    "clam_mb": ({"hidden": 16, "attention": 8, "dropout": 0.0, "k": 2}, {"masks": MASKS}),
    "clam_sb": (
        {"hidden": 16, "attention": 8, "dropout": 0.0, "k": 2},
        {"masks": {"high": 0.1}, "score": "class_aware", "recycle": RECYCLE},
    ),
    "dsmil": ({"query": 8}, {"masks": MASKS, "score": "class_aware"}),
    "mambamil": ({"hidden": 16, "layers": 1}, {"masks": MASKS, "recycle": RECYCLE}),
    "max": ({"hidden": 16, "dropout": 0.0}, {"masks": MASKS}),
}
ORDERED = ("mambamil",)
"""Those that read tiles in an order, and take long."""


def built(
    name: str,
    own: dict[str, Any],
    options: dict[str, Any],
    features: int = FEATURES,
    outputs: int = 3,
) -> MHIM:
    recipe = TrainSpec.model_validate(
        {
            "aggregator": {"name": name, "options": own},
            "regime": {"name": "mhim", "options": options},
        }
    )
    model = build_model(recipe, features, outputs)
    assert isinstance(model, MHIM)
    return model


def second(**changes: Any) -> MHIM:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "embedding": {"width": 8, "activation": "gelu", "dropout": 0.0},
        "masks": {"high": 0.2},
        "score": "class_aware",
        "recycle": RECYCLE,
        **changes,
    }
    return built("abmil", BARE, options)


def bags(step: int = 0, progress: float = 0.0) -> Bags:
    lengths = (30, 1, 2, 17)
    labels = torch.arange(len(lengths))[:, None] % 2
    found = Bags.of(
        [normal(n, FEATURES, seed=n) for n in lengths], targets={"label": labels.double()}, seed=4
    )
    return replace(found, step=step, progress=progress)


def test_around_abmil_the_contract_is_kept_in_evaluation_and_in_training() -> None:
    check_aggregator(
        lambda features, outputs: built(
            "abmil",
            BARE,
            {
                "embedding": {"width": 16, "dropout": 0.0},
                "masks": MASKS,
                "score": "class_aware",
                "recycle": RECYCLE,
            },
            features,
            outputs,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", AROUND)
def test_around_any_aggregator_the_contract_is_kept(name: str) -> None:
    own, options = AROUND[name]
    check_aggregator(
        lambda features, outputs: built(name, own, options, features, outputs),
        is_order_free=name not in ORDERED,
    )


def test_evaluation_is_the_aggregator_on_all_tiles() -> None:
    model = second().eval()
    found, embedded = model(bags()), model.inner.embedded(bags())
    assert embedded.features.shape == (len(bags().features), 8)
    assert torch.equal(found.logits, model.inner.aggregator(embedded).logits)
    assert len(found.scores) == len(bags().features) and not found.losses
    terms = model.pooling_terms(bags())
    assert terms is not None
    torch.testing.assert_close(terms.logits(bags().cu_seqlens), found.logits)
    assert model.rollout(bags()) is None, "ABMIL has a single layer of attention"


def test_a_step_is_what_its_parts_say() -> None:
    model, given = second(temperature=0.5, student_temperature=2.0).train(), bags()
    found = model(given)
    feature, scores = model._taught(given)
    shown = model._unmasked(given, scores)
    # ⌈0.2 · N⌉ of each bag are hidden, and a bag of one tile keeps it.
    assert shown.lengths.tolist() == [24, 1, 1, 13]
    for bag in range(len(given)):
        own, left = given.one(bag), shown.one(bag)
        terms = model.teacher.pooling_terms(own)
        assert terms is not None
        chance = class_aware_scores(terms, own.cu_seqlens)[:, 0]
        kept = (own.features[:, None] == left.features[None]).all(2).any(1)
        if not bool(kept.all()):
            assert chance[~kept].min() >= chance[kept].max()
    # Of the tiles that are left, ⌊0.8 · n⌋ stay; two tokens are added.
    assert len(found.scores) == sum(int(0.8 * n) + 2 for n in (24, 1, 1, 13))
    wanted = (feature.double() / 0.5).softmax(1)
    apart = -(wanted * (found.embedding.double() / 2.0).log_softmax(1)).sum(1)
    assert_close_to_float64(found.losses["consistency"], apart)


def test_the_teacher_drops_out_other_units_than_the_student_and_learns_nothing() -> None:
    model = second(masks={}, recycle=None, embedding={"width": 8, "dropout": 0.5}).train()
    given = bags()
    feature, _ = model._taught(given)
    assert not torch.equal(feature, model(given).embedding)
    assert not torch.equal(feature, model._taught(bags(step=1))[0])
    output = model(given)
    (output.logits.sum() + output.losses["consistency"].sum()).backward()
    assert all(weight.grad is None for weight in model.teacher.parameters())
    assert all(weight.grad is not None for weight in model.inner.parameters())
    assert not any(weight.requires_grad for weight in model.teacher.parameters())


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_teacher_follows(schedule: str) -> None:
    model = second(momentum=0.9, momentum_schedule=schedule).train()
    with torch.no_grad():
        for weight in model.inner.parameters():
            weight.add_(1.0)
    before = {name: weight.clone() for name, weight in model.teacher.named_parameters()}
    model(bags(progress=0.5))
    model.after_step()
    share = 0.1 if schedule == "constant" else 0.1 * (1 + math.cos(math.pi / 2)) / 2
    student = dict(model.inner.named_parameters())
    for name, weight in model.teacher.named_parameters():
        wanted = (1 - share) * before[name].double() + share * student[name].detach().double()
        assert_close_to_float64(weight, wanted)


def test_who_answers() -> None:
    student, teacher = second(), second(answer="teacher")
    for model in (student, teacher):
        with torch.no_grad():
            for weight in model.inner.parameters():
                weight.mul_(1.5)
        model.eval()
    assert torch.equal(student(bags()).logits, student.inner(bags()).logits)
    assert torch.equal(teacher(bags()).logits, teacher.teacher(bags()).logits)
    assert not torch.equal(teacher(bags()).logits, student(bags()).logits)


def test_scores_of_logits_count_by_their_highest_class() -> None:
    numbers = normal(5, 3)
    blank = torch.zeros(1, 3)
    attention = BagOutput(logits=blank, embedding=blank, scores=numbers, score_kind="log_weight")
    assert torch.equal(own_scores(attention), numbers)
    logits = replace(attention, score_kind="instance_logit")
    assert torch.equal(own_scores(logits)[:, 0], numbers.max(1).values)


def trained(recipe: TrainSpec, **options: Any) -> Trained:
    return Trainer(
        recipe,
        [TARGET],
        made_source(24, seed=1, name="t"),
        made_source(12, seed=2, name="v"),
        **{"seed": 0, **options},
    ).run()


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"consistency": False}, {}),
        ({}, {"objective": {"terms": {"consistency": 0.0}}}),
        ({"masks": {"high": 0.0}, "warm_epochs": 0, "consistency": False}, {}),
    ],
)
def test_without_masks_and_consistency_it_is_the_plain_training(
    options: dict[str, Any], blocks: dict[str, Any]
) -> None:
    recipe = made_recipe(regime={"name": "mhim", "options": options}, **blocks)
    found, plain = trained(recipe), trained(without_regime(recipe))
    student = {
        name.removeprefix("inner.aggregator."): weight
        for name, weight in found.weights.items()
        if name.startswith("inner.")
    }
    assert student.keys() == plain.weights.keys()
    assert all(torch.equal(student[name], weight) for name, weight in plain.weights.items())
    assert found.inner_logits is not None and plain.inner_logits is not None
    np.testing.assert_array_equal(found.inner_logits, plain.inner_logits)


def test_the_consistency_alone_changes_what_is_learnt() -> None:
    recipe = made_recipe(regime={"name": "mhim", "options": {"masks": {"high": 0.0}}})
    found = trained(recipe)
    assert found.history[-1].losses["consistency"] > 0
    assert (
        found.history[-1].losses["bag"] != trained(without_regime(recipe)).history[-1].losses["bag"]
    )


@pytest.mark.parametrize("start", ["none", "embedding", "all"])
def test_what_the_student_begins_with(start: str) -> None:
    given = {"embedding": {"width": 8}, "masks": {"random": 0.5}, "student_start": start}
    options = MHIMOptions.model_validate(given)
    recipe = made_recipe(
        aggregator={"options": {"hidden": 8}}, regime={"name": "mhim", "options": given}
    )
    model = built("abmil", dict(recipe.aggregator.options), given)
    plain = model.preparation(recipe)
    assert plain is not None and plain.recipe.training == recipe.training
    first = build_model(plain.recipe, FEATURES, 3)
    assert isinstance(first, MHIM) and first.preparation(plain.recipe) is None
    with torch.no_grad():
        for weight in first.parameters():
            weight.normal_()
    before = copy.deepcopy(model.inner.state_dict())
    model.prepared(first)
    learnt = first.inner.state_dict()
    assert all(torch.equal(w, learnt[name]) for name, w in model.teacher.state_dict().items())
    for name, weight in model.inner.state_dict().items():
        is_taken = start == "all" or (start == "embedding" and name.startswith("embedding"))
        assert torch.equal(weight, learnt[name] if is_taken else before[name])
    assert options.uses_plain_training


def test_steps_that_are_cut_change_nothing() -> None:
    still = {
        "aggregator": {"options": {"dropout": 0.0}},
        "optimiser": {"name": "sgd", "lr": 0.05, "schedule": "constant"},
        "regime": {
            "name": "mhim",
            "options": {"masks": MASKS, "recycle": {**RECYCLE, "momentum": 0.5}},
        },
    }
    whole = trained(made_recipe(**still))
    cut = trained(made_recipe(**still, bags={"batch_tiles": 1}))
    for name, weight in whole.weights.items():
        if weight.numel() > 1:
            torch.testing.assert_close(weight, cut.weights[name], rtol=1e-3, atol=1e-5)


def test_a_killed_training_goes_on_to_the_same_bits_tokens_and_all(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(epoch: Any) -> None:
        if epoch.number == 2:
            raise Killed

    options = {
        "embedding": {"width": 8},
        "masks": {"high": 0.3, "high_schedule": "cosine"},
        "score": "class_aware",
        "recycle": {**RECYCLE, "dropout": 0.1, "momentum": 0.9},
        "momentum": 0.9,
        "momentum_schedule": "cosine",
        "warm_epochs": 1,
    }
    recipe = made_recipe(regime={"name": "mhim", "options": options})
    whole = trained(recipe)
    assert any(name.startswith("teacher.") for name in whole.weights)
    assert "recycle.query" in whole.weights
    with pytest.raises(Killed):
        trained(recipe, folder=tmp_path, fingerprint="f", on_epoch=kill)
    torch.manual_seed(12345)
    went_on = trained(recipe, folder=tmp_path, fingerprint="f")
    assert all(torch.equal(weight, went_on.weights[name]) for name, weight in whole.weights.items())


@pytest.mark.parametrize("name", [name for name in AROUND if name not in ORDERED])
def test_around_any_aggregator_it_trains(name: str) -> None:
    own, options = AROUND[name]
    recipe = made_recipe(
        regime={"name": "mhim", "options": {**options, "warm_epochs": 1}}, training={"epochs": 2}
    )
    aggregator = recipe.aggregator.model_copy(update={"name": name, "options": own})
    found = trained(recipe.model_copy(update={"aggregator": aggregator}))
    assert all(math.isfinite(loss) for epoch in found.history for loss in epoch.losses.values())
    assert "consistency" in found.history[0].losses


@pytest.mark.parametrize(
    ("aggregator", "options", "message"),
    [
        (
            {"name": "mambamil", "options": {"order": "raster", "hidden": 8}},
            {"recycle": {}},
            "recycled tokens have no place",
        ),
        ({"options": {}}, {"masks": {"high": 1.5}}, "less than or equal to 1"),
        ({"options": {}}, {"masks": {"high_within": 0.0}}, "greater than 0"),
        (
            {"options": {}},
            {"masks": {"random": 0.2, "high_within": 0.5}},
            "high_within is of high, and high is 0; leave it at 1",
        ),
        ({"options": {}}, {"masks": {"high_schedule": "cosine"}}, "high_schedule is of high"),
        ({"options": {}}, {"mask": {}}, "did you mean 'masks'"),
        ({"options": {}}, {"student_start": "embedding"}, "there is none; set embedding"),
        (
            {"options": {}},
            {"student_start": "all", "warm_epochs": 0},
            "a plain training of no epochs",
        ),
        (
            {"name": "set_transformer", "options": {}},
            {"score": "class_aware", "masks": {"high": 0.1}},
            "no weighted sum over tiles",
        ),
    ],
)
def test_what_can_not_be_is_refused(
    aggregator: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    recipe = TrainSpec.model_validate(
        {"aggregator": aggregator, "regime": {"name": "mhim", "options": options}}
    )
    with pytest.raises(ConfigError, match=message):
        build_model(recipe, FEATURES, 2)


def test_one_logit_has_no_classes() -> None:
    with pytest.raises(ConfigError, match="a single logit"):
        built("abmil", {}, {"score": "class_aware"}, outputs=1)
    built("abmil", {}, {"score": "attention"}, outputs=1)


def test_a_weight_for_a_term_that_is_off_is_refused() -> None:
    recipe = made_recipe(
        regime={"name": "mhim", "options": {"consistency": False}},
        objective={"terms": {"consistency": 0.5}},
    )
    with pytest.raises(ConfigError, match="consistency: false"):
        refuse_impossible(recipe, [TARGET])


def test_the_recipes_are_the_published_ones() -> None:
    one, two = (load_recipe(name) for name in ("mhim_v1", "mhim_v2"))
    first, other = (MHIMOptions.model_validate(dict(r.regime.options)) for r in (one, two))
    assert (first.masks.high, first.masks.high_within, first.masks.random) == (0.01, 0.5, 0.5)
    assert first.masks.high_schedule == "cosine" and other.masks.high_schedule == "constant"
    assert one.objective.terms == {"consistency": 0.1}
    assert two.objective.terms == {"consistency": 0.5}
    assert (first.momentum, other.momentum) == (0.9999, 0.9997)
    assert other.recycle is not None and first.recycle is None
    # 1,024 · 512 + 512, 512 · 128 + 128, 512 · 2 + 2 learn, and the teacher has as many again.
    model = build_model(one, 1024, 2)
    student = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert student == 524_800 + 65_664 + 1_026
    assert sum(weight.numel() for weight in model.parameters()) == 2 * student


def said_of(recipe: TrainSpec, made: PlantedBags, *, train: int, inner: int) -> tuple[float, float]:
    """Return the AUROC over bags that were held out, and the mean AUROC over their tiles."""
    parts = [slice(0, train), slice(train, train + inner), slice(train + inner, None)]
    learn, watched, held = (made.chosen(part) for part in parts)
    found = Trainer(recipe, [TARGET], source_of(learn, "t"), source_of(watched, "v"), seed=0).run()
    margins: list[Tensor] = []
    tiles: list[Tensor] = []
    for batch, output in outputs(found.model, source_of(held, "x"), recipe.bags):
        margins.append(output.logits[:, 1] - output.logits[:, 0])
        tiles += output.scores[:, 0].tensor_split(batch.cu_seqlens.tolist()[1:-1])
    of_tiles = [
        roc_auc_score(truth, own.numpy())
        for truth, own in zip(held.truth, tiles, strict=True)
        if truth.any()
    ]
    return roc_auc_score(held.labels, torch.cat(margins).numpy()), float(np.mean(of_tiles))


def narrow(name: str, epochs: int) -> TrainSpec:
    return load_recipe(
        name,
        {
            "regime": {"options": {"embedding": {"width": 32}, "warm_epochs": epochs // 2}},
            "aggregator": {"options": {"attention": 16}},
            "optimiser": {"lr": 3e-3},
            "bags": {"bags_per_step": 4},
            "training": {"epochs": epochs, "min_epochs": 0, "patience": None},
        },
    )


@pytest.mark.parametrize(
    ("name", "epochs"), [("mhim_v1", 6), pytest.param("mhim_v2", 16, marks=pytest.mark.slow)]
)
def test_what_one_tile_in_ten_shows_is_learnt(name: str, epochs: int) -> None:
    made = planted_bags(90, dimension=8, tiles=(40, 60), share=0.1, seed=5)
    of_bags, of_tiles = said_of(narrow(name, epochs), made, train=48, inner=12)
    assert of_bags >= 0.9
    assert of_tiles >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mhim_v1", "mhim_v2"])
def test_what_one_tile_in_a_hundred_shows_is_learnt(name: str) -> None:
    made = planted_bags(300, dimension=16, tiles=(300, 500), seed=5)
    of_bags, of_tiles = said_of(narrow(name, 20), made, train=160, inner=40)
    assert of_bags >= 0.9
    assert of_tiles >= 0.9
