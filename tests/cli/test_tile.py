"""`bagscope tile` as a user meets it: resuming, refusing, isolating, annotating, exporting."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest
from PIL import Image

from bagscope.wsi.tile_file import read_tile_file
from tests.cli.conftest import Ran, files_of, leftovers
from tests.stained import build_stained_svs

Command = Callable[..., Ran]
OPTIONS = ("--mpp", 1, "--tile-px", 128, "--workers", 2)
NAME = "1.00mpp_128px"


def tile(bagscope: Command, study: Path, *arguments: object) -> Ran:
    return bagscope("tile", study, *OPTIONS, *arguments)


def test_a_folder_becomes_tiles(bagscope: Command, slides: Path, tmp_path: Path) -> None:
    ran = tile(bagscope, tmp_path / "study", "--slides", slides)
    assert ran.code == 0, ran.err
    folder = tmp_path / "study" / "tilings" / NAME
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["a.h5", "b.h5", "c.h5", "contact_sheet.html", "masks", "spec.json"]
    )
    assert "3 done" in ran.out
    tiles = read_tile_file(folder / "a.h5")
    assert len(tiles) > 10
    assert tiles.attributes["mpp"] == 1.0
    status = json.loads((tmp_path / "study/status/tile" / NAME / "a.json").read_text())
    assert status["outcome"] == "done"
    assert status["fingerprint"] == tiles.attributes["fingerprint"]
    assert leftovers(tmp_path / "study") == []
    assert str(tmp_path) not in (folder / "contact_sheet.html").read_text()


def test_running_again_changes_nothing(bagscope: Command, slides: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    tile(bagscope, study, "--slides", slides)
    before = files_of(study)
    ran = tile(bagscope, study)
    assert ran.code == 0
    assert "3 skipped" in ran.out
    after = files_of(study)
    assert {k: v for k, v in before.items() if not k.startswith("status")} == {
        k: v for k, v in after.items() if not k.startswith("status")
    }


def test_artefacts_do_not_depend_on_the_way_to_them(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    assert tile(bagscope, plain, "--slides", slides).code == 0
    assert bagscope("init", sharded, "--slides", slides).code == 0
    for shard in ("1/2", "2/2"):
        assert tile(bagscope, sharded, "--shard", shard).code == 0
    # A lost file is made again, the same to the byte.
    (sharded / "tilings" / NAME / "b.h5").unlink()
    assert tile(bagscope, sharded).code == 0
    assert files_of(plain / "tilings") == files_of(sharded / "tilings")


def test_the_backend_is_recorded_and_makes_no_difference(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    for backend in ("jpegtiff", "openslide"):
        study = tmp_path / backend
        assert tile(bagscope, study, "--slides", slides, "--backend", backend).code == 0
    one, other = (
        read_tile_file(tmp_path / b / "tilings" / NAME / "a.h5") for b in ("jpegtiff", "openslide")
    )
    assert one.attributes["backend"] == "jpegtiff"
    assert other.attributes["backend"] == "openslide"
    assert one.attributes["fingerprint"] == other.attributes["fingerprint"]
    assert (one.coords_l0 == other.coords_l0).all()
    np.testing.assert_array_equal(one.sharpness, other.sharpness)


def test_another_setting_is_refused_by_name(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    tile(bagscope, study, "--slides", slides)
    before = files_of(study)
    ran = tile(bagscope, study, "--min-tissue", 0.9)
    assert ran.code == 2
    assert "spec.min_tissue is 0.25, asked for 0.9" in ran.err
    assert "--overwrite" in ran.err
    assert files_of(study) == before
    assert tile(bagscope, study, "--min-tissue", 0.9, "--overwrite").code == 0
    assert len(read_tile_file(study / "tilings" / NAME / "a.h5").tissue) < len(
        h5py.File(io.BytesIO(before[f"tilings/{NAME}/a.h5"]))["tissue"]
    )


def test_a_slide_that_changed_is_refused_and_the_others_go_on(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    tile(bagscope, study, "--slides", slides)
    build_stained_svs(slides / "b.svs", mpp=1.0, seed=77)
    ran = tile(bagscope, study)
    assert ran.code == 1
    assert "2 skipped, 1 failed" in ran.out
    assert "FingerprintMismatch" in ran.out
    assert "slide." in ran.out


def test_each_broken_slide_fails_alone_with_one_sentence(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    (slides / "text.svs").write_text("this is not a slide\n" * 50)
    (slides / "empty.svs").write_bytes(b"")
    whole = (slides / "a.svs").read_bytes()
    (slides / "cut.svs").write_bytes(whole[: len(whole) // 3])
    (slides / "folder.svs").mkdir()
    table = tmp_path / "cohort.csv"
    names = ["a", "text", "empty", "cut", "folder", "absent", "c"]
    table.write_text("slide_id,path\n" + "".join(f"{n},slides/{n}.svs\n" for n in names))
    study = tmp_path / "study"
    ran = tile(bagscope, study, "--slides", table)
    assert ran.code == 1
    assert "2 done, 5 failed" in ran.out
    for name in ("text", "empty", "cut", "folder", "absent"):
        status = json.loads((study / "status/tile" / NAME / f"{name}.json").read_text())
        assert status["outcome"] == "failed"
        assert status["error_class"] in {"UnsupportedSlide", "ReadError"}
        assert "\n" not in status["message"]
        assert f"{name}.svs" in status["message"]
    made = sorted(p.stem for p in (study / "tilings" / NAME).glob("*.h5"))
    assert made == ["a", "c"]
    assert leftovers(study) == []


@pytest.mark.parametrize("mpp", [0, -0.5, 250])
def test_a_senseless_mpp_is_refused_before_any_work(
    bagscope: Command, slides: Path, tmp_path: Path, mpp: float
) -> None:
    study = tmp_path / "study"
    assert bagscope("init", study, "--slides", slides).code == 0
    ran = bagscope("tile", study, "--mpp", mpp)
    assert ran.code == 2
    assert f"tiling.mpp is {float(mpp)!r}" in ran.err
    assert not (study / "tilings").exists()


def test_a_table_overrides_the_pixel_size(bagscope: Command, slides: Path, tmp_path: Path) -> None:
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,path,mpp\na,slides/a.svs,0.5\nb,slides/b.svs,\n")
    study = tmp_path / "study"
    assert tile(bagscope, study, "--slides", table, "--allow-upsampling").code == 0
    folder = study / "tilings" / NAME
    assert read_tile_file(folder / "a.h5").spacing.mpp_x == 0.5
    assert read_tile_file(folder / "a.h5").spacing.source == "override"
    assert read_tile_file(folder / "b.h5").spacing.mpp_x == 1.0


def test_a_dry_run_writes_nothing(bagscope: Command, slides: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    bagscope("init", study, "--slides", slides)
    before = files_of(study)
    ran = tile(bagscope, study, "--dry-run")
    assert ran.code == 0
    assert "0 of 3 slides" in ran.out
    assert files_of(study) == before


def test_json_is_one_object_per_event(bagscope: Command, slides: Path, tmp_path: Path) -> None:
    ran = tile(bagscope, tmp_path / "study", "--slides", slides, "--json")
    events = [json.loads(line) for line in ran.out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "run_started"
    assert kinds.count("slide_finished") == 3
    assert kinds[-1] == "run_finished"
    last = [event for event in events if event["event"] == "slide_finished"][-1]
    assert last["progress"]["finished"] == 3
    assert last["facts"]["tiles"] > 0


def square(x: int, y: int, edge: int, name: str) -> dict[str, object]:
    ring = [[x, y], [x + edge, y], [x + edge, y + edge], [x, y + edge], [x, y]]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": name, "color": [1, 2, 3]}},
    }


def test_tiles_stay_in_the_annotation(bagscope: Command, slides: Path, tmp_path: Path) -> None:
    study, roi = tmp_path / "study", tmp_path / "roi"
    roi.mkdir()
    drawn = [square(256, 256, 512, "Tumor"), square(256, 256, 128, "Necrosis")]
    for name in ("a", "b"):
        content = {"type": "FeatureCollection", "features": drawn}
        (roi / f"{name}.geojson").write_text(json.dumps(content))
    ran = tile(
        bagscope, study, "--slides", slides, "--roi", roi, "--roi-include", "tumor",
        "--roi-exclude", "Necrosis", "--min-tissue", 0.5,
    )  # fmt: skip
    assert ran.code == 1
    assert "no annotation file" in ran.out
    coords = read_tile_file(study / "tilings" / NAME / "a.h5").coords_l0
    assert len(coords) > 5
    assert (coords >= 256 - 64).all()
    assert (coords + 128 <= 768 + 64).all()
    assert [256, 256] not in coords.tolist()


def test_a_misspelt_class_is_refused_before_any_work(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    study, roi = tmp_path / "study", tmp_path / "all.geojson"
    roi.write_text(json.dumps(square(100, 100, 400, "Tumor")))
    ran = tile(bagscope, study, "--slides", slides, "--roi", roi, "--roi-include", "Tumour")
    assert ran.code == 2
    assert "'Tumour'" in ran.err
    assert "'Tumor'" in ran.err
    assert not (study / "tilings").exists()


def test_an_annotation_beside_the_slide_is_named(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    roi = tmp_path / "far.geojson"
    roi.write_text(json.dumps(square(50_000, 50_000, 100, "Tumor")))
    ran = tile(bagscope, tmp_path / "study", "--slides", slides, "--roi", roi)
    assert ran.code == 1
    assert "3 failed" in ran.out
    assert "far.geojson" in ran.out


def test_an_edited_mask_is_used_and_never_overwritten(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    tile(bagscope, study, "--slides", slides)
    masks = study / "tilings" / NAME / "masks"
    edited = json.dumps(
        {"type": "FeatureCollection", "features": [square(384, 384, 384, "Tissue")]}
    )
    (masks / "a.geojson").write_text(edited)
    (study / "tilings" / NAME / "a.h5").touch()
    refused = tile(bagscope, study, "--overwrite", "--min-tissue", 0.3)
    assert refused.code == 1
    assert "was edited" in refused.out
    assert (masks / "a.geojson").read_text() == edited
    used = tile(bagscope, study, "--overwrite", "--min-tissue", 0.3, "--masks", masks)
    assert used.code == 0, used.out
    tiles = read_tile_file(study / "tilings" / NAME / "a.h5")
    assert tiles.attributes["tissue_method"] == "edited"
    assert sorted(tiles.coords_l0.tolist()) == [
        [x, y] for x in (384, 512, 640) for y in (384, 512, 640)
    ]
    assert (masks / "a.geojson").read_text() == edited


@pytest.mark.parametrize("layout", ["tar", "folder"])
def test_exported_tiles_are_the_slide_s_pixels(
    bagscope: Command, slides: Path, tmp_path: Path, layout: str
) -> None:
    study, png = tmp_path / "study", tmp_path / "png"
    ran = tile(bagscope, study, "--slides", slides, "--export-png", png, "--export-layout", layout)
    assert ran.code == 0, ran.out
    coords = read_tile_file(study / "tilings" / NAME / "a.h5").coords_l0
    x, y = coords[3].tolist()
    name = f"a_x{x}_y{y}.png"
    if layout == "tar":
        with tarfile.open(png / "a.tar") as shard:
            assert len(shard.getnames()) == len(coords)
            member = shard.extractfile(name)
            assert member is not None
            picture = Image.open(io.BytesIO(member.read()))
            picture.load()
    else:
        picture = Image.open(png / "a" / name)
        picture.load()
    with openslide.OpenSlide(slides / "a.svs") as slide:
        expected = slide.read_region((x, y), 0, (128, 128)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    picture.close()
    again = tile(bagscope, study, "--export-png", png, "--export-layout", layout)
    assert "3 skipped" in again.out


def run_restricted(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script that can't write files, coverage data among them."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )


def test_a_file_size_limit_fails_each_slide_and_leaves_nothing(
    slides: Path, tmp_path: Path
) -> None:
    """A process that may not write more than 12 KiB per file stands in for a full disk."""
    study = tmp_path / "study"
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (12288, 12288));"
        f"sys.argv = ['bagscope', 'tile', {str(study)!r}, '--slides', {str(slides)!r}];"
        "from bagscope.cli.app import main; main()"
    )
    ran = run_restricted(script)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert "could not be written (File too large)" in ran.stdout + ran.stderr
    assert list((study / "tilings").rglob("*.h5")) == []
    assert leftovers(study) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_read_only_study_is_one_sentence(slides: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    subprocess.run(
        [sys.executable, "-m", "bagscope", "init", study, "--slides", slides], check=True
    )
    shutil.copytree(study, tmp_path / "before")
    for path in (tmp_path, *tmp_path.parents[:3]):
        path.chmod(0o755)
    script = (
        # Codecs are loaded on first use, and that user may have no access to the interpreter.
        "import os, sys, encodings.utf_8_sig; from bagscope.cli.app import main;"
        "os.setgid(65534); os.setuid(65534);"
        f"sys.argv = ['bagscope', 'tile', {str(study)!r}]; main()"
    )
    ran = run_restricted(script)
    assert ran.returncode in (1, 2)
    assert "Traceback" not in ran.stderr
    assert "Permission denied" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert files_of(study) == files_of(tmp_path / "before")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--frame", "imagej"), "choose one of qupath, openslide"),
        (("--export-png", "x", "--export-layout", "zip"), "choose one of tar, folder"),
        (("--shard", "3/2"), "3/2"),
        (("--roi", "nowhere"), "no such file"),
        (("--roi-include", "Tumor"), "pass --roi"),
        (("--backend", "magic"), "magic"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    bagscope: Command, slides: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    study = tmp_path / "study"
    bagscope("init", study, "--slides", slides)
    ran = bagscope("tile", study, *arguments)
    assert ran.code == 2
    assert message in ran.err


def test_a_study_that_is_not_there_is_named(bagscope: Command, tmp_path: Path) -> None:
    ran = bagscope("tile", tmp_path / "nowhere")
    assert ran.code == 2
    assert "bagscope init" in ran.err
