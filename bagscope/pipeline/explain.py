"""The explain stage: score files of a run or a prediction → what each prediction rests on.

A case of a run is asked about by the members that scored it, which never saw it: out of fold. Of a
prediction it is the bundle's members that answered.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.cohort.jobs import Job, RunReport, StageResult
from bagscope.cohort.progress import Reporter
from bagscope.cohort.runner import run_cohort
from bagscope.errors import BagscopeError, ConfigError, FingerprintMismatch
from bagscope.pipeline.bundle import SCORES_NAME
from bagscope.pipeline.explain_options import ExplainOptions, require_options
from bagscope.pipeline.heatmap import score_files, study_of
from bagscope.pipeline.study import RunSpec, Study
from bagscope.pipeline.tile import run_options
from bagscope.specs import did_you_mean

if TYPE_CHECKING:
    from bagscope.mil.score_file import ScoreFile
    from bagscope.pipeline.predict_worker import MemberFolder

STAGE = "explain"
WORKER_MODULES = ("bagscope.pipeline.explain_worker",)
_PICTURE_MODULES = ("matplotlib.figure", "matplotlib.backends.backend_agg")
THREADS = 1
"""Of a worker, whatever their number: sums over another number of threads have other last bits."""
TABLE_NAME = "predictions.csv"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainRequest:
    """Which explanations are wanted.

    Attributes:
        place: a run, or a folder of predictions.
        slides: ids; all if empty.
        model: the bundle; that of the run that scored them if None.
        features: where the features lie; looked for in the study if None.
        annotations: GeoJSON of a slide, or a folder of a file per slide.
        donor: a slide whose tiles are put into all others.
        donor_region: GeoJSON of the donor's tiles to take, in place of its hottest.
        out: folder for the output; `explanations/<run>` of the study if None.
        workers: processes; the study's setting if None.
        shard: (i, n), to explain the i-th of n parts of the cases.
    """

    place: Path
    options: ExplainOptions = field(default_factory=ExplainOptions)
    slides: tuple[str, ...] = ()
    model: Path | None = None
    features: str | None = None
    annotations: Path | None = None
    donor: str | None = None
    donor_region: Path | None = None
    out: Path | None = None
    device: str = "cpu"
    workers: int | None = None
    overwrite: bool = False
    shard: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Donor:
    """A slide that tiles are taken from: its hottest, or those inside a region."""

    slide_id: str
    region: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainTask:
    """All that a worker needs to explain one case.

    Attributes:
        slide_ids: of the case, in the cohort's order.
        scores: folder of the score files.
        members: that scored the case and answer for it.
        panel: every member of the folds, whose heatmaps are compared.
        is_out_of_fold: whether the members that answer never saw the case.
        target: that is asked about.
        task: of the target.
        location: of the features.
        folder: to make.
        run: its name, for people.
        annotations: by slide.
        unit: what an answer counts in (see `faithfulness`).
    """

    case_id: str
    slide_ids: tuple[str, ...]
    scores: Path
    members: tuple[MemberFolder, ...]
    panel: tuple[MemberFolder, ...]
    is_out_of_fold: bool
    target: str
    task: str
    location: str
    folder: Path
    run: str
    options: ExplainOptions
    annotations: Mapping[str, Path]
    donor: Donor | None
    unit: float
    device: str
    threads: int
    overwrite: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedExplanations:
    """Explanations before they are made.

    Attributes:
        folder: of the output; a case's files lie in `<its first slide>/`.
        all_tasks: of every case that there is, by its first slide: what a summary may be of.
        tasks: of those that are asked for.
        patients: of each case.
        truth: the label of each case, empty where not known.
        classes: of the target; empty of a number or a risk.
        notes: sentences that the user should see.
        damaged: what is wrong with score files that can't be read, by slide; their cases are not
            among those to be explained.
    """

    folder: Path
    status_dir: Path
    run: RunSpec
    name: str
    target: str
    task: str
    classes: tuple[str, ...]
    all_tasks: Mapping[str, ExplainTask]
    tasks: Mapping[str, ExplainTask]
    patients: Mapping[str, str]
    truth: Mapping[str, str]
    notes: tuple[str, ...]
    damaged: Mapping[str, str]


def plan_explanations(request: ExplainRequest) -> PlannedExplanations:
    """Find what is to be explained, by which models and from which features.

    Raises:
        ConfigError: no scores, model or features there, or options that do not fit them.
        FingerprintMismatch: scores that are of another model.
    """
    options = request.options
    require_options(options)
    study, name = study_of(request.place, request.workers)
    files, damaged = score_files(request.place)
    notes = tuple(damaged.values())
    bundle, folders = _members(request, study, files)
    target, task, classes = _target(bundle, options)
    location = _features(request, study, files)
    folder = request.out or (study.folder / "explanations" / name if study else None)
    if folder is None:
        raise ConfigError(f"{request.place}: in no study; name where the output goes with --out")
    cases = _cases(study, files)
    wanted = _wanted(request.slides, cases, damaged)
    annotations = _annotations(request, [s for case in wanted for s in cases[case]])
    donor = _donor(request, files)
    rows = _rows(request.place / TABLE_NAME)
    run = study.spec.run if study else RunSpec(workers=request.workers)
    every = {
        slides[0]: ExplainTask(
            case_id=case_id,
            slide_ids=slides,
            scores=request.place / SCORES_NAME,
            members=tuple(
                folders[member]
                for member in files[slides[0]].fields["members"]
                if member in folders
            ),
            panel=tuple(one for one in folders.values() if one.name != "final"),
            is_out_of_fold=_is_run(request.place),
            target=target,
            task=task,
            location=location,
            folder=folder / slides[0],
            run=name,
            options=options,
            annotations={s: annotations[s] for s in slides if s in annotations},
            donor=donor,
            unit=1.0 if classes else _spread(rows, target, task),
            device=request.device,
            threads=THREADS,
            overwrite=request.overwrite,
        )
        for case_id, slides in cases.items()
    }
    without = [s for case in wanted for s in cases[case] if annotations and s not in annotations]
    if without:
        notes = (*notes, _unannotated(without))
    return PlannedExplanations(
        folder=folder,
        status_dir=study.status_folder if study else folder / "status",
        run=run,
        name=name,
        target=target,
        task=task,
        classes=classes,
        all_tasks=every,
        tasks={first: one for first, one in every.items() if one.case_id in wanted},
        patients={case: rows[case]["patient_id"] if case in rows else case for case in cases},
        truth={case: rows[case].get(target, "") if case in rows else "" for case in cases},
        notes=notes,
        damaged=damaged,
    )


def explain(planned: PlannedExplanations, request: ExplainRequest, report: Reporter) -> RunReport:
    """Explain planned cases; resumes where an earlier call stopped."""
    shown = {"faithfulness", "dose"}.intersection(request.options.wanted)
    modules = (*WORKER_MODULES, *(_PICTURE_MODULES if shown else ()))
    options = run_options(planned.run, request.shard, "local", preload=modules)
    return run_cohort(
        [Job(slide_id=first, payload=task) for first, task in planned.tasks.items()],
        explain_one,
        stage=f"{STAGE}/{planned.name}",
        status_dir=planned.status_dir,
        options=dataclasses.replace(options, sweep=(planned.folder,), noun="case"),
        report=report,
    )


def explain_one(job: Job) -> StageResult:
    """Explain one case, in a worker."""
    from bagscope.pipeline.explain_worker import explain_task

    return explain_task(job.payload)


# --- where ----------------------------------------------------------------------------------


def _is_run(place: Path) -> bool:
    return (place / "splits.csv").is_file()


def _members(
    request: ExplainRequest, study: Study | None, files: Mapping[str, ScoreFile]
) -> tuple[Mapping[str, Any], dict[str, MemberFolder]]:
    """Return the bundle's description and the folders of its members.

    Raises:
        ConfigError: no bundle there.
        FingerprintMismatch: it did not make a single one of the scores.
    """
    from bagscope.mil.bundle import DESCRIPTION_NAME, FINAL_NAME
    from bagscope.pipeline.bundle import member_folders, scoring_bundle

    path = scoring_bundle(request.place, study, request.model)
    description = artifacts.read_json(path / DESCRIPTION_NAME)
    folders = {one["name"]: path / "members" / one["name"] for one in description["members"]}
    if description["has_final"]:
        folders[FINAL_NAME] = path / FINAL_NAME
    members = member_folders(folders)
    hashes = {member.name: member.sha256 for member in members.values()}
    scored = [file.fields["members"] for file in files.values()]
    if not any(hashes.items() >= one.items() for one in scored):
        raise FingerprintMismatch(
            f"{request.place / SCORES_NAME}: its scores are of other members than those of {path}; "
            "score them anew, or name their model with --model"
        )
    return description, members


def _target(
    description: Mapping[str, Any], options: ExplainOptions
) -> tuple[str, str, tuple[str, ...]]:
    """Return the target that is asked about, its task and its classes."""
    targets = next(iter(description["models"].values()))["targets"]
    name = next(iter(targets)) if options.target is None else options.target
    if name not in targets:
        raise ConfigError(f"--target {name!r}: no such target{did_you_mean(name, list(targets))}")
    task, classes = targets[name]["task"], tuple(targets[name]["classes"])
    wanted = options.class_name
    if wanted is not None and not classes:
        raise ConfigError(f"--class {wanted!r}: {name} has no classes; leave it out")
    if wanted is not None and wanted not in classes:
        raise ConfigError(f"--class {wanted!r}: no class of {name}{did_you_mean(wanted, classes)}")
    return name, task, classes


def _features(request: ExplainRequest, study: Study | None, files: Mapping[str, ScoreFile]) -> str:
    """Return where the features lie that the scores were made of, found by their fingerprint.

    Raises:
        ConfigError: they are in no folder of the study, or others have taken their place.
    """
    from bagscope.features.aligned_store import two_of
    from bagscope.features.store import FeatureStore

    if request.features is not None:
        FeatureStore.open(request.features)
        return request.features
    if study is None:
        raise ConfigError(f"{request.place}: in no study; name its features with --features")
    others = None
    for location in [*map(str, study.feature_folders()), *study.feature_pairs()]:
        two = two_of(location)
        folder = Path(two[0] if two else location)
        for slide_id, file in files.items():
            if not (folder / f"{slide_id}.h5").is_file():
                continue
            try:
                found = FeatureStore.open(location, only=[slide_id]).record(slide_id)
            except BagscopeError:
                if two:
                    break  # not aligned
                continue  # that slide says so itself
            if found.fingerprint == file.fields["slides"][slide_id]:
                return location
            others = others or folder
    where = f"{study.folder / 'features'}: holds no features that these scores were made of"
    if others is not None:
        raise ConfigError(
            f"{where} (those in {others.relative_to(study.folder)} are of other tiles, or of other "
            "settings); name theirs with --features, or score anew"
        )
    raise ConfigError(f"{where}; if they were moved, name where they lie with --features")


# --- whom -----------------------------------------------------------------------------------


def _cases(study: Study | None, files: Mapping[str, ScoreFile]) -> dict[str, tuple[str, ...]]:
    """Return the slides of each case, in the cohort's order, as they were when it was scored."""
    order: dict[str, int] = {}
    if study is not None:
        order = {row.slide_id: place for place, row in enumerate(study.cohort().rows)}
    found: dict[str, tuple[str, ...]] = {}
    for file in files.values():
        slides = sorted(file.fields["slides"], key=lambda one: (order.get(one, math.inf), one))
        if slides[0] in files:
            found.setdefault(file.case_id, tuple(slides))
    return found


