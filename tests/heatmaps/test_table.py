from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bagscope.heatmaps.table import write_table
from tests.heatmaps.made import made_places


@pytest.mark.parametrize("name", ["tiles.csv", "tiles.parquet"])
def test_a_row_per_tile(tmp_path: Path, name: str) -> None:
    places = made_places(4, 3, origin_l0=(1000.0, 2000.0))
    rng = np.random.default_rng(0)
    measured = {"ratio": rng.random(12), "logit tumor": rng.normal(size=12).astype(np.float32)}
    grid = np.stack([np.arange(12) % 4, np.arange(12) // 4], axis=1).astype(np.int32)
    path = tmp_path / name
    for target in (path, tmp_path / f"again{path.suffix}"):
        write_table(target, places, measured, slide_id="00123", grid=grid)
    assert path.read_bytes() == (tmp_path / f"again{path.suffix}").read_bytes()
    how = {"dtype": {"slide_id": str}} if path.suffix == ".csv" else {}
    table = getattr(pd, f"read_{path.suffix[1:]}")(path, **how)
    assert set(table["slide_id"]) == {"00123"}
    np.testing.assert_array_equal(table[["x_l0", "y_l0"]], places.coords_l0)
    np.testing.assert_array_equal(table[["column", "row"]], grid)
    assert table["tile"].tolist() == list(range(12))
    for column, values in measured.items():
        np.testing.assert_allclose(table[column], values, rtol=1e-8)
