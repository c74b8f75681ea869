"""Tuning: options chosen anew for every fold, from what that fold trains on; then train and test.

For each split, trials are scored on inner folds of its training and inner validation cases, by the
validation loss of the kept weights. A trial's task holds no test case. The chosen options are then
trained and tested as any run is.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import model_validator

from bagscope import artifacts
from bagscope.cohort.jobs import Job, RunReport, StageResult
from bagscope.cohort.progress import Reporter, SlideTold
from bagscope.cohort.runner import run_cohort
from bagscope.errors import ConfigError, FingerprintMismatch
from bagscope.mil.cases import Case
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.recipes import laid_over
from bagscope.pipeline.study import Study, read_yaml
from bagscope.pipeline.tile import run_options
from bagscope.pipeline.train import (
    CONFIG_NAME,
    MemberTask,
    PlannedRun,
    TrainRequest,
    TrainResult,
    plan_training,
    read_config,
    train_run,
    worker_count,
)
from bagscope.specs import Spec, parse_spec

STAGE = "tune"
FOLDER_NAME = "tuning"
TRIALS = 20
INNER_FOLDS = 3
WORKER_MODULES = ("bagscope.pipeline.tune_worker",)


class RangeSpec(Spec):
    """What one option is searched in: a range, or choices."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> RangeSpec:
        if self.choices:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("choices stand alone, without low, high and log")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("give low and high, low below high, or choices")
        elif self.log and self.low <= 0:
            raise ValueError("a logarithmic range begins above 0")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """Return the choices, or both ends of the range."""
        return self.choices or (self.low, self.high)


Space = Mapping[str, RangeSpec]
"""Dotted names of options (`optimiser.lr`), and where to search."""

OTHER_SCALES = ("bins", "class_weights", "nll_alpha", "regression", "survival")
"""Options of the objective under which a validation loss is another number for the same answers.

Trials that differ in one of them can't be compared by it: the lowest would be the smallest scale.
"""

