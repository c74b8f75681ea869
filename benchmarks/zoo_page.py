"""The page of the zoo: tables and the plot of its costs, from whatever results are there."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import recording
from numpy.typing import NDArray
from zoo_cost import SIZES, cost_file
from zoo_tasks import FOLDS, Task, task_of

from bagscope.mil.evaluation.bootstrap import Statistic, fold_mean, interval
from bagscope.mil.evaluation.paired import paired_bootstrap
from bagscope.mil.evaluation.ranking import binary_auroc
from bagscope.pipeline.recipes import load_recipe

PAGE = Path(__file__).with_name("zoo.md")
PLOT = Path(__file__).with_name("zoo_cost.svg")
REFERENCE, MEANS, ORACLE = "abmil", "mean", "oracle"
RESAMPLES = 2_000
SOLVED, UNSOLVED = 0.9, 0.65
INTRODUCTION = f"""\
Every recipe on the same {FOLDS} folds; a fifth of the bags to learn from is the inner
part, which chooses the epoch. One setting for all: narrow (64, attention 32, two heads,
16 landmarks, no dropout), 10 epochs of two bags a step (recipes that pack: up to eight,
and as many steps), a rate of 1e-3 with a cosine, no tuning. AUROC is the mean over
folds, with a bootstrap of bags within folds and classes; the difference from ABMIL is
paired. Seconds are of one fold's training on one core. Numbers compare recipes at one
budget; with their own widths and epochs they may come to more. two_stage is given each
tile beside the mean of its square of four (of four in a row where there are no places)."""
COSTS = """\
Seconds of a training step, and memory above the bag, at the recipes' own widths and 1,024
features (two_stage: of either resolution); float32, all cores. A curve ends where a step
passes 60 s or 16 GB. In the plot regimes are dashed."""
HEADER = "| | AUROC of bags (95 %) | less ABMIL (95 %) | AUROC of tiles | seconds | parameters |"


def write_page(
    work: Path,
    *,
    tasks: Sequence[str],
    recipes: Sequence[str],
    data: tuple[Path | None, Path | None],
) -> None:
    """Write the page, and the plot beside it."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [
        "# Zoo",
        "",
        f"`make zoo`, {date}, commit {recording.commit()}, {recording.device()}.",
        "",
        INTRODUCTION,
    ]
    for name in tasks:
        task = task_of(name, *data)
        if task is not None:
            lines += ["", *section(task, work, recipes)]
    lines += ["", *cost_section(work, recipes)]
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    remarks = old.split("\n## Remarks\n", 1)
    if len(remarks) > 1:
        lines += ["", "## Remarks", remarks[1].rstrip()]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def section(task: Task, work: Path, recipes: Sequence[str]) -> list[str]:
    """Return the table of a task."""
    folder = work / "accuracy" / task.name.replace(" ", "_")
    found: dict[str, list[dict[str, Any]]] = {}
    refused: dict[str, str] = {}
    for recipe in recipes:
        paths = [folder / f"{recipe}_{fold}.json" for fold in range(FOLDS)]
        results = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
        if any("refused" in one for one in results):
            refused[recipe] = results[0]["refused"]
        elif len(results) == FOLDS:
            found[recipe] = results
    lines = [f"## {task.name}", "", f"{len(task.data.labels)} bags: {task.what}.", ""]
    if not found:
        return [*lines, "Nothing trained yet."]
    folds, scores = columns(task, found)
    lines += [HEADER, "|---|---:|---:|---:|---:|---:|"]
    order = sorted(scores, key=lambda name: -value_of(task, folds, scores[name]))
    for name in order:
        lines.append(line_of(name, task, folds, scores, found.get(name)))
    missing = [one for one in recipes if one not in found and one not in refused]
    if missing:
        lines += ["", f"Not trained: {', '.join(missing)}."]
    for recipe, why in refused.items():
        lines += ["", f"{recipe}: {why}."]
    return [*lines, *verdict(task, folds, scores)]


