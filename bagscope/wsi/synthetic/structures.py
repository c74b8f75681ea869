"""Glands and vessels, drawn whole: lumen, lining, nuclei, membrane."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bagscope.wsi.synthetic.noise import ramp, smooth_noise
from bagscope.wsi.synthetic.tissue_texture import ANGLES, REFERENCE_MPP, Stamp

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_VARIANTS = {"gland": 12, "tumor_gland": 12, "vessel": 6}


def draw_structures(nuclei: dict[str, list[Stamp]]) -> dict[str, list[Stamp]]:
    """Return the stamps of every kind at the reference resolution, each in eight positions."""
    import numpy as np

    drawn: dict[str, list[Stamp]] = {}
    for index, (name, count) in enumerate(_VARIANTS.items()):
        rng = np.random.default_rng([22, index])
        grain = smooth_noise(rng, 640, 640, 1.4, 1.4)
        drawn[name] = []
        for _ in range(count):
            if name == "vessel":
                stamp = _vessel(rng, grain, nuclei)
            else:
                stamp = _gland(rng, grain, nuclei, malignant=name == "tumor_gland")
            drawn[name] += _eight_positions(stamp)
    return drawn


def _gland(
    rng: np.random.Generator,
    grain: NDArray[np.float32],
    nuclei: dict[str, list[Stamp]],
    *,
    malignant: bool,
) -> Stamp:
    import numpy as np

    lining_um = rng.uniform(20, 26)
    lumen_um = rng.uniform(6, 16) if malignant else rng.uniform(9, 24)
    uneven = 0.15 if malignant else 0.05
    reach = int((lumen_um + lining_um) * (1 + 2.5 * uneven) / REFERENCE_MPP)
    radius, theta = _polar(rng, reach)
    lumen = lumen_um / REFERENCE_MPP * _outline(rng, theta, 1.6 * uneven)
    outer = (lumen_um + lining_um) / REFERENCE_MPP * _outline(rng, theta, uneven)
    # 0 at the lumen, 1 at the base.
    depth = ((radius - lumen) / np.maximum(outer - lumen, 8)).astype(np.float32)
    texture = grain[: 2 * reach + 1, : 2 * reach + 1]
    lining = ramp(radius - lumen, -2, 2) * (1 - ramp(radius - outer, -2, 2))
    # Mucus clears the part of the cells that faces the lumen; tumour cells have lost it.
    mucus = 0.0 if malignant else rng.uniform(0.35, 0.75)
    cells = np.cos(theta * rng.integers(26, 40)) * 0.5 + 0.5
    clear = mucus * ramp(0.62 - depth, -0.08, 0.18) * (0.55 + 0.45 * cells)
    e = lining * (60 + 6 * texture) * (1 - clear) + (1 - lining) * (2 + rng.uniform(0, 9))
    e = np.maximum(e, 75 * np.exp(-(((radius - outer) / 2.2) ** 2)))
    h = _bytes(lining * (24 + 4 * texture) * (1 - 0.75 * clear))
    for layer_depth, share in ((0.72, 0.95), (0.40, 0.7)) if malignant else ((0.8, 1),):
        ring_um = (lumen_um + layer_depth * lining_um) * 2 * np.pi
        count = int(ring_um / (10.5 if malignant else 5.6) * share)
        for turn in (np.arange(count) + rng.uniform(-0.25, 0.25, count)) * 2 * np.pi / count:
            wanted = layer_depth + rng.normal(0, 0.09 if malignant else 0.05)
            y, x = _on_ray(depth, wanted, turn)
            if malignant:
                stamp = nuclei["tumor"][rng.integers(len(nuclei["tumor"]))]
            else:
                # Columnar cells stand upright on their base: the nucleus points at the centre.
                stamp = oriented(
                    nuclei["columnar"], turn + rng.normal(0, 0.12), int(rng.integers(1000))
                )
            darken(h, stamp.h, y, x)
    return Stamp(h=h, e=_bytes(e), opaque=np.asarray(radius < outer + 2))


def _vessel(
    rng: np.random.Generator, grain: NDArray[np.float32], nuclei: dict[str, list[Stamp]]
) -> Stamp:
    import numpy as np

    lumen_um, wall_um = rng.uniform(7, 20), rng.uniform(3, 7)
    reach = int((lumen_um + wall_um) * 1.25 / REFERENCE_MPP)
    radius, theta = _polar(rng, reach)
    lumen = lumen_um / REFERENCE_MPP * _outline(rng, theta, 0.06)
    outer = lumen + wall_um / REFERENCE_MPP
    texture = grain[: 2 * reach + 1, : 2 * reach + 1]
    wall = ramp(radius - lumen, -2, 2)
    e = wall * (78 + 10 * texture)
    h = _bytes(wall * 10)
    # Red cells fill part of the lumen, paler in the middle, which eosin alone can show.
    yy, xx = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    for _ in range(int(rng.uniform(0.2, 0.9) * (lumen_um / 3.6) ** 2)):
        turn, far = rng.uniform(0, 6.3), np.sqrt(rng.uniform(0, 1)) * (lumen_um - 3.5)
        cy, cx = np.array([np.sin(turn), np.cos(turn)]) * max(far, 0) / REFERENCE_MPP
        away = np.sqrt((yy - cy) ** 2 + (xx - cx) ** 2) * REFERENCE_MPP
        disc = (1 - ramp(away, 2.9, 3.5)) * (1 - 0.35 * np.exp(-((away / 1.3) ** 2)))
        e = np.maximum(e, disc * (1 - wall) * rng.uniform(105, 140))
    depth = ((radius - lumen) / (wall_um / REFERENCE_MPP)).astype(np.float32)
    for turn in rng.uniform(0, 2 * np.pi, max(3, int(lumen_um * 0.5))):
        y, x = _on_ray(depth, 0.35, float(turn))
        stamp = oriented(nuclei["fibroblast"], turn + np.pi / 2, int(rng.integers(1000)))
        darken(h, stamp.h, y, x)
    return Stamp(h=h, e=_bytes(e), opaque=np.asarray(radius < outer))


def oriented(stamps: list[Stamp], angle: float, pick: int) -> Stamp:
    """Return one of the oriented stamps that lies closest to `angle` (radians, x towards y)."""
    import math

    step = round(angle / math.pi * ANGLES) % ANGLES
    return stamps[pick % (len(stamps) // ANGLES) * ANGLES + step]


def darken(target: NDArray[np.uint8], stamp: NDArray[np.uint8], y_px: int, x_px: int) -> None:
    """Raise `target` to `stamp` centred on a place, as far as it lies inside."""
    import numpy as np

    y0, x0 = y_px - stamp.shape[0] // 2, x_px - stamp.shape[1] // 2
    top, left = max(0, -y0), max(0, -x0)
    part = target[y0 + top : max(0, y0 + stamp.shape[0]), x0 + left : max(0, x0 + stamp.shape[1])]
    np.maximum(part, stamp[top : top + part.shape[0], left : left + part.shape[1]], out=part)


def _polar(rng: np.random.Generator, reach: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return radius (of a flattened circle) and angle of each pixel of a stamp."""
    import numpy as np

    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    turn, flat = rng.uniform(0, np.pi), rng.uniform(1.0, 1.35)
    along = x * np.cos(turn) + y * np.sin(turn)
    across = (-x * np.sin(turn) + y * np.cos(turn)) * flat
    return np.sqrt(along**2 + across**2).astype(np.float32), np.arctan2(y, x)


