"""A sanity run: a recipe that can't learn a few cases by heart learns nothing from many.

A few cases, stratified, are trained on without sampling, dropout, noise, smoothing or decay, at the
recipe's own learning rate, until they fit. Nothing is written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bagscope.cohort.progress import Reporter, SlideTold
from bagscope.errors import ConfigError
from bagscope.mil.cases import Case
from bagscope.pipeline.recipes import load_recipe
from bagscope.pipeline.study import Study
from bagscope.wording import counted

if TYPE_CHECKING:
    from bagscope.mil.recipe import TrainSpec
    from bagscope.mil.sources import BagSource
    from bagscope.mil.targets import TargetSpec
    from bagscope.mil.training.history import Epoch
    from bagscope.mil.training.trainer import Trainer
    from bagscope.pipeline.train import TrainRequest

STAGE = "overfit"
MOST_EPOCHS = 300
FITTING_LOSS = 0.05
"""Nats, of classes; about 0.95 for the truth."""
FITTING_METRIC = 0.99
"""Of tasks whose loss has no such zero: κ, R² or the C-index."""
HALF = 0.5
_TOLD_EVERY = 20
_PATIENCE, _PROGRESS = 60, 0.01
"""Epochs in which the loss must fall by such a share at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overfit:
    """How it ended.

    Attributes:
        first_loss: of the first epoch, in training mode.
        loss: at the end, of whole bags without dropout.
        accuracy: share of cases right in every target with classes; NaN without one.
        metric: of the first target (see `monitoring.METRICS`).
        hints: what to look at where it does not fit.
    """

    cases: tuple[str, ...]
    epochs: int
    first_loss: float
    loss: float
    accuracy: float
    metric: float
    metric_name: str
    fits: bool
    hints: tuple[str, ...]


class _Over(Exception):
    """Nothing more is to be learnt, or will be."""


def overfit_study(study: Study, request: TrainRequest, count: int, report: Reporter) -> Overfit:
    """Train a recipe on a few cases of a study until it knows them by heart.

    Raises:
        ConfigError: fewer than two cases, or options that do not fit.
        ArtifactError: no features.
    """
    from bagscope.mil.training.monitoring import METRICS
    from bagscope.mil.training.trainer import Trainer
    from bagscope.pipeline.train_data import find_features, labelled_cases
    from bagscope.pipeline.train_worker import source_of

    if count < 2:
        raise ConfigError(f"--overfit is {count}; at least two cases are needed, 8 are usual")
    if not request.targets:
        raise ConfigError("nothing to predict; name a label column with --target")
    asked = load_recipe(request.recipe, request.settings)
    recipe = plain_recipe(asked, count)
    location = find_features(study, request.features, request.encoder)
    table = labelled_cases(
        study,
        request.targets,
        per=recipe.bags.per,
        location=location,
        skip_missing=request.skip_missing,
    )
    cases = choose_cases(table.cases, table.targets[0], count)
    source = source_of(location, cases)
    history: list[Epoch] = []

    def on_epoch(epoch: Epoch) -> None:
        history.append(epoch)
        if epoch.number % _TOLD_EVERY == 0:
            text = f"epoch {epoch.number}/{MOST_EPOCHS}, loss {epoch.validation_loss:.4f}"
            report.emit(
                SlideTold(stage=STAGE, slide_id=counted(count, "case"), text=text, facts={})
            )
        if _fits(trainer, source, epoch) or _is_stuck(history):
            raise _Over

    trainer = Trainer(
        recipe,
        table.targets,
        source,
        source,
        seed=request.seeds[0],
        device=request.device,
        on_epoch=on_epoch,
    )
    with contextlib.suppress(_Over):
        trainer.run()
    fits = _fits(trainer, source, history[-1])
    return Overfit(
        cases=tuple(case.case_id for case in cases),
        epochs=len(history),
        first_loss=history[0].losses["bag"],
        loss=history[-1].validation_loss,
        accuracy=_accuracy(trainer, source),
        metric=history[-1].metric,
        metric_name=METRICS[table.targets[0].task],
        fits=fits,
        hints=() if fits else _hints(source, asked, table.targets, history),
    )


def plain_recipe(recipe: TrainSpec, count: int) -> TrainSpec:
    """Return a recipe without anything that keeps it from learning by heart."""
    from bagscope.mil.aggregators.registry import aggregator_entry
    from bagscope.mil.objectives.spec import EntropySpec
    from bagscope.mil.regimes.registry import without_regime

    recipe = without_regime(recipe)
    aggregator = recipe.aggregator
    given: dict[str, Any] = dict(aggregator.options)
    fields = aggregator_entry(aggregator.name).options.model_fields
    # Only options that are numbers by default: others have no meaning for each variant.
    for name in ("dropout", "attention_dropout", "stkim_p"):
        if name in given or (name in fields and isinstance(fields[name].get_default(), float)):
            given[name] = 0.0
    return recipe.model_copy(
        update={
            "aggregator": aggregator.model_copy(update={"options": given}),
            "bags": recipe.bags.model_copy(
                update={
                    "bags_per_step": min(recipe.bags.bags_per_step, count),
                    "sample_tiles": None,
                    "first_tiles": None,
                    "tile_dropout": 0.0,
                    "feature_dropout": 0.0,
                    "noise": 0.0,
                    "balanced": False,
                }
            ),
            "objective": recipe.objective.model_copy(
                update={"label_smoothing": 0.0, "entropy": EntropySpec()}
            ),
            "optimiser": recipe.optimiser.model_copy(
                update={"schedule": "constant", "warmup_epochs": 0.0, "weight_decay": 0.0}
            ),
            "training": recipe.training.model_copy(
                update={
                    "epochs": MOST_EPOCHS,
                    "patience": None,
                    "checkpoint": "last",
                    "ema_decay": None,
                    "compile": False,
                }
            ),
        }
    )


