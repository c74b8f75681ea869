"""The tile file: one HDF5 per slide and resolution, the artefact between slides and features.

Datasets and attributes are listed in docs/formats.md. The attributes on `coords` carry the names
and meanings that readers of TRIDENT's coordinate files look for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from bagscope import __version__
from bagscope.artifacts import (
    SEAL_BLANK,
    SEAL_MARK,
    Json,
    atomic_file,
    canonical_json,
    fingerprint,
    seal_file,
)
from bagscope.errors import ArtifactError, SchemaError
from bagscope.wsi.hdf5_image import SparseImage
from bagscope.wsi.slide import RectL0, Spacing

if TYPE_CHECKING:
    from bagscope.wsi.tiles import TileSet

SCHEMA = "bagscope.tiles"
SCHEMA_VERSION = 1

_REQUIRED_DATASETS = {
    "coords": ("i", 2),
    "grid": ("i", 2),
    "tissue": ("f", 1),
    "pen": ("f", 1),
    "fold": ("f", 1),
    "sharpness": ("f", 1),
}
_REQUIRED_ATTRIBUTES = (
    "slide_id",
    "fingerprint",
    "fingerprint_fields",
    "width_l0",
    "height_l0",
    "bounds_l0",
    "mpp_x_l0",
    "mpp_y_l0",
    "mpp_source",
    "mpp",
    "mpp_effective",
    "tile_px",
    "tile_px_l0",
    "extent_l0",
    "origin_l0",
    "step_l0",
    "overlap_px",
    "read_level",
    "backend",
    "tissue_method",
    "summary",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TileFile:
    """A tile file's content, read whole (a few MiB even for a large slide).

    Arrays are those of `bagscope.wsi.tiles.TileSet`; `attributes` are the scalar attributes of
    the file; `fields` is what its fingerprint was made of.
    """

    slide_id: str
    coords_l0: NDArray[np.int32]
    grid: NDArray[np.int32]
    tissue: NDArray[np.float32]
    pen: NDArray[np.float32]
    fold: NDArray[np.float32]
    sharpness: NDArray[np.float32]
    parent: NDArray[np.int32] | None
    outline_geojson: str
    spacing: Spacing
    bounds_l0: RectL0
    attributes: Mapping[str, Any]
    fields: Mapping[str, Json]

    def __len__(self) -> int:
        return len(self.coords_l0)


def write_tile_file(
    path: Path,
    tiles: TileSet,
    *,
    slide_id: str,
    fields: Mapping[str, Json],
    tissue_method: str,
    outline_geojson: str,
    summary: Mapping[str, Json],
) -> None:
    """Write one resolution of a tiling atomically; the same tiles give the same bytes.

    `summary` is kept as it is given: what a report says of the slide without opening its arrays.
    """
    image = SparseImage()
    with h5py.File(image, "w") as file:
        _write_attributes(file, tiles, slide_id, fields, tissue_method)
        file.attrs["summary"] = canonical_json(summary).decode()
        coords = file.create_dataset("coords", data=tiles.coords_l0, dtype=np.int32)
        _write_trident_attributes(coords, tiles, slide_id)
        file.create_dataset("grid", data=tiles.grid, dtype=np.int32)
        for name in ("tissue", "pen", "fold", "sharpness"):
            file.create_dataset(name, data=getattr(tiles, name), dtype=np.float32)
        if tiles.parent is not None:
            file.create_dataset("parent", data=tiles.parent, dtype=np.int32)
        outline = np.frombuffer(outline_geojson.encode(), np.uint8)
        file.create_dataset("outline_geojson", data=outline)
    with atomic_file(path) as temporary:
        image.write_to(temporary)
        seal_file(temporary)


def _write_attributes(
    file: h5py.File,
    tiles: TileSet,
    slide_id: str,
    fields: Mapping[str, Json],
    tissue_method: str,
) -> None:
    info, spacing, plan, lattice = tiles.info, tiles.spacing, tiles.plan, tiles.lattice
    bounds = info.bounds_l0
    attributes: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "bagscope_version": __version__,
        # Fixed in length: the hash takes the blank's place when all else is written.
        "sha256": np.bytes_(SEAL_BLANK),
        "fingerprint": fingerprint(fields),
        "fingerprint_fields": canonical_json(fields).decode(),
        "slide_id": slide_id,
        "width_l0": info.width_l0,
        "height_l0": info.height_l0,
        "bounds_l0": np.array(
            [bounds.x_l0, bounds.y_l0, bounds.width_l0, bounds.height_l0], np.int64
        ),
        "mpp_x_l0": spacing.mpp_x,
        "mpp_y_l0": spacing.mpp_y,
        "mpp_source": spacing.source,
        "mpp_estimated": spacing.estimated,
        "mpp": plan.mpp,
        "mpp_effective": plan.mpp_effective,
        "tile_px": plan.tile_px,
        "tile_px_l0": plan.tile_px_l0,
        "extent_l0": plan.extent_l0,
        "origin_l0": np.array([lattice.origin_x_l0, lattice.origin_y_l0]),
        "step_l0": lattice.step_l0,
        "overlap_px": tiles.spec.overlap_px,
        "read_level": plan.level,
        "read_region_px": plan.region_px,
        "read_downsample": plan.downsample,
        "downscale": tiles.spec.downscale,
        "backend": info.backend,
        "format": info.format,
        "objective": np.nan if info.objective is None else info.objective,
        "tissue_method": tissue_method,
        "dropped": canonical_json(dict(tiles.dropped)).decode(),
    }
    for name, value in attributes.items():
        file.attrs[name] = value


def _write_trident_attributes(coords: h5py.Dataset, tiles: TileSet, slide_id: str) -> None:
    """Add what readers of TRIDENT's coordinate files expect: sizes at the target magnification."""
    objective = tiles.info.objective or 10 / tiles.spacing.mpp
    coords.attrs["patch_size"] = tiles.plan.tile_px
    coords.attrs["patch_size_level0"] = tiles.plan.tile_px_l0
    coords.attrs["level0_magnification"] = round(objective)
    coords.attrs["target_magnification"] = round(10 / tiles.plan.mpp, 3)
    coords.attrs["overlap"] = tiles.spec.overlap_px
    coords.attrs["name"] = slide_id
    # Readers look the key up; a folder of the machine that wrote the file is nobody's business.
    coords.attrs["savetodir"] = ""
    coords.attrs["level0_width"] = tiles.info.width_l0
    coords.attrs["level0_height"] = tiles.info.height_l0


