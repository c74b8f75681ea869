"""One case in a worker: slides of a patient, kills between them, and what is found again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bagscope import artifacts
from bagscope.cohort.jobs import Job
from bagscope.errors import FingerprintMismatch
from bagscope.features.store import FeatureStore
from bagscope.mil.bags import Bags
from bagscope.mil.cases import Case
from bagscope.mil.explain.faithfulness import faithfulness
from bagscope.mil.explain.members import member_subject
from bagscope.mil.feature_origin import origin_of
from bagscope.mil.member import Member, load_member, save_member
from bagscope.mil.score_file import read_score_file
from bagscope.mil.sources import StoreSource
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.trainer import Trainer
from bagscope.pipeline import predict_worker
from bagscope.pipeline.bundle import member_folders
from bagscope.pipeline.predict_worker import ScoreTask, score_one
from tests.features.stored import store_slide
from tests.mil.made_bags import DIMENSION, TARGET, made_recipe, made_source

SLIDES = {"a": 7, "b": 4, "c": 9}
CASE = Case(case_id="patient/1", patient_id="patient/1", slide_ids=tuple(SLIDES))


@pytest.fixture
def task(tmp_path: Path) -> ScoreTask:
    for slide_id, rows in SLIDES.items():
        store_slide(tmp_path / "features", slide_id, rows, DIMENSION)
    folders = {}
    for seed in range(2):
        trained = Trainer(made_recipe(), [TARGET], made_source(8), None, seed=seed).run()
        folders[f"m{seed}"] = tmp_path / f"m{seed}"
        save_member(finish(trained, made_recipe(), None, seed=seed, fields={}), folders[f"m{seed}"])
    store = FeatureStore.open(tmp_path / "features")
    return ScoreTask(
        case=CASE,
        members=tuple(member_folders(folders).values()),
        location=str(tmp_path / "features"),
        out=tmp_path / "scores",
        device="cpu",
        threads=1,
        overwrite=False,
        origin=origin_of(store.record(slide_id) for slide_id in SLIDES),
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_slide_of_a_patient_gets_its_own_tiles(task: ScoreTask) -> None:
    assert score_one(Job(slide_id="a", payload=task)).outcome == "done"
    store = FeatureStore.open(task.location)
    source = StoreSource(store, [CASE])
    files = [read_score_file(task.out / f"{slide_id}.h5") for slide_id in SLIDES]
    weights = np.concatenate([np.exp(file.scores.astype(float)) for file in files])
    # Over the patient's bag, not over each slide: slides can be compared.
    assert weights.sum() == pytest.approx(1, rel=1e-5)
    attention = []
    for place, member in enumerate(task.members):
        loaded = load_member(member.folder)
        np.testing.assert_array_equal(files[0].logits[place], loaded.infer(source).logits[0])
        bags = source.read(0).features
        with torch.inference_mode():
            scores = loaded.model()(Bags.of([torch.from_numpy(bags).float()])).scores
        attention.append(torch.softmax(scores.double(), 0).numpy())
    np.testing.assert_allclose(weights, np.mean(attention, axis=0), rtol=1e-4)
    for file, (slide_id, rows) in zip(files, SLIDES.items(), strict=True):
        assert (file.slide_id, file.case_id, len(file.scores)) == (slide_id, "patient/1", rows)
        np.testing.assert_array_equal(file.coords_l0, store.record(slide_id).coords_l0)
        np.testing.assert_array_equal(file.logits, files[0].logits)
    assert score_one(Job(slide_id="a", payload=task)).outcome == "skipped"


def test_stopped_anywhere_it_ends_at_the_same_bytes(
    task: ScoreTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = Job(slide_id="a", payload=task)
    steps: list[str] = []
    monkeypatch.setattr(artifacts, "observe_step", steps.append)
    score_one(job)
    whole = bytes_of(task.out)
    assert steps.count("slide-scored") == 3
    for place in range(len(steps)):
        other = replace(task, out=tmp_path / f"stopped-{place}")
        left = [place]

        def stop(name: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt(name)

        monkeypatch.setattr(artifacts, "observe_step", stop)
        with pytest.raises(KeyboardInterrupt):
            score_one(Job(slide_id="a", payload=other))
        monkeypatch.setattr(artifacts, "observe_step", None)
        found = score_one(Job(slide_id="a", payload=other)).outcome
        # Only after the last file nothing was left to do.
        assert found == ("skipped" if len(steps) - place <= 2 else "done")
        assert bytes_of(other.out) == whole


def test_damaged_answers_are_made_again_and_others_are_refused(task: ScoreTask) -> None:
    job = Job(slide_id="a", payload=task)
    score_one(job)
    whole = bytes_of(task.out)
    (task.out / "b.h5").write_bytes(whole["b.h5"][:-5])
    assert score_one(job).outcome == "done"
    assert bytes_of(task.out) == whole
    fewer = replace(task, members=task.members[:1])
    with pytest.raises(FingerprintMismatch, match="members"):
        score_one(Job(slide_id="a", payload=fewer))
    assert score_one(Job(slide_id="a", payload=replace(fewer, overwrite=True))).outcome == "done"
    assert read_score_file(task.out / "c.h5").members == ("m0",)


def test_a_slide_of_another_tiling_fails_alone_and_says_why(task: ScoreTask) -> None:
    store_slide(Path(task.location), "d", 3, DIMENSION, tile={"mpp": 0.5, "tile_px": 512})
    other = Case(case_id="d", patient_id="d", slide_ids=("d",))
    with pytest.raises(FingerprintMismatch, match=r"d: tile_px is 512, the model's is 256"):
        score_one(Job(slide_id="d", payload=replace(task, case=other)))


def test_a_member_of_several_panels_is_loaded_once(
    task: ScoreTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def counted(folder: Path) -> Member:
        loaded.append(folder.name)
        return load_member(folder)

    monkeypatch.setattr(predict_worker, "load_member", counted)
    one, other = task.members
    # Of repeated folds, each case is asked about by members of its own.
    for number, members in enumerate([(one,), (one, other), (other,), (one,)]):
        asked = replace(task, members=members, out=task.out / str(number))
        assert score_one(Job(slide_id="a", payload=asked)).outcome == "done"
    assert loaded == ["m0", "m1"]


def test_a_score_file_holds_what_members_say_and_what_tiles_add(task: ScoreTask) -> None:
    score_one(Job(slide_id="a", payload=task))
    files = [read_score_file(task.out / f"{slide_id}.h5") for slide_id in SLIDES]
    # Over the patient's bag, tiles and bias add up to the mean of the members' logits.
    added = np.concatenate([file.contributions for file in files if file.contributions is not None])
    bias = files[0].contribution_bias
    assert bias is not None and files[0].contribution_names == ("no", "yes")
    np.testing.assert_allclose(added.sum(axis=0) + bias, files[0].logits.mean(axis=0), atol=1e-5)
    each = np.concatenate([f.member_scores for f in files if f.member_scores is not None], axis=1)
    assert each.shape == (2, sum(SLIDES.values()), 1)
    np.testing.assert_allclose(np.exp(each.astype(float)).sum(axis=1), 1, rtol=1e-5)
    means = np.concatenate([file.scores for file in files])
    np.testing.assert_allclose(np.exp(each).mean(axis=0), np.exp(means), rtol=1e-5)
    told = files[0].faithfulness
    assert told is not None and told == files[2].faithfulness
    assert [entry["basis"] for entry in told["judged"]] == ["scores", *["contributions"] * 2]
    assert [entry["class"] for entry in told["judged"][1:]] == ["no", "yes"]
    assert told["forward_passes"] is None and 0 <= told["agreement"]["top_overlap"] <= 1


def test_what_is_judged_is_what_the_library_says_of_the_members(task: ScoreTask) -> None:
    """The file's numbers against a subject that asks every member about every bag."""
    score_one(Job(slide_id="a", payload=task))
    file = read_score_file(task.out / "a.h5")
    assert file.faithfulness is not None
    source = StoreSource(FeatureStore.open(task.location), [CASE])
    members = [load_member(member.folder) for member in task.members]
    subject = member_subject(members, source, 0)
    scores = np.concatenate(
        [read_score_file(task.out / f"{one}.h5").scores[:, 0] for one in SLIDES]
    )
    found = faithfulness(subject.pool, subject.rows, scores)
    entry = file.faithfulness["judged"][0]
    assert entry["score"] == pytest.approx(found.score, rel=1e-4, abs=1e-6)
    assert (entry["chance"], entry["warning"]) == (pytest.approx(found.chance), found.warning)
    assert found.deletion is not None
    np.testing.assert_allclose(
        entry["curves"]["deletion"]["answers"], found.deletion.answers[0], rtol=1e-4
    )
