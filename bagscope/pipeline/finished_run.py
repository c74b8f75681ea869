"""A training run that came to its end, looked at before any number is taken from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bagscope import artifacts
from bagscope.errors import ArtifactError, ConfigError
from bagscope.mil.cases import Per
from bagscope.mil.evaluation.answers import (
    Answers,
    PredictionTable,
    answers_of,
    mean_answers,
    read_predictions,
)
from bagscope.mil.member import read_facts
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.report.results import MemberFacts
from bagscope.mil.splits.files import read_splits
from bagscope.mil.splits.plan import Split, SplitPlan
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.recipes import laid_over
from bagscope.pipeline.train import PREDICTIONS_NAME, SPLITS_NAME, gathered, read_config
from bagscope.specs import parse_spec
from bagscope.wording import listed


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run whose every member is trained and tested.

    Attributes:
        folder: where it lies; its name is the run's.
        config: resolved.
        targets: with their classes.
        plan: the splits that it was trained on.
        table: its predictions.
        members: in the order of splits and seeds.
    """

    folder: Path
    config: Mapping[str, Any]
    targets: tuple[TargetSpec, ...]
    plan: SplitPlan
    table: PredictionTable
    members: tuple[MemberFacts, ...]

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.folder.name

    @property
    def per(self) -> Per:
        """Return what a case is."""
        per: Per = self.config["per"]
        return per

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds, one member of each fold for each."""
        return tuple(int(seed) for seed in self.config["seeds"])

    def target(self, name: str | None = None) -> TargetSpec:
        """Return a target; the first one where none is named.

        Raises:
            ConfigError: no such target.
        """
        found = {target.name: target for target in self.targets}
        if name is None:
            return self.targets[0]
        if name not in found:
            raise ConfigError(
                f"{self.folder}: has no target {name!r} (there are: {listed([*found])})"
            )
        return found[name]

    def by_seed(self, target: TargetSpec) -> dict[int, Answers]:
        """Return each seed's answers."""
        return {seed: answers_of(self._of_seed[seed], target) for seed in self.seeds}

    def answers(self, target: TargetSpec) -> Answers:
        """Return the mean over seeds."""
        found: dict[tuple[int, int], list[float]] = {}
        for split, _, facts in self._members():
            if target.name in facts.thresholds:
                place = (split.repeat, split.fold)
                found.setdefault(place, []).append(facts.thresholds[target.name])
        thresholds = {place: float(np.mean(values)) for place, values in found.items()}
        return mean_answers([*self.by_seed(target).values()], thresholds)

    @cached_property
    def _of_seed(self) -> dict[int, PredictionTable]:
        return {seed: self.table.where("seed", str(seed)) for seed in self.seeds}

    def _members(self) -> Iterator[tuple[Split, int, MemberFacts]]:
        places = ((split, seed) for split in self.plan.splits for seed in self.seeds)
        for (split, seed), facts in zip(places, self.members, strict=True):
            yield split, seed, facts


def read_run(folder: Path) -> FinishedRun:
    """Read a run and check that its predictions are those that its members made.

    Raises:
        ConfigError: no run there.
        ArtifactError: it is not finished, its members are not of its configuration, or its splits
            or predictions were edited.
    """
    # Its name is in the report, and "." is none.
    folder = folder.resolve()
    config = read_config(folder)
    targets = tuple(
        parse_spec(TargetSpec, target, where=f"{folder / 'config.yaml'}: targets")
        for target in config["targets"]
    )
    plan = read_splits(folder / SPLITS_NAME)
    sides = {split.name: {side: list(ids) for side, ids in split.sides()} for split in plan.splits}
    if artifacts.fingerprint(sides) != config["split"]["sides"]:
        raise ArtifactError(
            f"{folder / SPLITS_NAME}: was edited since the run was trained; a run can't be judged "
            "by other splits, train it anew"
        )
    names = [
        (split, int(seed), f"fold_{split.name}_s{seed}")
        for split in plan.splits
        for seed in config["seeds"]
    ]
    members = _member_facts(folder, [name for *_, name in names])
    _require_planned(folder, config, names)
    _require_same_predictions(folder, [name for *_, name in names])
    table = read_predictions(folder / PREDICTIONS_NAME)
    _require_complete(folder, table, [(split, seed) for split, seed, _ in names])
    return FinishedRun(
        folder=folder, config=config, targets=targets, plan=plan, table=table, members=members
    )


