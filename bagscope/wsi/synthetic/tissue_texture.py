"""Textures and stamps that tissue is composed from: fibres, fat, cells, nuclei, glands, vessels.

Everything is drawn once per process as concentration bytes (see `stain`) at `REFERENCE_MPP`, then
resized to the scan's resolution. Textures repeat without a seam every `PERIOD_UM`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagscope.wsi.synthetic.noise import cell_mosaic, ramp, smooth_noise

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REFERENCE_MPP = 0.25
PERIOD_UM = 256.0
ANGLES = 24
"""Orientations that elongated nuclei come in, over half a turn."""

_PERIOD_PX = round(PERIOD_UM / REFERENCE_MPP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """A small picture to be laid over tissue, centred on its place.

    Attributes:
        h, e: (height, width) concentration bytes; a nucleus has the second stain only where it
            is marked.
        opaque: (height, width) bool, where the stamp replaces what lies under it; None for a
            nucleus, which only darkens.
    """

    h: NDArray[np.uint8]
    e: NDArray[np.uint8]
    opaque: NDArray[np.bool_] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TissueKit:
    """All textures and stamps at one resolution.

    Attributes:
        mpp: micrometres per pixel.
        period_px: after which the textures repeat.
        textures: (period_px, period_px, 4) uint8: eosin of fibres, eosin of fat, eosin of
            cytoplasm, and a blob field (128 ± 48 per standard deviation) that outlines nests.
        nuclei: kind → stamps; "fibroblast" holds `ANGLES` orientations of each of its variants.
        structures: kind → stamps of whole glands and vessels.
    """

    mpp: float
    period_px: int
    textures: NDArray[np.uint8]
    nuclei: dict[str, list[Stamp]]
    structures: dict[str, list[Stamp]]


@functools.lru_cache(maxsize=2)
def tissue_kit(mpp: float) -> TissueKit:
    """Return the kit at a resolution; the last two are kept."""
    from bagscope.wsi.synthetic.nuclei import draw_nuclei
    from bagscope.wsi.synthetic.structures import draw_structures

    if mpp == REFERENCE_MPP:
        nuclei = draw_nuclei()
        return TissueKit(
            mpp=mpp,
            period_px=_PERIOD_PX,
            textures=_draw_textures(),
            nuclei=nuclei,
            structures=draw_structures(nuclei),
        )
    reference = tissue_kit(REFERENCE_MPP)
    period_px = round(PERIOD_UM / mpp)
    return TissueKit(
        mpp=mpp,
        period_px=period_px,
        textures=_resized(reference.textures, period_px / _PERIOD_PX),
        nuclei={k: [_resized_stamp(s, mpp) for s in v] for k, v in reference.nuclei.items()},
        structures={
            k: [_resized_stamp(s, mpp) for s in v] for k, v in reference.structures.items()
        },
    )


def _draw_textures() -> NDArray[np.uint8]:
    import numpy as np

    rng = np.random.default_rng(20)
    size = _PERIOD_PX
    channels = [_fibres(rng, size), _fat(rng, size), _cytoplasm(rng, size)]
    blobs = smooth_noise(rng, size, size, 34, 34) + 0.35 * smooth_noise(rng, size, size, 9, 9)
    channels.append(128 + 48 * blobs / blobs.std())
    stacked = np.stack(channels, axis=-1)
    return np.clip(np.rint(stacked), 0, 255).astype(np.uint8)


def _fibres(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Collagen: wavy bundles of eosin with clefts of light between them."""
    import cv2
    import numpy as np

    bundles = smooth_noise(rng, size, size, 6, 38) + 0.7 * smooth_noise(rng, size, size, 2.2, 18)
    strands = smooth_noise(rng, size, size, 0.9, 8)
    clefts = smooth_noise(rng, size, size, 4, 26) + 0.65 * smooth_noise(rng, size, size, 1.4, 9)
    straight = np.stack([bundles / bundles.std(), strands, clefts / clefts.std()], axis=-1)
    wave_y = 13 * smooth_noise(rng, size, size, 45, 45) + 4 * smooth_noise(rng, size, size, 16, 16)
    wave_x = 16 * smooth_noise(rng, size, size, 60, 60)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    wavy = cv2.remap(
        straight,
        np.mod(x + wave_x, size),
        np.mod(y + wave_y, size),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_WRAP,
    )
    body = 72 + 18 * wavy[..., 0] + 10 * wavy[..., 1] + 3 * smooth_noise(rng, size, size, 0.7, 0.7)
    open_part = ramp(np.asarray(wavy[..., 2], np.float32), 0.85, 1.25)
    return np.asarray(np.clip(body, 26, 160) * (1 - 0.94 * open_part), np.float32)


def _fat(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Fat: empty round cells in a net of thin walls."""
    import cv2
    import numpy as np

    coarse = 4
    nearest, gap = cell_mosaic(rng, size // coarse, 5)
    # Round the corners: near a third neighbour the wall thickens.
    walls = cv2.resize(gap, (size, size), interpolation=cv2.INTER_CUBIC) * coarse
    far = cv2.resize(nearest, (size, size), interpolation=cv2.INTER_CUBIC) * coarse
    width = 4.5 + 0.05 * np.clip(far - 70, 0, None) ** 1.2
    body = 1 - ramp(np.asarray(walls - width, np.float32), 0, 5)
    grain = smooth_noise(rng, size, size, 1.5, 1.5)
    return np.asarray(body * (58 + 7 * grain) + 1.5, np.float32)


def _cytoplasm(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Cytoplasm of close-lying cells: granular, paler towards the borders."""
    import cv2
    import numpy as np

    _, gap = cell_mosaic(rng, size // 2, 22)
    border = cv2.resize(gap, (size, size), interpolation=cv2.INTER_LINEAR) * 2
    pale = 1 - ramp(np.asarray(border, np.float32), 0, 5)
    grain = smooth_noise(rng, size, size, 1.2, 1.2) * 5 + smooth_noise(rng, size, size, 5, 5) * 6
    slow = smooth_noise(rng, size, size, 30, 30) * 6
    return np.asarray((58 + grain + slow) * (1 - 0.4 * pale), np.float32)


def _resized(image: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    import cv2
    import numpy as np

    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size, interpolation=how), np.uint8)


def _resized_stamp(stamp: Stamp, mpp: float) -> Stamp:
    import numpy as np

    scale = REFERENCE_MPP / mpp
    opaque = stamp.opaque
    if opaque is not None:
        opaque = _resized(opaque.astype(np.uint8) * 255, scale) > 127
    return Stamp(h=_resized(stamp.h, scale), e=_resized(stamp.e, scale), opaque=opaque)