def choose_cases(cases: Sequence[Case], target: TargetSpec, count: int) -> tuple[Case, ...]:
    """Return `count` cases, of each class in turn; of numbers, spread over their range."""
    known = [case for case in cases if not any(map(math.isnan, case.targets[target.name]))]
    if len(known) < count:
        raise ConfigError(f"--overfit is {count}, and {len(known)} cases have a label")
    if target.task in ("regression", "survival"):
        ranked = sorted(known, key=lambda case: case.targets[target.name])
        return tuple(ranked[round(i * (len(ranked) - 1) / (count - 1))] for i in range(count))
    by_label: dict[tuple[float, ...], list[Case]] = {}
    for case in known:
        by_label.setdefault(case.targets[target.name], []).append(case)
    chosen: list[Case] = []
    place = 0
    while len(chosen) < count:
        for label in sorted(by_label):
            if place < len(by_label[label]) and len(chosen) < count:
                chosen.append(by_label[label][place])
        place += 1
    return tuple(chosen)


def _accuracy(trainer: Trainer, source: BagSource) -> float:
    """Return the share of cases right in every target with classes; NaN without one."""
    import numpy as np

    from bagscope.mil.inference import infer
    from bagscope.mil.statistics import scale_of

    recipe = trainer.recipe
    logits = infer(
        trainer.model,
        source,
        recipe.bags,
        device=next(trainer.model.parameters()).device,
        precision=recipe.training.precision,
        scale=scale_of(trainer.statistics) if recipe.bags.standardise else None,
    ).logits
    predicted = trainer.objective.predictions(logits)
    right = []
    for target in trainer.targets:
        labels = np.array([case.targets[target.name] for case in source.cases])
        known = ~np.isnan(labels).any(axis=1)
        if target.is_categorical:
            right.append((predicted[target.name].argmax(axis=1) == labels[:, 0]) | ~known)
        elif target.task == "multilabel":
            right.append(((predicted[target.name] >= HALF) == labels).all(axis=1) | ~known)
    return float(np.all(right, axis=0).mean()) if right else math.nan


def _fits(trainer: Trainer, source: BagSource, epoch: Epoch) -> bool:
    if all(target.task in ("classes", "multilabel", "ordinal") for target in trainer.targets):
        is_near = epoch.validation_loss <= FITTING_LOSS
    else:
        is_near = epoch.metric >= FITTING_METRIC
    return is_near and not _accuracy(trainer, source) < 1


def _is_stuck(history: Sequence[Epoch]) -> bool:
    if len(history) <= _PATIENCE:
        return False
    before, now = (one.validation_loss for one in (history[-1 - _PATIENCE], history[-1]))
    return not now < (1 - _PROGRESS) * before


def _hints(
    source: BagSource,
    recipe: TrainSpec,
    targets: Sequence[TargetSpec],
    history: Sequence[Epoch],
) -> tuple[str, ...]:
    """Return what to look at, the likeliest first."""
    import numpy as np

    hints = []
    means: dict[bytes, tuple[str, Any]] = {}
    for place, case in enumerate(source.cases):
        tiles = source.read(place).features
        key = tiles.mean(axis=0, dtype=np.float64).tobytes()
        other = means.setdefault(key, (case.case_id, case.targets))
        if other[1] != case.targets:
            hints.append(
                f"{other[0]} and {case.case_id} have the same features and different labels: are "
                "their files mixed up?"
            )
        if np.ptp(tiles, axis=0).max() == 0 and len(tiles) > 1:
            hints.append(f"all {len(tiles)} tiles of {case.case_id} have the same features")
    losses = [epoch.validation_loss for epoch in history]
    rate = recipe.optimiser.lr
    tail = losses[-max(2, len(losses) // 10) :]
    if max(losses) - min(losses) < _PROGRESS * abs(losses[0]):
        hints.append(f"the loss hardly moves: raise optimiser.lr ({rate:g})")
    elif tail[-1] < tail[0] and tail[-1] < losses[0]:
        hints.append(
            f"the loss still falls after {counted(len(losses), 'epoch')}: raise optimiser.lr "
            f"({rate:g}), or lower bags.bags_per_step"
        )
    else:
        hints.append(f"the loss falls no further: lower optimiser.lr ({rate:g})")
    if not recipe.bags.standardise and _may_standardise(recipe, targets):
        hints.append("features of large or very different scales need bags.standardise: true")
    hints.append("look whether the label column belongs to these slides, and at the features")
    return tuple(hints)


def _may_standardise(recipe: TrainSpec, targets: Sequence[TargetSpec]) -> bool:
    """Return whether the recipe's regime goes with standardised features."""
    from bagscope.mil.regimes.registry import refuse_impossible

    bags = recipe.bags.model_copy(update={"standardise": True})
    try:
        refuse_impossible(recipe.model_copy(update={"bags": bags}), targets)
    except ConfigError:
        return False
    return True
