from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from bagscope.cli.app import app
from bagscope.cohort.progress import SilentReporter
from bagscope.errors import ConfigError, FingerprintMismatch
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.demo import DemoRequest, parse_demo_stage, run_demo
from bagscope.pipeline.demo_findings import findings_of
from bagscope.pipeline.demo_slides import TUMOR_FRACTIONS, SlidesSpec, write_slides
from bagscope.pipeline.evaluate import EvaluateRequest, evaluate_run
from bagscope.wsi.geojson import write_regions
from bagscope.wsi.outline import Polygon, Region
from bagscope.wsi.slide import RectL0
from bagscope.wsi.synthetic import SyntheticSpec
from bagscope.wsi.synthetic.cohort import write_alone
from tests.heatmaps.made_run import TILE_PX, write_scores
from tests.pipeline.made_runs import made_cohort, made_run

TINY = SlidesSpec(slides=4, size_px=512, seed=3)


def written(folder: Path, spec: SlidesSpec = TINY) -> None:
    made = write_slides(
        folder, spec, SilentReporter(), workers=1, status_dir=folder / "study" / "status"
    )
    assert made.exit_code == 0


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for name in ("slides", "truth")
        for path in sorted((folder / name).iterdir())
    }


def test_half_of_the_slides_have_a_little_tumour() -> None:
    planned = SlidesSpec().planned()
    shares = [row.spec.tumor_fraction for row in planned if row.label == "tumor"]
    assert len(planned) == 40
    assert len(shares) == 20
    assert TUMOR_FRACTIONS[0] <= min(shares) < max(shares) <= TUMOR_FRACTIONS[1] < 0.1
    assert {row.spec.tumor_fraction for row in planned if row.label == "normal"} == {0}


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of the tiny demo's slides, not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    written(folder)
    return folder


def test_slides_that_were_cut_off_are_written_again_and_others_kept(
    made_once: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made_once, tmp_path / "demo"))
    whole = files_of(folder)
    assert len([name for name in whole if name.endswith(".svs")]) == 4
    kept = folder / "slides" / "slide_001.svs"
    before = kept.stat().st_mtime_ns
    # As left behind by a kill: a slide without its outlines in `truth`, and no table yet.
    (folder / "slides" / "slide_000.svs").write_bytes(b"half")
    (folder / "truth" / "slide_000.geojson").unlink()
    (folder / "slides" / "cohort.csv").unlink()
    written(folder)
    assert files_of(folder) == whole
    assert kept.stat().st_mtime_ns == before


def test_a_folder_of_other_slides_is_refused(made_once: Path) -> None:
    other = SlidesSpec(slides=4, size_px=512, seed=4)
    with pytest.raises(FingerprintMismatch, match="name another folder"):
        written(made_once, other)


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match="evaluate"):
        parse_demo_stage("evalute")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return an evaluated run of eight slides, and the folder of the truth."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    labels = ["normal", "tumor"] * 4
    bags = [rng.normal(size=(8, 3)) for _ in labels]
    study, features = made_cohort(folder, bags, {"label": labels})
    for place, label in enumerate(labels):
        # The stain gives the label away, which the features do not.
        spec = SyntheticSpec(
            width_px=256, height_px=256, mpp=0.5, seed=place, site=int(label == "tumor")
        )
        write_alone(folder / f"s{place:03d}.svs", spec)
    target = TargetSpec(column="label", positive="tumor")
    run = made_run(study, features, target, lambda case, seed: (0.4, 0.6), splits={"folds": 2})
    evaluate_run(EvaluateRequest(run=run, features=str(features), resamples=100))
    for place, label in enumerate(labels):
        name = f"s{place:03d}"
        # Tumour covers the first tile wholly, and less than half of the second.
        width = 1.25 * TILE_PX
        corners = ((0.0, 0.0), (width, 0.0), (width, TILE_PX), (0.0, TILE_PX))
        shape = Polygon(exterior_l0=np.array(corners), holes_l0=())
        regions = [Region(class_name="Tumor", polygons=(shape,), colour=(200, 0, 0))]
        write_regions(
            folder / "truth" / f"{name}.geojson",
            regions if label == "tumor" else [],
            bounds_l0=RectL0(x_l0=0, y_l0=0, width_l0=512, height_l0=384),
            slide_name=f"{name}.svs",
        )
        write_scores(run, name, scores_of(place)[:, None])
    return run, folder / "truth"


def scores_of(place: int) -> np.ndarray:
    """Return log weights (8,) that add up to 1, somewhat higher for the first tile."""
    values = np.random.default_rng(place).normal(size=8)
    values[0] += 1.5
    return values - np.log(np.exp(values).sum())


def test_tiles_are_held_against_the_planted_tumour(planted: tuple[Path, Path]) -> None:
    found = findings_of(*planted)
    scores = np.stack([scores_of(place) for place in range(8)])
    truth = np.zeros((8, 8), bool)
    truth[1::2, 0] = True
    assert found.tiles == 64
    assert found.tumor_tiles == 4
    assert found.tile_auroc == pytest.approx(roc_auc_score(truth.ravel(), scores.ravel()), abs=1e-6)
    within = [roc_auc_score(truth[place], scores[place]) for place in range(1, 8, 2)]
    assert found.tile_auroc_within == pytest.approx(np.mean(within), abs=1e-6)
    assert found.tile_auroc is not None
    assert 0 < found.tile_auroc < 1


def test_a_colour_that_gives_the_label_away_is_seen(planted: tuple[Path, Path]) -> None:
    found = findings_of(*planted)
    assert found.colour_auroc == 1
    assert found.auroc == 0.5  # the same answer for all
    assert found.slides == 8
    assert (found.warned_tumor, found.warned_normal) == (0, 0)  # nothing was judged


@pytest.mark.slow
def test_the_command_says_what_each_stage_is_for_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = ["demo", str(folder), "--slides", "12", "--size-px", "512", "--workers", "2"]
    first = CliRunner().invoke(app, [*command, "--until", "tile"])
    assert first.exit_code == 0, first.output
    assert "[1/3] slides:" in first.stdout
    assert "[3/3] tile:" in first.stdout
    assert "12 slides done" in first.stdout
    assert "contact_sheet.html" in first.stdout
    assert max(map(len, first.stdout.replace(str(tmp_path), "").splitlines())) <= 80
    again = CliRunner().invoke(app, [*command, "--until", "slides", "--json"])
    assert again.exit_code == 0
    events = [json.loads(line) for line in again.stdout.splitlines()]
    assert {e["outcome"] for e in events if e["event"] == "slide_finished"} == {"skipped"}
    assert (events[-1]["event"], events[-1]["findings"]) == ("demo", None)
    with (folder / "study" / "cohort.csv").open(encoding="utf-8", newline="") as handle:
        labels = [row["label"] for row in csv.DictReader(handle)]
    assert sorted(labels) == ["normal"] * 6 + ["tumor"] * 6


@pytest.mark.slow
def test_the_whole_demo_ends_on_a_page_and_is_made_once(tmp_path: Path) -> None:
    request = DemoRequest(folder=tmp_path, slides=SlidesSpec(slides=12, size_px=1024))
    done = list(run_demo(request, SilentReporter()))
    assert [one.exit_code for one in done] == [0] * 8
    assert done[-1].page is not None and done[-1].page.is_file()
    predictions = request.run / "predictions.csv"
    first = predictions.read_bytes()
    assert [one.exit_code for one in run_demo(request, SilentReporter())] == [0] * 7
    assert predictions.read_bytes() == first
