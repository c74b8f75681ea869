"""Commands and examples of the docs run, as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bagscope.wsi.geojson import read_regions
from bagscope.wsi.slide import RectL0
from tests.cli.conftest import Ran, bagscope
from tests.docs_pages import ROOT, blocks_of, commands_of
from tests.stained import build_stained_svs

__all__ = ["bagscope"]

Command = Callable[..., Ran]
SLIDES = 10
"""Slides that five folds of two classes can be made of."""
SMALL = {
    "#encoders: [efficientnet-lite0]": "encoders: [color-texture]",
    "#options: {}": "options: {aggregator: {options: {hidden: 8}}, training: {epochs: 2}}",
}
"""Settings with which a study is done in seconds."""
SLOW_ROOMS = {"Models", "Slides and tiles", "Study", "Testing"}


def rooms() -> list[Any]:
    """Return the example of each room of the API page."""
    found = []
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        name = part.splitlines()[0]
        (code,) = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
        marks = [pytest.mark.slow] if name in SLOW_ROOMS else []
        found.append(pytest.param(code, id=name, marks=marks))
    return found


@pytest.mark.parametrize("code", rooms())
def test_api_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/api.md", "exec"), {"__name__": "example"})


@pytest.mark.slow
def test_arrays_become_heatmaps_without_the_command_line(tmp_path: Path) -> None:
    script = ROOT / "examples" / "arrays_to_heatmap.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 80
    command = [sys.executable, script, tmp_path]
    # One thread: several that wait for each other take minutes where cores are shared.
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=alone)
    found = re.search(r"AUROC ([\d.]+)", ran.stdout)
    assert found is not None
    assert float(found[1]) > 0.9
    assert (tmp_path / "s1.png").read_bytes().startswith(b"\x89PNG")
    bounds = RectL0(x_l0=0, y_l0=0, width_l0=20 * 512, height_l0=12 * 512)
    tiles = read_regions(tmp_path / "s1.geojson", bounds_l0=bounds)
    scores = {
        tuple(tile.polygons[0].exterior_l0.min(axis=0) / 512): tile.measurements["ratio"]
        for tile in tiles
        if tile.object_type == "tile"
    }
    assert len(scores) == 240
    hottest = sorted(scores, key=lambda place: scores[place])[-20:]
    assert sum(max(place) < 5 for place in hottest) >= 18  # the tumour lies in that corner


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_s_commands_run_in_their_order(
    bagscope: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_slides(tmp_path / "slides")
    write_table(tmp_path / "slides.csv", tmp_path / "slides")
    write_table(tmp_path / "new.csv", tmp_path / "slides", first=1)
    done = run_page(bagscope, ROOT / "README.md")
    assert {"init", "run", "scan", "predict", "review"} <= done
    assert len([*(tmp_path / "STUDY/tilings/0.50mpp_256px").glob("*.h5")]) == SLIDES
    assert (tmp_path / "STUDY/runs/abmil/report.html").exists()
    assert (tmp_path / "STUDY/review/abmil/index.html").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_runs_from_install_to_review(
    bagscope: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # What the page downloads.
    build_stained_svs(tmp_path / "one/cmu-1.svs")
    write_slides(tmp_path / "camelyon", "normal_{:03d}.tif", "tumor_{:03d}.tif")
    (table,) = [line for line in shell_lines("tutorial.md") if line.endswith("> camelyon.csv")]
    subprocess.run(["bash", "-euc", table], check=True)
    assert len((tmp_path / "camelyon.csv").read_text().splitlines()) == SLIDES + 1
    write_slides(tmp_path / "slides")
    write_table(tmp_path / "slides.csv", tmp_path / "slides")
    write_table(tmp_path / "new.csv", tmp_path / "slides", first=1)
    run_page(bagscope, ROOT / "docs" / "tutorial.md")
    for page in (
        "ONE/tilings/0.50mpp_256px/contact_sheet.html",
        "CAMELYON/runs/abmil/report.html",
        "CAMELYON/review/abmil/index.html",
        "STUDY/cohort.csv",
        "STUDY2/review/abmil/index.html",
        "NEW/heatmaps/abmil.NEW",
    ):
        assert (tmp_path / page).exists(), page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_clusters_page_runs_on_a_cluster_of_one_machine(
    bagscope: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_slides(tmp_path / "slides")
    write_table(tmp_path / "slides.csv", tmp_path / "slides")
    assert bagscope("init", "STUDY", "--slides", "slides.csv").code == 0
    make_small(tmp_path / "STUDY/study.yaml")
    with cluster() as address:
        commands = commands_of(ROOT / "docs" / "clusters.md")
        assert sum("--dask" in words for words in commands) == 2
        for _, *words in commands:
            given = [address if word.startswith("tcp:") else word for word in words]
            ran = bagscope(*given)
            assert ran.code == 0, (given, ran.out, ran.err)
            if "--slurm" in given:
                assert "gres=gpu:1" in ran.out
                subprocess.run(["bash", "-n"], input=ran.out, text=True, check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_training_page_s_commands_run(
    bagscope: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_slides(tmp_path / "slides")
    write_table(tmp_path / "slides.csv", tmp_path / "slides")
    assert bagscope("init", "STUDY", "--slides", "slides.csv").code == 0
    make_small(tmp_path / "STUDY/study.yaml")
    assert bagscope("extract", "STUDY").code == 0
    for _, *words in commands_of(ROOT / "docs" / "training.md"):
        shorter = ["2" if word == "20" else word for word in words]
        few = ["--set", "training.epochs=2", "--set", "aggregator.options.hidden=8"]
        ran = bagscope(*shorter, *few, *(["--name", "tuned"] if words[0] == "tune" else []))
        assert ran.code == 0, (words, ran.err)


@pytest.mark.network
def test_the_tutorial_s_first_slide_can_be_had(
    bagscope: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (fetch,) = [line for line in shell_lines("tutorial.md") if line.startswith("curl --create")]
    subprocess.run(["bash", "-euc", fetch], check=True)
    for _, *words in commands_of(ROOT / "docs" / "tutorial.md"):
        if "ONE" in words:
            assert bagscope(*words).code == 0
    ran = bagscope("scan", "one", "--json")
    (slide,) = [json.loads(line) for line in ran.out.splitlines() if '"slide"' in line][:1]
    assert (slide["width_px"], slide["height_px"]) == (2220, 2967)


@pytest.mark.network
def test_the_tutorial_s_cohort_is_where_it_says() -> None:
    (line,) = [one for one in shell_lines("tutorial.md") if "camelyon-dataset" in one]
    (url,) = re.findall(r"https://\S+", line)
    for name in ("normal_001", "tumor_010"):
        head = ["curl", "-sfI", url.replace("$name", name)]
        subprocess.run(head, check=True, capture_output=True)


def run_page(bagscope: Command, page: Path) -> set[str]:
    """Run a page's commands in their order; return the verbs."""
    commands = commands_of(page)
    for _, *words in commands:
        ran = bagscope(*words)
        assert ran.code == 0, (words, ran.out, ran.err)
        if words[0] == "init":
            make_small(Path(words[1]) / "study.yaml")
    return {words[1] for words in commands}


def make_small(settings: Path) -> None:
    text = settings.read_text()
    for default, small in SMALL.items():
        assert default in text
        text = text.replace(default, small)
    settings.write_text(text)


def write_slides(folder: Path, *names: str) -> None:
    """Write slides of 0.5 µm; their names are patterns, taken in turn."""
    patterns = names or ("s{:02d}.svs",)
    for index in range(SLIDES):
        name = patterns[index % len(patterns)].format(index // len(patterns) + 1)
        build_stained_svs(folder / name, seed=index)


def write_table(path: Path, folder: Path, first: int = SLIDES) -> None:
    slides = sorted(folder.iterdir())[:first]
    rows = [f"{one.stem},{one},{'ab'[place % 2]}" for place, one in enumerate(slides)]
    path.write_text("\n".join(["slide_id,path,label", *rows, ""]))


def shell_lines(page: str) -> list[str]:
    """Return the lines of a page's shell blocks, without their indentation."""
    blocks = blocks_of(ROOT / "docs" / page, "bash")
    return [line.strip() for block in blocks for line in block.splitlines()]


@contextmanager
def cluster() -> Iterator[str]:
    distributed = pytest.importorskip("distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the cluster are not ours
        with distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as made:
            yield made.scheduler_address
