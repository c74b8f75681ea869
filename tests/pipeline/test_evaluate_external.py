from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from bagscope.cohort.progress import SilentReporter
from bagscope.errors import ConfigError
from bagscope.features.store import FeatureStore
from bagscope.mil.bundle import MemberPlace, write_bundle
from bagscope.mil.feature_origin import origin_of
from bagscope.mil.member import save_member
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.trainer import Trainer
from bagscope.pipeline.evaluate_external import ExternalRequest, evaluate_external
from tests.mil.made_bags import TARGET, made_bags, made_recipe, made_source
from tests.pipeline.made_runs import made_cohort

CASES = 16


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a bundle of two members, and the folder of another cohort."""
    folder = tmp_path_factory.mktemp("elsewhere")
    bags, labels = made_bags(CASES, seed=9)
    columns = {
        "label": ["yes" if label else "no" for label in labels],
        "scanner": ["x" if place < 4 else "y" for place in range(CASES)],
    }
    _, features = made_cohort(folder, bags, columns)
    members = []
    for seed in range(2):
        trained = Trainer(made_recipe(), [TARGET], made_source(8), None, seed=seed).run()
        save_member(finish(trained, made_recipe(), None, seed=seed, fields={}), folder / f"m{seed}")
        members.append((MemberPlace(name=f"m{seed}", seed=seed), folder / f"m{seed}"))
    store = FeatureStore.open(features)
    origin = origin_of(store.record(slide) for slide in store.slide_ids)
    bundle = folder / "model.bagscope"
    write_bundle(bundle, run="first", per="slide", origin=origin, members=members, final=None)
    return bundle, folder


@pytest.mark.slow
def test_report_of_another_cohort_holds_what_its_predictions_say(
    elsewhere: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle, folder = elsewhere
    found = evaluate_external(
        ExternalRequest(
            model=bundle,
            cohort=folder / "cohort.csv",
            features=str(folder / "features"),
            out=tmp_path / "out",
            by=("scanner",),
            resamples=200,
        ),
        SilentReporter(),
    )
    table = pd.read_csv(tmp_path / "out" / "predictions" / "predictions.csv")
    stated = json.loads(found.metrics.read_text(encoding="utf-8"))["targets"]["label"]
    expected = roc_auc_score(table["label"] == "yes", table["label_p_yes"])
    assert stated["pooled"]["auroc"]["value"] == pytest.approx(expected, abs=1e-9)
    assert [one["cases"] for one in stated["subgroups"]["scanner"]] == [4, 12]
    assert stated["baselines"] == {}
    text = found.report.read_text(encoding="utf-8")
    assert "first on cohort" in text and "another than the model was trained on" in text
    assert "/tmp" not in text


def test_no_labels_and_unknown_columns_are_refused(
    elsewhere: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle, folder = elsewhere
    bare = tmp_path / "bare.csv"
    table = pd.read_csv(folder / "cohort.csv", dtype=str)
    table.drop(columns="label").to_csv(bare, index=False)
    features = str(folder / "features")
    with pytest.raises(ConfigError, match="no labels of label"):
        evaluate_external(
            ExternalRequest(model=bundle, cohort=bare, features=features, out=tmp_path / "a"),
            SilentReporter(),
        )
    with pytest.raises(ConfigError, match="--by hospital: no such column"):
        evaluate_external(
            ExternalRequest(
                model=bundle,
                cohort=folder / "cohort.csv",
                features=features,
                out=tmp_path / "b",
                by=("hospital",),
            ),
            SilentReporter(),
        )
    assert np.all([not (tmp_path / name / "report.html").exists() for name in "ab"])
