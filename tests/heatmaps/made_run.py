"""A run's folder with score files that were never computed, beside the slides that they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagscope.artifacts import Json
from bagscope.mil.bags import ScoreKind
from bagscope.mil.score_file import ScoreFile, write_score_file
from tests.builders import build_svs

TILE_PX = 128


def made_study(folder: Path, slide_ids: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """Write a study of small slides; return the folder of its run, without scores yet."""
    (folder / "slides").mkdir(parents=True)
    lines = ["slide_id,path,patient_id"]
    for seed, slide_id in enumerate(slide_ids):
        build_svs(folder / "slides" / f"{slide_id}.svs", width_px=512, height_px=384, seed=seed)
        lines.append(f"{slide_id},slides/{slide_id}.svs,patient_{seed}")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n")
    run = folder / "runs" / "abmil"
    run.mkdir(parents=True)
    return run


def write_scores(
    run: Path,
    slide_id: str,
    scores: NDArray[np.floating],
    *,
    kind: ScoreKind = "log_weight",
    names: tuple[str, ...] = ("0",),
    case: dict[str, Json] | None = None,
    places: bool = True,
    width_l0: int = 512,
    **known: Any,
) -> None:
    """Write the score file of tiles on a lattice of four columns; `known` are further fields."""
    count, members = len(scores), len(known.get("member_scores", [0]))
    grid = np.stack([np.arange(count) % 4, np.arange(count) // 4], axis=1).astype(np.int32)
    tile = {
        "width_l0": width_l0,
        "height_l0": 384,
        "bounds_l0": [0, 0, width_l0, 384],
        "mpp_x_l0": 0.5,
        "mpp_y_l0": 0.5,
        "extent_l0": float(TILE_PX),
        "step_l0": float(TILE_PX),
        "origin_l0": [0.0, 0.0],
    }
    write_score_file(
        run / "scores" / f"{slide_id}.h5",
        ScoreFile(
            slide_id=slide_id,
            case_id=(case or {}).get("case", slide_id),
            fields=case or {"stage": "scores", "case": slide_id, "slides": {slide_id: "f"}},
            members=tuple(f"m{place}" for place in range(members)),
            scores=np.asarray(scores, np.float32),
            score_kind=kind,
            score_names=names,
            coords_l0=grid * TILE_PX if places else None,
            grid=grid if places else None,
            tile=tile if places else {},
            logits=np.zeros((members, 2)),
            embedding=np.zeros((members, 3), np.float32),
            ood_distance=np.zeros(members),
            **known,
        ),
    )
