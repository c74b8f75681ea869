"""Builders that several rooms' tests share: small slides whose every property is chosen.

`build_svs` writes an Aperio-style pyramid of known pixels: colours that change with the position
(so that a shifted or swapped read shows), with detail fine enough for a wrong scale to show too.
For slides that look like tissue see `bagscope.wsi.synthetic`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from bagscope.wsi.synthetic.jpeg_tiles import Subsampling
from bagscope.wsi.synthetic.svs_writer import AssociatedName, SvsHeader, write_pyramid

LABEL_RGB = (255, 0, 255)
"""The colour of built `label` and `macro` images: no other pixel of a built slide has it."""


def field_rgb(
    width_px: int, height_px: int, *, mpp: float = 0.5, seed: int = 0
) -> NDArray[np.uint8]:
    """Return (height_px, width_px, 3) uint8 RGB: gradients and waves in µm, plus a little noise.

    The waves stand in micrometres, so that the same field "scanned" at another mpp looks the same.
    """
    x_um = (np.arange(width_px, dtype=np.float32) + 0.5) * mpp
    y_um = (np.arange(height_px, dtype=np.float32) + 0.5) * mpp
    x, y = x_um[None, :], y_um[:, None]
    red = 150 + 50 * np.sin(x / 23) * np.cos(y / 31) + 20 * np.sin(x / 3.7)
    green = 120 + 60 * np.sin((x + y) / 47) + 20 * np.cos(y / 4.3)
    blue = 160 + 40 * np.cos(x / 61) + 30 * np.sin(y / 13)
    image = np.stack(np.broadcast_arrays(red, green, blue), axis=-1)
    noise = np.random.default_rng(seed).normal(0, 3, (height_px, width_px, 1))
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def level_size_px(width_px: int, height_px: int, downsample: float) -> tuple[int, int]:
    """Return (width, height) of a level; a size that does not divide makes the ratio fractional."""
    return max(1, round(width_px / downsample)), max(1, round(height_px / downsample))


def build_svs(
    path: Path,
    *,
    width_px: int = 1024,
    height_px: int = 768,
    mpp: float | None = 0.5,
    objective: float | None = 20,
    downsamples: Sequence[float] = (1, 4),
    level_sizes_px: Sequence[tuple[int, int]] | None = None,
    subsampling: Subsampling = "4:2:2",
    quality: int = 80,
    tile_px: int = 256,
    bigtiff: bool = False,
    image: NDArray[np.uint8] | None = None,
    seed: int = 0,
    associated: Sequence[AssociatedName] = (),
    description: Mapping[str, str] | None = None,
) -> list[NDArray[np.uint8]]:
    """Write an Aperio-style SVS; return its levels' pixels as they were before JPEG.

    Args:
        path: the file to make; its folder must exist.
        width_px, height_px: of level 0; ignored where `image` is given.
        mpp: as stated in the file, or None to leave it out.
        objective: as stated in the file, or None to leave it out.
        downsamples: of the levels; sizes are rounded, so 2399 px at 4 is a downsample of 3.998.
        level_sizes_px: sizes of all levels, in place of `downsamples`.
        subsampling, quality, tile_px: of the JPEG tiles.
        bigtiff: write a BigTIFF.
        image: (height, width, 3) uint8 RGB of level 0, in place of `field_rgb`.
        seed: of the field's noise.
        associated: names to add: a small picture of the slide as thumbnail, plain `LABEL_RGB`
            for label and macro.
        description: further `key = value` entries of the image description.
    """
    if image is None:
        image = field_rgb(width_px, height_px, mpp=mpp or 0.5, seed=seed)
    height_px, width_px = image.shape[:2]
    sizes = level_sizes_px or [level_size_px(width_px, height_px, d) for d in downsamples]
    levels = [
        image
        if (width_px, height_px) == tuple(size)
        else np.asarray(cv2.resize(image, tuple(size), interpolation=cv2.INTER_AREA), np.uint8)
        for size in sizes
    ]
    pictures: dict[AssociatedName, NDArray[np.uint8]] = {}
    for name in associated:
        if name == "thumbnail":
            size = level_size_px(width_px, height_px, max(width_px, height_px) / 256)
            small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            pictures[name] = np.asarray(small, np.uint8)
        else:
            pictures[name] = np.full((96, 128, 3), LABEL_RGB, np.uint8)
    write_pyramid(
        path,
        levels,
        tile_px=tile_px,
        header=SvsHeader(mpp=mpp, objective=objective, extra=dict(description or {})),
        quality=quality,
        subsampling=subsampling,
        force_bigtiff=bigtiff,
        associated=pictures,
    )
    return levels
