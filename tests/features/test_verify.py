from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from bagscope.artifacts import SEAL_BLANK, atomic_folder, seal_file, write_json
from bagscope.cohort.status import Status, write_status
from bagscope.errors import ConfigError
from bagscope.features import verify
from bagscope.features.feature_file import FeatureHeader, write_feature_file
from bagscope.features.verify import Fault, verify_feature_file, verify_folder, verify_tile_file
from bagscope.pipeline.verify import verify_study
from bagscope.wsi.opening import open_slide
from bagscope.wsi.tile_file import read_tile_file, write_tile_file
from bagscope.wsi.tiles import tile_slide
from bagscope.wsi.tiling import TilingSpec
from tests.features.stored import ENCODER, TILE, store_slide
from tests.stained import build_stained_svs

TILES, FEATURES, MODEL = (
    "tilings/1.00mpp_64px/a.h5",
    "features/1.00mpp_64px/demo/a.h5",
    "runs/first/model.bagscope",
)
ROWS = 700


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study with one slide, tiled and extracted, and a model; not to be changed."""
    root = tmp_path_factory.mktemp("verify")
    build_stained_svs(root / "a.svs", mpp=1.0)
    study = root / "study"
    study.mkdir()
    (study / "cohort.csv").write_text("slide_id,path\na,../a.svs\n")
    with open_slide(root / "a.svs") as slide:
        tiles = tile_slide(slide, TilingSpec(mpp=1.0, tile_px=32)).tiles
    write_tile_file(
        study / TILES,
        tiles,
        slide_id="a",
        fields={"stage": "tile"},
        tissue_method="x",
        outline_geojson="{}",
        summary={},
    )
    written = read_tile_file(study / TILES)
    assert len(written) >= ROWS
    extract(study, written.coords_l0[:ROWS], written.grid[:ROWS])
    with atomic_folder(study / MODEL, {"stage": "train"}) as folder:
        weights = np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32)
        save_file({"weight": weights}, folder / "model.safetensors")
        write_json(folder / "config.json", {"classes": ["no", "yes"]})
    status = Status(slide_id="a", stage="tile/x", outcome="done", seconds=1.5, host="h")
    write_status(study / "status", status)
    return study


def extract(
    study: Path, coords: np.ndarray | None, grid: np.ndarray | None, **changes: Any
) -> Path:
    tiles = read_tile_file(study / TILES)
    rows = ROWS if coords is None else len(coords)
    values: dict[str, Any] = {
        "slide_id": "a",
        "fields": {"stage": "extract", "tiles": tiles.attributes["fingerprint"]},
        "encoder": ENCODER,
        "weights_sha256": "ab" * 32,
        "coords_l0": coords,
        "grid": grid,
        "tile": TILE,
    }
    vectors = np.random.default_rng(1).normal(size=(rows, 16)).astype(np.float16)
    vectors = changes.pop("vectors", vectors)
    write_feature_file(study / FEATURES, FeatureHeader(**{**values, **changes}), vectors)
    return study / FEATURES


@pytest.fixture
def study(sound: Path, tmp_path: Path) -> Path:
    shutil.copy(sound.parent / "a.svs", tmp_path / "a.svs")
    return Path(shutil.copytree(sound, tmp_path / "study"))


def sentences(faults: list[Fault]) -> str:
    return "\n".join(fault.sentence for fault in faults)


def test_a_sound_study_has_no_faults(sound: Path) -> None:
    told: list[tuple[int, int]] = []
    found = verify_study(sound, lambda done, total: told.append((done, total)))
    assert found.faults == ()
    assert found.exit_code == 0
    assert found.artefacts == 5
    assert told == [(n, 6) for n in range(1, 7)]


def artefacts_of(study: Path) -> list[Path]:
    return [study / TILES, study / FEATURES, *sorted((study / MODEL).iterdir())]


def test_every_flipped_bit_and_every_truncation_is_found(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small sister of benchmarks/drill_verify.py."""
    monkeypatch.setattr(verify, "LOOK_INTO_S", 5)
    chance = random.Random(0)
    for index in range(40):
        path = artefacts_of(study)[index % 5]
        whole = path.read_bytes()
        content = bytearray(whole)
        if index % 3:
            bit = chance.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
        else:
            del content[chance.randrange(len(content)) :]
        path.write_bytes(content)
        places = {fault.path for fault in verify_study(study).faults}
        # A record that states another hash than a file has does not tell which of them is wrong.
        model = study / MODEL
        assert places == {path} or (places and all(model in place.parents for place in places))
        path.write_bytes(whole)
    assert verify_study(study).faults == ()