def _member_facts(folder: Path, names: Sequence[str]) -> tuple[MemberFacts, ...]:
    found, unfinished = [], []
    for name in names:
        facts = read_facts(folder / name)
        if facts is None or not (folder / name / PREDICTIONS_NAME).is_file():
            unfinished.append(name)
            continue
        found.append(
            MemberFacts(
                name=name,
                seed=facts["seed"],
                epoch=facts["epoch"],
                epochs=facts["epochs"],
                temperatures=facts["temperatures"],
                uncalibrated=facts["uncalibrated"],
                thresholds=facts["thresholds"],
            )
        )
    if unfinished:
        raise ArtifactError(
            f"{folder}: is not finished ({len(unfinished)} of {len(names)} members are not trained "
            f"and tested: {listed(unfinished, 4)}); run bagscope train again, it goes on where it "
            "stopped"
        )
    return tuple(found)


def _require_planned(
    folder: Path, config: Mapping[str, Any], names: Sequence[tuple[Split, int, str]]
) -> None:
    """Refuse members of another recipe, other targets or another seed than the run's."""
    tuned = config.get("tuned", {})
    for split, seed, name in names:
        facts = read_facts(folder / name)
        assert facts is not None, "only members that are finished are asked"
        recipe = laid_over(config["recipe"], tuned.get(split.name, {}))
        artifacts.require_same(
            _resolved(facts["recipe"], facts["targets"], facts["seed"], folder / name),
            _resolved(recipe, config["targets"], seed, folder / "config.yaml"),
            what=str(folder / name),
            remedy="train the run anew with bagscope train --overwrite",
        )


def _resolved(
    recipe: Mapping[str, Any], targets: Sequence[Mapping[str, Any]], seed: int, where: Path
) -> dict[str, artifacts.Json]:
    """Return what a member is of, with the defaults of options that came later."""
    specs = [parse_spec(TargetSpec, target, where=f"{where}: targets") for target in targets]
    return {
        "recipe": parse_spec(TrainSpec, recipe, where=f"{where}: recipe").model_dump(mode="json"),
        "targets": [spec.model_dump(mode="json") for spec in specs],
        "seed": seed,
    }


def _require_same_predictions(folder: Path, names: Sequence[str]) -> None:
    """Compare the run's table with those of its members, line by line."""
    path = folder / PREDICTIONS_NAME
    if not path.is_file():
        raise ArtifactError(
            f"{path}: is missing; run bagscope train again, which gathers the members' predictions"
        )
    given = path.read_text(encoding="utf-8").splitlines()
    made = gathered([folder / name for name in names]).splitlines()
    if given != made:
        pairs = zip(given, made, strict=False)
        row = next(
            (n for n, (a, b) in enumerate(pairs, 1) if a != b), min(len(given), len(made)) + 1
        )
        raise ArtifactError(
            f"{path}: differs from what the members predicted, first at line {row} (it has "
            f"{len(given) - 1} rows, they {len(made) - 1}); it was edited, run bagscope train "
            "again, which writes it anew"
        )


def _require_complete(
    folder: Path, table: PredictionTable, members: Sequence[tuple[Split, int]]
) -> None:
    """Refuse predictions that are not exactly those of the test cases."""
    columns = table.columns
    found: dict[tuple[str, str, str], list[str]] = {}
    keys = zip(columns["repeat"], columns["fold"], columns["seed"], strict=True)
    for key, case in zip(keys, columns["case_id"], strict=True):
        found.setdefault(key, []).append(case)
    for split, seed in members:
        own = found.get((str(split.repeat), str(split.fold), str(seed)), [])
        if sorted(own) != sorted(split.test):
            lacking = sorted(set(split.test) - set(own))
            surplus = sorted(set(own) - set(split.test))
            what = f"lacks {listed(lacking, 4)}" if lacking else f"has {listed(surplus, 4)} too"
            if not lacking and not surplus:
                what = "has a case twice"
            raise ArtifactError(
                f"{folder / PREDICTIONS_NAME}: fold {split.name}, seed {seed} {what}; it was "
                "edited, run bagscope train again"
            )


def changed_labels(answers: Answers, labels: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the cases whose label in a table is not the one that was trained on.

    Args:
        answers: of a run.
        labels: of the table, by case.
    """
    found = []
    for case, row in zip(answers.case.tolist(), answers.truth, strict=True):
        given = labels.get(case)
        same = given is not None and all(
            (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-7, abs_tol=1e-12)
            for a, b in zip(row.tolist(), given, strict=True)
        )
        if not same:
            found.append(case)
    return list(dict.fromkeys(found))
