"""A known field of stained tissue on glass, as scans of any pixel size would show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.builders import build_svs

FIELD_UM = (1600.0, 1200.0)
# Ellipses (centre x, y, radii) of tissue in micrometres.
TISSUE_UM = ((560.0, 560.0, 420.0, 380.0), (1300.0, 700.0, 180.0, 320.0))


def stained_field(mpp: float) -> np.ndarray:
    """Draw the field as a scan at `mpp` would show it: nuclei on eosin, on white glass."""
    width, height = (round(side / mpp) for side in FIELD_UM)
    y, x = (np.mgrid[0:height, 0:width].astype(np.float32) + 0.5) * np.float32(mpp)
    image = np.full((height, width, 3), 243, np.float32)
    for cx, cy, rx, ry in TISSUE_UM:
        inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
        nuclei = (np.sin(x / 1.7) * np.sin(y / 1.9) + np.sin(x / 9.1 + y / 7.3)) > 0.55
        image[inside] = (222, 150, 190)
        image[inside & nuclei] = (110, 70, 150)
    noise = np.random.default_rng(0).normal(0, 2, image.shape[:2])[..., None]
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def build_stained_svs(
    path: Path, *, mpp: float = 0.5, downsamples: tuple[float, ...] = (1, 4), seed: int = 0
) -> Path:
    """Write the field as an Aperio-style SVS; another seed is another slide of the same tissue."""
    image = stained_field(mpp)
    if seed:
        noise = np.random.default_rng(seed).integers(-3, 4, image.shape[:2])[..., None]
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    build_svs(path, mpp=mpp, objective=None, downsamples=downsamples, image=image, quality=90)
    return path
