"""AtlasPatch: one h5 per slide with `features/<encoder>` for every encoder, tiling in the root.

`coords` is (N, 5): x and y in level-0 pixels, then how the tile was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import h5py

from bagscope.errors import ConfigError, SchemaError
from bagscope.features.interop.encoder_names import our_name
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
from bagscope.features.interop.trident import UM_X_MAGNIFICATION


def read(source: Source, slide: SlideFacts | None, *, encoder: str | None = None) -> ForeignBag:
    """Read one encoder's bag of a file that AtlasPatch wrote.

    Raises:
        ConfigError: there are several encoders and none, or another, was asked for.
        SchemaError: the file is not what AtlasPatch writes.
    """
    path = source.path
    with readable(path), h5py.File(path, "r") as file:
        widths = {name: int(file["features"][name].shape[-1]) for name in file["features"]}
        name = _choose(path, widths, encoder)
        features = as_features(path, file["features"][name][()])
        if "coords" not in file:
            raise SchemaError(f"{path}: lacks the dataset 'coords'; run AtlasPatch again")
        coords = as_coords(path, file["coords"][()])
        tiling = attributes_of(file)
    magnification = number(tiling, "target_magnification", path=path)
    return ForeignBag(
        features=features,
        coords=coords,
        encoder=name,
        tile_px=whole(tiling, "patch_size", path=path),
        extent_l0=number(tiling, "patch_size_level0", path=path),
        mpp=None if magnification is None else UM_X_MAGNIFICATION / magnification,
        overlap_px=whole(tiling, "overlap", path=path),
        width_l0=whole(tiling, "level0_width", path=path),
        height_l0=whole(tiling, "level0_height", path=path),
    )


def _choose(path: Path, widths: Mapping[str, int], encoder: str | None) -> str:
    if encoder is None and len(widths) == 1:
        return next(iter(widths))
    wanted = [n for n, width in widths.items() if encoder in (n, our_name("atlaspatch", n, width))]
    if len(wanted) == 1:
        return wanted[0]
    listed = ", ".join(sorted(widths)) or "none"
    asked = f"not {encoder!r}" if encoder else "and one is to be chosen"
    raise ConfigError(f"{path}: holds features of {listed}, {asked}; pass --encoder NAME")
