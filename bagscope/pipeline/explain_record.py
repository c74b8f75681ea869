"""What was found out about a case, as JSON for programs and as sentences for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bagscope import __version__
from bagscope.artifacts import Json
from bagscope.mil.explain.effects import ROUNDING, Controlled
from bagscope.mil.explain.faithfulness import Curves, Faithfulness
from bagscope.mil.explain.question import Array
from bagscope.mil.explain.search import Search
from bagscope.pipeline.explain_annotations import or_none
from bagscope.pipeline.explain_case import Explained
from bagscope.pipeline.explain_figure import Shown
from bagscope.pipeline.explain_options import DOSES
from bagscope.pipeline.explain_parts import HIGH
from bagscope.wording import counted

RECORD_NAME = "explanation.json"
SCHEMA, SCHEMA_VERSION = "bagscope.explanation", 1
_CERTAIN = 0.05


def record_of(explained: Explained) -> dict[str, Json]:
    """Return an explanation as JSON; NaN is None."""
    task, asked, parts = explained.task, explained.asked, explained.parts
    columns = asked.subject.pool.question.columns
    answers = [float(value) for value in explained.answers]
    record: dict[str, Json] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "bagscope_version": __version__,
        "case_id": task.case_id,
        "slides": list(task.slide_ids),
        "tiles": len(asked.scores),
        "model": {
            "run": task.run,
            "members": [member.name for member in task.members],
            "out_of_fold": task.is_out_of_fold,
            "closed_form": asked.is_closed,
        },
        "target": task.target,
        "task": task.task,
        "prediction": dict(zip(columns, answers, strict=True)),
        "decision": columns[explained.decided] if explained.decided >= 0 else None,
        "explained": columns[asked.column],
        "scores": {"scale": explained.scale, "kind": _kind(explained)},
        "effects": [_effect(experiment, one) for experiment, one in parts.effects],
        "search": {name: _search(one) for name, one in parts.searches.items()},
        "gradients": _gradients(explained),
        "faithfulness": None if parts.faithfulness is None else _judgement(parts.faithfulness),
        "agreement": _agreement(explained),
        "annotations": {name: one.to_json() for name, one in explained.annotations.items()},
        "transplant": None
        if asked.donated is None
        else {"donor": asked.donor, "tiles": len(asked.donated), "region": asked.donor_region},
        "left_out": list(parts.left_out),
        "sentences": sentences(explained),
    }
    return record


def control_columns(measured: Sequence[tuple[str, Controlled]]) -> dict[str, list[float]]:
    """Return a table's columns of the random edits beside each experiment's effect."""
    names = measured[0][1].effect.columns
    chances = [chance_of(experiment, one) for experiment, one in measured]
    table: dict[str, list[float]] = {}
    for place, name in enumerate(names):
        random = [float(one.controls[:, place].mean()) for _, one in measured]
        table[f"random_after_{name}"] = random
        table[f"excess_{name}"] = [float(one.excess[place]) for _, one in measured]
        table[f"p_{name}"] = [float(chance[place]) for chance in chances]
    return table


def chance_of(experiment: str, one: Controlled) -> Array:
    """Return (A,) how often random tiles do as well: (1 + those) / (1 + draws).

    Tiles suffice where the answer stays, so that as well is at least as high an answer; in all
    other experiments it is at least as large a change, either way.
    """
    if experiment != "sufficiency":
        return one.p_value
    reached = one.controls >= one.effect.after - ROUNDING
    return np.asarray((1 + reached.sum(axis=0)) / (1 + len(reached)))


def shown_of(explained: Explained) -> Shown:
    """Return what the picture shows."""
    asked, parts, task = explained.asked, explained.parts, explained.task
    columns = asked.subject.pool.question.columns
    answer = columns[asked.column]
    is_probability = task.task in ("classes", "ordinal", "multilabel")
    value = float(explained.answers[asked.column])
    title = f"{task.case_id}: {task.target} {answer}, probability {value:.2f}"
    if not is_probability:
        title = f"{task.case_id}: {answer} {value:.3g}"
    hottest = [one for experiment, one in parts.effects if experiment == "dose–response"][
        : len(DOSES)
    ]
    verdict = ""
    if parts.faithfulness is not None:
        verdict = _faithful_sentence(parts.faithfulness)
    return Shown(
        title=title,
        answer=f"probability of {answer}" if is_probability else answer,
        before=value,
        column=asked.column,
        is_probability=is_probability,
        faithfulness=parts.faithfulness,
        doses=list(zip(DOSES, hottest, strict=True)) if hottest else [],
        dose_share=task.options.dose_share,
        high=parts.searches.get(HIGH),
        verdict=verdict,
    )


# --- in words -------------------------------------------------------------------------------


def sentences(explained: Explained) -> list[str]:
    """Return what a reader should know, one sentence after another."""
    asked, parts, task = explained.asked, explained.parts, explained.task
    columns = asked.subject.pool.question.columns
    answer, before = columns[asked.column], float(explained.answers[asked.column])
    decision = f", decided for {columns[explained.decided]}" if explained.decided >= 0 else ""
    whose = "members that never saw this case" if task.is_out_of_fold else "the model's members"
    found = [
        f"{answer} is {before:.3g}{decision}, by {whose} ({len(task.members)}), from "
        f"{counted(len(asked.scores), 'tile')}."
    ]
    found += [
        _effect_sentence(experiment, one, asked.column, columns)
        for experiment, one in _told(explained)
    ]
    found += [
        _search_sentence(name, one, answer, len(asked.scores))
        for name, one in parts.searches.items()
    ]
    if parts.faithfulness is not None:
        found.append(_faithful_sentence(parts.faithfulness))
    if explained.agreement is not None:
        found.append(_agreement_sentence(explained))
    found += [_annotation_sentence(name, explained) for name in explained.annotations]
    if asked.donated is not None and task.is_out_of_fold:
        found.append(
            f"Tiles of {asked.donor} were put in; members that never saw this case may have been "
            "trained on that one."
        )
    return found


def _told(explained: Explained) -> list[tuple[str, Controlled]]:
    """Return the effects that are worth a sentence: of each experiment the share of the doses."""
    share = f"hottest {100 * explained.task.options.dose_share:.4g} %"
    return [
        (experiment, one)
        for experiment, one in explained.parts.effects
        if is_told(experiment, one.effect.intervention)
        and any(word in one.effect.intervention for word in (share, "annotated", "region"))
    ]


def is_told(experiment: str, intervention: str) -> bool:
    """Return whether an intervention may have a sentence: of the doses only the largest."""
    return experiment != "dose–response" or intervention.endswith(f"× {DOSES[-1]}")


def _effect_sentence(experiment: str, one: Controlled, column: int, columns: Sequence[str]) -> str:
    effect, answer = one.effect, columns[column]
    after, chance = float(effect.after[column]), float(chance_of(experiment, one)[column])
    if experiment == "sufficiency":
        tiles = effect.tiles_after
    else:
        tiles = len(effect.removed) or len(effect.added)
    what = effect.intervention[:1].upper() + effect.intervention[1:]
    flips = f"; the decision becomes {columns[effect.decision_after]}" if effect.flips else ""
    beside = "" if chance <= _CERTAIN else ", not told apart from chance"
    return (
        f"{what} ({tiles:,} of {effect.tiles_before:,} tiles): {answer} "
        f"{effect.before[column]:.3g} → {after:.3g}; as many random tiles: "
        f"{one.controls[:, column].mean():.3g} (p = {chance:.2g}{beside}){flips}."
    )


def _search_sentence(name: str, search: Search, answer: str, tiles: int) -> str:
    first, last = search.answers[0, search.column], search.answers[-1, search.column]
    if name == HIGH:
        what = "Taking out the tiles of highest effect, one after another"
    else:
        what = "Taking out those that matter least"
    rounds = len(search.order)
    return (
        f"{what}, moves {answer} from {first:.3g} to {last:.3g} with {counted(rounds, 'tile')} "
        f"({rounds / tiles:.1%})."
    )


def _faithful_sentence(judged: Faithfulness) -> str:
    if math.isnan(judged.score):
        return judged.warning
    told = (
        f"Faithfulness {judged.score:z.2f} ({judged.low:z.2f} to {judged.high:z.2f}; 0 is chance, "
        "1 the most there can be)."
    )
    return f"{told} {judged.warning}".strip()


def _agreement_sentence(explained: Explained) -> str:
    found, task = explained.agreement, explained.task
    assert found is not None
    seen = (
        f"; all but {len(task.members)} of them saw this case in training"
        if task.is_out_of_fold
        else ""
    )
    return (
        f"The {len(task.panel)} members of the folds agree on the order of tiles to a rank "
        f"correlation of {found.rank_correlation:.2f}, and share {found.top_overlap:.0%} of the "
        f"hottest {found.top_tiles:,} tiles ({found.chance_overlap:.0%} by chance){seen}."
    )


def _annotation_sentence(slide_id: str, explained: Explained) -> str:
    one = explained.annotations[slide_id]
    metrics = one.metrics
    if not metrics.positive:
        regions = counted(one.found.lesions, "region")
        return f"{slide_id}: no tile lies inside the annotation ({regions})."
    return (
        f"{slide_id}: {metrics.positive:,} of {metrics.tiles:,} tiles lie inside the annotation; "
        f"tile AUROC {metrics.auroc:.2f}, AUPRC {metrics.auprc:.2f} "
        f"({metrics.positive / metrics.tiles:.2f} by chance), Dice {metrics.dice:.2f} at "
        f"{explained.scale} ≥ {metrics.threshold:g}."
    )


# --- numbers --------------------------------------------------------------------------------


def _kind(explained: Explained) -> str:
    return next(iter(explained.tiles.values())).file.score_kind


def _effect(experiment: str, one: Controlled) -> dict[str, Json]:
    effect = one.effect
    columns = effect.columns
    return {
        "experiment": experiment,
        "intervention": effect.intervention,
        "tiles_before": effect.tiles_before,
        "tiles_after": effect.tiles_after,
        "tiles_removed": len(effect.removed),
        "tiles_added": len(effect.added),
        "before": [float(value) for value in effect.before],
        "after": [float(value) for value in effect.after],
        "decision_before": columns[effect.decision_before] if effect.decision_before >= 0 else None,
        "decision_after": columns[effect.decision_after] if effect.decision_after >= 0 else None,
        "random_after": one.controls.mean(axis=0).tolist(),
        "p": chance_of(experiment, one).tolist(),
    }


def _search(search: Search) -> dict[str, Json]:
    return {
        "optimiser": search.optimiser,
        "rounds": len(search.order),
        "answers": search.answers[:, search.column].tolist(),
    }


def _gradients(explained: Explained) -> Mapping[str, Json] | None:
    found = explained.gradients
    if found is None:
        return None
    total = float(found.integrated.sum())
    return {"of": found.unit, "sum_of_integrated": total, "reached": found.reached}


def _judgement(judged: Faithfulness) -> dict[str, Json]:
    return {
        "score": or_none(judged.score),
        "low": or_none(judged.low),
        "high": or_none(judged.high),
        "chance": or_none(judged.chance),
        "movable": or_none(judged.movable),
        "unit": judged.unit,
        "warning": judged.warning,
        "deletion": _curve(judged.deletion),
        "insertion": _curve(judged.insertion),
        "random_deletion": _curve(judged.random_deletion),
        "random_insertion": _curve(judged.random_insertion),
    }


def _curve(curves: Curves | None) -> dict[str, Any] | None:
    if curves is None:
        return None
    return {"shares": curves.shares.tolist(), "answers": curves.answers.mean(axis=0).tolist()}


def _agreement(explained: Explained) -> dict[str, Json] | None:
    found = explained.agreement
    if found is None:
        return None
    return {
        "members": len(explained.task.panel),
        "saw_the_case_in_training": explained.task.is_out_of_fold,
        "rank_correlation": or_none(found.rank_correlation),
        "lowest_correlation": or_none(found.lowest_correlation),
        "top_overlap": found.top_overlap,
        "chance_overlap": found.chance_overlap,
        "top_tiles": found.top_tiles,
    }
