"""The trainer: training bags and inner-validation bags in, weights out.

It is given two sources and no store, table or split, so no test case can be reached from it. What
it needs to go on after being killed is written once per epoch; taken up again on the same machine
with the same number of threads, it ends at the same bits.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagscope import artifacts
from bagscope.errors import BagscopeError, ConfigError
from bagscope.kernels.dispatch import keeping
from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import BagOutput, Bags
from bagscope.mil.inference import DTYPES, infer
from bagscope.mil.loading import Batch, Prefetched, Presentation, Step, load_batch, plan_epoch
from bagscope.mil.objectives.fitted import Counts, FittedObjective, Losses
from bagscope.mil.objectives.objective import build_objective
from bagscope.mil.places import require_places
from bagscope.mil.recipe import BagSpec, TrainSpec
from bagscope.mil.regimes.regime import Regime
from bagscope.mil.regimes.registry import build_model, refuse_impossible
from bagscope.mil.sampling import shown_at
from bagscope.mil.sources import BagSource
from bagscope.mil.statistics import FeatureStatistics, scale_of, statistics_of
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.history import Epoch, Means, metrics_csv
from bagscope.mil.training.monitoring import metric_of
from bagscope.mil.training.optimisation import (
    RunningMean,
    Schedule,
    Weights,
    build_optimiser,
    copied,
    mean_of,
)
from bagscope.mil.training.state import METRICS_NAME, PREPARATION_NAME, STATE_NAME, read_state


class TrainingError(BagscopeError):
    """Training can't go on: a loss that is no number, or too little memory."""


