"""Evaluation: a finished run → `metrics.json` for programs, `report.html` and figures for people.

Nothing is trained here but the baselines, on the same sides of the same splits, and those once:
`baselines.csv` keeps their answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.errors import ArtifactError, BagscopeError, ConfigError, SchemaError
from bagscope.mil.baseline_table import BaselineAnswers, read_baselines, write_baselines
from bagscope.mil.baselines import BASELINES, baseline_answers, label_of, vectors_of
from bagscope.mil.cases import Case, CaseTable, cases_of
from bagscope.mil.evaluation.answers import Answers
from bagscope.mil.evaluation.bootstrap import RESAMPLES, intervals
from bagscope.mil.evaluation.metric_list import Scope, metrics_of
from bagscope.mil.evaluation.paired import paired_bootstrap
from bagscope.mil.evaluation.scoring import Scores, score, statistic_of, subgroups
from bagscope.mil.report.claims import Claim, claims_of
from bagscope.mil.report.figures import ForestRow, figures_of, forest
from bagscope.mil.report.page import report_page
from bagscope.mil.report.results import FoldFacts, Rival, RunResult, TargetResult
from bagscope.mil.report.survival_figures import risk_groups, survival_figures
from bagscope.mil.sources import StoreSource
from bagscope.mil.splits.plan import SplitPlan
from bagscope.mil.versions import versions
from bagscope.pipeline.finished_run import FinishedRun, changed_labels, read_run
from bagscope.pipeline.study import COHORT_NAME, Study, open_study
from bagscope.pipeline.train_data import find_features
from bagscope.wording import listed
from bagscope.wsi.contact_sheet import without_folders

if TYPE_CHECKING:
    from bagscope.features.store import FeatureStore
    from bagscope.mil.report.drawing import Picture

METRICS_NAME = "metrics.json"
REPORT_NAME = "report.html"
FIGURES_NAME = "figures"
NUMERICS = 1
"""Raised by hand, with a changelog line, when the same predictions give other numbers."""
_NOT_IN_RUN = "is not in the run: it had no features, no tile or no side when that was made"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRequest:
    """What is to be evaluated, as asked for.

    Attributes:
        run: folder of a training run.
        by: columns of the cohort table, for tables of subgroups.
        features: folder or URL of the features that the run was trained on, where the study does
            not hold them; the baselines look at them.
        resamples: of each bootstrap.
        seed: of the draws.
    """

    run: Path
    by: tuple[str, ...] = ()
    features: str | None = None
    resamples: int = RESAMPLES
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateResult:
    """What was found, and where it was written.

    Attributes:
        claims: the first lines, by target.
    """

    folder: Path
    result: RunResult
    claims: Mapping[str, tuple[Claim, ...]]

    @property
    def report(self) -> Path:
        """Return where the page lies."""
        return self.folder / REPORT_NAME

    @property
    def metrics(self) -> Path:
        """Return where the numbers lie."""
        return self.folder / METRICS_NAME


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cohort:
    """What the study says of the run's cases; nothing where the run lies in no study."""

    table: CaseTable | None = None
    location: str | None = None
    patients_known: bool = True
    notes: tuple[str, ...] = ()

    @property
    def cases(self) -> tuple[Case, ...]:
        return () if self.table is None else self.table.cases


def evaluate_run(request: EvaluateRequest) -> EvaluateResult:
    """Evaluate a run and write numbers, figures and page into its folder.

    Raises:
        ConfigError: no run there, an unknown column, or features of another encoder.
        ArtifactError: a run that is not finished, or was edited.
    """
    run = read_run(request.run)
    cohort = _cohort_of(run, request.features)
    baselines = _baselines(run, cohort)
    targets: dict[str, TargetResult] = {}
    for target in run.targets:
        answers = run.answers(target)
        if not len(answers):
            raise ArtifactError(f"{run.folder}: no test case has a label of {target.name}")
        labels = {case.case_id: case.targets[target.name] for case in cohort.cases}
        if labels and (changed := changed_labels(answers, labels)):
            raise ArtifactError(
                f"{run.folder}: labels of {target.name} are no longer those that the run was "
                f"trained and tested with ({listed(changed, 4)}, {len(changed)} in all); train "
                "it anew, or bring the labels back"
            )
        scores = score(answers, run.by_seed(target), resamples=request.resamples, seed=request.seed)
        targets[target.name] = TargetResult(
            answers=answers,
            scores=scores,
            rivals=_rivals(answers, scores, baselines, request),
            skipped={
                label_of(name, target): reason
                for name, reason in baselines.skipped[target.name].items()
            },
            subgroups={
                column: subgroups(
                    answers,
                    column,
                    _cells(cohort, column),
                    resamples=request.resamples,
                    seed=request.seed,
                )
                for column in request.by
            },
            log_rank=risk_groups(answers).test() if target.task == "survival" else None,
        )
    result = RunResult(
        run=run.name,
        per=run.per,
        targets=targets,
        method=run.plan.spec.method,
        seeds=run.seeds,
        folds=fold_facts(run.plan),
        members=run.members,
        left_out={} if cohort.table is None else dict(cohort.table.left_out),
        notes=cohort.notes,
        patients_known=cohort.patients_known,
        versions=versions(),
        config=run.config,
        fields={
            "numerics": NUMERICS,
            "config": dict(run.config),
            "predictions": artifacts.sha256_of_file(run.folder / "predictions.csv"),
            "by": list(request.by),
            "resamples": request.resamples,
            "seed": request.seed,
        },
    )
    return write_evaluation(run.folder, result)


