from __future__ import annotations

import csv
import dataclasses
import gc
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagscope import artifacts
from bagscope.errors import ArtifactError, ConfigError, FingerprintMismatch
from bagscope.mil.sources import ArraySource
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.state import STATE_NAME
from bagscope.mil.training.trainer import Trained, Trainer, TrainingError
from tests.mil.made_bags import TARGET, made_recipe, made_source


def trained(recipe: Any = None, **options: Any) -> Trained:
    return Trainer(
        recipe or made_recipe(),
        [TARGET],
        made_source(24, seed=1, name="t"),
        made_source(12, seed=2, name="v"),
        **{"seed": 0, **options},
    ).run()


def same(one: Trained, other: Trained) -> bool:
    return all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_the_seed_decides_every_bit() -> None:
    assert same(trained(), trained())
    assert not same(trained(), trained(seed=1))


def test_memory_changes_no_result_beyond_rounding() -> None:
    # Without dropout: its draws belong to batches.
    still = {"aggregator": {"options": {"dropout": 0.0}}}
    packed = trained(made_recipe(**still))
    cut = trained(made_recipe(**still, bags={"batch_tiles": 1}))
    for name, weight in packed.weights.items():
        # The additive bias of attention learns from rounding alone (its gradient is zero).
        if weight.numel() > 1:
            torch.testing.assert_close(weight, cut.weights[name], rtol=1e-3, atol=1e-4)


def test_what_is_not_kept_for_the_way_back_changes_no_bit() -> None:
    weights = []
    for keep_mib in (0, 1024):
        recipe = made_recipe(training={"keep_mib": keep_mib, "epochs": 2})
        weights.append(Trainer(recipe, [TARGET], made_source(8), None, seed=0).run().weights)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_it_learns_a_planted_signal() -> None:
    from sklearn.metrics import roc_auc_score

    found = trained(made_recipe(training={"epochs": 25}, optimiser={"lr": 2e-2}))
    assert found.inner_logits is not None
    labels = np.arange(12) % 2
    assert roc_auc_score(labels, found.inner_logits[:, 1] - found.inner_logits[:, 0]) > 0.85
    assert found.history[-1].losses["bag"] < found.history[0].losses["bag"]


def test_the_best_epoch_is_kept_and_training_stops_after_patience() -> None:
    recipe = made_recipe(
        optimiser={"lr": 0.5}, training={"epochs": 60, "patience": 3, "min_epochs": 2}
    )
    found = trained(recipe)
    losses = [epoch.validation_loss for epoch in found.history]
    assert found.epoch == 1 + int(np.argmin(losses))
    assert len(losses) == max(2, found.epoch + 3) < 60
    assert found.inner_logits is not None
    # What is reported of the inner part is that of the kept weights, not of the last ones.
    source = made_source(12, seed=2, name="v")
    labels = torch.tensor([case.targets["label"] for case in source.cases])
    loss = found.objective.validation_loss(torch.from_numpy(found.inner_logits), {"label": labels})
    assert loss == pytest.approx(min(losses), rel=1e-6)


def test_last_and_averaged_are_what_they_say() -> None:
    runs = {
        epochs: trained(
            made_recipe(
                training={"epochs": epochs, "checkpoint": "last"},
                optimiser={"schedule": "constant"},
            )
        )
        for epochs in (2, 3, 4)
    }
    averaged = trained(
        made_recipe(
            training={"epochs": 4, "checkpoint": "averaged", "average_epochs": 3},
            optimiser={"schedule": "constant"},
        )
    )
    for name, weight in averaged.weights.items():
        mean = sum(run.weights[name].double() for run in runs.values()) / 3
        torch.testing.assert_close(weight.double(), mean, rtol=1e-5, atol=1e-7)


def test_the_running_mean_of_weights_is_what_is_validated_and_kept() -> None:
    found = trained(made_recipe(training={"ema_decay": 0.9, "checkpoint": "last"}))
    plain = trained(made_recipe(training={"checkpoint": "last"}))
    assert not same(found, plain)
    assert found.history[-1].losses["bag"] == plain.history[-1].losses["bag"]
    assert found.history[-1].validation_loss != plain.history[-1].validation_loss


