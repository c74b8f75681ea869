"""PackMIL around aggregators: what a step sees and costs, what evaluation says, what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.mil.bags import BagOutput, Bags
from bagscope.mil.cases import Case
from bagscope.mil.objectives.fitted import FittedObjective, Losses
from bagscope.mil.objectives.objective import build_objective
from bagscope.mil.recipe import AggregatorSpec, TrainSpec
from bagscope.mil.regimes.packmil import PackMIL
from bagscope.mil.regimes.registry import build_model, refuse_impossible
from bagscope.mil.sources import ArraySource
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.trainer import Trained, Trainer
from bagscope.pipeline.recipes import load_recipe
from bagscope.testing import check_aggregator
from tests.kernels.packed import normal
from tests.mil.made_bags import DIMENSION, TARGET, made_recipe, made_source

LENGTHS = (9, 30, 1, 14, 6, 21)
NARROW: Mapping[str, dict[str, Any]] = {
    "abmil": {"hidden": 8, "attention": 4, "dropout": 0.0},
    "dsmil": {"hidden": 8, "query": 4},
    "clam_sb": {"hidden": 8, "attention": 4, "dropout": 0.0, "k": 3},
    "mambamil": {"hidden": 8, "attention": 4, "layers": 1, "rate": 2},
}
GRADES = TargetSpec(column="isup", task="ordinal", classes=tuple("012345"))
STAINS = TargetSpec(column="stains", task="multilabel", classes=("er", "pr", "her2"))
SURVIVAL = TargetSpec(column="os", task="survival", time="months", event="dead")
SMALL = {"share": 0.5, "capacity": 10, "shortest": 2}


def packing(
    aggregator: str = "abmil", objective: Mapping[str, Any] | None = None, **options: Any
) -> TrainSpec:
    return made_recipe(
        aggregator={"name": aggregator},
        regime={"name": "packmil", "options": {**SMALL, **options}},
        objective=dict(objective or {}),
    ).model_copy(update={"aggregator": _aggregator(aggregator)})


def _aggregator(name: str) -> Any:
    return TrainSpec.model_validate(
        {"aggregator": {"name": name, "options": NARROW[name]}}
    ).aggregator


def bags_of(labels: Tensor, name: str = "label", lengths: Sequence[int] = LENGTHS) -> Bags:
    features = [normal(length, DIMENSION, seed=place) for place, length in enumerate(lengths)]
    return Bags.of(features, targets={name: labels}, seed=7, step=3)


CLASSES = torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0], [0.0]], dtype=torch.float64)


def begun(
    recipe: TrainSpec, target: TargetSpec = TARGET, labels: Tensor = CLASSES
) -> tuple[PackMIL, FittedObjective]:
    torch.manual_seed(0)
    refuse_impossible(recipe, [target])
    objective = build_objective([target], recipe.objective)
    fitted = objective.fit({target.name: labels.numpy()})
    model = build_model(recipe, DIMENSION, objective.outputs)
    assert isinstance(model, PackMIL)
    model.begin(fitted)
    return model.train(), fitted


def judged(model: PackMIL, fitted: FittedObjective, bags: Bags) -> Losses:
    return model.losses(
        bags,
        lambda output, targets, lengths=None: fitted(
            output, targets, progress=0.0, lengths=lengths
        ),
    )


# --- what a step sees ---------------------------------------------------------------------------


def test_every_tile_is_seen_once_and_in_the_order_of_its_bag() -> None:
    model, _ = begun(packing(shortest=4, capacity=100))
    bags = bags_of(CLASSES)
    main, residual = model.parts(bags)
    assert main is not None and residual is not None
    for bag, (start, stop) in enumerate(
        zip(bags.cu_seqlens.tolist(), bags.cu_seqlens.tolist()[1:], strict=False)
    ):
        own = [
            part.rows[part.cu_seqlens[bag] : part.cu_seqlens[bag + 1]].tolist()
            for part in (main, residual)
        ]
        assert all(rows == sorted(rows) for rows in own)
        whole = list(range(start, stop))
        assert own == [whole, whole] if len(whole) < 4 else sorted(own[0] + own[1]) == whole
    again, _ = model.parts(replace(bags, step=4))
    assert again is not None and not torch.equal(again.rows, main.rows)


def test_draws_do_not_depend_on_the_company() -> None:
    model, _ = begun(packing(capacity=100))
    bags = bags_of(CLASSES)
    for packed, alone in zip(
        model.parts(bags),
        zip(*(model.parts(bags.one(bag)) for bag in range(len(bags))), strict=True),
        strict=True,
    ):
        assert packed is not None
        rows = [part.rows + bags.cu_seqlens[bag] for bag, part in enumerate(alone) if part]
        assert torch.equal(packed.rows, torch.cat(rows))


def test_without_a_share_it_is_the_plain_regime() -> None:
    found = {}
    for name in ("full", "packmil"):
        recipe = made_recipe(regime={"name": name})
        if name == "packmil":
            recipe = made_recipe(regime={"name": name, "options": {"share": 0.0}})
        found[name] = Trainer(recipe, [TARGET], made_source(24), None, seed=0).run().weights
    assert all(
        torch.equal(weight, found["packmil"][f"inner.{name}"])
        for name, weight in found["full"].items()
    )


# --- what it costs ------------------------------------------------------------------------------


def test_the_residual_term_is_the_mean_over_hyperslides() -> None:
    model, fitted = begun(packing(objective={"terms": {"residual": 0.2}}, capacity=12))
    bags = bags_of(CLASSES)
    seen: list[tuple[Bags, BagOutput]] = []
    model.inner.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    losses = judged(model, fitted, bags)
    (main, of_bags), (packs, of_packs) = seen
    assert len(main) == 6 and 1 < len(packs) < 6
    torch.testing.assert_close(
        losses.mean("bag"), functional.cross_entropy(of_bags.logits, CLASSES[:, 0].long())
    )
    _, residual = model.parts(bags)
    assert residual is not None
    # The tiles of each pack are those of whole parts, and its label is of both classes or of one.
    borders = packs.cu_seqlens.tolist()
    pack = [next(p for p, stop in enumerate(borders[1:]) if end <= stop) for end in ends(residual)]
    wanted = []
    for number in range(len(packs)):
        classes = {int(CLASSES[bag, 0]) for bag in range(6) if pack[bag] == number}
        counts = [
            sum(int(CLASSES[bag, 0]) == c for bag in range(6) if pack[bag] == number)
            for c in (0, 1)
        ]
        assert classes == {c for c in (0, 1) if counts[c]}
        label = torch.tensor(counts) / max(counts)
        each = functional.binary_cross_entropy_with_logits(
            of_packs.logits[number], label, reduction="none"
        )
        wanted.append((0.25 * (1 - (-each).exp()) ** 2 * each).mean())
    torch.testing.assert_close(losses.mean("residual"), torch.stack(wanted).mean().detach())
    torch.testing.assert_close(
        losses.total.detach(), losses.mean("bag") + 0.2 * losses.mean("residual")
    )


def ends(part: Any) -> list[int]:
    return list(part.cu_seqlens.tolist()[1:])


@pytest.mark.parametrize("downsampler", [{}, {"downsampler": "max", "r": 2, "norm": "batch"}])
def test_a_bag_without_a_label_is_in_no_hyperslide(downsampler: dict[str, Any]) -> None:
    labels = CLASSES.clone()
    labels[[0, 1, 5]] = torch.nan
    model, fitted = begun(packing(capacity=3, shortest=7, **downsampler))
    bags = bags_of(labels)
    losses = judged(model, fitted, bags)
    assert (losses.terms["residual"] > 0).tolist() == [False, False, True, True, True, False]
    losses.total.backward()
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert grads and all(bool(grad.isfinite().all()) for grad in grads)
    nothing = judged(model, fitted, bags_of(torch.full_like(labels, torch.nan)))
    assert not nothing.terms["residual"].any()


def test_counts_weigh_a_bag_s_label_by_its_tiles() -> None:
    found = []
    for use_counts in (False, True):
        model, fitted = begun(packing(capacity=100, use_counts=use_counts))
        found.append(judged(model, fitted, bags_of(CLASSES)).mean("residual"))
    assert found[0] != found[1]


def test_hyperslides_may_have_a_predictor_of_their_own() -> None:
    model, fitted = begun(packing(dual=True))
    assert model.predictor is not None and model.predictor.weight.shape == (2, 8)
    judged(model, fitted, bags_of(CLASSES)).total.backward()
    assert model.predictor.weight.grad is not None and model.predictor.weight.grad.abs().sum() > 0


def test_hyperslides_go_around_the_norm_unless_told_otherwise() -> None:
    deviations = {}
    for ban_norm in (True, False):
        model, fitted = begun(packing(norm="batch", ban_norm=ban_norm))
        deviations[ban_norm] = deviations_shown(model, fitted)
    assert abs(deviations[True][0] - 1) < 0.05 and deviations[True][1] > 5
    assert abs(deviations[False][1] - 1) < 0.05


def deviations_shown(model: PackMIL, fitted: FittedObjective) -> list[float]:
    """Return the spread of the tiles that the aggregator is shown, for bags and for hyperslides."""
    bags = bags_of(CLASSES)
    shown: list[Tensor] = []
    model.inner.register_forward_hook(lambda _, given, __: shown.append(given[0].features))
    judged(model, fitted, replace(bags, features=9 * bags.features))
    return [float(tiles.detach().std()) for tiles in shown]


# --- around aggregators and for tasks -----------------------------------------------------------


KINDS = ({}, {"downsampler": "random", "r": 3, "dual": True}, {"downsampler": "max", "r": 2})


@pytest.mark.parametrize("aggregator", NARROW)
@pytest.mark.parametrize("options", KINDS)
def test_it_learns_around_aggregators(aggregator: str, options: dict[str, Any]) -> None:
    model, fitted = begun(packing(aggregator, shortest=3, **options))
    losses = judged(model, fitted, bags_of(CLASSES))
    losses.total.backward()
    assert losses.mean("residual") > 0
    for name, weight in model.named_parameters():
        assert weight.grad is not None and bool(weight.grad.isfinite().all()), name
    model.eval()
    bags = bags_of(CLASSES)
    whole = bags
    if model.downsampler is not None:
        whole = replace(bags, features=model.downsampler(bags.features, bags.cu_seqlens))
    found, wanted = model(bags), model.inner(whole)
    assert torch.equal(found.logits, wanted.logits)
    assert found.scores.shape[0] == len(bags.features)


@pytest.mark.parametrize(
    ("aggregator", "options"),
    [
        ("abmil", {"downsampler": "random", "r": 3}),
        pytest.param("abmil", {"norm": "batch"}, marks=pytest.mark.slow),
        pytest.param("dsmil", {"downsampler": "max", "r": 2}, marks=pytest.mark.slow),
        pytest.param("clam_sb", {"downsampler": "max", "r": 2}, marks=pytest.mark.slow),
        pytest.param("mambamil", {"downsampler": "random", "r": 2}, marks=pytest.mark.slow),
    ],
)
def test_in_evaluation_it_keeps_the_contract_of_an_aggregator(
    aggregator: str, options: dict[str, Any]
) -> None:
    recipe = packing(aggregator, **options)
    check_aggregator(
        lambda features, outputs: build_model(recipe, features, outputs),
        features=12,
        outputs=2,
        is_order_free=aggregator != "mambamil",
        mixes_bags="norm" in options,
    )


def survival_labels(count: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(5)
    times = generator.exponential(20, count) + 1
    return np.stack([times, (np.arange(count) % 3 > 0).astype(float)], 1)


TASKS: Mapping[str, tuple[TargetSpec, NDArray[np.float64], dict[str, Any]]] = {
    "grades": (GRADES, np.arange(24.0)[:, None] % 6, {"grade": True, "use_counts": True}),
    "grades as classes": (
        TargetSpec(column="isup", classes=tuple("012345")),
        np.arange(24.0)[:, None] % 6,
        {"grade": True, "benign": "published"},
    ),
    "ordinal": (GRADES, np.arange(24.0)[:, None] % 6, {}),
    "multilabel": (STAINS, (np.arange(72).reshape(24, 3) % 5 < 2).astype(float), {}),
    "survival": (SURVIVAL, survival_labels(24), {"borrow": True}),
    "soft": (TARGET, np.arange(24.0)[:, None] % 2, {"residual": "ce"}),
    "binary": (TARGET, np.arange(24.0)[:, None] % 2, {"residual": "bce"}),
    "asymmetric": (TARGET, np.arange(24.0)[:, None] % 2, {"residual": "asl"}),
}


def source_of(target: TargetSpec, labels: NDArray[np.float64], name: str = "c") -> ArraySource:
    made = made_source(len(labels), name=name)
    cases = [
        Case(
            case_id=case.case_id,
            patient_id=case.patient_id,
            slide_ids=case.slide_ids,
            targets={target.name: tuple(row.tolist())},
        )
        for case, row in zip(made.cases, labels, strict=True)
    ]
    return ArraySource([made.read(place).features for place in range(len(cases))], cases)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_labels_for_hyperslides(task: str) -> None:
    target, labels, options = TASKS[task]
    recipe = packing(objective={"terms": {"residual": 0.5}}, **options)
    found = Trainer(
        recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 2})}),
        [target],
        source_of(target, labels),
        source_of(target, labels, "v"),
        seed=0,
    ).run()
    first, last = found.history[0].losses, found.history[-1].losses
    assert 0 < last["residual"] < 2 * first["residual"]
    assert last["bag"] < first["bag"] + 0.1


@pytest.mark.parametrize(
    ("name", "task"), [("packmil_panda", "grades"), ("packmil_survival", "survival")]
)
def test_the_published_recipes_train(name: str, task: str) -> None:
    target, labels, _ = TASKS[task]
    source = source_of(target, labels)
    (epoch,) = (
        Trainer(load_recipe(name), [target], source, source, seed=0, stop_after=1).run().history
    )
    assert epoch.losses["residual"] > 0 and np.isfinite(epoch.validation_loss)


# --- end to end ---------------------------------------------------------------------------------


PACKED: dict[str, Any] = {"name": "packmil", "options": {**SMALL, "downsampler": "max", "r": 2}}


def trained(epochs: int, **options: Any) -> Trained:
    recipe = made_recipe(
        regime=PACKED,
        objective={"terms": {"residual": 0.2}},
        training={"epochs": epochs},
        optimiser={"lr": 3e-2},
    )
    return Trainer(
        recipe,
        [TARGET],
        made_source(24, seed=1, name="t"),
        made_source(12, seed=2, name="v"),
        **{"seed": 0, **options},
    ).run()


def test_it_learns_a_planted_signal() -> None:
    from sklearn.metrics import roc_auc_score

    found = trained(12)
    assert found.inner_logits is not None
    labels = np.arange(12) % 2
    assert roc_auc_score(labels, found.inner_logits[:, 1] - found.inner_logits[:, 0]) > 0.85
    assert found.history[-1].losses["bag"] < found.history[0].losses["bag"]


def test_it_learns_in_half_precision() -> None:
    recipe = made_recipe(
        regime={"name": "packmil", "options": {**PACKED["options"], "norm": "batch"}},
        training={"epochs": 3, "precision": "bfloat16"},
        optimiser={"lr": 1e-2},
    )
    source = made_source(24, seed=1)
    history = Trainer(recipe, [TARGET], source, None, seed=0).run().history
    assert history[-1].losses["bag"] < history[0].losses["bag"]
    assert all(np.isfinite(epoch.losses["residual"]) for epoch in history)


def test_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = trained(4)
    trained(4, folder=tmp_path, stop_after=2)
    resumed = trained(4, folder=tmp_path)
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "options", "blocks", "message"),
    [
        ([TARGET], {}, {"bags": {"bags_per_step": 1}}, "bags_per_step is 1; set it to 8"),
        ([TARGET, GRADES], {}, {}, "by one target, and there are 2"),
        ([TARGET], {"grade": True}, {}, r"label \(classes\) has 2 classes; .* six classes"),
        ([SURVIVAL], {"grade": True}, {}, r"os \(survival\) has no classes"),
        ([TARGET], {"residual": "nll"}, {}, "nll is for survival, and label is of task classes"),
        ([SURVIVAL], {"residual": "focal"}, {}, "focal is for classes, multilabel, .* take nll"),
        ([GRADES], {"residual": "bce"}, {}, "isup is of task ordinal; take ce"),
        ([SURVIVAL], {}, {"objective": {"survival": "cox"}}, "take survival: nll"),
        (
            [TargetSpec(column="age", task="regression")],
            {},
            {},
            "no label for age, a regression; .* or residual: none",
        ),
        (
            [TARGET],
            {"residual": "none"},
            {"objective": {"terms": {"residual": 0.2}}},
            "has no hyperslides with these options; leave it out",
        ),
    ],
)
def test_what_makes_no_label_is_refused(
    targets: list[TargetSpec], options: dict[str, Any], blocks: dict[str, Any], message: str
) -> None:
    recipe = made_recipe(regime={"name": "packmil", "options": options}, **blocks)
    with pytest.raises(ConfigError, match=message):
        refuse_impossible(recipe, targets)


def test_without_hyperslides_any_target_goes() -> None:
    recipe = made_recipe(regime={"name": "packmil", "options": {"residual": "none"}})
    refuse_impossible(recipe, [TARGET, TargetSpec(column="age", task="regression")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downsampler": "max"}, "r is 1; set it to 2 or more"),
        ({"share": 0.0, "residual": "focal"}, "share 0 leaves none; raise share"),
        ({"share": 0.0, "borrow": True}, "share 0 makes none"),
        ({"residual": "none", "dual": True}, "dual is of hyperslides, and there are none"),
        ({"benign": "zero"}, "benign belongs to grade: true"),
        ({"ban_norm": False}, "ban_norm is of hyperslides and a norm"),
        ({"sharre": 0.1}, "unknown option 'sharre' .did you mean 'share'"),
    ],
)
def test_an_option_without_an_effect_is_refused(options: dict[str, Any], message: str) -> None:
    recipe = made_recipe(regime={"name": "packmil", "options": options})
    with pytest.raises(ConfigError, match=message):
        build_model(recipe, DIMENSION, 2)


def test_compressed_tiles_have_no_place_on_a_lattice() -> None:
    raster = {"name": "mambamil", "options": {**NARROW["mambamil"], "order": "raster"}}
    options = {"downsampler": "max", "r": 2}
    recipe = TrainSpec.model_validate(
        {"aggregator": raster, "regime": {"name": "packmil", "options": options}}
    )
    with pytest.raises(ConfigError, match=r"no place on the lattice .* set downsampler: none"):
        build_model(recipe, DIMENSION, 2)


def test_a_predictor_of_hyperslides_fits_an_aggregator_that_goes_by_micrometres() -> None:
    options = {"hidden": 8, "heads": 2, "mixer": "alibi"}
    recipe = packing(dual=True).model_copy(
        update={"aggregator": AggregatorSpec(name="vit", options=options)}
    )
    model = build_model(recipe, DIMENSION, 2)
    assert isinstance(model, PackMIL)
    assert model.predictor is not None
    assert model.predictor.in_features == 8
