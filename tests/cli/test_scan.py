from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from bagscope.wsi.tile_file import read_tile_file
from tests.builders import build_svs
from tests.cli.conftest import Ran, files_of

Command = Callable[..., Ran]


def test_a_sound_cohort_is_counted_exactly(bagscope: Command, slides: Path, tmp_path: Path) -> None:
    before = files_of(tmp_path)
    ran = bagscope("scan", slides, "--mpp", 1, "--tile-px", 128, "--json", "--feature-dim", 512)
    assert ran.code == 0, ran.err
    assert files_of(tmp_path) == before
    lines = [json.loads(line) for line in ran.out.splitlines()]
    rows = {line["slide_id"]: line for line in lines if line["event"] == "slide"}
    (totals,) = (line for line in lines if line["event"] == "totals")
    study = tmp_path / "study"
    bagscope("tile", study, "--slides", slides, "--mpp", 1, "--tile-px", 128)
    for name, row in rows.items():
        tiles = read_tile_file(study / "tilings/1.00mpp_128px" / f"{name}.h5")
        assert row["tiles"] == len(tiles)
        assert row["features_mib"] == round(len(tiles) * 512 * 2 / 2**20, 3)
        assert row["mpp"] == 1.0
        assert row["mpp_source"] == "openslide.mpp-x"
        assert row["backend"] == "jpegtiff"
    assert totals["tiles"] == sum(row["tiles"] for row in rows.values())
    assert totals["problems"] == 0


def test_every_problem_is_listed_and_the_exit_code_says_so(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    (slides / "text.svs").write_text("no slide")
    build_svs(slides / "no_mpp.svs", mpp=None, objective=20)
    shutil.copy(slides / "a.svs", slides / "twin.svs")
    table = tmp_path / "scan.csv"
    ran = bagscope("scan", slides, "--mpp", 1, "--csv", table)
    assert ran.code == 1
    with table.open() as handle:
        problems = {row["slide_id"]: row["problem"] for row in csv.DictReader(handle)}
    assert "text.svs" in problems["text"]
    assert "pixel size" in problems["no_mpp"]
    assert problems["twin"] == "same file content as slide a; keep one of them"
    assert problems["a"] == "same file content as slide twin; keep one of them"
    assert problems["b"] == ""
    assert "6 slides, 4 with a problem" in ran.out


def test_an_estimate_from_the_objective_needs_a_flag_and_is_marked(
    bagscope: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    build_svs(folder / "a.svs", mpp=None, objective=20)
    assert bagscope("scan", folder).code == 1
    ran = bagscope("scan", folder, "--allow-estimated-mpp", "--json", "--mpp", 1)
    (row,) = (json.loads(line) for line in ran.out.splitlines() if '"event": "slide"' in line)
    assert row["mpp_source"] == "objective-power"
    assert row["mpp"] == 0.5


def test_a_place_without_slides_is_refused(bagscope: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = bagscope("scan", tmp_path / "empty")
    assert ran.code == 2
    assert "empty" in ran.err
