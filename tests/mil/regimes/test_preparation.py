"""A training that a regime needs first: on the same bags, taken up after a kill, and how long."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bagscope.errors import FingerprintMismatch
from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes import registry
from bagscope.mil.regimes.mhim import MHIM
from bagscope.mil.regimes.regime import Preparation, Regime
from bagscope.mil.regimes.registry import without_regime
from bagscope.mil.sources import ArraySource, BagSource
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training import trainer as trainer_module
from bagscope.mil.training.history import Epoch
from bagscope.mil.training.state import METRICS_NAME, PREPARATION_NAME
from bagscope.mil.training.trainer import Trained, Trainer
from tests.mil.made_bags import TARGET, made_recipe, made_source, made_study
from tests.mil.training.test_trainer import reachable

MASKS = {"masks": {"high": 0.2, "random": 0.3, "high_schedule": "cosine"}, "momentum": 0.9}


class Killed(BaseException):
    pass


def recipe_of(options: dict[str, Any] | None = None, **blocks: Any) -> TrainSpec:
    return made_recipe(regime={"name": "mhim", "options": options or MASKS}, **blocks)


def trained(recipe: TrainSpec, **options: Any) -> Trained:
    return Trainer(
        recipe,
        [TARGET],
        made_source(24, seed=1, name="t"),
        made_source(12, seed=2, name="v"),
        **{"seed": 0, **options},
    ).run()


def kill_at(number: int) -> Callable[[Epoch], None]:
    def told(epoch: Epoch) -> None:
        if epoch.number == number:
            raise Killed

    return told


def same(one: Trained, other: Trained) -> bool:
    assert one.weights.keys() == other.weights.keys()
    return all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


@pytest.mark.parametrize(
    "blocks",
    [{}, {"optimiser": {"lr": 0.5}, "training": {"epochs": 30, "patience": 2}}],
    ids=["whole", "stopped-early"],
)
@pytest.mark.parametrize("when", ["in the preparation", "between", "in the main training"])
def test_a_killed_training_goes_on_to_the_same_bits(
    when: str, blocks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(**blocks)
    whole = trained(recipe)
    how: dict[str, Any] = {"folder": tmp_path, "fingerprint": "f"}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if when == "in the preparation":
            how["on_preparing"] = kill_at(2)
        elif when == "between":
            patch.setattr(MHIM, "prepared", lambda *_: (_ for _ in ()).throw(Killed))
        else:
            how["on_epoch"] = kill_at(2)
        trained(recipe, **how)
    torch.manual_seed(12345)  # another process starts anywhere
    before: list[int] = []
    how = {**how, "on_preparing": lambda epoch: before.append(epoch.number)}
    went_on = trained(recipe, **{**how, "on_epoch": lambda _: None})
    assert same(whole, went_on)
    assert [epoch.losses for epoch in whole.history] == [epoch.losses for epoch in went_on.history]
    # What was done before the kill is not done again.
    assert (3 in before) == (when == "in the preparation")
    assert 1 not in before and 2 not in before


def test_what_comes_first_is_the_plain_training_of_the_same_bags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of()
    found: list[dict[str, torch.Tensor]] = []
    take = MHIM.prepared

    def prepared(self: MHIM, first: Aggregator) -> None:
        assert isinstance(first, MHIM)
        found.append({n: w.clone() for n, w in first.inner.aggregator.state_dict().items()})
        take(self, first)
        assert all(
            torch.equal(weight, found[0][name])
            for name, weight in self.teacher.aggregator.state_dict().items()
        )

    monkeypatch.setattr(MHIM, "prepared", prepared)
    trained(recipe, folder=tmp_path)
    plain = trained(without_regime(recipe))
    assert found[0].keys() == plain.weights.keys()
    assert all(torch.equal(found[0][name], weight) for name, weight in plain.weights.items())
    with (tmp_path / PREPARATION_NAME / METRICS_NAME).open() as handle:
        losses = [float(row["loss_total"]) for row in csv.DictReader(handle)]
    assert losses == pytest.approx([epoch.losses["total"] for epoch in plain.history])


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(recipe_of(), folder=tmp_path, fingerprint="f", on_preparing=kill_at(1))
    with pytest.raises(FingerprintMismatch, match=PREPARATION_NAME):
        trained(recipe_of(), folder=tmp_path, fingerprint="g")


def told_of(recipe: TrainSpec, **options: Any) -> tuple[list[Epoch], Trained]:
    first: list[Epoch] = []
    source = made_source(24, seed=1, name="t")
    run = Trainer(recipe, [TARGET], source, None, seed=0, on_preparing=first.append, **options)
    return first, run.run()


def test_the_final_model_is_prepared_as_long_and_at_the_same_rates() -> None:
    recipe = recipe_of(optimiser={"schedule": "plateau"}, training={"epochs": 9})
    left = (1.0, 0.5, 0.25)
    first, main = told_of(recipe, stop_after=3, plateau=left)
    wanted = [recipe.optimiser.lr * share for share in left]
    assert [epoch.lr for epoch in first] == [epoch.lr for epoch in main.history] == wanted
    assert main.epoch == 3
    # The plain training of the members was no longer than this.
    short = recipe_of({**MASKS, "warm_epochs": 2}, optimiser={"schedule": "plateau"})
    first, main = told_of(short, stop_after=3, plateau=left)
    assert len(first) == 2 and len(main.history) == 3
    none = recipe_of({**MASKS, "warm_epochs": 0})
    first, main = told_of(none, stop_after=3)
    assert len(first) == 0 and len(main.history) == 3


def test_its_learning_rate_runs_over_its_own_epochs() -> None:
    first, main = told_of(recipe_of({**MASKS, "warm_epochs": 2}))
    rates = [epoch.lr for epoch in first]
    assert len(rates) == 2 and len(main.history) == 4
    # At the end of a cosine hardly anything is left, here as there.
    assert rates[-1] < 0.1 * rates[0] and main.history[-1].lr < 0.1 * main.history[0].lr


def test_it_may_see_other_sides_of_the_same_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    train, inner = made_source(12, seed=1, name="t"), made_source(6, seed=2, name="v")
    seen: list[BagSource] = []

    def first_tiles(source: BagSource) -> BagSource:
        seen.append(source)
        places = range(len(source.cases))
        return ArraySource([source.read(place).features[:1] for place in places], source.cases)

    class Looking(MHIM):
        def preparation(self, recipe: TrainSpec) -> Preparation | None:
            found = super().preparation(recipe)
            return None if found is None else replace(found, seen=first_tiles)

    entry = registry.regime_entry("mhim")
    monkeypatch.setitem(registry._ENTRIES, "mhim", replace(entry, kind=Looking))
    tiles: list[int] = []
    Trainer(
        recipe_of(),
        [TARGET],
        train,
        inner,
        seed=0,
        on_preparing=lambda epoch: tiles.append(epoch.tiles),
    ).run()
    assert seen == [train, inner]
    assert tiles == [12] * 4


def test_no_test_case_can_be_reached_from_either_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bagscope.pipeline.study import open_study
    from bagscope.pipeline.train import TrainRequest, plan_training
    from bagscope.pipeline.train_worker import source_of

    folder, features = made_study(tmp_path)
    study = open_study(folder)
    request = TrainRequest(targets=(TargetSpec(column="label"),), features=str(features))
    name, task = next(iter(plan_training(study, request).members.items()))
    held_out = {case.case_id for case in plan_training(study, request).tests[name].cases}
    assert held_out
    made: list[Trainer] = []

    class Watched(Trainer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(trainer_module, "Trainer", Watched)
    train, inner = (source_of(task.location, cases) for cases in (task.train, task.inner))
    recipe = recipe_of(training={"epochs": 1})
    Watched(recipe, task.targets, train, inner, seed=0, folder=tmp_path / "run").run()
    assert len(made) == 2
    assert made[1].recipe.regime != recipe.regime and isinstance(made[0].model, Regime)
    known = {case.case_id for case in (*task.train, *task.inner)}
    for root in made:
        texts = {one for one in reachable(root) if isinstance(one, str)}
        paths = {str(one) for one in reachable(root) if isinstance(one, Path)}
        assert known <= texts  # so the walk is not blind
        assert not held_out & texts
        assert not [path for path in paths | texts if Path(path).stem in held_out]
