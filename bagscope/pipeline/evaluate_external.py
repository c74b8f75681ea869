"""External validation: a model bundle and the labelled cohort of another place → the same report.

The model predicts the cohort as `bagscope predict` does, and its predictions are judged. Nothing is
fitted, so there are no rivals here: the model's training patients are not in its bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagscope import artifacts
from bagscope.cohort.progress import Reporter
from bagscope.cohort.table import Cohort
from bagscope.errors import ConfigError
from bagscope.mil.bundle import Bundle, MemberPlace
from bagscope.mil.evaluation.answers import answers_of, read_predictions
from bagscope.mil.evaluation.bootstrap import RESAMPLES
from bagscope.mil.evaluation.scoring import score, subgroups
from bagscope.mil.report.results import MemberFacts, RunResult, TargetResult
from bagscope.mil.report.survival_figures import risk_groups
from bagscope.mil.versions import versions
from bagscope.pipeline.evaluate import NUMERICS, EvaluateResult, write_evaluation
from bagscope.pipeline.predict import PlannedPrediction, PredictRequest, plan_prediction, predict
from bagscope.wording import listed

METHOD = "external"
_REASON = "the model's training patients are not in its bundle, and a rival would need them"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExternalRequest:
    """What is to be validated, as asked for.

    Attributes:
        model: a bundle, or a run that has one.
        cohort: table of slides.
        out: folder for all that is written; it becomes a study of the cohort.
        labels: a clinical table to join.
        features: folder or URL of the cohort's features; extracted from the slides if None.
        assume: the encoder that features of unknown provenance are vouched to be of.
        by: columns of the cohort table, for tables of subgroups.
        skip_missing: leave slides without features out in place of listing them as failed.
        resamples: of each bootstrap.
        seed: of the draws.
    """

    model: Path
    cohort: Path
    out: Path
    labels: Path | None = None
    features: str | None = None
    assume: str | None = None
    by: tuple[str, ...] = ()
    skip_missing: bool = False
    resamples: int = RESAMPLES
    seed: int = 0


def evaluate_external(request: ExternalRequest, report: Reporter) -> EvaluateResult:
    """Predict a cohort, judge the predictions, and write numbers, figures and page.

    Raises:
        ConfigError: no model or cohort there, no labels in it, or an unknown column.
        FingerprintMismatch: features that the model does not know.
    """
    asked = PredictRequest(
        model=request.model,
        place=request.out,
        slides=str(request.cohort),
        labels=request.labels,
        features=request.features,
        out=request.out / "predictions",
        assume=request.assume,
        skip_missing=request.skip_missing,
    )
    planned = plan_prediction(asked)
    _require_columns(request.by, planned.place.cohort)
    if not any(case.targets for case in planned.cases):
        columns = [column for one in planned.bundle.targets for column in one.columns]
        raise ConfigError(
            f"{request.cohort}: has no labels of {listed(columns)}, so there is nothing to judge; "
            "name a clinical table with --labels"
        )
    ended = predict(asked, report)
    if ended.table is None:
        raise ConfigError(f"{request.cohort}: the model could be asked about none of its cases")
    table = read_predictions(ended.table)
    record = artifacts.read_json(ended.table.with_suffix(".json"))
    options: dict[str, Any] = {"resamples": request.resamples, "seed": request.seed}
    targets: dict[str, TargetResult] = {}
    for target in planned.bundle.targets:
        answers = answers_of(table, target)
        if not len(answers):
            continue
        targets[target.name] = TargetResult(
            answers=answers,
            scores=score(answers, **options),
            skipped={"All rivals": _REASON},
            subgroups={
                column: subgroups(answers, column, _cells(planned, column), **options)
                for column in request.by
            },
            log_rank=risk_groups(answers).test() if target.task == "survival" else None,
        )
    unlike = len(ended.flagged)
    result = RunResult(
        run=f"{planned.bundle.run} on {request.cohort.stem}",
        per=planned.bundle.per,
        targets=targets,
        method=METHOD,
        seeds=(),
        folds=(),
        members=tuple(_facts(planned.bundle, place) for place in planned.chosen),
        left_out=dict(record["missing"]),
        notes=(
            *ended.notes,
            f"{unlike} of {ended.cases} cases are unlike the training bags",
            "whether a patient of this cohort was among the model's training patients can't be "
            "seen from the bundle",
        ),
        patients_known=planned.place.cohort.patient_id_given,
        versions=versions(),
        config=_config(planned.bundle),
        fields={
            "numerics": NUMERICS,
            "model": planned.bundle.fingerprint,
            "predictions": artifacts.sha256_of_file(ended.table),
            "by": list(request.by),
            **options,
        },
    )
    return write_evaluation(request.out, result)


def _config(bundle: Bundle) -> dict[str, Any]:
    first = next(iter(bundle.members.values()))
    return {
        "recipe_name": first.recipe.aggregator.name,
        "recipe": first.recipe.model_dump(mode="json"),
        "targets": [target.model_dump(mode="json") for target in bundle.targets],
        "per": bundle.per,
        "features": {"encoder": {"name": bundle.origin.name}},
    }


def _facts(bundle: Bundle, place: MemberPlace) -> MemberFacts:
    member = bundle.members[place.name]
    return MemberFacts(
        name=place.name,
        seed=member.seed,
        epoch=member.epoch,
        epochs=member.epochs,
        temperatures=member.temperatures,
        uncalibrated=member.uncalibrated,
        thresholds=member.thresholds,
    )


def _require_columns(by: tuple[str, ...], cohort: Cohort) -> None:
    known = [*cohort.columns, "site"]
    for column in by:
        if column not in known:
            raise ConfigError(f"--by {column}: no such column (there are: {listed(known)})")


def _cells(planned: PlannedPrediction, column: str) -> Mapping[str, str]:
    return {
        case.case_id: case.site if column == "site" else case.columns.get(column, "")
        for case in planned.cases
    }