def write_evaluation(folder: Path, result: RunResult) -> EvaluateResult:
    """Write numbers, figures and page; the page last."""
    # Notes and reasons were written for whoever runs this, and may name folders.
    result = dataclasses.replace(
        result,
        notes=tuple(without_folders(note) for note in result.notes),
        left_out={name: without_folders(reason) for name, reason in result.left_out.items()},
    )
    claims = {name: claims_of(result, one) for name, one in result.targets.items()}
    pictures = {name: _pictures(one) for name, one in result.targets.items()}
    _write_figures(folder / FIGURES_NAME, pictures)
    artifacts.write_json(
        folder / METRICS_NAME,
        {
            **result.to_json(),
            "first_lines": {
                name: [{"tone": one.tone, "text": one.text} for one in own]
                for name, own in claims.items()
            },
            "fingerprint": artifacts.fingerprint(result.fields),
        },
    )
    artifacts.write_text(folder / REPORT_NAME, report_page(result, claims, pictures))
    return EvaluateResult(folder=folder, result=result, claims=claims)


def fold_facts(plan: SplitPlan) -> tuple[FoldFacts, ...]:
    """Return how many patients each fold puts on each side."""
    return tuple(
        FoldFacts(
            name=split.name,
            site=split.site,
            **{
                side: len({plan.patient_of[case] for case in cases})
                for side, cases in split.sides()
            },
        )
        for split in plan.splits
    )


def _cohort_of(run: FinishedRun, features: str | None) -> _Cohort:
    """Read the study's cohort and find the features that the run was trained on."""
    folder = run.folder.parent.parent
    if not (folder / COHORT_NAME).exists() and not (folder / "study.yaml").exists():
        return _Cohort(notes=("the run lies in no study: neither subgroups nor rivals",))
    study = open_study(folder)
    location = _location(study, run, features)
    cohort = study.cohort()
    available = None if location is None else _open(location).slide_ids
    table = cases_of(cohort, run.targets, per=run.per, available=available, skip_missing=True)
    gone = sorted(set(run.plan.case_ids) - {case.case_id for case in table.cases})
    if gone:
        raise ArtifactError(
            f"{run.folder}: {listed(gone, 4)} ({len(gone)} in all) of its cases are no longer in "
            f"{study.cohort_path} with features and a label; bring them back, or train it anew"
        )
    tested = frozenset(run.plan.case_ids)
    beside = [case.case_id for case in table.cases if case.case_id not in tested]
    return _Cohort(
        table=CaseTable(
            cases=table.chosen(run.plan.case_ids),
            targets=table.targets,
            per=table.per,
            left_out={**table.left_out, **dict.fromkeys(beside, _NOT_IN_RUN)},
        ),
        location=location,
        patients_known=cohort.patient_id_given,
        notes=cohort.notes,
    )


def _location(study: Study, run: FinishedRun, features: str | None) -> str | None:
    """Return where the run's features lie; None where the study does not hold them."""
    stated = run.config["features"]
    if features is not None:
        location: str | None = find_features(study, features, None)
        reason = _other_features(str(location), stated, run)
        if reason:
            raise ConfigError(f"--features {features}: {reason}; name those that it was trained on")
        return location
    for encoder in (None, str(stated["encoder"].get("name", ""))):
        try:
            location = find_features(study, None, encoder)
            return location if not _other_features(location, stated, run) else None
        except (ArtifactError, ConfigError):
            continue
    return _aligned(study, stated, run) if "coarse" in stated["encoder"] else None


def _aligned(study: Study, stated: Mapping[str, Any], run: FinishedRun) -> str | None:
    """Return the one pair of aligned features that the run can be of; None where several can."""
    found = []
    for location in study.feature_pairs():
        with contextlib.suppress(BagscopeError):  # not aligned
            if not _other_features(location, stated, run):
                found.append(location)
    return found[0] if len(found) == 1 else None


def _other_features(location: str, stated: Mapping[str, Any], run: FinishedRun) -> str:
    """Return how features differ from those that a run was trained on; empty if they do not."""
    store = _open(location)
    if not store.slide_ids:
        return "holds no features"
    record = store.record(store.slide_ids[0])
    here = {
        "encoder": dict(record.encoder),
        "weights_sha256": record.weights_sha256,
        "dimension": record.shape[1],
    }
    differences = artifacts.differing_fields(dict(stated), here)
    if differences:
        field, old, new = differences[0]
        return f"{field} is {new}, and the run {run.name} was trained on {old}"
    return ""


def _open(location: str) -> FeatureStore:
    from bagscope.features.store import FeatureStore

    return FeatureStore.open(location)


