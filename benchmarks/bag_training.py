"""What the benchmarks of training share: labelled arrays as a source, one training, kept results.

Results are kept one file per training, so that an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from bagscope.mil.aggregators.registry import aggregator_entry
from bagscope.mil.cases import Case
from bagscope.mil.inference import outputs
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.sources import ArraySource
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.trainer import Trained, Trainer

TARGET = TargetSpec(column="label", classes=("no", "yes"))
TILE_UM = 128.0
WORK = Path(tempfile.gettempdir()) / "bagscope-benchmarks"
Bag = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """Bags (n, D) with a label each.

    Attributes:
        grids: (column, row) of their tiles, where they have places.
        parents: which coarser tile holds each, where vectors are [fine ‖ coarse].
    """

    bags: Sequence[Bag]
    labels: NDArray[np.int64]
    grids: Sequence[NDArray[np.int32]] | None = None
    parents: Sequence[NDArray[np.int64]] | None = None

    def source(self, places: NDArray[np.int64]) -> ArraySource:
        """Return some of the bags as a source, a patient each."""
        names = [f"bag{place:05d}" for place in places]
        cases = [
            Case(
                case_id=name,
                patient_id=name,
                slide_ids=(name,),
                targets={TARGET.name: (float(self.labels[place]),)},
            )
            for name, place in zip(names, places, strict=True)
        ]
        return ArraySource(
            [self.bags[place] for place in places],
            cases,
            grids=None if self.grids is None else [self.grids[place] for place in places],
            parents=None if self.parents is None else [self.parents[place] for place in places],
            tile_um=math.nan if self.grids is None else TILE_UM,
        )


def parents_on(grid: NDArray[np.int32] | None, tiles: int) -> NDArray[np.int64]:
    """Return which coarser tile (n,) holds each: a square of four; off a lattice, four in a row."""
    if grid is None:
        return np.arange(tiles) // 4
    cells = grid.astype(np.int64) // 2
    return np.unique(cells, axis=0, return_inverse=True)[1].ravel()


def in_two_resolutions(data: Labelled) -> Labelled:
    """Return bags [fine ‖ coarse]: a coarser tile's vector is the mean of those that it holds."""
    grids = data.grids or [None] * len(data.bags)
    parents = [parents_on(grid, len(bag)) for bag, grid in zip(data.bags, grids, strict=True)]
    bags = []
    for bag, parent in zip(data.bags, parents, strict=True):
        coarse = np.zeros((parent.max() + 1, bag.shape[1]), np.float64)
        np.add.at(coarse, parent, bag)
        coarse /= np.bincount(parent)[:, None]
        bags.append(np.concatenate([bag, coarse[parent].astype(np.float32)], 1))
    return dataclasses.replace(data, bags=bags, parents=parents)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What a trained model says of held-out bags.

    Attributes:
        margins: (n,) logit of yes less that of no.
        tiles: (t,) of each bag, one score per tile, higher for yes.
    """

    margins: NDArray[np.float64]
    tiles: tuple[NDArray[np.float64], ...]


def train(
    recipe: TrainSpec,
    data: Labelled,
    learn: NDArray[np.int64],
    inner: NDArray[np.int64],
    seed: int,
    folder: Path | None = None,
) -> Trained:
    """Train on some bags, with an inner validation part of others.

    Where a folder is given, an interrupted training goes on from its last epoch.
    """
    trainer = Trainer(
        recipe, [TARGET], data.source(learn), data.source(inner), seed=seed, folder=folder
    )
    trained = trainer.run()
    if folder is not None:
        shutil.rmtree(folder)
    return trained


def score(trained: Trained, recipe: TrainSpec, data: Labelled, places: NDArray[np.int64]) -> Scored:
    """Return what a trained model says of bags that it has not seen."""
    from bagscope.mil.statistics import scale_of

    scale = scale_of(trained.statistics) if recipe.bags.standardise else None
    margins, tiles = [], []
    source, precision = data.source(places), recipe.training.precision
    said = outputs(trained.model, source, recipe.bags, precision=precision, scale=scale)
    for bags, output in said:
        logits = output.logits.double().numpy()
        margins.append(logits[:, 1] - logits[:, 0])
        scores = output.scores.double().numpy()
        if output.score_kind == "instance_logit":
            scores = scores[:, 1] - scores[:, 0]
        elif scores.shape[1] == 2:  # an attention per class: that of yes
            scores = scores[:, 1]
        else:
            scores = scores[:, 0]
        borders = bags.cu_seqlens.tolist()
        tiles += np.split(scores, borders[1:-1])
    return Scored(margins=np.concatenate(margins), tiles=tuple(tiles))


def kept(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a file holds, made and written first where it is not there."""
    if not path.exists():
        found = json.dumps(dict(make()))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(found, encoding="utf-8")
        temporary.rename(path)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def widths(name: str, hidden: int, attention: int, **further: float) -> dict[str, Any]:
    """Return the options that make an aggregator so wide, and further ones, of those it has."""
    wanted = {"hidden": hidden, "attention": attention, "attention_width": attention, **further}
    fields = aggregator_entry(name).options.model_fields
    # A word of the same name chooses a kind of attention.
    numbers = {key for key, field in fields.items() if {int, float} & {*_kinds(field.annotation)}}
    return {key: width for key, width in wanted.items() if key in numbers}


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return (annotation, *get_args(annotation))
