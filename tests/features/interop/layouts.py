"""Builders of other tools' feature files: names, dtypes, chunks and attributes as they write them.

Each takes level-0 corners (N, 2), in any order, and vectors (N, D) in the same order, and writes
them in the units and dtypes of the tool. The tools' own order (column by column) is the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Truth:
    """What a foreign file was made of: corners in level-0 pixels, vectors, one row each."""

    corners: Array
    features: Array

    def sorted(self) -> Truth:
        """Return the rows by (y, x), by Python's own sort."""
        order = sorted(range(len(self.corners)), key=lambda i: tuple(self.corners[i][::-1]))
        return Truth(self.corners[order], self.features[order])


def truth(
    count: int = 12, dimension: int = 5, *, step: int = 512, seed: int = 0, columns: int = 4
) -> Truth:
    """Return tiles of a lattice in column-major order, with vectors that float16 holds."""
    rng = np.random.default_rng(seed)
    rows = -(-count // columns)
    corners = np.array([(x * step, y * step) for x in range(columns) for y in range(rows)])[:count]
    features = rng.normal(size=(count, dimension)).astype(np.float16)
    return Truth(corners + np.array([100, 60]), features)


def growing(file: h5py.File, name: str, values: Array, chunk_rows: int) -> h5py.Dataset:
    """Write a dataset that can grow, in chunks of some rows, as CLAM and TRIDENT do."""
    return file.create_dataset(
        name,
        data=values,
        chunks=(chunk_rows, *values.shape[1:]),
        maxshape=(None, *values.shape[1:]),
    )


# --- CLAM -----------------------------------------------------------------------------------


def clam_patches(
    root: Path,
    name: str,
    corners: Array,
    *,
    patch_size: int = 256,
    patch_level: int = 1,
    downsample: tuple[float, float] | None = (2.0, 2.0),
    level_dim: tuple[int, int] = (10000, 8000),
    **extra: Any,
) -> Path:
    path = root / "patches" / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        attributes = growing(file, "coords", corners.astype(np.int64), 1).attrs
        attributes["patch_size"] = patch_size
        attributes["patch_level"] = patch_level
        if downsample is not None:
            attributes["downsample"] = downsample
        attributes["downsampled_level_dim"] = np.array(level_dim)
        attributes["level_dim"] = np.array(level_dim)
        attributes["name"] = name
        attributes["save_path"] = "/somewhere/patches"
        attributes.update(extra)
    return path


def clam_features(root: Path, name: str, made: Truth, *, batched: bool = False) -> None:
    for folder in ("h5_files", "pt_files"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    features = made.features.astype(np.float32)
    with h5py.File(root / "h5_files" / f"{name}.h5", "w") as file:
        growing(file, "features", features[None] if batched else features, 32 if not batched else 1)
        growing(file, "coords", made.corners.astype(np.int32), 32)
    torch.save(torch.from_numpy(features), root / "pt_files" / f"{name}.pt")


# --- TRIDENT --------------------------------------------------------------------------------

TRIDENT_ATTRIBUTES = (
    "patch_size",
    "patch_size_level0",
    "level0_magnification",
    "target_magnification",
    "overlap",
    "name",
    "savetodir",
    "level0_width",
    "level0_height",
)


def trident_features(
    root: Path,
    name: str,
    made: Truth,
    *,
    encoder: str = "uni_v1",
    dtype: str = "float32",
    coords_dtype: str = "int64",
    patch_size: int = 256,
    patch_size_level0: int = 512,
) -> Path:
    folder = root / "20x_256px_0px_overlap"
    tiling = {
        "patch_size": patch_size,
        "patch_size_level0": patch_size_level0,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": name,
        "savetodir": str(folder / "patches"),
        "level0_width": 10000,
        "level0_height": 8000,
    }
    path = folder / f"features_{encoder}" / f"{name}.h5"
    patches = folder / "patches" / f"{name}_patches.h5"
    for one in (path, patches):
        one.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(patches, "w") as file:
        growing(file, "coords", made.corners.astype(np.int64), 1).attrs.update(tiling)
    with h5py.File(path, "w") as file:
        features = growing(file, "features", made.features.astype(dtype), 1)
        features.attrs.update({"name": name, "savetodir": "None", "encoder": encoder})
        growing(file, "coords", made.corners.astype(coords_dtype), 1).attrs.update(tiling)
    return path


def trident_legacy(
    root: Path, name: str, made: Truth, *, patch_level: int = 0, custom_downsample: int | None = 2
) -> Path:
    path = root / "features_conch_v1" / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        growing(file, "features", made.features.astype(np.float32), 1)
        coords = growing(file, "coords", made.corners.astype(np.int64), 1)
        coords.attrs.update({"patch_size": 256, "patch_level": patch_level, "name": name})
        if custom_downsample is not None:
            coords.attrs["custom_downsample"] = custom_downsample
    return path


# --- STAMP ----------------------------------------------------------------------------------


def stamp_features(
    root: Path,
    name: str,
    made: Truth,
    *,
    mpp: float,
    age: Literal["current", "v2.0", "historic"] = "current",
    version: str = "2.4.0",
    extractor: str = "uni2",
    dataset: str = "feats",
    tile_um: float = 256.0,
) -> Path:
    path = root / f"{extractor}-0123abcd" / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[dataset] = made.features.astype(np.float16)
        um = made.corners * mpp
        if age == "historic":
            file["coords"] = (um * 224 / 256).astype(np.float32)
            return path
        file["coords"] = um.astype(np.float32)
        file.attrs["stamp_version"] = version
        file.attrs["extractor"] = extractor
        file.attrs["unit"] = "um"
        file.attrs["tile_size_um" if age == "current" else "tile_size"] = tile_um
        if age == "current":
            file.attrs["tile_size_px"] = 224
            file.attrs["code_hash"] = "0123abcd"
            file.attrs["feat_type"] = "tile"
    return path


# --- slideflow, AtlasPatch, hs2p ------------------------------------------------------------


def slideflow_bag(
    root: Path, name: str, made: Truth, *, tile_um: int | str, extent_l0: int, tile_px: int = 224
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(made.features.astype(np.float32)), root / f"{name}.pt")
    np.savez(root / f"{name}.index.npz", made.corners + extent_l0 // 2)
    config = {
        "extractor": {"class": "slideflow.model.extractors.CTransPath", "kwargs": {}},
        "normalizer": None,
        "num_features": made.features.shape[1],
        "tile_px": tile_px,
        "tile_um": tile_um,
    }
    (root / "bags_config.json").write_text(json.dumps(config))
    return root / f"{name}.pt"


def atlaspatch_file(root: Path, name: str, made: Truth, encoders: Mapping[str, Array]) -> Path:
    path = root / "patches" / f"{name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(made.corners)
    coords = np.column_stack([made.corners, np.full((count, 2), 512), np.zeros((count, 1))])
    with h5py.File(path, "w") as file:
        file.attrs.update(
            {
                "patch_size": 256,
                "patch_size_level0": 512,
                "level0_magnification": 40,
                "target_magnification": 20,
                "overlap": 0,
                "level0_width": 10000,
                "level0_height": 8000,
                "wsi_path": f"/slides/{name}.svs",
                "num_patches": count,
            }
        )
        growing(file, "coords", coords.astype(np.int32), 8192)
        growing(file, "passports", np.full(count, b"p", "S160"), 8192)
        for encoder, vectors in encoders.items():
            growing(file, f"features/{encoder}", vectors.astype(np.float32), 32)
    return path


def hs2p_tiles(root: Path, name: str, corners: Array, *, vectors: Array | None = None) -> Path:
    folder = root / "tiles"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.coordinates.npz"
    np.savez(
        path,
        tile_index=np.arange(len(corners), dtype=np.int32),
        x=corners[:, 0].astype(np.int64),
        y=corners[:, 1].astype(np.int64),
        tissue_fractions=np.ones(len(corners), np.float32),
    )
    meta = {
        "provenance": {"sample_id": name},
        "slide": {"image_path": f"/slides/{name}.svs"},
        "tiling": {
            "coordinate_space": "level0_px",
            "tile_order": "x_then_y",
            "requested_tile_size_px": 256,
            "requested_spacing_um": 0.5,
            "read_level": 1,
            "read_tile_size_px": 250,
            "read_spacing_um": 0.512,
            "tile_size_lv0": 500,
            "step_px_lv0": 500,
            "overlap": 0.0,
            "n_tiles": len(corners),
        },
        "segmentation": {},
        "filtering": {},
        "artifact": {},
    }
    (folder / f"{name}.coordinates.meta.json").write_text(json.dumps(meta))
    if vectors is not None:
        (root / "features").mkdir(exist_ok=True)
        torch.save(torch.from_numpy(vectors.astype(np.float32)), root / "features" / f"{name}.pt")
    return path


# --- torchmil -------------------------------------------------------------------------------


def torchmil_bag(root: Path, name: str, made: Truth, *, label: int, suffix: str = ".npy") -> None:
    arrays = {
        "features": made.features.astype(np.float32),
        "labels": np.array([label]),
        "patch_labels": np.arange(len(made.corners)) % 2,
        "coords": made.corners,
    }
    datasets = {"patch_labels": "labels"}
    for role, values in arrays.items():
        (root / role).mkdir(parents=True, exist_ok=True)
        # Labels of instances are always npy, even beside h5.
        if suffix == ".npy" or role == "patch_labels":
            np.save(root / role / f"{name}.npy", values)
        else:
            with h5py.File(root / role / f"{name}.h5", "w") as file:
                file[datasets.get(role, role)] = values