def read_tile_file(path: Path) -> TileFile:
    """Read and check a tile file.

    Raises:
        ArtifactError: missing or unreadable.
        SchemaError: not a tile file, of a newer version, or its parts contradict each other.
    """
    with _open(path) as file:
        attributes = _checked_attributes(path, file)
        arrays = {name: _checked_dataset(path, file, name) for name in _REQUIRED_DATASETS}
        lengths = {name: len(array) for name, array in arrays.items()}
        parent = np.asarray(file["parent"][:], np.int32) if "parent" in file else None
        if parent is not None:
            lengths["parent"] = len(parent)
        if len(set(lengths.values())) > 1:
            raise SchemaError(f"{path}: datasets of different lengths {lengths}; tile again")
        outline = bytes(file["outline_geojson"][:]).decode() if "outline_geojson" in file else ""
    x_l0, y_l0, width_l0, height_l0 = (int(value) for value in attributes["bounds_l0"])
    return TileFile(
        slide_id=str(attributes["slide_id"]),
        coords_l0=arrays["coords"],
        grid=arrays["grid"],
        tissue=arrays["tissue"],
        pen=arrays["pen"],
        fold=arrays["fold"],
        sharpness=arrays["sharpness"],
        parent=parent,
        outline_geojson=outline,
        spacing=Spacing(
            mpp_x=float(attributes["mpp_x_l0"]),
            mpp_y=float(attributes["mpp_y_l0"]),
            source=str(attributes["mpp_source"]),
            estimated=bool(attributes["mpp_estimated"]),
        ),
        bounds_l0=RectL0(x_l0=x_l0, y_l0=y_l0, width_l0=width_l0, height_l0=height_l0),
        attributes=attributes,
        fields=json.loads(attributes["fingerprint_fields"]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TileFileRecord:
    """What a tile file says of itself, without its arrays."""

    fields: Mapping[str, Json]
    fingerprint: str
    summary: Mapping[str, Json]
    outline_geojson: str


def read_tile_record(path: Path) -> TileFileRecord:
    """Read what an existing tile file was made of.

    Raises:
        ArtifactError: missing or unreadable.
        SchemaError: not a tile file.
    """
    with _open(path) as file:
        attributes = _checked_attributes(path, file)
        outline = bytes(file["outline_geojson"][:]).decode() if "outline_geojson" in file else ""
    return TileFileRecord(
        fields=json.loads(attributes["fingerprint_fields"]),
        fingerprint=str(attributes["fingerprint"]),
        summary=json.loads(attributes["summary"]),
        outline_geojson=outline,
    )


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise ArtifactError(f"{path}: no such tile file; run bagscope tile first")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise SchemaError(f"{path}: not a readable HDF5 file ({error}); tile again") from error


def _checked_attributes(path: Path, file: h5py.File) -> dict[str, Any]:
    attributes = dict(file.attrs)
    schema, version = attributes.get("schema"), attributes.get("schema_version", 0)
    if schema != SCHEMA:
        raise SchemaError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}")
    if version > SCHEMA_VERSION:
        raise SchemaError(
            f"{path}: schema version {version} is newer than {SCHEMA_VERSION}, the newest that "
            "this bagscope reads; update bagscope"
        )
    missing = [name for name in _REQUIRED_ATTRIBUTES if name not in attributes]
    if missing:
        raise SchemaError(f"{path}: lacks the attributes {', '.join(missing)}; tile again")
    if "sha256" in attributes:  # the first versions did not seal their files
        attributes["sha256"] = bytes(attributes["sha256"]).decode().removeprefix(SEAL_MARK)
    if fingerprint(json.loads(attributes["fingerprint_fields"])) != attributes["fingerprint"]:
        raise SchemaError(f"{path}: its fingerprint is not that of its fields; tile again")
    return attributes


def _checked_dataset(path: Path, file: h5py.File, name: str) -> NDArray[Any]:
    kind, dimensions = _REQUIRED_DATASETS[name]
    if name not in file:
        raise SchemaError(f"{path}: lacks the dataset {name!r}; tile again")
    dataset = file[name]
    if dataset.dtype.kind != kind or dataset.ndim != dimensions:
        raise SchemaError(
            f"{path}: dataset {name!r} is {dataset.dtype} with {dataset.ndim} dimensions, "
            f"expected {'integers' if kind == 'i' else 'floats'} with {dimensions}"
        )
    values: NDArray[Any] = dataset[:]
    return values
