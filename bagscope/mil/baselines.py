"""What a study would have come to without its aggregator, on the very same folds.

constant     the same answer for all: majority class, median
linear       logistic, ridge or Cox regression on the mean of a case's tiles
neighbours   the nearest cases by that mean
size         the same regression on the number of tiles and the area of tissue alone
site         the same regression on where a case comes from alone

The last two look at nothing of the tissue: where they come close, a model may have learnt no more.
Each is fitted on the training and inner validation cases of a fold and tested on its test cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bagscope.errors import ArtifactError
from bagscope.mil.cases import Case
from bagscope.mil.evaluation.answers import CALLED_FROM, Answers
from bagscope.mil.evaluation.inputs import FloatArray, IntArray
from bagscope.mil.plain_models import Kind, constant, predict
from bagscope.mil.sources import BagSource
from bagscope.mil.splits.plan import Split
from bagscope.mil.targets import TargetSpec

Baseline = Literal["constant", "linear", "neighbours", "size", "site"]
BASELINES: tuple[Baseline, ...] = ("constant", "linear", "neighbours", "size", "site")
LEAKS: tuple[Baseline, ...] = ("size", "site")
"""Those that look at nothing of the tissue."""
_OF_TILES = frozenset({"linear", "neighbours", "size"})
_UM2_PER_MM2 = 1e6


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CaseVectors:
    """What the baselines know of cases, all (n, …) in the cases' order.

    Attributes:
        mean: (n, D) mean of a case's tiles.
        tiles: (n,) how many.
        area_mm2: (n,) tissue that they cover, NaN where the tiles' size is not known.
    """

    mean: FloatArray
    tiles: FloatArray
    area_mm2: FloatArray


def label_of(baseline: Baseline, target: TargetSpec) -> str:
    """Return what people call a baseline."""
    regression = {"regression": "ridge regression", "survival": "Cox regression"}
    fitted = regression.get(target.task, "logistic regression")
    same = {"regression": "Median", "survival": "The same risk for all"}
    return {
        "constant": same.get(target.task, "Majority class"),
        "linear": f"Mean of tiles, {fitted}",
        "neighbours": "Mean of tiles, nearest neighbours",
        "size": "Tile count and tissue area alone",
        "site": "Site alone",
    }[baseline]


def vectors_of(source: BagSource) -> CaseVectors:
    """Return the vectors of a source's cases; reads each bag once and keeps none.

    Raises:
        ArtifactError: features that are no numbers; names the case.
    """
    means = np.empty((len(source.cases), source.dimension))
    area_mm2 = np.empty(len(source.cases))
    for place, case in enumerate(source.cases):
        bag = source.read(place)
        means[place] = bag.features.mean(axis=0, dtype=np.float64)
        if not np.isfinite(means[place]).all():
            raise ArtifactError(
                f"{case.case_id}: has features that are no finite numbers; extract them anew"
            )
        area_mm2[place] = (bag.tile_um[bag.tile_slide] ** 2).sum() / _UM2_PER_MM2
    return CaseVectors(mean=means, tiles=source.lengths.astype(np.float64), area_mm2=area_mm2)


def baseline_answers(
    target: TargetSpec,
    cases: Sequence[Case],
    vectors: CaseVectors | None,
    splits: Sequence[Split],
) -> tuple[dict[Baseline, Answers], dict[Baseline, str]]:
    """Return each baseline's answers to the test cases, and why some have none.

    Args:
        target: what is predicted; cases without its label neither teach nor test.
        cases: all of them.
        vectors: in the cases' order; None where no features are at hand.
        splits: of the run.
    """
    found: dict[Baseline, Answers] = {}
    skipped: dict[Baseline, str] = {}
    for baseline in BASELINES:
        reason = _reason(baseline, target, cases, vectors, splits)
        if reason:
            skipped[baseline] = reason
            continue
        found[baseline] = _answers(baseline, target, cases, vectors, splits)
    return found, skipped


def _reason(
    baseline: Baseline,
    target: TargetSpec,
    cases: Sequence[Case],
    vectors: CaseVectors | None,
    splits: Sequence[Split],
) -> str:
    """Return why a baseline can't be had; empty where it can."""
    if baseline in _OF_TILES and vectors is None:
        return "the features are not at hand; pass --features"
    if baseline == "neighbours" and target.task == "survival":
        return "there is none of survival"
    if baseline == "site":
        sites = {case.site for case in cases} - {""}
        if len(sites) < 2:
            return "there is one site" if sites else "the cohort table names no sites"
        if all(split.site for split in splits):
            return "every fold tests a site of its own, of which the others say nothing"
    return ""