@dataclass
class Watch:
    """Early stopping: the best epoch so far, 0 before any."""

    best: float = math.inf
    epoch: int = 0
    weights: Weights = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What training came to.

    Attributes:
        weights: of the checkpoint rule.
        epoch: whose weights these are, from 1; of "averaged", the last one.
        statistics: of the training features.
        inner_logits: (n, C) of the inner validation part under these weights; None without one.
    """

    model: Aggregator
    weights: Weights
    objective: FittedObjective
    epoch: int
    history: tuple[Epoch, ...]
    statistics: FeatureStatistics
    inner_logits: NDArray[np.float64] | None


class Trainer:
    """Trains one model on one source."""

    def __init__(
        self,
        recipe: TrainSpec,
        targets: Sequence[TargetSpec],
        train: BagSource,
        inner: BagSource | None,
        *,
        seed: int,
        device: str = "cpu",
        folder: Path | None = None,
        fingerprint: str = "",
        stop_after: int | None = None,
        plateau: Sequence[float] = (),
        on_epoch: Callable[[Epoch], None] = lambda _: None,
        on_preparing: Callable[[Epoch], None] = lambda _: None,
    ) -> None:
        """Prepare a training.

        Args:
            recipe: what to train and how.
            targets: with their classes resolved.
            train: what is learnt from.
            inner: the inner validation part; None trains all epochs and keeps the last weights.
            seed: of weights, order, sampling and dropout.
            device: "cpu", "cuda", ...
            folder: where the state is kept, so that a killed training goes on; nowhere if None.
            fingerprint: of all that the training depends on; a state of another one is refused.
            stop_after: epochs after which training ends, on the recipe's learning rates for all of
                its epochs; all of them if None.
            plateau: what the schedule of this name leaves of the learning rate in each epoch, for a
                training without an inner part; all of it if empty.
            on_epoch: is told of every epoch.
            on_preparing: is told of every epoch of the training that the regime needs first.

        Raises:
            ConfigError: options that do not go together.
        """
        self.recipe = recipe
        self.targets = tuple(targets)
        self._train = train
        self._inner = inner
        self._seed = seed
        self._device = torch.device(device)
        self._folder = folder
        self._fingerprint = fingerprint
        self._stop_after = stop_after
        self._plateau = tuple(plateau)
        self._on_epoch = on_epoch
        self._on_preparing = on_preparing
        spec = recipe.training
        self._epochs = spec.epochs if stop_after is None else min(stop_after, spec.epochs)
        spec.require_device(self._device.type)
        # A final model has no inner part either, but its length was found with one.
        if recipe.optimiser.schedule == "plateau" and inner is None and stop_after is None:
            raise ConfigError(
                "optimiser.schedule is plateau, which watches the inner validation part, and there "
                "is none; choose cosine or constant, or a val_share above 0"
            )
        self.statistics = statistics_of(train)
        self._scale = scale_of(self.statistics) if recipe.bags.standardise else None
        torch.manual_seed(seed)
        self._labels = _labels(train)
        refuse_impossible(recipe, self.targets)
        objective = build_objective(self.targets, recipe.objective)
        objective.require_step_of(recipe.bags.bags_per_step)
        self.objective = objective.fit(self._labels)
        self.model = build_model(recipe, train.dimension, objective.outputs).to(self._device)
        require_places(self.model, recipe, train)
        self._forward: Callable[[Bags], BagOutput] = self.model
        if isinstance(self.model, Regime):
            self.model.begin(self.objective)
        if spec.compile and isinstance(self.model, Regime):
            self.model.inner.compile(dynamic=True)
        elif spec.compile:
            self._forward = torch.compile(self.model, dynamic=True)
        self._optimiser = build_optimiser(self.model, recipe.optimiser)
        per_epoch = len(self._plan(0))
        self._schedule = Schedule(
            spec=recipe.optimiser,
            steps=per_epoch * spec.epochs,
            warmup_steps=round(per_epoch * recipe.optimiser.warmup_epochs),
        )
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=spec.precision == "float16")
        self._ema = RunningMean(spec.ema_decay) if spec.ema_decay is not None else None
        self._last: deque[Weights] = deque(maxlen=spec.average_epochs)
        self._watch = Watch()
        self._history: list[Epoch] = []

    @property
    def history(self) -> tuple[Epoch, ...]:
        """Return the epochs so far, also those of an earlier process."""
        return tuple(self._history)

    def run(self) -> Trained:
        """Train to the end, from where an earlier run of the same training stopped.

        Raises:
            TrainingError: the loss is no number.
        """
        self._resume()
        if not self._history and isinstance(self.model, Regime):
            self._prepare(self.model)
        while len(self._history) < self._epochs and not self._is_over():
            epoch = self._one_epoch(len(self._history))
            self._history.append(epoch)
            self._after_epoch(epoch)
            self._keep()
            self._on_epoch(epoch)
        return self._finished()

    def _prepare(self, model: Regime) -> None:
        """Train what the regime needs to begin with, on the same bags; resumes by itself."""
        first = model.preparation(self.recipe)
        if first is None:
            return
        trainer = Trainer(
            first.recipe,
            first.targets or self.targets,
            first.seen(self._train),
            None if self._inner is None else first.seen(self._inner),
            seed=self._seed,
            device=str(self._device),
            folder=None if self._folder is None else self._folder / PREPARATION_NAME,
            fingerprint=self._fingerprint,
            stop_after=self._stop_after,
            plateau=self._plateau,
            on_epoch=self._on_preparing,
        )
        model.prepared(trainer.run().model)
        # The same draws follow, whether this training was done now or found done.
        torch.manual_seed(self._seed)

    # --- one epoch ------------------------------------------------------------------------------

    def _plan(self, epoch: int) -> list[Step]:
        return plan_epoch(
            self._train.lengths,
            self._shown_in(epoch),
            seed=self._seed,
            epoch=epoch,
            weights=self._draw_weights() if self.recipe.bags.balanced else None,
            whole_steps=self.objective.needs_batch_of_bags
            or (isinstance(self.model, Regime) and self.model.whole_steps),
        )

    def _shown_in(self, epoch: int) -> BagSpec:
        longest = int(self._train.lengths.max())
        return shown_at(self.recipe.bags, longest, epoch / self.recipe.training.epochs)

    def _one_epoch(self, number: int) -> Epoch:
        if self._plateau:
            self._schedule.factor = self._plateau[min(number, len(self._plateau) - 1)]
        began_s = time.perf_counter()
        steps = self._plan(number)
        how = Presentation(
            spec=self._shown_in(number),
            dtype=DTYPES[self.recipe.training.precision],
            training=True,
            seed=self._seed,
            scale=self._scale,
        )
        work = [
            (step.number, batch, turns)
            for step in steps
            for batch, turns in zip(step.batches, step.turns, strict=True)
        ]

        def read(item: tuple[int, Batch, tuple[int, ...]]) -> Bags:
            step, batch, turns = item
            return load_batch(
                self._train, batch, how, step=step, turns=turns, progress=self._progress(step)
            )

        self.model.train()
        means = Means()
        tiles = 0
        ready: Prefetched[Bags] = Prefetched(work, read)
        try:
            for step in steps:
                rate = self._schedule.rate(step.number)
                for group in self._optimiser.param_groups:
                    group["lr"] = rate
                self._optimiser.zero_grad(set_to_none=True)
                counts = self._counts(step)
                for _ in step.batches:
                    bags = next(ready)
                    tiles += len(bags.features)
                    self._learn(bags.to(self._device), step, counts, means)
                self._change_weights()
        finally:
            ready.close()
        validation_loss, metric = self._validate()
        return Epoch(
            number=number + 1,
            losses=means.found(),
            validation_loss=validation_loss,
            metric=metric,
            lr=rate,
            tiles=tiles,
            seconds=time.perf_counter() - began_s,
            waited_s=ready.waited_s,
        )

    def _counts(self, step: Step) -> Counts:
        """Return how many of a step's bags have their labels."""
        places = [place for batch in step.batches for place in batch]
        return self.objective.counts(
            {name: torch.from_numpy(rows[places]) for name, rows in self._labels.items()}
        )

    def _learn(self, bags: Bags, step: Step, counts: Counts, means: Means) -> None:
        def judge(
            output: BagOutput, targets: Mapping[str, Tensor], lengths: Tensor | None = None
        ) -> Losses:
            return self.objective(
                output, targets, progress=bags.progress, lengths=lengths, step=counts
            )

        with keeping(self.recipe.training.keep_mib << 20):
            if isinstance(self.model, Regime):
                losses = self.model.losses(bags, judge)
            else:
                losses = judge(self._forward(bags), bags.targets or {}, bags.lengths)
        total = float(losses.total.detach())
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss is {total} in epoch {len(self._history) + 1} on bags "
                f"{', '.join(bags.bag_ids[:5])}; look at their features, or lower the learning rate"
            )
        scaled: Tensor = self._scaler.scale(losses.total)
        scaled.backward()  # type: ignore[no-untyped-call]
        # A batch's total is its share of the step's, which stands for every bag of the step.
        means.add("total", total * step.size, len(bags))
        for name, values in losses.terms.items():
            own = values[losses.present[name]].double()
            means.add(name, float(own.sum()), len(own))

    def _progress(self, step: int) -> float:
        return step / max(1, self._schedule.steps)

    def _change_weights(self) -> None:
        clip = self.recipe.optimiser.clip_norm
        if clip is not None:
            self._scaler.unscale_(self._optimiser)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self.model.after_step()
        if self._ema is not None:
            self._ema.add(self.model)

    def _validate(self) -> tuple[float, float]:
        if self._inner is None:
            return math.nan, math.nan
        logits = self._inner_logits(self._ema.weights if self._ema else None)
        labels = _labels(self._inner)
        loss = self.objective.validation_loss(
            torch.from_numpy(logits), {name: torch.from_numpy(v) for name, v in labels.items()}
        )
        first = self.targets[0]
        predicted = self.objective.predictions(logits)[first.name]
        return loss, metric_of(first, labels[first.name], predicted)

    def _inner_logits(self, weights: Weights | None) -> NDArray[np.float64]:
        assert self._inner is not None
        kept = None
        if weights is not None:
            kept = copied(self.model)
            self.model.load_state_dict(weights)
        found = infer(
            self.model,
            self._inner,
            self.recipe.bags,
            device=self._device,
            precision=self.recipe.training.precision,
            scale=self._scale,
        )
        if kept is not None:
            self.model.load_state_dict(kept)
        return found.logits

    # --- between epochs -------------------------------------------------------------------------

    def _after_epoch(self, epoch: Epoch) -> None:
        spec = self.recipe.training
        if self._inner is not None:
            if self.recipe.optimiser.schedule == "plateau":
                self._schedule.after_epoch(epoch.validation_loss)
            watched = epoch.validation_loss if spec.monitor == "loss" else -epoch.metric
            if watched < self._watch.best:
                self._watch = Watch(best=watched, epoch=epoch.number, weights=self._weights_now())
        if spec.checkpoint == "averaged":
            self._last.append(self._weights_now())

    def _is_over(self) -> bool:
        spec = self.recipe.training
        done = len(self._history)
        # Where the inner part's labels define no loss or metric, no epoch is ever the best.
        if not self._watch.epoch or spec.patience is None or done < max(1, spec.min_epochs):
            return False
        return done - self._watch.epoch >= spec.patience

    def _weights_now(self) -> Weights:
        if self._ema is None:
            return copied(self.model)
        return {name: weight.clone() for name, weight in self._ema.weights.items()}

    def _finished(self) -> Trained:
        # Once more: whoever was killed between the last state and its metrics has no epoch to come.
        self._write_metrics()
        spec = self.recipe.training
        epoch = len(self._history)
        if spec.checkpoint == "averaged":
            weights = mean_of(self._last)
        elif spec.checkpoint == "best" and self._watch.epoch:
            weights, epoch = self._watch.weights, self._watch.epoch
        else:
            weights = self._weights_now()
        self.model.load_state_dict(weights)
        self.model.eval()
        return Trained(
            model=self.model,
            weights=weights,
            objective=self.objective,
            epoch=epoch,
            history=tuple(self._history),
            statistics=self.statistics,
            inner_logits=None if self._inner is None else self._inner_logits(None),
        )

    def _draw_weights(self) -> NDArray[np.float64]:
        """Return how likely each case is drawn, so that classes come equally often."""
        target = next(t for t in self.targets if t.is_categorical)
        labels = self._labels[target.name][:, 0]
        known = ~np.isnan(labels)
        _, places, counts = np.unique(labels[known], return_inverse=True, return_counts=True)
        weights = np.ones(len(labels))
        weights[known] = 1.0 / counts[places]
        # A case without this label, but with another one, comes as often as the average.
        weights[~known] = weights[known].mean()
        return weights

    # --- going on after a kill ------------------------------------------------------------------

    def _keep(self) -> None:
        if self._folder is None:
            return
        state = {
            "fingerprint": self._fingerprint,
            "device": self._device.type,
            "history": [epoch.plain() for epoch in self._history],
            "model": self.model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state(),
            "scaler": self._scaler.state_dict(),
            "ema": self._ema.state() if self._ema else None,
            "last": list(self._last),
            "watch": [self._watch.best, self._watch.epoch, self._watch.weights],
            "rng": torch.get_rng_state(),
            "cuda_rng": (
                torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
            ),
        }
        with artifacts.atomic_file(self._folder / STATE_NAME) as temporary:
            torch.save(state, temporary)
        artifacts.step("state-written")
        self._write_metrics()

    def _write_metrics(self) -> None:
        if self._folder is not None:
            artifacts.write_text(self._folder / METRICS_NAME, metrics_csv(self._history))

    def _resume(self) -> None:
        path = None if self._folder is None else self._folder / STATE_NAME
        if path is None or not path.exists():
            return
        state = read_state(path, self._fingerprint, self._device)
        self._history = [Epoch(**values) for values in state["history"]]
        self.model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.restore(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        if self._ema is not None:
            self._ema.restore(state["ema"])
        self._last.extend(state["last"])
        best, epoch, weights = state["watch"]
        self._watch = Watch(best=best, epoch=epoch, weights=dict(weights))
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self._device)


def _labels(source: BagSource) -> dict[str, NDArray[np.float64]]:
    """Return the labels (n, w) of a source's cases, by target."""
    names = source.cases[0].targets
    return {
        name: np.array([case.targets[name] for case in source.cases], np.float64) for name in names
    }
