"""What can't go together is refused as it is typed, before anything is trained, in one sentence."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran
from tests.mil.made_bags import made_study

Command = Callable[..., Ran]
LABEL = ("--target", "label")
SURVIVAL = ("--time", "months", "--event", "died")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study of two classes and of survival, whose tiles have no places."""
    folder = tmp_path_factory.mktemp("made")
    made_study(folder)
    table = folder / "study" / "cohort.csv"
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for place, row in enumerate(rows):
        row |= {"months": str(3 + place // 4), "died": str(place % 2)}
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.mark.parametrize(
    ("recipe", "more", "says"),
    [
        (
            "transmil",
            (*LABEL, "--set", "aggregator.options.ppeg=lattice"),
            "goes by the tiles' places on the lattice, and of ",
        ),
        (
            "mambamil",
            (*LABEL, "--set", "aggregator.options.order=hilbert"),
            "goes by the tiles' places on the lattice, and of ",
        ),
        ("vit_alibi", LABEL, "there are no coordinates; extract features with both"),
        ("packmil_panda", LABEL, "ISUP grades 0 to 5, and label (classes) has 2 classes"),
        (
            "packmil_survival",
            (*SURVIVAL, "--set", "objective.survival=cox"),
            "hyperslides are judged in bins of time, which Cox's loss has none of",
        ),
        (
            "packmil",
            (*LABEL, "--set", "bags.bags_per_step=1"),
            "packs the bags of a step, and bags.bags_per_step is 1",
        ),
        ("two_stage", LABEL, "are of one resolution; give those of two aligned tilings"),
        (
            "abmil",
            (*SURVIVAL, "--set", "objective.survival=cox"),
            "Cox's loss compares the bags of a step, and bags.bags_per_step is 1",
        ),
        (
            "abmil",
            (*LABEL, "--set", "training.precision=float16", "--device", "cpu"),
            "training.precision is float16, which CPUs do not multiply",
        ),
    ],
)
def test_what_can_not_go_together_is_refused(
    bagscope: Command, folder: Path, recipe: str, more: tuple[str, ...], says: str
) -> None:
    features = ("--features", folder / "features")
    ran = bagscope("train", folder / "study", "--recipe", recipe, *features, *more)
    assert ran.code == 2
    assert says in ran.err
    assert "\n" not in ran.err
    assert not (folder / "study" / "runs").exists()
