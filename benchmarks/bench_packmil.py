"""PackMIL's promise: a packed epoch beside one bag by bag with all tiles, and what either learns.

    python benchmarks/bench_packmil.py [--aggregator abmil] [--rounds 15] [--record]

Planted bags of 200 to 20,000 tiles, drawn evenly, one tile in a hundred shifted in positive ones.
The same aggregator learns from all tiles of one bag a step, and packed, 32 bags a step. Both take
turns within each round, packed with four epochs for one, so that it has no more time than the other
where the promise holds. No inner part: epochs are training alone, the last weights are tested.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import recording
import torch
from bag_training import TARGET, Labelled, score, widths

from bagscope.arithmetic import avoid_broken_units, keep_freed_memory
from bagscope.mil.evaluation.paired import delong_test
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.training.trainer import Trained, Trainer
from bagscope.pipeline.recipes import load_recipe
from bagscope.testing import planted_bags

SHORTEST, DIMENSION, SHIFT = 200, 64, 6.0
BAGS_PER_STEP, EPOCHS = 32, {"packed": 4, "bag by bag": 1}
CAPACITY = 300
"""Tiles of a pack: half of what is published for PANDA, whose bags are much shorter."""
MOST_SHARE = 25.0
SEED = 1


def main() -> None:
    """Train both ways in turns, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--aggregator", default="abmil", help="with the options of its recipe")
    parser.add_argument("--learn", type=int, default=192, help="bags to learn from")
    parser.add_argument("--test", type=int, default=160, help="bags to test on")
    parser.add_argument("--longest", type=int, default=20_000, help="tiles of a bag at most")
    parser.add_argument("--rounds", type=int, default=15, help="epochs bag by bag")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="tiles of a pack")
    parser.add_argument("--width", type=int, default=512, help="of the aggregator's hidden layer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    arguments = parser.parse_args()
    avoid_broken_units()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    rows = measured(arguments)
    recording.show(rows)
    if arguments.record:
        recording.record("packmil", rows, packages=["torch"])


def measured(arguments: argparse.Namespace) -> list[recording.Row]:
    """Return both ways' epochs, their ratio, and the paired comparison of what they learnt."""
    made = planted_bags(
        arguments.learn + arguments.test,
        dimension=DIMENSION,
        tiles=(SHORTEST, arguments.longest),
        shift=SHIFT,
        seed=SEED,
    )
    data = Labelled(bags=made.bags, labels=made.labels)
    learn, test = np.split(np.arange(len(made)), [arguments.learn])
    source = data.source(learn)
    recipes = {way: recipe_of(way, arguments) for way in EPOCHS}
    seconds: dict[str, list[float]] = {way: [] for way in EPOCHS}
    trained: dict[str, Trained] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, arguments.rounds + 1):
            for way, recipe in recipes.items():
                trained[way] = Trainer(
                    recipe,
                    [TARGET],
                    source,
                    None,
                    seed=SEED,
                    folder=Path(folder) / way.replace(" ", "-"),
                    stop_after=number * EPOCHS[way],
                ).run()
                epochs = trained[way].history[-EPOCHS[way] :]
                seconds[way].append(statistics.median(epoch.seconds for epoch in epochs))
                print(number, way, f"{seconds[way][-1]:.2f} s", epochs[-1].losses, flush=True)
    margins = {way: score(trained[way], recipes[way], data, test).margins for way in EPOCHS}
    packed, plain = EPOCHS
    # The first round fills caches and pools of memory.
    pairs = list(zip(seconds[packed], seconds[plain], strict=True))[1:] or [
        (seconds[packed][0], seconds[plain][0])
    ]
    share = 100 * statistics.median(a / b for a, b in pairs)
    found = delong_test(made.labels[test], margins[packed], margins[plain])
    tiles = sum(len(bag) for bag in made.bags[: arguments.learn])
    case = f"{arguments.aggregator}, {arguments.learn} bags of {tiles:,} tiles: "
    return [
        *(
            recording.Row(case + f"an epoch, {way}", statistics.median(seconds[way]), "s")
            for way in EPOCHS
        ),
        recording.Row(case + "packed ÷ bag by bag", share, "%", at_most=MOST_SHARE),
        recording.Row(case + "test AUROC, packed", found.first, "AUROC"),
        recording.Row(case + "test AUROC, bag by bag", found.second, "AUROC"),
        recording.Row(case + "difference, lower end of 95 %", found.low, "AUROC"),
        recording.Row(case + "difference, upper end of 95 %", found.high, "AUROC", at_least=0.0),
    ]


def recipe_of(way: str, arguments: argparse.Namespace) -> TrainSpec:
    """Return a way's recipe: the aggregator's own, with one learning rate for both."""
    name = arguments.aggregator
    options: dict[str, Any] = {
        "aggregator": {"options": widths(name, arguments.width, 128)},
        "optimiser": {"lr": 1e-3},
        "training": {"epochs": arguments.rounds * EPOCHS[way], "checkpoint": "last"},
        "bags": {"bags_per_step": 1},
    }
    if way == "packed":
        regime = {"share": 0.5, "capacity": arguments.capacity, "shortest": 128}
        options["regime"] = {"name": "packmil", "options": regime}
        options["bags"] = {"bags_per_step": BAGS_PER_STEP}
        terms = load_recipe(name).objective.terms
        options["objective"] = {"terms": {**terms, "residual": 0.2}}
    return load_recipe(name, options)


if __name__ == "__main__":
    main()
