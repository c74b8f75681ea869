from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bagscope.errors import CohortError, ConfigError, SchemaError
from bagscope.mil.objectives.objective import FittedObjective, Losses, build_objective
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.targets import TargetSpec
from tests.mil.objectives.made import (
    CLASSES,
    EVERY,
    MULTILABEL,
    REGRESSION,
    SURVIVAL,
    Rows,
    fitted,
    labels,
    normal,
    output,
    tensors,
    total,
)

ROWS = labels()
HELPED = {"class_weights": "balanced", "label_smoothing": 0.1, "focal_gamma": 1.0}
OBJECTIVES = {form: fitted(EVERY, ROWS, survival=form, **HELPED) for form in ("nll", "cox")}


def options_of(target: TargetSpec, form: str) -> dict[str, object]:
    if target.task == "survival":
        return {"survival": form}
    if target.task == "ordinal":
        return {"class_weights": "balanced"}
    return HELPED if target.classes else {}


ALONE = {
    (form, target.name): fitted([target], ROWS, **options_of(target, form))
    for form in OBJECTIVES
    for target in EVERY
}


def only(rows: Rows, which: np.ndarray | Tensor) -> Rows:
    return {name: values[which] for name, values in rows.items()}


def gradient(objective: FittedObjective, logits: Tensor, rows: Rows) -> Tensor:
    (found,) = torch.autograd.grad(total(objective, logits, rows), logits)
    return found


def test_targets_lie_side_by_side() -> None:
    objective = build_objective(EVERY, ObjectiveSpec())
    assert objective.outputs == 3 + 3 + 2 + 1 + 4
    assert list(objective.slices) == ["subtype", "isup", "marker", "age", "os"]
    covered = [i for s in objective.slices.values() for i in range(s.start, s.stop)]
    assert covered == list(range(13))
    learned = objective.fit(ROWS)
    assert (learned.outputs, learned.slices) == (objective.outputs, objective.slices)


def test_several_targets_are_the_weighted_sum_of_each_alone() -> None:
    targets = [t.model_copy(update={"weight": w}) for t, w in zip(EVERY, range(1, 6), strict=True)]
    objective = fitted(targets, ROWS)
    logits = normal(40, 13)
    losses = objective(output(logits), tensors(ROWS), progress=0.0)
    expected = 0.0
    for target in targets:
        alone = fitted([target], ROWS)
        part = logits[:, objective.slices[target.name]]
        mean = total(alone, part, ROWS).item() / target.weight
        assert losses.mean(f"bag/{target.name}").item() == pytest.approx(mean, rel=1e-12)
        expected += target.weight * mean
    assert losses.total.item() == pytest.approx(expected, rel=1e-12)
    assert losses.mean("bag").item() == pytest.approx(expected, rel=1e-12)
    assert objective.validation_loss(logits, tensors(ROWS)) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=12)
@given(data=st.data(), form=st.sampled_from(["nll", "cox"]))
def test_a_missing_label_is_as_if_the_bag_were_not_there(data: st.DataObject, form: str) -> None:
    objective, bags = OBJECTIVES[form], 8
    has = {
        t.name: np.array(data.draw(st.lists(st.booleans(), min_size=bags, max_size=bags)))
        for t in EVERY
    }
    rows = only(labels(bags, seed=9), np.arange(bags))
    holed = {name: np.where(has[name][:, None], values, np.nan) for name, values in rows.items()}
    logits = normal(bags, objective.outputs, seed=data.draw(st.integers(0, 99)))
    losses = objective(output(logits), tensors(holed), progress=0.0)
    found = gradient(objective, logits, holed)
    assert found.isfinite().all() and losses.total.isfinite()
    expected = 0.0
    for target in EVERY:
        kept, part = has[target.name], objective.slices[target.name]
        alone = ALONE[form, target.name]
        assert (losses.terms[f"bag/{target.name}"].numpy()[~kept] == 0).all()
        if not kept.any():
            assert not found[:, part].any()
            continue
        left = logits.detach()[kept][:, part].requires_grad_()
        mean = total(alone, left, only(rows, kept))
        expected += mean.item()
        (slope,) = torch.autograd.grad(mean, left)
        torch.testing.assert_close(found[kept][:, part], slope, rtol=1e-10, atol=1e-12)
        assert not found[~kept][:, part].any()
    assert losses.total.item() == pytest.approx(expected, rel=1e-10)


