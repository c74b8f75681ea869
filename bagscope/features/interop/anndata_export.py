"""AnnData, as h5ad or Zarr: one observation per tile, for scanpy, squidpy and their kin.

`X` is float32. `obs` has `tile_id` and `library_id` (the slide), as LazySlide's tables do, and the
corner and size of each tile. `obsm["spatial"]` are tile centres in level-0 pixels, corners where
the tile size is not known; `uns["bagscope"]["spatial"]` says which.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bagscope.artifacts import atomic_file, atomic_folder, canonical_json
from bagscope.errors import ConfigError
from bagscope.features.interop.writing import OurBag

if TYPE_CHECKING:
    from anndata import AnnData  # type: ignore[import-untyped,import-not-found,unused-ignore]


def require_anndata() -> None:
    """Refuse to start where anndata is not installed.

    Raises:
        ConfigError: with the line that installs it.
    """
    try:
        import anndata  # type: ignore[import-untyped,import-not-found,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "writing AnnData needs the package anndata; pip install anndata"
        ) from error


def plan(bag: OurBag, out: Path) -> list[Path]:
    """Return the file that `write` makes."""
    return [out / f"{bag.slide_id}.h5ad"]


def plan_zarr(bag: OurBag, out: Path) -> list[Path]:
    """Return the folder that `write_zarr` makes."""
    return [out / f"{bag.slide_id}.zarr"]


def write(bag: OurBag, out: Path) -> None:
    """Write a bag as h5ad."""
    (path,) = plan(bag, out)
    with atomic_file(path) as temporary:
        as_anndata(bag).write_h5ad(temporary)


def write_zarr(bag: OurBag, out: Path) -> None:
    """Write a bag as an AnnData Zarr, in version 2, which old and new tools read."""
    import zarr
    from anndata.io import write_elem  # type: ignore[import-untyped,import-not-found,unused-ignore]

    (path,) = plan_zarr(bag, out)
    fields = {"stage": "export", "source_sha256": bag.file.sha256}
    with atomic_folder(path, fields, replace=True) as temporary:
        write_elem(zarr.open_group(temporary, mode="w", zarr_format=2), "/", as_anndata(bag))
        # So that readers look nothing up in the folder, where `complete.json` is no array.
        zarr.consolidate_metadata(temporary, zarr_format=2)


def as_anndata(bag: OurBag) -> AnnData:
    """Return a bag as AnnData, all of it in memory."""
    import pandas as pd
    from anndata import AnnData

    file, count = bag.file, len(bag.file)
    columns: dict[str, Any] = {
        "tile_id": np.arange(count),
        "library_id": pd.Categorical([bag.slide_id] * count, categories=[bag.slide_id]),
    }
    uns: dict[str, Any] = {
        "bagscope": {
            "slide_id": bag.slide_id,
            "encoder": canonical_json(file.encoder).decode(),
            "weights_sha256": file.weights_sha256,
            "fingerprint": file.fingerprint,
        }
    }
    obsm = {}
    if file.coords_l0 is not None:
        columns["x_l0"], columns["y_l0"] = file.coords_l0.T
        extent_l0 = float(bag.attributes.get("extent_l0", 0.0))
        obsm["spatial"] = file.coords_l0 + extent_l0 / 2
        uns["bagscope"]["spatial"] = "centre_l0" if extent_l0 else "corner_l0"
        # What squidpy looks up to draw each observation in its size.
        uns["spatial"] = {
            bag.slide_id: {
                "scalefactors": {
                    "spot_diameter_fullres": extent_l0 or 1.0,
                    "tissue_hires_scalef": 1.0,
                }
            }
        }
    if bag.mpp_l0 is not None:
        uns["bagscope"]["mpp_l0"] = bag.mpp_l0
    if bag.label is not None:
        uns["bagscope"]["label"] = bag.label
    if bag.tile_labels is not None:
        columns["tile_label"] = bag.tile_labels
    obs = pd.DataFrame(columns, index=[f"{bag.slide_id}_{row}" for row in range(count)])
    var = pd.DataFrame(index=[f"f{column}" for column in range(file.features.shape[1])])
    return AnnData(X=bag.float32(), obs=obs, var=var, obsm=obsm, uns=uns)
