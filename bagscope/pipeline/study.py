"""The study folder: its YAML, its cohort table, and where each stage's files lie in it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from bagscope import artifacts
from bagscope.cohort.table import Cohort, load_cohort, write_cohort_csv
from bagscope.errors import ArtifactError, ConfigError
from bagscope.features.extraction import ExtractSpec
from bagscope.mil.splits.plan import SplitSpec
from bagscope.mil.targets import TargetSpec
from bagscope.specs import Spec, parse_spec
from bagscope.wsi.tiling import TilingSpec, tiling_name

STUDY_NAME = "study.yaml"
COHORT_NAME = "cohort.csv"
_TARGETS = (
    "targets: []  # what models are to predict; with lines such as these, run goes on to train:",
    "#  - {column: label}  # classes; with task: ordinal, multilabel or regression, those",
    "#  - {task: survival, time: days, event: died}",
)


class RunSpec(Spec):
    """How a cohort is worked through. Nothing here changes a result."""

    workers: int | None = Field(
        default=None, ge=1, description="worker processes; one per core if not set"
    )
    timeout_minutes: float = Field(
        default=30.0, gt=0, description="longest that one slide may take"
    )
    memory_limit_gib: float = Field(
        default=8.0, gt=0, description="most that one worker may grow to"
    )
    stale_claim_minutes: float = Field(
        default=5.0, gt=0, description="silence after which another host's claim is taken over"
    )

    @property
    def worker_count(self) -> int:
        """Return how many worker processes to use."""
        return self.workers or available_cores()


class RecipeSpec(Spec):
    """Which model is trained by `run`."""

    recipe: str = Field(default="abmil", description="name of a recipe, or a YAML file")
    options: Mapping[str, Any] = Field(default={}, description="laid over the recipe's own")
    seeds: tuple[int, ...] = Field(default=(0,), description="one model per fold and seed")


class StudySpec(Spec):
    """The content of study.yaml."""

    cohort: str = Field(
        default=COHORT_NAME, description="the cohort table, relative to the study folder"
    )
    labels: str | None = Field(default=None, description="clinical table to join by patient_id")
    tiling: TilingSpec = TilingSpec()
    features: ExtractSpec = ExtractSpec()
    targets: tuple[TargetSpec, ...] = Field(default=(), description="what models are to predict")
    splits: SplitSpec = SplitSpec()
    train: RecipeSpec = RecipeSpec()
    run: RunSpec = RunSpec()


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """An opened study folder."""

    folder: Path
    spec: StudySpec

    @property
    def cohort_path(self) -> Path:
        """Return where the cohort table lies."""
        return self.folder / self.spec.cohort

    def cohort(self) -> Cohort:
        """Load the cohort table, joined with the clinical table where the study names one."""
        labels = self.folder / self.spec.labels if self.spec.labels else None
        return load_cohort(self.cohort_path, labels=labels)

    def tiling_folder(self, name: str) -> Path:
        """Return the folder of a tiling."""
        return self.folder / "tilings" / name

    def features_folder(self, tiling: str) -> Path:
        """Return the folder under which the features of a tiling lie, by encoder."""
        return self.folder / "features" / tiling

    def extracted_encoders(self) -> list[str]:
        """Return the encoders that the study's own tiling has features of, in order of name."""
        folder = self.features_folder(tiling_name(self.spec.tiling))
        return sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())

    @property
    def status_folder(self) -> Path:
        """Return the folder under which every stage keeps its status files and claims."""
        return self.folder / "status"


def open_study(folder: Path, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Study:
    """Open a study folder.

    Args:
        folder: of a study; `study.yaml` may be absent, which means all defaults.
        overrides: options given on the command line by section, None where not given.

    Raises:
        ConfigError: no such study, or its YAML does not fit.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no study here; make one with bagscope init {folder} --slides SLIDES"
        )
    path = folder / STUDY_NAME
    values = read_yaml(path) if path.exists() else {}
    for section, options in (overrides or {}).items():
        given = {name: value for name, value in options.items() if value is not None}
        if given:
            stored = values.get(section) or {}
            if not isinstance(stored, dict):
                raise ConfigError(f"{path}: {section} is {stored!r}, expected a block of options")
            values[section] = {**stored, **given}
    spec = parse_spec(StudySpec, values, where=str(path) if path.exists() else "options")
    study = Study(folder=folder, spec=spec)
    if not study.cohort_path.exists():
        raise ConfigError(
            f"{study.cohort_path}: no cohort table; make one with "
            f"bagscope init {folder} --slides SLIDES"
        )
    return study


def init_study(folder: Path, source: str, *, labels: Path | None = None) -> tuple[Study, Cohort]:
    """Make a study folder from a table, a folder or a glob of slides.

    A study that is already there is kept when it holds the same cohort.

    Raises:
        ConfigError: the folder holds a study of another cohort, or can't be written.
    """
    cohort = load_cohort(source, labels=labels)
    path = folder / COHORT_NAME
    if path.exists():
        existing = load_cohort(path)
        if _slides_of(existing) != _slides_of(cohort):
            raise ConfigError(
                f"{path}: holds {len(existing.rows)} slides that are not the {len(cohort.rows)} of "
                f"{source}; choose another study folder, or edit the table"
            )
    try:
        if not path.exists():
            write_cohort_csv(cohort, path)
        # An earlier init may have been killed between the two.
        if not (folder / STUDY_NAME).exists():
            artifacts.write_text(folder / STUDY_NAME, _template())
    except ArtifactError as error:
        raise ConfigError(str(error)) from error
    return open_study(folder), cohort


def _slides_of(cohort: Cohort) -> list[tuple[str, str]]:
    # A table states paths relative to itself, so one file may come as different texts.
    return [(row.slide_id, os.path.normpath(row.path)) for row in cohort.rows]


def _template() -> str:
    """Return a study.yaml that states every option, its default and its meaning."""
    lines = [f"cohort: {COHORT_NAME}"]
    blocks: tuple[tuple[str, type[Spec], Collection[str]], ...] = (
        ("tiling", TilingSpec, TilingSpec.model_fields),
        ("features", ExtractSpec, ExtractSpec.model_fields),
        # The other options belong to one method or another, and would be refused beside this one.
        ("splits", SplitSpec, ("method", "folds", "val_share", "seed")),
        ("train", RecipeSpec, RecipeSpec.model_fields),
        ("run", RunSpec, RunSpec.model_fields),
    )
    for section, kind, names in blocks:
        if section == "splits":
            lines += ["", *_TARGETS]
        lines += ["", f"{section}:"]
        for name in names:
            field = kind.model_fields[name]
            value = field.get_default()
            if isinstance(value, Spec):
                value = value.model_dump(mode="json")
            elif isinstance(value, tuple):
                value = list(value)
            text = yaml.safe_dump(value, default_flow_style=True, width=200).splitlines()[0]
            lines.append(f"  {f'{name}: {text}':<28}  # {field.description}")
    return "\n".join(lines) + "\n"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds blocks of options; an empty one holds none.

    Raises:
        ConfigError: not readable, not YAML, or something else than blocks.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path}: not readable as YAML ({' '.join(str(error).split())})"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: could not be read ({error})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, expected a block of options")
    return values


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
