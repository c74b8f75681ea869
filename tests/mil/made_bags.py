"""Small bags with a planted signal, as sources and as a study on disk."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bagscope.mil.cases import Case
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.sources import ArraySource
from bagscope.mil.targets import TargetSpec

DIMENSION = 6
TARGET = TargetSpec(column="label", classes=("no", "yes"))
SMALL = {"aggregator": {"options": {"hidden": 8, "attention": 4, "dropout": 0.25}}}


def made_bags(
    count: int, *, seed: int, tiles: int = 12
) -> tuple[list[NDArray[np.float32]], list[int]]:
    """Return bags of 1 to `tiles` tiles; of every second one, the first tile is shifted."""
    generator = np.random.default_rng(seed)
    bags, labels = [], []
    for place in range(count):
        bag = generator.normal(size=(generator.integers(1, tiles + 1), DIMENSION))
        bag[0, 0] += 4.0 * (place % 2)
        bags.append(bag.astype(np.float32))
        labels.append(place % 2)
    return bags, labels


def made_source(count: int, *, seed: int = 0, name: str = "c", tiles: int = 12) -> ArraySource:
    """Return such bags as a source, one patient each."""
    bags, labels = made_bags(count, seed=seed, tiles=tiles)
    cases = [
        Case(
            case_id=f"{name}{place:03d}",
            patient_id=f"p-{name}{place:03d}",
            slide_ids=(f"{name}{place:03d}",),
            targets={"label": (float(label),)},
        )
        for place, label in enumerate(labels)
    ]
    return ArraySource(bags, cases)


def made_recipe(**blocks: dict[str, object]) -> TrainSpec:
    """Return a recipe of a tiny model, with blocks of options laid over it."""
    from bagscope.pipeline.recipes import laid_over

    base = {
        **SMALL,
        "optimiser": {"lr": 3e-3},
        "training": {"epochs": 4, "patience": None, "min_epochs": 0},
        "bags": {"bags_per_step": 4},
    }
    return TrainSpec.model_validate(laid_over(base, blocks))


def made_study(folder: Path, count: int = 24, *, seed: int = 0) -> tuple[Path, Path]:
    """Write such bags as a study with features; return the study and the feature folder."""
    return study_of(folder, *made_bags(count, seed=seed))


def study_of(folder: Path, bags: list[NDArray[np.float32]], labels: list[int]) -> tuple[Path, Path]:
    """Write bags as a study with features; return the study and the feature folder.

    Labels stand in the column `label`; every second slide is of the same patient, so of four
    labels, the first and the third must be equal, and the second and the fourth.
    """
    from bagscope.cohort.progress import SilentReporter
    from bagscope.pipeline.convert import ConvertRequest, convert
    from bagscope.pipeline.study import init_study

    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "made.npz",
        x=np.concatenate(bags),
        bag=np.repeat(np.arange(len(bags)), [len(bag) for bag in bags]).astype(np.int32),
        y=np.array(labels),
    )
    features = folder / "features"
    convert(ConvertRequest(source=folder / "made.npz", dest=features), SilentReporter())
    table = features / "cohort.csv"
    with table.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    for place, row in enumerate(rows):
        # Two slides a patient, of one label each.
        row["patient_id"] = f"p{place // 4 * 2 + place % 2}"
        row["site"] = "ab"[place // 4 % 2]
    with table.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    init_study(folder / "study", str(table))
    return folder / "study", features
