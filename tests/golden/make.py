"""Write the golden files anew: `make golden`. A change of theirs wants a changelog line.

They hold what tiling makes of one generated scan, so that numbers never change unnoticed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TILES_PATH = Path(__file__).with_name("tiles.json")


def tiling_of_the_stained_field(folder: Path) -> dict[str, Any]:
    """Tile the field of `tests.stained` and return all that a change of numerics would show in."""
    from bagscope.wsi.opening import open_slide
    from bagscope.wsi.tiles import tile_slide
    from bagscope.wsi.tiling import NUMERICS, TilingSpec
    from bagscope.wsi.tissue import METHOD
    from tests.stained import build_stained_svs

    path = build_stained_svs(folder / "golden.svs", mpp=0.5, downsamples=(1, 3.9998))
    spec = TilingSpec(mpp=0.7, tile_px=200, overlap_px=20, coarser_mpp=(1.4,))
    with open_slide(path) as slide:
        tiles = tile_slide(slide, spec).tiles
    return {
        "numerics": NUMERICS,
        "tissue_method": METHOD,
        "dropped": dict(tiles.dropped),
        "coords": tiles.coords_l0.tolist(),
        "parent": [] if tiles.parent is None else tiles.parent.tolist(),
        "tissue": [round(float(value), 3) for value in tiles.tissue],
        "sharpness": [round(float(value), 3) for value in tiles.sharpness],
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        found = tiling_of_the_stained_field(Path(scratch))
    TILES_PATH.write_text(json.dumps(found, indent=None, separators=(",", ":")) + "\n")
    sys.stdout.write(f"wrote {TILES_PATH.relative_to(ROOT)}: {len(found['coords'])} tiles\n")
