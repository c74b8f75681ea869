"""A small run to be reviewed: slides, scores, predictions and what its model says of itself."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from bagscope import artifacts
from tests.heatmaps.made_run import made_study, write_scores

KEYS = {"site": "", "repeat": 0, "fold": 0, "seed": 0}
LABEL = {"label": {"task": "classes", "classes": ["normal", "tumor"]}}


def reviewed_run(folder: Path, ids: Sequence[str] = ("a", "b", "c")) -> Path:
    """Write a study and return its run: every slide is a tumor, and the first is called one."""
    run = made_study(folder, tuple(ids))
    rng = np.random.default_rng(0)
    for slide_id in ids:
        scores = special.log_softmax(rng.normal(0, 2, (12, 1)), axis=0)
        write_scores(run, slide_id, scores)
    rows = [
        label_row(slide_id, f"patient_{place}", "tumor", 0.9 if place == 0 else 0.2, fold=place)
        for place, slide_id in enumerate(ids)
    ]
    write_predictions(run, rows)
    write_model(run, LABEL, {"label": 0.5})
    return run


def label_row(case: str, patient: str, truth: str, chance: float, **cells: Any) -> dict[str, Any]:
    """Return a row of a table of predictions of two classes."""
    return {
        "case_id": case,
        "patient_id": patient,
        **KEYS,
        **cells,
        "label": truth,
        "label_predicted": "tumor" if chance >= 0.5 else "normal",
        "label_p_normal": 1 - chance,
        "label_p_tumor": chance,
    }


def write_predictions(run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table of predictions."""
    with (run / "predictions.csv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_model(
    run: Path, targets: Mapping[str, Mapping[str, Any]], thresholds: Mapping[str, float]
) -> None:
    """Write what a model bundle says of its targets."""
    artifacts.write_json(
        run / "model.bagscope" / "bundle.json",
        {"models": {"m": {"targets": targets, "thresholds": thresholds}}},
    )


def told(content: bytes | Path, function: str) -> Any:
    """Return what a script hands to the page."""
    text = (content.read_bytes() if isinstance(content, Path) else content).decode("ascii")
    head = f"bagscope.{function}("
    assert text.startswith(head)
    assert text.endswith(");\n")
    return json.loads(text[len(head) : -3])
