"""Random fields and mosaics that repeat without a seam."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def smooth_noise(
    rng: np.random.Generator, height: int, width: int, sigma_y: float, sigma_x: float
) -> NDArray[np.float32]:
    """Return toroidal Gaussian noise, (height, width), of unit variance, smoothed by the sigmas."""
    import numpy as np
    from scipy import fft

    white = rng.standard_normal((height, width), dtype=np.float32)
    spectrum = fft.rfft2(white)
    fy = fft.fftfreq(height).astype(np.float32)[:, None]
    fx = fft.rfftfreq(width).astype(np.float32)[None, :]
    spectrum *= np.exp(-2 * np.pi**2 * ((sigma_y * fy) ** 2 + (sigma_x * fx) ** 2))
    spectrum[0, 0] = 0
    field = fft.irfft2(spectrum, s=(height, width))
    return (field / max(float(field.std()), 1e-12)).astype(np.float32)


def cell_mosaic(
    rng: np.random.Generator, size_px: int, cells: int, jitter: float = 0.9
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a toroidal mosaic of about `cells` × `cells` Voronoi cells.

    Returns:
        (size_px, size_px) distance to the nearest seed, and how much further the second nearest
        is (0 on the cells' borders), both in pixels.
    """
    import numpy as np

    pitch = size_px / cells
    offsets = (rng.random((cells, cells, 2), dtype=np.float32) - 0.5) * jitter + 0.5
    position = np.arange(size_px, dtype=np.float32) + 0.5
    own = np.minimum((position / pitch).astype(np.intp), cells - 1)
    first = np.full((size_px, size_px), np.inf, np.float32)
    second = first.copy()
    for row_step in (-1, 0, 1):
        for column_step in (-1, 0, 1):
            rows, columns = (own + row_step) % cells, (own + column_step) % cells
            seeds = offsets[rows[:, None], columns[None, :]]
            dy = (own + row_step)[:, None] * pitch + seeds[..., 0] * pitch - position[:, None]
            dx = (own + column_step)[None, :] * pitch + seeds[..., 1] * pitch - position[None, :]
            distance = np.sqrt(dy * dy + dx * dx, dtype=np.float32)
            second = np.minimum(second, np.maximum(first, distance))
            first = np.minimum(first, distance)
    return first, second - first


def ramp(values: NDArray[np.floating], low: float, high: float) -> NDArray[np.float32]:
    """Return 0 below `low`, 1 above `high`, smooth between."""
    import numpy as np

    t = np.clip((values - low) / (high - low), 0, 1).astype(np.float32)
    return np.asarray(t * t * (3 - 2 * t), np.float32)
