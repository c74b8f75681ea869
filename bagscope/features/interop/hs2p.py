"""hs2p: tile coordinates as npz with a JSON beside; features come from another tool.

Features are looked for as `<sample>.pt` or `<sample>.npy` beside the coordinates, or in a folder
`features` or `tile_embeddings` beside theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bagscope.artifacts import read_json
from bagscope.errors import SchemaError, SlideError
from bagscope.features.interop.foreign import (
    ForeignBag,
    SlideFacts,
    Source,
    as_features,
    load_tensor,
    number,
    readable,
    whole,
)

COORDINATES_SUFFIX = ".coordinates.npz"
META_SUFFIX = ".coordinates.meta.json"
FEATURE_FOLDERS = ("features", "tile_embeddings")


def find_companions(path: Path, slide_id: str) -> dict[str, Path]:
    """Return the JSON and the features that belong to a file of coordinates."""
    found = {"meta": path.with_name(slide_id + META_SUFFIX)}
    for folder in (path.parent, *(path.parent.parent / name for name in FEATURE_FOLDERS)):
        for suffix in (".pt", ".npy"):
            found.setdefault("features", folder / f"{slide_id}{suffix}")
            if not found["features"].is_file():
                del found["features"]
    return {name: file for name, file in found.items() if file.is_file()}


def read(source: Source, slide: SlideFacts | None) -> ForeignBag:
    """Read hs2p's coordinates and the features that were made from them.

    Raises:
        SlideError: there are no features beside them.
        SchemaError: the files are not what hs2p writes.
    """
    path = source.path
    vectors = source.companions.get("features")
    if vectors is None:
        raise SlideError(
            f"{path}: holds coordinates and no features; put the features that were made from "
            f"them beside it as {source.slide_id}.pt or {source.slide_id}.npy"
        )
    if "meta" not in source.companions:
        raise SchemaError(
            f"{path}: no {source.slide_id}{META_SUFFIX} beside it, which says what the "
            "coordinates mean; copy it there"
        )
    meta_path = source.companions["meta"]
    meta = _flat(read_json(meta_path))
    space = meta.get("coordinate_space", "level0_px")
    if space != "level0_px":
        raise SchemaError(f"{meta_path}: coordinate_space is {space!r}, expected 'level0_px'")
    with readable(path), np.load(path) as arrays:
        index = arrays["tile_index"]
        coords = np.stack([arrays["x"], arrays["y"]], axis=1)
    if not np.array_equal(index, np.arange(len(coords))):
        raise SchemaError(f"{path}: tile_index is not 0, 1, 2, ...; make the coordinates again")
    with readable(vectors):
        values = load_tensor(vectors) if vectors.suffix == ".pt" else np.load(vectors)
    extent_l0 = number(meta, "tile_size_lv0", path=meta_path)
    read_um, read_px = (
        number(meta, name, path=meta_path) for name in ("read_spacing_um", "read_tile_size_px")
    )
    return ForeignBag(
        features=as_features(vectors, values),
        coords=coords,
        tile_px=whole(meta, "requested_tile_size_px", path=meta_path),
        extent_l0=extent_l0,
        mpp=number(meta, "requested_spacing_um", path=meta_path),
        mpp_l0=read_um * read_px / extent_l0 if read_um and read_px and extent_l0 else None,
    )


def _flat(meta: Any) -> dict[str, Any]:
    """Return the keys of all sections side by side; no two sections share one that is used here."""
    flat: dict[str, Any] = {}
    for name, value in meta.items() if isinstance(meta, Mapping) else ():
        flat.update(value if isinstance(value, Mapping) else {name: value})
    return flat
