"""Interventions are the bags that they say they are, and their records say all that was done."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bagscope.mil.bags import Bags
from bagscope.mil.explain.cohort import over_cohort
from bagscope.mil.explain.effects import (
    Intervention,
    Subject,
    addition,
    doses,
    effect_table,
    keeping,
    measure,
    one_by_one,
    random_controls,
    removal,
    share_of,
    swap,
    tile_table,
    with_controls,
)
from bagscope.mil.explain.pools import pool_of
from bagscope.mil.explain.question import class_question
from bagscope.testing.planted import planted_bags
from tests.mil.explain.made_models import QUESTION, asked, bags, model, oracle

OWN, DONOR = 9, 5


def subject(kind: str = "gated") -> Subject:
    made = replace(
        bags(OWN, DONOR),
        coords_l0=torch.arange(2 * (OWN + DONOR), dtype=torch.int32).view(-1, 2),
    )
    return Subject(bags=made, pool=pool_of(model(kind), made, QUESTION), model_id="fold 0")


def array(*rows: int) -> np.ndarray:
    return np.array(rows, np.int64)


@pytest.mark.parametrize("kind", ["gated", "acmil", "max"])
def test_effects_are_those_of_the_bags_themselves(kind: str) -> None:
    about = subject(kind)
    wanted = {
        "remove": [0, 1, 3, 5, 6, 7, 8],
        "keep only": [2, 4],
        "add": [*range(OWN), 10, 12],
        "transplant": [0, 1, 3, 5, 6, 7, 8, 10],
        "dose 0": [0, 1, 3, 5, 6, 7, 8],
        "dose 1": [*range(OWN)],
        "dose 3": [*range(OWN), 2, 4, 2, 4],
    }
    edits = [
        removal(array(2, 4)),
        keeping(about, array(2, 4)),
        addition(array(10, 12)),
        swap(array(2, 4), array(10)),
        *doses(array(2, 4), (0, 1, 3)),
        *one_by_one(array(9, 13)),
    ]
    selections = [array(*rows) for rows in wanted.values()]
    selections += [array(*range(OWN), extra) for extra in (9, 13)]
    truth = asked(model(kind), about.bags, [array(*range(OWN)), *selections])
    found = measure(about, edits)
    assert [effect.intervention for effect in found] == [*wanted, "add one", "add one"]
    for effect, after, rows in zip(found, truth[1:], selections, strict=True):
        np.testing.assert_allclose(effect.before, truth[0], atol=1e-6)
        np.testing.assert_allclose(effect.after, after, atol=1e-6)
        assert effect.tiles_after == len(rows)
        assert effect.decision_after == after.argmax()
        assert effect.flips == (after.argmax() != truth[0].argmax())


def test_records_say_what_was_moved() -> None:
    effects = measure(subject(), [swap(array(2, 4), array(10, 10)), removal(array(8))])
    table, tiles = effect_table(effects), tile_table(effects)
    assert {len(values) for values in table.values()} == {2}
    assert table["slide_id"] == ["slide 0"] * 2 and table["model_id"] == ["fold 0"] * 2
    assert table["tiles_removed"] == [2, 1] and table["tiles_added"] == [2, 0]
    assert table["removed_share"] == [2 / 9, 1 / 9]
    assert table["delta_b"] == [table["after_b"][n] - table["before_b"][n] for n in (0, 1)]
    assert set(table["decision_before"]) <= set(QUESTION.columns)
    assert tiles == {
        "effect": [0, 0, 0, 0, 1],
        "role": ["removed", "removed", "added", "added", "removed"],
        "slide_id": ["slide 0", "slide 0", "slide 1", "slide 1", "slide 0"],
        "tile_row": [2, 4, 1, 1, 8],
        "x_l0": [4, 8, 20, 20, 16],
        "y_l0": [5, 9, 21, 21, 17],
    }


def test_tiles_are_named_by_their_slides_and_rows() -> None:
    made = replace(
        bags(4, 2),
        slide_ids=("s1", "s2", "d"),
        tile_slide=torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32),
        tile_row=torch.tensor([7, 8, 0, 1, 3, 5], dtype=torch.int32),
    )
    places = Subject(bags=made, pool=pool_of(model("mean"), made, QUESTION)).places(array(1, 2, 5))
    assert places.slide_ids == ("s1", "s2", "d")
    assert places.rows.tolist() == [8, 0, 5]
    assert places.coords_l0 is None


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (removal(array(2, 2)), "slide 0, remove: rows to remove must be .* each once"),
        (removal(array(10)), "must be the slide's own 0 to 8"),
        (addition(array(14)), "rows to add run from 14 to 14; the pool has 14 tiles"),
        (removal(np.arange(OWN)), "takes out all 9 tiles"),
    ],
)
def test_edits_that_make_no_sense(edit: Intervention, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        measure(subject(), [edit])


def test_random_controls_are_as_large_and_the_same_each_time() -> None:
    about = subject()
    edit = swap(array(0, 1, 2), array(9, 9, 11, 3))
    controls = random_controls(about, edit, draws=30, seed=4)
    for control in controls:
        assert len(set(control.removed.tolist())) == 3 and control.removed.max() < OWN
        kinds, times = np.unique(control.added, return_counts=True)
        assert len(control.added) == 4
        assert sorted(times[kinds >= OWN].tolist()) == [1, 2]
        assert times[kinds < OWN].tolist() == [1]
    assert len({tuple(control.removed.tolist()) for control in controls}) > 20
    again = random_controls(about, edit, draws=30, seed=4)
    assert all(
        (a.removed == b.removed).all() and (a.added == b.added).all()
        for a, b in zip(controls, again, strict=True)
    )
    other = random_controls(about, edit, draws=30, seed=5)
    assert any((a.removed != b.removed).any() for a, b in zip(controls, other, strict=True))


def test_planted_tiles_are_necessary_and_sufficient_and_random_ones_are_not() -> None:
    planted = planted_bags(4, seed=2, tiles=(150, 200), share=0.04)
    aggregator = oracle(planted)
    question = class_question(("normal", "tumour"), threshold=0.5)
    effects = []
    for place in (1, 3):
        made = [torch.from_numpy(planted.bags[n]) for n in (place, 2)]
        joined = Bags.of(made, bag_ids=[f"positive {place}", "negative"])
        about = Subject(bags=joined, pool=pool_of(aggregator, joined, question))
        tumour = np.flatnonzero(planted.truth[place])
        result = with_controls(about, removal(tumour))
        assert result.effect.flips and result.effect.delta[1] < -0.9
        assert result.excess[1] < -0.8 and result.p_value[1] == 1 / 21
        effects.append(result.effect)
        other = Bags.of(made[::-1], bag_ids=["negative", f"positive {place}"])
        about = Subject(bags=other, pool=pool_of(aggregator, other, question))
        tumour = about.rows_of(1)[planted.truth[place]]
        single = measure(about, one_by_one(tumour))
        alone = np.array([effect.after[1] for effect in single])
        assert np.median(alone) > 0.9 and single[0].before[1] < 0.1
        result = with_controls(about, addition(tumour[[alone.argmax()]]))
        assert result.excess[1] > 0.8 and result.p_value[1] <= 3 / 21
    summary = over_cohort(effects, column=1, patients=["p", "q"], truth=[True] * 2, resamples=200)
    assert summary.column == "tumour" and summary.slides == summary.flips == 2
    assert summary.change.difference < -0.9 and summary.change.high < -0.9
    assert [estimate.value for estimate in summary.sensitivity] == [1.0, 0.0]
    assert np.isnan(summary.specificity[0].value)


def test_cohort_counts_both_classes() -> None:
    about = subject()
    effects = measure(about, [removal(array(place)) for place in range(6)])
    made = [
        replace(effect, decision_before=b, decision_after=a)
        for effect, b, a in zip(effects, (1, 1, 0, 0, 1, 0), (0, 1, 0, 1, 1, 0), strict=True)
    ]
    summary = over_cohort(
        made, column=1, patients=list("abcdef"), truth=[1, 1, 1, 0, 0, 0], resamples=100
    )
    assert [round(estimate.value, 6) for estimate in summary.sensitivity] == [0.666667, 0.333333]
    assert [round(estimate.value, 6) for estimate in summary.specificity] == [0.666667, 0.333333]
    assert summary.flips == 2
    wanted = np.mean([effect.delta[1] for effect in effects])
    assert summary.change.difference == pytest.approx(wanted)
    unknown = over_cohort(made, column=1, patients=list("abcdef"), resamples=100)
    assert np.isnan(unknown.sensitivity[0].value)
    with pytest.raises(ValueError, match="6 effects and 1 patients"):
        over_cohort(made, column=1, patients=["a"])


def test_shares_are_rounded_up() -> None:
    assert [share_of(100, share) for share in (0.0, 0.01, 0.07, 0.29, 1.0)] == [0, 1, 7, 29, 100]
    assert share_of(150, 0.01) == 2 and share_of(3, 0.01) == 1
