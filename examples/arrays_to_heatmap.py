"""From arrays to heatmaps without the command line: train, answer out of fold, draw.

    python examples/arrays_to_heatmap.py FOLDER

You bring four things: per slide the tiles' vectors (n, D) and their corners (n, 2) in level-0
pixels, and a label and a patient for each slide. Here they are made up: tiles of a tumour lie
together in one corner of every second slide.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from bagscope.heatmaps.colours import shared_scale, usual_range
from bagscope.heatmaps.geojson import write_geojson
from bagscope.heatmaps.overview import Caption, draw_overview
from bagscope.heatmaps.scores import Column, on_scale
from bagscope.heatmaps.tile_places import places_of
from bagscope.mil.cases import Case
from bagscope.mil.prediction import Panel
from bagscope.mil.sources import ArraySource
from bagscope.pipeline.estimators import MILClassifier

TILE_L0 = 512
"""Edge of a tile in level-0 pixels: 256 px at 0.5 µm, on a slide scanned at 0.25 µm."""
SLIDES, COLUMNS, ROWS, DIMENSIONS = 24, 20, 12, 16


def main(folder: Path) -> float:
    """Write a PNG and a GeoJSON for each of four slides; return the AUROC."""
    generator = np.random.default_rng(0)
    labels = np.arange(SLIDES) % 2
    patients = np.arange(SLIDES) // 4 * 2 + labels
    grid = np.stack(np.meshgrid(np.arange(COLUMNS), np.arange(ROWS)), -1).reshape(-1, 2)
    coords = [(grid * TILE_L0).astype(np.int32)] * SLIDES
    tumour = (grid < 5).all(axis=1)
    bags = [generator.normal(size=(len(grid), DIMENSIONS)).astype(np.float32) for _ in labels]
    for bag, label in zip(bags, labels, strict=True):
        bag[tumour, :4] += 3 * label

    model = MILClassifier("abmil", epochs=6, lr=3e-3, hidden=32, seed=0)
    probability, scores = np.zeros(SLIDES), {}
    for train, test in StratifiedGroupKFold(3).split(bags, labels, patients):
        fitted = clone(model).fit([bags[i] for i in train], labels[train], groups=patients[train])
        probability[test] = fitted.predict_proba([bags[i] for i in test])[:, 1]
        panel = Panel([fitted.member_])
        for i in test:
            case = Case(case_id=f"s{i}", patient_id=f"p{patients[i]}", slide_ids=(f"s{i}",))
            said = panel.ask(ArraySource([bags[i]], [case]))
            one = Column(name="", index=0)
            scores[i] = on_scale(said.scores, said.score_kind, "ratio", one)

    # The same colours on all slides; 1 is what a tile would weigh if all weighed the same.
    colours = shared_scale("ratio", "log_weight", [usual_range(one) for one in scores.values()])
    tile = {"extent_l0": TILE_L0, "mpp_x_l0": 0.25, "mpp_y_l0": 0.25}
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(4):
        places = places_of(coords[i], None, tile, len(coords[i]))
        caption = Caption(slide_id=f"s{i}", prediction=f"tumour: {probability[i]:.2f}")
        picture = draw_overview(places, scores[i], colours, caption)["png"]
        (folder / f"s{i}.png").write_bytes(picture)
        path, what = folder / f"s{i}.geojson", {"ratio": scores[i]}
        write_geojson(path, places, scores[i], colours, slide_id=f"s{i}", measurements=what)
    return float(roc_auc_score(labels, probability))


if __name__ == "__main__":
    print(f"AUROC {main(Path(sys.argv[1])):.2f}, by models that never saw the slide's patient")
