from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from bagscope.errors import ConfigError
from bagscope.mil.cases import Case
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.compare import CompareRequest, compare_runs
from tests.cli.conftest import Ran, bagscope
from tests.pipeline.made_runs import Says, made_cohort, made_run

__all__ = ["bagscope"]

LABEL = TargetSpec(column="label", classes=("no", "yes"))


def knowing(noise: float) -> Says:
    def says(case: Case, seed: int) -> Sequence[float]:
        random = np.random.default_rng([int(case.patient_id[1:]), seed])
        (label,) = case.targets["label"]
        chance = float(np.clip(0.3 + 0.4 * label + random.normal(0, noise), 0.001, 0.999))
        return (1 - chance, chance)

    return says


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return a good and a bad run on the same splits, and one that tests fewer patients."""
    random = np.random.default_rng(0)
    bags = [random.normal(size=(3, 2)) for _ in range(40)]
    labels = ["yes" if place % 2 else "no" for place in range(40)]
    parts = ["test" if place < 16 else "train" for place in range(40)]
    study = made_cohort(tmp_path_factory.mktemp("runs"), bags, {"label": labels, "split": parts})
    good = made_run(*study, LABEL, knowing(0.2), name="good")
    bad = made_run(*study, LABEL, knowing(4.0), name="bad")
    splits = {"method": "fixed"}
    other = made_run(*study, LABEL, knowing(0.2), name="other", split="fixed", splits=splits)
    return good, bad, other


def test_runs_are_told_apart_on_the_terminal_and_on_a_page(
    bagscope: Callable[..., Ran], runs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    good, bad, _ = runs
    ran = bagscope("compare", good, bad, "--out", tmp_path, "--resamples", 300)
    assert ran.code == 0, ran.err
    assert "good is better than bad" in ran.out
    stored = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert stored["patients"] == 40
    assert stored["pairs"][0]["tests"][0]["method"] == "paired bootstrap"
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "good is better than bad" in page
    assert not re.findall(r"(?:src|href)=[\"'](?!#)|<script|url\((?!#)", page)
    assert "/tmp" not in page


def test_json_holds_what_the_table_shows(
    bagscope: Callable[..., Ran], runs: tuple[Path, Path, Path]
) -> None:
    ran = bagscope("compare", *runs[:2], "--json", "--resamples", 200)
    told = json.loads(ran.out)
    assert told["event"] == "compared"
    assert set(told["models"]) == {"good", "bad"}


def test_other_test_patients_are_refused(runs: tuple[Path, Path, Path]) -> None:
    with pytest.raises(ConfigError, match=r"other lacks s016, s017, s018, s019 .*24 in all"):
        compare_runs(CompareRequest(runs=(runs[0], runs[2]), resamples=100))


def test_one_run_and_a_run_twice_are_refused(runs: tuple[Path, Path, Path]) -> None:
    with pytest.raises(ConfigError, match="takes two or more"):
        compare_runs(CompareRequest(runs=runs[:1]))
    with pytest.raises(ConfigError, match="named twice"):
        compare_runs(CompareRequest(runs=(runs[0], runs[0])))
    with pytest.raises(ConfigError, match="has no target 'grade'"):
        compare_runs(CompareRequest(runs=runs[:2], target="grade"))
