"""CLAM: features as h5 and pt without a word about tiles, which stand in `patches/<slide>.h5`.

CLAM's `patch_size` is in pixels of `patch_level`; the level-0 footprint is `patch_size` times that
level's downsample (and `custom_downsample` in old files).
"""

from __future__ import annotations

from collections.abc import Mapping
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
    attributes_of,
    load_tensor,
    number,
    readable,
    whole,
)
from bagscope.features.interop.writing import OurBag, required

ANCESTORS_SEARCHED = 3
"""How far above the features the folder `patches/` is looked for."""

_CHUNK_ROWS = 32
_NO_TILING = (
    "the tile size is not known: CLAM keeps it in patches/<slide>.h5, and there is no such folder "
    "near the features"
)
_NO_COORDS = (
    "the tiles' places are not known: a pt holds features alone, and neither h5_files/ nor "
    "patches/ is near it; such bags can be trained on, and give no heatmaps"
)


def find_companions(path: Path, slide_id: str) -> dict[str, Path]:
    """Return what lies beside a feature file: the coordinates' file, and the h5 of a pt."""
    found = {}
    for folder in list(path.parents)[:ANCESTORS_SEARCHED]:
        coordinates = folder / "patches" / f"{slide_id}.h5"
        if coordinates.is_file() and coordinates != path:
            found["tiling"] = coordinates
            break
    twin = path.parent.parent / "h5_files" / f"{slide_id}.h5"
    if path.suffix == ".pt" and twin.is_file():
        found["coords"] = twin
    return found


def read(source: Source, slide: SlideFacts | None) -> ForeignBag:
    """Read a bag that CLAM wrote.

    Raises:
        SchemaError: the file is not what CLAM writes.
        SlideError: coordinates and features don't belong together.
    """
    if source.path.suffix == ".pt":
        features, coords = as_features(source.path, load_tensor(source.path)), None
        if "coords" in source.companions:
            coords = _coords(source.companions["coords"])
    else:
        with readable(source.path), h5py.File(source.path, "r") as file:
            features = as_features(source.path, file["features"][()])
            coords = file["coords"][()] if "coords" in file else None
        coords = None if coords is None else as_coords(source.path, coords)
    tiling = source.companions.get("tiling")
    if tiling is None:
        return ForeignBag(
            features=features,
            coords=coords,
            warnings=(_NO_TILING if coords is not None else _NO_COORDS,),
        )
    placed = _coords(tiling)
    if coords is None:
        coords = placed
    elif not _same_places(coords, placed):
        raise SlideError(
            f"{tiling}: holds other coordinates ({len(placed)}) than {source.path} "
            f"({len(coords)}); give the patches folder that these features were made from"
        )
    with readable(tiling), h5py.File(tiling, "r") as file:
        attributes = attributes_of(file["coords"])
        if "patch_size" not in attributes and "imgs" in file:
            attributes = attributes_of(file["imgs"])
    size_px = whole(attributes, "patch_size", path=tiling)
    size_l0 = _level0_size(attributes)
    return ForeignBag(
        features=features,
        coords=coords,
        tile_px=size_px,
        extent_l0=extent_from_level(attributes, slide, path=tiling),
        width_l0=size_l0[0],
        height_l0=size_l0[1],
    )


def extent_from_level(
    attributes: Mapping[str, Any], slide: SlideFacts | None, *, path: Path
) -> float | None:
    """Return the level-0 footprint of a `patch_size` that is in pixels of `patch_level`.

    Raises:
        SlideError: the level's downsample stands neither in the file nor in a slide at hand.
    """
    size_lv = number(attributes, "patch_size", path=path)
    if size_lv is None:
        return None
    level = whole(attributes, "patch_level", path=path) or 0
    downsample = number(attributes, "downsample", path=path)
    if downsample is None:
        if level == 0:
            downsample = 1.0
        elif slide is not None and level < len(slide.downsamples):
            downsample = slide.downsamples[level]
        else:
            raise SlideError(
                f"{path}: tiles were read at level {level}, whose downsample the file does not "
                "state; give the slides with --slides TABLE"
            )
    custom = number(attributes, "custom_downsample", path=path) or 1.0
    return size_lv * downsample * custom


def _level0_size(attributes: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return (width, height) of level 0, which CLAM states only for tiles read there."""
    level_dim = np.asarray(attributes.get("level_dim", ())).reshape(-1)
    if len(level_dim) == 2 and int(attributes.get("patch_level", -1)) == 0:
        return int(level_dim[0]), int(level_dim[1])
    return None, None


def _coords(path: Path) -> NDArray[Any]:
    with readable(path), h5py.File(path, "r") as file:
        if "coords" not in file:
            raise SchemaError(f"{path}: lacks the dataset 'coords'; make the coordinates again")
        return as_coords(path, file["coords"][()])


def _same_places(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return len(one) == len(other) and bool(np.array_equal(one[:, :2], other[:, :2]))


# --- writing --------------------------------------------------------------------------------


def plan(bag: OurBag, out: Path) -> list[Path]:
    """Return the files that `write` makes: pt, and for tiles with places h5 and coordinates."""
    files = [out / "pt_files" / f"{bag.slide_id}.pt"]
    if bag.file.coords_l0 is not None:
        files.append(out / "h5_files" / f"{bag.slide_id}.h5")
        files.append(out / "patches" / f"{bag.slide_id}.h5")
    return files


def write(bag: OurBag, out: Path) -> None:
    """Write a bag as CLAM does, with tiles described as if read at level 0.

    Raises:
        SlideError: it has coordinates, but the tile or slide size is not known.
    """
    import torch

    features, coords = bag.float32(), bag.file.coords_l0
    pt_path, *h5_paths = plan(bag, out)
    if coords is not None:
        tile_px_l0, width_l0, height_l0 = required(
            bag, "CLAM", "tile_px_l0", "width_l0", "height_l0"
        )
        h5_path, tiling_path = h5_paths
        size_l0 = np.array([int(width_l0), int(height_l0)])
        with atomic_file(tiling_path) as temporary, h5py.File(temporary, "w") as file:
            dataset = file.create_dataset(
                "coords", data=coords, dtype=np.int64, maxshape=(None, 2), chunks=(_CHUNK_ROWS, 2)
            )
            dataset.attrs["patch_size"] = int(tile_px_l0)
            dataset.attrs["patch_level"] = 0
            dataset.attrs["downsample"] = np.array([1.0, 1.0])
            dataset.attrs["downsampled_level_dim"] = size_l0
            dataset.attrs["level_dim"] = size_l0
            dataset.attrs["name"] = bag.slide_id
            dataset.attrs["save_path"] = ""
        with atomic_file(h5_path) as temporary, h5py.File(temporary, "w") as file:
            for name, values in (("features", features), ("coords", coords)):
                width = values.shape[1]
                file.create_dataset(
                    name, data=values, chunks=(_CHUNK_ROWS, width), maxshape=(None, width)
                )
    with atomic_file(pt_path) as temporary, temporary.open("wb") as handle:
        torch.save(torch.from_numpy(features), handle)
