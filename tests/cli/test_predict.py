"""`train --final`, `train --overfit` and `predict` from the command line to the table."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bagscope.features.store import FeatureStore
from bagscope.heatmaps.judgement import agreement_text
from bagscope.mil.bundle import MemberPlace, load_bundle, write_bundle
from bagscope.mil.cases import Case
from bagscope.mil.feature_origin import origin_of
from bagscope.mil.member import load_member, save_member
from bagscope.mil.prediction import Panel
from bagscope.mil.score_file import read_score_file, write_score_file
from bagscope.mil.sources import ArraySource, StoreSource
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.trainer import Trainer
from bagscope.pipeline.predict_worker import NUMERICS
from tests.cli.conftest import Ran, files_of, leftovers
from tests.features.stored import store_slide
from tests.mil.made_bags import DIMENSION, TARGET, made_recipe, made_study

Command = Callable[..., Ran]
SMALL = (
    "--set", "aggregator.options={hidden: 8, attention: 4}", "--set", "optimiser.lr=0.01",
    "--set", "training.epochs=3", "--set", "training.min_epochs=0", "--set", "bags.bags_per_step=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a study with a finished run and its features, not to be changed."""
    from typer.testing import CliRunner

    from bagscope.cli.app import app

    folder = tmp_path_factory.mktemp("trained")
    study, features = made_study(folder, 24)
    with (study / "study.yaml").open("a") as file:
        file.write("\nsplits: {folds: 2, val_share: 0.25}\n")
    arguments = ["train", study, "--target", "label", "--features", features, "--name", "r"]
    ran = CliRunner().invoke(app, [str(a) for a in (*arguments, *SMALL, "-j", 1)])
    assert ran.exit_code == 0, ran.output
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_once, tmp_path / "trained"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predict(bagscope: Command, folder: Path, *more: object) -> Ran:
    study, features = folder / "study", folder / "features"
    return bagscope("predict", study / "runs" / "r", study, "--features", features, "-j", 1, *more)


def test_training_ends_with_a_bundle_and_out_of_fold_scores(
    bagscope: Command, trained: Path
) -> None:
    run = trained / "study" / "runs" / "r"
    bundle = load_bundle(run / "model.bagscope")
    assert bundle.default == "ensemble"
    assert bundle.origin.dimension == DIMENSION
    tested = {row["case_id"]: row for row in rows_of(run / "predictions.csv")}
    store = FeatureStore.open(trained / "features")
    assert {path.stem for path in (run / "scores").iterdir()} == set(tested)
    for case_id, row in tested.items():
        file = read_score_file(run / "scores" / f"{case_id}.h5")
        # By the one member that never saw the slide, and by no other.
        name = f"fold_r0_f{row['fold']}_s0"
        assert file.members == (name,)
        member = load_member(run / name)
        case = Case(case_id=case_id, patient_id="p", slide_ids=(case_id,))
        logits = member.infer(StoreSource(store, [case])).logits
        np.testing.assert_array_equal(file.logits, logits)
        chance = member.predictions(file.logits)["label"][0, 1]
        assert chance == pytest.approx(float(row["label_p_1"]), rel=1e-4)
        assert len(file.scores) == store.record(case_id).shape[0]
        # The other fold's model saw the slide: its heatmap is compared, and that is said.
        other = f"fold_r0_f{1 - int(row['fold'])}_s0"
        assert list(file.fields["others"]) == [other]
        assert file.faithfulness is not None
        agreed = file.faithfulness["agreement"]
        assert (agreed["models"], agreed["saw_the_case"]) == (2, 1)
        theirs = Panel([load_member(run / other)]).ask(StoreSource(store, [case])).scores
        if len(file.scores) > 1:
            wanted = stats.spearmanr(theirs[:, 0], file.scores[:, 0])[0]
            assert agreed["rank_correlation"] == pytest.approx(wanted, abs=1e-5)
            assert "(1 of them saw this case in training)" in agreement_text(file)
    assert bagscope("verify", trained / "study").code == 0
    path = run / "scores" / f"{case_id}.h5"
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    ran = bagscope("verify", trained / "study")
    assert ran.code == 1
    assert f"{path}: content changed since it was written" in ran.out