DEFAULT_SPACE: Space = {
    "optimiser.lr": RangeSpec(low=1e-5, high=1e-2, log=True),
    "optimiser.weight_decay": RangeSpec(low=1e-6, high=1e-2, log=True),
    "aggregator.options.dropout": RangeSpec(low=0.0, high=0.5),
    "aggregator.options.hidden": RangeSpec(choices=(128, 256, 512)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneRequest:
    """What is to be tuned.

    Attributes:
        train: the run; its settings hold where the space says nothing.
        space: a YAML file; `DEFAULT_SPACE` if None.
        trials: per split.
        inner_folds: that each trial is scored on.
        seed: of the search.
    """

    train: TrainRequest
    space: Path | None = None
    trials: int = TRIALS
    inner_folds: int = INNER_FOLDS
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneTask:
    """All that a worker needs to choose options for one split; there is no test case in it.

    Attributes:
        folder: of the trials and what was chosen.
        cases: of training and inner validation.
    """

    folder: Path
    split: str
    recipe: TrainSpec
    space: Space
    targets: tuple[TargetSpec, ...]
    cases: tuple[Case, ...]
    location: str
    trials: int
    inner_folds: int
    seed: int
    device: str
    threads: int
    overwrite: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneResult:
    """How tuning ended.

    Attributes:
        chosen: options by split, nested.
        trained: the run with them; None where tuning did not come to its end.
    """

    folder: Path
    tuned: RunReport
    chosen: Mapping[str, Mapping[str, Any]]
    trained: TrainResult | None

    @property
    def exit_code(self) -> int:
        """Return 0 where all came to its end, else 1, 130 where interrupted."""
        return self.tuned.exit_code or (self.trained.exit_code if self.trained else 1)


def read_space(path: Path | None) -> Space:
    """Return a search space from a YAML file.

    Raises:
        ConfigError: not readable, empty, or ranges that are none.
    """
    if path is None:
        return DEFAULT_SPACE
    values = read_yaml(path)
    if not values or not all(isinstance(options, dict) for options in values.values()):
        raise ConfigError(
            f"--space {path}: expected a line per option, such as "
            "optimiser.lr: {low: 1.0e-5, high: 1.0e-2, log: true}"
        )
    return {
        str(name): parse_spec(RangeSpec, options, where=f"{path}: {name}")
        for name, options in values.items()
    }


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"optimiser.lr": 1}` as `{"optimiser": {"lr": 1}}`."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        found = laid_over(found, value)
    return found


def with_options(recipe: TrainSpec, options: Mapping[str, Any]) -> TrainSpec:
    """Return a recipe with dotted options laid over it.

    Raises:
        ConfigError: an option that there is not, or a value that does not fit.
    """
    values = laid_over(recipe.model_dump(mode="json"), nested(options))
    return parse_spec(TrainSpec, values, where="search space")


def plan_tuning(
    study: Study, request: TuneRequest, *, dry_run: bool = False
) -> tuple[PlannedRun, dict[str, TuneTask]]:
    """Say what would be tuned and trained.

    Raises:
        ConfigError: optuna is missing, or the space does not fit the recipe; as of `plan_training`.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("tune needs optuna; install it with pip install 'bagscope[tune]'")
    for name, value in (("trials", request.trials), ("inner folds", request.inner_folds - 1)):
        if value < 1:
            raise ConfigError(f"{name}: too few; at least one trial on two inner folds is needed")
    planned = plan_training(study, request.train, dry_run=dry_run)
    first = next(iter(planned.members.values()))
    features: Any = planned.config["features"]
    space = _fitting(
        read_space(request.space), first, features["dimension"], given=request.space is not None
    )
    tasks = {}
    for split in planned.plan.splits:
        name = f"fold_{split.name}"
        member = planned.members[f"{name}_s{request.train.seeds[0]}"]
        tasks[name] = TuneTask(
            folder=planned.folder / FOLDER_NAME,
            split=split.name,
            recipe=member.recipe,
            space=space,
            targets=member.targets,
            cases=(*member.train, *member.inner),
            location=member.location,
            trials=request.trials,
            inner_folds=request.inner_folds,
            seed=request.seed,
            device=member.device,
            threads=member.threads,
            overwrite=request.train.overwrite,
        )
    return planned, tasks


def tune_run(study: Study, request: TuneRequest, report: Reporter) -> TuneResult:
    """Choose options for every split, then train and test with them; resumes at the trial.

    Raises:
        ConfigError, ArtifactError: as of `plan_tuning`.
        FingerprintMismatch: the name is taken by a run with other settings.
    """
    planned, tasks = plan_tuning(study, request)
    _require_name(planned, overwrite=request.train.overwrite)
    stage = f"{STAGE}/{planned.folder.name}"
    options = dataclasses.replace(
        run_options(study.spec.run, None, "local", preload=WORKER_MODULES),
        workers=worker_count(study.spec.run, request.train.device),
        sweep=(planned.folder / FOLDER_NAME,),
        noun="search",
    )

    def on_message(name: str, message: bytes) -> None:
        facts = json.loads(message)
        if not facts:  # a sign of life
            return
        report.emit(SlideTold(stage=stage, slide_id=name, text=facts.pop("text"), facts=facts))

    tuned = run_cohort(
        [Job(slide_id=name, payload=task) for name, task in tasks.items()],
        tune_one,
        stage=stage,
        status_dir=study.status_folder,
        options=options,
        report=report,
        on_message=on_message,
    )
    result = TuneResult(folder=planned.folder, tuned=tuned, chosen={}, trained=None)
    if tuned.exit_code:
        return result
    chosen = {task.split: read_chosen(task) for task in tasks.values()}
    request_tuned = dataclasses.replace(request.train, tuned=chosen)
    trained = train_run(study, request_tuned, report)
    return dataclasses.replace(result, chosen=chosen, trained=trained)


def tune_one(job: Job) -> StageResult:
    """Choose options for one split, in a worker."""
    from bagscope.cohort.executors import worker
    from bagscope.pipeline.tune_worker import tune_task

    return tune_task(job.payload, lambda facts: worker.tell(json.dumps(facts).encode()))


def chosen_path(task: TuneTask) -> Path:
    """Return where what was chosen for a split stands."""
    return task.folder / f"{task.split}.json"


def read_chosen(task: TuneTask) -> dict[str, Any]:
    """Return the options that were chosen for a split, nested."""
    return nested(artifacts.read_json(chosen_path(task))["options"])


def _fitting(space: Space, member: MemberTask, dimension: int, *, given: bool) -> Space:
    """Return the space, of the default one only what the aggregator has; try both ends of it."""
    from bagscope.mil.aggregators.registry import aggregator_entry

    entry = aggregator_entry(member.recipe.aggregator.name)
    owned = {f"aggregator.options.{name}" for name in entry.options.model_fields}
    fitting = {
        name: where
        for name, where in space.items()
        if given or name in owned or not name.startswith("aggregator.")
    }
    for name in fitting:
        block, _, option = name.partition(".")
        if block == "objective" and option in ("", *OTHER_SCALES):
            raise ConfigError(
                f"search space: {name} changes what the validation loss is measured in, so trials "
                "can't be compared by it; choose it with --set, and compare runs"
            )
    try:
        _try_ends(fitting, member, dimension)
    except ConfigError:
        if given:
            raise
        # What it has it need not take: a model without a projection has no width of one.
        fitting = {k: where for k, where in fitting.items() if not k.startswith("aggregator.")}
    return fitting


def _try_ends(space: Space, member: MemberTask, dimension: int) -> None:
    """Build the model at both ends, so that aggregator and regime refuse what they don't take."""
    import torch

    from bagscope.mil.objectives.objective import build_objective
    from bagscope.mil.regimes.registry import build_model, refuse_impossible

    for end in (0, -1):
        found = with_options(
            member.recipe, {name: where.ends[end] for name, where in space.items()}
        )
        try:
            refuse_impossible(found, member.targets)
            with torch.random.fork_rng(devices=[]):
                build_model(
                    found, dimension, build_objective(member.targets, found.objective).outputs
                )
        except ConfigError as error:
            raise ConfigError(f"search space: {error}") from error


def _require_name(planned: PlannedRun, *, overwrite: bool) -> None:
    """Refuse a name that is taken before the search, not after it."""
    if overwrite or not (planned.folder / CONFIG_NAME).exists():
        return
    stored = read_config(planned.folder)
    if "tuned" not in stored:
        raise FingerprintMismatch(
            f"{planned.folder}: is a run that was not tuned; choose another --name, or tune anew "
            "with --overwrite"
        )
    artifacts.require_same(
        {name: value for name, value in stored.items() if name != "tuned"},
        planned.config,
        what=str(planned.folder),
        remedy="choose another --name, or tune anew with --overwrite",
    )
