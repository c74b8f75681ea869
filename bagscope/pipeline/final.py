"""The final model: refitted on every labelled patient, once the folds have said for how long.

It is trained for the median of the members' best epochs (the higher of two in the middle), on the
recipe's learning rates for all of its epochs, without an inner validation part (of plateau, which
watches one, on the median of what it left the members in each epoch); the last weights are kept.
Where members were tuned, recipe and epochs are those that most of them came to. Its temperature and
threshold are fitted on the members' pooled out-of-fold logits: each patient's are of members that
never saw it. No figure of the run is measured on this model.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.mil.cases import Case
from bagscope.mil.recipe import OptimiserSpec

if TYPE_CHECKING:
    from bagscope.pipeline.train import MemberTask, PlannedRun

FINAL_STAGE = "final"
FINAL_NAME = "final"


def final_folder(run: Path) -> Path:
    """Return the folder of a run's final model."""
    return run / FINAL_NAME


def is_current(planned: PlannedRun) -> bool:
    """Return whether a run has a finished final model that was made of its members as they are."""
    from bagscope import artifacts
    from bagscope.mil.member import FACTS_NAME, read_facts

    facts = read_facts(final_folder(planned.folder))
    if facts is None:
        return False
    hashes = {
        task.folder.name: artifacts.sha256_of_file(task.folder / FACTS_NAME)
        for task in planned.tests.values()
    }
    return bool(facts["fields"].get("calibrated_by") == hashes)


def final_task(planned: PlannedRun, cases: Sequence[Case]) -> MemberTask:
    """Return the task of the final model of a run whose members are finished.

    Args:
        planned: the run.
        cases: every labelled one.
    """
    from bagscope.mil.member import read_facts
    from bagscope.pipeline.study import available_cores

    tasks = list(planned.members.values())
    # Members that were tuned each in their own fold may differ: what most came to, it is.
    counts = Counter(task.recipe.model_dump_json() for task in tasks)
    alike = [t for t in tasks if t.recipe.model_dump_json() == counts.most_common(1)[0][0]]
    epochs = []
    for task in alike:
        facts = read_facts(task.folder)
        assert facts is not None, "only a run whose members are finished has a final model"
        epochs.append(int(facts["epoch"]))
    first = alike[0]
    return dataclasses.replace(
        first,
        folder=final_folder(planned.folder),
        train=tuple(cases),
        inner=(),
        threads=available_cores(),
        # It follows from the members: one that was made of others is out of date.
        overwrite=first.overwrite or not is_current(planned),
        stop_after=statistics.median_high(epochs),
        plateau=_plateau([task.folder for task in alike], first.recipe.optimiser),
        out_of_fold=tuple(planned.tests.values()),
    )


def _plateau(members: Sequence[Path], spec: OptimiserSpec) -> tuple[float, ...]:
    """Return the median of what plateau left of the members' learning rate in each epoch."""
    from bagscope.mil.training.state import METRICS_NAME

    if spec.schedule != "plateau":
        return ()
    rates = []
    for folder in members:
        with (folder / METRICS_NAME).open(encoding="utf-8", newline="") as handle:
            rates.append([float(row["lr"]) for row in csv.DictReader(handle)])
    epochs = range(max(map(len, rates)))
    return tuple(
        statistics.median(own[epoch] for own in rates if epoch < len(own)) / spec.lr
        for epoch in epochs
    )
