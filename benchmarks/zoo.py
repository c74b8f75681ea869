"""Every recipe on the same tasks and the same splits: does it help, and what does it cost?

    python benchmarks/zoo.py [--mil-data FOLDER] [--demo STUDY] [--parts accuracy cost] [--full]

Results are kept one file per training and per measurement, so an interrupted run goes on where it
stopped; `zoo.md` is written from what is there, also after an interruption, and says what is not.
Networks are narrow (64, attention 32, two heads, no dropout) and trained for few epochs with one
setting for all, so that two cores do it in three hours; `--full` takes the recipes' own. FOLDER
holds musk1.npz, fox.npz and alt_atheism.npz; STUDY is that of a finished `bagscope demo`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from bag_training import TARGET, WORK, in_two_resolutions, kept, score, train, widths
from sklearn.metrics import roc_auc_score
from zoo_cost import measure
from zoo_page import write_page
from zoo_tasks import NAMES, Fold, Task, folds_of, task_of

from bagscope.errors import ConfigError
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes.registry import refuse_impossible
from bagscope.pipeline.recipes import load_recipe, recipe_names

EPOCHS, LEARNING_RATE, BAGS_PER_STEP = 10, 1e-3, 2
MOST_BAGS_PER_STEP = 8
NARROW = {"heads": 2, "cross_heads": 2, "landmarks": 16, "dropout": 0.0}
MEANINGLESS = {
    "acmil": {"heads", "dropout"},
    "mhim_v1": {"hidden", "dropout"},
    "mhim_v2": {"hidden", "dropout"},
}
"""Options that mean nothing in a recipe: one attention, a projection that is the regime's."""
TWO_STAGE = "two_stage"
"""Its bags have two resolutions: see `bag_training.in_two_resolutions`."""
Item = tuple[str, str, int]
"""Task, recipe, fold."""


