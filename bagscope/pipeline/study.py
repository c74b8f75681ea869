"""The study folder: its YAML, its cohort table, and where each stage's files lie in it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
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
from bagscope.pipeline.study_template import study_template
from bagscope.specs import Spec, parse_spec
from bagscope.wsi.tiling import TilingSpec, tiling_name

STUDY_NAME = "study.yaml"
COHORT_NAME = "cohort.csv"
_HEAD = (
    "The settings of this study; `bagscope run` works through all of it.",
    "A line such as #mpp: 0.5 states a default. To set it, take the # away and change the value.",
    "Names that there are not are refused. What was set stands in every result.",
)
_TITLES = {
    "tiling": "How slides are cut into tiles. Keep to the pixel size that the encoder is made for.",
    "features": "What turns a tile into numbers. `bagscope encoders list` names all and licences.",
    "targets": "What models are to predict. With a target, `bagscope run` trains them too.\n"
    "Survival needs time and event, every other task a column.",
    "splits": "Who is learnt from and who is tested on: always whole patients.",
    "train": "Which model is trained on each fold.",
    "run": "How the work is shared out. Nothing here changes a result.",
}


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

    def feature_folders(self) -> list[Path]:
        """Return the folders of all tilings and encoders that have features."""
        return sorted((self.folder / "features").glob("[!.]*/[!.]*"))

    def feature_pairs(self) -> list[str]:
        """Return FINE::COARSE of any two of them of different tilings, aligned or not."""
        from bagscope.features.aligned_store import SEPARATOR

        return [
            f"{fine}{SEPARATOR}{coarse}"
            for fine, coarse in itertools.permutations(self.feature_folders(), 2)
            if fine.parent != coarse.parent
        ]

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
    values = _read_study_yaml(path) if path.exists() else {}
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


def init_study(
    folder: Path,
    source: str,
    *,
    labels: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    to_fill: Sequence[str] = (),
) -> tuple[Study, Cohort]:
    """Make a study folder from a table, a folder or a glob of slides.

    A study that is already there is kept as it is when it holds the same cohort and settings.

    Args:
        folder: of the study.
        source: of the slides.
        labels: a clinical table to join.
        settings: of study.yaml, nested, over the defaults.
        to_fill: columns that the table gets though nothing stands in them yet.

    Raises:
        ConfigError: the folder holds a study of another cohort or with other settings, a setting
            does not fit, or the folder can't be written.
    """
    cohort = load_cohort(source, labels=labels)
    given = settings or {}
    parse_spec(StudySpec, given, where="options")
    path = folder / COHORT_NAME
    if path.exists():
        existing = load_cohort(path)
        if _slides_of(existing) != _slides_of(cohort):
            raise ConfigError(
                f"{path}: holds {len(existing.rows)} slides that are not the {len(cohort.rows)} of "
                f"{source}; choose another study folder, or edit the table"
            )
    if (folder / STUDY_NAME).exists():
        _require_set(folder / STUDY_NAME, given)
    try:
        if not path.exists():
            write_cohort_csv(cohort, path, also=to_fill)
        # An earlier init may have been killed between the two.
        if not (folder / STUDY_NAME).exists():
            artifacts.write_text(folder / STUDY_NAME, _template(given))
    except ArtifactError as error:
        raise ConfigError(str(error)) from error
    return open_study(folder), cohort


def _require_set(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse settings that a study.yaml does not have: its edits are the user's own."""
    there = _read_study_yaml(path)
    found = parse_spec(StudySpec, there, where=str(path))
    for section, own in settings.items():
        wanted = {**there.get(section, {}), **own} if isinstance(own, Mapping) else own
        asked = parse_spec(StudySpec, {**there, section: wanted}, where="options")
        if getattr(found, section) != getattr(asked, section):
            raise ConfigError(
                f"{path}: is there already, with another {section}; init changes no study.yaml, "
                "edit it yourself"
            )


def _slides_of(cohort: Cohort) -> list[tuple[str, str]]:
    # A table states paths relative to itself, so one file may come as different texts.
    return [(row.slide_id, os.path.normpath(row.path)) for row in cohort.rows]


def _template(settings: Mapping[str, Any]) -> str:
    """Return a study.yaml that states every setting, its default and its meaning."""
    from bagscope.pipeline.recipes import recipe_names

    return study_template(
        StudySpec,
        head=_HEAD,
        titles=_TITLES,
        choices={"train.recipe": recipe_names()},
        settings={"cohort": COHORT_NAME, **settings},
    )


def _read_study_yaml(path: Path) -> dict[str, Any]:
    # A block with nothing in it, as `init` writes it, is all defaults.
    return {name: value for name, value in read_yaml(path).items() if value is not None}


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
