"""Slides with coordinates and lattices in a feature store, as an extraction leaves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bagscope.features.feature_file import FeatureHeader, write_feature_file
from bagscope.features.store import FeatureStore
from bagscope.mil.cases import Case


def store_slides(
    folder: Path, counts: dict[str, int], *, dimension: int = 3, without_grid: str = ""
) -> FeatureStore:
    """Write slides whose features tell slide and row: (100 · slide + row) + 1000 · column."""
    for number, (slide_id, count) in enumerate(counts.items()):
        places = np.arange(count)
        vectors = (100 * number + places)[:, None] + 1000 * np.arange(dimension)[None]
        grid = np.stack([places % 4, places // 4], axis=1).astype(np.int32)
        has_grid = slide_id != without_grid
        header = FeatureHeader(
            slide_id=slide_id,
            fields={"stage": "import", "slide": slide_id},
            encoder={"name": "planted"},
            weights_sha256="ab" * 32,
            coords_l0=grid * 512,
            grid=grid if has_grid else None,
            tile={"tile_px": 256, "mpp_effective": 0.5, "mpp": 0.25},
            recorded={},
        )
        write_feature_file(
            folder / f"{slide_id}.h5", header, vectors.astype(np.float32), dtype="float32"
        )
    return FeatureStore.open(folder)


def case_of(name: str, *slide_ids: str, label: float = 0.0) -> Case:
    """Return a case of slides, all of one patient."""
    return Case(
        case_id=name,
        patient_id=f"p-{name}",
        slide_ids=slide_ids or (name,),
        targets={"label": (label,)},
    )
