"""Tasks in sequence: one model after the other from the same body, and what is left of each.

`continual/<name>/` of a study holds a folder per sequence (a split and a seed): the first task's
member, then those of each way of learning. Each is a member as any other. A sequence is trained in
a process that is given training and inner-validation cases of all tasks and a store that knows
their slides alone; another process tests it. Of a split, a patient is on one side in every task.
At the end `<task>.bagscope` holds, for `predict`, what of each task the adapters leave.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.cohort.jobs import Job, RunReport, StageResult
from bagscope.cohort.progress import Reporter
from bagscope.cohort.runner import run_cohort
from bagscope.errors import ConfigError
from bagscope.mil.cases import Case, CaseTable
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.recipes import load_recipe
from bagscope.pipeline.study import Study, available_cores, read_yaml
from bagscope.pipeline.tile import run_options
from bagscope.pipeline.train import TrainRequest, worker_count
from bagscope.specs import Spec, parse_spec
from bagscope.wording import listed

if TYPE_CHECKING:
    from bagscope.mil.continual.sequence import Way

STAGE, TEST_STAGE = "continual", "continual-test"
FOLDER_NAME = "continual"
RESULT_NAME, TABLE_NAME = "continual.json", "continual.md"
WORKER_MODULES = ("bagscope.pipeline.continual_worker",)


class TaskSpec(Spec):
    """One task of a sequence."""

    name: str = Field(description="of the task")
    column: str = Field(description="column of the cohort table that holds its labels")
    classes: tuple[str, ...] = Field(
        default=(), description="of the column that the task is about, the first one negative"
    )
    where: Mapping[str, tuple[str, ...]] = Field(
        default={}, description="columns and the values that its cases have in them"
    )

    @field_validator("where", mode="before")
    @classmethod
    def _as_lists(cls, where: Any) -> Any:
        if not isinstance(where, Mapping):
            return where
        return {
            column: tuple(map(str, values if isinstance(values, list | tuple) else [values]))
            for column, values in where.items()
        }


class TasksSpec(Spec):
    """The content of a file of tasks."""

    tasks: tuple[TaskSpec, ...] = Field(description="in the order in which they are learnt")
    rank: int = Field(default=8, ge=1, description="of the adapters")
    penalty: float = Field(default=10.0, ge=0, description="weight of the adapters' orthogonality")
    finetune: bool = Field(
        default=True, description="learn the tasks with all weights free too, for comparison"
    )

    @property
    def ways(self) -> tuple[Way, ...]:
        """Return the ways in which the tasks are learnt."""
        return ("owlora", "finetune") if self.finetune else ("owlora",)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearntTask:
    """What a worker needs to know of one task; there is no test case in it."""

    name: str
    target: TargetSpec
    train: tuple[Case, ...]
    inner: tuple[Case, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceTask:
    """All that a worker needs to train one sequence."""

    folder: Path
    recipe: TrainSpec
    spec: TasksSpec
    tasks: tuple[LearntTask, ...]
    location: str
    repeat: int
    fold: int
    seed: int
    device: str
    threads: int
    overwrite: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceTest:
    """All that a worker needs to test a sequence that is trained.

    Attributes:
        cases: the test cases of each task.
        truth: by slide, the file that says which of its tiles carry what its class stands for.
    """

    folder: Path
    spec: TasksSpec
    cases: tuple[tuple[Case, ...], ...]
    truth: Mapping[str, Path]
    location: str
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSequences:
    """What would be trained and tested, by the name of the sequence."""

    folder: Path
    spec: TasksSpec
    sequences: Mapping[str, SequenceTask]
    tests: Mapping[str, SequenceTest]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinualResult:
    """How it ended.

    Attributes:
        found: what stands in the result file; None where it is not written.
        bundles: by task, what predicts it after all are learnt.
    """

    folder: Path
    trained: RunReport
    tested: RunReport | None
    found: Mapping[str, Any] | None
    notes: tuple[str, ...]
    bundles: Mapping[str, Path] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """Return 0 where all came to its end, else 1, 130 where interrupted."""
        return max(self.trained.exit_code, self.tested.exit_code if self.tested else 0)


def read_tasks(path: Path) -> TasksSpec:
    """Return the tasks of a file.

    Raises:
        ConfigError: not readable, an option that there is not, or no sequence of tasks.
    """
    from bagscope.mil.continual.sequence import require_sequence

    values = read_yaml(path)
    for number, task in enumerate(values.get("tasks") or ()):
        # One by one, so that what is misspelt is told with the options of a task.
        parse_spec(TaskSpec, task, where=f"--tasks {path}: task {number + 1}")
    spec = parse_spec(TasksSpec, values, where=f"--tasks {path}")
    require_sequence([task.name for task in spec.tasks])
    for task in spec.tasks:
        if problem := artifacts.portable_name_problem(task.name):
            raise ConfigError(f"--tasks {path}: name {task.name!r} {problem}; choose another")
        if len(task.classes) == 1:
            raise ConfigError(
                f"--tasks {path}: task {task.name} has one class, {task.classes[0]}; give two or "
                "more, or none for all of the column"
            )
    return spec


def plan_continual(
    study: Study,
    request: TrainRequest,
    tasks: Path,
    annotations: Path | None = None,
    *,
    dry_run: bool = False,
) -> PlannedSequences:
    """Say which sequences would be trained, on which cases.

    Raises:
        ConfigError: tasks, recipe or splits that do not fit; names them.
        CohortError: labels that are none.
        ArtifactError: no features.
    """
    from bagscope.features.store import FeatureStore
    from bagscope.mil.aggregators.registry import aggregator_entry
    from bagscope.mil.continual.sequence import require_plain
    from bagscope.mil.sources import StoreSource
    from bagscope.pipeline.splits import split_spec
    from bagscope.pipeline.train_data import (
        find_features,
        labelled_cases,
        require_learnable,
        split_plan,
    )

    spec = read_tasks(tasks)
    recipe = load_recipe(request.recipe, request.settings)
    recipe.training.require_device(request.device)
    aggregator_entry(recipe.aggregator.name)
    require_plain(recipe)
    location = find_features(study, request.features, request.encoder)
    table = labelled_cases(
        study,
        [TargetSpec(column=column) for column in dict.fromkeys(one.column for one in spec.tasks)],
        per=recipe.bags.per,
        location=location,
        skip_missing=request.skip_missing,
    )
    plan, notes = split_plan(
        study, table, name=request.split, spec=split_spec(study), dry_run=dry_run
    )
    store = FeatureStore.open(location)
    dimension = store.record(table.cases[0].slide_ids[0]).shape[1]
    each = [task_table(table, task) for task in spec.tasks]
    for task, own in zip(spec.tasks, each, strict=True):
        kept = plan.restricted_to({case.case_id for case in own.cases})
        source = StoreSource(store, own.chosen(kept.case_ids))
        require_learnable(recipe, own, kept, dimension, source)
        untested = [split.name for split in kept.splits if not split.test]
        if untested:
            notes = (*notes, f"task {task.name}: no test case in {listed(untested)}")
    folder = study.folder / FOLDER_NAME / (request.name or Path(request.recipe).stem)
    truth = {} if annotations is None else truth_files(annotations, table.cases)
    count = len(plan.splits) * len(request.seeds)
    cores = available_cores()
    threads = max(1, cores // min(count, cores))
    sequences, tests = {}, {}
    for split in plan.splits:
        for seed in request.seeds:
            name = f"{split.name}_s{seed}"
            sequences[name] = SequenceTask(
                folder=folder / name,
                recipe=recipe,
                spec=spec,
                tasks=tuple(
                    LearntTask(
                        name=task.name,
                        target=own.targets[0],
                        train=own.chosen(split.train),
                        inner=own.chosen(split.val),
                    )
                    for task, own in zip(spec.tasks, each, strict=True)
                ),
                location=location,
                repeat=split.repeat,
                fold=split.fold,
                seed=seed,
                device=request.device,
                threads=threads,
                overwrite=request.overwrite,
            )
            tests[name] = SequenceTest(
                folder=folder / name,
                spec=spec,
                cases=tuple(own.chosen(split.test) for own in each),
                truth=truth,
                location=location,
                device=request.device,
                threads=threads,
            )
    return PlannedSequences(
        folder=folder,
        spec=spec,
        sequences=sequences,
        tests=tests,
        notes=(*table.notes, *notes),
    )


def task_table(table: CaseTable, task: TaskSpec) -> CaseTable:
    """Return the cases of a task, labelled with its classes alone.

    Raises:
        ConfigError: a column, value or class that no case has.
    """
    (whole,) = [target for target in table.targets if target.column == task.column]
    classes = task.classes or whole.classes
    if unknown := [name for name in classes if name not in whole.classes]:
        raise ConfigError(
            f"task {task.name}: column {task.column} has no {listed(unknown)} (it has "
            f"{listed(whole.classes)}); correct its classes"
        )
    cells = {case.case_id: {**case.columns, "site": case.site} for case in table.cases}
    for column, values in task.where.items():
        present = {cell.get(column) for cell in cells.values()}
        if missing := [value for value in values if value not in present]:
            raise ConfigError(
                f"task {task.name}: no case has {listed(missing)} in column {column}; correct "
                "where, or the cohort table"
            )
    cases = []
    for case in table.cases:
        (number,) = case.targets[task.column]
        label = whole.classes[int(number)] if number == number else None
        fits = all(cells[case.case_id].get(name) in v for name, v in task.where.items())
        if label in classes and fits:
            own = {task.column: (float(classes.index(label)),)}
            cases.append(dataclasses.replace(case, targets=own))
    target = whole.model_copy(update={"classes": tuple(classes)})
    if len({case.targets[task.column] for case in cases}) < 2:
        raise ConfigError(
            f"task {task.name}: its {len(cases)} cases have fewer than two of the classes "
            f"{listed(tuple(classes))}; correct its classes or where"
        )
    return dataclasses.replace(table, cases=tuple(cases), targets=(target,))


def truth_files(folder: Path, cases: Sequence[Case]) -> dict[str, Path]:
    """Return what is known of each slide's tiles: GeoJSON, or `<slide_id>.npy` of planted ones.

    Raises:
        ConfigError: no such folder, or nothing in it of any slide.
    """
    from bagscope.wsi.roi import load

    if not folder.is_dir():
        raise ConfigError(f"--annotations {folder}: no such folder")
    found: dict[str, Path] = {}
    for slide_id in (slide_id for case in cases for slide_id in case.slide_ids):
        array = folder / f"{slide_id}.npy"
        path = array if array.is_file() else load(folder, slide_id)
        if path is not None:
            found[slide_id] = path
    if not found:
        raise ConfigError(
            f"--annotations {folder}: has no file of any slide; a file is called by its slide's "
            "id, with .geojson, or .npy for a number per tile"
        )
    return found


def continual_run(
    study: Study,
    request: TrainRequest,
    tasks: Path,
    annotations: Path | None,
    report: Reporter,
) -> ContinualResult:
    """Train and test every sequence, and write what is left of each task; resumes at the epoch.

    Raises:
        ConfigError, CohortError, ArtifactError: as of `plan_continual`.
    """
    from bagscope.pipeline.continual_tables import summed_up, table_of

    planned = plan_continual(study, request, tasks, annotations)
    stage = f"{STAGE}/{planned.folder.name}"
    options = dataclasses.replace(
        run_options(study.spec.run, None, "local", preload=WORKER_MODULES),
        workers=worker_count(study.spec.run, request.device),
        sweep=(planned.folder, *(task.folder for task in planned.sequences.values())),
        noun="sequence",
    )
    trained = run_cohort(
        [Job(slide_id=name, payload=task) for name, task in planned.sequences.items()],
        train_one,
        stage=stage,
        status_dir=study.status_folder,
        options=options,
        report=report,
        on_message=_listener(stage, report),
    )
    result = ContinualResult(
        folder=planned.folder, trained=trained, tested=None, found=None, notes=planned.notes
    )
    if trained.exit_code:
        return result
    tested = run_cohort(
        [Job(slide_id=name, payload=test) for name, test in planned.tests.items()],
        test_one,
        stage=f"{TEST_STAGE}/{planned.folder.name}",
        status_dir=study.status_folder,
        options=options,
        report=report,
    )
    if tested.exit_code:
        return dataclasses.replace(result, tested=tested)
    found: dict[str, Json] = summed_up(planned)
    artifacts.write_json(planned.folder / RESULT_NAME, found)
    artifacts.write_text(planned.folder / TABLE_NAME, table_of(found))
    bundles = bundle_tasks(planned)
    return dataclasses.replace(result, tested=tested, found=found, bundles=bundles)


def bundle_tasks(planned: PlannedSequences) -> dict[str, Path]:
    """Write a bundle per task, of every sequence's adapted model at the end; return their paths."""
    from bagscope.mil.bundle import MemberPlace
    from bagscope.pipeline.bundle import bundle_members
    from bagscope.pipeline.continual_worker import left_folder

    first = next(iter(planned.sequences.values()))
    bundles = {}
    for number, task in enumerate(planned.spec.tasks):
        learnt = [one.tasks[number] for one in planned.sequences.values()]
        bundles[task.name] = planned.folder / f"{task.name}.bagscope"
        bundle_members(
            bundles[task.name],
            # Predictions of a study are kept by this name: those of two tasks must not meet.
            run=f"{planned.folder.name}_{task.name}",
            per=first.recipe.bags.per,
            location=first.location,
            learnt_from=[case for one in learnt for case in (*one.train, *one.inner)],
            members=[
                (
                    MemberPlace(name=name, repeat=one.repeat, fold=one.fold, seed=one.seed),
                    left_folder(one, number),
                )
                for name, one in planned.sequences.items()
            ],
        )
    return bundles


def train_one(job: Job) -> StageResult:
    """Train one sequence, in a worker."""
    from bagscope.pipeline.continual_worker import train_sequence

    return train_sequence(job.slide_id, job.payload)


def test_one(job: Job) -> StageResult:
    """Test one sequence, in a worker."""
    from bagscope.pipeline.continual_worker import test_sequence

    return test_sequence(job.slide_id, job.payload)


def _listener(stage: str, report: Reporter) -> Any:
    import json

    from bagscope.cohort.progress import SlideTold

    def on_message(name: str, message: bytes) -> None:
        if message:
            facts = json.loads(message)
            text = facts.pop("text")
            report.emit(SlideTold(stage=stage, slide_id=name, text=text, facts=facts))

    return on_message
