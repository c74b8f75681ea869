"""Whether the heatmaps of a case can be believed: judged where features and members are at hand.

Judged are the scores as a heatmap shows them by default and, where a logit is a sum over tiles,
what tiles add to each class's; scores of a class against the answer for that class, all others
against the predicted one. A model without a closed form is shown as many tiles as in `PASSES`
passes over the bag at most, and asked about the case's usual heatmap only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bagscope.artifacts import Json
from bagscope.heatmaps.scores import Column, on_scale, pick_column, scales_for
from bagscope.mil.explain.faithfulness import (
    SHARES,
    Curves,
    Faithfulness,
    Heatmap,
    agreement,
    faithfulness_of_each,
)
from bagscope.mil.explain.question import Array
from bagscope.mil.member import Member
from bagscope.mil.objectives.regression import RegressionCriterion
from bagscope.mil.prediction import Answer, alike_scores, score_names
from bagscope.mil.targets import TargetSpec

PACKED_SHARES = (0.05, 0.2, 0.5)
PACKED_ORDERS = 19
PASSES = 2 + len(PACKED_SHARES) * (PACKED_ORDERS + 1)
"""Over the tiles of a bag: most that judging costs a model without a closed form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A heatmap of a case.

    Attributes:
        basis: what its numbers are made of: "scores" or "contributions".
        column: the class whose numbers they are; empty where they are the same for all.
        heatmap: what is judged.
    """

    basis: str
    column: str
    heatmap: Heatmap


def judged(
    answer: Answer, members: Sequence[Member], others: Sequence[Array] = ()
) -> dict[str, Json]:
    """Return the faithfulness of a case's heatmaps as a score file holds it.

    Args:
        answer: of the members.
        members: that answered.
        others: scores (n, K) of models that saw the case in training: they answer nothing, and
            are compared with a member that is alone.
    """
    found: dict[str, Json] = {
        "judged": [],
        "unjudged": "",
        "forward_passes": None,
        "agreement": _agreement(answer, others),
    }
    pool = answer.pool
    if pool is None:
        return {**found, "unjudged": "the model has several targets, and one score for all"}
    (target,) = members[0].targets
    if target.task == "survival":
        return {**found, "unjudged": "a risk has no unit that says how much of a change is much"}
    rows = np.arange(len(answer.scores))
    whole = pool.answers([rows])
    decided = int(pool.question.decided(whole)[0])
    predicted = decided if decided >= 0 else int(whole[0].argmax())
    unit, sign = _unit_and_sign(members, float(whole[0, 0]))
    shown = list(_shown(answer, target, pool.question.columns, predicted, sign))
    closed = pool.is_closed_form
    shown = shown if closed else shown[:1]
    each = faithfulness_of_each(
        pool,
        rows,
        [one.heatmap for one in shown],
        orders=None if closed else PACKED_ORDERS,
        shares=SHARES if closed else PACKED_SHARES,
        unit=unit,
    )
    attends = answer.score_kind == "log_weight"
    for one, result in zip(shown, each, strict=True):
        explained = predicted if one.heatmap.column is None else one.heatmap.column
        name = pool.question.columns[explained]
        found["judged"].append(_entry(one, result, target, name, attends=attends))
    return {**found, "forward_passes": None if closed else PASSES}


def _shown(
    answer: Answer, target: TargetSpec, columns: Sequence[str], predicted: int, sign: float
) -> Iterator[Shown]:
    """Yield heatmaps that can be drawn of an answer; the usual one of the case first."""
    kind, classes = answer.score_kind, target.classes
    names = score_names([target], answer.scores.shape[1])
    scale = scales_for(kind, target.task)[0]
    usual = pick_column(names, None, columns[predicted] if classes else None)
    own = [usual]
    if usual.name:
        own += [Column(name=name, index=i) for i, name in enumerate(names) if i != usual.index]
    for column in own:
        values = on_scale(answer.scores, kind, scale, column, task=target.task)
        explained = columns.index(column.name) if column.name else None
        yield Shown(basis="scores", column=column.name, heatmap=Heatmap(values, explained, sign))
    # The steps of an ordinal target are no answers, and its answers no steps.
    if answer.contributions is not None and target.task != "ordinal":
        for place, name in enumerate(columns):
            values = answer.contributions[:, place].astype(np.float64)
            yield Shown(
                basis="contributions",
                column=name if classes else "",
                heatmap=Heatmap(values, place),
            )


def _unit_and_sign(members: Sequence[Member], value: float) -> tuple[float, float]:
    """Return what an answer counts in, and −1 where a number is lower than is usual."""
    fitted = [member.objective.criteria[0] for member in members]
    numbers = [one for one in fitted if isinstance(one, RegressionCriterion)]
    if not numbers:
        return 1.0, 1.0
    usual = float(np.mean([one.location for one in numbers]))
    return float(np.mean([one.scale for one in numbers])), 1.0 if value >= usual else -1.0


def _agreement(answer: Answer, others: Sequence[Array]) -> dict[str, Json] | None:
    """Return how far models agree on the tiles; None of a single one.

    Members that never saw the case are compared with each other alone, where there are several.
    """
    kind, column = answer.score_kind, Column(name="", index=None)
    compared = list(answer.member_scores)
    if len(compared) == 1:
        compared += [alike_scores([scores], kind)[0] for scores in others]
    if len(compared) < 2:
        return None
    found = agreement([on_scale(scores, kind, "logit", column) for scores in compared])
    told = {name: _number(value) for name, value in dataclasses.asdict(found).items()}
    seen = len(compared) - len(answer.member_scores)
    return {**told, "models": len(compared), "saw_the_case": seen}


def _entry(
    shown: Shown, found: Faithfulness, target: TargetSpec, name: str, *, attends: bool
) -> dict[str, Json]:
    subject = "Attention does" if attends else "The tiles' scores do"
    if shown.basis == "contributions":
        subject = "The contributions do"
    curves: dict[str, Json] | None = None
    if found.deletion is not None:
        assert found.insertion is not None, "either both or none"
        assert found.random_deletion is not None and found.random_insertion is not None
        curves = {
            "deletion": _curve(found.deletion, found.random_deletion),
            "insertion": _curve(found.insertion, found.random_insertion),
        }
    return {
        "basis": shown.basis,
        "column": shown.column,
        "class": name if target.classes else "",
        "answer": f"probability of {name}" if target.classes else f"predicted {target.name}",
        "score": _number(found.score),
        "low": _number(found.low),
        "high": _number(found.high),
        "chance": _number(found.chance),
        "movable": _number(found.movable),
        "unit": _number(found.unit),
        "warning": found.warning_of(subject),
        "curves": curves,
    }


def _curve(own: Curves, random: Curves) -> dict[str, Json]:
    lines = {
        "shares": own.shares,
        "answers": own.answers[0],
        "random": random.answers.mean(axis=0),
    }
    return {name: [_number(value) for value in line.tolist()] for name, line in lines.items()}


def _number(value: float) -> float | None:
    """Return a number as it is worth keeping: a count, or six digits; JSON knows no NaN."""
    if isinstance(value, int):
        return value
    return None if math.isnan(value) else float(f"{value:.6g}")