@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"training": {"ema_decay": 0.9, "patience": 2, "epochs": 6}},
        {"training": {"checkpoint": "averaged", "average_epochs": 2}},
        {"optimiser": {"name": "sgd", "schedule": "plateau", "plateau_patience": 1, "lr": 0.3}},
        {"optimiser": {"name": "radam", "warmup_epochs": 1.5, "clip_norm": 0.1}},
        {"bags": {"sample_tiles": 3, "noise": 0.1, "feature_dropout": 0.1, "balanced": True}},
    ],
    ids=["plain", "ema", "averaged", "plateau", "warmup", "sampled"],
)
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path, blocks: dict[str, Any]) -> None:
    class Killed(BaseException):
        pass

    def kill(epoch: Any) -> None:
        if epoch.number == 2:
            raise Killed

    recipe = made_recipe(**blocks)
    whole = trained(recipe)
    with pytest.raises(Killed):
        trained(recipe, folder=tmp_path, fingerprint="f", on_epoch=kill)
    torch.manual_seed(12345)  # another process starts anywhere
    went_on = trained(recipe, folder=tmp_path, fingerprint="f")
    assert same(whole, went_on)
    assert [e.losses for e in whole.history] == [e.losses for e in went_on.history]
    with (tmp_path / "metrics.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(whole.history) + 1))
    assert float(rows[-1]["loss_total"]) == pytest.approx(whole.history[-1].losses["total"])


def test_a_state_of_another_training_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    trained(folder=tmp_path, fingerprint="f")
    with pytest.raises(FingerprintMismatch, match="other options"):
        trained(folder=tmp_path, fingerprint="g")
    artifacts.write_bytes(tmp_path / STATE_NAME, b"no state")
    with pytest.raises(ArtifactError, match=r"state\.pt"):
        trained(folder=tmp_path, fingerprint="f")


def test_features_that_are_no_numbers_are_said_with_their_case() -> None:
    source = made_source(8, seed=1)
    source.read(3).features[0] = np.inf
    with pytest.raises(ArtifactError, match="c003: 1 of"):
        Trainer(made_recipe(), [TARGET], source, None, seed=0)


def test_a_loss_that_is_no_number_is_said_with_its_bags() -> None:
    recipe = made_recipe(optimiser={"name": "sgd", "lr": 1e30, "schedule": "constant"})
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) in epoch \d+ on bags c\d"):
        Trainer(recipe, [TARGET], made_source(24, seed=1), None, seed=0).run()


def test_without_an_inner_part_all_epochs_are_trained_and_the_last_kept() -> None:
    recipe = made_recipe(training={"patience": 1})
    found = Trainer(recipe, [TARGET], made_source(8, seed=1), None, seed=0).run()
    assert found.epoch == len(found.history) == 4
    assert found.inner_logits is None
    assert math.isnan(found.history[-1].validation_loss)


def test_a_plateau_is_repeated_where_there_is_nothing_to_watch(tmp_path: Path) -> None:
    recipe = made_recipe(optimiser={"schedule": "plateau"})
    left = (1.0, 1.0, 0.5, 0.25)
    how: dict[str, Any] = {"seed": 0, "stop_after": 4, "plateau": left}
    whole = Trainer(recipe, [TARGET], made_source(8), None, **how).run()
    assert [epoch.lr for epoch in whole.history] == [recipe.optimiser.lr * one for one in left]
    # Another process goes on at the rate of the epoch that it comes to.
    first = Trainer(
        recipe, [TARGET], made_source(8), None, folder=tmp_path, **{**how, "stop_after": 2}
    )
    first.run()
    again = Trainer(recipe, [TARGET], made_source(8), None, folder=tmp_path, **how).run()
    assert [epoch.lr for epoch in again.history] == [epoch.lr for epoch in whole.history]
    for name, weight in whole.weights.items():
        assert torch.equal(weight, again.weights[name])