@settings(max_examples=8)
@given(order=st.permutations(range(12)), form=st.sampled_from(["nll", "cox"]))
def test_the_order_of_bags_is_nothing(order: list[int], form: str) -> None:
    objective = OBJECTIVES[form]
    rows, logits, places = labels(12, seed=8), normal(12, objective.outputs), torch.tensor(order)
    rows["age"][3] = np.nan
    base = objective(output(logits), tensors(rows), progress=0.0)
    moved = objective(output(logits[places]), tensors(only(rows, places)), progress=0.0)
    torch.testing.assert_close(moved.total, base.total, rtol=1e-12, atol=0)
    for name, term in base.terms.items():
        torch.testing.assert_close(moved.terms[name], term[places], rtol=1e-10, atol=1e-13)


def test_a_batch_without_a_label_gives_zero_with_a_zero_gradient() -> None:
    nothing = {name: np.full_like(values[:3], np.nan) for name, values in ROWS.items()}
    for objective in OBJECTIVES.values():
        logits = normal(3, objective.outputs)
        loss = total(objective, logits, nothing)
        loss.backward()
        assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()
        assert math.isnan(objective.validation_loss(logits, tensors(nothing)))


@pytest.mark.parametrize("form", ["nll", "cox"])
def test_validation_is_over_the_labelled_cases(form: str) -> None:
    objective, logits = OBJECTIVES[form], normal(40, OBJECTIVES[form].outputs)
    holed = {name: values.copy() for name, values in ROWS.items()}
    expected = 0.0
    for place, target in enumerate(EVERY):
        kept = np.arange(40) % 7 != place
        holed[target.name][~kept] = np.nan
        part = logits[kept][:, objective.slices[target.name]]
        expected += ALONE[form, target.name].validation_loss(part, tensors(only(ROWS, kept)))
    assert objective.validation_loss(logits, tensors(holed)) == pytest.approx(expected, rel=1e-12)


def test_validation_leaves_out_a_target_without_labels() -> None:
    objective = fitted([CLASSES, REGRESSION], ROWS)
    rows = {**ROWS, "age": np.full((40, 1), np.nan)}
    logits = normal(40, 4)
    alone = fitted([CLASSES], ROWS).validation_loss(logits[:, :3], tensors(ROWS))
    assert objective.validation_loss(logits, tensors(rows)) == alone


def test_the_total_is_the_weighted_sum_of_means() -> None:
    objective = fitted(
        [CLASSES, REGRESSION],
        ROWS,
        terms={"bag": 0.7, "instance": 0.3, "semantic": 0.5},
        entropy={"weight": 0.1},
    )
    rows = only(labels(6), np.arange(6))
    rows["subtype"][2] = rows["age"][2] = rows["age"][4] = np.nan
    branches, instance, more = normal(6, 3, 4), normal(6).abs(), normal(6, seed=1).abs()
    made = output(
        normal(6, 4),
        branch_logits=branches,
        entropy=normal(6, 2).abs(),
        losses={"instance": instance, "diversity": more},
    )
    losses = objective(made, tensors(rows), progress=0.0)
    means = {name: losses.mean(name).item() for name in losses.terms}
    expected = (
        0.7 * means["bag"]
        + 0.3 * instance.mean().item()
        + 1.0 * more.mean().item()
        + 0.5 * means["semantic"]
        + 0.1 * means["entropy"]
    )
    assert losses.total.item() == pytest.approx(expected, rel=1e-12)
    assert means["bag"] == pytest.approx(means["bag/subtype"] + means["bag/age"], rel=1e-12)
    assert losses.present["bag"].tolist() == [True, True, False, True, True, True]
    each = [total(fitted([CLASSES, REGRESSION], ROWS), branches[:, m], rows) for m in range(3)]
    assert means["semantic"] == pytest.approx(torch.stack(each).mean().item(), rel=1e-12)
    assert all(term.shape == (6,) and not term.requires_grad for term in losses.terms.values())


def test_every_term_gets_its_gradient() -> None:
    objective = fitted([CLASSES], ROWS, terms={"bag": 0.0, "semantic": 2.0})
    logits, branches, extra = normal(40, 3), normal(40, 2, 3), normal(40)
    made = output(logits, branch_logits=branches, losses={"extra": extra})
    objective(made, tensors(ROWS), progress=0.0).total.backward()
    assert logits.grad is not None and not logits.grad.any()
    assert branches.grad is not None and branches.grad.any(dim=2).all()
    assert extra.grad is not None
    torch.testing.assert_close(extra.grad, torch.full((40,), 1 / 40).double())


