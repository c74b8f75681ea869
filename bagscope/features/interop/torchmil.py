"""torchmil: folders `features`, `coords`, `labels`, `patch_labels` with one npy or h5 per bag.

The layout does not say in which frame coordinates are. They are taken as level-0 corners, and the
import says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from bagscope.artifacts import atomic_file
from bagscope.errors import SchemaError, SlideError
from bagscope.features.interop.foreign import (
    ForeignBag,
    SlideFacts,
    Source,
    as_coords,
    as_features,
    label_text,
    readable,
)
from bagscope.features.interop.writing import OurBag

SUFFIXES = (".npy", ".h5")
FOLDERS = {
    "coords": ("coords", "coords_path"),
    "labels": ("labels", "labels_path"),
    "tile_labels": ("patch_labels", "inst_labels", "inst_labels_path"),
}
FEATURE_FOLDERS = ("features", "features_path")
_FEATURE_PREFIX = "features_"
_DATASETS = {"coords": "coords", "labels": "labels", "tile_labels": "labels"}


def find(folder: Path) -> list[Source]:
    """Return the bags of a torchmil folder, or none where the folder is no such thing."""
    if not any((folder / name).is_dir() for names in FOLDERS.values() for name in names):
        return []
    found = []
    for path in _feature_files(folder):
        companions: dict[str, Path] = {}
        for role, names in FOLDERS.items():
            for candidate in (folder / n / f"{path.stem}{s}" for n in names for s in SUFFIXES):
                if candidate.is_file():
                    companions.setdefault(role, candidate)
        found.append(
            Source(layout="torchmil", slide_id=path.stem, path=path, companions=companions)
        )
    return found


def _feature_files(folder: Path) -> list[Path]:
    for root in (folder / name for name in FEATURE_FOLDERS):
        for place in (root, *sorted(root.glob(f"{_FEATURE_PREFIX}*"))):
            files = sorted(p for p in place.glob("[!.]*") if p.suffix in SUFFIXES)
            if files:
                return files
    return []


def read(source: Source, slide: SlideFacts | None) -> ForeignBag:
    """Read a bag of a torchmil folder.

    Raises:
        SchemaError: a file is not what torchmil reads.
    """
    values = {role: _array(path, role) for role, path in source.companions.items()}
    folder = source.path.parent.name
    coords, label = values.get("coords"), values.get("labels")
    return ForeignBag(
        features=as_features(source.path, _array(source.path, "features")),
        coords=None if coords is None else as_coords(source.companions["coords"], coords),
        encoder=folder.removeprefix(_FEATURE_PREFIX) if folder.startswith(_FEATURE_PREFIX) else "",
        label=None if label is None else _label(source.companions["labels"], label),
        tile_labels=values["tile_labels"].reshape(-1) if "tile_labels" in values else None,
        warnings=()
        if coords is None
        else ("torchmil does not say what its coordinates mean; taken as level-0 corners",),
    )


def _array(path: Path, role: str) -> NDArray[Any]:
    with readable(path):
        if path.suffix == ".npy":
            array: NDArray[Any] = np.load(path)
            return array
        name = _DATASETS.get(role, "features")
        with h5py.File(path, "r") as file:
            array = file[name][()]
            return array


def _label(path: Path, values: NDArray[Any]) -> str:
    if values.size != 1:
        raise SchemaError(f"{path}: holds {values.size} labels, expected one per bag")
    return label_text(values.reshape(-1)[0])


# --- writing --------------------------------------------------------------------------------


def plan(bag: OurBag, out: Path) -> list[Path]:
    """Return the files that `write` makes, features last."""
    roles = {
        "coords": bag.file.coords_l0 is not None,
        "labels": bag.label is not None,
        "patch_labels": bag.tile_labels is not None,
    }
    files = [out / role / f"{bag.slide_id}.npy" for role, there in roles.items() if there]
    return [*files, out / "features" / f"{_FEATURE_PREFIX}{bag.encoder}" / f"{bag.slide_id}.npy"]


def write(bag: OurBag, out: Path) -> None:
    """Write a bag as one npy per folder: float32 features, int64 corners, labels as far as known.

    Raises:
        SlideError: its label is not a number, as torchmil's are.
    """
    contents: dict[str, NDArray[Any] | None] = {
        "coords": None if bag.file.coords_l0 is None else bag.file.coords_l0.astype(np.int64),
        "labels": None if bag.label is None else _as_number(bag),
        "patch_labels": bag.tile_labels,
    }
    arrays = [*(values for values in contents.values() if values is not None), bag.float32()]
    for path, values in zip(plan(bag, out), arrays, strict=True):
        with atomic_file(path) as temporary, temporary.open("wb") as handle:
            np.save(handle, values)


def _as_number(bag: OurBag) -> NDArray[Any]:
    assert bag.label is not None
    try:
        value = float(bag.label)
    except ValueError as error:
        raise SlideError(
            f"{bag.file.path}: its label is {bag.label!r}, and torchmil's are numbers; number the "
            "classes in the column label"
        ) from error
    return np.array([int(value) if value.is_integer() else value])
