"""What explanations say together: mean effects with intervals over patients, flips, agreement."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bagscope import __version__, artifacts
from bagscope.artifacts import Json
from bagscope.errors import ArtifactError
from bagscope.mil.evaluation.bootstrap import interval
from bagscope.mil.evaluation.inputs import FloatArray
from bagscope.mil.explain.cohort import CohortEffect, over_cohort
from bagscope.mil.explain.effects import Effect, Places
from bagscope.mil.explain.question import NO_DECISION, Array
from bagscope.pipeline.explain import ExplainTask, PlannedExplanations
from bagscope.pipeline.explain_annotations import RESAMPLES, estimate_text, or_none, over_slides
from bagscope.pipeline.explain_record import RECORD_NAME, SCHEMA, is_told
from bagscope.wording import counted

SUMMARY_NAME = "summary.json"
TABLE_NAME = "summary.csv"
EVERY = "all"
_COLUMNS = (
    "experiment", "intervention", "group", "column", "cases", "before", "after", "change",
    "change_low", "change_high", "p", "random_change", "flips", "flip_share",
    "sensitivity_before", "sensitivity_after", "specificity_before", "specificity_after",
)  # fmt: skip
_NOWHERE = Places(slide_ids=(), rows=np.zeros(0, np.int64), coords_l0=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What explanations say together.

    Attributes:
        path: of the JSON; the table lies beside it.
        cases: that it is of.
        sentences: for people.
    """

    path: Path
    cases: int
    sentences: tuple[str, ...]


def summarise(planned: PlannedExplanations) -> Summary | None:
    """Write what all explanations that are there, made with the same options, say together.

    Returns:
        None where there is not a single one.
    """
    records, others = _records(planned)
    if not records:
        return None
    rows = _effects(planned, records)
    slides = {
        slide_id: one for record in records for slide_id, one in record["annotations"].items()
    }
    patient_of = {
        slide_id: planned.patients[record["case_id"]]
        for record in records
        for slide_id in record["slides"]
    }
    annotations = over_slides(slides, patient_of, seed=_seed(planned)) if slides else None
    judged = _faithfulness(planned, records)
    missing = [one.case_id for one in planned.all_tasks.values()]
    missing = [one for one in missing if one not in {record["case_id"] for record in records}]
    said = _sentences(planned, records, rows, judged, annotations)
    if others:
        said.append(
            f"{others} more were explained with other options, or by other members, and are left "
            "out here."
        )
    path = planned.folder / SUMMARY_NAME
    artifacts.write_json(
        path,
        {
            "schema": f"{SCHEMA}.summary",
            "schema_version": 1,
            "bagscope_version": __version__,
            "run": planned.name,
            "target": planned.target,
            "cases": len(records),
            "patients": len({planned.patients[record["case_id"]] for record in records}),
            "not_explained": missing,
            "options": next(iter(planned.all_tasks.values())).options.fields(),
            "effects": [_row_json(row) for row in rows],
            "faithfulness": judged,
            "agreement": _agreement(records),
            "annotations": annotations,
            "sentences": said,
        },
    )
    _write_table(planned.folder / TABLE_NAME, rows)
    return Summary(path=path, cases=len(records), sentences=tuple(said))


# --- what is there --------------------------------------------------------------------------


def _records(planned: PlannedExplanations) -> tuple[list[dict[str, Any]], int]:
    """Return the explanations that belong together, and how many others there are."""
    found, others = [], 0
    for task in planned.all_tasks.values():
        try:
            fields = artifacts.read_complete(task.folder)["fields"]
            record = artifacts.read_json(task.folder / RECORD_NAME)
        except ArtifactError:
            continue
        if _belongs(task, fields):
            found.append(record)
        else:
            others += 1
    return found, others


def _belongs(task: ExplainTask, fields: Mapping[str, Any]) -> bool:
    members = {member.name: member.sha256 for member in task.members}
    donor = None if task.donor is None else task.donor.slide_id
    # The donor itself is explained without a transplant.
    same_donor = donor in task.slide_ids or (fields["donor"] or {}).get("slide") == donor
    return (
        fields["options"] == task.options.fields() and fields["members"] == members and same_donor
    )


def _seed(planned: PlannedExplanations) -> int:
    return next(iter(planned.all_tasks.values())).options.seed


