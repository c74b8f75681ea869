from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from bagscope.mil.baselines import Baseline
from bagscope.mil.evaluation.answers import Answers
from bagscope.mil.evaluation.bootstrap import Estimate
from bagscope.mil.evaluation.paired import Comparison
from bagscope.mil.evaluation.scoring import score
from bagscope.mil.report.claims import Claim, claims_of, number_text
from bagscope.mil.report.figures import ranking
from bagscope.mil.report.results import MemberFacts, Rival, RunResult, TargetResult
from bagscope.mil.targets import TargetSpec

TARGET = TargetSpec(column="label", classes=("no", "yes"))
CASES = 80


@pytest.fixture(scope="module")
def found() -> TargetResult:
    """Return a model with an interval of about 0.75 to 0.95."""
    random = np.random.default_rng(0)
    truth = np.arange(CASES) % 2
    chance = 1 / (1 + np.exp(-(truth - 0.5 + random.normal(0, 0.7, CASES))))
    case = np.array([f"c{place}" for place in range(CASES)])
    answers = Answers(
        target=TARGET,
        case=case,
        patient=case,
        site=np.full(CASES, ""),
        repeat=np.zeros(CASES, np.int64),
        fold=np.arange(CASES) // 2 % 4,
        truth=truth[:, None].astype(float),
        predicted=np.stack([1 - chance, chance], axis=1),
        called=(chance >= 0.5).astype(np.int64),
    )
    return TargetResult(answers=answers, scores=score(answers, resamples=300))


def run_of(result: TargetResult, **changes: object) -> RunResult:
    fields: dict[str, object] = {
        "run": "r", "per": "slide", "targets": {"label": result}, "method": "kfold",
        "seeds": (0,), "folds": (), "members": (), "left_out": {}, "notes": (),
        "patients_known": True, "versions": {}, "config": {}, "fields": {},
    }  # fmt: skip
    return RunResult(**{**fields, **changes})  # type: ignore[arg-type]


def rival(name: Baseline, value: float, low: float = -0.1, high: float = 0.1) -> Rival:
    versus = Comparison(
        method="paired bootstrap", first=0.8, second=value, difference=0.8 - value,
        low=low, high=high, level=0.95, p_value=0.5,
    )  # fmt: skip
    estimate = Estimate(value=value, low=value - 0.1, high=value + 0.1)
    return Rival(name=name, label=f"Rival {name}", estimate=estimate, versus=versus)


def told(result: TargetResult, *rivals: Rival, **changes: object) -> tuple[Claim, ...]:
    result = dataclasses.replace(result, rivals=rivals)
    return claims_of(run_of(result, **changes), result)


def tones(claims: tuple[Claim, ...], words: str) -> list[str]:
    return [claim.tone for claim in claims if words in claim.text]


def test_headline_is_first_with_value_interval_and_patients(found: TargetResult) -> None:
    first = told(found)[0]
    estimate = found.scores.pooled["auroc"]
    assert first.tone == "finding"
    assert f"AUROC {estimate.value:.2f} (95 % interval {estimate.low:.2f} to" in first.text
    assert "80 patients (40 no, 40 yes)" in first.text
    assert not tones(told(found), "chance")


def test_an_interval_wholly_below_chance_is_not_told_as_reaching_down_to_it(
    found: TargetResult,
) -> None:
    answers = dataclasses.replace(found.answers, predicted=found.answers.predicted[:, ::-1])
    inverted = told(TargetResult(answers=answers, scores=score(answers, resamples=300)))
    assert tones(inverted, "whole interval lies below chance (0.5): the model ranks") == ["warning"]
    assert not tones(inverted, "does not rule out")
    shuffled = np.random.default_rng(1).permutation(found.answers.predicted)
    answers = dataclasses.replace(found.answers, predicted=shuffled)
    idle = told(TargetResult(answers=answers, scores=score(answers, resamples=300)))
    assert tones(idle, "does not rule out chance (0.5)") == ["warning"]
    assert not tones(idle, "wrong way round")