@pytest.mark.slow
def test_members_and_their_mean_on_the_training_study(bagscope: Command, trained: Path) -> None:
    ran = predict(bagscope, trained, "--embeddings")
    assert ran.code == 0, ran.err
    out = trained / "study" / "predictions" / "r" / "study"
    assert str(out / "predictions.csv") in ran.out
    joint = rows_of(out / "predictions.csv")
    record = json.loads((out / "predictions.json").read_text())
    assert record["cases"] == 24
    assert record["missing"] == record["assumed"] == {}
    assert record["ood_false_alarm_rate"] == pytest.approx(1 / 9)  # eight cases taught each member
    with np.load(out / "embeddings.npz") as stored:
        assert stored["embedding"].shape == (24, 2, 8)
        assert list(stored["member"]) == ["fold_r0_f0_s0", "fold_r0_f1_s0"]
    before = files_of(out / "scores")
    ran = predict(bagscope, trained, "--members", "all")  # the same answers, another table
    assert "24 skipped" in ran.out
    assert files_of(out / "scores") == before
    each = rows_of(out / "predictions.csv")
    assert len(each) == 48
    run = trained / "study" / "runs" / "r"
    tested = {(r["case_id"], r["fold"]): r["label_p_1"] for r in rows_of(run / "predictions.csv")}
    found = {(r["case_id"], r["fold"]): r["label_p_1"] for r in each}
    for key, chance in tested.items():
        assert float(found[key]) == pytest.approx(float(chance), rel=1e-4)
    for row in joint:
        chances = [float(found[row["case_id"], fold]) for fold in "01"]
        assert float(row["label_p_1"]) == pytest.approx(statistics.mean(chances), rel=1e-6)
        assert float(row["label_sd_1"]) == pytest.approx(statistics.stdev(chances), rel=1e-4)
        assert row["label"] in "01"
        assert (float(row["ood_distance"]) > 1) == (row["ood"] == "1")
    assert leftovers(trained) == []
    assert bagscope("verify", trained / "study").code == 0


@pytest.mark.slow
def test_one_bad_slide_never_stops_the_rest(bagscope: Command, trained: Path) -> None:
    slides = sorted((trained / "features").glob("*.h5"))
    slides[0].write_bytes(slides[0].read_bytes()[:900])
    slides[1].unlink()
    ran = predict(bagscope, trained)
    assert ran.code == 1
    out = trained / "study" / "predictions" / "r" / "study"
    assert len(rows_of(out / "predictions.csv")) == 22
    missing = json.loads((out / "predictions.json").read_text())["missing"]
    assert set(missing) == {slides[0].stem, slides[1].stem}
    assert "damaged" in missing[slides[0].stem]
    assert "no features of slide" in missing[slides[1].stem]
    ran = predict(bagscope, trained, "--skip-missing")
    assert ran.code == 1  # the damaged one is no missing one
    assert f"left out, has no features: {slides[1].stem}" in ran.out


def test_score_files_of_an_older_version_are_refused_in_one_sentence(
    bagscope: Command, trained: Path
) -> None:
    older = trained / "study" / "predictions" / "r" / "study" / "scores"
    older.mkdir(parents=True)
    for path in sorted((trained / "study" / "runs" / "r" / "scores").glob("*.h5"))[:3]:
        file = read_score_file(path)
        write_score_file(
            older / path.name, replace(file, fields={**file.fields, "numerics": NUMERICS - 1})
        )
    before = files_of(older)
    ran = predict(bagscope, trained)
    assert ran.code == 2
    assert ran.err.endswith(
        f"{older}: 3 score files of version {NUMERICS - 1} there, and this bagscope makes version "
        f"{NUMERICS}; make them anew with --overwrite, or choose another --name"
    )
    assert files_of(older) == before
    assert predict(bagscope, trained, "--name", "elsewhere", "--dry-run").code == 0
    assert predict(bagscope, trained, "--overwrite", "--dry-run").code == 0


@pytest.mark.slow
def test_an_answer_of_another_model_is_not_taken_for_this_one(
    bagscope: Command, trained: Path
) -> None:
    assert predict(bagscope, trained).code == 0
    member = trained / "study" / "runs" / "r" / "fold_r0_f0_s0"
    changed = load_member(member)
    weights = {name: weight * 1.5 for name, weight in changed.weights.items()}
    folder = trained / "other"
    save_member(replace(changed, weights=weights), folder)
    bundle = load_bundle(trained / "study" / "runs" / "r" / "model.bagscope")
    path = trained / "other.bagscope"
    places = [(MemberPlace(name="fold_r0_f0_s0"), folder)]
    write_bundle(path, run="r", per="slide", origin=bundle.origin, members=places)
    asked = ("predict", path, trained / "study", "--features", trained / "features", "-j", 1)
    ran = bagscope(*asked)
    assert ran.code == 1
    assert "was made differently (members.fold_r0_f0_s0 is" in ran.out
    assert bagscope(*asked, "--overwrite").code == 0
    assert bagscope(*asked, "--name", "elsewhere").code == 0


