"""`convert-weights` from a published checkpoint to predictions, heatmaps and explanations."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bagscope.features.store import FeatureStore
from bagscope.mil.bundle import load_bundle
from bagscope.mil.score_file import read_score_file
from tests.cli.conftest import Ran, files_of, leftovers
from tests.features.stored import store_slide
from tests.mil.originals.published import PUBLISHED, clam, random_weights

Command = Callable[..., Ran]
SLIDES = {"a": 40, "b": 3, "c": 1}
TILE = {"tile_px": 256, "mpp": 0.5, "mpp_effective": 0.502}
_, CLAM = PUBLISHED["clam-mb-small"]
_, SINGLE = PUBLISHED["dsmil-single"]
SURVIVAL = ("--task", "survival", "--time", "months", "--event", "died")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a checkpoint of CLAM-MB, as its authors would save one from several GPUs."""
    path = tmp_path / "s_0_checkpoint.pt"
    weights = random_weights(CLAM.shapes)
    torch.save({"epoch": 9, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, path)
    return path


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """Return a folder of features of three slides."""
    folder = tmp_path / "features"
    for name, tiles in SLIDES.items():
        store_slide(folder, name, tiles, CLAM.features, tile=TILE)
    return folder


def bag_of(features: Path, slide_id: str) -> Tensor:
    return torch.from_numpy(np.array(FeatureStore.open(features).bag(slide_id).features)).float()


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["case_id"]: row for row in csv.DictReader(file)}


def convert(bagscope: Command, checkpoint: Path, out: Path, *more: object) -> Ran:
    asked = ("convert-weights", checkpoint, "--out", out, "--classes", "normal,tumor")
    return bagscope(*asked, *more)


@pytest.mark.slow
def test_predictions_are_those_of_the_formulas(
    bagscope: Command, checkpoint: Path, features: Path, tmp_path: Path
) -> None:
    bundle, out = tmp_path / "clam.bagscope", tmp_path / "out"
    ran = convert(bagscope, checkpoint, bundle, "--features", features)
    assert ran.code == 0, ran.err
    assert "clam-mb → clam_mb: 1024 features in, normal, tumor out" in ran.out
    assert "read off the weights: hidden 512, attention 256" in ran.out
    assert "of no effect on answers: size small, dropout 0.25, k 8" in ran.out
    assert "not calibrated, and the threshold is ½" in ran.out
    assert f"model: {bundle}" in ran.out
    ran = bagscope("predict", bundle, features, "--out", out, "-j", 1)
    assert ran.code == 0, ran.out + ran.err
    assert "no case is flagged as unlike the training slides" in ran.out
    weights = random_weights(CLAM.shapes)
    rows = rows_of(out / "predictions.csv")
    assert set(rows) == set(SLIDES)
    for slide_id, row in rows.items():
        logits = CLAM.logits(weights, bag_of(features, slide_id))
        stored = read_score_file(out / "scores" / f"{slide_id}.h5").logits[0]
        np.testing.assert_allclose(stored, logits.numpy(), rtol=1e-5, atol=1e-6)
        chances = logits.double().softmax(0).tolist()
        found = [float(row["label_p_normal"]), float(row["label_p_tumor"])]
        assert found == pytest.approx(chances, rel=1e-5)
        assert row["label_predicted"] == ("tumor" if chances[1] >= 0.5 else "normal")
        assert row["ood"] == row["ood_distance"] == ""
    assert leftovers(tmp_path) == []


