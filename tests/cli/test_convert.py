from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from bagscope.cli.convert import convert
from bagscope.cohort.table import load_cohort
from bagscope.errors import BagscopeError, ConfigError
from bagscope.features.feature_file import read_feature_file
from tests.builders import build_svs
from tests.cli.conftest import Ran, files_of, leftovers
from tests.features.interop import layouts
from tests.features.interop.layouts import truth

SHARED = Path(__file__).parents[3] / "shared" / "data"
REAL = Path(os.environ.get("BAGSCOPE_DATA", SHARED)) / "mil"


def run(*arguments: object) -> Ran:
    """Run the verb in this process, as the command line would."""
    app = typer.Typer()
    app.command()(convert)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, BagscopeError):
        usage = isinstance(result.exception, ConfigError)
        return Ran(2 if usage else 1, result.stdout, f"{result.stderr}{result.exception}")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Return a TRIDENT job of three slides."""
    for index, name in enumerate(("a", "b", "c")):
        layouts.trident_features(tmp_path / "job", name, truth(seed=index, dimension=1024))
    return tmp_path / "job"


def test_import_resume_export_and_back(job: Path, tmp_path: Path) -> None:
    ours, clam, again = (tmp_path / name for name in ("ours", "clam", "again"))
    ran = run(job, ours, "--mpp", "0.25")
    assert ran.code == 0, ran.err
    assert "convert: 3 done; 36 tiles" in ran.out
    assert "note: 3 files left out" in ran.out
    assert "3 skipped" in run(job, ours, "--mpp", "0.25").out
    assert run(ours, clam, "--to", "clam").code == 0
    assert run(clam, again, "--mpp", "0.25", "--encoder", "uni").code == 0
    for name in ("a", "b", "c"):
        one, other = (read_feature_file(folder / f"{name}.h5") for folder in (ours, again))
        np.testing.assert_array_equal(one.features, other.features)
        np.testing.assert_array_equal(one.coords_l0, other.coords_l0)
        assert one.encoder["name"] == other.encoder["name"] == "uni"
    assert not leftovers(tmp_path)


def test_one_bad_slide_is_reported_and_the_others_go_on(job: Path, tmp_path: Path) -> None:
    (bad,) = job.rglob("features_*/b.h5")
    bad.write_bytes(b"cut short")
    ran = run(job, tmp_path / "ours")
    assert ran.code == 1
    assert "2 done, 1 failed" in ran.out
    assert "failed  b  SchemaError" in ran.out
    assert sorted(files_of(tmp_path / "ours")) == ["a.h5", "c.h5"]


def test_a_dry_run_writes_nothing(job: Path, tmp_path: Path) -> None:
    ran = run(job, tmp_path / "ours", "--dry-run")
    assert ran.code == 0
    assert "3 slides of trident, to be written as bagscope" in ran.out
    ran = run(job, tmp_path / "ours", "--dry-run", "--json")
    plan = json.loads(ran.out)
    assert plan["layout"] == "trident"
    assert plan["slides"] == ["a", "b", "c"]
    assert not (tmp_path / "ours").exists()


def test_json_lines(job: Path, tmp_path: Path) -> None:
    events = [json.loads(line) for line in run(job, tmp_path / "o", "--json").out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[:2] == ["run_started", "slide_finished"]
    assert kinds.count("slide_finished") == 3
    assert "run_finished" in kinds
    assert {k: v for k, v in events[-1].items() if k == "event"} == {"event": "note"}


def test_pixel_sizes_come_from_a_table_of_slides(tmp_path: Path) -> None:
    made = truth(count=6, step=128, columns=3)
    layouts.stamp_features(tmp_path / "stamp", "a", made, mpp=0.5, tile_um=64.0)
    layouts.stamp_features(tmp_path / "stamp", "b", made, mpp=0.5, tile_um=64.0)
    ran = run(tmp_path / "stamp", tmp_path / "ours")
    assert ran.code == 1
    assert "give the slides with --slides TABLE, or pass --mpp" in ran.out
    build_svs(tmp_path / "a.svs", width_px=1200, height_px=1024, mpp=0.5)
    table = tmp_path / "cohort.csv"
    table.write_text("slide_id,path,mpp,label\na,a.svs,,1\nb,gone.svs,0.5,0\n")
    ran = run(tmp_path / "stamp", tmp_path / "ours", "--slides", table)
    assert ran.code == 0, ran.out
    for name in ("a", "b"):
        file = read_feature_file(tmp_path / "ours" / f"{name}.h5")
        np.testing.assert_array_equal(file.coords_l0, made.sorted().corners)
    assert run(tmp_path / "ours", tmp_path / "m", "--to", "torchmil", "--slides", table).code == 0
    assert np.load(tmp_path / "m" / "labels" / "a.npy").tolist() == [1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--to", "tridnt"), "did you mean 'trident'"),
        (("--dtype", "int8"), "choose one of float16, float32"),
        (("--to", "clam", "--mpp", "0.5"), "--mpp is for imports"),
        (("--to", "clam"), "holds no feature files of bagscope"),
    ],
)
def test_wrong_usage(job: Path, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    ran = run(job, tmp_path / "o", *options)
    assert ran.code == 2
    assert said in ran.err
    assert not (tmp_path / "o").exists()


def test_the_destination_is_not_inside_of_the_source(job: Path) -> None:
    ran = run(job, job / "ours")
    assert ran.code == 2
    assert "choose a folder outside of it" in ran.err


@pytest.mark.skipif(not REAL.exists(), reason="the data sets are not at hand")
@pytest.mark.parametrize(("name", "bags", "width"), [("musk1", 92, 166), ("alt_atheism", 100, 200)])
def test_bags_that_never_were_a_slide(tmp_path: Path, name: str, bags: int, width: int) -> None:
    ran = run(REAL / f"{name}.npz", tmp_path / "ours", "--dtype", "float32")
    assert ran.code == 0, ran.out
    source = np.load(REAL / f"{name}.npz")
    rows = load_cohort(tmp_path / "ours" / "cohort.csv").rows
    assert len(rows) == bags
    for index, row in enumerate(rows):
        file = read_feature_file(row.path)
        assert file.features.shape[1] == width
        np.testing.assert_array_equal(file.features, source["x"][source["bag"] == index])
        assert row.columns["label"] == str(source["y"][index])
