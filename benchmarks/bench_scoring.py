"""What a case costs when it is scored: the answer, what tiles add to it, and judging its heatmaps.

python benchmarks/bench_scoring.py [--record] [--rounds 5] [--tiles 10000]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import recording
import torch

from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.cases import Case
from bagscope.mil.member import Member
from bagscope.mil.objectives.objective import build_objective
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.prediction import Panel
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.sources import ArraySource
from bagscope.mil.statistics import FeatureStatistics
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.judging import PASSES, judged

DIMENSION = 1024
TARGET = TargetSpec(column="label", classes=("normal", "tumor"))


def main() -> None:
    """Measure each step of a closed-form model and of one without, and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiles", type=int, default=10_000)
    arguments = parser.parse_args()
    rows = []
    for name, bound in (("abmil", None), ("max", PASSES)):
        rows += steps(name, arguments.tiles, arguments.rounds, bound)
    recording.show(rows)
    if arguments.record:
        recording.record("scoring", rows, packages=["numpy", "torch"])


def steps(name: str, tiles: int, rounds: int, at_most_passes: float | None) -> list[recording.Row]:
    """Return the seconds of each step for one member and one bag of so many tiles."""
    member = member_of(name)
    bag = np.random.default_rng(0).normal(size=(tiles, DIMENSION)).astype(np.float32)
    source = ArraySource([bag], [Case(case_id="c", patient_id="c", slide_ids=("c",))])
    panel = Panel([member])
    answer = panel.ask(source)
    spent: dict[str, list[float]] = {"answer": [], "explain": [], "judge": []}
    for _ in range(rounds):  # in turn, so that a busy moment hits all
        alone = seconds(lambda: member.infer(source))
        spent["answer"].append(alone)
        spent["explain"].append(seconds(lambda: panel.ask(source)) - alone)
        spent["judge"].append(seconds(lambda: judged(answer, [member])))
    medians = {step: statistics.median(values) for step, values in spent.items()}
    case = f"{name}, {tiles:,} tiles × {DIMENSION}"
    return [
        recording.Row(f"{case}: the answer alone", medians["answer"], "s"),
        recording.Row(f"{case}: contributions and tiles to be asked", medians["explain"], "s"),
        recording.Row(f"{case}: judging its heatmaps", medians["judge"], "s"),
        recording.Row(
            f"{case}: judging, in answers",
            medians["judge"] / medians["answer"],
            "×",
            at_most=at_most_passes,
        ),
    ]


def member_of(name: str) -> Member:
    """Return a member with random weights."""
    objective = build_objective((TARGET,), ObjectiveSpec()).fit({"label": np.array([[0.0], [1.0]])})
    torch.manual_seed(0)
    recipe = TrainSpec.model_validate({"aggregator": {"name": name}})
    model = build_aggregator(name, DIMENSION, objective.outputs, recipe.aggregator.options)
    nothing = np.zeros(DIMENSION)
    return Member(
        recipe=recipe,
        targets=tuple(objective.targets),
        objective=objective,
        weights=model.state_dict(),
        statistics=FeatureStatistics(
            mean=nothing, std=nothing + 1, bag_mean=nothing, bag_std=nothing + 1
        ),
    )


def seconds(work: Callable[[], object]) -> float:
    """Return how long a piece of work takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