def test_a_weight_for_a_term_that_is_not_there_is_refused() -> None:
    objective = fitted([CLASSES], ROWS, terms={"instnace": 0.3})
    made = output(normal(40, 3), losses={"instance": torch.zeros(40)})
    with pytest.raises(ConfigError, match=r"to instnace, .* \(there are: bag, instance\)"):
        objective(made, tensors(ROWS), progress=0.0)


@pytest.mark.parametrize("name", ["bag", "entropy", "semantic"])
def test_an_aggregator_may_not_take_a_name_of_ours(name: str) -> None:
    made = output(normal(40, 3), losses={name: torch.zeros(40)})
    with pytest.raises(ValueError, match="a name that is taken"):
        fitted([CLASSES], ROWS)(made, tensors(ROWS), progress=0.0)


@pytest.mark.parametrize("form", ["nll", "cox"])
def test_stored_and_read_predicts_the_same_bits(form: str) -> None:
    objective = OBJECTIVES[form]
    back = FittedObjective.from_json(json.loads(json.dumps(objective.to_json())))
    logits = normal(9, objective.outputs).detach().numpy()
    temperatures = {"subtype": 1.7, "isup": 0.6}
    ours = objective.predictions(logits, temperatures)
    theirs = back.predictions(logits, temperatures)
    assert list(ours) == list(theirs)
    for name, values in ours.items():
        assert values.tobytes() == theirs[name].tobytes()
    assert back == objective
    assert torch.equal(
        total(back, torch.from_numpy(logits), only(ROWS, np.arange(9))),
        total(objective, torch.from_numpy(logits), only(ROWS, np.arange(9))),
    )


def test_a_damaged_file_is_said_to_be_one() -> None:
    stored = fitted([SURVIVAL], ROWS).to_json()
    stored["criteria"][0]["edges"][1] = "soon"
    with pytest.raises(SchemaError, match=r"stored objective: criteria.0.discrete_time.edges.1"):
        FittedObjective.from_json(stored)
    with pytest.raises(SchemaError, match="stored objective: targets: Field required"):
        FittedObjective.from_json({})


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 100.0]))
def test_probabilities_sum_to_one_and_a_temperature_of_one_is_none(seed: int, scale: float) -> None:
    objective = OBJECTIVES["nll"]
    logits = normal(5, objective.outputs, seed=seed, scale=scale).detach().numpy()
    found = objective.predictions(logits)
    for name in ("subtype", "isup"):
        np.testing.assert_allclose(found[name].sum(1), 1, rtol=1e-12)
    for name in ("subtype", "isup", "marker"):
        assert ((found[name] >= 0) & (found[name] <= 1)).all()
    ones = objective.predictions(logits, {"subtype": 1.0, "isup": 1.0, "marker": 1.0, "age": 1.0})
    assert all((ones[name] == values).all() for name, values in found.items())


def test_a_temperature_divides_the_logits_of_its_target_alone() -> None:
    objective = OBJECTIVES["nll"]
    logits = normal(5, objective.outputs).detach().numpy()
    halved = logits.copy()
    halved[:, objective.slices["isup"]] /= 2
    found, expected = objective.predictions(logits, {"isup": 2.0}), objective.predictions(halved)
    assert all((found[name] == values).all() for name, values in expected.items())


