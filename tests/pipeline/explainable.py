"""A small run as training leaves it: members, bundle, features and out-of-fold scores."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bagscope.cohort.jobs import Job
from bagscope.features.store import FeatureStore
from bagscope.mil.bundle import BUNDLE_NAME, MemberPlace, write_bundle
from bagscope.mil.cases import Case
from bagscope.mil.feature_origin import origin_of
from bagscope.mil.member import load_member, save_member
from bagscope.mil.prediction import combine, prediction_columns
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.score_file import read_score_file
from bagscope.mil.sources import StoreSource
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.trainer import Trainer
from bagscope.pipeline.bundle import member_folders
from bagscope.pipeline.predict_worker import ScoreTask, score_one
from tests.features.stored import store_slide
from tests.mil.made_bags import DIMENSION, TARGET, made_recipe, made_source

TILE_L0 = 512
LEFT_L0, TOP_L0 = 100, 50
ROWS = {"a": 21, "b": 28, "c": 35, "d": 14, "e": 42}
"""Tiles of each slide, on seven columns."""


def explainable_run(
    study: Path,
    rows: dict[str, int] | None = None,
    *,
    patients: Sequence[Sequence[str]] | None = None,
    recipe: TrainSpec | None = None,
    target: TargetSpec = TARGET,
    seeds: int = 1,
) -> Path:
    """Write a study with a run of two folds; return the run's folder.

    Args:
        study: its folder.
        rows: tiles of each slide.
        patients: slides of each, where cases are patients.
        recipe: of the models.
        target: of the models.
        seeds: members per fold.
    """
    rows = rows or ROWS
    features = study / "features" / "made" / "demo"
    features.mkdir(parents=True)
    side = TILE_L0 * 7
    tile = {
        "mpp": 0.5,
        "mpp_effective": 0.5,
        "tile_px": 256,
        "tile_px_l0": TILE_L0,
        "step_l0": float(TILE_L0),
        "bounds_l0": np.array([LEFT_L0, TOP_L0, side, side], np.int64),
    }
    for slide_id, count in rows.items():
        grid = np.stack([np.arange(count) % 7, np.arange(count) // 7], axis=1).astype(np.int32)
        coords = grid * TILE_L0 + np.array([LEFT_L0, TOP_L0], np.int32)
        fields = {"slide": slide_id, "tiles": count}
        store_slide(
            features, slide_id, count, DIMENSION, tile=tile, coords_l0=coords, fields=fields
        )
    groups = [[slide_id] for slide_id in rows] if patients is None else patients
    lines = ["slide_id,path,patient_id,label"]
    cases = []
    for place, slides in enumerate(groups):
        case_id = slides[0] if patients is None else f"patient/{place}"
        targets = {target.name: (float(place % 2),)}
        cases.append(
            Case(
                case_id=case_id,
                patient_id=f"patient/{place}",
                slide_ids=tuple(slides),
                targets=targets,
            )
        )
        lines += [f"{one},{one}.svs,patient/{place},{TARGET.classes[place % 2]}" for one in slides]
    (study / "cohort.csv").write_text("\n".join(lines) + "\n")
    run = study / "runs" / "made"
    folders = _trained(run, recipe or made_recipe(training={"epochs": 2}), target, seeds)
    store = FeatureStore.open(features)
    write_bundle(
        run / BUNDLE_NAME,
        run="made",
        per="slide" if patients is None else "patient",
        origin=origin_of(store.record(slide_id) for slide_id in rows),
        members=[
            (MemberPlace(name=name, fold=int(name[1]), seed=int(name[-1])), folder)
            for name, folder in folders.items()
        ],
    )
    members = member_folders(folders)
    for place, case in enumerate(cases):
        own = tuple(one for name, one in members.items() if name.startswith(f"f{place % 2}"))
        payload = ScoreTask(
            case=case,
            members=own,
            location=str(features),
            out=run / "scores",
            device="cpu",
            threads=1,
            overwrite=False,
        )
        score_one(Job(slide_id=case.slide_ids[0], payload=payload))
    (run / "splits.csv").write_text("made\n")
    _write_predictions(run, cases, folders, target)
    return run


def features_of(run: Path, *slides: str) -> StoreSource:
    """Return the features of a case that is made of slides of a run's study."""
    store = FeatureStore.open(run.parents[1] / "features" / "made" / "demo", only=slides)
    return StoreSource(store, [Case(case_id="", patient_id="", slide_ids=slides)])


def _trained(run: Path, recipe: TrainSpec, target: TargetSpec, seeds: int) -> dict[str, Path]:
    found = {}
    for fold in range(2):
        for seed in range(seeds):
            name = f"f{fold}s{seed}"
            source = made_source(8, seed=10 * fold)
            trained = Trainer(recipe, [target], source, None, seed=10 * fold + seed).run()
            found[name] = run / name
            found[name].mkdir(parents=True)
            save_member(finish(trained, recipe, None, seed=seed, fields={}), found[name])
    return found


def _write_predictions(
    run: Path, cases: Sequence[Case], folders: dict[str, Path], target: TargetSpec
) -> None:
    rows: list[dict[str, Any]] = []
    for case in cases:
        file = read_score_file(run / "scores" / f"{case.slide_ids[0]}.h5")
        members = [load_member(folders[name]) for name in file.members]
        predicted = combine(members, file.logits[:, None])
        columns = prediction_columns([members[0].targets[0]], [case], predicted)
        row = {name: values[0] for name, values in columns.items()}
        rows.append({"case_id": case.case_id, "patient_id": case.patient_id, **row})
    with (run / "predictions.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
