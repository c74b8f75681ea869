"""Bags that never were a slide: `.npz` of one or many bags, and CSV with one row per instance.

npz, many bags:  `x` (instances, D), `bag` (instances,) whole numbers from 0, `y` (bags,) optional,
                 `inst` (instances,) optional, a label per instance
npz, one bag:    `x` or `features` (N, D), `coords` (N, 2) optional, `y` or `label` optional
CSV:             a column `bag` (or `bag_id`, `slide_id`), optionally `label` (or `y`), and numbers
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bagscope.errors import SchemaError
from bagscope.features.interop.foreign import (
    ForeignBag,
    SlideFacts,
    Source,
    as_coords,
    as_features,
    label_text,
    readable,
)

if TYPE_CHECKING:
    import pandas as pd

BAG_COLUMNS = ("bag", "bag_id", "slide_id")
LABEL_COLUMNS = ("label", "y")
FEATURE_KEYS = ("x", "features")
LABEL_KEYS = ("y", "label")


def find(path: Path) -> list[Source]:
    """Return the bags of an npz or CSV.

    Raises:
        SchemaError: it holds no bags.
    """
    if path.suffix.lower() == ".csv":
        keys = list(dict.fromkeys(_table(path)[0].tolist()))
        return [Source(layout="plain", slide_id=key, path=path, key=key) for key in keys]
    arrays = _arrays(path)
    if "bag" not in arrays:
        if not any(name in arrays for name in FEATURE_KEYS):
            raise SchemaError(
                f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}, expected x (or features) "
                "and, for several bags, bag and y"
            )
        return [Source(layout="plain", slide_id=path.stem, path=path)]
    count = _bag_count(path, arrays)
    digits = len(str(max(count - 1, 0)))
    return [
        Source(layout="plain", slide_id=f"{path.stem}_{bag:0{digits}d}", path=path, key=str(bag))
        for bag in range(count)
    ]


def read(source: Source, slide: SlideFacts | None) -> ForeignBag:
    """Read one bag of an npz or CSV.

    Raises:
        SchemaError: its arrays or columns don't fit together.
    """
    if source.path.suffix.lower() == ".csv":
        bags, labels, values = _table(source.path)
        rows = bags == source.key
        return ForeignBag(
            features=values[rows], label=_one_label(source.path, source.key, labels[rows])
        )
    arrays = _arrays(source.path)
    name = next((name for name in FEATURE_KEYS if name in arrays), "")
    if not name:
        raise SchemaError(f"{source.path}: lacks the array x (or features)")
    if source.key:
        rows = arrays["bag"] == int(source.key)
        features = as_features(source.path, arrays[name])[rows]
        label = label_text(arrays["y"][int(source.key)]) if "y" in arrays else None
        instance = arrays["inst"][rows] if "inst" in arrays else None
        return ForeignBag(features=features, label=label, tile_labels=instance)
    given = next((arrays[name] for name in LABEL_KEYS if name in arrays), None)
    if given is not None and given.size != 1:
        raise SchemaError(
            f"{source.path}: holds {given.size} labels for one bag; add the array bag"
        )
    return ForeignBag(
        features=as_features(source.path, arrays[name]),
        coords=as_coords(source.path, arrays["coords"]) if "coords" in arrays else None,
        label=None if given is None else label_text(given.reshape(-1)[0]),
        tile_labels=arrays.get("inst"),
    )


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    stat = path.stat()
    return _loaded(path, stat.st_mtime_ns, stat.st_size)


# One file holds hundreds of bags, which are read one after the other.
@functools.lru_cache(maxsize=1)
def _loaded(path: Path, mtime_ns: int, size_bytes: int) -> dict[str, NDArray[Any]]:
    with readable(path), np.load(path) as arrays:
        return {name: arrays[name] for name in arrays}


def _bag_count(path: Path, arrays: dict[str, NDArray[Any]]) -> int:
    bag = arrays["bag"]
    rows = next((len(arrays[name]) for name in FEATURE_KEYS if name in arrays), 0)
    if bag.dtype.kind not in "iu" or bag.ndim != 1 or len(bag) != rows or not rows:
        raise SchemaError(
            f"{path}: bag is {bag.dtype} {bag.shape} beside {rows} instances; give one whole "
            "number per instance"
        )
    count = int(bag.max()) + 1
    numbers = np.unique(bag)
    if not np.array_equal(numbers, np.arange(count)):
        raise SchemaError(
            f"{path}: bag has {len(numbers)} values from {numbers[0]} to {numbers[-1]}; number the "
            "bags 0, 1, 2, ... without a gap"
        )
    if "y" in arrays and arrays["y"].shape != (count,):
        raise SchemaError(
            f"{path}: y is {arrays['y'].shape} for {count} bags; give one label per bag"
        )
    if "inst" in arrays and arrays["inst"].shape != (rows,):
        raise SchemaError(
            f"{path}: inst is {arrays['inst'].shape} for {rows} instances; give one per instance"
        )
    return count


def _table(path: Path) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float64]]:
    stat = path.stat()
    return _read_table(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _read_table(
    path: Path, mtime_ns: int, size_bytes: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float64]]:
    """Return bag names (N,), labels (N,) as text, empty for none, and features (N, D)."""
    import pandas as pd

    with readable(path):
        header = list(pd.read_csv(path, nrows=0).columns)
        named = [name for name in (*BAG_COLUMNS, *LABEL_COLUMNS) if name in header]
        frame = pd.read_csv(path, dtype=dict.fromkeys(named, str), keep_default_na=False)
    bag = next((name for name in BAG_COLUMNS if name in header), None)
    if bag is None:
        raise SchemaError(
            f"{path}: none of its columns ({', '.join(header[:8])}) names the bag; call it "
            f"{' or '.join(BAG_COLUMNS)}"
        )
    label = next((name for name in LABEL_COLUMNS if name in header), None)
    values = frame.drop(columns=[name for name in (bag, label) if name is not None])
    _require_numbers(path, values)
    if not len(values) or not values.shape[1]:
        raise SchemaError(f"{path}: {len(values)} rows of {values.shape[1]} features; add some")
    labels = frame[label].to_numpy(str) if label else np.full(len(frame), "")
    return frame[bag].to_numpy(str), labels, values.to_numpy(np.float64)


def _require_numbers(path: Path, values: pd.DataFrame) -> None:
    for name in values.columns:
        if values[name].dtype.kind not in "fiu":
            import pandas as pd

            wrong = pd.to_numeric(values[name], errors="coerce").isna()
            row = int(wrong.to_numpy().argmax())
            raise SchemaError(
                f"{path}: row {row + 2}, column {name}: {values[name].iloc[row]!r} is not a "
                "number; leave the column out, or correct it"
            )


def _one_label(path: Path, bag: str, labels: NDArray[Any]) -> str | None:
    found = list(dict.fromkeys(labels.tolist()))
    if len(found) > 1:
        raise SchemaError(
            f"{path}: bag {bag!r} has the labels {', '.join(map(repr, found[:3]))}; give it one"
        )
    return found[0] or None
