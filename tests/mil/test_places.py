"""Cases without the places that a model goes by are refused by name, and no vector is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bagscope.errors import ConfigError
from bagscope.features.feature_file import FeatureHeader, write_feature_file
from bagscope.features.store import FeatureStore
from bagscope.mil.places import require_places
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes.registry import build_model
from bagscope.mil.sources import Rows, StoreSource
from tests.mil.stored_bags import case_of

KNOWN: dict[str, Any] = {"tile_px": 256, "mpp_effective": 0.5, "mpp": 0.25}
NAMES = ("a", "b", "c")


class Headers(StoreSource):
    """A source that fails where vectors are read."""

    def read(self, index: int, rows: Rows | None = None) -> Any:
        assert rows is not None
        assert not len(rows)
        return super().read(index, rows)


def source_of(folder: Path, **of_c: Any) -> Headers:
    """Return three cases of one slide, the last of which says something else of its tiles."""
    grid = np.array([[0, 0], [1, 0]], np.int32)
    for name in NAMES:
        values: dict[str, Any] = {"coords_l0": grid * 512, "grid": grid, "tile": KNOWN}
        header = FeatureHeader(
            slide_id=name,
            fields={"stage": "import", "slide": name},
            encoder={"name": "planted"},
            weights_sha256="ab" * 32,
            recorded={},
            **{**values, **(of_c if name == "c" else {})},
        )
        write_feature_file(folder / f"{name}.h5", header, np.ones((2, 4), np.float32))
    return Headers(FeatureStore.open(folder), [case_of(name) for name in NAMES])


def refuse(source: StoreSource, **recipe: Any) -> None:
    spec = TrainSpec.model_validate(recipe)
    require_places(build_model(spec, source.dimension, 2), spec, source)


def vit(mixer: str) -> dict[str, Any]:
    return {"name": "vit", "options": {"mixer": mixer, "hidden": 16, "layers": 1, "heads": 2}}


def test_one_case_without_places_is_found_among_others(tmp_path: Path) -> None:
    source = source_of(tmp_path, grid=None)
    with pytest.raises(ConfigError, match=r"lattice, and of c \(1 of 3 cases\) there are none; "):
        refuse(source, aggregator=vit("neighbours"))
    refuse(source, aggregator=vit("alibi"))
    refuse(source, aggregator={"name": "abmil"})


def test_a_sample_along_the_tissue_needs_places(tmp_path: Path) -> None:
    bags = {"sampling": "spatial", "sample_tiles": 2}
    with pytest.raises(
        ConfigError, match=r"spatial, and of c \(1 of 3 cases\) there are no places"
    ):
        refuse(source_of(tmp_path, grid=None), aggregator={"name": "abmil"}, bags=bags)


@pytest.mark.parametrize(
    ("of_c", "what"),
    [
        ({"coords_l0": None, "grid": None}, "no coordinates"),
        ({"tile": {"tile_px": 256, "mpp_effective": 0.5}}, "no known pixel sizes"),
    ],
)
def test_one_case_without_micrometres_is_found_among_others(
    tmp_path: Path, of_c: dict[str, Any], what: str
) -> None:
    with pytest.raises(ConfigError, match=rf"and of c \(1 of 3 cases\) there are {what}; "):
        refuse(source_of(tmp_path, **of_c), aggregator=vit("alibi"))


def test_all_are_named_where_none_has_a_coarser_tiling(tmp_path: Path) -> None:
    regime = {
        "name": "two_stage",
        "options": {"coarse_width": 2, "coarse": {"name": "abmil"}, "tiles": 2},
    }
    with pytest.raises(ConfigError, match=r"of a, b, c \(3 of 3 cases\) are of one resolution"):
        refuse(source_of(tmp_path), aggregator={"name": "abmil"}, regime=regime)


def test_cases_with_all_places_are_taken(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    for mixer in ("alibi", "neighbours"):
        refuse(source, aggregator=vit(mixer))
