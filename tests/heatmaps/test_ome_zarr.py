"""OME-Zarr against zarr itself, our slide reader, and the schema's rules written out by hand.

No NGFF reader is among the development tools; the rules are those of ome/ngff 0.5, image.schema
and strict_image.schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from bagscope.heatmaps.colours import ColourScale, shared_scale
from bagscope.heatmaps.ome_zarr import write_ome_zarr
from bagscope.heatmaps.raster import pyramid, raster
from bagscope.wsi.opening import open_slide
from tests.heatmaps.made import made_places


@pytest.fixture
def colours() -> ColourScale:
    return shared_scale("ratio", "log_weight", [(0.25, 4.0)])


def lattice() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    keep = rng.random(40 * 30) < 0.6
    places = made_places(40, 30, extent_l0=447.9, origin_l0=(1200.0, 3400.0), keep=keep, mpp=0.25)
    return places, rng.uniform(0.2, 5, keep.sum())


def require_ngff_0_5(folder: Path) -> dict[str, Any]:
    """Check a folder by the rules of NGFF 0.5 for images; return its multiscale."""
    record = json.loads((folder / "zarr.json").read_text())
    assert (record["zarr_format"], record["node_type"]) == (3, "group")
    ome = record["attributes"]["ome"]
    assert ome["version"] == "0.5"
    (multiscale,) = ome["multiscales"]
    axes = multiscale["axes"]
    assert 2 <= len(axes) <= 5
    kinds = [axis["type"] for axis in axes]
    assert kinds.count("space") in (2, 3)
    assert kinds == sorted(kinds, key=["time", "channel", "space"].index)
    assert len({axis["name"] for axis in axes}) == len(axes)
    shapes = []
    for dataset in multiscale["datasets"]:
        scale, *rest = dataset["coordinateTransformations"]
        assert scale["type"] == "scale"
        assert [one["type"] for one in rest] in ([], ["translation"])
        for one in (scale, *rest):
            assert len(one[one["type"]]) == len(axes)
        level = json.loads((folder / dataset["path"] / "zarr.json").read_text())
        assert level["dimension_names"] == [axis["name"] for axis in axes]
        assert level["chunk_key_encoding"]["configuration"]["separator"] == "/"
        shapes.append(level["shape"])
    assert shapes == sorted(shapes, reverse=True)
    for channel in ome["omero"]["channels"]:
        assert {"min", "max", "start", "end"} <= channel["window"].keys()
        assert len(channel["color"]) == 6
    found: dict[str, Any] = multiscale
    return found


@pytest.mark.parametrize("content", ["score", "colour"])
def test_every_level_is_drawn_from_the_tiles(
    tmp_path: Path, colours: ColourScale, content: Any
) -> None:
    places, values = lattice()
    folder = tmp_path / f"{content}.ome.zarr"
    write_ome_zarr(folder, places, values, colours, content, slide_id="s", of="tumor")
    multiscale = require_ngff_0_5(folder)
    assert multiscale["name"] == "s ratio of tumor"
    frames = pyramid(places)
    assert len(multiscale["datasets"]) == len(frames) == 2
    group = zarr.open_group(folder, mode="r")
    for dataset, frame in zip(multiscale["datasets"], frames, strict=True):
        expected = raster(places, values, frame)
        drawn = expected[None] if content == "score" else colours.rgb(expected).transpose(2, 0, 1)
        np.testing.assert_array_equal(group[dataset["path"]][:], drawn)


@pytest.mark.parametrize("frame", ["qupath", "openslide"])
def test_every_level_lies_where_the_tiles_do(
    tmp_path: Path, colours: ColourScale, frame: Any
) -> None:
    places, values = lattice()
    folder = tmp_path / "score.ome.zarr"
    write_ome_zarr(folder, places, values, colours, "score", slide_id="s", frame=frame)
    multiscale = require_ngff_0_5(folder)
    assert multiscale["axes"][1]["unit"] == "micrometer"
    for dataset in multiscale["datasets"]:
        scale, translation = (t[t["type"]] for t in dataset["coordinateTransformations"])
        # From the centre of the map's first pixel to its corner; likewise of the slide's own.
        corner = np.array(translation)[:0:-1] - np.array(scale)[:0:-1] / 2 + 0.25 / 2
        expected = (0, 0) if frame == "qupath" else (300, 850)
        np.testing.assert_allclose(corner, expected, atol=1e-9)
    assert scale[2] == pytest.approx(447.9 / 8 * 0.25)


def test_our_slide_reader_opens_the_colours(tmp_path: Path, colours: ColourScale) -> None:
    places, values = lattice()
    folder = tmp_path / "colour.ome.zarr"
    write_ome_zarr(folder, places, values, colours, "colour", slide_id="s")
    expected = colours.rgb(raster(places, values, pyramid(places)[0]))
    with open_slide(folder) as slide:
        assert slide.info.spacing is not None
        assert slide.info.spacing.mpp == pytest.approx(447.9 / 16 * 0.25)
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 640, 480), expected)


def test_the_same_scores_give_the_same_bytes(tmp_path: Path, colours: ColourScale) -> None:
    places = made_places(3, 2, mpp=None)
    found = []
    for name in ("one", "two"):
        folder = tmp_path / name / "score.ome.zarr"
        write_ome_zarr(folder, places, np.ones(6), colours, "score", slide_id="s")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        found.append([(path.relative_to(folder), path.read_bytes()) for path in files])
    assert found[0] == found[1]
    assert all("unit" not in axis for axis in require_ngff_0_5(folder)["axes"])
    assert (zarr.open_group(folder, mode="r")["0"][:] == 1.0).all()