def _outline(
    rng: np.random.Generator, theta: NDArray[np.float32], spread: float
) -> NDArray[np.float32]:
    import numpy as np

    factor = np.ones_like(theta)
    for order in (2, 3, 4, 6):
        wave = np.cos(order * theta + rng.uniform(0, 6.3))
        factor += np.float32(rng.normal(0, spread / order**0.5)) * wave
    return np.clip(factor, 0.45, 1 + 2.2 * spread)


def _on_ray(depth: NDArray[np.float32], wanted: float, turn: float) -> tuple[int, int]:
    """Return the (y, x) on a ray from the centre where `depth` first reaches a value."""
    import numpy as np

    reach = depth.shape[0] // 2
    steps = np.arange(reach, dtype=np.float32)
    ys = np.rint(reach + steps * np.sin(turn)).astype(np.intp)
    xs = np.rint(reach + steps * np.cos(turn)).astype(np.intp)
    at = int(np.argmax(depth[ys, xs] >= wanted))
    return int(ys[at]), int(xs[at])


def _eight_positions(stamp: Stamp) -> list[Stamp]:
    """Return a structure turned by quarters and mirrored, so that few drawings look like many."""
    import numpy as np

    assert stamp.opaque is not None
    found = []
    for quarter in range(4):
        h, e = np.rot90(stamp.h, quarter), np.rot90(stamp.e, quarter)
        opaque = np.rot90(stamp.opaque, quarter)
        for flip in (False, True):
            step = -1 if flip else 1
            found.append(
                Stamp(
                    h=np.ascontiguousarray(h[:, ::step]),
                    e=np.ascontiguousarray(e[:, ::step]),
                    opaque=np.ascontiguousarray(opaque[:, ::step]),
                )
            )
    return found


def _bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    import numpy as np

    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
