"""All that is found out about a run, before anybody words it: numbers, counts, and how it was done.

Nothing in here knows a path, a host or a user, so neither `metrics.json` nor the page can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bagscope.artifacts import Json
from bagscope.mil.baselines import Baseline
from bagscope.mil.evaluation.answers import Answers
from bagscope.mil.evaluation.bootstrap import Estimate
from bagscope.mil.evaluation.kaplan_meier import LogRank
from bagscope.mil.evaluation.paired import Comparison
from bagscope.mil.evaluation.scoring import Scores, Subgroup

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """A baseline on the same test patients.

    Attributes:
        name: which one.
        label: for people.
        estimate: its headline.
        versus: the model against it, the model first.
    """

    name: Baseline
    label: str
    estimate: Estimate
    versus: Comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetResult:
    """What was found for one target.

    Attributes:
        answers: the mean over seeds.
        scores: the model's numbers.
        rivals: the baselines that there are.
        skipped: why others are missing, by what people call them.
        subgroups: by column of the cohort table.
        log_rank: of survival's two risk groups, where there is something to compare.
    """

    answers: Answers
    scores: Scores
    rivals: tuple[Rival, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    subgroups: Mapping[str, tuple[Subgroup, ...]] = field(default_factory=dict)
    log_rank: LogRank | None = None

    @property
    def patients(self) -> int:
        """Return how many patients were tested."""
        return len(np.unique(self.answers.patient))

    @property
    def cases(self) -> int:
        """Return how many cases were tested."""
        return len(np.unique(self.answers.case))

    @property
    def counts(self) -> dict[str, int]:
        """Return how many patients have each class or label, or an event; nothing of numbers."""
        answers = self.answers
        target, truth = answers.target, answers.truth
        if target.task == "regression":
            return {}
        if target.task == "survival":
            return {"event": self._patients(truth[:, 1] == 1)}
        if target.task == "multilabel":
            return {
                name: self._patients(truth[:, place] == 1)
                for place, name in enumerate(target.classes)
            }
        return {
            name: self._patients(truth[:, 0] == place) for place, name in enumerate(target.classes)
        }

    def _patients(self, rows: Any) -> int:
        return len(np.unique(self.answers.patient[rows]))

    def to_json(self) -> dict[str, Any]:
        """Return all numbers."""
        test = self.log_rank
        return {
            "task": self.answers.target.task,
            "classes": list(self.answers.target.classes),
            "patients": self.patients,
            "cases": self.cases,
            "patients_with": self.counts,
            **self.scores.to_json(),
            "baselines": {
                rival.name: {
                    "label": rival.label,
                    "headline": rival.estimate.to_json(),
                    "model_minus_baseline": rival.versus.to_json(),
                }
                for rival in self.rivals
            },
            "baselines_skipped": dict(self.skipped),
            "subgroups": {
                column: [
                    {
                        "value": one.value,
                        "cases": one.cases,
                        "patients": one.patients,
                        "headline": None if one.estimate is None else one.estimate.to_json(),
                        "undefined": one.undefined,
                    }
                    for one in groups
                ]
                for column, groups in self.subgroups.items()
            },
            "log_rank": None if test is None else asdict(test),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldFacts:
    """How many patients a fold put on each side; `site` is the one held out, if any."""

    name: str
    train: int
    val: int
    test: int
    site: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberFacts:
    """What became of one trained model.

    Attributes:
        temperatures: by target, where it was calibrated.
        uncalibrated: why it was not, by target.
        thresholds: of the last of two classes, by target.
    """

    name: str
    seed: int
    epoch: int
    epochs: int
    temperatures: Mapping[str, float] = field(default_factory=dict)
    uncalibrated: Mapping[str, str] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What was found about a run.

    Attributes:
        run: its name.
        per: whether a case is a slide or a patient.
        targets: by name.
        method: of the splits; "external" for another cohort.
        seeds: that were trained.
        folds: in order.
        members: in order.
        left_out: why a slide or case is not there, by its id.
        notes: sentences on the cohort.
        patients_known: false where each slide counts as a patient of its own.
        versions: of the packages that computed this.
        config: of the run, resolved.
        fields: what the numbers depend on, for the fingerprint.
    """

    run: str
    per: str
    targets: Mapping[str, TargetResult]
    method: str
    seeds: tuple[int, ...]
    folds: tuple[FoldFacts, ...]
    members: tuple[MemberFacts, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    patients_known: bool
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    fields: Mapping[str, Json]

    def to_json(self) -> dict[str, Any]:
        """Return what `metrics.json` holds, but for the first lines and the fingerprint."""
        return {
            "schema_version": SCHEMA_VERSION,
            "run": self.run,
            "per": self.per,
            "seeds": list(self.seeds),
            "split": {
                "method": self.method,
                "patients": {
                    one.name: {
                        "train": one.train,
                        "val": one.val,
                        "test": one.test,
                        "site": one.site,
                    }
                    for one in self.folds
                },
            },
            "targets": {name: one.to_json() for name, one in self.targets.items()},
            "members": {
                one.name: {
                    "seed": one.seed,
                    "epoch": one.epoch,
                    "epochs": one.epochs,
                    "temperatures": dict(one.temperatures),
                    "uncalibrated": dict(one.uncalibrated),
                    "thresholds": dict(one.thresholds),
                }
                for one in self.members
            },
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }
