"""A run or a prediction, opened to be reviewed: its slides, what the model says, its colours.

Nothing is written here, and no slide is opened; the static review and the live viewer start alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.errors import SchemaError
from bagscope.heatmaps.review.answers import CaseFacts, TargetFacts, case_facts, targets_of_columns
from bagscope.pipeline.bundle import SCORES_NAME
from bagscope.pipeline.heatmap import score_files, study_of, task_of
from bagscope.pipeline.study import Study

if TYPE_CHECKING:
    from bagscope.heatmaps.colours import ColourScale
    from bagscope.heatmaps.layers import LayerKind
    from bagscope.mil.score_file import ScoreFile


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewedSlide:
    """A slide of the run.

    Attributes:
        slide_id: as in the cohort.
        patient_id: whose it is.
        case_id: that the model was asked about.
        scores: its score file; it may not be readable, or not be there.
        path: of the slide, None where no cohort names it.
        mpp: that the cohort's table states.
        tiles: how many have scores.
        ood: whether its case is unlike the training bags, None where nobody knows.
        faithfulness: score and warning of its first layer, None where it was not judged.
        first_layer: id of the layer to show first; empty without readable scores.
        bag: slides whose tiles were in one bag with its own, as far as that is known.
    """

    slide_id: str
    patient_id: str
    case_id: str
    scores: Path
    path: Path | None = None
    mpp: float | None = None
    tiles: int = 0
    ood: bool | None = None
    faithfulness: Json = None
    first_layer: str = ""
    bag: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewedRun:
    """A run or a prediction.

    Attributes:
        name: what is made of it is called by.
        study: that it lies in.
        task: of its only target, None where that can't be known.
        slides: in the cohort's order.
        unpredicted: slides of the cohort that the model says nothing of.
        damaged: what is wrong with score files that can't be read, by slide.
        targets: of the model.
        cases: what the model says, by case.
        colours: of each layer, the same on all slides; the usual layer first.
        headline: sentences of the evaluation.
        notes: sentences that hold for the whole run.
    """

    name: str
    study: Study | None
    task: str | None
    slides: tuple[ReviewedSlide, ...]
    unpredicted: tuple[str, ...]
    damaged: Mapping[str, str]
    targets: tuple[TargetFacts, ...]
    cases: Mapping[str, CaseFacts]
    colours: Mapping[LayerKind, ColourScale]
    headline: tuple[str, ...]
    notes: tuple[str, ...]


def open_run(place: Path, workers: int | None = None) -> ReviewedRun:
    """Open a run or a folder of predictions.

    Raises:
        ConfigError: no such folder, or no scores there.
        SchemaError: a table of predictions that can't be read.
    """
    from bagscope.heatmaps.layers import layer_colours

    study, name = study_of(place, workers)
    files, damaged = score_files(place)
    task = task_of(place, study)
    targets, cases = _answers(place, study)
    colours = layer_colours(files, task)
    slides, unpredicted = _slides(place, study, files, cases, tuple(colours))
    headline, notes = _sentences(place)
    return ReviewedRun(
        name=name,
        study=study,
        task=task,
        slides=slides,
        unpredicted=tuple(slide_id for slide_id in unpredicted if slide_id not in damaged),
        damaged=damaged,
        targets=targets,
        cases=cases,
        colours=colours,
        headline=headline,
        notes=notes,
    )


# --- what the model says --------------------------------------------------------------------


def _answers(
    place: Path, study: Study | None
) -> tuple[tuple[TargetFacts, ...], Mapping[str, CaseFacts]]:
    from bagscope.mil.evaluation.answers import read_predictions

    table_path = place / "predictions.csv"
    if not table_path.is_file():
        return (), {}
    table = read_predictions(table_path)
    targets = _targets(place, study) or targets_of_columns(tuple(table.columns))
    try:
        # Of a prediction, nobody was tested in a fold.
        cases = case_facts(table, targets, folds=not (place / "predictions.json").is_file())
    except (KeyError, ValueError) as error:
        raise SchemaError(
            f"{table_path}: does not fit its model ({error}); it was edited, or is of another one; "
            "train or predict anew"
        ) from error
    return targets, cases


def _targets(place: Path, study: Study | None) -> tuple[TargetFacts, ...]:
    """Return the targets as the model's bundle describes them; none where there is no bundle."""
    from bagscope.mil.bundle import BUNDLE_NAME, DESCRIPTION_NAME

    runs = [place]
    if study is not None:
        runs.append(study.folder / "runs" / place.resolve().parent.name)
    for run in runs:
        path = run / BUNDLE_NAME / DESCRIPTION_NAME
        if path.is_file():
            models: list[dict[str, Any]] = list(artifacts.read_json(path)["models"].values())
            return tuple(
                TargetFacts(
                    name=name,
                    task=str(one["task"]),
                    classes=tuple(one["classes"]),
                    threshold=_mean([model["thresholds"].get(name) for model in models]),
                )
                for name, one in models[0]["targets"].items()
            )
    return ()


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _sentences(place: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the headline of an evaluated run, and what its report warns of."""
    path = place / "metrics.json"
    if not path.is_file():
        return (), ()
    lines = [
        line for own in artifacts.read_json(path).get("first_lines", {}).values() for line in own
    ]
    return (
        tuple(line["text"] for line in lines if line["tone"] == "finding"),
        tuple(line["text"] for line in lines if line["tone"] == "warning"),
    )


# --- slides ---------------------------------------------------------------------------------


def _slides(
    place: Path,
    study: Study | None,
    files: Mapping[str, ScoreFile],
    cases: Mapping[str, CaseFacts],
    kinds: Sequence[LayerKind],
) -> tuple[tuple[ReviewedSlide, ...], tuple[str, ...]]:
    """Return every slide that the model was asked about, and those of the cohort that it wasn't."""
    folder = place / SCORES_NAME
    rows = {row.slide_id: row for row in study.cohort().rows} if study else {}
    scored = {path.stem for path in folder.glob("[!.]*.h5")}
    from bagscope.heatmaps.bag_scores import slides_of_bag

    found, unpredicted = [], []
    for slide_id in (*rows, *sorted(scored - rows.keys())):
        row, file = rows.get(slide_id), files.get(slide_id)
        named = [slide_id, *([row.patient_id] if row else [])]
        asked = file.case_id if file else next((one for one in named if one in cases), None)
        if asked is None and slide_id not in scored:
            unpredicted.append(slide_id)
            continue
        case_id = asked or slide_id
        case = cases.get(case_id)
        first = None if file is None else _first_kind(file, kinds, case)
        patient = case.patient_id if case else slide_id
        found.append(
            ReviewedSlide(
                slide_id=slide_id,
                patient_id=row.patient_id if row else patient,
                case_id=case_id,
                scores=folder / f"{slide_id}.h5",
                path=row.path if row else None,
                mpp=row.mpp if row else None,
                tiles=len(file.scores) if file else 0,
                ood=_ood(file, case),
                faithfulness=None if file is None or first is None else _judged(file, first),
                first_layer="" if first is None else first.id,
                bag=(slide_id,) if file is None else slides_of_bag(file),
            )
        )
    return tuple(found), tuple(unpredicted)


def _ood(file: ScoreFile | None, case: CaseFacts | None) -> bool | None:
    if case is not None and case.ood is not None:
        return case.ood
    if file is None or not len(file.ood_distance):
        return None
    mean = float(file.ood_distance.mean())
    return None if math.isnan(mean) else mean > 1


def _first_kind(file: ScoreFile, kinds: Sequence[LayerKind], case: CaseFacts | None) -> LayerKind:
    """Return the layer that is shown first: of the usual scale, and of the class in question."""
    from bagscope.heatmaps.scores import pick_column

    predicted = None
    if case is not None and len(case.predicted) == 1:
        predicted = next(iter(case.predicted.values())).text
    column = pick_column(file.score_names, None, predicted)
    usual = [kind for kind in kinds if (kind.scale, kind.shows) == (kinds[0].scale, "score")]
    return next((kind for kind in usual if kind.column == column), kinds[0])


def _judged(file: ScoreFile, kind: LayerKind) -> Json:
    from bagscope.heatmaps.judgement import judgement_of

    found = judgement_of(file, kind.scale, kind.column.name)
    return None if found.score is None else {"score": found.score, "warning": found.warning}
