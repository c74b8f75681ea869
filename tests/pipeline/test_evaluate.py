from __future__ import annotations

import dataclasses
import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from bagscope.errors import ArtifactError, ConfigError
from bagscope.mil.cases import Case
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.evaluate import (
    EvaluateRequest,
    EvaluateResult,
    evaluate_run,
    write_evaluation,
)
from tests.cli.conftest import Ran, bagscope
from tests.pipeline.made_runs import Says, made_cohort, made_run

__all__ = ["bagscope"]

LABEL = TargetSpec(column="label", classes=("no", "yes"))
CASES = 40
FEW = 200


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a study and features: the label is in dimension 0 of a few tiles."""
    generator = np.random.default_rng(1)
    labels = [place % 2 for place in range(CASES)]
    bags = []
    for label in labels:
        bag = generator.normal(size=(int(generator.integers(4, 12)), 5))
        bag[:, 0] += 2.0 * label
        bags.append(bag)
    died = generator.integers(0, 2, CASES)
    columns = {
        "label": ["yes" if label else "no" for label in labels],
        "site": ["a" if place % 3 else "b" for place in range(CASES)],
        "age": [40 + place for place in range(CASES)],
        "months": [f"{generator.exponential(20 / (1 + label)):.3f}" for label in labels],
        "died": died.tolist(),
        "score": [f"{generator.normal() + label:.3f}" for label in labels],
    }
    return made_cohort(tmp_path_factory.mktemp("cohort"), bags, columns)


@pytest.fixture(scope="module")
def good(cohort: tuple[Path, Path]) -> Path:
    """Return a run that is right most of the time, under two seeds."""
    return made_run(*cohort, LABEL, knowing(0.4), name="good", seeds=(0, 1))


@pytest.fixture(scope="module")
def evaluated(good: Path, cohort: tuple[Path, Path]) -> EvaluateResult:
    return evaluate_run(
        EvaluateRequest(run=good, by=("site", "age"), features=str(cohort[1]), resamples=FEW)
    )


def knowing(noise: float) -> Says:
    """Return a model that sees the label through noise of this spread."""

    def says(case: Case, seed: int) -> Sequence[float]:
        (label,) = case.targets["label"]
        random = np.random.default_rng([int(case.patient_id[1:]), seed])
        chance = float(np.clip(0.3 + 0.4 * label + random.normal(0, noise), 0.001, 0.999))
        return (1 - chance, chance)

    return says


def numbers(found: EvaluateResult) -> dict:
    return json.loads(found.metrics.read_text(encoding="utf-8"))


def lines(found: EvaluateResult, target: str = "label") -> list[str]:
    return [claim.text for claim in found.claims[target]]


def test_numbers_equal_scikit_learn_on_the_pooled_table(
    evaluated: EvaluateResult, good: Path
) -> None:
    table = pd.read_csv(good / "predictions.csv")
    mean = table.groupby(["case_id", "fold", "label"], as_index=False)["label_p_yes"].mean()
    truth, chance = mean["label"] == "yes", mean["label_p_yes"]
    stated = numbers(evaluated)["targets"]["label"]
    pooled = {name: one["value"] for name, one in stated["pooled"].items()}
    assert pooled["auroc"] == pytest.approx(sk.roc_auc_score(truth, chance), abs=1e-9)
    assert pooled["auprc"] == pytest.approx(sk.average_precision_score(truth, chance), abs=1e-9)
    assert pooled["brier"] == pytest.approx(sk.brier_score_loss(truth, chance), abs=1e-8)
    assert pooled["log_loss"] == pytest.approx(sk.log_loss(truth, chance), abs=1e-8)
    called = chance >= 0.5
    assert pooled["accuracy"] == pytest.approx(sk.accuracy_score(truth, called))
    assert pooled["kappa"] == pytest.approx(sk.cohen_kappa_score(truth, called))
    assert pooled["f1"] == pytest.approx(sk.f1_score(truth, called))
    folds = [
        sk.roc_auc_score(own["label"] == "yes", own["label_p_yes"])
        for _, own in mean.groupby("fold")
    ]
    assert stated["mean_over_folds"]["auroc"]["value"] == pytest.approx(np.mean(folds), abs=1e-9)
    each = [stated["folds"][f"r0_f{fold}"]["values"]["auroc"]["value"] for fold in range(5)]
    assert each == pytest.approx(folds, abs=1e-9)
    for seed in (0, 1):
        own = table[table["seed"] == seed]
        alone = sk.roc_auc_score(own["label"] == "yes", own["label_p_yes"])
        assert stated["seeds"][str(seed)]["auroc"] == pytest.approx(alone, abs=1e-9)


def test_intervals_bracket_their_values(evaluated: EvaluateResult) -> None:
    pooled = numbers(evaluated)["targets"]["label"]["pooled"]
    # The calibration error is biased upwards in resamples, and its interval with it.
    for name in set(pooled) - {"ece"}:
        one = pooled[name]
        assert one["low"] <= one["value"] <= one["high"], name
        assert one["low"] < one["high"]


def test_counts_subgroups_and_splits_are_those_of_the_table(
    evaluated: EvaluateResult, good: Path
) -> None:
    stated = numbers(evaluated)
    assert stated["targets"]["label"]["patients_with"] == {"no": 20, "yes": 20}
    sites = {one["value"]: one for one in stated["targets"]["label"]["subgroups"]["site"]}
    assert {name: one["patients"] for name, one in sites.items()} == {"a": 26, "b": 14}
    table = pd.read_csv(good / "predictions.csv")
    own = (
        table[table["site"] == "b"]
        .groupby(["case_id", "label"], as_index=False)
        .mean(numeric_only=True)
    )
    expected = sk.roc_auc_score(own["label"] == "yes", own["label_p_yes"])
    assert sites["b"]["headline"]["value"] == pytest.approx(expected, abs=1e-9)
    ages = [one["value"] for one in stated["targets"]["label"]["subgroups"]["age"]]
    assert ages == ["≤ 59.5", "> 59.5"]
    sides = stated["split"]["patients"]
    assert sum(one["test"] for one in sides.values()) == CASES
    assert all(one["train"] + one["val"] + one["test"] == CASES for one in sides.values())


class References(HTMLParser):
    """Gathers whatever a page would load, and the ids it names."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.loaded.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_page_stands_alone_and_tells_nothing_of_this_machine(
    evaluated: EvaluateResult, good: Path
) -> None:
    text = evaluated.report.read_text(encoding="utf-8")
    page = References()
    page.feed(text)
    assert [one for one in page.loaded if not one.startswith("#")] == []
    # Whatever an element points to is there, and once.
    assert {one[1:] for one in page.loaded} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.findall(r"url\((?!#)|@import", text)
    stored = evaluated.metrics.read_text(encoding="utf-8")
    for told in (text, stored):
        assert str(good.parents[3]) not in told
        assert "/tmp" not in told
        assert Path.home().as_posix() + "/" not in told
    assert len(page.ids) > 10