@pytest.mark.slow
def test_a_folder_of_features_and_what_does_not_match(
    bagscope: Command, trained: Path, tmp_path: Path
) -> None:
    run, features = trained / "study" / "runs" / "r", trained / "features"
    ran = bagscope("predict", run, features)
    assert ran.code == 2
    assert "--out" in ran.err
    out = tmp_path / "out"
    ran = bagscope("predict", run, features, "--out", out, "--dry-run")
    assert ran.code == 0
    assert "24 cases" in ran.out
    assert not out.exists()
    assert bagscope("predict", run, features, "--out", out, "-j", 1).code == 0
    assert rows_of(out / "predictions.csv")[0]["label"] in "01"
    assert "/" not in (out / "predictions.json").read_text().replace("unknown/", "")

    other = tmp_path / "other"
    store_slide(other, "a", 4, DIMENSION + 1)
    ran = bagscope("predict", run, other, "--out", tmp_path / "no")
    assert ran.code == 2
    assert f"dimension is {DIMENSION + 1}, the model's is {DIMENSION}" in ran.err
    shutil.rmtree(other)
    imported = {"name": "unknown", "imported_from": "clam", "imported_as": "unknown"}
    store_slide(other, "a", 4, DIMENSION, encoder=imported, weights_sha256="unknown", tile={})
    ran = bagscope("predict", run, other, "--out", tmp_path / "no")
    assert ran.code == 2
    assert "imported from clam as unknown" in ran.err
    ran = bagscope("predict", run, other, "--out", tmp_path / "no", "--assume", "uni")
    assert ran.code == 2
    assert "--assume is uni, the model's encoder is unknown" in ran.err
    assert not (tmp_path / "no").exists()
    ran = bagscope("predict", run, other, "--out", tmp_path / "yes", "--assume", "unknown", "-j", 1)
    assert ran.code == 0, ran.out
    record = json.loads((tmp_path / "yes" / "predictions.json").read_text())
    assert record["assumed"] == {"encoder": "unknown", "fields": ["encoder"], "cases": 1}
    assert "taken on your word" in ran.out


