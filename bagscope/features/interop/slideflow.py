"""slideflow: `<slide>.pt`, `<slide>.index.npz` with tile centres, `bags_config.json`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bagscope.artifacts import read_json
from bagscope.errors import SchemaError
from bagscope.features.interop.foreign import (
    ForeignBag,
    SlideFacts,
    Source,
    as_coords,
    as_features,
    load_tensor,
    number,
    readable,
    whole,
)

INDEX_SUFFIX = ".index.npz"
CONFIG_NAME = "bags_config.json"


def find_companions(path: Path, slide_id: str) -> dict[str, Path]:
    """Return the index and the configuration that lie beside a `.pt`, as far as they do."""
    index, config = path.with_name(slide_id + INDEX_SUFFIX), path.with_name(CONFIG_NAME)
    found = {"coords": index, "config": config}
    return {name: file for name, file in found.items() if file.is_file()}


def read(source: Source, slide: SlideFacts | None) -> ForeignBag:
    """Read a bag that slideflow wrote.

    Raises:
        SchemaError: the files are not what slideflow writes, or don't state the tile size.
    """
    index = source.companions["coords"]
    with readable(index), np.load(index) as arrays:
        if "locations" in arrays:
            raise SchemaError(f"{index}: is the index of a TFRecord; give the folder of bags")
        coords = as_coords(index, arrays["arr_0"])
    config = source.companions.get("config")
    if config is None:
        raise SchemaError(
            f"{source.path}: no {CONFIG_NAME} beside it, which holds the tile size; copy it there"
        )
    values = read_json(config)
    if not isinstance(values, dict):
        raise SchemaError(f"{config}: holds {type(values).__name__}, expected a block of settings")
    extractor = values.get("extractor", "")
    if isinstance(extractor, dict):
        extractor = extractor.get("class", "")
    if isinstance(values.get("tile_um"), str):
        raise SchemaError(
            f"{config}: tile_um is {values['tile_um']!r}, a magnification and not micrometres; "
            "write the tile's edge in µm there"
        )
    tile_um, tile_px = number(values, "tile_um", path=config), whole(values, "tile_px", path=config)
    if tile_um is None:
        raise SchemaError(f"{config}: lacks tile_um, the tile's edge in µm; add it")
    return ForeignBag(
        features=as_features(source.path, load_tensor(source.path)),
        coords=coords,
        frame="centre_l0",
        encoder=str(extractor),
        tile_px=tile_px,
        tile_um=tile_um,
        mpp=tile_um / tile_px if tile_px else None,
    )