# --- effects --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """An intervention over the cases of one group.

    Attributes:
        group: all cases, or those decided for a class.
        random: mean change by as many random tiles.
    """

    experiment: str
    intervention: str
    group: str
    found: CohortEffect
    random: float

    @property
    def is_of_group(self) -> bool:
        return self.group == self.found.column


def _effects(planned: PlannedExplanations, records: Sequence[Mapping[str, Any]]) -> list[_Row]:
    names: dict[tuple[str, str], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for record in records:
        for effect in record["effects"]:
            key = (effect["experiment"], effect["intervention"])
            names.setdefault(key, []).append((record, effect))
    decided = sorted({record["decision"] for record in records if record["decision"] is not None})
    rows = []
    for (experiment, intervention), every in names.items():
        for group in (EVERY, *decided):
            chosen = [pair for pair in every if group in (EVERY, pair[0]["decision"])]
            if chosen:
                rows += _rows(planned, experiment, intervention, group, chosen)
    return rows


def _rows(
    planned: PlannedExplanations,
    experiment: str,
    intervention: str,
    group: str,
    chosen: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> list[_Row]:
    columns = list(chosen[0][0]["prediction"])
    effects = [_effect(record, effect, columns) for record, effect in chosen]
    cases = [record["case_id"] for record, _ in chosen]
    labels = [planned.truth[case] for case in cases]
    known = planned.task in ("classes", "ordinal") and all(labels)
    patients = [planned.patients[case] for case in cases]
    return [
        _Row(
            experiment=experiment,
            intervention=intervention,
            group=group,
            found=over_cohort(
                effects,
                column=place,
                patients=patients,
                truth=[label == name for label in labels] if known else None,
                resamples=RESAMPLES,
                seed=_seed(planned),
            ),
            random=_random_change([effect for _, effect in chosen], place),
        )
        for place, name in enumerate(columns)
    ]


def _random_change(effects: Sequence[Mapping[str, Any]], place: int) -> float:
    """Return the mean change by as many random tiles."""
    changes = [effect["random_after"][place] - effect["before"][place] for effect in effects]
    return float(np.mean(changes))


def _effect(record: Mapping[str, Any], effect: Mapping[str, Any], columns: Sequence[str]) -> Effect:
    def place(name: str | None) -> int:
        return NO_DECISION if name is None else columns.index(name)

    return Effect(
        slide_id=record["case_id"],
        model_id="",
        intervention=effect["intervention"],
        columns=tuple(columns),
        tiles_before=effect["tiles_before"],
        tiles_after=effect["tiles_after"],
        removed=_NOWHERE,
        added=_NOWHERE,
        before=np.array(effect["before"], np.float64),
        after=np.array(effect["after"], np.float64),
        decision_before=place(effect["decision_before"]),
        decision_after=place(effect["decision_after"]),
    )


def _row_json(row: _Row) -> dict[str, Json]:
    found = row.found
    return {
        "experiment": row.experiment,
        "intervention": row.intervention,
        "group": row.group,
        "column": found.column,
        "cases": found.slides,
        "change": found.change.to_json(),
        "random_change": or_none(row.random),
        "flips": found.flips,
        "flip_share": found.flips / found.slides,
        "sensitivity": [one.to_json() for one in found.sensitivity],
        "specificity": [one.to_json() for one in found.specificity],
    }


def _write_table(path: Path, rows: Sequence[_Row]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        found, change = row.found, row.found.change
        numbers: list[float] = [change.second, change.first, change.difference]
        numbers += [change.low, change.high, change.p_value, row.random]
        shares = [one.value for one in (*found.sensitivity, *found.specificity)]
        writer.writerow(
            [row.experiment, row.intervention, row.group, found.column, found.slides]
            + [_text(value) for value in numbers]
            + [found.flips, _text(found.flips / found.slides)]
            + [_text(value) for value in shares]
        )
    artifacts.write_text(path, text.getvalue())


# --- heatmaps -------------------------------------------------------------------------------


def _faithfulness(
    planned: PlannedExplanations, records: Sequence[Mapping[str, Any]]
) -> dict[str, Json] | None:
    judged = [record for record in records if record["faithfulness"] is not None]
    scored = [record for record in judged if record["faithfulness"]["score"] is not None]
    if not scored:
        return None
    values = np.array([record["faithfulness"]["score"] for record in scored])
    patients = [planned.patients[record["case_id"]] for record in scored]
    mean = interval(_mean(values), patients, resamples=RESAMPLES, seed=_seed(planned))
    warned = [record["case_id"] for record in judged if record["faithfulness"]["warning"]]
    return {"cases": len(judged), "score": mean.to_json(), "warned": warned}


def _mean(values: Array) -> Any:
    def statistic(counts: FloatArray) -> FloatArray:
        mean: FloatArray = counts @ values / counts.sum(axis=1)
        return mean

    return statistic


def _agreement(records: Sequence[Mapping[str, Any]]) -> dict[str, Json] | None:
    found = [record["agreement"] for record in records if record["agreement"] is not None]
    if not found:
        return None
    ranks = [one["rank_correlation"] for one in found if one["rank_correlation"] is not None]
    return {
        "cases": len(found),
        "rank_correlation": float(np.mean(ranks)) if ranks else None,
        "top_overlap": float(np.mean([one["top_overlap"] for one in found])),
        "chance_overlap": float(np.mean([one["chance_overlap"] for one in found])),
        "saw_the_case_in_training": bool(found[0]["saw_the_case_in_training"]),
    }


# --- in words -------------------------------------------------------------------------------


def _sentences(
    planned: PlannedExplanations,
    records: Sequence[Mapping[str, Any]],
    rows: Sequence[_Row],
    judged: Mapping[str, Any] | None,
    annotations: Mapping[str, Any] | None,
) -> list[str]:
    said = [_row_sentence(row) for row in _told(planned, rows)]
    if judged is not None:
        warned, cases = len(judged["warned"]), judged["cases"]
        said.append(
            f"Faithfulness of the heatmaps is {estimate_text(judged['score'])} on average; "
            f"{warned} of {cases} carry a warning that attention does not drive the prediction."
        )
    agreed = _agreement(records)
    if agreed is not None and agreed["rank_correlation"] is not None:
        seen = ""
        if agreed["saw_the_case_in_training"]:
            seen = " (all but those that answer saw a case in training)"
        said.append(
            f"The folds' members{seen} agree on the order of tiles to a rank correlation of "
            f"{agreed['rank_correlation']:.2f}."
        )
    if annotations is not None:
        said += _annotation_sentences(annotations, records[0]["scores"]["scale"])
    return said


def _told(planned: PlannedExplanations, rows: Sequence[_Row]) -> list[_Row]:
    """Return the rows that are worth a sentence: each group's own class, at the usual share."""
    options = next(iter(planned.all_tasks.values())).options
    share = f"hottest {100 * options.dose_share:.4g} %"
    chosen = []
    for row in rows:
        usual = any(word in row.intervention for word in (share, "annotated", "region"))
        is_own = row.is_of_group or (not planned.classes and row.group == EVERY)
        if planned.task == "multilabel":
            is_own = row.group == EVERY
        if usual and is_own and is_told(row.experiment, row.intervention):
            chosen.append(row)
    return chosen


