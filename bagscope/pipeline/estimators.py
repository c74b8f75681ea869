"""Training as scikit-learn has it: `fit`, `predict`, `score`, in its cross-validation and searches.

    X   a list of (n, D) arrays, one per bag; with `store`, slide ids of a feature store
    y   a label per bag
    groups   the patient of each bag, so that the inner validation part is carved by patient

Nothing outside an estimator is changed: not the caller's random state, not its thread count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import (  # type: ignore[import-untyped]
    BaseEstimator,
    ClassifierMixin,
    RegressorMixin,
)
from sklearn.utils.validation import check_is_fitted  # type: ignore[import-untyped]

from bagscope.features.store import FeatureStore
from bagscope.mil.cases import Case, CaseTable
from bagscope.mil.evaluation.survival import concordance
from bagscope.mil.member import Member
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.sources import ArraySource, BagSource, StoreSource
from bagscope.mil.splits.strata import draw, patients_of, strata_of
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.trainer import Trainer
from bagscope.pipeline.recipes import laid_over, load_recipe
from bagscope.wording import listed

Array = NDArray[Any]
_NAME = "y"


class _MILEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """What the estimators share.

    Args:
        recipe: name of a recipe, a YAML file, or a `TrainSpec`.
        lr: learning rate; the recipe's own if None, as with the following.
        weight_decay: of the optimiser.
        epochs: most epochs.
        hidden: width of the aggregator's hidden layer.
        dropout: of the aggregator.
        sample_tiles: tiles of a bag that a training step sees.
        options: further options, nested as in a recipe; they win.
        val_share: share of the patients that early stopping, calibration and the choice of weights
            look at in place of learning from them; 0 trains all epochs.
        store: folder or URL of features, whose slide ids X then holds.
        device: "cpu", "cuda", ...
        seed: of weights, order, sampling, dropout and the inner validation part.
    """

    def __init__(
        self,
        recipe: str | TrainSpec = "abmil",
        *,
        lr: float | None = None,
        weight_decay: float | None = None,
        epochs: int | None = None,
        hidden: int | None = None,
        dropout: float | None = None,
        sample_tiles: int | None = None,
        options: Mapping[str, Any] | None = None,
        val_share: float = 0.2,
        store: str | Path | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.recipe = recipe
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.hidden = hidden
        self.dropout = dropout
        self.sample_tiles = sample_tiles
        self.options = options
        self.val_share = val_share
        self.store = store
        self.device = device
        self.seed = seed

    def _fit(
        self, X: Sequence[Any], target: TargetSpec, values: Array, groups: Sequence[Any] | None
    ) -> Self:
        """Train on labels (n, w)."""
        bags = list(X)
        if len(bags) != len(values):
            raise ValueError(f"{len(bags)} bags and {len(values)} labels; give one per bag")
        if not 0 <= self.val_share < 1:
            raise ValueError(f"val_share is {self.val_share}; it is at least 0 and below 1")
        patients = [f"bag {i}" for i in range(len(bags))] if groups is None else list(groups)
        if len(patients) != len(bags):
            raise ValueError(f"{len(bags)} bags and {len(patients)} groups; give one per bag")
        _refuse_missing(np.array([not np.isfinite(row).all() for row in values], np.bool_))
        recipe = self._recipe()
        cases = [
            self._case(i, bag, str(patients[i]), {_NAME: tuple(map(float, values[i]))})
            for i, bag in enumerate(bags)
        ]
        self._source(bags, cases)  # refuses a bag by its place in X, before they are parted
        held_out = self._inner_patients(cases, target)
        places = [
            [i for i, c in enumerate(cases) if (c.patient_id in held_out) == side]
            for side in (False, True)
        ]
        train, inner = (
            self._source([bags[i] for i in side], [cases[i] for i in side]) if side else None
            for side in places
        )
        assert train is not None, "not every patient is drawn"
        uses_cuda = str(self.device).startswith("cuda") or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        with torch.random.fork_rng(devices=range(torch.cuda.device_count() if uses_cuda else 0)):
            trainer = Trainer(recipe, [target], train, inner, seed=self.seed, device=self.device)
            trained = trainer.run()
        self.member_: Member = finish(trained, recipe, inner, seed=self.seed, fields={})
        self.history_ = trained.history
        self.n_features_in_ = train.dimension
        return self

    def _predicted(self, X: Sequence[Any]) -> tuple[Array, Array]:
        """Return logits (n, C), and what the objective makes of them after calibration."""
        check_is_fitted(self, "member_")
        bags = list(X)
        cases = [self._case(i, bag, "", {}) for i, bag in enumerate(bags)]
        logits = self.member_.infer(self._source(bags, cases), self.device).logits
        return logits, self.member_.predictions(logits)[_NAME]

    def _recipe(self) -> TrainSpec:
        aggregator = _given(hidden=self.hidden, dropout=self.dropout)
        blocks = {
            "optimiser": _given(lr=self.lr, weight_decay=self.weight_decay),
            "training": _given(epochs=self.epochs),
            "bags": _given(sample_tiles=self.sample_tiles),
            "aggregator": {"options": aggregator} if aggregator else {},
        }
        given = {name: block for name, block in blocks.items() if block}
        settings = laid_over(given, self.options or {})
        if isinstance(self.recipe, TrainSpec):
            return TrainSpec.model_validate(laid_over(self.recipe.model_dump(), settings))
        return load_recipe(self.recipe, settings)

    def _case(self, place: int, bag: Any, patient_id: str, targets: dict[str, Any]) -> Case:
        slide_id = str(bag) if self.store is not None else f"bag {place}"
        return Case(
            case_id=f"{place:06d}",
            patient_id=patient_id,
            slide_ids=(slide_id,),
            targets=targets,
        )

    def _inner_patients(self, cases: Sequence[Case], target: TargetSpec) -> set[str]:
        table = CaseTable(cases=tuple(cases), targets=(target,), per="slide")
        patients = patients_of(table)
        parts = max(2, round(1 / self.val_share)) if self.val_share else 2
        strata = strata_of(patients, target, parts=parts)
        return draw(patients, strata, self.val_share, f"{self.seed}/val")

    def _source(self, bags: Sequence[Any], cases: Sequence[Case]) -> BagSource:
        if self.store is None:
            return ArraySource([np.asarray(bag) for bag in bags], cases)
        return StoreSource(FeatureStore.open(str(self.store), only=set(map(str, bags))), cases)


class MILClassifier(ClassifierMixin, _MILEstimator):  # type: ignore[misc]
    """Classes of bags; see `_MILEstimator` for the options.

    `predict` gives the most probable class; `member_.thresholds` holds the threshold that the inner
    validation part suggests.
    """

    def fit(self, X: Sequence[Any], y: Any, groups: Sequence[Any] | None = None) -> Self:
        """Train on bags and their classes."""
        # As objects: among words, numpy would make a word of NaN.
        cells = np.asarray(y, dtype=object).ravel()
        _refuse_missing(np.array([cell is None or cell != cell for cell in cells], np.bool_))
        self.classes_, index = np.unique(np.asarray(y), return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has {len(self.classes_)} class; at least two are needed")
        target = TargetSpec(column=_NAME, classes=tuple(map(str, self.classes_)))
        return self._fit(X, target, index.reshape(-1, 1).astype(np.float64), groups)

    def predict_proba(self, X: Sequence[Any]) -> Array:
        """Return probabilities (n, classes), calibrated where there were patients enough."""
        return self._predicted(X)[1]

    def decision_function(self, X: Sequence[Any]) -> Array:
        """Return logits (n, classes); of two classes, the second one's over the first's (n,)."""
        logits = self._predicted(X)[0]
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict(self, X: Sequence[Any]) -> Array:
        """Return the most probable class of each bag."""
        chosen: Array = self.classes_[self.predict_proba(X).argmax(axis=1)]
        return chosen


class MILRegressor(RegressorMixin, _MILEstimator):  # type: ignore[misc]
    """Numbers of bags; see `_MILEstimator` for the options."""

    def fit(self, X: Sequence[Any], y: Any, groups: Sequence[Any] | None = None) -> Self:
        """Train on bags and their numbers."""
        values = np.asarray(y, np.float64).reshape(-1, 1)
        return self._fit(X, TargetSpec(column=_NAME, task="regression"), values, groups)

    def predict(self, X: Sequence[Any]) -> Array:
        """Return a number for each bag."""
        return self._predicted(X)[1]


class MILSurvival(_MILEstimator):
    """Risk of bags; see `_MILEstimator` for the options.

    `y` is what scikit-survival has, a structured array of (event, time), or an (n, 2) array of the
    same two columns. Cox's loss compares the bags of a step, so it asks for
    `options={"objective": {"survival": "cox"}, "bags": {"bags_per_step": 32}}`, or so.
    """

    def fit(self, X: Sequence[Any], y: Any, groups: Sequence[Any] | None = None) -> Self:
        """Train on bags and their follow-up."""
        event, time = _follow_up(y)
        if not event.any():
            raise ValueError(f"none of the {len(event)} bags has an event; nothing can be learnt")
        target = TargetSpec(column=_NAME, task="survival", time="time", event="event")
        return self._fit(X, target, np.stack([time, event], axis=1), groups)

    def predict(self, X: Sequence[Any]) -> Array:
        """Return the risk of each bag; higher is worse."""
        risk: Array = self._predicted(X)[1][:, 0]
        return risk

    def score(self, X: Sequence[Any], y: Any) -> float:
        """Return Harrell's C-index of the predicted risk."""
        event, time = _follow_up(y)
        return float(concordance(time, event, self.predict(X)))


def _refuse_missing(missing: NDArray[np.bool_]) -> None:
    """Refuse labels (n,) that are none, and name their places."""
    if missing.any():
        raise ValueError(
            f"y holds missing or infinite values for {missing.sum()} of {len(missing)} bags "
            f"({listed([str(i) for i in np.flatnonzero(missing)])}); leave those bags out"
        )


def _follow_up(y: Any) -> tuple[Array, Array]:
    values = np.asarray(y)
    if values.dtype.names:
        if len(values.dtype.names) != 2:
            raise ValueError(f"y has the fields {values.dtype.names}; expected (event, time)")
        event, time = (values[name].astype(np.float64) for name in values.dtype.names)
    elif values.ndim == 2 and values.shape[1] == 2:
        event, time = values.astype(np.float64).T
    else:
        raise ValueError(
            f"y is {values.dtype} of shape {values.shape}; give a structured array of (event, "
            "time), or an (n, 2) array of the same columns"
        )
    if not np.isin(event, (0, 1)).all():
        raise ValueError("the events of y hold other values than 0 and 1; the event comes first")
    return event, time


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
