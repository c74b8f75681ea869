"""What the sequences of a run come to, as one file and as a table to read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bagscope import artifacts
from bagscope.artifacts import Json

if TYPE_CHECKING:
    from bagscope.pipeline.continual import PlannedSequences

METRICS = {"accuracy": "bag accuracy", "tile_auroc": "tile AUROC"}
NUMBERS = ("average", "learning", "forgetting")
WAYS = {"owlora": "adapters (OWLoRA)", "finetune": "plain fine-tuning"}
_NOTE = """\
Rows of a matrix: after which task; columns: on whose test cases. Average: of the last row.
Learning: of each task when it was just learnt. Forgetting: how far each earlier task fell from its
best, the mean; below 0, later tasks helped. Means over the sequences (splits and seeds), ± their
standard deviation; sequences share cases, so it is no confidence interval. Tile AUROC: the mean
over test bags that have tiles of both kinds.
"""


def summed_up(planned: PlannedSequences) -> dict[str, Json]:
    """Return the content of the result file, of sequences that are all tested."""
    from bagscope.mil.continual.metrics import kept
    from bagscope.pipeline.continual_worker import TESTED_NAME

    tested = {
        name: artifacts.read_json(test.folder / TESTED_NAME)["ways"]
        for name, test in planned.tests.items()
    }
    names = [task.name for task in planned.spec.tasks]
    ways: dict[str, Json] = {}
    for way in planned.spec.ways:
        each = [found[way] for found in tested.values()]
        own: dict[str, Json] = {}
        for metric in METRICS:
            matrices = [_numbers(one[metric]) for one in each]
            several = [kept(matrix) for matrix in matrices]
            own[metric] = {
                "matrix": _mean_matrix(matrices),
                **{name: _spread([getattr(one, name) for one in several]) for name in NUMBERS},
            }
        ways[way] = own
    return {
        "schema_version": 1,
        "tasks": names,
        "options": planned.spec.model_dump(mode="json"),
        "sequences": {
            name: {
                "train": [len(one.train) for one in planned.sequences[name].tasks],
                "inner": [len(one.inner) for one in planned.sequences[name].tasks],
                "test": [len(cases) for cases in planned.tests[name].cases],
                "ways": tested[name],
            }
            for name in planned.sequences
        },
        "ways": ways,
    }


def table_of(found: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    names = found["tasks"]
    lines = [f"# Tasks in sequence: {' → '.join(names)}", "", _NOTE]
    for metric, title in METRICS.items():
        rows = {way: own[metric] for way, own in found["ways"].items()}
        if all(own["average"]["mean"] is None for own in rows.values()):
            lines += [f"No {title}: no truth of test tiles was given.", ""]
            continue
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        lines += ["| | " + " | ".join(NUMBERS) + " |", "|---|" + "---|" * len(NUMBERS)]
        for way, own in rows.items():
            cells = [_shown(own[name]) for name in NUMBERS]
            lines.append(f"| {WAYS[way]} | " + " | ".join(cells) + " |")
        for way, own in rows.items():
            lines += ["", f"{WAYS[way]}:", "", "| after | " + " | ".join(names) + " |"]
            lines.append("|---|" + "---|" * len(names))
            for name, row in zip(names, own["matrix"], strict=True):
                cells = ["" if value is None else f"{value:.3f}" for value in row]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _numbers(matrix: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [[math.nan if value is None else value for value in row] for row in matrix]


def _mean_matrix(matrices: Sequence[Sequence[Sequence[float]]]) -> Json:
    size = range(len(matrices[0]))
    return [
        [_spread([one[row][task] for one in matrices])["mean"] for task in size] for row in size
    ]


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and standard deviation of what is known."""
    known = [value for value in values if not math.isnan(value)]
    return {
        "mean": statistics.fmean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
    }


def _shown(value: Mapping[str, float | None]) -> str:
    if value["mean"] is None:
        return "–"
    return f"{value['mean']:.3f}" + ("" if value["sd"] is None else f" ± {value['sd']:.3f}")