def _baselines(run: FinishedRun, cohort: _Cohort) -> BaselineAnswers:
    """Return the baselines' answers, fitted now or read from an earlier evaluation."""
    if cohort.table is None:
        reason = "the study's cohort table is not at hand"
        missing = {target.name: dict.fromkeys(BASELINES, reason) for target in run.targets}
        return BaselineAnswers(answers={target.name: {} for target in run.targets}, skipped=missing)
    fields = _baseline_fields(run, cohort)
    found = read_baselines(run.folder, run.targets, cohort.cases, fields)
    if found is not None:
        return found
    vectors = None
    if cohort.location is not None:
        vectors = vectors_of(StoreSource(_open(cohort.location), cohort.cases))
    answers, skipped = {}, {}
    for target in run.targets:
        answers[target.name], skipped[target.name] = baseline_answers(
            target, cohort.cases, vectors, run.plan.splits
        )
    made = BaselineAnswers(answers=answers, skipped=skipped)
    write_baselines(run.folder, made, fields)
    return made


def _baseline_fields(run: FinishedRun, cohort: _Cohort) -> dict[str, Json]:
    features: dict[str, Json] | None = None
    if cohort.location is not None:
        store = _open(cohort.location)
        slides = sorted(slide for case in cohort.cases for slide in case.slide_ids)
        features = {slide: store.record(slide).fingerprint for slide in slides}
    return {
        "stage": "baselines",
        "numerics": NUMERICS,
        "sides": run.config["split"]["sides"],
        "targets": [target.model_dump(mode="json") for target in run.targets],
        "cases": artifacts.fingerprint(
            {
                case.case_id: {
                    "patient": case.patient_id,
                    "site": case.site,
                    "slides": list(case.slide_ids),
                    "targets": {k: [str(v) for v in value] for k, value in case.targets.items()},
                }
                for case in cohort.cases
            }
        ),
        "features": None if features is None else artifacts.fingerprint(features),
    }


def _rivals(
    answers: Answers, scores: Scores, baselines: BaselineAnswers, request: EvaluateRequest
) -> tuple[Rival, ...]:
    own = baselines.answers[answers.target.name]
    options: dict[str, Any] = {"resamples": request.resamples, "seed": request.seed}
    found = []
    for name, other in own.items():
        rival = _in_order_of(answers, other)
        # The same answer for all of a fold ranks nobody there, and nothing but folds when pooled.
        scope: Scope = "folds" if name == "constant" else scores.scope
        metric = scores.headline.name
        theirs = next(one for one in metrics_of(rival) if one.name == metric)
        first = statistic_of(scores.headline, answers, scope)
        second = statistic_of(theirs, rival, scope)
        estimate = intervals({"": second}, answers.patient, **options)[""]
        versus = paired_bootstrap(first, second, answers.patient, **options)
        label = label_of(name, answers.target)
        found.append(Rival(name=name, label=label, estimate=estimate, versus=versus))
    order = {name: place for place, name in enumerate(BASELINES)}
    return tuple(sorted(found, key=lambda rival: order[rival.name]))


def _in_order_of(answers: Answers, other: Answers) -> Answers:
    """Return the rows of another in the order of the first."""
    place = {key: row for row, key in enumerate(other.keys)}
    if set(place) != set(answers.keys):
        raise SchemaError("the baselines' cases are not the run's; remove baselines.json")
    return other.of_rows(np.array([place[key] for key in answers.keys]))


def _cells(cohort: _Cohort, column: str) -> dict[str, str]:
    if not cohort.cases:
        raise ConfigError(f"--by {column}: the run lies in no study, so there are no columns")
    known = {name: None for case in cohort.cases for name in case.columns} | {"site": None}
    if column not in known:
        raise ConfigError(f"--by {column}: no such column (there are: {listed([*known])})")
    return {
        case.case_id: case.site if column == "site" else case.columns.get(column, "")
        for case in cohort.cases
    }


def _pictures(result: TargetResult) -> list[Picture]:
    scores = result.scores
    rows = [ForestRow(label="This model", estimate=scores.headline_estimate, is_model=True)]
    rows += [ForestRow(label=rival.label, estimate=rival.estimate) for rival in result.rivals]
    own = []
    if result.rivals:
        own.append(forest(rows, metric=scores.headline.label, chance=scores.headline.chance))
    if result.answers.target.task == "survival":
        return [*own, *survival_figures(result.answers)]
    return [*own, *figures_of(result.answers)]


def _write_figures(folder: Path, pictures: Mapping[str, Sequence[Picture]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = set()
    for target, own in pictures.items():
        for one in own:
            name = one.name if len(pictures) == 1 else f"{_file_name(target)}_{one.name}"
            artifacts.write_text(folder / f"{name}.svg", one.svg)
            artifacts.write_bytes(folder / f"{name}.png", one.png)
            kept |= {f"{name}.svg", f"{name}.png"}
    for path in folder.iterdir():
        if path.suffix in (".svg", ".png") and path.name not in kept:
            path.unlink()


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in text)