def test_the_bundle_makes_nothing_up_and_names_no_place(
    bagscope: Command, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "clam.bagscope"
    said = ("--encoder", "uni", "--mpp", 0.5, "--tile-px", 256, "--target", "metastasis")
    assert convert(bagscope, checkpoint, path, *said).code == 0
    bundle = load_bundle(path)
    (member,) = bundle.members.values()
    assert (bundle.run, bundle.default, bundle.targets[0].name) == (
        "clam",
        "ensemble",
        "metastasis",
    )
    assert bundle.origin.encoder == {"name": "uni"}
    assert bundle.origin.weights_sha256 == "unknown"
    assert (bundle.origin.mpp, bundle.origin.tile_px) == ((0.5,), (256,))
    assert bundle.origin.mpp_effective is None
    assert not member.statistics.is_known
    assert member.ood is None
    assert (member.temperatures, member.thresholds) == ({}, {"metastasis": 0.5})
    assert "clam-mb" in member.uncalibrated["metastasis"]
    assert "clam-mb" in member.unchosen["metastasis"]
    for file in path.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8")
        assert checkpoint.stem not in file.read_text(encoding="utf-8")


@pytest.mark.slow
def test_unknown_features_are_taken_on_the_user_s_word_alone(
    bagscope: Command, checkpoint: Path, features: Path, tmp_path: Path
) -> None:
    bundle, out = tmp_path / "clam.bagscope", tmp_path / "out"
    ran = convert(bagscope, checkpoint, bundle, "--encoder", "demo")
    assert "say so with bagscope predict --assume demo" in ran.out
    asked = ("predict", bundle, features, "--out", out, "-j", 1)
    ran = bagscope(*asked)
    assert ran.code == 2
    assert "pass --assume demo" in ran.err
    ran = bagscope(*asked, "--assume", "demo")
    assert ran.code == 0, ran.out + ran.err
    record = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    assert record["assumed"]["fields"] == ["encoder", *TILE]


@pytest.mark.slow
def test_one_logit_is_a_label_that_is_there_or_not(
    bagscope: Command, features: Path, tmp_path: Path
) -> None:
    path, bundle, out = tmp_path / "dsmil.pth", tmp_path / "dsmil.bagscope", tmp_path / "out"
    weights = random_weights(SINGLE.shapes)
    torch.save(weights, path)
    for name, tiles in SLIDES.items():
        store_slide(features, name, tiles, SINGLE.features)
    asked = ("convert-weights", path, "--out", bundle, "--classes", "tumor")
    ran = bagscope(*asked)
    assert ran.code == 2
    assert "one logit" in ran.err
    assert "--task multilabel" in ran.err
    ran = bagscope(*asked, "--task", "multilabel", "--features", features)
    assert ran.code == 0, ran.err
    assert "answers depend on it: predict bag" in ran.out
    ran = bagscope("predict", bundle, features, "--out", out, "-j", 1)
    assert ran.code == 0, ran.out + ran.err
    for slide_id, row in rows_of(out / "predictions.csv").items():
        chance = SINGLE.logits(weights, bag_of(features, slide_id)).double().sigmoid()
        assert float(row["label_p_tumor"]) == pytest.approx(chance.item(), rel=1e-5)


@pytest.mark.slow
def test_hazards_become_a_risk(bagscope: Command, features: Path, tmp_path: Path) -> None:
    path, bundle, out = tmp_path / "surv.pth", tmp_path / "surv.bagscope", tmp_path / "out"
    model = clam(256, 4, branches=False)
    weights = random_weights(model.shapes)
    torch.save(weights, path)
    asked = ("convert-weights", path, "--out", bundle, *SURVIVAL)
    ran = bagscope(*asked, "--edges", "0,12,24.5,60,120", "--features", features)
    assert ran.code == 0, ran.err
    assert "clam-sb → clam_sb: 1024 features in, a risk out" in ran.out
    ran = bagscope("predict", bundle, features, "--out", out, "-j", 1)
    assert ran.code == 0, ran.out + ran.err
    for slide_id, row in rows_of(out / "predictions.csv").items():
        hazards = model.logits(weights, bag_of(features, slide_id)).double().sigmoid()
        survival = (1 - hazards).cumprod(0)
        assert float(row["survival_risk"]) == pytest.approx(-survival.sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ((), "--edges names 0, and the weights give 2 logits, the hazards of as many bins of"),
        (("--edges", "0,1"), "--edges names 2, and the weights give 2 logits"),
        (("--edges", "0,2,1"), "--edges are 0, 2, 1, which do not rise"),
        (("--edges", "0,x,1"), "--edges 0,x,1: write numbers"),
        (("--edges", "0,1,2", "--classes", "a,b"), "survival has no classes"),
    ],
)
def test_hazards_without_their_times_are_refused(
    bagscope: Command, checkpoint: Path, tmp_path: Path, more: tuple[str, ...], fault: str
) -> None:
    path = tmp_path / "surv.bagscope"
    ran = bagscope("convert-weights", checkpoint, "--out", path, *SURVIVAL, *more)
    assert ran.code == 2
    assert fault in ran.err
    assert "\n" not in ran.err
    ran = convert(bagscope, checkpoint, path, "--edges", "0,1,2")
    assert "--time, --event and --edges belong to survival, and --task is classes" in ran.err
    ran = bagscope("convert-weights", checkpoint, "--out", path, "--task", "survival")
    assert "survival needs the columns of time and event" in ran.err


