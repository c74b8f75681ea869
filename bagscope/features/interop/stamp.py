"""STAMP: `feats` in float16 and coordinates in micrometres, rows in the order they were done.

Three ages: `tile_size_um`, before that `tile_size` with the unit "um", and before that no size
at all. The oldest are known by their stride of 224: their unit is a pixel of a 224 px tile that is
256 µm wide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from bagscope.artifacts import atomic_file
from bagscope.errors import SchemaError, SlideError
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
from bagscope.features.interop.placing import fits_float16
from bagscope.features.interop.writing import OurBag, coords_for, required

NEWEST_VERSION = (2, 5)
"""The newest major and minor version whose files are known here."""

WRITTEN_VERSION = "2.1.0"
"""What our exports state. STAMP refuses files newer than itself, so it is not the newest."""
WRITER_HASH = "ba95c09e"
"""Stands where STAMP puts a hash of its code: these vectors come from elsewhere."""

FEATURE_NAMES = ("feats", "patch_embeddings")
HISTORIC_STRIDE = 224
HISTORIC_TILE_UM = 256.0
_STRIDE_TOLERANCE = 1.0
_CODE_HASH = re.compile(r"-[0-9a-f]{8}$")


def read(source: Source, slide: SlideFacts | None) -> ForeignBag:
    """Read a bag that STAMP wrote.

    Raises:
        SchemaError: of a newer STAMP, of a whole slide or patient, or of no age that is known.
    """
    path = source.path
    with readable(path), h5py.File(path, "r") as file:
        attributes = attributes_of(file)
        _check_version(path, attributes)
        kind = attributes.get("feat_type", "tile")
        if kind != "tile":
            raise SchemaError(
                f"{path}: holds one vector per {kind}; give the file with one vector per tile"
            )
        name = next(name for name in FEATURE_NAMES if name in file)
        features = as_features(path, file[name][()])
        if "coords" not in file:
            raise SchemaError(f"{path}: lacks the dataset 'coords'; extract it with STAMP again")
        coords = as_coords(path, file["coords"][()])
    tile_um, coords_um, tile_px = _sizes(path, attributes, coords)
    encoder = str(attributes.get("extractor", "")) or _CODE_HASH.sub("", path.parent.name)
    return ForeignBag(
        features=features,
        coords=coords_um,
        frame="corner_um",
        encoder=_CODE_HASH.sub("", encoder),
        tile_px=tile_px,
        tile_um=tile_um,
        mpp=None if tile_px is None else tile_um / tile_px,
    )


def _check_version(path: Path, attributes: Mapping[str, Any]) -> None:
    version = attributes.get("stamp_version")
    parts = re.match(r"(\d+)\.(\d+)", str(version))
    if version is not None and parts is None:
        raise SchemaError(f"{path}: stamp_version is {version!r}, expected a version like 2.4.0")
    if parts is not None and (int(parts[1]), int(parts[2])) > NEWEST_VERSION:
        raise SchemaError(
            f"{path}: written by STAMP {version}, newer than {'.'.join(map(str, NEWEST_VERSION))}, "
            "the newest that this bagscope reads; update bagscope"
        )


def _sizes(
    path: Path, attributes: Mapping[str, Any], coords: NDArray[Any]
) -> tuple[float, NDArray[Any], int | None]:
    """Return the tile's edge in µm, coordinates in µm, and the tile's edge in pixels."""
    tile_px = whole(attributes, "tile_size_px", path=path)
    unit = str(attributes.get("unit", "um"))
    if unit != "um":
        raise SchemaError(f"{path}: coordinates are in {unit!r}, expected 'um'")
    for name in ("tile_size", "tile_size_um"):
        tile_um = number(attributes, name, path=path)
        if tile_um is not None:
            return tile_um, coords, tile_px
    stride = _stride(coords)
    if stride is None or abs(stride - HISTORIC_STRIDE) > _STRIDE_TOLERANCE:
        raise SchemaError(
            f"{path}: states no tile size, and its tiles lie {stride or 0:g} apart instead of "
            f"the {HISTORIC_STRIDE} of old STAMP files; extract it with STAMP again"
        )
    scale = HISTORIC_TILE_UM / HISTORIC_STRIDE
    return HISTORIC_TILE_UM, np.asarray(coords, np.float64) * scale, HISTORIC_STRIDE


def _stride(coords: NDArray[Any]) -> float | None:
    """Return the smallest distance between two columns or rows of tiles."""
    gaps = [np.diff(np.unique(coords[:, axis])) for axis in (0, 1)]
    smallest = [float(gap.min()) for gap in gaps if len(gap)]
    return min(smallest) if smallest else None


# --- writing --------------------------------------------------------------------------------


def plan(bag: OurBag, out: Path) -> list[Path]:
    """Return the file that `write` makes."""
    extractor = foreign_name("stamp", bag.encoder)
    return [out / f"{extractor}-{WRITER_HASH}" / f"{bag.slide_id}.h5"]


def write(bag: OurBag, out: Path) -> None:
    """Write a bag as STAMP does: float16, coordinates in micrometres.

    Raises:
        SlideError: the pixel size or the tile size is not known, or float16 does not hold a value.
    """
    coords = coords_for(bag, "STAMP")
    mpp_x_l0, mpp_y_l0, extent_l0, tile_px = required(
        bag, "STAMP", "mpp_x_l0", "mpp_y_l0", "extent_l0", "tile_px"
    )
    features = bag.file.features
    if not fits_float16(features):
        raise SlideError(
            f"{bag.file.path}: has values beyond 65504, which STAMP's float16 does not hold; "
            " write it as trident or clam"
        )
    mpp = (mpp_x_l0 + mpp_y_l0) / 2
    (path,) = plan(bag, out)
    with atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("feats", data=features, dtype=np.float16)
        file.create_dataset("coords", data=coords * mpp, dtype=np.float32)
        file.attrs["stamp_version"] = WRITTEN_VERSION
        file.attrs["extractor"] = foreign_name("stamp", bag.encoder)
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um"] = extent_l0 * mpp
        file.attrs["tile_size_px"] = int(tile_px)
        file.attrs["code_hash"] = WRITER_HASH
        file.attrs["feat_type"] = "tile"
