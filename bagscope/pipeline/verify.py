"""Every artefact of a study, checked: what the command and the library call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from bagscope.artifacts import COMPLETE_NAME, read_json
from bagscope.cohort.status import read_status
from bagscope.errors import ArtifactError, BagscopeError, ConfigError
from bagscope.features.store import FeatureStore
from bagscope.features.verify import Fault, verify_feature_file, verify_folder, verify_tile_file
from bagscope.pipeline.study import COHORT_NAME, STUDY_NAME, available_cores, open_study

_FOLDER_SUFFIXES = (".zarr", ".bagscope")
_SCORES = ("runs/*/scores/[!.]*.h5", "predictions/*/*/scores/[!.]*.h5")
_STAGE_FOLDERS = (
    "tilings", "features", "runs", "predictions", "heatmaps", "explanations", "review",
)  # fmt: skip

Check = Callable[[], list[Fault]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What was found.

    Attributes:
        artefacts: how many were looked at.
        faults: in order of path; empty where all is well.
    """

    artefacts: int
    faults: tuple[Fault, ...]

    @property
    def exit_code(self) -> int:
        """Return 1 where there is any fault."""
        return int(bool(self.faults))


def verify_study(
    folder: Path,
    advance: Callable[[int, int], None] | None = None,
    *,
    workers: int | None = None,
) -> Verification:
    """Check every artefact below a study folder.

    Args:
        folder: of the study.
        advance: is told (done, total) after each artefact.
        workers: threads; one per core if not set.

    Raises:
        ConfigError: no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no study here; give the folder of a study")
    tile_files = _found(folder / "tilings", "*/[!.]*.h5")
    feature_files = _found(folder / "features", "*/*/[!.]*.h5")
    folders = _artefact_folders(folder)
    inside = set(folders)
    feature_files = [path for path in feature_files if not inside & set(path.parents)]
    patterns = ("tilings/*/[!.]*.json", "features/*/*/[!.]*.json")
    records = [path for pattern in patterns for path in _found(folder, pattern)]
    records = [path for path in records if not inside & set(path.parents)]
    first: list[Check] = [lambda: _study_faults(folder)]
    first += [_of(verify_tile_file, path) for path in tile_files]
    first += [_of(verify_folder, path) for path in folders]
    score_files = [path for pattern in _SCORES for path in _found(folder, pattern)]
    first += [_of(_score_faults, path) for path in score_files]
    first += [_of(_record_faults, path) for path in records]
    first += [_of(_status_faults, path) for path in _found(folder, "status/**/[!.]*.json")]
    stores = sorted({path.parent for path in feature_files})
    total = len(first) + len(feature_files) + len(stores)
    done = 0
    faults: list[Fault] = []

    def run(pool: ThreadPoolExecutor, checks: Iterable[Check]) -> None:
        nonlocal done
        for future in as_completed([pool.submit(check) for check in checks]):
            faults.extend(future.result())
            done += 1
            if advance is not None:
                advance(done, total)

    with ThreadPoolExecutor(workers or available_cores()) as pool:
        run(pool, first)
        # Features are compared with sound tile files only; a damaged one is a fault by itself.
        damaged = {fault.path for fault in faults}
        run(pool, [_of_features(folder, path, damaged) for path in feature_files])
        damaged |= {fault.path for fault in faults}
        run(pool, [_of_store(store, feature_files, damaged) for store in stores])
    return Verification(artefacts=total - len(stores), faults=tuple(sorted(faults)))


def _of(check: Callable[[Path], list[Fault]], path: Path) -> Check:
    return lambda: check(path)


def _of_features(folder: Path, path: Path, damaged: set[Path]) -> Check:
    tiling = folder / "tilings" / path.parent.parent.name
    tiles = tiling / path.name

    def check() -> list[Fault]:
        if tiles in damaged or not tiling.is_dir():
            return verify_feature_file(path)
        if tiles.is_file():
            return verify_feature_file(path, tiles=tiles)
        return verify_feature_file(path) or _orphan_faults(path, tiles)

    return check


def _of_store(store: Path, files: list[Path], damaged: set[Path]) -> Check:
    def check() -> list[Fault]:
        if any(path in damaged for path in files if path.parent == store):
            return []
        try:
            FeatureStore.open(store).describe()
        except BagscopeError as error:
            return [Fault(store, str(error).removeprefix(f"{store}: "))]
        return []

    return check


def _orphan_faults(path: Path, tiles: Path) -> list[Fault]:
    from bagscope.features.feature_file import read_feature_file

    if "tiles" not in read_feature_file(path).fields:
        return []  # imported
    return [Fault(path, f"its tile file {tiles} is missing; run bagscope tile")]


def _study_faults(folder: Path) -> list[Fault]:
    """Return whether study.yaml and the cohort table can be read."""
    try:
        study = open_study(folder)
    except ConfigError as error:
        return [_told_by(folder / STUDY_NAME, error)]
    try:
        study.cohort()
    except BagscopeError as error:
        return [_told_by(folder / COHORT_NAME, error)]
    return []


def _record_faults(path: Path) -> list[Fault]:
    """Return whether a JSON file can be read."""
    try:
        read_json(path)
    except ArtifactError as error:
        return [_told_by(path, error)]
    return []


def _status_faults(path: Path) -> list[Fault]:
    """Return whether a status file can be read and is one."""
    try:
        read_status(path.parent.parent, path.parent.name, path.stem)
    except (ArtifactError, TypeError, ValueError) as error:
        return [_told_by(path, error)]
    return []


def _score_faults(path: Path) -> list[Fault]:
    """Return what is wrong with a score file."""
    from bagscope.mil.score_file import score_file_faults  # brings torch, which few need here

    return [Fault(path, sentence) for sentence in score_file_faults(path)]


def _told_by(path: Path, error: Exception) -> Fault:
    return Fault(path, str(error).removeprefix(f"{path}: "))


def _found(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def _artefact_folders(folder: Path) -> list[Path]:
    """Return every folder artefact, and every folder that by its name should be one.

    Only where stages write: the study folder may hold slides too, and a slide may be a Zarr folder.
    """
    found: set[Path] = set()
    for stage in _STAGE_FOLDERS:
        complete = {path.parent for path in (folder / stage).rglob(COMPLETE_NAME)}
        found |= complete
        for suffix in _FOLDER_SUFFIXES:
            # One inside an artefact, as the Zarr of a heatmap, is vouched for by that.
            found |= {
                path
                for path in (folder / stage).rglob(f"*{suffix}")
                if path.is_dir() and complete.isdisjoint(path.parents)
            }
    # Hidden ones are being written, or were left by a killed writer: nobody takes them for done.
    return sorted(
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
