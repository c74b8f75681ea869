"""Two stages as they are typed: trained, predicted, shown and explained on FINE::COARSE."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from bagscope.mil.bundle import load_bundle
from bagscope.mil.score_file import read_score_file
from tests.cli.conftest import Ran
from tests.features.aligned import FINE_TILES, store_aligned

Command = Callable[..., Ran]
SLIDES = 8
RECIPE = """
aggregator: {name: abmil, options: {hidden: 8, attention: 4}}
regime:
  name: two_stage
  options:
    coarse: {name: abmil, options: {hidden: 8, attention: 4}}
    tiles: 2
    clusters: 2
    components: 2
bags: {bags_per_step: 4}
training: {epochs: 1, patience: null, min_epochs: 0}
"""
CHOSEN_TILES = 2 * 4
"""Two coarse tiles of four fine ones each."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [f"s{place:02d},slides/s{place:02d}.svs,p{place},{place % 2}" for place in range(SLIDES)]
    table = tmp_path / "cohort.csv"
    table.write_text("\n".join(["slide_id,path,patient_id,label", *rows]) + "\n")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.yaml").write_text(
        f"cohort: {table}\nsplits: {{method: kfold, folds: 2}}\nrun: {{workers: 1}}\n"
    )
    (tmp_path / "two.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.slow
def test_two_stages_go_the_whole_line(bagscope: Command, folder: Path) -> None:
    location = store_aligned(folder, SLIDES)
    asked = ("--recipe", folder / "two.yaml", "--target", "label", "--features", location)
    ran = bagscope("train", folder / "study", *asked, "--final")
    assert ran.code == 0, ran.out + ran.err
    run, out = folder / "study" / "runs" / "two", folder / "out"
    assert load_bundle(run / "model.bagscope").origin.name == "planted::planted"

    ran = bagscope("predict", run, location, "--out", out, "-j", 1)
    assert ran.code == 0, ran.out + ran.err
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
        assert [row["case_id"] for row in csv.DictReader(file)] == [
            f"s{place:02d}" for place in range(SLIDES)
        ]
    scores = read_score_file(out / "scores" / "s01.h5").scores[:, 0]
    assert len(scores) == FINE_TILES
    assert (scores > scores.max() - 50).sum() == CHOSEN_TILES

    ran = bagscope("heatmap", out, "--out", folder / "maps", "-j", 1, "--formats", "csv")
    assert ran.code == 0, ran.out + ran.err
    ran = bagscope(
        "explain", out, "--model", run, "--features", location, "--out", folder / "why",
        "--methods", "necessity,leave-one-out", "-j", 1,
    )  # fmt: skip
    assert ran.code == 0, ran.out + ran.err
    assert (folder / "why" / "summary.json").exists()

    # In a study, what the scores were made of is found without being named.
    for tiling, own in (("1.00mpp", "fine"), ("2.00mpp", "coarse")):
        (folder / "study" / "features" / tiling).mkdir(parents=True)
        (folder / "study" / "features" / tiling / "planted").symlink_to(folder / own)
    ran = bagscope("explain", run, "--methods", "necessity", "-j", 1)
    assert ran.code == 0, ran.out + ran.err
    ran = bagscope("evaluate", run, "--resamples", 100)
    assert ran.code == 0 and "not at hand" not in ran.out, ran.out + ran.err


def test_features_of_one_resolution_are_refused_before_training(
    bagscope: Command, folder: Path
) -> None:
    store_aligned(folder, SLIDES)
    asked = ("--recipe", folder / "two.yaml", "--target", "label", "--features", folder / "fine")
    ran = bagscope("train", folder / "study", *asked)
    assert ran.code == 2
    assert "s00, s01, " in ran.err
    assert "(8 of 8 cases) are of one resolution; give those of two aligned" in ran.err
    assert not (folder / "study" / "runs").exists()


def test_a_run_of_two_stages_that_does_not_fit_is_given_no_hint_that_it_refuses(
    bagscope: Command, folder: Path
) -> None:
    location = store_aligned(folder, SLIDES)
    asked = ("--recipe", folder / "two.yaml", "--target", "label", "--features", location)
    ran = bagscope(
        "train", folder / "study", *asked, "--overfit", 4, "--set", "optimiser.lr=1e-9", "--json"
    )
    assert "raise optimiser.lr" in ran.out
    assert "standardise" not in ran.out