def test_the_damaged_rows_are_named(study: Path) -> None:
    path = study / FEATURES
    with h5py.File(path) as file:
        begin = file["features"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[begin + 300 * 32] ^= 4
    content[begin + 699 * 32] ^= 4
    path.write_bytes(content)
    found = sentences(verify_feature_file(path))
    assert "content changed since it was written" in found
    assert "rows 256 to 511 are damaged" in found
    assert "rows 512 to 699 are damaged" in found
    assert "rows 0" not in found


def test_a_library_that_hangs_or_crashes_on_a_damaged_file_is_survived(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = study / FEATURES
    os.truncate(path, 5000)
    found = sentences(verify_feature_file(path))
    assert "content changed" in found
    assert "truncated file" in found

    def hangs(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("x", 1)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert "does not come to an end" in sentences(verify_feature_file(path))
    crashed = subprocess.CompletedProcess("x", -11, b"", b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: crashed)
    assert "HDF5 ended with -11" in sentences(verify_feature_file(path))


def test_damaged_hdf5_is_never_opened_in_this_process(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_look_into", lambda *_: [])
    for path in (study / TILES, study / FEATURES):
        content = bytearray(path.read_bytes())
        content[200] ^= 1
        path.write_bytes(content)

    def refuses(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(h5py, "File", refuses)
    found = verify_study(study).faults
    assert [fault.path for fault in found] == [study / FEATURES, study / TILES]


def test_a_tile_file_of_the_first_versions_is_fine_without_a_seal(study: Path) -> None:
    path = study / TILES
    with h5py.File(path, "r+") as file:
        del file.attrs["sha256"]
    content = path.read_bytes().replace(b"bagscope-sha256:", b"0" * 16)
    path.write_bytes(content)
    assert read_tile_file(path).slide_id == "a"
    assert verify_tile_file(path) == []
    with h5py.File(path, "r+") as file:
        file["coords"][0] = file["coords"][1]
    assert "hold the same tile twice: row 0" in sentences(verify_tile_file(path))


def test_a_damaged_mark_does_not_pass_for_a_file_without_a_seal(study: Path) -> None:
    path = study / TILES
    path.write_bytes(path.read_bytes().replace(b"bagscope-sha256:", b"bagscopf-sha256:"))
    assert "its seal is damaged" in sentences(verify_tile_file(path))


def reseal(path: Path) -> None:
    """Seal a file anew, as somebody would who wrote nonsense with this very package."""
    with h5py.File(path, "r+") as file:
        file.attrs["sha256"] = np.bytes_(SEAL_BLANK)
    content = path.read_bytes()
    at = content.rfind(SEAL_BLANK.encode())
    assert content.count(SEAL_BLANK.encode()) == 1, at
    seal_file(path)


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("coords", 7, (0, 0), "coords and grid contradict each other in row 7"),
        ("tissue", 9, 1.5, "tissue is not within 0 and 1 in row 9"),
        ("fold", 9, np.nan, "fold is not within 0 and 1 in row 9"),
    ],
)
def test_tile_files_that_contradict_themselves(
    study: Path, name: str, row: int, value: Any, message: str
) -> None:
    path = study / TILES
    with h5py.File(path, "r+") as file:
        file[name][row] = value
    reseal(path)
    assert message in sentences(verify_tile_file(path))


def test_nan_and_infinity_are_found_by_row(study: Path) -> None:
    tiles = read_tile_file(study / TILES)
    for dtype in (np.float16, np.float32):
        vectors = np.ones((ROWS, 16), dtype)
        vectors[3, 0], vectors[699, 15] = np.nan, -np.inf
        if dtype == np.float32:
            vectors[5, 5] = 1e9
        path = extract(study, tiles.coords_l0[:ROWS], tiles.grid[:ROWS], vectors=vectors)
        (fault,) = verify_feature_file(path, tiles=study / TILES)
        assert fault.sentence.startswith("NaN or infinite values in rows 3, 699;")


def test_features_that_are_not_of_their_tiles(study: Path) -> None:
    tiles = read_tile_file(study / TILES)
    coords, grid = tiles.coords_l0[:ROWS], tiles.grid[:ROWS]

    def found(*arguments: Any, **changes: Any) -> str:
        extract(study, *arguments, **changes)
        return sentences(list(verify_study(study).faults))

    assert found(coords, grid) == ""
    subset = np.arange(0, ROWS, 3)
    assert found(coords[subset], grid[subset]) == ""
    elsewhere = coords.copy()
    elsewhere[5] += 1
    assert "row 5 lie where its tile file has no tile" in found(elsewhere, grid)
    assert "in another order" in found(coords[::-1], grid[::-1])
    assert "its grid is not that" in found(coords, grid + 1)
    assert "lacks coords" in found(None, None)
    other = {"stage": "extract", "tiles": "0" * 64}
    assert "from another tiling" in found(coords, grid, fields=other)
    twice = coords.copy()
    twice[4] = twice[3]
    assert "coords hold the same tile twice: row 3" in found(twice, grid)
    imported = {"stage": "import", "layout": "clam"}
    assert found(elsewhere, grid, fields=imported) == ""


def test_features_whose_tile_file_is_gone(study: Path) -> None:
    (study / TILES).unlink()
    assert "its tile file" in sentences(list(verify_study(study).faults))
    # Features alone, on another machine, are complete in themselves.
    shutil.rmtree(study / "tilings")
    assert verify_study(study).faults == ()


def test_a_damaged_tile_file_is_no_fault_of_its_features(study: Path) -> None:
    for size in (20_000, 100):
        os.truncate(study / TILES, size)
        assert {fault.path for fault in verify_study(study).faults} == {study / TILES}


def lose_complete(study: Path) -> Path:
    (study / MODEL / "complete.json").unlink()
    return study / MODEL


def add_a_file(study: Path) -> Path:
    (study / MODEL / "extra").touch()
    return study / MODEL / "extra"


def lose_a_file(study: Path) -> Path:
    (study / MODEL / "model.safetensors").unlink()
    return study / MODEL / "model.safetensors"


def break_the_status(study: Path) -> Path:
    path = study / "status/tile/x/a.json"
    path.write_text(path.read_text().replace("done", "dome"))
    return path


def break_the_spec(study: Path) -> Path:
    path = study / "tilings/1.00mpp_64px/spec.json"
    path.write_text("{")
    return path


def break_the_execution(study: Path) -> Path:
    path = study / "features/1.00mpp_64px/demo/execution.json"
    path.write_text("[1,")
    return path


def break_the_cohort(study: Path) -> Path:
    (study / "cohort.csv").write_text("slide_id\na\n")
    return study / "cohort.csv"


def break_the_study(study: Path) -> Path:
    (study / "study.yaml").write_text("tilling: {}\n")
    return study / "study.yaml"


def rename_a_slide(study: Path) -> Path:
    (study / FEATURES).rename(study / "features/1.00mpp_64px/demo/b.h5")
    return study / "features/1.00mpp_64px/demo/b.h5"


def mix_encoders(study: Path) -> Path:
    shutil.rmtree(study / "tilings")
    store_slide((study / FEATURES).parent, "b", 3, encoder={"name": "other"})
    return (study / FEATURES).parent


def empty_a_file(study: Path) -> Path:
    os.truncate(study / FEATURES, 0)
    return study / FEATURES


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_complete, "incomplete"),
        (add_a_file, "not in complete.json"),
        (lose_a_file, "missing"),
        (break_the_status, "outcome is 'dome'"),
        (break_the_spec, "not readable as JSON"),
        (break_the_execution, "not readable as JSON"),
        (break_the_cohort, "path"),
        (break_the_study, "tilling"),
        (rename_a_slide, "is of slide 'a'"),
        (mix_encoders, "mixes encoders"),
        (empty_a_file, "empty"),
    ],
)
def test_each_fault_is_named_with_its_place(
    study: Path, damage: Callable[[Path], Path], message: str
) -> None:
    place = damage(study)
    found = verify_study(study)
    assert found.exit_code == 1
    assert place in [fault.path for fault in found.faults]
    assert message in sentences([fault for fault in found.faults if fault.path == place])


def test_slides_are_no_artefacts(study: Path) -> None:
    (study / "slides" / "b.zarr").mkdir(parents=True)
    assert verify_study(study).faults == ()
    (study / "features" / "1.00mpp_64px" / "b.zarr").mkdir()
    assert "incomplete" in sentences(list(verify_study(study).faults))


def test_what_is_being_written_is_left_alone(study: Path) -> None:
    (study / "runs/first/.model.bagscope.h~1~00000000.tmp").mkdir()
    (study / "features/1.00mpp_64px/demo/.b.h5.h~1~00000000.tmp").touch()
    assert verify_study(study).faults == ()


def test_a_place_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no study here"):
        verify_study(tmp_path / "absent")


def test_a_folder_that_was_never_completed(tmp_path: Path) -> None:
    (fault,) = verify_folder(tmp_path)
    assert fault.path == tmp_path
    write_json(tmp_path / "complete.json", {"fields": {}, "fingerprint": "x", "files": []})
    (fault,) = verify_folder(tmp_path)
    assert "fingerprint" in fault.sentence
