"""Runs that look as if they had been trained: their predictions are what a test says."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bagscope import artifacts
from bagscope.features.feature_file import FeatureHeader, write_feature_file
from bagscope.mil.cases import Case
from bagscope.mil.prediction_table import target_columns
from bagscope.mil.splits.plan import SplitSpec
from bagscope.mil.targets import TargetSpec
from bagscope.pipeline.run_folder import claim_run
from bagscope.pipeline.study import init_study, open_study
from bagscope.pipeline.train import (
    PREDICTIONS_NAME,
    TrainRequest,
    gather_predictions,
    plan_training,
)

Says = Callable[[Case, int], Sequence[float]]
"""What a model says of a case under a seed: probabilities, one value, or one risk."""


def made_cohort(
    folder: Path, bags: Sequence[np.ndarray], columns: Mapping[str, Sequence[object]]
) -> tuple[Path, Path]:
    """Write bags and a cohort table as a study; return the study and the feature folder."""
    features = folder / "features"
    features.mkdir(parents=True)
    names = [f"s{place:03d}" for place in range(len(bags))]
    for name, bag in zip(names, bags, strict=True):
        grid = np.stack([np.arange(len(bag)), np.zeros(len(bag))], axis=1).astype(np.int32)
        header = FeatureHeader(
            slide_id=name,
            fields={"slide": name},
            encoder={"name": "made"},
            weights_sha256="ab" * 32,
            coords_l0=grid * 512,
            grid=grid,
            tile={"mpp": 0.25, "mpp_effective": 0.5, "tile_px": 256},
        )
        write_feature_file(features / f"{name}.h5", header, bag.astype(np.float32), dtype="float32")
    rows = [
        {"slide_id": name, "path": f"{name}.svs", "patient_id": f"p{place:03d}"}
        | {column: str(values[place]) for column, values in columns.items()}
        for place, name in enumerate(names)
    ]
    table = folder / "cohort.csv"
    with table.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    init_study(folder / "study", str(table))
    return folder / "study", features


def made_run(
    study: Path,
    features: Path,
    target: TargetSpec,
    says: Says,
    *,
    name: str = "made",
    seeds: tuple[int, ...] = (0,),
    split: str = "default",
    splits: Mapping[str, Any] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> Path:
    """Write a run whose members say what `says` says; return its folder."""
    opened = open_study(study)
    if splits is not None:
        spec = opened.spec.model_copy(update={"splits": SplitSpec.model_validate(splits)})
        opened = dataclasses.replace(opened, spec=spec)
    request = TrainRequest(
        targets=(target,), name=name, seeds=seeds, split=split, features=str(features)
    )
    planned = plan_training(opened, request)
    claim_run(planned, overwrite=False)
    resolved = next(iter(planned.members.values())).targets[0]
    for member, test in planned.tests.items():
        values = np.array([says(case, test.seed) for case in test.cases], np.float64)
        if resolved.task == "regression":
            values = values[:, 0]
        limits = dict(thresholds or {})
        columns: dict[str, list[Any]] = {
            "case_id": [case.case_id for case in test.cases],
            "patient_id": [case.patient_id for case in test.cases],
            "site": [case.site for case in test.cases],
            "repeat": [test.repeat] * len(test.cases),
            "fold": [test.fold] * len(test.cases),
            "seed": [test.seed] * len(test.cases),
            **target_columns(
                resolved,
                [case.targets[resolved.name] for case in test.cases],
                values,
                ("risk",) if resolved.task == "survival" else resolved.classes,
                limits.get(resolved.name),
            ),
        }
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        artifacts.write_text(planned.folder / member / PREDICTIONS_NAME, text.getvalue())
        artifacts.write_json(
            planned.folder / member / "member.json",
            {
                "schema_version": 1,
                "seed": test.seed,
                "epoch": 3,
                "epochs": 5,
                "temperatures": {},
                "uncalibrated": {resolved.name: "class no has 4 validation patients"},
                "thresholds": limits,
                "recipe": planned.config["recipe"],
                "targets": planned.config["targets"],
                # What nobody asks of a model that is not run again.
                "objective": {},
                "fields": {},
                "weights_sha256": "",
            },
        )
    gather_predictions(planned.folder, list(planned.tests.values()))
    return planned.folder
