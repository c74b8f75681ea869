from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold, cross_validate
from sksurv.metrics import concordance_index_censored
from sksurv.util import Surv

from bagscope.errors import ConfigError
from bagscope.mil.recipe import TrainSpec
from bagscope.pipeline.estimators import MILClassifier, MILRegressor, MILSurvival
from tests.mil.made_bags import made_bags
from tests.mil.stored_bags import store_slides

PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"
SMALL: dict[str, Any] = {
    "hidden": 8,
    "epochs": 2,
    "lr": 3e-3,
    "options": {"aggregator": {"options": {"attention": 4}}, "bags": {"bags_per_step": 4}},
}
BAGS, LABELS = made_bags(24, seed=0)
Y = np.array(["no", "yes"])[LABELS]
GROUPS = np.arange(24) // 4 * 2 + np.arange(24) % 2


def fitted(**options: Any) -> MILClassifier:
    return MILClassifier(**{**SMALL, **options}).fit(BAGS, Y, groups=GROUPS)


def test_it_learns_and_answers_in_the_classes_of_y() -> None:
    model = fitted(epochs=30, lr=2e-2, dropout=0.0)
    assert model.classes_.tolist() == ["no", "yes"]
    p = model.predict_proba(BAGS)
    assert p.shape == (24, 2)
    np.testing.assert_allclose(p.sum(1), 1)
    assert (model.predict(BAGS) == np.where(p[:, 1] > 0.5, "yes", "no")).all()
    assert ((model.decision_function(BAGS) > 0) == (p[:, 1] > 0.5)).all()
    assert model.score(BAGS, Y) == (model.predict(BAGS) == Y).mean() > 0.85
    assert model.n_features_in_ == 6


def test_the_seed_decides_and_the_caller_s_state_is_left_alone() -> None:
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    np.random.seed(5)  # noqa: NPY002 - the very state that must not change
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]  # noqa: NPY002
    one = fitted()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]  # noqa: NPY002
    torch.manual_seed(6)
    np.testing.assert_array_equal(one.predict_proba(BAGS), fitted().predict_proba(BAGS))
    assert not np.array_equal(one.predict_proba(BAGS), fitted(seed=1).predict_proba(BAGS))


def test_the_inner_part_is_carved_by_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    from bagscope.pipeline import estimators

    seen: list[Any] = []

    class Watched(estimators.Trainer):
        def __init__(self, recipe: Any, targets: Any, train: Any, inner: Any, **more: Any) -> None:
            seen.append((train, inner))
            super().__init__(recipe, targets, train, inner, **more)

    monkeypatch.setattr(estimators, "Trainer", Watched)
    fitted(epochs=1)
    ((train, inner),) = seen
    sides = [{case.patient_id for case in side.cases} for side in (train, inner)]
    assert not sides[0] & sides[1]
    assert len(train.cases) + len(inner.cases) == 24
    assert 2 <= len(sides[1]) <= 4
    assert {case.targets["y"] for case in inner.cases} == {(0.0,), (1.0,)}
    MILClassifier(**SMALL, val_share=0.0).fit(BAGS, Y)
    assert seen[-1][1] is None


def test_it_copies_as_scikit_learn_s_do() -> None:
    model = MILClassifier(**SMALL, seed=3)
    assert model.get_params()["lr"] == 3e-3
    other = clone(model).set_params(lr=0.5, recipe=TrainSpec())
    assert (other.lr, other.seed, model.lr) == (0.5, 3, 3e-3)
    with pytest.raises(ValueError, match="learning_rate"):
        model.set_params(learning_rate=1.0)


def test_pickled_it_answers_alike() -> None:
    model = fitted()
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(model.predict_proba(BAGS), again.predict_proba(BAGS))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_it_is_cross_validated_by_patient_in_several_processes() -> None:
    options: dict[str, Any] = {
        "groups": GROUPS,
        "params": {"groups": GROUPS},
        "cv": GroupKFold(3),
        "scoring": ["roc_auc", "accuracy"],
        "error_score": "raise",
    }
    alone = cross_validate(MILClassifier(**SMALL), BAGS, Y, **options)
    assert alone["test_roc_auc"].shape == (3,)
    together = cross_validate(MILClassifier(**SMALL), BAGS, Y, n_jobs=2, **options)
    for name in ("test_roc_auc", "test_accuracy"):
        np.testing.assert_array_equal(alone[name], together[name])


