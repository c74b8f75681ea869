"""Prediction: a model bundle and a cohort → a table, and a score file per slide.

Where a study has no features that the model knows, its slides are tiled and extracted first, with
the model's tile size, resolution and encoder.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.artifacts import portable_name_problem
from bagscope.cohort.jobs import Job, RunReport
from bagscope.cohort.progress import Reporter
from bagscope.cohort.runner import run_cohort
from bagscope.cohort.table import Cohort, SlideRow, load_cohort
from bagscope.errors import (
    ArtifactError,
    BagscopeError,
    CohortError,
    ConfigError,
    FingerprintMismatch,
)
from bagscope.mil.cases import Case, cases_of, slides_of
from bagscope.pipeline.bundle import SCORES_NAME, member_folders, score_one, scoring_threads
from bagscope.pipeline.study import COHORT_NAME, STUDY_NAME, RunSpec, Study, init_study, open_study
from bagscope.pipeline.tile import run_options
from bagscope.wording import counted, listed

if TYPE_CHECKING:
    from bagscope.mil.bundle import Bundle, Choice, MemberPlace
    from bagscope.pipeline.predict_worker import ScoreTask

STAGE = "predict"
WORKER_MODULES = ("bagscope.pipeline.predict_worker",)


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictRequest:
    """What is to be predicted, as asked for.

    Attributes:
        model: a bundle, or a run that has one.
        place: a study, or a folder of features.
        slides: table, folder or glob that the study is made of.
        labels: a clinical table to join.
        features: folder or URL of features, over the study's own.
        out: folder for the output; `predictions/<run>/<cohort>` of the study if None.
        name: of the cohort; the study folder's name if empty.
        members: who answers; the bundle's default if None.
        assume: the encoder that features of unknown provenance are vouched to be of.
        embeddings: write the cases' embeddings too.
        ignore_labels: don't look for labels in the cohort.
        skip_missing: leave slides without features out in place of listing them as failed.
        workers: processes; the study's setting if None.
        shard: (i, n), to ask about the i-th of n parts of the cases.
    """

    model: Path
    place: Path
    slides: str | None = None
    labels: Path | None = None
    features: str | None = None
    out: Path | None = None
    name: str = ""
    members: Choice | None = None
    assume: str | None = None
    embeddings: bool = False
    ignore_labels: bool = False
    skip_missing: bool = False
    device: str = "cpu"
    workers: int | None = None
    overwrite: bool = False
    shard: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where cases come from and where the output goes.

    Attributes:
        cohort: the slides.
        study: None for a folder of features.
        location: of the features; None where they are still to be made.
        folder: of the output.
        status_dir: for status and claims.
    """

    cohort: Cohort
    study: Study | None
    location: str | None
    folder: Path
    status_dir: Path
    run: RunSpec
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedPrediction:
    """A prediction before it starts."""

    bundle: Bundle
    chosen: tuple[MemberPlace, ...]
    place: Place
    cases: tuple[Case, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictResult:
    """How a prediction ended.

    Attributes:
        table: the predictions; None where there are none.
        flagged: cases unlike the training bags.
        made: reports of tiling and extraction, where they were needed.
    """

    report: RunReport
    table: Path | None
    cases: int
    flagged: tuple[str, ...]
    made: tuple[RunReport, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """Return 0 where every case was predicted, else 1, 130 where interrupted."""
        return max(report.exit_code for report in (self.report, *self.made))


def plan_prediction(request: PredictRequest, *, write: bool = True) -> PlannedPrediction:
    """Load the model, find the cohort and say whom the members would be asked about.

    Args:
        request: what is asked for.
        write: whether a study may be made of `slides`.

    Raises:
        ConfigError: no model, study or cohort there, or options that do not go together.
        SchemaError: a damaged bundle.
        FingerprintMismatch: score files of another version are there, and not to be replaced.
    """
    from bagscope.mil.bundle import find_bundle, load_bundle

    bundle = load_bundle(find_bundle(request.model))
    chosen = bundle.chosen(request.members)
    if request.assume is not None and request.assume != bundle.origin.name:
        raise ConfigError(
            f"--assume is {request.assume}, the model's encoder is {bundle.origin.name}; features "
            "of another encoder can't be predicted from"
        )
    place = _find_place(request, bundle, write=write)
    cases, notes = _cases(request, bundle, place)
    if not request.overwrite:
        _require_same_numerics(place.folder / SCORES_NAME, sorted(slides_of(cases)))
    return PlannedPrediction(bundle=bundle, chosen=chosen, place=place, cases=cases, notes=notes)


def predict(request: PredictRequest, report: Reporter) -> PredictResult:
    """Ask a model about every case of a cohort; resumes where an earlier call stopped.

    Raises:
        ConfigError, SchemaError: as of `plan_prediction`.
        FingerprintMismatch: the features are not such as the model was trained on.
    """
    from bagscope.pipeline.predict_tables import write_tables
    from bagscope.pipeline.predict_worker import ScoreTask

    planned = plan_prediction(request)
    made: tuple[RunReport, ...] = ()
    place, bundle = planned.place, planned.bundle
    if place.location is None:
        from bagscope.pipeline.predict_slides import make_features

        assert place.study is not None, "only slides of a study can be extracted"
        location, made = make_features(place.study, bundle.origin, report)
        if made[-1].interrupted:
            return PredictResult(
                report=made[-1], table=None, cases=0, flagged=(), made=(), notes=planned.notes
            )
        place = dataclasses.replace(place, location=location)
        planned = dataclasses.replace(planned, place=place)
    cases, left_out = _with_features(planned, skip_missing=request.skip_missing)
    _require_known_features(planned, request.assume)
    options = dataclasses.replace(
        run_options(place.run, request.shard, "local", preload=WORKER_MODULES),
        sweep=(place.folder, place.folder / SCORES_NAME),
        noun="case",
    )
    folders = {
        one.name: bundle.path / ("final" if one.name == "final" else f"members/{one.name}")
        for one in planned.chosen
    }
    members = tuple(member_folders(folders).values())
    threads = scoring_threads(options, len(cases))
    tasks: dict[str, ScoreTask] = {
        case.case_id: ScoreTask(
            case=case,
            members=members,
            location=str(place.location),
            out=place.folder / SCORES_NAME,
            device=request.device,
            threads=threads,
            overwrite=request.overwrite,
            origin=bundle.origin,
            assume=request.assume,
        )
        for case in cases
    }
    asked = run_cohort(
        [Job(slide_id=task.case.slide_ids[0], payload=task) for task in tasks.values()],
        score_one,
        stage=f"{STAGE}/{bundle.run}/{place.name}",
        status_dir=place.status_dir,
        options=options,
        report=report,
    )
    notes = (*planned.notes, *left_out)
    written = write_tables(
        planned,
        cases,
        {member.name: member.sha256 for member in members},
        {failure.slide_id: failure.message for failure in asked.failures},
        each_member=request.members == "all",
        embeddings=request.embeddings,
        notes=notes,
    )
    return PredictResult(
        report=asked,
        table=written.table,
        cases=written.cases,
        flagged=written.flagged,
        made=made,
        notes=(*notes, *written.notes),
    )


# --- where ----------------------------------------------------------------------------------


def _find_place(request: PredictRequest, bundle: Bundle, *, write: bool) -> Place:
    from bagscope.features.aligned_store import two_of
    from bagscope.features.zarr_store import is_zarr_location
    from bagscope.pipeline.predict_slides import find_known_features

    place = request.place
    two = two_of(str(place))
    is_store = two is not None or is_zarr_location(str(place)) or any(place.glob("[!.]*.h5"))
    # Imported features have a table of their labels beside them; that makes no study of them.
    is_study = (place / STUDY_NAME).exists() or (not is_store and (place / COHORT_NAME).exists())
    overrides = {"run": {"workers": request.workers}}
    if request.slides is None and not is_study and (two is not None or place.is_dir()):
        if request.out is None or request.features is not None or request.labels is not None:
            raise ConfigError(
                f"{place}: no study there; for a folder of features name where the output goes "
                "with --out, and pass neither --features nor --labels"
            )
        if not is_store:
            raise ConfigError(
                f"{place}: neither a study nor a folder of features; make a study with --slides"
            )
        return Place(
            cohort=_cohort_of(place, beside=place if two is None else Path(two[0])),
            study=None,
            location=str(place),
            folder=request.out,
            status_dir=request.out / "status",
            run=RunSpec(workers=request.workers),
            name=_name(request, place if two is None else Path(two[0])),
        )
    if request.slides is not None and write:
        init_study(place, request.slides)
    study = open_study(place, overrides)
    cohort = study.cohort()
    if request.labels is not None:
        cohort = load_cohort(study.cohort_path, labels=request.labels)
    location = request.features or find_known_features(study, bundle.origin)
    name = _name(request, place)
    folder = request.out or study.folder / "predictions" / bundle.run / name
    return Place(
        cohort=cohort,
        study=study,
        location=location,
        folder=folder,
        status_dir=study.status_folder,
        run=study.spec.run,
        name=name,
    )


def _cohort_of(store: Path, beside: Path) -> Cohort:
    """Return the slides of features: those of the table beside them, or all there are.

    Args:
        store: a folder, or two of aligned tilings.
        beside: the folder, of two the fine one.
    """
    from bagscope.features.store import FeatureStore

    if (beside / COHORT_NAME).exists():
        return load_cohort(beside / COHORT_NAME)
    rows = tuple(
        SlideRow(slide_id=slide_id, path=beside / f"{slide_id}.h5", patient_id=slide_id)
        for slide_id in FeatureStore.open(store).slide_ids
    )
    return Cohort(rows=rows, source=str(store))


def _name(request: PredictRequest, place: Path) -> str:
    name = request.name or place.resolve().name
    if problem := portable_name_problem(name):
        raise ConfigError(f"--name {name!r} {problem}; it must be able to be a folder name")
    return name


# --- whom -----------------------------------------------------------------------------------


def _cases(
    request: PredictRequest, bundle: Bundle, place: Place
) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """Return every case of the cohort, with the labels that there are, and notes."""
    table = cases_of(place.cohort, (), per=bundle.per)
    notes = place.cohort.notes
    if bundle.per == "patient" and not place.cohort.patient_id_given:
        notes += ("the cohort names no patients: every slide counts as a patient of its own",)
    there = set(place.cohort.columns)
    known = [target for target in bundle.targets if there.issuperset(target.columns)]
    if request.ignore_labels or not known:
        return table.cases, notes
    try:
        labels = {
            case.case_id: case.targets
            for case in cases_of(place.cohort, known, per=bundle.per).cases
        }
    except CohortError as error:
        if "has features and a label" in str(error):  # the column is there, and empty
            return table.cases, notes
        raise CohortError(f"{error}; or pass --ignore-labels to predict without them") from error
    cases = tuple(
        dataclasses.replace(case, targets=labels.get(case.case_id, {})) for case in table.cases
    )
    return cases, notes


def _require_same_numerics(folder: Path, slide_ids: Sequence[str]) -> None:
    """Refuse score files of another version at once, not slide by slide."""
    from bagscope.mil.score_file import read_score_file
    from bagscope.pipeline.predict_worker import NUMERICS

    there = [path for slide_id in slide_ids if (path := folder / f"{slide_id}.h5").is_file()]
    versions: list[int] = []
    for path in there:
        with contextlib.suppress(ArtifactError):  # a damaged file is made again
            versions.append(read_score_file(path).fields["numerics"])
            if versions == [NUMERICS]:
                return  # the others are of the same run: a long one is not read twice
    others = sorted({version for version in versions if version != NUMERICS})
    if others:
        count = counted(sum(version != NUMERICS for version in versions), "score file")
        raise FingerprintMismatch(
            f"{folder}: {count} of version {listed([str(version) for version in others])} there, "
            f"and this bagscope makes version {NUMERICS}; make them anew with --overwrite, or "
            "choose another --name"
        )


def _with_features(
    planned: PlannedPrediction, *, skip_missing: bool
) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """Return the cases to ask about; those without features fail one by one, or are left out."""
    from bagscope.features.store import FeatureStore

    if not skip_missing:
        return planned.cases, ()
    store = FeatureStore.open(str(planned.place.location))
    kept = [case for case in planned.cases if all(s in store for s in case.slide_ids)]
    there = {case.case_id for case in kept}
    gone = [case.case_id for case in planned.cases if case.case_id not in there]
    if not kept:
        raise ConfigError(f"{store.location}: has features of none of the cohort's slides")
    return tuple(kept), (
        f"left out, has no features: {listed(gone)} ({len(gone)})",
    ) if gone else ()


def _require_known_features(planned: PlannedPrediction, assume: str | None) -> None:
    """Refuse features of another encoder, or all of another tiling, before any work.

    Raises:
        FingerprintMismatch: names the field and both values.
    """
    from bagscope.features.store import FeatureStore
    from bagscope.mil.feature_origin import compare

    store = FeatureStore.open(str(planned.place.location))
    wanted: Sequence[str] = [s for case in planned.cases for s in case.slide_ids if s in store]
    faults = []
    for slide_id in wanted:
        try:
            found = compare(planned.bundle.origin, store.record(slide_id), assume)
        except BagscopeError:
            continue  # damaged, or of yet another encoder: that slide fails by itself
        if not found.fault:
            return
        faults.append((slide_id, found.fault))
        if found.of_encoder:
            break
    if faults:
        slide_id, fault = faults[0]
        raise FingerprintMismatch(f"{store.location}, {slide_id}: {fault}")