def columns(
    task: Task, found: dict[str, list[dict[str, Any]]]
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Return the fold of each bag, and each model's score of it."""
    count = len(task.data.labels)
    folds = np.full(count, -1)
    scores = {}
    for name, results in found.items():
        scores[name] = np.full(count, np.nan)
        for number, result in enumerate(results):
            folds[result["places"]] = number
            scores[name][result["places"]] = result["margins"]
    if task.oracle is not None:
        scores[ORACLE] = task.oracle
    return folds, scores


def statistic_of(task: Task, folds: NDArray[np.int64], scores: NDArray[np.float64]) -> Statistic:
    labels = task.data.labels
    return fold_mean(lambda rows, counts: binary_auroc(labels[rows], scores[rows], counts), folds)


def value_of(task: Task, folds: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    return float(np.asarray(statistic_of(task, folds, scores)(np.ones((1, len(folds)))))[0])


def line_of(
    name: str,
    task: Task,
    folds: NDArray[np.int64],
    scores: dict[str, NDArray[np.float64]],
    results: list[dict[str, Any]] | None,
) -> str:
    groups = np.arange(len(folds))
    strata = folds * 2 + task.data.labels
    own = statistic_of(task, folds, scores[name])
    bags = interval(own, groups, resamples=RESAMPLES, strata=strata)
    against = ""
    if REFERENCE in scores and name not in (REFERENCE, ORACLE):
        other = statistic_of(task, folds, scores[REFERENCE])
        paired = paired_bootstrap(own, other, groups, resamples=RESAMPLES, strata=strata)
        against = f"{paired.difference:+.3f} ({paired.low:+.3f} to {paired.high:+.3f})"
    cells = [name, f"{bags.value:.3f} ({bags.low:.3f}–{bags.high:.3f})", against]
    if results is None:
        return f"| {' | '.join([*cells, '', '', ''])} |"
    tiles = [one["tiles"] for one in results if one["tiles"] is not None]
    cells += [f"{np.mean(tiles):.3f}" if tiles else ""]
    cells += [f"{np.mean([one['seconds'] for one in results]):.0f}"]
    cells += [f"{results[0]['parameters']:,}"]
    return f"| {' | '.join(cells)} |"


def verdict(
    task: Task, folds: NDArray[np.int64], scores: dict[str, NDArray[np.float64]]
) -> list[str]:
    """Return what the tasks that need several tiles are to show."""
    if task.name not in ("together", "beside"):
        return []
    values = {name: value_of(task, folds, own) for name, own in scores.items() if name != ORACLE}
    solved = [name for name, value in values.items() if value >= SOLVED]
    mean = values.get(MEANS)
    told = f"At least {SOLVED}: {', '.join(solved) or 'none'}."
    if mean is not None:
        word = "met" if mean <= UNSOLVED else "missed"
        told += f" Mean pooling {mean:.3f} (at most {UNSOLVED}: {word})."
    return ["", told]


def cost_section(work: Path, recipes: Sequence[str]) -> list[str]:
    """Return the table of costs; draws the plot."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for recipe in recipes:
        for tiles in SIZES:
            path = cost_file(work, recipe, tiles)
            if path.exists():
                result = json.loads(path.read_text(encoding="utf-8"))
                found.setdefault(recipe, {})[tiles] = result
    if not found:
        return ["## Cost", "", "Nothing measured yet."]
    draw(found)
    lines = [
        "## Cost",
        "",
        COSTS,
        "",
        f"![seconds and memory against tiles]({PLOT.name})",
        "",
        f"| | {' | '.join(f'{tiles:,}' for tiles in SIZES)} |",
        f"|---|{'---:|' * len(SIZES)}",
    ]
    refused = []
    for recipe, results in found.items():
        cells = []
        for tiles in SIZES:
            result = results.get(tiles, {})
            if "mib" in result:
                cells.append(f"{result['seconds']:.3g} s, {result['mib']:,.0f} MiB")
            else:
                cells.append(result.get("ended", ""))
        if any("mib" in result for result in results.values()):
            lines.append(f"| {recipe} | {' | '.join(cells)} |")
        else:
            refused += ["", f"{recipe}: {cells[0]}."]
    return lines + refused


def draw(found: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Draw seconds and memory against tiles, a line per aggregator, and regimes dashed."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "zoo"
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    colours = pyplot.get_cmap("tab10")
    drawn = {
        recipe: {tiles: one for tiles, one in results.items() if "mib" in one}
        for recipe, results in found.items()
    }
    for number, (recipe, there) in enumerate((r, one) for r, one in drawn.items() if one):
        style = "--" if load_recipe(recipe).regime.name != "full" else "-"
        for axis, key in zip(axes, ("seconds", "mib"), strict=True):
            axis.plot(
                list(there),
                [max(one[key], 1e-3) for one in there.values()],
                style,
                color=colours(number % 10),
                marker="os^D"[number // 10 % 4],
                markersize=4,
                linewidth=1.2,
                label=recipe,
            )
    for axis, label in zip(axes, ("seconds of a step", "MiB above the bag"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tiles", ylabel=label)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=7)
    figure.savefig(PLOT, metadata={"Date": None})
    pyplot.close(figure)
