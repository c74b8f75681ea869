"""Tiling of small generated scans of one known field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from bagscope.errors import ReadError, SpacingError
from bagscope.wsi.opening import open_slide
from bagscope.wsi.slide import RectL0
from bagscope.wsi.tiles import MAX_PROBES, TiledSlide, tile_slide
from bagscope.wsi.tiling import TilingSpec
from bagscope.wsi.tissue import TissueMap
from tests.builders import build_svs
from tests.stained import TISSUE_UM, build_stained_svs


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[object, ...], Path] = {}

    def scan(mpp: float = 0.5, downsamples: tuple[float, ...] = (1, 4)) -> Path:
        key = (mpp, downsamples)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("scan") / "field.svs"
            build_stained_svs(made[key], mpp=mpp, downsamples=downsamples)
        return made[key]

    return scan


def tiled(path: Path, spec: TilingSpec, **options: object) -> TiledSlide:
    with open_slide(path) as slide:
        return tile_slide(slide, spec, **options)  # type: ignore[arg-type]


SPEC = TilingSpec(tile_px=128, min_sharpness=0.0)


@pytest.mark.parametrize(
    ("mpp_l0", "downsamples"),
    [
        (0.5, (1, 4)),
        (0.23, (1, 3.9998)),
        pytest.param(0.25, (1, 4), marks=pytest.mark.slow),
        pytest.param(0.23, (1, 2.0003, 3.9998), marks=pytest.mark.slow),
    ],
)
def test_any_scan_of_a_field_gives_the_same_physical_tiles(
    scanned: Callable[..., Path], mpp_l0: float, downsamples: tuple[float, ...]
) -> None:
    reference = tiled(scanned(0.5), SPEC).tiles
    path = scanned(mpp_l0, downsamples)
    with open_slide(path) as slide:
        tiles = tile_slide(slide, SPEC).tiles
        common = [tuple(g) for g in tiles.grid.tolist() if g in reference.grid.tolist()]
        # Places at the rim of tissue may fall on either side of the threshold, few of them.
        assert len(common) >= 0.9 * max(len(tiles), len(reference))
        for mine, theirs in ((tiles, reference),):
            positions_um = mine.coords_l0 * mpp_l0
            expected_um = mine.grid * 128 * 0.5
            assert np.abs(positions_um - expected_um).max() <= mpp_l0 / 2 + 1e-9
            assert mine.plan.extent_l0 * mpp_l0 == pytest.approx(theirs.plan.extent_l0 * 0.5)
        # Rounding the region read to whole pixels may change the scale by half a pixel at most.
        assert tiles.plan.mpp_effective == pytest.approx(0.5, rel=0.5 / tiles.plan.region_px)
        rows = [i for i, g in enumerate(tiles.grid.tolist()) if tuple(g) in common][:24]
        images = slide.read_tiles(tiles.coords_l0[rows], tiles.plan).images
    with open_slide(scanned(0.5)) as slide:
        where = [reference.grid.tolist().index(tiles.grid[i].tolist()) for i in rows]
        expected = slide.read_tiles(reference.coords_l0[where], reference.plan).images

    # Nuclei are a few pixels wide: a footprint one pixel off would decorrelate the pictures.
    def blurred(batch: np.ndarray) -> np.ndarray:
        return np.stack([cv2.GaussianBlur(image, (0, 0), 1.5) for image in batch])

    one, other = (blurred(batch).astype(np.float64).ravel() for batch in (images, expected))
    assert np.corrcoef(one, other)[0, 1] > 0.97


def test_tiles_lie_on_tissue_inside_the_slide_and_cover_it(scanned: Callable[..., Path]) -> None:
    spec = SPEC.model_copy(update={"min_tissue": 0.0, "tile_px": 64})
    made = tiled(scanned(), spec)
    tiles, info = made.tiles, made.tiles.info
    ends = tiles.coords_l0 + tiles.plan.extent_l0
    assert (tiles.coords_l0 >= 0).all()
    assert (ends <= (info.width_l0 + 0.5, info.height_l0 + 0.5)).all()
    covered = np.zeros((info.height_l0, info.width_l0), np.bool_)
    for x, y in tiles.coords_l0:
        covered[y : y + 64, x : x + 64] = True
    y_l0, x_l0 = np.mgrid[0 : info.height_l0, 0 : info.width_l0]
    truth = np.zeros_like(covered)
    for cx, cy, rx, ry in TISSUE_UM:
        truth |= ((x_l0 - cx / 0.5) / (rx / 0.5)) ** 2 + ((y_l0 - cy / 0.5) / (ry / 0.5)) ** 2 < 1
    assert (covered & truth).sum() / truth.sum() > 0.995
    assert (covered & ~truth).sum() / (~truth).sum() < 0.15


def test_every_place_is_kept_or_counted_once(scanned: Callable[..., Path]) -> None:
    made = tiled(scanned(), SPEC.model_copy(update={"max_tiles": 20})).tiles
    dropped = dict(made.dropped)
    assert dropped.pop("candidates") == len(made) + sum(dropped.values())
    assert len(made) == 20
    assert dropped["not_sampled"] > 0


def test_overlap_narrows_the_step(scanned: Callable[..., Path]) -> None:
    made = tiled(scanned(), SPEC.model_copy(update={"overlap_px": 32})).tiles
    assert made.lattice.step_l0 == pytest.approx(96)
    assert set(np.unique(made.coords_l0 % 96)) == {0}
    assert len(made) > 1.5 * len(tiled(scanned(), SPEC).tiles)


def test_each_fine_tile_lies_in_its_coarse_parent(scanned: Callable[..., Path]) -> None:
    spec = SPEC.model_copy(update={"coarser_mpp": (1.0, 4.0), "tile_px": 64})
    fine = tiled(scanned(), spec).tiles
    middle = fine.coarser
    assert middle is not None
    assert middle.coarser is not None
    for lower, upper in ((fine, middle), (middle, middle.coarser)):
        assert lower.parent is not None
        parents = upper.coords_l0[lower.parent]
        assert (lower.coords_l0 >= parents).all()
        ends = lower.coords_l0 + lower.plan.extent_l0
        assert (ends <= parents + upper.plan.extent_l0 + 1e-6).all()
        assert set(lower.parent.tolist()) == set(range(len(upper)))
    assert middle.plan.mpp == 1.0
    assert np.all(np.diff(middle.coords_l0[:, 1]) >= 0)


def test_an_annotation_limits_tiles(scanned: Callable[..., Path]) -> None:
    everything = tiled(scanned(), SPEC)
    allowed = np.zeros(everything.tissue_map.tissue.shape, np.bool_)
    allowed[:, : allowed.shape[1] // 2] = True
    made = tiled(scanned(), SPEC, allowed=allowed).tiles
    half_l0 = everything.tiles.info.width_l0 / 2
    assert 0 < len(made) < len(everything.tiles)
    assert (made.coords_l0[:, 0] < half_l0).all()
    assert made.dropped["outside_roi"] > 0


def test_an_edited_mask_is_used_in_place_of_segmentation(scanned: Callable[..., Path]) -> None:
    original = tiled(scanned(), SPEC).tissue_map
    corner = np.zeros_like(original.tissue)
    corner[-30:, -30:] = True
    nothing = np.zeros_like(corner)
    edited = TissueMap(
        tissue=corner, pen=nothing, fold=nothing, mpp=original.mpp, background=(255, 255, 255)
    )
    made = tiled(scanned(), SPEC, edited=edited).tiles
    assert len(made) > 0
    assert (made.coords_l0 > (2500, 1800)).all()


def test_areas_missing_from_the_file_are_left_out_and_counted(
    scanned: Callable[..., Path],
) -> None:
    fault = RectL0(x_l0=512, y_l0=512, width_l0=256, height_l0=256)
    spec = SPEC.model_copy(update={"max_unreadable": 0.2})
    made = tiled(scanned(), spec, faults_l0=(fault,)).tiles
    end = made.coords_l0 + 128
    apart = (end <= (512, 512)) | (made.coords_l0 >= (768, 768))
    assert apart.any(axis=1).all()
    assert made.dropped["unreadable"] == 4
    with pytest.raises(ReadError, match=r"4 of \d+ tiles .* max_unreadable 1\.0%"):
        tiled(scanned(), SPEC, faults_l0=(fault,))


def test_pen_folds_and_blur_are_left_out(scanned: Callable[..., Path]) -> None:
    base = tiled(scanned(), SPEC)
    tissue = base.tissue_map
    half = np.zeros_like(tissue.tissue)
    half[:, : half.shape[1] // 3] = True
    inked = TissueMap(
        tissue=tissue.tissue & ~half,
        pen=tissue.tissue & half,
        fold=np.zeros_like(half),
        mpp=tissue.mpp,
        background=tissue.background,
    )
    made = tiled(scanned(), SPEC.model_copy(update={"min_tissue": 0.1}), edited=inked).tiles
    assert made.dropped["pen"] > 0
    assert made.pen.max() <= SPEC.max_pen
    sharpest = float(np.nanmax(base.tiles.sharpness))
    strict = SPEC.model_copy(update={"min_sharpness": min(1.0, sharpest + 0.01)})
    if sharpest < 1.0:
        assert len(tiled(scanned(), strict).tiles) == 0


def test_a_slide_without_pixel_size_is_refused(tmp_path: Path) -> None:
    build_svs(tmp_path / "a.svs", mpp=None, objective=None, width_px=600, height_px=500)
    with pytest.raises(SpacingError, match="pixel size"):
        tiled(tmp_path / "a.svs", SPEC)


def test_asking_finer_than_scanned_is_refused_unless_allowed(scanned: Callable[..., Path]) -> None:
    with pytest.raises(SpacingError, match=r"scanned at 0\.5"):
        tiled(scanned(), SPEC.model_copy(update={"mpp": 0.25}))
    allowed = SPEC.model_copy(update={"mpp": 0.25, "allow_upsampling": True})
    assert tiled(scanned(), allowed).tiles.plan.region_px == 64


def test_few_windows_are_read_however_many_tiles(scanned: Callable[..., Path]) -> None:
    spec = SPEC.model_copy(update={"tile_px": 32})
    made = tiled(scanned(), spec).tiles
    assert len(made) > 4 * MAX_PROBES
    assert not np.isnan(made.sharpness).all()


def test_an_empty_slide_gives_no_tiles(tmp_path: Path) -> None:
    blank = np.full((700, 900, 3), 243, np.uint8)
    build_svs(tmp_path / "a.svs", mpp=0.5, image=blank)
    found = tiled(tmp_path / "a.svs", SPEC.model_copy(update={"coarser_mpp": (1.0,)}))
    made = found.tiles
    assert found.warnings == ("no tile is kept: 35 little tissue",)
    assert len(made) == 0
    assert made.coords_l0.shape == (0, 2)
    assert made.coarser is not None
    assert len(made.coarser) == 0


def test_a_slide_smaller_than_a_tile_gives_no_tiles(tmp_path: Path) -> None:
    build_svs(tmp_path / "a.svs", mpp=0.5, width_px=100, height_px=90, downsamples=(1,))
    found = tiled(tmp_path / "a.svs", SPEC)
    assert len(found.tiles) == 0
    assert found.tiles.dropped["candidates"] == 0
    assert "smaller than a tile" in found.warnings[-1]
