"""The finer pass from a scored slide to its files, and what it is refused for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely

from bagscope.artifacts import folder_faults
from bagscope.cohort.jobs import Job
from bagscope.cohort.progress import SilentReporter
from bagscope.errors import ConfigError, FingerprintMismatch, SlideError
from bagscope.features.store import FeatureStore
from bagscope.mil.bundle import MemberPlace, write_bundle
from bagscope.mil.cases import Case
from bagscope.mil.feature_origin import origin_of
from bagscope.mil.member import save_member
from bagscope.mil.score_file import read_score_file
from bagscope.mil.sources import StoreSource
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.trainer import Trainer
from bagscope.pipeline import fine
from bagscope.pipeline.bundle import member_folders
from bagscope.pipeline.extract import extract_cohort
from bagscope.pipeline.fine import FineRequest, draw_finer
from bagscope.pipeline.fine_sources import encoder_session, members_of
from bagscope.pipeline.fine_tiles import FineRegion, finer_step_px, parse_region
from bagscope.pipeline.predict_worker import ScoreTask, score_one
from bagscope.pipeline.study import init_study, open_study
from bagscope.wsi.geojson import read_regions
from bagscope.wsi.slide import RectL0
from tests.cli.conftest import files_of
from tests.mil.made_bags import TARGET, made_recipe
from tests.stained import build_stained_svs

TILE_PX = 128
REGION = (300, 350, 330, 200)
BOUNDS = RectL0(x_l0=0, y_l0=0, width_l0=1600, height_l0=1200)


@pytest.fixture(scope="module")
def scored_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study of two slides of one patient, scored by two members."""
    folder = tmp_path_factory.mktemp("fine")
    rows = ["slide_id,path,patient_id"]
    for seed, name in enumerate("ab"):
        build_stained_svs(folder / "slides" / f"{name}.svs", mpp=1.0, seed=seed)
        rows.append(f"{name},slides/{name}.svs,p")
    (folder / "slides.csv").write_text("\n".join(rows) + "\n")
    settings = {
        "tiling": {"mpp": 1.0, "tile_px": TILE_PX},
        "features": {"encoders": ["color-texture"], "device": "cpu"},
        "run": {"workers": 1},
    }
    study, _ = init_study(folder / "study", str(folder / "slides.csv"), settings=settings)
    assert extract_cohort(study, SilentReporter()).report.exit_code == 0
    location = study.folder / "features" / "1.00mpp_128px" / "color-texture"
    store = FeatureStore.open(location)
    cases = [
        Case(case_id=s, patient_id=s, slide_ids=(s,), targets={"label": (float(place),)})
        for place, s in enumerate("ab")
    ]
    run = study.folder / "runs" / "r"
    recipe = made_recipe(training={"epochs": 1})
    folders = {}
    for seed in range(2):
        trained = Trainer(recipe, [TARGET], StoreSource(store, cases), None, seed=seed).run()
        folders[f"m{seed}"] = run / f"m{seed}"
        save_member(finish(trained, recipe, None, seed=seed, fields={}), folders[f"m{seed}"])
    write_bundle(
        run / "model.bagscope",
        run="r",
        per="patient",
        origin=origin_of(store.record(slide_id) for slide_id in "ab"),
        members=[(MemberPlace(name=name), path) for name, path in folders.items()],
    )
    score_one(
        Job(
            slide_id="a",
            payload=ScoreTask(
                case=Case(case_id="p", patient_id="p", slide_ids=("a", "b")),
                members=tuple(member_folders(folders).values()),
                location=str(location),
                out=run / "scores",
                device="cpu",
                threads=1,
                overwrite=True,
            ),
        )
    )
    return folder


@pytest.fixture
def scored(scored_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scored_once, tmp_path / "fine"))


def request(folder: Path, region: object = REGION, **options: object) -> FineRequest:
    text = ",".join(map(str, region)) if isinstance(region, tuple) else str(region)
    values: dict[str, object] = {"slides": ("a",), **options}
    return FineRequest(place=folder / "study" / "runs" / "r", region=text, **values)  # type: ignore[arg-type]


# --- the pass -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(scored_once: Path) -> Iterator[tuple[Path, Path]]:
    """Return a folder with a finer pass of slide a, and the pass's own folder."""
    before = files_of(scored_once / "study" / "features")
    found = draw_finer(request(scored_once))
    assert found.is_new and found.warnings == ()
    assert files_of(scored_once / "study" / "features") == before
    yield scored_once, found.folder
    shutil.rmtree(found.folder)