@pytest.mark.parametrize(
    ("temperatures", "message"),
    [
        ({"age": 2.0}, "age has no probabilities"),
        ({"grade": 2.0}, "temperatures of no target: grade"),
        ({"isup": 0.0}, "temperature of isup is 0"),
        ({"isup": math.nan}, "temperature of isup is nan"),
    ],
)
def test_temperatures_that_mean_nothing_are_refused(
    temperatures: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OBJECTIVES["nll"].predictions(np.zeros((1, 13)), temperatures)


def test_an_option_that_no_target_uses_is_refused() -> None:
    for targets, options, message in (
        ([CLASSES], {"bins": 8}, "bins is 8, and no target makes use of it"),
        ([CLASSES], {"regression": "mae"}, "regression is 'mae'"),
        ([REGRESSION], {"class_weights": "balanced"}, "class_weights is 'balanced'"),
        ([SURVIVAL], {"focal_gamma": 2.0}, "focal_gamma is 2.0"),
        ([REGRESSION], {"label_smoothing": 0.1}, "label_smoothing is 0.1"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_objective(targets, ObjectiveSpec(**options))
        build_objective([*targets, MULTILABEL, SURVIVAL, REGRESSION][-3:], ObjectiveSpec(**options))


def test_targets_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="target 'age' is there twice"):
        build_objective([REGRESSION, REGRESSION], ObjectiveSpec())
    with pytest.raises(ValueError, match="call resolve_classes first"):
        build_objective([TargetSpec(column="x")], ObjectiveSpec())
    with pytest.raises(ValueError, match="no targets"):
        build_objective([], ObjectiveSpec())


def test_rows_and_logits_of_another_shape_are_refused() -> None:
    objective = fitted([CLASSES, SURVIVAL], ROWS)
    with pytest.raises(ValueError, match=r"\(40, 6\); the objective has 7 outputs"):
        total(objective, normal(40, 6), ROWS)
    with pytest.raises(ValueError, match="the objective has 7 outputs"):
        objective.predictions(np.zeros((3, 8)))
    with pytest.raises(ValueError, match="no label rows of target 'os'"):
        total(objective, normal(40, 7), {"subtype": ROWS["subtype"]})
    with pytest.raises(ValueError, match=r"of os have shape \(40, 1\); they are \(n, 2\)"):
        objective.validation_loss(normal(40, 7), tensors({**ROWS, "os": ROWS["os"][:, :1]}))


def test_half_precision_is_widened_before_the_loss() -> None:
    objective = OBJECTIVES["nll"]
    logits = normal(40, objective.outputs).detach().bfloat16().requires_grad_()
    found = total(objective, logits, ROWS)
    assert found.dtype == torch.float32
    wide = total(objective, logits.detach().float(), ROWS)
    assert found.item() == wide.item()
    found.backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_nothing_is_learned_from_cases_without_labels() -> None:
    holed = {**ROWS, "age": np.full((40, 1), np.nan)}
    with pytest.raises(CohortError, match="age: none of the 40 training cases has a label"):
        fitted(EVERY, holed)


def test_a_term_that_nobody_takes_part_in_has_mean_zero() -> None:
    nobody = torch.zeros(2, dtype=torch.bool)
    losses = Losses(
        total=torch.zeros(()),
        terms={"bag": torch.tensor([1.0, 2.0])},
        present={"bag": nobody},
        weights={"bag": 1.0},
    )
    assert losses.mean("bag").item() == 0


def test_the_batches_of_a_step_add_up_to_the_step_whoever_lacks_a_label() -> None:
    objective = fitted([CLASSES, REGRESSION], ROWS, entropy={"weight": 0.1})
    rows = labels(7, seed=3)
    rows["subtype"][[0, 1, 4]] = rows["age"][[1, 2]] = np.nan
    logits, branches = normal(7, 4), normal(7, 2, 4)
    extra, entropy = normal(7).abs(), normal(7, 2, seed=2).abs()
    of_step = objective.counts(tensors(rows))

    def losses(places: slice) -> Losses:
        made = output(
            logits[places],
            branch_logits=branches[places],
            entropy=entropy[places],
            losses={"extra": extra[places]},
        )
        own = tensors({name: values[places] for name, values in rows.items()})
        return objective(made, own, progress=0.0, step=of_step)

    whole = losses(slice(None))
    alone = objective(
        output(logits, branch_logits=branches, entropy=entropy, losses={"extra": extra}),
        tensors(rows),
        progress=0.0,
    )
    assert whole.total.item() == alone.total.item()
    # The second batch has no label at all, the first one less than half of them.
    cut = [losses(slice(*borders)) for borders in ((0, 1), (1, 2), (2, 5), (5, 7))]
    total = torch.stack([part.total for part in cut]).sum()
    assert total.item() == pytest.approx(whole.total.item(), rel=1e-12)
    for name, term in whole.terms.items():
        torch.testing.assert_close(torch.cat([part.terms[name] for part in cut]), term)
    leaves = (logits, branches, extra)
    for found, expected in zip(
        torch.autograd.grad(total, leaves), torch.autograd.grad(whole.total, leaves), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
