from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.golden.make import TILES_PATH, tiling_of_the_stained_field


def test_the_same_scan_gives_the_same_tiles_as_ever(tmp_path: Path) -> None:
    """Where this fails on purpose: raise NUMERICS, run `make golden`, write a changelog line."""
    golden = json.loads(TILES_PATH.read_text())
    found = tiling_of_the_stained_field(tmp_path)
    exact = ("numerics", "tissue_method", "dropped", "coords", "parent")
    assert {name: found[name] for name in exact} == {name: golden[name] for name in exact}
    # Libraries round differently in the last place; a change of method shows far above this.
    np.testing.assert_allclose(found["tissue"], golden["tissue"], atol=0.002)
    np.testing.assert_allclose(found["sharpness"], golden["sharpness"], atol=0.01)
