"""Tissue, pen and fold masks against the truth of random overviews.

    python benchmarks/tissue_quality.py [--record] [--first 61000] [--count 400]

The generator draws stain, brightness, JPEG quality, light, backgrounds, faint tissue, ink, shadows,
folds, bubbles and dust. Seeds that the segmenter was tuned on (0 to 1000, 40000 to 40200, 50000 to
50040, 60000 to 60040) prove nothing: take fresh ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import recording

sys.path.insert(0, str(Path(__file__).parents[1]))

from bagscope.wsi.tissue import segment_tissue
from tests.wsi.random_overviews import random_scene
from tests.wsi.test_tissue_quality import judge


def main() -> None:
    """Judge, compare with the targets, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    parser.add_argument("--first", type=int, default=61_000)
    parser.add_argument("--count", type=int, default=400)
    arguments = parser.parse_args()
    ious: dict[str, list[float]] = defaultdict(list)
    inked = caught = clean = lost = 0
    ms_per_mpx = []
    for seed in range(arguments.first, arguments.first + arguments.count):
        scene = random_scene(seed)
        started = time.perf_counter()
        got = segment_tissue(scene.rgb, mpp=8.0)
        ms_per_mpx.append((time.perf_counter() - started) * 1e9 / (scene.tissue.size))
        judged = judge(scene, got)
        for kind in ("all", str(scene.traits["contrast"])):
            ious[kind].append(judged.iou)
        inked += int(np.count_nonzero(judged.inked))
        caught += int(np.count_nonzero(judged.inked & judged.excluded))
        clean += int(np.count_nonzero(judged.clean))
        lost += int(np.count_nonzero(judged.clean & judged.excluded))
    rows = [
        recording.Row("tissue IoU, 5th percentile", _percentile(ious["all"], 5), "", at_least=0.9),
        recording.Row("tissue IoU, median", _percentile(ious["all"], 50), "", at_least=0.95),
        recording.Row("tissue IoU, worst", min(ious["all"]), ""),
        *(
            recording.Row(
                f"tissue IoU, median, {kind} ({len(ious[kind])})", np.median(ious[kind]), ""
            )
            for kind in sorted(ious.keys() - {"all"})
        ),
        recording.Row("inked tiles excluded", caught / inked, "", at_least=0.9),
        recording.Row("clean tissue tiles excluded", lost / clean, ""),
        recording.Row("time per megapixel, median", float(np.median(ms_per_mpx)), "ms"),
    ]
    recording.show(rows)
    if arguments.record:
        packages = ["numpy", "opencv-python-headless"]
        recording.record("tissue", rows, packages=packages, script="tissue_quality.py")


def _percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, share))


if __name__ == "__main__":
    main()