def _row_sentence(row: _Row) -> str:
    change, found = row.found.change, row.found
    what = row.intervention[:1].upper() + row.intervention[1:]
    cases = "case" if found.slides == 1 else "cases"
    group = f"{found.slides} {cases}"
    if row.group != EVERY:
        group += f" decided for {row.group}"
    reach = (
        "too few patients for an interval"
        if math.isnan(change.low)
        else f"{_signed(change.low)} to {_signed(change.high)}"
    )
    decisions = "1 decision changes" if found.flips == 1 else f"{found.flips} decisions change"
    flips = f"; {decisions}" if row.group != EVERY else ""
    return (
        f"{what}: {found.column} {_signed(change.difference)} ({reach}) over {group}, "
        f"{_signed(row.random)} with as many random tiles{flips}."
    )


def _annotation_sentences(found: Mapping[str, Any], scale: str) -> list[str]:
    estimates, threshold = found["estimates"], f"{scale} ≥ {found['threshold']:g}"
    said = [
        f"Against annotations of {counted(found['slides'], 'slide')}: tile AUROC "
        f"{estimate_text(estimates['auroc'])}, AUPRC {estimate_text(estimates['auprc'])}, Dice "
        f"{estimate_text(estimates['dice'])}, means over slides that have both kinds of tiles."
    ]
    if found["lesions"]:
        said.append(
            f"Of {counted(found['lesions'], 'lesion')} on "
            f"{counted(found['slides_with_lesions'], 'slide')}, a share of "
            f"{estimate_text(estimates['lesion_sensitivity'])} is found at {threshold}, with "
            f"{found['false_positives_per_slide']:.1f} false positives a slide; FROC score "
            f"{estimate_text(estimates['froc'])}."
        )
    return said


def _signed(value: float) -> str:
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{round(value, 2) + 0.0:+.2f}"


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