def test_an_inner_part_that_defines_no_metric_chooses_nothing() -> None:
    source = made_source(12, seed=2, name="v")
    of_one_class = ArraySource(
        [source.read(place).features for place in range(0, 12, 2)], source.cases[::2]
    )
    recipe = made_recipe(training={"monitor": "metric", "patience": 1, "min_epochs": 1})
    found = Trainer(recipe, [TARGET], made_source(24, seed=1), of_one_class, seed=0).run()
    assert math.isnan(found.history[0].metric)
    assert found.epoch == len(found.history) == 4


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="float16"):
        trained(made_recipe(training={"precision": "float16"}))
    with pytest.raises(ConfigError, match="nodropout"):
        trained(made_recipe(aggregator={"options": {"nodropout": True}}))


def reachable(root: Any) -> list[Any]:
    """Return every object that can be come to from another one, classes and modules left out."""
    seen: dict[int, Any] = {}
    queue = [root]
    while queue:
        found = queue.pop()
        if id(found) in seen or isinstance(found, type | types.ModuleType):
            continue
        seen[id(found)] = found
        if isinstance(found, types.FunctionType):
            # Its globals are a module's; what it closes over is its own.
            queue += [cell.cell_contents for cell in found.__closure__ or ()]
        else:
            queue += gc.get_referents(found)
    return list(seen.values())


def test_the_walk_finds_what_is_there() -> None:
    train = made_source(4, name="train")
    trainer = Trainer(made_recipe(), [TARGET], train, None, seed=0)
    found = reachable(trainer)
    assert any(one is train.cases[0] for one in found)
    hidden = made_source(2, name="hidden")
    trainer.on_the_side = lambda: hidden  # type: ignore[attr-defined]
    assert any(one is hidden.cases[0] for one in reachable(trainer))


def test_no_test_case_can_be_reached_from_a_trainer(tmp_path: Path) -> None:
    from bagscope.pipeline.study import open_study
    from bagscope.pipeline.train import TrainRequest, plan_training
    from bagscope.pipeline.train_worker import source_of
    from tests.mil.made_bags import made_study

    folder, features = made_study(tmp_path)
    label = TargetSpec(column="label")
    study = open_study(folder)
    planned = plan_training(study, TrainRequest(targets=(label,), features=str(features)))
    for name, task in planned.members.items():
        held_out = {case.case_id for case in planned.tests[name].cases}
        assert held_out
        train, inner = (source_of(task.location, cases) for cases in (task.train, task.inner))
        trainer = Trainer(made_recipe(), task.targets, train, inner, seed=0)
        for root in (trainer, task):
            texts = {one for one in reachable(root) if isinstance(one, str)}
            paths = {str(one) for one in reachable(root) if isinstance(one, Path)}
            known = {case.case_id for case in (*task.train, *task.inner)}
            assert known <= texts  # so the walk is not blind
            assert not held_out & texts
            assert not [path for path in paths | texts if Path(path).stem in held_out]


def test_products_in_bfloat16_come_close_to_those_in_float32() -> None:
    still = {"aggregator": {"options": {"dropout": 0.0}}}
    exact = trained(made_recipe(**still))
    coarse = trained(made_recipe(**still, training={"precision": "bfloat16"}))
    assert all(weight.dtype == torch.float32 for weight in coarse.weights.values())
    assert not same(exact, coarse)
    assert exact.inner_logits is not None
    assert coarse.inner_logits is not None
    spread = np.abs(exact.inner_logits).max()
    assert np.abs(exact.inner_logits - coarse.inner_logits).max() < 0.05 * spread


def test_the_reward_of_entropy_knows_the_length_of_each_bag() -> None:
    runs = [
        trained(
            made_recipe(
                training={"epochs": 1},
                objective={"entropy": {"weight": 0.5, "per_log_n": per_log_n}},
            )
        )
        for per_log_n in (False, True)
    ]
    plain, per_length = (run.history[0].losses["entropy"] for run in runs)
    assert plain < 0
    # Over log N, no bag's is below -1.
    assert -1 <= per_length < 0
    assert plain < per_length