def test_tiles_that_coincide_have_the_stored_score(drawn: tuple[Path, Path]) -> None:
    folder, made = drawn
    assert made.name == "ratio-fine-300_350_330_200"
    assert folder_faults(made) == []
    table = pd.read_csv(made / "fine.csv")
    files = {
        name: read_score_file(folder / "study" / "runs" / "r" / "scores" / f"{name}.h5")
        for name in "ab"
    }
    own = files["a"]
    # The patient's bag has the tiles of both slides.
    count = len(own.scores) + len(files["b"].scores)
    assert own.coords_l0 is not None
    stored = dict(
        zip(map(tuple, own.coords_l0.tolist()), count * np.exp(own.scores[:, 0]), strict=True)
    )
    x, y, width, height = REGION
    inside = {
        place
        for place in stored
        if x - TILE_PX < place[0] < x + width and y - TILE_PX < place[1] < y + height
    }
    both = table[[(p in stored) for p in zip(table.x_l0, table.y_l0, strict=True)]]
    assert set(zip(both.x_l0, both.y_l0, strict=True)) == inside
    assert len(inside) >= 6
    expected = [stored[place] for place in zip(both.x_l0, both.y_l0, strict=True)]
    np.testing.assert_allclose(both.ratio, expected, rtol=1e-4)


def test_every_tile_that_holds_a_part_of_the_region_is_there(drawn: tuple[Path, Path]) -> None:
    table = pd.read_csv(drawn[1] / "fine.csv")
    x, y, width, height = REGION
    step = TILE_PX // 4
    columns = range((x - TILE_PX) // step + 1, -(-(x + width) // step))
    rows = range((y - TILE_PX) // step + 1, -(-(y + height) // step))
    wanted = {(column * step, row * step) for column in columns for row in rows}
    # The region lies deep in the tissue.
    assert set(zip(table.x_l0, table.y_l0, strict=True)) == wanted


def test_objects_have_the_mean_of_the_tiles_over_them(drawn: tuple[Path, Path]) -> None:
    table = pd.read_csv(drawn[1] / "fine.csv")
    regions = read_regions(drawn[1] / "fine.geojson", bounds_l0=BOUNDS)
    assert len(regions) > 50
    area = 0.0
    for region in regions:
        ring = region.polygons[0].exterior_l0
        x, y = ring.mean(axis=0)
        over = table[
            (table.x_l0 < x)
            & (x < table.x_l0 + TILE_PX)
            & (table.y_l0 < y)
            & (y < table.y_l0 + TILE_PX)
        ]
        assert len(over) == 16
        assert region.measurements["ratio"] == pytest.approx(over.ratio.mean(), rel=1e-5)
        assert region.object_type == "tile"
        area += shapely.Polygon(ring).area
    # They tile the region, but for cells that it cuts.
    assert area == pytest.approx(REGION[2] * REGION[3], rel=0.15)


def test_a_second_pass_finds_the_first(drawn: tuple[Path, Path]) -> None:
    folder, made = drawn
    again = draw_finer(request(folder))
    assert (again.folder, again.is_new) == (made, False)
    with pytest.raises(FingerprintMismatch, match="parts is 4, asked for 2"):
        draw_finer(request(folder, parts=2))


# --- regions and lattices -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "parts", "found"),
    [(256, 4, 64), (224, 4, 56), (250, 4, 50), (192, 4, 48), (256, 3, 64), (254, 4, 64), (2, 4, 1)],
)
def test_stored_tiles_stand_on_the_finer_lattice_where_that_can_be(
    step: int, parts: int, found: int
) -> None:
    assert finer_step_px(step, parts) == found


def test_numbers_count_in_the_frame() -> None:
    bounds = RectL0(x_l0=100, y_l0=50, width_l0=900, height_l0=700)
    where: dict[str, object] = {"slide_id": "a", "size_l0": (1200, 900), "bounds_l0": bounds}
    for frame, x_l0 in (("openslide", 10), ("qupath", 110)):
        region = parse_region("10,20,300,40", frame=frame, **where)  # type: ignore[arg-type]
        assert (region.box_l0.x_l0, region.box_l0.width_l0) == (x_l0, 300)
    clipped = parse_region("1100,20,300,40", frame="openslide", **where)  # type: ignore[arg-type]
    assert clipped.name == "1100_20_100_40"


def test_footprints_that_share_an_area_are_touched() -> None:
    shape = shapely.Polygon([(100, 100), (300, 120), (180, 310)])
    box = RectL0(x_l0=100, y_l0=100, width_l0=200, height_l0=210)
    rows, columns = np.mgrid[0:12, 0:12]
    coords = (np.stack([columns.ravel(), rows.ravel()], axis=1) * 32).astype(np.int32)
    areas = np.array(
        [shapely.box(x, y, x + 64, y + 64).intersection(shape).area for x, y in coords.tolist()]
    )
    found = FineRegion(shape=shape, box_l0=box).touched(coords, 64)
    clear = (areas == 0) | (areas > 1)
    assert clear.sum() > 130
    np.testing.assert_array_equal(found[clear], areas[clear] > 0)
    square = FineRegion(shape=shapely.box(64, 64, 128, 128), box_l0=box)
    beside = np.array([[0, 64], [128, 64], [64, 0], [64, 128], [1, 64]], np.int32)
    assert square.touched(beside, 64).tolist() == [False] * 4 + [True]


# --- what it is refused for -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "options", "told"),
    [
        ((5000, 10, 100, 100), {}, "outside the slide of 1600×1200 pixels"),
        ((0, 0, 40, 40), {}, "holds no tissue that a tile was made of"),
        ((1, 2, 3), {}, "write four numbers"),
        ((10, 10, 0, 5), {}, "has no area"),
        ("nowhere.geojson", {}, "nor a GeoJSON file"),
        (REGION, {"slides": ()}, "there are 2; name it with --slide"),
        (REGION, {"slides": ("c",)}, "--slide c: has no scores"),
        (REGION, {"scale": "probability"}, "--scale probability"),
        (REGION, {"model": Path("none")}, "none"),
    ],
)
def test_what_can_not_be_looked_into_is_said_in_a_sentence(
    scored_once: Path, region: object, options: dict[str, object], told: str
) -> None:
    with pytest.raises((ConfigError, SlideError), match=told):
        draw_finer(request(scored_once, region, **options))


