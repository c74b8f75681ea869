"""Which tiles a gallery shows, that their pixels are the slide's, and what is said of the rest."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from bagscope.errors import UnsupportedSlide
from bagscope.heatmaps.colours import shared_scale
from bagscope.heatmaps.gallery import (
    GalleryOptions,
    GalleryPart,
    Side,
    cut_tiles,
    cutting_plan,
    open_as_tiled,
    pick_sides,
    pick_tiles,
    write_gallery,
)
from bagscope.heatmaps.tile_places import TilePlaces, places_of
from bagscope.wsi.geometry import plan_read
from bagscope.wsi.opening import open_slide
from bagscope.wsi.synthetic.faults import corrupt_tile_copy
from tests.builders import build_svs
from tests.heatmaps.made import made_places

COLOURS = shared_scale("ratio", "log_weight", [(0.25, 4.0)])
WIDTH, HEIGHT, TILE = 512, 384, 64


def places_on(width: int, height: int, extent_l0: float) -> TilePlaces:
    """Return every tile of a lattice over a slide."""
    columns, rows = int(width / extent_l0), int(height / extent_l0)
    row, column = (axis.ravel() for axis in np.mgrid[0:rows, 0:columns])
    grid = np.stack([column, row], axis=1).astype(np.int32)
    tile = {
        "extent_l0": extent_l0,
        "step_l0": extent_l0,
        "origin_l0": [0.0, 0.0],
        "bounds_l0": [0, 0, width, height],
        "width_l0": width,
        "height_l0": height,
        "mpp_x_l0": 0.5,
        "mpp_y_l0": 0.5,
    }
    return places_of(np.rint(grid * extent_l0).astype(np.int32), grid, tile, len(grid))


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gallery") / "a.svs"
    build_svs(path, width_px=WIDTH, height_px=HEIGHT, tile_px=128)
    return path


# --- which tiles ----------------------------------------------------------------------------


def picked_slowly(
    values: list[float], coords: np.ndarray, count: int, side: Side, far: float, barred: set[int]
) -> list[int]:
    """Pick by the definition: best first, ties by order, too near ones passed over."""
    sign = -1 if side == "top" else 1
    known = [i for i, value in enumerate(values) if not math.isnan(value) and i not in barred]
    found: list[int] = []
    for i in sorted(known, key=lambda i: (sign * values[i], i)):
        if len(found) < count and all(math.dist(coords[i], coords[j]) >= far for j in found):
            found.append(i)
    return found


@given(
    values=st.lists(
        st.one_of(st.integers(-3, 3).map(float), st.just(math.nan)), min_size=1, max_size=40
    ),
    count=st.integers(0, 8),
    side=st.sampled_from(["top", "bottom"]),
    far=st.sampled_from([0.0, 64.0, 65.0, 150.0]),
    barred=st.sets(st.integers(0, 5)),
)
@settings(max_examples=150)
def test_tiles_are_picked_as_they_are_said_to_be(
    values: list[float], count: int, side: Side, far: float, barred: set[int]
) -> None:
    barred = {i for i in barred if i < len(values)}
    places = np.stack([np.arange(len(values)) % 6, np.arange(len(values)) // 6], axis=1)
    coords = (places * 64).astype(np.int32)
    found = pick_tiles(
        np.array(values), coords, count, side, min_distance_l0=far, barred=sorted(barred)
    )
    assert found.tolist() == picked_slowly(values, coords, count, side, far, barred)


@pytest.mark.parametrize("tiles", [1, 2, 7, 40])
def test_no_tile_is_on_both_sides_and_few_are_halved(tiles: int) -> None:
    places = made_places(tiles, 1)
    values = np.random.default_rng(tiles).integers(0, 3, tiles).astype(float)
    sides = pick_sides(values, places, 12)
    assert not set(sides["top"]) & set(sides["bottom"])
    assert len(sides["top"]) == min(12, math.ceil(tiles / 2))
    assert len(sides["bottom"]) == min(12, tiles // 2)
    assert (values[sides["top"]].min(initial=9)) >= values[sides["bottom"]].max(initial=0)


@given(
    values=st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=36),
    far=st.sampled_from([0.0, 2.0, 3.0]),
)
@settings(max_examples=100)
def test_no_highest_tile_is_lower_than_a_lowest(values: list[float], far: float) -> None:
    numbers = np.array(values)
    places = places_on(6 * 64, math.ceil(len(values) / 6) * 64, 64.0)
    numbers = np.append(numbers, np.full(len(places) - len(values), math.nan))
    sides = pick_sides(numbers, places, 12, min_distance_l0=far * places.extent_l0)
    assert numbers[sides["top"]].min() >= numbers[sides["bottom"]].max(initial=-9)
    assert numbers[sides["top"]].max() == max(values)
    assert len(values) == 1 or numbers[sides["bottom"]].min() == min(values)


def test_neighbours_are_no_nine_finds() -> None:
    places = made_places(20, 20)
    row, column = np.mgrid[0:20, 0:20]
    hot = np.exp(-((row - 9) ** 2 + (column - 9) ** 2) / 8.0).ravel()
    near = pick_sides(hot, places, 9)["top"]
    apart = pick_sides(hot, places, 9, min_distance_l0=2 * places.extent_l0)["top"]
    assert near[0] == apart[0]
    gaps = [
        math.dist(places.coords_l0[i], places.coords_l0[j])
        for i, j in itertools.combinations(apart, 2)
    ]
    assert min(gaps) >= 2 * places.extent_l0
    assert np.ptp(places.coords_l0[near], axis=0).max() <= 2 * places.extent_l0


# --- their pixels ---------------------------------------------------------------------------


@given(
    mpp_l0=st.floats(0.2, 0.6),
    mpp=st.floats(0.6, 4.0),
    tile_px=st.sampled_from([64, 224, 256, 500]),
    downsamples=st.sampled_from([(1.0,), (1.0, 4.0), (1.0, 3.998, 16.01)]),
)
@settings(max_examples=100)
def test_a_footprint_is_read_as_the_model_s_tile_was(
    mpp_l0: float, mpp: float, tile_px: int, downsamples: tuple[float, ...]
) -> None:
    wanted = plan_read(downsamples, mpp_l0, mpp=mpp, tile_px=tile_px)
    again = plan_read(downsamples, 1.0, mpp=wanted.extent_l0 / tile_px, tile_px=tile_px)
    halves = abs(wanted.extent_l0 / wanted.downsample % 1 - 0.5) < 1e-9  # a tie is nobody's
    assert (again.level, again.downsample) == (wanted.level, wanted.downsample)
    assert again.region_px == wanted.region_px or halves


def test_a_tile_has_the_pixels_of_its_place(slide_path: Path) -> None:
    places = places_on(WIDTH, HEIGHT, TILE)
    with open_slide(slide_path) as slide:
        plan = cutting_plan(slide, places, TILE)
        cut = cut_tiles(slide, places, [13, 0, 47], plan)
        assert cut.problems == ()
        for row, image in zip((13, 0, 47), cut.images, strict=True):
            x, y = places.coords_l0[row].tolist()
            assert image is not None
            np.testing.assert_array_equal(image, slide.read_level(0, x, y, TILE, TILE))
        # Half as fine, as a model at twice the pixel size saw it.
        (half,) = cut_tiles(slide, places, [13], cutting_plan(slide, places, 32)).images
        x, y = places.coords_l0[13].tolist()
        full = slide.read_level(0, x, y, TILE, TILE).reshape(32, 2, 32, 2, 3)
        assert half is not None
        np.testing.assert_allclose(half, full.mean(axis=(1, 3)), atol=0.51)
        # Nobody says how large the model's tiles were.
        assert cutting_plan(slide, places, None).tile_px == 256


def test_surroundings_are_around_the_tile_and_marked(slide_path: Path) -> None:
    places = places_on(WIDTH, HEIGHT, TILE)
    with open_slide(slide_path) as slide:
        plan = cutting_plan(slide, places, TILE)
        inner, corner = cut_tiles(slide, places, [18, 0], plan, context=0.5).images
        assert inner is not None and corner is not None
        x, y = places.coords_l0[18].tolist()
        around = slide.read_level(0, x - 32, y - 32, 128, 128)
    np.testing.assert_array_equal(inner[32:96, 32:96], around[32:96, 32:96])
    np.testing.assert_array_equal(inner[:30], around[:30])
    assert not inner[30:32, 30:98].any() and not inner[30:98, 96:98].any()
    # What is beyond the slide is grey, and neither glass nor tissue.
    assert (corner[:30] == 160).all() and (corner[:, :30] == 160).all()
    np.testing.assert_array_equal(corner[32:96, 32:96], around_of(slide_path, 0, 0))


def around_of(path: Path, x: int, y: int) -> np.ndarray:
    with open_slide(path) as slide:
        return slide.read_level(0, x, y, TILE, TILE)


def test_the_backend_of_the_tiles_is_taken_and_another_one_is_said(slide_path: Path) -> None:
    for stated in ("openslide", "jpegtiff"):
        slide, notes = open_as_tiled(slide_path, {"backend": stated})
        assert (slide.info.backend, notes) == (stated, ())
        slide.close()
    picture = slide_path.with_name("b.png")
    cv2.imwrite(str(picture), np.zeros((64, 64, 3), np.uint8))
    slide, notes = open_as_tiled(picture, {"backend": "openslide"})
    assert slide.info.backend == "image"
    assert "read with backend openslide, which does not open the slide here" in notes[0]
    assert "may differ" in notes[0]
    slide.close()
    with pytest.raises(UnsupportedSlide):
        open_as_tiled(slide_path.with_name("gone.svs"), {})


# --- files ----------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "gallery.csv").open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def part(values: np.ndarray, of: str = "") -> GalleryPart:
    return GalleryPart(of=of, values=values, colours=COLOURS)


def write(folder: Path, path: Path, parts: list[GalleryPart], **options: float) -> tuple[str, ...]:
    places = places_on(WIDTH, HEIGHT, TILE)
    with open_slide(path) as slide:
        return write_gallery(
            folder,
            slide,
            places,
            parts,
            slide_id="a $x$",
            tile_px=TILE,
            options=GalleryOptions(**options),  # type: ignore[arg-type]
            source="scores of r",
        )


def test_the_table_names_pictures_of_the_places_it_states(slide_path: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).permutation(48) / 12.0
    assert write(tmp_path / "g", slide_path, [part(values)], count=3) == ()
    rows = rows_of(tmp_path / "g")
    assert [(row["side"], row["rank"]) for row in rows] == [
        (side, str(rank)) for side in ("top", "bottom") for rank in (1, 2, 3)
    ]
    for row in rows:
        assert float(row["value"]) == pytest.approx(values[int(row["tile"])])
        shown = simplejpeg.decode_jpeg((tmp_path / "g" / row["file"]).read_bytes())
        tissue = around_of(slide_path, int(row["x_l0"]), int(row["y_l0"]))
        assert np.abs(shown.astype(int) - tissue).mean() < 4
    assert rows[0]["tile"] == str(values.argmax())
    assert rows[3]["tile"] == str(values.argmin())
    names = {path.name for path in (tmp_path / "g").iterdir()}
    assert names == {"gallery.csv", "gallery.png", *(row["file"] for row in rows)}


def test_classes_have_pictures_of_their_own(slide_path: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    parts = [part(rng.random(48), of) for of in ("Tumor", "a/b", "tumor")]
    write(tmp_path / "g", slide_path, parts, count=1)
    found = {row["file"]: row["class"] for row in rows_of(tmp_path / "g")}
    assert found == {
        f"{side}_01_{place}.jpg": one.of
        for place, one in enumerate(parts)
        for side in ("top", "bottom")
    }
    assert (tmp_path / "g" / "gallery_2.png").exists()
    write(tmp_path / "one", slide_path, [part(rng.random(48), "tumor")], count=1)
    assert (tmp_path / "one" / "top_01_tumor.jpg").exists()


def test_a_tile_that_can_t_be_read_has_no_picture(slide_path: Path, tmp_path: Path) -> None:
    damaged = corrupt_tile_copy(slide_path, tmp_path / "a.svs", tiles=[0])
    values = np.linspace(1, 0.1, 48)
    values[[0, 30]] = 4.0, 3.0  # tile 0 lies in the stored tile that is damaged
    (note,) = write(tmp_path / "g", damaged, [part(values)], count=2, context=0.25)
    assert note.startswith("gallery: tile at x=0, y=0: ")
    top, second, *_ = rows_of(tmp_path / "g")
    assert (top["tile"], top["file"]) == ("0", "")
    assert second["file"] == "top_02.jpg"
    assert not (tmp_path / "g" / "top_01.jpg").exists()
    assert cv2.imread(str(tmp_path / "g" / "gallery.png")) is not None


def test_the_sheet_shows_each_tile_over_the_heatmap_s_colour(tmp_path: Path) -> None:
    """On a slide of plain tiles the picked ones are found on the sheet by their colour."""
    rng = np.random.default_rng(2)
    plain = rng.integers(30, 220, (6, 8, 3)).astype(np.uint8)
    image = np.repeat(np.repeat(plain, TILE, axis=0), TILE, axis=1)
    build_svs(tmp_path / "p.svs", image=image, subsampling="4:4:4", quality=100)
    values = rng.permutation(48) / 12.0 + 0.1
    write(tmp_path / "g", tmp_path / "p.svs", [part(values, "tumor")], count=2, apart=0)
    stored = cv2.imread(str(tmp_path / "g" / "gallery_tumor.png"))
    assert stored is not None
    sheet = stored[..., ::-1].astype(int)
    for row in (values.argmax(), values.argmin()):
        tile = np.abs(sheet - plain.reshape(-1, 3)[row]).max(axis=2) <= 3
        assert tile.sum() > 180 * 180
        strip = np.abs(sheet - COLOURS.rgb(values[row : row + 1])[0]).max(axis=2) <= 1
        below = np.argwhere(strip)
        # The strip lies right under the tile's picture.
        assert any(tile[y - 3, x] for y, x in below[:: max(1, len(below) // 50)])