def _wanted(
    slides: Sequence[str], cases: Mapping[str, Sequence[str]], damaged: Mapping[str, str]
) -> tuple[str, ...]:
    case_of = {slide_id: case for case, every in cases.items() for slide_id in every}
    for slide_id in slides:
        if slide_id in damaged:
            raise ConfigError(f"--slide {slide_id}: {damaged[slide_id]}")
        if slide_id not in case_of:
            known = list(case_of)
            raise ConfigError(f"--slide {slide_id}: has no scores{did_you_mean(slide_id, known)}")
    return tuple(dict.fromkeys(case_of[slide_id] for slide_id in slides)) or tuple(cases)


def _annotations(request: ExplainRequest, slides: Sequence[str]) -> dict[str, Path]:
    if request.annotations is None:
        if request.options.annotation_classes is not None:
            raise ConfigError("--annotation-class has no meaning without --annotations")
        return {}
    from bagscope.pipeline.explain_annotations import annotation_files, require_classes

    files = annotation_files(request.annotations, slides)
    require_classes(files, request.options.annotation_classes)
    return files


def _donor(request: ExplainRequest, files: Mapping[str, ScoreFile]) -> Donor | None:
    donor, region = request.donor, request.donor_region
    if donor is None:
        if region is not None:
            raise ConfigError("--donor-region has no meaning without --transplant")
        return None
    if donor not in files:
        raise ConfigError(f"--transplant {donor}: has no scores{did_you_mean(donor, list(files))}")
    if region is not None and not region.is_file():
        raise ConfigError(f"--donor-region {region}: no such GeoJSON file")
    return Donor(slide_id=donor, region=region)