def test_too_many_tiles_are_refused_before_one_is_encoded(
    scored_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for most in (100, 20):
        monkeypatch.setattr(fine, "MOST_TILES", most)
        with pytest.raises(ConfigError, match=f"finer tiles, more than {most}; choose a smaller"):
            draw_finer(request(scored_once, overwrite=True))


def test_a_region_of_an_annotation(scored_once: Path, tmp_path: Path) -> None:
    shape = shapely.Point(520, 520).buffer(120)
    path = tmp_path / "region.geojson"
    path.write_text(json.dumps(shapely.geometry.mapping(shape)))
    found = draw_finer(request(scored_once, path, dry_run=True))
    box = draw_finer(request(scored_once, (400, 400, 240, 240), dry_run=True))
    assert 0 < found.tiles < box.tiles
    assert not found.folder.exists()


def test_a_slide_that_moved_or_changed(scored: Path) -> None:
    slide = scored / "slides" / "a.svs"
    content = slide.read_bytes()
    slide.write_bytes(content + b"more")
    with pytest.raises(FingerprintMismatch, match=r"a\.svs: is not the file that was tiled"):
        draw_finer(request(scored))
    slide.unlink()
    with pytest.raises(SlideError, match="is not at its path, and finer tiles are cut from it"):
        draw_finer(request(scored))


def test_features_and_tiles_that_are_gone(scored: Path) -> None:
    study = scored / "study"
    tiles = study / "tilings" / "1.00mpp_128px" / "a.h5"
    tiles.rename(tiles.with_suffix(".away"))
    with pytest.raises(SlideError, match="has no tile file of its tiles"):
        draw_finer(request(scored))
    tiles.with_suffix(".away").rename(tiles)
    shutil.rmtree(study / "features")
    with pytest.raises(ConfigError, match="holds no features that the scores of a were made of"):
        draw_finer(request(scored))


def test_other_members_and_encoders_of_unknown_provenance(scored: Path) -> None:
    study = open_study(scored / "study")
    run = study.folder / "runs" / "r"
    file = read_score_file(run / "scores" / "a.h5")
    strange = dataclasses.replace(
        file, fields={**file.fields, "members": {"m0": "0" * 64, "m1": "0" * 64}}
    )
    with pytest.raises(FingerprintMismatch, match=r"was scored by a member m0 that .* not hold"):
        members_of(run, study, strange)
    store = FeatureStore.open(study.folder / "features" / "1.00mpp_128px" / "color-texture")
    record = store.record("a")
    with pytest.raises(ConfigError, match="were imported and do not say which encoder"):
        encoder_session(study, dataclasses.replace(record, weights_sha256="unknown"))
    with pytest.raises(FingerprintMismatch, match="features of color-texture was made differently"):
        encoder_session(study, dataclasses.replace(record, weights_sha256="ab" * 32))
