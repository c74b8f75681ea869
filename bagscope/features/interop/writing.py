"""What the writers of foreign layouts share: a bag of ours at hand, and what they may ask of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from bagscope.errors import SlideError
from bagscope.features.feature_file import FeatureFile, read_feature_file
from bagscope.features.interop.foreign import readable

_UNPORTABLE = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class OurBag:
    """A feature file and what goes with it into another tool's layout.

    Attributes:
        file: the opened feature file.
        encoder: its name, as it may stand in a path.
        label: of the bag, None where there is none.
        tile_labels: (N,), one per tile, None where there are none.
    """

    file: FeatureFile
    encoder: str
    label: str | None = None
    tile_labels: NDArray[Any] | None = None

    @property
    def slide_id(self) -> str:
        """Return the slide's id."""
        return self.file.slide_id

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Return the file's attributes, those of the tiling among them."""
        return self.file.attributes

    @property
    def mpp_l0(self) -> float | None:
        """Return micrometres per level-0 pixel, the mean of both axes, where it is known."""
        if "mpp_x_l0" not in self.attributes or "mpp_y_l0" not in self.attributes:
            return None
        return (float(self.attributes["mpp_x_l0"]) + float(self.attributes["mpp_y_l0"])) / 2

    def float32(self) -> NDArray[np.float32]:
        """Return the vectors (N, D), which float16 and float32 give without a loss."""
        return np.asarray(self.file.features, np.float32)


def open_bag(path: Path, *, encoder: str | None = None, label: str | None = None) -> OurBag:
    """Open a feature file for export.

    Raises:
        ArtifactError: missing, or not a feature file.
    """
    file = read_feature_file(path)
    with readable(path), h5py.File(path, "r") as content:
        tile_labels = content["tile_labels"][()] if "tile_labels" in content else None
    name = _UNPORTABLE.sub("_", encoder or str(file.encoder.get("name", "unknown")))
    return OurBag(file=file, encoder=name, label=label, tile_labels=tile_labels)


def coords_for(bag: OurBag, layout: str) -> NDArray[np.int32]:
    """Return the tiles' corners (N, 2).

    Raises:
        SlideError: the bag never was a slide.
    """
    if bag.file.coords_l0 is None:
        raise SlideError(
            f"{bag.file.path}: holds no coordinates, without which {layout} files can't be made; "
            "write it as torchmil or anndata"
        )
    return bag.file.coords_l0


def required(bag: OurBag, layout: str, *names: str) -> list[float]:
    """Return attributes as numbers.

    Raises:
        SlideError: one of them is not known.
    """
    missing = [name for name in names if name not in bag.attributes]
    if missing:
        raise SlideError(
            f"{bag.file.path}: {layout} files need {', '.join(missing)}, which is not known here; "
            "import the features again with --slides TABLE or --mpp"
        )
    return [float(bag.attributes[name]) for name in names]