def test_linear_rival_is_beaten_beats_or_is_not_told_apart(found: TargetResult) -> None:
    better = told(found, rival("linear", 0.6, 0.05, 0.3))
    assert tones(better, "The model is better than rival linear") == ["good"]
    worse = told(found, rival("linear", 0.99, -0.3, -0.05))
    assert tones(worse, "worse than rival linear") == ["warning"]
    same = told(found, rival("linear", 0.8))
    assert tones(same, "not shown to be better than rival linear") == ["warning"]


def test_leaks_are_named_within_and_above_the_interval_alone(found: TargetResult) -> None:
    estimate = found.scores.headline_estimate
    within = told(found, rival("size", (estimate.low + estimate.high) / 2))
    assert within[1].tone == "warning"
    assert "within the model's interval" in within[1].text
    above = told(found, rival("site", min(1.0, estimate.high + 0.01)))
    assert "above the model's interval" in above[1].text
    both = told(found, rival("size", 0.5), rival("site", 0.55))
    assert tones(both, "below the model's interval") == ["good"]
    at_low = told(found, rival("size", estimate.low))
    assert tones(at_low, "within the model's interval") == ["warning"]


def test_a_leak_away_from_chance_is_not_praised(found: TargetResult) -> None:
    inverted = told(found, rival("size", 0.5), rival("site", 0.15))
    assert tones(inverted, "Tile count and tissue area alone come to 0.50, below the m") == ["good"]
    assert tones(inverted, "Site alone comes to 0.15 (0.05 to 0.25), away from ch") == ["note"]
    assert tones(inverted, "(0.5) on the lower side") == tones(inverted, "wrong way round")
    assert tones(inverted, "Site alone") == ["note"]
    some = told(found, rival("site", 0.65))
    assert tones(some, "Site alone comes to 0.65 (0.55 to 0.75), below the model") == ["note"]
    assert tones(some, "interval but above chance (0.5)") == ["note"]
    unknown = dataclasses.replace(
        rival("site", 0.5), estimate=Estimate(value=0.5, low=math.nan, high=math.nan)
    )
    assert tones(told(found, unknown), "Site alone comes to 0.50, below the model") == ["note"]


def test_without_an_interval_a_leak_is_held_against_the_value(found: TargetResult) -> None:
    one = dataclasses.replace(found.scores.pooled["auroc"], low=math.nan, high=math.nan)
    scores = dataclasses.replace(found.scores, pooled={**found.scores.pooled, "auroc": one})
    bare = dataclasses.replace(found, scores=scores)
    assert tones(told(bare, rival("size", 0.999)), "above what the model reaches") == ["warning"]
    assert tones(told(bare, rival("size", 0.6)), "below what the model reaches") == ["good"]


def test_few_patients_unknown_patients_and_missing_calibration_are_said(
    found: TargetResult,
) -> None:
    small = dataclasses.replace(found, answers=found.answers.of_rows(np.arange(40)))
    assert tones(told(small), "A class has few patients (20 no, 20 yes)") == ["warning"]
    assert not tones(told(found), "few patients")
    unknown = told(found, patients_known=False)
    assert tones(unknown, "names no patients") == ["warning"]
    members = tuple(
        MemberFacts(name=f"m{place}", seed=0, epoch=1, epochs=1, uncalibrated=reasons)
        for place, reasons in enumerate(({"label": "too few"}, {}))
    )
    partly = told(found, members=members)
    assert tones(partly, "Only 1 of the 2 models is calibrated (too few)") == ["note"]
    alone = told(found, members=members[:1])
    assert tones(alone, "The model is not calibrated (too few)") == ["note"]


def test_reach_follows_the_splits(found: TargetResult) -> None:
    assert tones(told(found), "this study can't say") == ["note"]
    assert tones(told(found, method="site_out"), "Sites outside the study") == ["note"]
    assert tones(told(found, method="external"), "No rival was fitted") == ["note"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.50"), (-0.004, "0.00"), (-0.123, "−0.12"), (math.nan, "–"), (1234.5, "1234")],
)
def test_numbers_read_as_people_write_them(value: float, text: str) -> None:
    assert number_text(value) == text


def test_the_ranking_figure_names_the_positive_class(found: TargetResult) -> None:
    picture = ranking(found.answers)
    assert picture is not None
    assert "Positive is yes." in picture.caption
