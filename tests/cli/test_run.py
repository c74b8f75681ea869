"""`bagscope run`: the whole line, its parts, and what it does when a slide fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran, files_of, leftovers

Command = Callable[..., Ran]
FEATURES = "tiling: {mpp: 1.0, tile_px: 128}\nfeatures: {encoders: [color-texture]}\n"
MODELS = """
targets: [{column: label}]
splits: {folds: 2}
train:
  options: {aggregator: {options: {hidden: 8, attention: 4}}, training: {epochs: 2}}
run: {workers: 2}
"""
TILES = "tilings/1.00mpp_128px"


@pytest.fixture
def study(bagscope: Command, slides: Path, tmp_path: Path) -> Path:
    """Return a study of three slides that stops at features."""
    assert bagscope("init", tmp_path / "study", "--slides", slides).code == 0
    (tmp_path / "study/study.yaml").write_text(FEATURES)
    return tmp_path / "study"


@pytest.fixture
def labelled(bagscope: Command, slides: Path, tmp_path: Path) -> Path:
    """Return a study of nine slides, which are links to three, and a broken one."""
    names = [f"{name}{copy}" for copy in range(3) for name in "abc"]
    for name in names:
        os.link(slides / f"{name[0]}.svs", slides / f"{name}.svs")
    (slides / "broken.svs").write_bytes(b"no slide")
    table = [f"{name},slides/{name}.svs,{place % 2}" for place, name in enumerate(names)]
    table += ["broken,slides/broken.svs,1"]
    (tmp_path / "table.csv").write_text("\n".join(["slide_id,path,label", *table, ""]))
    assert bagscope("init", tmp_path / "study", "--slides", tmp_path / "table.csv").code == 0
    (tmp_path / "study/study.yaml").write_text(FEATURES + MODELS)
    return tmp_path / "study"


def test_it_goes_as_far_as_it_is_told_and_resumes(bagscope: Command, study: Path) -> None:
    ran = bagscope("run", study / "study.yaml", "--until", "tile")
    assert ran.code == 0
    assert "scan: 3 slides, 0 with a problem" in ran.out
    assert len((study / "scan.csv").read_text().splitlines()) == 4
    sheet = study / TILES / "contact_sheet.html"
    assert ran.out.endswith(f"open:\n  tile      {sheet}\n")
    assert len(list((study / TILES).glob("*.h5"))) == 3
    assert not (study / "features").exists()
    again = bagscope("run", study)
    assert again.code == 0
    assert "scan:" not in again.out  # it said what lay ahead
    assert "3 skipped" in again.out
    assert len(list((study / "features/1.00mpp_128px/color-texture").glob("*.h5"))) == 3
    assert "names no targets" in again.err
    assert leftovers(study) == []


def test_a_dry_run_says_what_is_there_and_writes_nothing(bagscope: Command, study: Path) -> None:
    before = files_of(study)
    ran = bagscope("run", study, "--dry-run")
    assert ran.code == 0
    stages = [line.split()[0] for line in ran.out.splitlines()]
    assert stages == ["scan", "tile", "extract"]
    assert "3 slides, 0 there" in ran.out
    (study / "cohort.csv").write_text(
        "slide_id,path,label\na,../slides/a.svs,0\nb,../slides/b.svs,1\nc,../slides/c.svs,0\n"
    )
    with (study / "study.yaml").open("a") as file:
        file.write(MODELS)
    before = files_of(study)
    ran = bagscope("run", study, "--dry-run", "--json", "--until", "heatmap")
    plan = [json.loads(line) for line in ran.out.splitlines()]
    assert [one["stage"] for one in plan] == [
        "scan", "tile", "extract", "train", "evaluate", "heatmap"
    ]  # fmt: skip
    assert plan[-1]["place"] == str(study / "heatmaps/abmil")
    assert files_of(study) == before


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (["--until", "heat"], "no such stage (did you mean 'heatmap'?)"),
        (["--shard", "3/2"], "shard is 3/2"),
    ],
)
def test_a_wrong_option_is_refused(
    bagscope: Command, study: Path, what: list[str], message: str
) -> None:
    ran = bagscope("run", study, *what)
    assert ran.code == 2
    assert message in ran.err


def test_another_file_than_study_yaml_is_refused(bagscope: Command, study: Path) -> None:
    ran = bagscope("run", study / "cohort.csv")
    assert ran.code == 2
    assert "name a study folder, or the study.yaml in it" in ran.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "targets: [{column: label}]",
            "cohort.csv, read for its targets: column 'label': none of",
        ),
        ("targets: [{column: grade}]", "grade"),
        ("targets: [{column: slide_id}]\ntrain: {recipe: abmill}", "did you mean 'abmil'?"),
    ],
)
def test_what_would_stop_the_line_later_stops_it_first(
    bagscope: Command, study: Path, settings: str, message: str
) -> None:
    with (study / "study.yaml").open("a") as file:
        file.write(settings)
    ran = bagscope("run", study)
    assert ran.code == 2
    assert message in ran.err
    assert not (study / "tilings").exists()
    assert not (study / "scan.csv").exists()


@pytest.mark.slow
def test_shards_and_one_run_leave_the_same(bagscope: Command, study: Path) -> None:
    whole = study.with_name("whole")
    shutil.copytree(study, whole)
    for shard in ("1/2", "2/2"):
        assert bagscope("run", study, "--shard", shard).code == 0
    assert bagscope("run", whole, "--until", "extract").code == 0
    made = {
        folder: {name: content for name, content in files_of(folder).items() if ".h5" in name}
        for folder in (study, whole)
    }
    assert len(made[study]) == 6
    assert made[study] == made[whole]


def test_slurm_prints_a_script_that_bash_accepts(bagscope: Command, study: Path) -> None:
    spaced = study.rename(study.with_name("a study"))
    how = ["--slurm", "--shards", 5, "--slurm-option", "partition=cpu", "--until", "tile"]
    ran = bagscope("run", spaced, *how)
    assert ran.code == 0
    assert "#SBATCH --array=1-5" in ran.out
    assert "#SBATCH --partition=cpu" in ran.out
    assert f"bagscope run '{spaced}' --until tile" in ran.out
    subprocess.run(["bash", "-n"], input=ran.out, text=True, check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_failed_slide_never_stops_the_line(bagscope: Command, labelled: Path) -> None:
    shard = bagscope("run", labelled, "--shard", "1/2")
    assert f"when all parts are done, go on with: bagscope run {labelled}" in shard.err
    assert not (labelled / "runs").exists()
    ran = bagscope("run", labelled)
    assert ran.code == 1
    assert "failed  broken" in ran.out
    assert "correct it, and run again" in ran.err
    run = labelled / "runs/abmil"
    assert {"predictions.csv", "metrics.json", "report.html"} <= {p.name for p in run.iterdir()}
    assert len((run / "predictions.csv").read_text().splitlines()) == 10
    maps = labelled / "heatmaps/abmil"
    assert len([*maps.glob("*/ratio/overview.png")]) == 9
    page = labelled / "review/abmil/index.html"
    assert page.exists()
    for place in (page, maps, run / "report.html"):
        assert str(place) in ran.out.partition("open:")[2]
    before = files_of(run)
    again = bagscope("run", labelled)
    assert again.code == 1
    after = files_of(run)
    assert {name for name in after if after[name] != before.get(name)} <= {"report.html"}

    slides = labelled.parent / "slides"
    shutil.copyfile(slides / "a.svs", slides / "broken.svs")
    refused = bagscope("run", labelled)
    assert refused.code == 2
    assert "not in the splits: broken" in refused.err
    assert "splits make --overwrite" in refused.err
    assert str(labelled / TILES) in refused.out.partition("open:")[2]
    assert bagscope("splits", "make", labelled, "--target", "label", "--overwrite").code == 0
    anew = bagscope("run", labelled, "--overwrite")
    assert anew.code == 0, anew.err
    assert len((run / "predictions.csv").read_text().splitlines()) == 11
