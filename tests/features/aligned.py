"""Features of two aligned tilings, whose second half of slides shows something under one tile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bagscope.features.feature_file import FeatureHeader, write_feature_file

WIDTH = 4
COARSE_TILES, FINE_TILES = 6, 24
STEP_L0 = 256


def store_aligned(folder: Path, count: int, *, origin_l0: tuple[int, int] = (0, 0)) -> str:
    """Write `fine` and `coarse` of slides s00, s01, …; return FINE::COARSE.

    Args:
        folder: that both lie in.
        count: of slides; those of odd numbers have a coarse tile that stands out, as do the fine
            ones in it.
        origin_l0: of the fine lattice; the coarse one begins at zero.
    """
    generator = np.random.default_rng(0)
    coarse_grid = np.stack([np.arange(COARSE_TILES) % 3, np.arange(COARSE_TILES) // 3], axis=1)
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    fine_grid = (2 * coarse_grid[:, None] + corners).reshape(-1, 2)
    fine_grid = fine_grid[np.lexsort(fine_grid.T)]
    for number in range(count):
        coarse = generator.normal(size=(COARSE_TILES, WIDTH))
        fine = generator.normal(size=(FINE_TILES, WIDTH))
        if number % 2:
            coarse[2, 0] += 5
            fine[(fine_grid // 2 == coarse_grid[2]).all(axis=1), 1] += 5
        name = f"s{number:02d}"
        _store(folder / "fine", name, fine_grid, fine, 1, origin_l0)
        _store(folder / "coarse", name, coarse_grid, coarse, 2, (0, 0))
    return f"{folder / 'fine'}::{folder / 'coarse'}"


def _store(
    folder: Path,
    name: str,
    grid: NDArray[np.int64],
    vectors: NDArray[np.float64],
    times: int,
    origin_l0: tuple[int, int],
) -> None:
    step = STEP_L0 * times
    header = FeatureHeader(
        slide_id=name,
        fields={"stage": "import", "slide": name},
        encoder={"name": "planted"},
        weights_sha256="ab" * 32,
        coords_l0=(grid * step + np.array(origin_l0)).astype(np.int32),
        grid=grid.astype(np.int32),
        tile={
            "mpp": 0.5 * times,
            "mpp_effective": 0.5 * times,
            "tile_px": 256,
            "width_l0": 2048,
            "height_l0": 2048,
            "bounds_l0": np.array([0, 0, 2048, 2048]),
            "mpp_x_l0": 0.5,
            "mpp_y_l0": 0.5,
            "extent_l0": float(step),
            "step_l0": float(step),
            "origin_l0": np.array(origin_l0, np.float64),
        },
        recorded={},
    )
    write_feature_file(folder / f"{name}.h5", header, vectors.astype(np.float32), dtype="float32")
