"""TRIDENT: `features_<encoder>/<slide>.h5`, with the tiling in attributes of `coords`.

`patch_size` is in pixels at the target magnification; `patch_size_level0` is the footprint. Older
files have neither, but CLAM's `patch_level`. No pixel size is stored: magnifications are rounded
to 5, 10, 20, 40, ..., so none is derived from them.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from bagscope.artifacts import atomic_file
from bagscope.features.interop.clam import extent_from_level
from bagscope.features.interop.encoder_names import foreign_name
from bagscope.features.interop.foreign import (
    ForeignBag,
    SlideFacts,
    Source,
    as_coords,
    as_features,
    attributes_of,
    number,
    readable,
    whole,
)
from bagscope.features.interop.writing import OurBag, coords_for, required

FOLDER_PREFIX = "features_"
UM_X_MAGNIFICATION = 10.0


def read(source: Source, slide: SlideFacts | None) -> ForeignBag:
    """Read a bag that TRIDENT wrote, now or in its first versions.

    Raises:
        SchemaError: the file is not what TRIDENT writes.
        SlideError: an old file whose tile size only the slide can tell.
    """
    path = source.path
    with readable(path), h5py.File(path, "r") as file:
        features = as_features(path, file["features"][()])
        coords = as_coords(path, file["coords"][()])
        tiling = attributes_of(file["coords"])
        encoder = str(attributes_of(file["features"]).get("encoder", ""))
    if not encoder and path.parent.name.startswith(FOLDER_PREFIX):
        encoder = path.parent.name.removeprefix(FOLDER_PREFIX)
    extent_l0 = number(tiling, "patch_size_level0", path=path)
    magnification = number(tiling, "target_magnification", path=path)
    return ForeignBag(
        features=features,
        coords=coords,
        encoder=encoder,
        tile_px=whole(tiling, "patch_size", path=path),
        extent_l0=extent_from_level(tiling, slide, path=path) if extent_l0 is None else extent_l0,
        mpp=None if magnification is None else UM_X_MAGNIFICATION / magnification,
        overlap_px=whole(tiling, "overlap", path=path),
        width_l0=whole(tiling, "level0_width", path=path),
        height_l0=whole(tiling, "level0_height", path=path),
    )


# --- writing --------------------------------------------------------------------------------


def plan(bag: OurBag, out: Path) -> list[Path]:
    """Return the files that `write` makes: features, coordinates."""
    coords_for(bag, "TRIDENT")
    mpp, tile_px = required(bag, "TRIDENT", "mpp", "tile_px")
    overlap_px = int(bag.attributes.get("overlap_px", 0))
    magnification = _as_whole(UM_X_MAGNIFICATION / mpp)
    folder = out / f"{magnification:g}x_{tile_px:g}px_{overlap_px}px_overlap"
    encoder = foreign_name("trident", bag.encoder)
    return [
        folder / f"{FOLDER_PREFIX}{encoder}" / f"{bag.slide_id}.h5",
        folder / "patches" / f"{bag.slide_id}_patches.h5",
    ]


def write(bag: OurBag, out: Path) -> None:
    """Write a bag as TRIDENT does: features in float32, and the tiling on `coords`.

    Raises:
        SlideError: something that TRIDENT's readers need is not known.
    """
    coords = coords_for(bag, "TRIDENT")
    tiling = _tiling(bag)
    features_path, coords_path = plan(bag, out)
    with atomic_file(coords_path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("coords", data=coords, dtype=np.int64).attrs.update(tiling)
    with atomic_file(features_path) as temporary, h5py.File(temporary, "w") as file:
        features = file.create_dataset("features", data=bag.float32())
        encoder = foreign_name("trident", bag.encoder)
        features.attrs.update({"encoder": encoder, "name": bag.slide_id, "savetodir": ""})
        file.create_dataset("coords", data=coords, dtype=np.int64).attrs.update(tiling)


def _tiling(bag: OurBag) -> dict[str, int | float | str]:
    """Return the nine attributes that TRIDENT's readers look for."""
    tile_px, tile_px_l0, width_l0, height_l0, mpp = required(
        bag, "TRIDENT", "tile_px", "tile_px_l0", "width_l0", "height_l0", "mpp"
    )
    (mpp_x_l0, mpp_y_l0) = required(bag, "TRIDENT", "mpp_x_l0", "mpp_y_l0")
    return {
        "patch_size": int(tile_px),
        "patch_size_level0": int(tile_px_l0),
        "level0_magnification": round(UM_X_MAGNIFICATION * 2 / (mpp_x_l0 + mpp_y_l0)),
        "target_magnification": _as_whole(UM_X_MAGNIFICATION / mpp),
        "overlap": int(bag.attributes.get("overlap_px", 0)),
        "name": bag.slide_id,
        "savetodir": "",
        "level0_width": int(width_l0),
        "level0_height": int(height_l0),
    }


def _as_whole(magnification: float) -> int | float:
    """Return 20 for 20.0; a magnification between the usual ones keeps three digits."""
    rounded = round(magnification, 3)
    return int(rounded) if rounded == int(rounded) else rounded
