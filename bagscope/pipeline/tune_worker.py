"""What a worker does to choose options for a split: ask for some, score them, tell the score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import torch

from bagscope import artifacts
from bagscope.arithmetic import compute_on
from bagscope.artifacts import Json
from bagscope.cohort.jobs import StageResult
from bagscope.mil.bags import key_of
from bagscope.mil.cases import Case, CaseTable
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.splits.strata import deal, patients_of, strata_of
from bagscope.mil.training.trainer import Trainer, TrainingError
from bagscope.pipeline.train import NUMERICS
from bagscope.pipeline.train_worker import described, fingerprints_in, source_of, store_of
from bagscope.pipeline.tune import RangeSpec, TuneTask, chosen_path, with_options

Tell = Callable[[dict[str, Any]], None]
"""Is told of every trial, and with nothing to say of every epoch: a sign of life."""


def tune_task(task: TuneTask, tell: Tell) -> StageResult:
    """Choose options for a split, or find them chosen; goes on where a killed search stopped.

    Raises:
        FingerprintMismatch: they were chosen in another space, or on other data.
        TrainingError: no trial came to a loss.
    """
    compute_on(task.threads)
    fields = tune_fields(task)
    fingerprint = artifacts.fingerprint(fields)
    path = chosen_path(task)
    if path.exists() and not task.overwrite:
        artifacts.require_same(
            artifacts.read_json(path)["fields"],
            fields,
            what=str(path),
            remedy="choose another --name, or tune anew with --overwrite",
        )
        return StageResult(outcome="skipped", fingerprint=fingerprint)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task.folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{path.with_suffix('.db')}",
        study_name=fingerprint,  # what was asked otherwise is another study of the same file
        load_if_exists=True,
        direction="minimize",
    )
    folds = inner_folds(task)
    while (done := len(_finished(study))) < task.trials:
        # Keyed by how many there are, so that a search that was killed asks what it would have.
        seed = key_of(f"{task.seed}/{task.split}/{done}") % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=False)
        trial = study.ask()
        options = {name: _ask(trial, name, where) for name, where in task.space.items()}
        loss = score(task, with_options(task.recipe, options), folds, lambda: tell({}))
        study.tell(trial, loss)
        artifacts.step("trial-told")
        tell(
            {
                "text": f"trial {done + 1}/{task.trials}, validation {loss:.4f}, "
                f"best {study.best_value:.4f}",
                "trial": done + 1,
                "loss": loss if math.isfinite(loss) else None,
            }
        )
    if not math.isfinite(study.best_value):
        raise TrainingError(
            f"split {task.split}: none of {task.trials} trials came to a loss; lower the learning "
            "rates of the space"
        )
    trials = [
        {"options": trial.params, "loss": trial.value if math.isfinite(trial.value or 0) else None}
        for trial in _finished(study)
    ]
    artifacts.write_json(
        path,
        {
            "options": study.best_params,
            "loss": study.best_value,
            "trials": trials,
            "fields": fields,
        },
    )
    return StageResult(
        outcome="done", fingerprint=fingerprint, facts={"trials": done, "loss": study.best_value}
    )


def tune_fields(task: TuneTask) -> dict[str, Json]:
    """Return what a choice depends on."""
    store = store_of(task.location, task.cases)
    return {
        "stage": "tune",
        "numerics": NUMERICS,
        "recipe": task.recipe.model_dump(mode="json"),
        "space": {name: where.model_dump(mode="json") for name, where in task.space.items()},
        "targets": [target.model_dump(mode="json") for target in task.targets],
        "trials": task.trials,
        "inner_folds": task.inner_folds,
        "seed": task.seed,
        "cases": artifacts.fingerprint(described(task.cases, fingerprints_in(store))),
    }


def inner_folds(task: TuneTask) -> list[tuple[list[Case], list[Case]]]:
    """Return (learnt from, scored on) for each inner fold, by patient and stratified."""
    table = CaseTable(cases=task.cases, targets=task.targets, per=task.recipe.bags.per)
    strata = strata_of(patients_of(table), task.targets[0], parts=task.inner_folds)
    fold_of = deal(strata, task.inner_folds, f"{task.seed}/{task.split}/inner")
    return [
        (
            [case for case in task.cases if fold_of[case.patient_id] != fold],
            [case for case in task.cases if fold_of[case.patient_id] == fold],
        )
        for fold in range(task.inner_folds)
    ]


def score(
    task: TuneTask,
    recipe: TrainSpec,
    folds: Sequence[tuple[Sequence[Case], Sequence[Case]]],
    beat: Callable[[], None] = lambda: None,
) -> float:
    """Return the mean validation loss of a recipe's kept weights; infinite where there is none."""
    losses = []
    for learnt, scored in folds:
        train, inner = (source_of(task.location, cases) for cases in (learnt, scored))
        try:
            trainer = Trainer(
                recipe,
                task.targets,
                train,
                inner,
                seed=task.seed,
                device=task.device,
                on_epoch=lambda _: beat(),
                on_preparing=lambda _: beat(),
            )
            trained = trainer.run()
        except TrainingError:
            return math.inf
        assert trained.inner_logits is not None
        labels = {
            target.name: torch.tensor([case.targets[target.name] for case in scored])
            for target in task.targets
        }
        logits = torch.from_numpy(trained.inner_logits)
        losses.append(trained.objective.validation_loss(logits, labels))
    mean = float(np.mean(losses))
    return mean if math.isfinite(mean) else math.inf


def _ask(trial: optuna.Trial, name: str, where: RangeSpec) -> Any:
    if where.choices:
        return trial.suggest_categorical(name, where.choices)
    assert where.low is not None and where.high is not None
    if isinstance(where.low, int) and isinstance(where.high, int):
        return trial.suggest_int(name, where.low, where.high, log=where.log)
    return trial.suggest_float(name, where.low, where.high, log=where.log)


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
