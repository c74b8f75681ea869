"""Members together: means by hand, scores on one scale, and the file that keeps them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from bagscope import artifacts
from bagscope.errors import ArtifactError, SchemaError
from bagscope.mil.cases import Case
from bagscope.mil.member import Member
from bagscope.mil.objectives.objective import build_objective
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.prediction import (
    Panel,
    combine,
    mean_scores,
    ood_columns,
    prediction_columns,
    score_names,
)
from bagscope.mil.score_file import (
    ScoreFile,
    read_score_file,
    score_file_faults,
    write_score_file,
)
from bagscope.mil.sources import ArraySource
from bagscope.mil.statistics import FeatureStatistics
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.trainer import Trainer
from tests.mil.made_bags import TARGET, made_recipe, made_source

NOTHING = np.zeros(1)
GRADE = TargetSpec(column="grade", task="ordinal", classes=("1", "2", "3"))
SIZE = TargetSpec(column="size", task="regression")
TIME = TargetSpec(task="survival", time="t", event="e")


def member_of(
    targets: tuple[TargetSpec, ...], labels: dict[str, np.ndarray], **changes: object
) -> Member:
    """Return a member of which only the objective, temperature and threshold matter."""
    objective = build_objective(targets, ObjectiveSpec()).fit(labels)
    member = Member(
        recipe=made_recipe(),
        targets=tuple(objective.targets),
        objective=objective,
        weights={},
        statistics=FeatureStatistics(mean=NOTHING, std=NOTHING, bag_mean=NOTHING, bag_std=NOTHING),
    )
    return replace(member, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def members() -> list[Member]:
    found = []
    for seed in range(3):
        train = made_source(12, seed=seed, name="t")
        trained = Trainer(made_recipe(), [TARGET], train, None, seed=seed).run()
        found.append(finish(trained, made_recipe(), None, seed=seed, fields={}))
    return found


# --- combine --------------------------------------------------------------------------------


def test_the_ensemble_is_the_mean_of_calibrated_probabilities() -> None:
    labels = {"label": np.array([[0.0], [1.0]])}
    members = [
        member_of((TARGET,), labels, temperatures={"label": t}, thresholds={"label": h})
        for t, h in ((1.0, 0.2), (2.0, 0.5), (0.5, 0.8))
    ]
    logits = np.random.default_rng(0).normal(size=(3, 5, 2)) * 3
    found = combine(members, logits)
    by_hand = np.zeros((3, 5, 2))
    for m, temperature in enumerate((1.0, 2.0, 0.5)):
        for row in range(5):
            powers = [math.exp(value / temperature) for value in logits[m, row]]
            by_hand[m, row] = [power / sum(powers) for power in powers]
    np.testing.assert_allclose(found.values["label"], by_hand.sum(axis=0) / 3, rtol=1e-12)
    apart = np.sqrt(((by_hand - by_hand.mean(axis=0)) ** 2).sum(axis=0) / 2)
    np.testing.assert_allclose(found.spread["label"], apart, rtol=1e-9)
    assert found.thresholds["label"] == pytest.approx(0.5)
    alone = combine(members[:1], logits[:1])
    np.testing.assert_allclose(alone.values["label"], by_hand[0], rtol=1e-12)
    assert np.isnan(alone.spread["label"]).all()


def test_several_tasks_side_by_side() -> None:
    generator = np.random.default_rng(1)
    targets = (GRADE, SIZE)
    labels = {"grade": np.array([[0.0], [1.0], [2.0]]), "size": np.array([[1.0], [3.0], [8.0]])}
    members = [member_of(targets, labels) for _ in range(2)]
    logits = generator.normal(size=(2, 4, members[0].objective.outputs))
    found = combine(members, logits)
    one, other = (m.predictions(rows) for m, rows in zip(members, logits, strict=True))
    np.testing.assert_allclose(found.values["size"], (one["size"] + other["size"]) / 2)
    np.testing.assert_allclose(
        found.spread["size"], np.abs(one["size"] - other["size"]) / math.sqrt(2)
    )
    np.testing.assert_allclose(found.values["grade"], (one["grade"] + other["grade"]) / 2)
    cases = [
        Case(case_id=str(i), patient_id="p", slide_ids=("s",), targets={"size": (2.0,)})
        for i in range(4)
    ]
    table = prediction_columns(targets, cases, found)
    assert list(table) == [
        "grade", "grade_predicted", "grade_p_1", "grade_p_2", "grade_p_3",
        "grade_sd_1", "grade_sd_2", "grade_sd_3", "size", "size_predicted", "size_sd",
    ]  # fmt: skip
    assert table["grade"] == [""] * 4
    assert table["size"] == ["2"] * 4


def test_of_survival_only_what_all_members_say_is_joined() -> None:
    generator = np.random.default_rng(2)
    members = []
    for longest in (10.0, 10.0, 40.0):
        times = np.linspace(1.0, longest, 20)
        members.append(member_of((TIME,), {"survival": np.c_[times, np.ones(20)]}))
    logits = generator.normal(size=(3, 4, members[0].objective.outputs))
    alike = combine(members[:2], logits[:2])
    assert alike.columns["survival"] == members[0].objective.columns["survival"]
    found = combine(members, logits)
    assert found.columns["survival"][0] == "risk"
    assert len(found.columns["survival"]) < len(alike.columns["survival"])
    risks = [m.predictions(rows)["survival"][:, 0] for m, rows in zip(members, logits, strict=True)]
    np.testing.assert_allclose(found.values["survival"][:, 0], np.mean(risks, axis=0))


def test_the_flag_is_of_the_mean_distance_and_empty_where_unknown() -> None:
    columns = ood_columns(np.array([[0.5, 1.5, np.nan], [0.9, 0.9, np.nan]]))
    assert columns == {"ood_distance": ["0.7", "1.2", ""], "ood": ["0", "1", ""]}


# --- scores ---------------------------------------------------------------------------------


def test_log_weights_are_averaged_as_weights_whatever_constant_a_member_adds() -> None:
    generator = np.random.default_rng(3)
    one, other = generator.normal(size=(2, 7, 2)) * 4
    found = mean_scores([one, other + 100.0], "log_weight")
    weights = [np.exp(s) / np.exp(s).sum(axis=0) for s in (one, other)]
    np.testing.assert_allclose(np.exp(found), (weights[0] + weights[1]) / 2, rtol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(axis=0), 1.0, rtol=1e-5)
    logits = mean_scores([one, other], "instance_logit")
    np.testing.assert_allclose(logits, (one + other) / 2, rtol=1e-6, atol=1e-6)


def test_members_that_were_tuned_apart_still_answer_together(members: list[Member]) -> None:
    recipe = made_recipe(aggregator={"options": {"hidden": 5}})
    trained = Trainer(recipe, [TARGET], made_source(12, name="t"), None, seed=0).run()
    narrow = finish(trained, recipe, None, seed=0, fields={})
    source = made_source(1, seed=8)
    answer = Panel([members[0], narrow]).ask(source)
    np.testing.assert_array_equal(answer.embedding[0], members[0].infer(source).embedding[0])
    np.testing.assert_array_equal(answer.embedding[1, :5], narrow.infer(source).embedding[0])
    assert np.isnan(answer.embedding[1, 5:]).all()
    generator = np.random.default_rng(5)
    one, other = generator.normal(size=(6, 1)), generator.normal(size=(6, 3))
    weights = [np.exp(s) / np.exp(s).sum(axis=0) for s in (one, other)]
    by_hand = (weights[0][:, 0] + weights[1].mean(axis=1)) / 2
    np.testing.assert_allclose(
        np.exp(mean_scores([one, other], "log_weight"))[:, 0], by_hand, rtol=1e-5
    )


def test_columns_of_scores_are_classes_where_there_is_one_each() -> None:
    assert score_names([TARGET], 2) == ("no", "yes")
    assert score_names([TARGET], 1) == ("0",)
    assert score_names([TARGET, GRADE], 2) == ("0", "1")


def test_the_panel_says_what_each_member_says(members: list[Member]) -> None:
    whole = made_source(5, seed=8)
    panel = Panel(members)
    for place, case in enumerate(whole.cases):
        source = ArraySource([whole.read(place).features], [case])
        answer = panel.ask(source)
        for m, member in enumerate(members):
            found = member.infer(source)
            np.testing.assert_array_equal(answer.logits[m], found.logits[0])
            np.testing.assert_array_equal(answer.embedding[m], found.embedding[0])
            # Bag by bag or packed: the same within rounding.
            packed = member.infer(whole).logits[place]
            np.testing.assert_allclose(answer.logits[m], packed, rtol=1e-4, atol=1e-5)
        assert answer.scores.shape == (whole.lengths[place], 1)
        assert np.exp(answer.scores.astype(float)).sum() == pytest.approx(1, rel=1e-5)


def test_features_that_are_no_numbers_are_refused(members: list[Member]) -> None:
    source = made_source(1)
    bag = source.read(0).features
    bag[0, 0] = np.nan
    with pytest.raises(ArtifactError, match="no finite numbers"):
        Panel(members).ask(source)


# --- the file -------------------------------------------------------------------------------


def made_file(**changes: object) -> ScoreFile:
    generator = np.random.default_rng(4)
    values: dict[str, object] = {
        "slide_id": "s1",
        "case_id": "p/1",
        "fields": {"stage": "scores", "members": {"a": "00", "b": "11"}},
        "members": ("a", "b"),
        "scores": generator.normal(size=(300, 2)).astype(np.float32),
        "score_kind": "log_weight",
        "score_names": ("no", "yes"),
        "coords_l0": generator.integers(0, 9999, size=(300, 2)).astype(np.int32),
        "grid": generator.integers(0, 99, size=(300, 2)).astype(np.int32),
        "tile": {"mpp": 0.5, "bounds_l0": [0, 0, 10, 10]},
        "logits": generator.normal(size=(2, 2)),
        "embedding": generator.normal(size=(2, 8)).astype(np.float32),
        "ood_distance": np.array([0.5, np.nan]),
        "member_scores": generator.normal(size=(2, 300, 2)).astype(np.float32),
        "contributions": generator.normal(size=(300, 2)).astype(np.float32),
        "contribution_bias": generator.normal(size=2),
        "contribution_names": ("no", "yes"),
        "rollout": generator.uniform(size=300).astype(np.float32),
        "faithfulness": {"judged": [{"score": 0.5, "warning": "über"}], "agreement": None},
    }
    return ScoreFile(**{**values, **changes})  # type: ignore[arg-type]


def test_a_score_file_comes_back_as_it_was_and_is_the_same_bytes_again(tmp_path: Path) -> None:
    without = {"coords_l0": None, "grid": None, "contributions": None, "contribution_bias": None}
    for name, changes in (("s1", {}), ("s2", without)):
        file = made_file(slide_id=name, **changes)
        path = tmp_path / f"{name}.h5"
        write_score_file(path, file)
        found = read_score_file(path)
        for field in ScoreFile.__slots__:
            one, other = getattr(file, field), getattr(found, field)
            if isinstance(one, np.ndarray):
                np.testing.assert_array_equal(one, other)
                assert one.dtype == other.dtype
            else:
                assert one == other
        assert score_file_faults(path) == []
        before = path.read_bytes()
        write_score_file(path, file)
        assert path.read_bytes() == before


def test_a_file_of_version_1_is_read_without_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "s1.h5"
    write_score_file(path, made_file())
    newer = ("member_scores", "contributions", "contribution_bias", "rollout", "faithfulness")
    with h5py.File(path, "r+") as file:
        for name in newer:
            del file[name]
        del file.attrs["contribution_names"]
        file.attrs["schema_version"] = 1
        file.attrs["sha256"] = np.bytes_(artifacts.SEAL_BLANK)
    artifacts.seal_file(path)
    found = read_score_file(path)
    assert all(getattr(found, name) is None for name in newer)
    assert found.contribution_names == ()
    np.testing.assert_array_equal(found.scores, made_file().scores)


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "s1.h5"
    write_score_file(path, made_file())
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        (fault,) = score_file_faults(path)
        assert "changed since it was written" in fault
    path.write_bytes(content[:-1])
    with pytest.raises(SchemaError, match="changed since"):
        read_score_file(path)
    path.write_bytes(b"")
    with pytest.raises(SchemaError):
        read_score_file(path)
    with pytest.raises(ArtifactError, match="no such score file"):
        read_score_file(tmp_path / "none.h5")


def test_faults_of_content(tmp_path: Path) -> None:
    write_score_file(tmp_path / "other.h5", made_file())
    assert "is of slide 's1'" in score_file_faults(tmp_path / "other.h5")[0]
    write_score_file(tmp_path / "s1.h5", made_file(logits=np.full((2, 2), np.inf)))
    assert "no finite numbers" in score_file_faults(tmp_path / "s1.h5")[0]
    write_score_file(tmp_path / "s1.h5", made_file(members=("a",)))
    assert "contradict" in score_file_faults(tmp_path / "s1.h5")[0]
    write_score_file(tmp_path / "s1.h5", made_file(contribution_names=("no",)))
    assert "contradict" in score_file_faults(tmp_path / "s1.h5")[0]
    short = np.zeros((2, 299, 2), np.float32)
    write_score_file(tmp_path / "s1.h5", made_file(member_scores=short))
    assert "contradict" in score_file_faults(tmp_path / "s1.h5")[0]
    write_score_file(tmp_path / "s1.h5", made_file(score_kind="guess"))
    assert "score_kind is 'guess'" in score_file_faults(tmp_path / "s1.h5")[0]


def test_stopped_between_two_steps_the_old_file_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s1.h5"
    write_score_file(path, made_file())
    before = path.read_bytes()

    for count in itertools.count():
        left = [count]

        def stop(name: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt(name)

        monkeypatch.setattr(artifacts, "observe_step", stop)
        try:
            write_score_file(path, made_file(case_id="new"))
            break
        except KeyboardInterrupt as error:
            if str(error) != "after-rename":
                assert path.read_bytes() == before
        assert [one.name for one in tmp_path.iterdir()] == ["s1.h5"]
        path.write_bytes(before)
    assert count >= 3
    assert read_score_file(path).case_id == "new"