def test_a_grid_is_searched() -> None:
    search = GridSearchCV(
        MILClassifier(**SMALL),
        {"lr": [1e-3, 1e-2], "hidden": [4, 8]},
        cv=StratifiedGroupKFold(2),
        scoring="neg_log_loss",
        error_score="raise",
    )
    search.fit(BAGS, Y, groups=GROUPS)
    assert len(search.cv_results_["params"]) == 4
    assert search.best_estimator_.member_.recipe.optimiser.lr == search.best_params_["lr"]
    options = search.best_estimator_.member_.recipe.aggregator.options
    assert options["hidden"] == search.best_params_["hidden"]


def test_numbers_are_predicted_in_their_own_units() -> None:
    y = 1000.0 + 50.0 * np.array(LABELS)
    model = MILRegressor(**{**SMALL, "epochs": 25, "lr": 2e-2, "dropout": 0.0}).fit(BAGS, y)
    assert model.predict(BAGS).shape == (24,)
    assert model.score(BAGS, y) > 0.4


def test_survival_takes_what_scikit_survival_has() -> None:
    generator = np.random.default_rng(0)
    time = np.where(LABELS, 10.0, 100.0) + generator.random(24)
    event = generator.random(24) < 0.8
    structured = Surv.from_arrays(event, time)
    options = {**SMALL, "epochs": 25, "lr": 2e-2, "dropout": 0.0}
    model = MILSurvival(**options).fit(BAGS, structured, groups=GROUPS)
    plain = MILSurvival(**options).fit(BAGS, np.stack([event, time], axis=1), groups=GROUPS)
    risk = model.predict(BAGS)
    np.testing.assert_array_equal(risk, plain.predict(BAGS))
    expected = concordance_index_censored(event, time, risk)[0]
    assert model.score(BAGS, structured) == pytest.approx(expected)
    assert expected > 0.65
    found = cross_validate(MILSurvival(**SMALL), BAGS, structured, cv=2, error_score="raise")
    assert found["test_score"].shape == (2,)


def test_slide_ids_are_read_from_a_store(tmp_path: Path) -> None:
    counts = {f"s{i:02d}": 2 + i % 3 for i in range(12)}
    store = store_slides(tmp_path, counts)
    ids, y = list(counts), np.arange(12) % 2
    by_id = MILClassifier(**SMALL, store=tmp_path).fit(ids, y)
    bags = [np.array(store.bag(name).features) for name in ids]
    by_array = MILClassifier(**SMALL).fit(bags, y)
    np.testing.assert_array_equal(by_id.predict_proba(ids), by_array.predict_proba(bags))
    one = by_id.predict_proba(ids[3:4])
    np.testing.assert_allclose(one, by_id.predict_proba(ids)[3:4], rtol=1e-3)


def test_what_can_not_be_learnt_from_is_refused() -> None:
    with pytest.raises(ValueError, match="y has 1 class"):
        MILClassifier(**SMALL).fit(BAGS, np.zeros(24))
    with pytest.raises(ValueError, match="24 bags and 3 labels"):
        MILClassifier(**SMALL).fit(BAGS, [0, 1, 0])
    with pytest.raises(ValueError, match="24 bags and 3 groups"):
        MILClassifier(**SMALL).fit(BAGS, Y, groups=[0, 1, 0])
    with pytest.raises(ValueError, match=r"missing.* 24 of 24 bags"):
        MILRegressor(**SMALL).fit(BAGS, np.full(24, np.nan))
    for none in (np.nan, None):
        labels = [none if i in (5, 7) else label for i, label in enumerate(Y.tolist())]
        with pytest.raises(ValueError, match=r"missing.* 2 of 24 bags \(5, 7\)"):
            MILClassifier(**SMALL).fit(BAGS, labels)
    for place in range(20, 24):  # whether it is learnt from or held out
        narrow = [bag[:, :2] if i == place else bag for i, bag in enumerate(BAGS)]
        with pytest.raises(ValueError, match=f"bag {place} is"):
            MILClassifier(**SMALL).fit(narrow, Y)
    with pytest.raises(ValueError, match="none of the 24 bags has an event"):
        MILSurvival(**SMALL).fit(BAGS, np.stack([np.zeros(24), np.arange(24)], axis=1))
    with pytest.raises(ValueError, match="event comes first"):
        MILSurvival(**SMALL).fit(BAGS, np.stack([np.arange(24), np.ones(24)], axis=1))
    with pytest.raises(ValueError, match="structured array"):
        MILSurvival(**SMALL).fit(BAGS, np.arange(24))
    with pytest.raises(ValueError, match="val_share"):
        MILClassifier(**SMALL, val_share=1.0).fit(BAGS, Y)
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        MILClassifier(options={"training": {"epoch": 3}}).fit(BAGS, Y)


@pytest.mark.slow
def test_the_page_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    assert 0 <= names["found"]["test_score"].mean() <= 1
    assert names["search"].best_params_["lr"] in (1e-3, 1e-2)
    assert names["risk"].shape == (40,)
