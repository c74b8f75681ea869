"""What every reader of a foreign layout returns, and the reading that they share.

Frames:
    corner_l0  top-left corner in level-0 pixels, as ours
    corner_um  top-left corner in micrometres
    centre_l0  centre of the tile in level-0 pixels
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from bagscope.errors import BagscopeError, SchemaError, in_one_line
from bagscope.wsi.slide import RectL0, Spacing

Frame = Literal["corner_l0", "corner_um", "centre_l0"]
Layout = Literal[
    "atlaspatch", "clam", "hs2p", "plain", "slideflow", "stamp", "torchmil", "trident", "unreadable"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One bag of a foreign layout, found and not yet read.

    Attributes:
        layout: who wrote it.
        slide_id: as the layout names it.
        path: the file that holds the features.
        key: which bag of a file that holds several.
        companions: further files that belong to it: "coords", "tiling", "labels", ...
    """

    layout: Layout
    slide_id: str
    path: Path
    key: str = ""
    companions: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideFacts:
    """What an import takes from the slide itself: pixel size, size, levels, identity."""

    spacing: Spacing | None
    width_l0: int | None = None
    height_l0: int | None = None
    bounds_l0: RectL0 | None = None
    downsamples: tuple[float, ...] = ()
    identity: Mapping[str, int | str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignBag:
    """A bag as its file holds it, in the units of that file.

    Attributes:
        features: (N, D) of any floating dtype.
        coords: (N, 2) or wider, x and y first, in `frame`; None where the layout has none.
        frame: what `coords` mean.
        encoder: as the layout calls it; empty where it does not say.
        tile_px: edge of a tile as the encoder was given it.
        extent_l0: edge of a tile's footprint in level-0 pixels.
        tile_um: the same in micrometres, where the layout states that.
        mpp: micrometres per tile pixel that were asked for.
        mpp_l0: micrometres per level-0 pixel, where the layout knows.
        overlap_px: between neighbours, in tile pixels.
        width_l0: of the slide.
        height_l0: of the slide.
        label: of the bag, as text.
        tile_labels: (N,), one per tile.
        warnings: sentences for the user.
    """

    features: NDArray[Any]
    coords: NDArray[Any] | None = None
    frame: Frame = "corner_l0"
    encoder: str = ""
    tile_px: int | None = None
    extent_l0: float | None = None
    tile_um: float | None = None
    mpp: float | None = None
    mpp_l0: float | None = None
    overlap_px: int | None = None
    width_l0: int | None = None
    height_l0: int | None = None
    label: str | None = None
    tile_labels: NDArray[Any] | None = None
    warnings: tuple[str, ...] = ()


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say in one sentence what a library says of a file that it can't read.

    Raises:
        SchemaError: in place of whatever the library raised.
    """
    try:
        yield
    except BagscopeError:
        raise
    # Parsers raise whatever comes to hand on damaged bytes: TokenError, struct.error, zlib.error.
    except Exception as error:
        said = in_one_line(error)[:160]
        raise SchemaError(f"{path}: can't be read ({said}); get or make the file again") from error


def load_tensor(path: Path) -> NDArray[Any]:
    """Read a `.pt` file that holds one tensor, without executing pickles.

    Raises:
        SchemaError: damaged, or not one tensor.
    """
    import torch

    with readable(path):
        value = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(value, list):
        raise SchemaError(
            f"{path}: holds a list of {len(value)} tensors, as eva writes it, without the tiles' "
            "places; stack them into one tensor (N, D) first"
        )
    if not isinstance(value, torch.Tensor):
        raise SchemaError(f"{path}: holds {type(value).__name__}, expected one tensor (N, D)")
    with readable(path):
        array: NDArray[Any] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array


def as_features(path: Path, values: NDArray[Any]) -> NDArray[Any]:
    """Return features as (N, D); one bag as a batch, (1, N, D), is unwrapped.

    Raises:
        SchemaError: of another shape, or not numbers.
    """
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 1 and len(values) == 0:
        return np.zeros((0, 0), np.float32)
    if values.ndim == 1:
        raise SchemaError(
            f"{path}: features are {values.shape}, one vector for the whole slide; give the file "
            "with one vector per tile"
        )
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise SchemaError(
            f"{path}: features are {values.dtype} {values.shape}, expected numbers (N, D)"
        )
    return values


def as_coords(path: Path, values: NDArray[Any]) -> NDArray[Any]:
    """Return coordinates as (N, 2) or wider; (1, N, 2) is unwrapped.

    Raises:
        SchemaError: of another shape, or not numbers.
    """
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "fiu":
        raise SchemaError(
            f"{path}: coordinates are {values.dtype} {values.shape}, expected numbers (N, 2)"
        )
    return values


def attributes_of(item: h5py.Dataset | h5py.File | h5py.Group) -> dict[str, Any]:
    """Return HDF5 attributes as plain values; what stands for nothing ("None") is left out."""
    found = {}
    for name, value in item.attrs.items():
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        elif isinstance(value, np.generic):
            value = value.item()
        if not isinstance(value, str) or value not in ("None", ""):
            found[name] = value
    return found


def number(
    attributes: Mapping[str, Any], name: str, *, path: Path, positive: bool = True
) -> float | None:
    """Return an attribute as a number, or None where it is absent.

    Raises:
        SchemaError: it is there and is no such number.
    """
    value = attributes.get(name)
    if value is None:
        return None
    try:
        result = float(np.asarray(value).reshape(-1)[0])
    except (TypeError, ValueError, IndexError):
        result = float("nan")
    if not np.isfinite(result) or (positive and result <= 0):
        raise SchemaError(f"{path}: {name} is {value!r}, expected a number above 0")
    return result


def whole(attributes: Mapping[str, Any], name: str, *, path: Path) -> int | None:
    """Return an attribute as a whole number, or None where it is absent (see `number`)."""
    value = number(attributes, name, path=path, positive=False)
    return None if value is None else round(value)


def label_text(value: Any) -> str:
    """Return a label as text; 1.0 is the class 1."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(int(value)) if isinstance(value, bool) else str(value)