def _answers(
    baseline: Baseline,
    target: TargetSpec,
    cases: Sequence[Case],
    vectors: CaseVectors | None,
    splits: Sequence[Split],
) -> Answers:
    place = {case.case_id: number for number, case in enumerate(cases)}
    labels = np.array([case.targets[target.name] for case in cases], np.float64)
    has = np.asarray((~np.isnan(labels)).any(axis=1), np.bool_)
    patients = np.array([case.patient_id for case in cases], np.str_)
    x = _columns(baseline, cases, vectors)
    rows, predicted, repeat, fold = [], [], [], []
    for split in splits:
        train, test = (
            np.array([place[case_id] for case_id in ids if has[place[case_id]]], np.int64)
            for ids in ((*split.train, *split.val), split.test)
        )
        if not len(test):
            continue
        if baseline == "constant":
            answer = constant(target, labels[train], len(test))
        else:
            kind: Kind = "neighbours" if baseline == "neighbours" else "linear"
            strength = 1.0 if baseline in LEAKS else None
            parts = x[train], labels[train], patients[train], x[test]
            answer = predict(kind, target, *parts, strength=strength)
        rows.append(test)
        predicted.append(answer)
        repeat.append(np.full(len(test), split.repeat))
        fold.append(np.full(len(test), split.fold))
    chosen, values = np.concatenate(rows), np.concatenate(predicted)
    return answers_to(target, cases, chosen, np.concatenate(repeat), np.concatenate(fold), values)


def answers_to(
    target: TargetSpec,
    cases: Sequence[Case],
    rows: IntArray,
    repeat: IntArray,
    fold: IntArray,
    predicted: FloatArray,
) -> Answers:
    """Return predictions (n, k) of the cases at `rows` (n,) beside their labels.

    Where a model has no threshold of its own, the most probable class is called.
    """
    chosen = [cases[row] for row in rows]
    return Answers(
        target=target,
        case=np.array([case.case_id for case in chosen], np.str_),
        patient=np.array([case.patient_id for case in chosen], np.str_),
        site=np.array([case.site for case in chosen], np.str_),
        repeat=repeat,
        fold=fold,
        truth=np.array([case.targets[target.name] for case in chosen], np.float64),
        predicted=predicted,
        called=_called(target, predicted),
    )


def _columns(baseline: Baseline, cases: Sequence[Case], vectors: CaseVectors | None) -> FloatArray:
    """Return what a baseline looks at: (n, D)."""
    if baseline == "site":
        sites = np.array([case.site for case in cases])
        one_hot: FloatArray = (sites[:, None] == np.unique(sites)).astype(np.float64)
        return one_hot
    if baseline == "constant" or vectors is None:
        return np.empty((len(cases), 0))
    if baseline == "size":
        known = ~np.isnan(vectors.area_mm2)
        area = np.where(known, vectors.area_mm2, 0)
        return np.stack([np.log1p(vectors.tiles), np.log1p(area), known], axis=1)
    return vectors.mean


def _called(target: TargetSpec, predicted: FloatArray) -> IntArray:
    if target.task == "multilabel":
        return (predicted >= CALLED_FROM).astype(np.int64)
    if target.is_categorical:
        likeliest: IntArray = predicted.argmax(axis=1)
        return likeliest
    return np.empty((len(predicted), 0), np.int64)
