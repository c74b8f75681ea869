"""The tasks of the zoo: planted bags of four kinds, three classic data sets, and the demo's slides.

Each has its bags, the tiles that decide where they are known, what whoever knows what was planted
finds, and folds: two thirds of the bags to learn from, a fifth of these to choose the epoch by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bag_training import Labelled
from classic_mil import read
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold, train_test_split

from bagscope.features.store import FeatureStore
from bagscope.testing import planted_bags, planted_pairs
from bagscope.testing.pairs import square_lattice

BAGS, TILES = 150, (200, 2000)
SHIFT = 10.0
"""Easy to see, so that so few bags and steps suffice to learn which tiles, or pairs, tell."""
SINGLE_DIMENSION = 16
PAIRS_DIMENSION, PAIRS_SHARE = 8, 0.1
FOLDS, INNER = 3, 0.2
CLASSIC = ("musk1", "fox", "alt_atheism")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Something to be learnt.

    Attributes:
        truth: (n,) bool of each bag, the tiles that decide; None where nobody knows.
        oracle: (B,) scores of whoever knows what was planted; None where nothing was.
        what: it is, in a few words.
    """

    name: str
    data: Labelled
    what: str
    truth: tuple[NDArray[np.bool_], ...] | None = None
    oracle: NDArray[np.float64] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """Places of the bags on each side."""

    number: int
    learn: NDArray[np.int64]
    inner: NDArray[np.int64]
    test: NDArray[np.int64]


def folds_of(task: Task, seed: int = 0) -> Iterator[Fold]:
    """Yield the folds, the same for every model."""
    labels = task.data.labels
    cut = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (rest, test) in enumerate(cut.split(labels, labels)):
        learn, inner = train_test_split(
            rest, test_size=INNER, stratify=labels[rest], random_state=seed
        )
        yield Fold(number=number, learn=learn, inner=inner, test=test)


def task_of(name: str, mil_data: Path | None, demo: Path | None) -> Task | None:
    """Return a task; None where its data are not there."""
    if name in CLASSIC:
        path = None if mil_data is None else mil_data / f"{name}.npz"
        return _classic(path) if path is not None and path.exists() else None
    if name == "demo":
        return None if demo is None or not (demo / "features").exists() else _demo(demo)
    return _PLANTED[name]()


def _single(share: float) -> Task:
    made = planted_bags(
        BAGS, tiles=TILES, dimension=SINGLE_DIMENSION, share=share, shift=SHIFT, seed=0
    )
    grids = [square_lattice(len(bag)) for bag in made.bags]
    return Task(
        name=f"single {share:.1%}",
        data=Labelled(bags=made.bags, labels=made.labels, grids=grids),
        what=f"{share:.1%} of the tiles are shifted",
        truth=made.truth,
        oracle=made.oracle_scores(),
    )


def _pairs(kind: str, what: str) -> Task:
    made = planted_pairs(
        kind,  # type: ignore[arg-type]
        BAGS,
        dimension=PAIRS_DIMENSION,
        tiles=TILES,
        share=PAIRS_SHARE,
        shift=SHIFT,
        offset=0.0,
        seed=0,
    )
    return Task(
        name=kind,
        data=Labelled(bags=made.bags, labels=made.labels, grids=made.grids),
        what=what,
        truth=made.truth,
        oracle=made.oracle_scores(),
    )


_PLANTED = {
    "single 1.0%": lambda: _single(0.01),
    "single 0.1%": lambda: _single(0.001),
    "together": lambda: _pairs("together", "two kinds of tiles in one bag, or one kind alone"),
    "beside": lambda: _pairs("beside", "two kinds of tiles side by side, or apart"),
}
NAMES = (*_PLANTED, *CLASSIC, "demo")


def _classic(path: Path) -> Task:
    data = read(path)
    return Task(name=data.name, data=data.labelled, what="a classic data set", truth=data.truth)


def _demo(folder: Path) -> Task:
    import pandas as pd

    table = pd.read_csv(folder / "cohort.csv", dtype=str)
    (features,) = (path for path in (folder / "features").glob("*/*") if path.is_dir())
    store = FeatureStore.open(features)
    bags: Mapping[str, tuple[NDArray[np.float32], NDArray[np.int32] | None]] = {
        slide_id: (
            store.bag(slide_id, copy=True).features.astype(np.float32),
            store.record(slide_id).grid,
        )
        for slide_id in table["slide_id"]
    }
    grids = [grid for _, grid in bags.values() if grid is not None]
    return Task(
        name="demo",
        data=Labelled(
            bags=[found for found, _ in bags.values()],
            labels=(table["label"] == "tumor").to_numpy().astype(np.int64),
            grids=grids,
        ),
        what="the demo's synthetic slides",
    )