def main() -> None:
    """Train and measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mil-data", type=Path, help="folder of the classic data sets")
    parser.add_argument("--demo", type=Path, help="study of a finished demo")
    parser.add_argument("--parts", nargs="+", default=["accuracy", "cost"])
    parser.add_argument("--tasks", nargs="+", default=list(NAMES))
    parser.add_argument("--recipes", nargs="+", default=list(recipe_names()))
    parser.add_argument("--minutes", type=float, default=180.0, help="after which none is begun")
    parser.add_argument("--processes", type=int, default=max(1, os.cpu_count() or 2))
    parser.add_argument("--full", action="store_true", help="the recipes' own widths and epochs")
    parser.add_argument("--work", type=Path, default=WORK / "zoo", help="where results are kept")
    arguments = parser.parse_args()
    work = arguments.work / ("full" if arguments.full else "narrow")
    ends_s = time.monotonic() + 60 * arguments.minutes
    # Paths only, so that a worker makes its own bags and keeps them.
    data = (arguments.mil_data, arguments.demo)
    if "accuracy" in arguments.parts:
        items = list(unfinished(arguments, work))
        with ProcessPoolExecutor(
            arguments.processes, mp_context=get_context("spawn"), initializer=alone
        ) as pool:
            waiting = [pool.submit(run, i, data, work, arguments.full, ends_s) for i in items]
            for done in as_completed(waiting):
                print(done.result(), flush=True)
    if "cost" in arguments.parts:
        for recipe in arguments.recipes:
            if time.monotonic() < ends_s:
                measure(recipe, work)
    write_page(work, tasks=arguments.tasks, recipes=arguments.recipes, data=data)


def unfinished(arguments: argparse.Namespace, work: Path) -> Iterator[Item]:
    """Yield what is not there yet, quick tasks first, so that an early end leaves whole tables."""
    for name in arguments.tasks:
        task = task_of(name, arguments.mil_data, arguments.demo)
        if task is None:
            print(f"{name}: its data are not there, so it is left out", flush=True)
            continue
        for recipe in arguments.recipes:
            for fold in folds_of(task):
                if not result_file(work, (name, recipe, fold.number)).exists():
                    yield name, recipe, fold.number


def alone() -> None:
    """Let a worker compute with one thread: there is one for each core."""
    import torch

    torch.set_num_threads(1)


@cache
def made(name: str, mil_data: Path | None, demo: Path | None) -> Task:
    task = task_of(name, mil_data, demo)
    assert task is not None, "the parent saw its data"
    return task


def run(
    item: Item, data: tuple[Path | None, Path | None], work: Path, full: bool, ends_s: float
) -> str:
    """Train one recipe on one fold, in a worker; return a line about it."""
    name, recipe_name, number = item
    if time.monotonic() > ends_s:
        return f"{name} {recipe_name} {number}: not begun, the time is over"
    task = made(name, *data)
    fold = list(folds_of(task))[number]
    path = result_file(work, item)
    found = kept(path, lambda: trained(task, recipe_name, fold, path, full))
    if "refused" in found:
        return f"{name} {recipe_name} {number}: {found['refused']}"
    return f"{name} {recipe_name} {number}: AUROC {found['auroc']:.3f}, {found['seconds']:.0f} s"


def trained(task: Task, recipe_name: str, fold: Fold, path: Path, full: bool) -> dict[str, Any]:
    """Return what a recipe says of a fold's test bags, or why it can't be trained on them."""
    try:
        recipe = recipe_of(recipe_name, full)
        data = in_two_resolutions(task.data) if recipe.regime.name == TWO_STAGE else task.data
        refuse_impossible(recipe, [TARGET])
        began_s = time.perf_counter()
        found = train(
            recipe, data, fold.learn, fold.inner, fold.number, path.with_suffix(".training")
        )
    except ConfigError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - began_s
    said = score(found, recipe, data, fold.test)
    tiles = None
    if task.truth is not None:
        of_tiles = [
            roc_auc_score(task.truth[place], own)
            for place, own in zip(fold.test, said.tiles, strict=True)
            if task.data.labels[place] and 0 < task.truth[place].mean() < 1
        ]
        tiles = float(np.mean(of_tiles))
    return {
        "places": fold.test.tolist(),
        "margins": said.margins.tolist(),
        "auroc": float(roc_auc_score(task.data.labels[fold.test], said.margins)),
        "tiles": tiles,
        "seconds": seconds,
        "epoch": found.epoch,
        "parameters": sum(weight.numel() for weight in found.model.parameters()),
    }


def recipe_of(name: str, full: bool) -> TrainSpec:
    """Return a recipe, narrow and with one training setting for all unless its own is asked for."""
    recipe = load_recipe(name)
    if full:
        return recipe
    bags_per_step = min(max(BAGS_PER_STEP, recipe.bags.bags_per_step), MOST_BAGS_PER_STEP)
    options = widths(recipe.aggregator.name, 64, 32, **NARROW)
    for key in MEANINGLESS.get(name, ()):
        del options[key]
    narrow = {"embedding": {"width": 64, "dropout": 0.0}}
    regime = {"regime": {"options": narrow}} if recipe.regime.name == "mhim" else {}
    if recipe.regime.name == TWO_STAGE:
        coarse = {"name": "abmil", "options": widths("abmil", 64, 32, dropout=0.0)}
        regime = {"regime": {"options": {"coarse": coarse}}}
    return load_recipe(
        name,
        {
            "aggregator": {"options": options},
            **regime,
            "bags": {
                "bags_per_step": bags_per_step,
                "standardise": recipe.regime.name != TWO_STAGE,
            },
            "optimiser": {"lr": LEARNING_RATE, "schedule": "cosine", "warmup_epochs": 0.0},
            # As many steps for all.
            "training": {
                "epochs": EPOCHS * bags_per_step // BAGS_PER_STEP,
                "min_epochs": 0,
                "patience": None,
            },
        },
    )


def result_file(work: Path, item: Item) -> Path:
    """Return where the result of a training is kept."""
    task, recipe, fold = item
    return work / "accuracy" / task.replace(" ", "_") / f"{recipe}_{fold}.json"


if __name__ == "__main__":
    main()
