"""The tiling that scores are of, and whether a slide's file is still the one that was tiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bagscope.errors import ArtifactError, SlideError
from bagscope.wsi.identity import slide_identity
from bagscope.wsi.tile_file import TileFile, read_tile_file


def find_tiling(
    tilings: Path | None, slide_id: str, coords_l0: NDArray[np.int32] | None
) -> TileFile | None:
    """Return the tile file with a slide's scored tiles, None where there is none.

    Args:
        tilings: folder of a study's tilings.
        slide_id: of the slide.
        coords_l0: (n, 2) top-left corners (x, y) of the scored tiles.
    """
    if tilings is None or coords_l0 is None:
        return None
    for path in sorted(tilings.glob(f"*/{slide_id}.h5")):
        try:
            found = read_tile_file(path)
        except ArtifactError:
            continue  # its own stage says so
        if np.array_equal(found.coords_l0, coords_l0):
            return found
    return None


def require_tiled_slide(slide: Path, tiles: TileFile | None, slide_id: str) -> None:
    """Refuse a file whose pixels are not what the model saw; of unknown tiles nothing is known.

    Raises:
        SlideError: it is not the file that was tiled, or can't be read.
    """
    if tiles is not None and tiles.fields.get("slide") != slide_identity(slide):
        raise SlideError(
            f"{slide_id}: {slide.name} is not the file that was tiled (its size or content "
            "changed), so its pixels are not what the model saw; correct its path in the cohort, "
            "or tile, extract and predict anew"
        )
