"""Studies in which there is nothing to find, and how well a run says it tests on them."""

from __future__ import annotations

import csv
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from bagscope.cohort.executors import worker
from bagscope.mil.inference import infer
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.trainer import Trainer
from bagscope.pipeline.study import open_study
from bagscope.pipeline.train import PREDICTIONS_NAME, PlannedRun, TrainRequest, plan_training
from bagscope.pipeline.train_worker import source_of, test_task, train_task
from tests.mil.made_bags import study_of

PATIENTS, FEATURES = 40, 16
LEVEL = 0.999
SETTINGS = {
    "aggregator": {"options": {"hidden": 16, "attention": 8, "dropout": 0.0}},
    "optimiser": {"lr": 1e-2, "schedule": "constant"},
    "bags": {"bags_per_step": 8},
    "training": {"epochs": 6, "patience": None, "monitor": "metric"},
}
"""So that it learns by heart what it is given, and keeps the epoch that looks best."""


def noise_study(folder: Path, seed: int) -> tuple[Path, TrainRequest]:
    """Write a study of random features and random labels, two slides a patient."""
    generator = np.random.default_rng([seed, 2718])
    labels = generator.permutation(np.arange(PATIENTS) % 2)
    # Slides 4 p, 4 p + 2 and 4 p + 1, 4 p + 3 are of one patient each.
    of_slides = labels.reshape(-1, 2).repeat(2, axis=0).ravel()
    bags = [
        generator.standard_normal((generator.integers(3, 9), FEATURES), np.float32)
        for _ in of_slides
    ]
    study, features = study_of(folder, bags, of_slides.tolist())
    request = TrainRequest(
        targets=(TargetSpec(column="label"),), settings=SETTINGS, features=str(features)
    )
    return study, request


def plan_of(folder: Path, seed: int) -> PlannedRun:
    """Return a run's plan on such a study."""
    study, request = noise_study(folder, seed)
    return plan_training(open_study(study), request)


def honest_aurocs(planned: PlannedRun) -> NDArray[np.float64]:
    """Train and test every fold as a run does, in this process; return (folds,) test AUROCs."""
    with patch.object(worker, "tell"):  # nobody listens to the epochs
        for name, task in planned.members.items():
            train_task(name, task)
            test_task(name, planned.tests[name])
    return read_aurocs(planned)


def read_aurocs(planned: PlannedRun) -> NDArray[np.float64]:
    """Return the test AUROC of every fold from the tables that a run left."""
    found = []
    for test in planned.tests.values():
        with (test.folder / PREDICTIONS_NAME).open(encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
        assert {row["case_id"] for row in rows} == {case.case_id for case in test.cases}
        labels = [int(row["label"]) for row in rows]
        found.append(roc_auc_score(labels, [float(row["label_p_1"]) for row in rows]))
    return np.array(found)


def leaky_aurocs(planned: PlannedRun, leak: str) -> NDArray[np.float64]:
    """Hand the test cases to the trainer: to learn from ("train") or to choose by ("inner")."""
    found = []
    for name, task in planned.members.items():
        test = planned.tests[name]
        held = source_of(task.location, test.cases)
        if leak == "train":
            train = source_of(task.location, (*task.train, *test.cases))
            inner = source_of(task.location, task.inner)
        else:
            train, inner = source_of(task.location, task.train), held
        recipe: TrainSpec = task.recipe
        trained = Trainer(recipe, task.targets, train, inner, seed=task.seed).run()
        logits = infer(trained.model, held, recipe.bags).logits
        labels = [case.targets["label"][0] for case in test.cases]
        found.append(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
    return np.array(found)


def reach_of(planned: PlannedRun, runs: int) -> float:
    """Return how far the mean test AUROC of `runs` runs may lie from ½, at the level of 99.9 %.

    With random labels an AUROC is a Mann-Whitney statistic: variance (m + n + 1) / (12 m n) of m
    and n independent cases. Two slides of a patient share their label, so patients are counted.
    """
    variances = []
    for test in planned.tests.values():
        label_of = {case.patient_id: case.targets["label"][0] for case in test.cases}
        positives = sum(label_of.values())
        negatives = len(label_of) - positives
        variances.append((positives + negatives + 1) / (12 * positives * negatives))
    error = np.sqrt(np.sum(variances)) / len(variances) / np.sqrt(runs)
    return float(stats.norm.ppf((1 + LEVEL) / 2) * error)
