"""What a training step of a recipe costs against the size of the bag: seconds, and memory above it.

A recipe is a process of its own: one bag of N tiles of 1,024 numbers after the other, at the
recipe's own widths, float32, all cores; the regime's losses too, forward and backward. A curve ends
at the first size where a step passes `MOST_SECONDS` or `MOST_GIB`, and says so.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from high_water import HighWater

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000)
FEATURES = 1024
MOST_SECONDS, MOST_GIB = 60.0, 16.0
ENOUGH_SECONDS = 5.0
"""Of steps of one size, after which no further one is timed; three at most."""
_BAGS = 4
"""Of a regime that packs or mixes the bags of a step: N tiles in all."""


def measure(recipe: str, work: Path) -> None:
    """Measure the sizes that are not measured yet, up to the one at which the curve ends."""
    missing = []
    for tiles in SIZES:
        path = cost_file(work, recipe, tiles)
        if not path.exists():
            missing.append(tiles)
        elif "ended" in json.loads(path.read_text(encoding="utf-8")):
            break
    if not missing:
        return
    command = [sys.executable, __file__, recipe, *map(str, missing)]
    run = subprocess.run(command, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    if len(lines) < len(missing):
        lines.append(json.dumps({"ended": _end_of(run)}))
    for tiles, line in zip(missing, lines, strict=False):
        print(recipe, f"{tiles:,} tiles:", line, flush=True)
        path = cost_file(work, recipe, tiles)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line, encoding="utf-8")


def cost_file(work: Path, recipe: str, tiles: int) -> Path:
    """Return where a measurement is kept."""
    return work / "cost" / f"{recipe}_{tiles}.json"


def _end_of(run: subprocess.CompletedProcess[str]) -> str:
    """Return why a process ended before it was done."""
    said = (run.stderr.strip().splitlines() or ["killed"])[-1]
    if run.returncode == -signal.SIGALRM:
        return f"a step took more than {MOST_SECONDS:.0f} s"
    if "MemoryError" in said or "allocate" in said or run.returncode < 0:
        return f"a step needed more than {MOST_GIB:.0f} GB"
    return said.removeprefix("bagscope.errors.ConfigError: ")


def step_costs(recipe_name: str, sizes: Sequence[int]) -> Iterator[dict[str, float]]:
    """Yield the seconds of a training step, and by how much it raised the memory, in MiB."""
    import numpy as np
    import torch

    from bagscope.mil.bags import Bags
    from bagscope.mil.objectives.objective import build_objective
    from bagscope.mil.regimes.regime import Regime
    from bagscope.mil.regimes.registry import build_model
    from bagscope.mil.targets import TargetSpec
    from bagscope.pipeline.recipes import load_recipe

    recipe = load_recipe(recipe_name)
    target, rows = TargetSpec(column="label", classes=("no", "yes")), np.eye(2)[:, 1:]
    if recipe.regime.options.get("grade"):
        target = TargetSpec(column="grade", classes=tuple("012345"))
        rows = np.arange(6.0)[:, None]
    elif recipe.regime.options.get("residual") == "nll":
        target = TargetSpec(task="survival", time="months", event="died")
        rows = np.stack([np.arange(8.0) + 1, np.ones(8)], 1)
    objective = build_objective([target], recipe.objective).fit({target.name: rows})
    torch.manual_seed(0)
    # Of two resolutions, each has so wide a vector.
    features = FEATURES * (1 + (recipe.regime.name == "two_stage"))
    model = build_model(recipe, features, objective.outputs).train()
    if isinstance(model, Regime):
        model.begin(objective)
    count = _BAGS if isinstance(model, Regime) and model.whole_steps else 1

    def bags_of(total: int) -> Bags:
        sizes = [total // count] * count
        edges = [max(1, int(np.ceil(np.sqrt(size)))) for size in sizes]
        grids = [
            torch.tensor(np.stack(np.divmod(np.arange(size), edge)[::-1], 1), dtype=torch.int32)
            for size, edge in zip(sizes, edges, strict=True)
        ]
        labels = torch.from_numpy(rows[np.arange(count) % len(rows)])
        bags = Bags.of(
            [torch.randn(size, features) for size in sizes],
            grid=grids,
            targets={target.name: labels},
        )
        return _with_places(bags)

    def step(bags: Bags) -> float:
        def judge(output: Any, targets: Any, lengths: Any = None) -> Any:
            return objective(output, targets, progress=0.5, lengths=lengths)

        began_s = time.perf_counter()
        signal.alarm(math.ceil(MOST_SECONDS))  # ends the process, unless it is taken back
        if isinstance(model, Regime):
            losses = model.losses(bags, judge)
        else:
            losses = judge(model(bags), bags.targets, bags.lengths)
        losses.total.backward()
        model.zero_grad(set_to_none=True)
        signal.alarm(0)
        return time.perf_counter() - began_s

    step(bags_of(64 * count))  # libraries load, and threads start, before a bag is there
    for tiles in sizes:
        bags = bags_of(tiles)
        memory = HighWater()
        times: list[float] = []
        while len(times) < 3 and sum(times) < ENOUGH_SECONDS:
            times.append(step(bags))
        yield {"seconds": min(times), "mib": memory.raised_mib}
        del bags


def _with_places(bags: Any) -> Any:
    """Return bags whose tiles also have coordinates in micrometres, and coarser tiles."""
    from dataclasses import replace

    import torch
    from bag_training import parents_on

    slides = torch.repeat_interleave(torch.arange(len(bags)), bags.lengths.long())
    return replace(
        bags,
        coords_l0=bags.grid * 256,
        parent=torch.from_numpy(parents_on(bags.grid.numpy(), len(slides))),
        slide_ids=bags.bag_ids,
        tile_slide=slides.int(),
        tile_row=torch.arange(len(slides)).int(),
        tile_um=torch.full((len(bags),), 128.0, dtype=torch.float64),
        mpp_l0=torch.full((len(bags),), 0.5, dtype=torch.float64),
    )


if __name__ == "__main__":
    limit = int(MOST_GIB * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for found in step_costs(sys.argv[1], [int(size) for size in sys.argv[2:]]):
        print(json.dumps(found), flush=True)