def test_what_is_wrong_with_models_and_labels(bagscope: Command, trained: Path) -> None:
    study = trained / "study"
    ran = bagscope("predict", study, study, "--features", trained / "features")
    assert ran.code == 2
    assert "no model there" in ran.err
    assert "holds no final model" in predict(bagscope, trained, "--members", "final").err
    table = study / "cohort.csv"
    lines = table.read_text().splitlines()
    place = lines[0].split(",").index("label")
    cells = lines[1].split(",")
    cells[place] = "maybe"
    table.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    ran = predict(bagscope, trained)
    assert ran.code == 2
    assert "'maybe' is none of the classes" in ran.err
    assert "--ignore-labels" in ran.err
    assert predict(bagscope, trained, "--ignore-labels", "--dry-run").code == 0
    weights = sorted((study / "runs" / "r" / "model.bagscope").rglob("*.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    ran = predict(bagscope, trained)
    assert ran.code == 1
    assert "content changed since it was written" in ran.err


@pytest.mark.slow
def test_the_final_model_learns_from_all_for_as_long_as_the_folds_say(
    bagscope: Command, trained: Path
) -> None:
    study, run = trained / "study", trained / "study" / "runs" / "r"
    asked = (
        "train", study, "--target", "label", "--features", trained / "features", "--name", "r",
        *SMALL, "-j", 1, "--final",
    )  # fmt: skip
    before = files_of(run / "fold_r0_f0_s0")
    ran = bagscope(*asked)
    assert ran.code == 0, ran.out + ran.err
    assert files_of(run / "fold_r0_f0_s0") == before
    facts = json.loads((run / "final" / "member.json").read_text())
    epochs = [
        json.loads((run / f"fold_r0_f{fold}_s0" / "member.json").read_text())["epoch"]
        for fold in range(2)
    ]
    assert facts["epochs"] == facts["epoch"] == max(epochs)
    bundle = load_bundle(run / "model.bagscope")
    assert bundle.default == "final"
    assert bundle.members["final"].statistics.mean.shape == (DIMENSION,)
    store = FeatureStore.open(trained / "features")
    tiles = np.concatenate([bag.features.astype(np.float64) for bag in store])
    np.testing.assert_allclose(bundle.members["final"].statistics.mean, tiles.mean(axis=0))
    made = files_of(run / "model.bagscope")
    ran = bagscope(*asked)
    assert ran.code == 0, ran.out + ran.err
    assert files_of(run / "model.bagscope") == made
    assert predict(bagscope, trained).code == 0
    out = study / "predictions" / "r" / "study"
    assert {row["members"] for row in rows_of(out / "predictions.csv")} == {"1"}

    # Members that are trained otherwise take the final model with them, until it is made anew.
    otherwise = (*asked[:-1], "--overwrite", "--set", "optimiser.lr=0.02")
    assert bagscope(*otherwise).code == 0
    assert not (run / "final").exists()
    assert load_bundle(run / "model.bagscope").default == "ensemble"
    ran = bagscope(*asked, "--set", "optimiser.lr=0.02")
    assert ran.code == 0, ran.out
    assert load_bundle(run / "model.bagscope").default == "final"
    ran = predict(bagscope, trained)
    assert ran.code == 1
    assert "members.final is" in ran.out


def test_a_recipe_that_can_learn_a_few_cases_says_so_and_leaves_nothing(
    bagscope: Command, trained: Path
) -> None:
    study = trained / "study"
    before = files_of(study)
    asked = ("train", study, "--target", "label", "--features", trained / "features", *SMALL)
    ran = bagscope(*asked, "--overfit", 8)
    assert ran.code == 0, ran.out
    assert "100% right" in ran.out
    ran = bagscope(*asked, "--overfit", 8, "--set", "optimiser.lr=1e-9", "--json")
    assert ran.code == 1
    found = json.loads(ran.out.splitlines()[-1])
    assert not found["fits"]
    assert len(found["cases"]) == 8
    assert "raise optimiser.lr (1e-09)" in " ".join(found["hints"])
    assert files_of(study) == before
    assert "24 cases have a label" in bagscope(*asked, "--overfit", 99).err


@pytest.mark.slow
def test_from_slides_it_tiles_and_extracts_as_the_model_was_trained(
    bagscope: Command, slides: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    options = ("--mpp", 1.0, "--tile-px", 128, "--encoder", "color-texture", "-j", 1)
    assert bagscope("extract", study, "--slides", slides, *options).code == 0
    store = FeatureStore.open(study / "features" / "1.00mpp_128px" / "color-texture")
    bags = [bag.features.astype(np.float32) for bag in store]
    cases = [
        Case(case_id=s, patient_id=s, slide_ids=(s,), targets={"label": (float(place % 2),)})
        for place, s in enumerate(store.slide_ids)
    ]
    trained = Trainer(made_recipe(), [TARGET], ArraySource(bags, cases), None, seed=0).run()
    folder = tmp_path / "member"
    save_member(finish(trained, made_recipe(), None, seed=0, fields={}), folder)
    model = tmp_path / "model.bagscope"
    origin = origin_of(store.record(slide_id) for slide_id in store.slide_ids)
    places = [(MemberPlace(name="m"), folder)]
    write_bundle(model, run="r", per="slide", origin=origin, members=places)

    fresh = tmp_path / "fresh"
    (slides / "c.svs").write_bytes(b"no slide")
    ran = bagscope("predict", model, fresh, "--slides", slides, "-j", 1)
    assert ran.code == 1, ran.out
    made = FeatureStore.open(fresh / "features" / "1.00mpp_128px" / "color-texture")
    assert set(made.slide_ids) == {"a", "b"}
    rows = rows_of(fresh / "predictions" / "r" / "fresh" / "predictions.csv")
    assert [row["case_id"] for row in rows] == ["a", "b"]
    assert rows[0]["label_predicted"] in ("no", "yes")
    assert rows[0]["ood"] == ""  # the member was made without looking
    record = json.loads((fresh / "predictions" / "r" / "fresh" / "predictions.json").read_text())
    assert set(record["missing"]) == {"c"}
    file = read_score_file(fresh / "predictions" / "r" / "fresh" / "scores" / "a.h5")
    np.testing.assert_array_equal(file.coords_l0, made.record("a").coords_l0)
    assert file.tile["tile_px"] == 128

    # Features that are there are used as they are; the tile files are not even looked for.
    shutil.rmtree(study / "tilings")
    ran = bagscope("predict", model, study, "-j", 1)
    assert ran.code == 0, ran.out
    assert "extract/" not in ran.out
    assert len(rows_of(study / "predictions" / "r" / "study" / "predictions.csv")) == 3
    other = tmp_path / "other.bagscope"
    strange = replace(origin, weights_sha256="cd" * 32)
    write_bundle(other, run="r", per="slide", origin=strange, members=places)
    for place, more in ((study, ()), (tmp_path / "third", ("--slides", slides))):
        ran = bagscope("predict", other, place, *more, "-j", 1)
        assert ran.code == 2
        assert "weights_sha256 of color-texture is" in ran.err
        assert "the model's is cdcdcdcdcdcd" in ran.err
    assert not (tmp_path / "third" / "tilings").exists()
