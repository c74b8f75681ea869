"""Training: members for every fold and seed, each tested once on the fold that it never saw.

A member is trained in a process that is given training and inner-validation cases and a store that
knows their slides alone. When it is finished and sealed, another process predicts its test fold.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagscope import artifacts
from bagscope.arithmetic import avoid_broken_units
from bagscope.artifacts import Json
from bagscope.cohort.jobs import Job, RunOptions, RunReport, StageResult
from bagscope.cohort.progress import Reporter, SlideTold
from bagscope.cohort.runner import run_cohort
from bagscope.errors import ConfigError
from bagscope.mil.cases import Case
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.recipes import laid_over, load_recipe
from bagscope.pipeline.study import RunSpec, Study, available_cores, read_yaml
from bagscope.pipeline.tile import run_options

if TYPE_CHECKING:
    from bagscope.mil.splits.plan import SplitPlan
    from bagscope.mil.training.tracking import TrackerName, Tracking

STAGE, TEST_STAGE = "train", "test"
CONFIG_NAME = "config.yaml"
SPLITS_NAME = "splits.csv"
PREDICTIONS_NAME = "predictions.csv"
NUMERICS = 2
"""Raised by hand, with a changelog line, when training comes to other numbers."""
WORKER_MODULES = ("bagscope.pipeline.train_worker",)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRequest:
    """What is to be trained, as asked for.

    Attributes:
        recipe: name or YAML file.
        settings: options laid over it, nested.
        targets: what to predict.
        split: name of the splits.
        name: of the run; the recipe's name if empty.
        features: folder or URL of features, over the study's own.
        encoder: which of the study's encoders, where it has several.
        seeds: one member per fold and seed.
        skip_missing: leave slides without features out in place of refusing.
        device: "cpu", "cuda" (every GPU that there is, a member on each), "cuda:1", ...
        overwrite: train anew what was trained otherwise.
        shard: (i, n), to train the i-th of n parts of the members.
        final: train a model on all patients too, once the members are finished.
        track: "tensorboard" or "mlflow", to tell the epochs to as well.
        tuned: further options of a split's members by its name, nested; they win.
    """

    targets: tuple[TargetSpec, ...]
    recipe: str = "abmil"
    settings: Mapping[str, Any] = field(default_factory=dict)
    split: str = "default"
    name: str = ""
    features: str | None = None
    encoder: str | None = None
    seeds: tuple[int, ...] = (0,)
    skip_missing: bool = False
    device: str = "cpu"
    overwrite: bool = False
    shard: tuple[int, int] | None = None
    final: bool = False
    track: TrackerName | None = None
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberTask:
    """All that a worker needs to train one member; there is no test case in it.

    Attributes:
        folder: of the member.
        location: of the feature store.
        threads: that it computes with; they may change the last bits, so all members have as many.
        stop_after: epochs after which training ends; None for the recipe's own.
        plateau: of the final model alone: what the members' schedule left of the learning rate.
        out_of_fold: of the final model alone, which learns from all: what its temperature and
            threshold are fitted on.
    """

    folder: Path
    recipe: TrainSpec
    targets: tuple[TargetSpec, ...]
    train: tuple[Case, ...]
    inner: tuple[Case, ...]
    location: str
    seed: int
    device: str
    threads: int
    overwrite: bool
    stop_after: int | None = None
    plateau: tuple[float, ...] = ()
    out_of_fold: tuple[TestTask, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TestTask:
    """All that a worker needs to predict the test fold of a finished member."""

    folder: Path
    cases: tuple[Case, ...]
    location: str
    device: str
    threads: int
    repeat: int
    fold: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a training run ended.

    Attributes:
        folder: of the run.
        trained: the report of the members.
        tested: the report of their test folds; None where training did not come to its end.
        scored: the report of the out-of-fold scores; None where not every fold is tested.
        final: the report of the final model; None where there is none to train yet.
        bundle: the models' bundle; None where the run is not complete.
        is_complete: whether every member of the run is trained and tested, by whomever.
        notes: sentences that the user should see.
    """

    folder: Path
    trained: RunReport
    tested: RunReport | None
    is_complete: bool
    notes: tuple[str, ...]
    scored: RunReport | None = None
    final: RunReport | None = None
    bundle: Path | None = None

    @property
    def exit_code(self) -> int:
        """Return 0 where every stage came to its end, else 1, 130 where interrupted."""
        reports = (self.trained, self.tested, self.scored, self.final)
        return max((report.exit_code for report in reports if report is not None), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """A run before it starts: its configuration, and a task per member."""

    folder: Path
    config: Mapping[str, Json]
    members: Mapping[str, MemberTask]
    tests: Mapping[str, TestTask]
    cases: tuple[Case, ...]
    plan: SplitPlan
    notes: tuple[str, ...]


def plan_training(study: Study, request: TrainRequest, *, dry_run: bool = False) -> PlannedRun:
    """Read labels, features and splits, and say what would be trained.

    Splits that are missing are made, and written unless it is a dry run.

    Raises:
        ConfigError: a recipe, label, split or seeds that do not fit; names them.
        ArtifactError: no features.
    """
    from bagscope.features.store import FeatureStore
    from bagscope.mil.sources import StoreSource
    from bagscope.pipeline.splits import split_spec
    from bagscope.pipeline.train_data import (
        find_features,
        labelled_cases,
        require_learnable,
        split_plan,
    )

    if not request.targets:
        raise ConfigError("nothing to predict; name a label column with --target")
    if len(set(request.seeds)) < len(request.seeds):
        raise ConfigError(
            f"seeds are {', '.join(map(str, request.seeds))}; give each once: the same seed makes "
            "the same model"
        )
    recipe = load_recipe(request.recipe, request.settings)
    recipe.training.require_device(request.device)
    location = find_features(study, request.features, request.encoder)
    table = labelled_cases(
        study,
        request.targets,
        per=recipe.bags.per,
        location=location,
        skip_missing=request.skip_missing,
    )
    plan, notes = split_plan(
        study, table, name=request.split, spec=split_spec(study), dry_run=dry_run
    )
    store = FeatureStore.open(location)
    record = store.record(table.cases[0].slide_ids[0])
    source = StoreSource(store, table.chosen(plan.case_ids))
    unheeded = require_learnable(recipe, table, plan, record.shape[1], source)
    folder = study.folder / "runs" / (request.name or Path(request.recipe).stem)
    count = len(plan.splits) * len(request.seeds)
    cores = available_cores()
    threads = max(1, cores // min(count, cores))
    devices = cycle(devices_of(request.device))
    members, tests = {}, {}
    for split in plan.splits:
        own = request.tuned.get(split.name)
        tuned = load_recipe(request.recipe, laid_over(request.settings, own)) if own else recipe
        for seed in request.seeds:
            name = f"fold_{split.name}_s{seed}"
            device = next(devices)
            members[name] = MemberTask(
                folder=folder / name,
                recipe=tuned,
                targets=table.targets,
                train=table.chosen(split.train),
                inner=table.chosen(split.val),
                location=location,
                seed=seed,
                device=device,
                threads=threads,
                overwrite=request.overwrite,
            )
            tests[name] = TestTask(
                folder=folder / name,
                cases=table.chosen(split.test),
                location=location,
                device=device,
                threads=threads,
                repeat=split.repeat,
                fold=split.fold,
                seed=seed,
            )
    config: dict[str, Json] = {
        "schema_version": 1,
        "numerics": NUMERICS,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_name": Path(request.recipe).stem,
        "targets": [target.model_dump(mode="json") for target in table.targets],
        "per": table.per,
        "seeds": list(request.seeds),
        "split": {
            "name": request.split,
            "spec": plan.spec.as_json(),
            "sides": artifacts.fingerprint(
                {
                    split.name: {side: list(ids) for side, ids in split.sides()}
                    for split in plan.splits
                }
            ),
        },
        "features": {
            "encoder": dict(record.encoder),
            "weights_sha256": record.weights_sha256,
            "dimension": record.shape[1],
        },
    }
    if request.tuned:
        config["tuned"] = {name: dict(options) for name, options in request.tuned.items()}
    return PlannedRun(
        folder=folder,
        config=config,
        members=members,
        tests=tests,
        cases=table.cases,
        plan=plan,
        notes=(*table.notes, *notes, *unheeded),
    )


def devices_of(device: str) -> list[str]:
    """Return the devices that are meant: by "cuda", every GPU that this process may use."""
    if device != "cuda":
        return [device]
    import torch

    # Where there is none, a member says so.
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or [device]


def worker_count(run: RunSpec, device: str) -> int:
    """Return how many members to train at a time: as asked, else one per GPU, or per core."""
    if run.workers is None and device.startswith("cuda"):
        return len(devices_of(device))
    return run.worker_count


def train_run(study: Study, request: TrainRequest, report: Reporter) -> TrainResult:
    """Train every member of a run and test each once; resumes where an earlier call stopped.

    Raises:
        ConfigError, ArtifactError: as of `plan_training`.
        FingerprintMismatch: the run's name is taken by a run with other settings.
    """
    from bagscope.mil.training.tracking import Tracking, require_tracker
    from bagscope.pipeline.run_folder import alone_at_the_end, claim_run, finished_members

    require_tracker(request.track)
    planned = plan_training(study, request)
    avoid_broken_units()  # tried once, here: workers inherit what was found
    claim_run(planned, overwrite=request.overwrite)
    tracking = Tracking(request.track, planned.folder) if request.track else None
    stage = f"{STAGE}/{planned.folder.name}"
    # Epochs may take long; what a worker may not be is silent.
    options = dataclasses.replace(
        run_options(study.spec.run, request.shard, "local", preload=WORKER_MODULES),
        workers=worker_count(study.spec.run, request.device),
        sweep=(planned.folder, *(task.folder for task in planned.members.values())),
        noun="member",
    )
    trained = run_cohort(
        [
            Job(slide_id=name, payload=task, weight=float(len(task.train)))
            for name, task in planned.members.items()
        ],
        train_one,
        stage=stage,
        status_dir=study.status_folder,
        options=options,
        report=report,
        on_message=_listener(stage, report, tracking),
    )
    if tracking is not None:
        tracking.close()
    result = TrainResult(
        folder=planned.folder,
        trained=trained,
        tested=None,
        is_complete=False,
        notes=planned.notes,
    )
    if not trained.interrupted:
        # Members of all shards: the last one to end has something of each to test and to bundle.
        options = dataclasses.replace(options, shard=None)
        finished = finished_members(planned)
        tested = run_cohort(
            [Job(slide_id=name, payload=planned.tests[name]) for name in finished],
            test_one,
            stage=f"{TEST_STAGE}/{planned.folder.name}",
            status_dir=study.status_folder,
            options=options,
            report=report,
            on_message=_listener(f"{TEST_STAGE}/{planned.folder.name}", report),
        )
        is_complete = not trained.exit_code and not tested.exit_code
        is_complete &= len(finished) == len(planned.members)
        result = dataclasses.replace(result, tested=tested, is_complete=is_complete)
        if request.shard is not None and not is_complete:
            waiting = (
                f"{len(finished)} of {len(planned.members)} members are trained as asked; once "
                "all are, the shard that ends last gathers and bundles them"
            )
            result = dataclasses.replace(result, notes=(*result.notes, waiting))
        if is_complete:
            with alone_at_the_end(study, planned, options):
                gather_predictions(planned.folder, list(planned.tests.values()))
                result = _complete(study, planned, request, options, report, result)
    return result


def _complete(
    study: Study,
    planned: PlannedRun,
    request: TrainRequest,
    options: RunOptions,
    report: Reporter,
    result: TrainResult,
) -> TrainResult:
    """Write the out-of-fold scores, train the final model if asked for, and bundle the models."""
    from bagscope.pipeline.bundle import bundle_run, score_out_of_fold
    from bagscope.pipeline.final import (
        FINAL_NAME,
        FINAL_STAGE,
        final_folder,
        final_task,
        is_current,
    )

    folder = final_folder(planned.folder)
    if request.final:
        stage = f"{FINAL_STAGE}/{planned.folder.name}"
        last = dataclasses.replace(options, sweep=(planned.folder, folder), shard=None)
        final = run_cohort(
            [Job(slide_id=FINAL_NAME, payload=final_task(planned, planned.cases))],
            train_one,
            stage=stage,
            status_dir=study.status_folder,
            options=last,
            report=report,
            on_message=_listener(stage, report),
        )
        result = dataclasses.replace(result, final=final)
        if final.interrupted:
            return result
    scored = score_out_of_fold(study, planned, options, report)
    result = dataclasses.replace(result, scored=scored)
    if scored.interrupted:
        return result
    bundle = bundle_run(planned, folder if is_current(planned) else None)
    return dataclasses.replace(result, bundle=bundle)


def train_one(job: Job) -> StageResult:
    """Train one member, in a worker."""
    from bagscope.pipeline.train_worker import train_task

    return train_task(job.slide_id, job.payload)


def test_one(job: Job) -> StageResult:
    """Predict one member's test fold, in a worker."""
    from bagscope.pipeline.train_worker import test_task

    return test_task(job.slide_id, job.payload)


def gather_predictions(folder: Path, tests: Sequence[TestTask]) -> Path:
    """Write the predictions of all test folds as one table; return its path."""
    path = folder / PREDICTIONS_NAME
    artifacts.write_text(path, gathered([task.folder for task in tests]))
    return path


def gathered(members: Sequence[Path]) -> str:
    """Return the predictions of members' test folds as one table.

    Members may have columns of their own, as survival at the edges of their own time bins; a row
    is empty in those of the others.
    """
    columns: dict[str, None] = {}
    rows: list[dict[str, str]] = []
    for member in members:
        with (member / PREDICTIONS_NAME).open(newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            rows += reader
            columns |= dict.fromkeys(reader.fieldnames or ())
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run.

    Raises:
        ConfigError: no run there.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"{folder}: no run there (it has no {CONFIG_NAME}); run bagscope train")
    return read_yaml(path)


def _listener(
    stage: str, report: Reporter, tracking: Tracking | None = None
) -> Callable[[str, bytes], None]:
    """Return what passes on what members tell of their epochs."""
    from bagscope.mil.training.history import Epoch

    def on_message(name: str, message: bytes) -> None:
        if not message:  # a sign of life, no news
            return
        facts = json.loads(message)
        history = [Epoch(**values) for values in facts.pop("history")]
        if tracking is not None and history:
            tracking.add(name, history)
        report.emit(SlideTold(stage=stage, slide_id=name, text=facts.pop("text"), facts=facts))

    return on_message