def _unannotated(slides: Sequence[str]) -> str:
    from bagscope.wording import listed

    return (
        f"no annotation of {listed(slides)} ({len(slides)}): left out of what is said about "
        "annotations; a file without regions says that there is nothing to find"
    )


def _rows(table: Path) -> dict[str, dict[str, str]]:
    """Return the first row of each case in a table of predictions; none where there is none."""
    if not table.is_file():
        return {}
    rows: dict[str, dict[str, str]] = {}
    with table.open(encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            rows.setdefault(row["case_id"], row)
    return rows


def _spread(rows: Mapping[str, Mapping[str, str]], target: str, task: str) -> float:
    """Return the standard deviation of a number's predictions over the cohort; 1 if unknown."""
    column = f"{target}_risk" if task == "survival" else f"{target}_predicted"
    values = [float(row[column]) for row in rows.values() if row.get(column)]
    if len(values) < 2:
        return 1.0
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return spread or 1.0


def describe(planned: PlannedExplanations) -> dict[str, Json]:
    """Return what would be explained, for programs."""
    return {
        "target": planned.target,
        "cases": len(planned.tasks),
        "folder": str(planned.folder),
        "methods": list(next(iter(planned.tasks.values())).options.wanted),
        "notes": list(planned.notes),
    }