def test_cox_of_one_bag_at_a_time_is_refused_and_of_several_learns() -> None:
    survival = TargetSpec(column="os", task="survival", time="months", event="dead")
    plain = made_source(12, seed=1)
    source = ArraySource(
        [plain.read(place).features for place in range(12)],
        [
            dataclasses.replace(case, targets={"os": (float(place + 1), 1.0)})
            for place, case in enumerate(plain.cases)
        ],
    )

    def losses(bags_per_step: int) -> list[float]:
        recipe = made_recipe(objective={"survival": "cox"}, bags={"bags_per_step": bags_per_step})
        run = Trainer(recipe, [survival], source, None, seed=0).run()
        return [epoch.losses["bag"] for epoch in run.history]

    with pytest.raises(ConfigError, match=r"bags_per_step is 1, .* set it to 16 or more"):
        losses(1)
    several = losses(6)
    assert several[-1] < several[0]


def test_cutting_a_step_changes_nothing_where_labels_are_missing() -> None:
    targets = [TARGET, TargetSpec(column="age", task="regression")]
    plain = made_source(16, seed=1)
    cases = [
        dataclasses.replace(
            case,
            targets={
                "label": case.targets["label"] if place % 3 else (math.nan,),
                "age": (float(place),) if place % 4 == 0 else (math.nan,),
            },
        )
        for place, case in enumerate(plain.cases)
    ]
    source = ArraySource([plain.read(place).features for place in range(16)], cases)

    def run(batch_tiles: int) -> Trained:
        recipe = made_recipe(
            aggregator={"options": {"dropout": 0.0}},
            optimiser={"name": "sgd", "lr": 1e-2, "schedule": "constant"},
            bags={"bags_per_step": 8, "batch_tiles": batch_tiles},
        )
        return Trainer(recipe, targets, source, None, seed=0).run()

    whole, cut = run(10_000), run(1)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(weight, cut.weights[name], rtol=1e-4, atol=1e-6)
    for one, other in zip(whole.history, cut.history, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)


def test_a_case_that_is_drawn_again_in_an_epoch_shows_other_tiles() -> None:
    plain = made_source(10, seed=1)
    few = [0, 2, 4, 6, 8, 1]  # five of one class, one of the other
    bags = [np.random.default_rng(place).normal(size=(40, 6)).astype(np.float32) for place in few]
    asked: dict[int, list[tuple[int, ...]]] = {}

    class Watched(ArraySource):
        def read(self, place: int, rows: Any = None) -> Any:
            if rows is not None:
                asked.setdefault(place, []).append(tuple(rows))
            return super().read(place, rows)

    source = Watched(bags, [plain.cases[place] for place in few])
    recipe = made_recipe(
        training={"epochs": 3}, bags={"balanced": True, "sample_tiles": 10, "bags_per_step": 3}
    )
    Trainer(recipe, [TARGET], source, None, seed=0).run()
    assert len(asked[5]) > 4
    assert len(set(asked[5])) == len(asked[5])


def test_killed_after_the_last_state_the_last_epoch_still_comes_into_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    states: list[str] = []

    def kill(name: str) -> None:
        states.append(name)
        if states.count("state-written") == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "step", kill)
        with pytest.raises(Killed):
            trained(folder=tmp_path, fingerprint="f")
    trained(folder=tmp_path, fingerprint="f")
    with (tmp_path / "metrics.csv").open() as handle:
        assert [row["epoch"] for row in csv.DictReader(handle)] == ["1", "2", "3", "4"]


def test_a_state_of_another_device_is_refused(tmp_path: Path) -> None:
    trained(folder=tmp_path, fingerprint="f")
    path = tmp_path / STATE_NAME
    state = torch.load(path, weights_only=True)
    assert state["device"] == "cpu"
    state["device"] = "cuda"
    torch.save(state, path)
    with pytest.raises(ConfigError, match=r"on cuda, and this one is on cpu.* --device cuda"):
        trained(folder=tmp_path, fingerprint="f")