def test_page_shows_names_as_they_are_and_no_folder_of_a_note(
    evaluated: EvaluateResult, tmp_path: Path
) -> None:
    answers = evaluated.result.targets["label"].answers
    odd = answers.target.model_copy(update={"classes": ("<b>no", "$yes$ & more")})
    target = dataclasses.replace(
        evaluated.result.targets["label"], answers=dataclasses.replace(answers, target=odd)
    )
    result = dataclasses.replace(
        evaluated.result,
        run="<script>x</script>",
        targets={"label": target},
        notes=("/home/me/secret/clinical.csv: 3 rows match no slide",),
        left_out={"s1": "/mnt/host7/s1.svs: could not be opened"},
    )
    found = write_evaluation(tmp_path, result)
    text = found.report.read_text(encoding="utf-8") + found.metrics.read_text(encoding="utf-8")
    assert "clinical.csv: 3 rows" in text and "s1.svs: could not" in text
    assert "/home" not in text and "host7" not in text
    page = References()
    page.feed(found.report.read_text(encoding="utf-8"))
    assert not page.tags & {"script", "b>no"}
    assert "$yes$ &amp; more" in (tmp_path / "figures" / "confusion.svg").read_text("utf-8")


def test_figures_are_xml_and_pixels(evaluated: EvaluateResult, good: Path) -> None:
    figures = good / "figures"
    names = {path.stem for path in figures.glob("*.svg")}
    assert names == {"baselines", "ranking", "calibration", "confusion", "decision"}
    for name in names:
        root = ET.parse(figures / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert (figures / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    inline = re.findall(r"<svg.*?</svg>", evaluated.report.read_text("utf-8"), re.DOTALL)
    assert len(inline) == len(names)
    for element in inline:
        ET.fromstring(element)
        assert "var(--ink)" in element and "#1c2127" not in element


def test_evaluating_again_writes_the_same_bytes(
    evaluated: EvaluateResult, cohort: tuple[Path, Path], good: Path
) -> None:
    before = {
        path: path.read_bytes()
        for path in good.rglob("*")
        if path.is_file() and "fold_" not in path.as_posix()
    }
    evaluate_run(
        EvaluateRequest(run=good, by=("site", "age"), features=str(cohort[1]), resamples=FEW)
    )
    assert {path: path.read_bytes() for path in before} == before


def test_model_that_beats_its_rivals_is_said_to(evaluated: EvaluateResult) -> None:
    stated = numbers(evaluated)["targets"]["label"]["baselines"]
    assert set(stated) == {"constant", "linear", "neighbours", "size", "site"}
    assert stated["constant"]["headline"]["value"] == pytest.approx(0.5)
    assert stated["linear"]["headline"]["value"] > 0.9
    assert "2 seeds" in " ".join(lines(evaluated))


def test_model_worse_than_mean_pooling_is_said_to_be(cohort: tuple[Path, Path]) -> None:
    run = made_run(*cohort, LABEL, knowing(3.0), name="bad")
    found = evaluate_run(EvaluateRequest(run=run, features=str(cohort[1]), resamples=FEW))
    told = lines(found)
    worse = [line for line in told if "worse than mean of tiles, logistic regression" in line]
    assert worse and told.index(worse[0]) < 5
    assert any("does not rule out chance" in line for line in told)


def test_planted_leak_of_tile_count_is_named_in_the_first_lines(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    labels = [place % 2 for place in range(CASES)]
    bags = [generator.normal(size=(4 + 6 * label + place % 3, 4)) for place, label in
            enumerate(labels)]  # fmt: skip
    columns = {"label": ["yes" if label else "no" for label in labels], "site": ["one"] * CASES}
    study, features = made_cohort(tmp_path, bags, columns)
    run = made_run(study, features, LABEL, knowing(0.25))
    found = evaluate_run(EvaluateRequest(run=run, features=str(features), resamples=FEW))
    assert "Tile count and tissue area alone come to 1.00" in lines(found)[1]
    assert found.claims["label"][1].tone == "warning"
    skipped = numbers(found)["targets"]["label"]["baselines_skipped"]
    assert skipped == {"Site alone": "there is one site"}


def test_site_that_tells_the_label_is_named(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    labels = [place % 2 for place in range(CASES)]
    bags = [generator.normal(size=(5, 4)) for _ in labels]
    columns = {
        "label": ["yes" if label else "no" for label in labels],
        "site": ["north" if label else "south" for label in labels],
    }
    study, features = made_cohort(tmp_path, bags, columns)
    run = made_run(study, features, LABEL, knowing(0.25))
    found = evaluate_run(EvaluateRequest(run=run, features=str(features), resamples=FEW))
    assert any("Site alone comes to 1.00" in line for line in lines(found)[:3])


@pytest.mark.slow
def test_baselines_are_fitted_once_and_again_when_the_table_was_touched(
    evaluated: EvaluateResult,
    good: Path,
    cohort: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bagscope.pipeline import evaluate

    calls = []
    fit = evaluate.baseline_answers
    monkeypatch.setattr(evaluate, "baseline_answers", lambda *given: calls.append(1) or fit(*given))
    request = EvaluateRequest(run=good, features=str(cohort[1]), resamples=FEW)
    evaluate_run(request)
    assert calls == []
    table = good / "baselines.csv"
    stored = table.read_text()
    table.write_text(stored.replace("linear", "lineal", 1))
    evaluate_run(request)
    assert calls == [1]
    assert table.read_text() == stored


def test_without_features_what_needs_them_is_missing_and_said_to_be(good: Path) -> None:
    found = evaluate_run(EvaluateRequest(run=good, resamples=FEW))
    assert any("alone was not looked at" in line for line in lines(found))
    rivals = {rival.name for rival in found.result.targets["label"].rivals}
    assert rivals == {"constant", "site"}


def test_survival_says_who_is_at_risk(cohort: tuple[Path, Path]) -> None:
    target = TargetSpec(task="survival", time="months", event="died")

    def says(case: Case, seed: int) -> Sequence[float]:
        return (-case.targets["survival"][0],)

    run = made_run(*cohort, target, says, name="surv", split="surv")
    found = evaluate_run(EvaluateRequest(run=run, features=str(cohort[1]), resamples=FEW))
    stated = numbers(found)["targets"]["survival"]
    assert stated["scope"] == "folds"
    assert stated["mean_over_folds"]["c_index"]["value"] == pytest.approx(1.0)
    assert stated["log_rank"]["p_value"] < 0.01
    assert set(stated["baselines"]) == {"constant", "linear", "size", "site"}
    assert stated["baselines"]["constant"]["headline"]["value"] == pytest.approx(0.5)
    names = {path.stem for path in (run / "figures").glob("*.svg")}
    assert names == {"baselines", "kaplan_meier", "auc_over_time"}
    assert any("had an event" in line for line in lines(found, "survival"))


def test_regression_equals_scikit_learn(cohort: tuple[Path, Path]) -> None:
    target = TargetSpec(column="score", task="regression")

    def says(case: Case, seed: int) -> Sequence[float]:
        return (0.5 * case.targets["score"][0] + 0.2,)

    run = made_run(*cohort, target, says, name="reg", split="reg")
    found = evaluate_run(EvaluateRequest(run=run, features=str(cohort[1]), resamples=FEW))
    table = pd.read_csv(run / "predictions.csv")
    pooled = numbers(found)["targets"]["score"]["pooled"]
    truth, predicted = table["score"], table["score_predicted"]
    assert pooled["r2"]["value"] == pytest.approx(sk.r2_score(truth, predicted))
    assert pooled["mae"]["value"] == pytest.approx(sk.mean_absolute_error(truth, predicted))
    assert pooled["pearson"]["value"] == pytest.approx(1.0)


def test_fold_of_one_class_has_no_value_and_a_reason(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    labels = ["yes" if place < 10 else "no" for place in range(20)]
    sites = ["a" if 5 <= place < 15 else ("b" if place < 5 else "c") for place in range(20)]
    bags = [generator.normal(size=(4, 3)) for _ in labels]
    study, features = made_cohort(tmp_path, bags, {"label": labels, "site": sites})
    run = made_run(
        study, features, LABEL, knowing(0.2), splits={"method": "site_out", "val_share": 0.2}
    )
    found = evaluate_run(EvaluateRequest(run=run, features=str(features), resamples=FEW))
    folds = numbers(found)["targets"]["label"]["folds"]
    undefined = [one for one in folds.values() if "auroc" in one["undefined"]]
    assert len(undefined) == 2
    assert "same outcome" in undefined[0]["undefined"]["auroc"]
    text = found.report.read_text(encoding="utf-8")
    assert "– means that there is no value" in text
    assert "Each site was tested by models that never saw it" in text
    missing = numbers(found)["targets"]["label"]["baselines_skipped"]["Site alone"]
    assert "a site of its own" in missing


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    """Return a copy of the run in a study of its own."""
    study = good.parents[1]
    for name in ("cohort.csv", "study.yaml"):
        (tmp_path / "s").mkdir(exist_ok=True)
        shutil.copy(study / name, tmp_path / "s" / name)
    return Path(shutil.copytree(good, tmp_path / "s" / "runs" / "good"))


def test_labelled_slides_that_the_run_lacks_are_listed(copied: Path) -> None:
    table = copied.parents[1] / "cohort.csv"
    text = table.read_text()
    last = text.splitlines()[-1]
    added = last.replace(last.split(",")[0], "nobody_trained", 1)
    table.write_text(f"{text}{added}\n")
    found = evaluate_run(EvaluateRequest(run=copied, resamples=FEW))
    assert [*found.result.left_out] == ["nobody_trained"]
    assert "nobody_trained" in found.report.read_text(encoding="utf-8")


def test_unfinished_run_is_refused(copied: Path) -> None:
    (copied / "fold_r0_f3_s1" / "member.json").unlink()
    with pytest.raises(ArtifactError, match=r"not finished \(1 of 10 .*fold_r0_f3_s1"):
        evaluate_run(EvaluateRequest(run=copied))


def test_edited_predictions_are_refused(copied: Path) -> None:
    path = copied / "predictions.csv"
    text = path.read_text().splitlines()
    path.write_text("\n".join([*text[:4], text[4].replace("yes", "no"), *text[5:]]) + "\n")
    with pytest.raises(ArtifactError, match="first at line 5"):
        evaluate_run(EvaluateRequest(run=copied))


def test_predictions_that_lack_a_case_are_refused(copied: Path) -> None:
    member = copied / "fold_r0_f0_s0" / "predictions.csv"
    gone = member.read_text().splitlines()[1].split(",")[0]
    for path in (member, copied / "predictions.csv"):
        kept = path.read_text().splitlines()
        kept.remove(next(line for line in kept if line.startswith(f"{gone},")))
        path.write_text("\n".join(kept) + "\n")
    with pytest.raises(ArtifactError, match=f"fold r0_f0, seed 0 lacks {gone}"):
        evaluate_run(EvaluateRequest(run=copied))


def test_edited_splits_and_changed_labels_are_refused(
    copied: Path, cohort: tuple[Path, Path]
) -> None:
    table = copied.parents[1] / "cohort.csv"
    text = table.read_text()
    table.write_text(text.replace(",yes,", ",no,", 1))
    with pytest.raises(ArtifactError, match="labels of label are no longer those"):
        evaluate_run(EvaluateRequest(run=copied, resamples=FEW))
    table.write_text(text)
    splits = copied / "splits.csv"
    splits.write_text(splits.read_text().replace("train", "test", 1))
    with pytest.raises(ArtifactError, match="was edited since the run was trained"):
        evaluate_run(EvaluateRequest(run=copied))


def test_features_of_another_encoder_are_refused(good: Path, tmp_path: Path) -> None:
    bags = [np.zeros((2, 7)) for _ in range(3)]
    _, other = made_cohort(tmp_path / "other", bags, {"label": ["no", "yes", "no"]})
    with pytest.raises(ConfigError, match="dimension is 7, and the run good was trained on 5"):
        evaluate_run(EvaluateRequest(run=good, features=str(other)))


def test_unknown_column_and_no_run_are_refused(good: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such column"):
        evaluate_run(EvaluateRequest(run=good, by=("hospital",), resamples=FEW))
    with pytest.raises(ConfigError, match="no run there"):
        evaluate_run(EvaluateRequest(run=tmp_path))


def test_command_prints_the_first_lines_and_where_the_report_lies(
    bagscope: Callable[..., Ran], good: Path, cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    ran = bagscope("evaluate", good, "--features", cohort[1], "--resamples", FEW)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("label: AUROC 0.")
    assert f"report: {good / 'report.html'}" in ran.out
    assert bagscope("evaluate", tmp_path).code == 2
    assert bagscope("evaluate").code == 2
    both = bagscope("evaluate", good, "--model", good)
    assert both.code == 2
    assert "leave one of the two out" in both.err