@pytest.mark.slow
def test_heatmaps_and_explanations_are_made_of_it(
    bagscope: Command, checkpoint: Path, features: Path, tmp_path: Path
) -> None:
    bundle, out = tmp_path / "clam.bagscope", tmp_path / "out"
    assert convert(bagscope, checkpoint, bundle, "--features", features).code == 0
    assert bagscope("predict", bundle, features, "--out", out, "-j", 1).code == 0
    ran = bagscope("heatmap", out, "--out", tmp_path / "heatmaps", "-j", 1, "--formats", "csv")
    assert ran.code == 0, ran.out + ran.err
    ran = bagscope(
        "explain", out, "--model", bundle, "--features", features, "--out", tmp_path / "why",
        "--methods", "necessity,leave-one-out,gradients", "-j", 1,
    )  # fmt: skip
    assert ran.code == 0, ran.out + ran.err
    assert (tmp_path / "why" / "summary.json").exists()


def test_written_again_it_is_left_alone_and_another_is_refused(
    bagscope: Command, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "clam.bagscope"
    assert convert(bagscope, checkpoint, path).code == 0
    before = files_of(path)
    ran = convert(bagscope, checkpoint, path)
    assert "(was there already)" in ran.out
    assert files_of(path) == before
    ran = convert(bagscope, checkpoint, path, "--mpp", 0.5)
    assert ran.code == 2
    assert "was made differently (features.mpp is [], asked for [0.5])" in ran.err
    assert convert(bagscope, checkpoint, path, "--mpp", 0.5, "--overwrite").code == 0
    assert load_bundle(path).origin.mpp == (0.5,)
    (path / "complete.json").unlink()
    ran = convert(bagscope, checkpoint, path)
    assert ran.code == 2
    assert "is there and no bundle" in ran.err


def test_a_dry_run_writes_nothing(bagscope: Command, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "clam.bagscope"
    ran = convert(bagscope, checkpoint, path, "--dry-run")
    assert ran.code == 0
    assert "clam-mb → clam_mb" in ran.out
    assert "model:" not in ran.out
    ran = convert(bagscope, checkpoint, path, "--dry-run", "--json")
    plan = json.loads(ran.out)
    assert plan["event"] == "plan"
    assert (plan["original"], plan["aggregator"]) == ("clam-mb", "clam_mb")
    assert plan["told"] == ["hidden", "attention"]
    assert plan["options"]["attention"] == 256
    assert not path.exists()
    done = json.loads(convert(bagscope, checkpoint, path, "--json").out)
    assert done == {**plan, "event": "converted", "bundle": str(path), "is_new": True}


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (("--from", "clam_mb"), "no original 'clam_mb' (did you mean 'clam-mb'?)"),
        (("--from", "hippo-gated"), "have no place in aggregator abmil"),
        (("--classes", "a,b,c"), "give 2 logits, and --classes names 3 (a, b, c)"),
        (("--classes", "a,a"), "name each one once"),
        (("--classes", ","), "names 0 (none)"),
        (("--encoder", "virchow2"), "takes vectors of 1024 numbers, and those of --encoder virch"),
        (("--set", "hiden=3"), "unknown option 'hiden'"),
        (("--set", "attention=3"), "expected (3, 512)"),
        (("--set", "attention"), "--set 'attention': write it as"),
        (("--ignore", "nothing*"), "--ignore 'nothing*': no tensor has such a name"),
        (("--ignore", "*attention_b*"), "is missing"),
        (("--key", "model"), "no state dict 'model'; there are state_dict"),
        (("--out", "clam"), "a bundle's name ends in .bagscope"),
        (("--out", "con.bagscope"), "'con' is a reserved device name"),
    ],
)
def test_what_can_not_be_is_refused_in_one_sentence(
    bagscope: Command, checkpoint: Path, tmp_path: Path, more: tuple[str, str], fault: str
) -> None:
    ran = convert(bagscope, checkpoint, tmp_path / "clam.bagscope", *more)
    assert ran.code == 2
    assert fault in ran.err
    assert "\n" not in ran.err
    assert list(tmp_path.rglob("*.bagscope")) == []


def test_features_of_another_width_and_doubled_statements_are_refused(
    bagscope: Command, checkpoint: Path, tmp_path: Path
) -> None:
    path, features = tmp_path / "clam.bagscope", tmp_path / "narrow"
    store_slide(features, "a", 4, 768)
    ran = convert(bagscope, checkpoint, path, "--features", features)
    assert ran.code == 2
    assert f"takes vectors of 1024 numbers, and those of --features {features} have 768" in ran.err
    ran = convert(bagscope, checkpoint, path, "--features", features, "--mpp", 0.5)
    assert ran.code == 2
    assert "leave --mpp out" in ran.err


def test_broken_numbers_are_refused(bagscope: Command, checkpoint: Path, tmp_path: Path) -> None:
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    weights["module.classifiers.1.bias"][:] = torch.nan
    torch.save(weights, checkpoint)
    ran = convert(bagscope, checkpoint, tmp_path / "clam.bagscope")
    assert ran.code == 2
    assert "classifier.bias hold values that are no finite numbers" in ran.err
