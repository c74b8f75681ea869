"""Comparison: finished runs on the same test patients → which differ, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bagscope import artifacts
from bagscope.errors import ConfigError
from bagscope.mil.evaluation.bootstrap import RESAMPLES
from bagscope.mil.evaluation.comparing import Compared, compare
from bagscope.mil.report.comparison_page import comparison_page
from bagscope.pipeline.finished_run import FinishedRun, read_run

JSON_NAME = "comparison.json"
PAGE_NAME = "compare.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareRequest:
    """What is to be compared, as asked for.

    Attributes:
        runs: folders of training runs, two or more.
        target: which, where the runs have several.
        out: folder for the page and the numbers; nothing is written if None.
        resamples: of each bootstrap.
        seed: of the draws.
    """

    runs: tuple[Path, ...]
    target: str | None = None
    out: Path | None = None
    resamples: int = RESAMPLES
    seed: int = 0


def compare_runs(request: CompareRequest) -> Compared:
    """Compare runs, and write page and numbers where asked to.

    Raises:
        ConfigError: fewer than two runs, one of them twice, or other patients or labels.
        ArtifactError: a run that is not finished, or was edited.
    """
    if len(request.runs) < 2:
        raise ConfigError("there is one run, and a comparison takes two or more")
    runs = [read_run(folder) for folder in request.runs]
    names = _names(runs)
    target = request.target or _one_target(runs)
    found = compare(
        {name: run.answers(run.target(target)) for name, run in zip(names, runs, strict=True)},
        train_patients=_train_patients(runs[0]),
        resamples=request.resamples,
        seed=request.seed,
    )
    if request.out is not None:
        artifacts.write_json(request.out / JSON_NAME, {"target": target, **found.to_json()})
        artifacts.write_text(request.out / PAGE_NAME, comparison_page(target, found))
    return found


def _names(runs: Sequence[FinishedRun]) -> list[str]:
    """Return a name per run that no other has, and that is no path."""
    if len({run.folder for run in runs}) < len(runs):
        raise ConfigError("a run is named twice; name each one once")
    plain = [run.name for run in runs]
    if len(set(plain)) == len(plain):
        return plain
    longer = [f"{run.folder.parent.parent.name}/{run.name}" for run in runs]
    if len(set(longer)) < len(longer):
        return [f"{name} ({place})" for place, name in enumerate(longer, 1)]
    return longer


def _one_target(runs: Sequence[FinishedRun]) -> str:
    shared = [
        target.name
        for target in runs[0].targets
        if all(target.name in {one.name for one in run.targets} for run in runs)
    ]
    if not shared:
        each = "; ".join(
            f"{run.name}: {', '.join(target.name for target in run.targets)}" for run in runs
        )
        raise ConfigError(f"the runs have no target in common ({each})")
    if len(shared) > 1:
        raise ConfigError(
            f"the runs have several targets in common ({', '.join(shared)}); choose one with "
            "--target"
        )
    return shared[0]


def _train_patients(run: FinishedRun) -> float:
    counts = [
        len({run.plan.patient_of[case] for case in (*split.train, *split.val)})
        for split in run.plan.splits
    ]
    return float(np.mean(counts))
