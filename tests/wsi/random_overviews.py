"""Random slide overviews with exact truth masks: what tissue segmentation has to stand up to.

Knows nothing of the segmenter. A scene is light through glass: glass colour × illumination ×
exp(-optical density of stains and inks) × shadows and bubbles, then sensor noise, padding and
JPEG. Sizes are in pixels of 8 µm unless a name says otherwise.

Truth: `tissue` is everything stained that belongs to a fragment of at least `SMALLEST_UM2`, and
openings smaller than that belong to it (fat vacuoles, cracks, small lumina); ink is never tissue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

MPP = 8.0
SMALLEST_UM2 = 10_000.0

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Optical density per unit of stain in (R, G, B); directions as published for H, E and DAB, of
# which each scene uses a tilted copy.
HAEMATOXYLIN = (0.65, 0.70, 0.29)
EOSIN = (0.10, 0.95, 0.25)
DAB = (0.27, 0.57, 0.78)
INKS = {
    "red": (0.10, 1.6, 1.3),
    "green": (1.5, 0.45, 0.95),
    "blue": (1.7, 1.15, 0.25),
    "black": (1.7, 1.7, 1.65),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """An overview and what is on it.

    Attributes:
        rgb: (H, W, 3) uint8.
        tissue, pen, fold: (H, W) bool; `fold` lies inside `tissue`.
        traits: what was drawn, for tables of failures.
    """

    rgb: NDArray[np.uint8]
    tissue: Mask
    pen: Mask
    fold: Mask
    traits: Mapping[str, object] = field(default_factory=dict)


def random_scene(seed: int) -> Scene:
    """Draw one scene; the same seed gives the same pixels."""
    rng = np.random.default_rng([seed, 77])
    shape = (int(rng.integers(420, 760)), int(rng.integers(480, 900)))
    traits: dict[str, object] = {}

    tissue, soft = _fragments(rng, shape, traits)
    contrast = _pick(rng, {"strong": 0.64, "pale": 0.22, "faint": 0.14})
    density = _stained(rng, tissue, soft, contrast, traits)
    fold = _folds(rng, tissue, density, traits)
    glass = _glass(rng, shape, traits)
    drop = {"strong": (45, 110), "pale": (16, 40), "faint": (5, 10)}[contrast]
    wanted = float(rng.uniform(*drop))
    density *= _strength_for(density[tissue], glass[tissue], wanted)
    traits |= {"contrast": contrast, "grey_drop": round(wanted, 1)}
    light = glass * np.exp(-density)

    _shadows(rng, light, traits)
    _bubbles(rng, light, traits)
    _dust(rng, light, traits)
    pen = _pen_marks(rng, light, traits)
    light = cv2.GaussianBlur(light, (0, 0), float(rng.uniform(0.3, 0.7)))
    light += rng.normal(0, rng.uniform(0.3, 2.5), light.shape).astype(np.float32)
    rgb = np.clip(np.rint(light), 0, 255).astype(np.uint8)

    padded = _pad(rng, rgb, tissue | pen, traits)
    rgb = _jpeg(rng, rgb, traits)
    pen &= ~padded
    tissue &= ~padded & ~pen
    return Scene(rgb=rgb, tissue=tissue, pen=pen, fold=fold & tissue, traits=traits)


# --- shapes ---------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    weights = np.array(list(shares.values()))
    return str(rng.choice(list(shares), p=weights / weights.sum()))


def _noise(
    rng: np.random.Generator,
    shape: tuple[int, int],
    scale_px: float,
    octaves: int = 3,
    stretch: float = 1.0,
) -> Floats:
    """Return smooth noise of unit spread whose largest features are about `scale_px` wide."""
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        step = max(1.0, scale_px / 2**octave)
        grid = (int(shape[0] / step) + 3, int(shape[1] / (step * stretch)) + 3)
        cells = rng.standard_normal(grid).astype(np.float32)
        fine = cv2.resize(cells, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
        total += fine * np.float32(0.6**octave)
    return total / max(float(total.std()), 1e-6)


def _fibres(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Return streaky noise in a random direction."""
    size = int(np.hypot(*shape)) + 8
    streaks = _noise(rng, (size, size), 4, 2, stretch=float(rng.uniform(3, 8)))
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), float(rng.uniform(0, 180)), 1.0)
    turned = cv2.warpAffine(streaks, turn, (size, size), borderMode=cv2.BORDER_REFLECT)
    y, x = (size - shape[0]) // 2, (size - shape[1]) // 2
    return turned[y : y + shape[0], x : x + shape[1]]


def _fragments(
    rng: np.random.Generator, shape: tuple[int, int], traits: dict[str, object]
) -> tuple[Mask, Floats]:
    """Return the truth mask (small openings filled) and the rendered coverage in [0, 1]."""
    layout = _pick(rng, {"resection": 0.4, "pieces": 0.35, "cores": 0.25})
    height, width = shape
    yy, xx = np.mgrid[:height, :width].astype(np.float32)
    inside = np.full(shape, -9.0, np.float32)
    coarse = _noise(rng, shape, min(shape) / 3)
    ragged = _noise(rng, shape, float(rng.uniform(6, 16)))
    count = {"resection": 1, "pieces": int(rng.integers(2, 7)), "cores": int(rng.integers(2, 5))}
    for i in range(count[layout]):
        if layout == "cores":
            angle = float(rng.uniform(-0.35, 0.35))
            a, b = width * rng.uniform(0.28, 0.45), float(rng.uniform(28, 60))
            cx, cy = width * rng.uniform(0.4, 0.6), height * (i + 0.5) / count[layout]
            cy += float(rng.uniform(-15, 15))
        else:
            angle = float(rng.uniform(0, np.pi))
            size = 0.42 if layout == "resection" else float(rng.uniform(0.12, 0.26))
            a = min(shape) * size * rng.uniform(0.9, 1.3)
            b = min(shape) * size * rng.uniform(0.6, 1.0)
            spread = 0.08 if layout == "resection" else 0.34
            cx = width * (0.5 + rng.uniform(-spread, spread))
            cy = height * (0.5 + rng.uniform(-spread, spread))
        dx, dy = xx - cx, yy - cy
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / a
        v = (-dx * np.sin(angle) + dy * np.cos(angle)) / b
        if layout == "cores":
            v = v + 0.5 * coarse
        np.maximum(inside, 1 - np.sqrt(u * u + v * v), out=inside)
    inside += 0.13 * coarse + float(rng.uniform(0.02, 0.06)) * ragged
    solid = inside > 0
    if rng.random() < 0.6:
        lumen = _noise(rng, shape, float(rng.uniform(25, 70)), 3)
        solid &= lumen < float(rng.uniform(1.5, 2.2))
        traits["holes"] = True
    rendered = _without_small(solid)
    truth = ~_without_small(~rendered)
    traits |= {"layout": layout, "tissue_share": round(float(truth.mean()), 3)}
    return truth, cv2.GaussianBlur(rendered.astype(np.float32), (0, 0), 0.7)


def _without_small(mask: Mask) -> Mask:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    keep = stats[:, cv2.CC_STAT_AREA] * MPP**2 >= SMALLEST_UM2
    keep[0] = False
    return keep[labels]


# --- stains ---------------------------------------------------------------------------------


def _stained(
    rng: np.random.Generator,
    tissue: Mask,
    soft: Floats,
    contrast: str,
    traits: dict[str, object],
) -> Floats:
    """Return optical density (H, W, 3) of the tissue, to be scaled.

    No fat in faint tissue: its walls would be fainter than one step of the JPEG's quantisation.
    """
    shape = tissue.shape
    stain = _pick(rng, {"he": 0.72, "dab": 0.28})
    first, second = (_tilted(rng, v) for v in (HAEMATOXYLIN, EOSIN if stain == "he" else DAB))
    epithelium = 1 / (1 + np.exp(-3 * _noise(rng, shape, float(rng.uniform(30, 120)))))
    grain = cv2.GaussianBlur(rng.standard_normal(shape).astype(np.float32), (0, 0), 0.8) * 2
    clumps = np.clip(_noise(rng, shape, float(rng.uniform(8, 20)), 2) - 1.2, 0, 2)
    fibres = _fibres(rng, shape)
    nuclei = (0.25 + 0.75 * epithelium) * np.clip(1 + 0.35 * grain, 0.1, 3) + 0.8 * clumps
    ground = np.clip(1.2 - 0.5 * epithelium + 0.3 * fibres, 0.25, 3)
    if stain == "dab":
        # DAB marks some cells and leaves the rest to a weak counterstain; a section that is
        # faint altogether is a negative one, with next to no marks.
        rare = rng.uniform(1.2, 1.8) if contrast == "faint" else rng.uniform(-1, 1.2)
        marked = np.clip(_noise(rng, shape, float(rng.uniform(15, 60))) - rare, 0, 2)
        ground, nuclei = marked * (1 + 0.3 * grain).clip(0.1, 3), 0.6 * nuclei + 0.25
    open_space = soft.copy()
    if rng.random() < 0.5:
        cracks = np.abs(_noise(rng, shape, float(rng.uniform(18, 40)), 3, stretch=2.5)) < 0.03
        open_space *= 1 - 0.9 * cracks.astype(np.float32)
        traits["cracks"] = True
    if rng.random() < 0.22 and contrast != "faint":
        fat = (_noise(rng, shape, 90) > float(rng.uniform(0.9, 1.6))).astype(np.float32)
        walls = _cell_walls(rng, shape, float(rng.uniform(7, 12)))
        open_space *= 1 - fat * (1 - walls)
        traits["fat"] = round(float(fat[tissue].mean()), 3)
    uneven = np.clip(1 + float(rng.uniform(0, 0.3)) * _noise(rng, shape, 150, 2), 0.35, 2)
    amounts = np.stack([nuclei, ground]) * (open_space * uneven)
    traits["stain"] = stain
    density = np.einsum("shw,sc->hwc", amounts, np.stack([first, second]))
    return np.ascontiguousarray(density, np.float32)


def _tilted(rng: np.random.Generator, vector: tuple[float, float, float]) -> Floats:
    tilted = np.array(vector) * rng.uniform(0.8, 1.2, 3)
    return (tilted / np.linalg.norm(tilted)).astype(np.float32)


def _cell_walls(rng: np.random.Generator, shape: tuple[int, int], spacing_px: float) -> Floats:
    """Return thin walls between cells about `spacing_px` apart."""
    count = int(shape[0] * shape[1] / spacing_px**2)
    seeds = np.ones(shape, np.uint8)
    seeds[rng.integers(0, shape[0], count), rng.integers(0, shape[1], count)] = 0
    _, labels = cv2.distanceTransformWithLabels(
        seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    walls = np.zeros(shape, np.float32)
    walls[:, 1:] = labels[:, 1:] != labels[:, :-1]
    walls[1:] = np.maximum(walls[1:], labels[1:] != labels[:-1])
    return cv2.GaussianBlur(walls, (0, 0), 0.6).clip(0, 1)


def _strength_for(density: Floats, glass: Floats, wanted_drop: float) -> float:
    """Return the factor on density that darkens the tissue by `wanted_drop` grey levels."""
    density, glass = density[::7], glass[::7]
    low, high = 0.0, 20.0
    for _ in range(25):
        middle = (low + high) / 2
        drop = float((glass * (1 - np.exp(-middle * density))).mean())
        low, high = (middle, high) if drop < wanted_drop else (low, middle)
    return (low + high) / 2


def _folds(
    rng: np.random.Generator, tissue: Mask, density: Floats, traits: dict[str, object]
) -> Mask:
    """Double the tissue along a few curved bands; return where."""
    fold = np.zeros(tissue.shape, np.uint8)
    if rng.random() < 0.4:
        rows = np.argwhere(tissue)
        for _ in range(int(rng.integers(1, 4))):
            y, x = rows[rng.integers(len(rows))]
            curve = _curve(rng, (float(x), float(y)), float(rng.uniform(40, 160)), 0.25)
            cv2.polylines(fold, [curve], False, 1, int(rng.integers(5, 13)))
        traits["folds"] = True
    mask = (fold > 0) & tissue
    times = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.8) * float(rng.uniform(0.9, 1.6))
    density *= 1 + times[..., None]
    return mask


def _curve(
    rng: np.random.Generator, start: tuple[float, float], length_px: float, bend: float
) -> NDArray[np.int32]:
    steps = max(8, int(length_px / 6))
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, steps))
    moves = np.stack([np.cos(heading), np.sin(heading)], 1) * (length_px / steps)
    return np.rint(np.array(start) + np.cumsum(moves, 0)).astype(np.int32)


# --- glass, and what lies on it ---------------------------------------------------------------


def _glass(rng: np.random.Generator, shape: tuple[int, int], traits: dict[str, object]) -> Floats:
    kind = _pick(rng, {"white": 0.75, "grey": 0.25})
    level = float(rng.uniform(226, 250) if kind == "white" else rng.uniform(150, 215))
    colour = level + rng.normal(0, 3.5, 3)
    yy, xx = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    angle, tilt, bowl = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.05), rng.uniform(0, 0.05)
    field = 1 + tilt * (np.cos(angle) * xx + np.sin(angle) * yy) - bowl * (xx**2 + yy**2) / 2
    field /= field.max()
    traits |= {"glass": kind, "falloff": round(1 - float(field.min()), 3)}
    return (field[..., None] * colour).clip(0, 254).astype(np.float32)


def _shadows(rng: np.random.Generator, light: Floats, traits: dict[str, object]) -> None:
    """Darken soft neutral areas, in place."""
    if rng.random() >= 0.3:
        return
    shape = light.shape[:2]
    shade = np.zeros(shape, np.float32)
    for _ in range(int(rng.integers(1, 4))):
        blot = np.zeros(shape, np.float32)
        centre = (int(rng.integers(shape[1])), int(rng.integers(shape[0])))
        axes = (int(rng.integers(30, 160)), int(rng.integers(15, 80)))
        cv2.ellipse(blot, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
        blot = cv2.GaussianBlur(blot, (0, 0), float(rng.uniform(14, 40)))
        shade = np.maximum(shade, blot * float(rng.uniform(0.02, 0.08)))
    light *= (1 - shade)[..., None]
    traits["shadows"] = round(float(shade.max()), 3)


def _bubbles(rng: np.random.Generator, light: Floats, traits: dict[str, object]) -> None:
    """Draw air bubbles, in place: a dark thin rim with a bright inner line, a changed inside."""
    if rng.random() >= 0.25:
        return
    shape = light.shape[:2]
    for _ in range(int(rng.integers(1, 4))):
        centre = (int(rng.integers(shape[1])), int(rng.integers(shape[0])))
        axes = (int(rng.integers(20, 110)), int(rng.integers(20, 110)))
        turn = float(rng.uniform(0, 180))
        layers = np.zeros((3, *shape), np.float32)
        cv2.ellipse(layers[0], centre, axes, turn, 0, 360, 1.0, -1)
        cv2.ellipse(layers[1], centre, axes, turn, 0, 360, 1.0, int(rng.integers(1, 4)))
        inner = (max(2, axes[0] - 4), max(2, axes[1] - 4))
        cv2.ellipse(layers[2], centre, inner, turn, 0, 360, 1.0, 1)
        rim = cv2.GaussianBlur(layers[1], (0, 0), 0.8)
        gain = (
            1 + layers[0] * float(rng.uniform(-0.012, 0.008)) - rim * float(rng.uniform(0.1, 0.5))
        )
        light *= (gain + 0.03 * layers[2])[..., None]
    traits["bubbles"] = True


def _dust(rng: np.random.Generator, light: Floats, traits: dict[str, object]) -> None:
    """Sprinkle small dark specks and short fibres, in place."""
    if rng.random() >= 0.5:
        return
    shape = light.shape[:2]
    specks = np.zeros(shape, np.float32)
    for _ in range(int(rng.integers(3, 40))):
        x, y = int(rng.integers(shape[1])), int(rng.integers(shape[0]))
        if rng.random() < 0.85:
            cv2.circle(specks, (x, y), int(rng.integers(0, 4)), float(rng.uniform(0.2, 0.8)), -1)
        else:
            fibre = _curve(rng, (x, y), float(rng.uniform(10, 40)), 0.3)
            cv2.polylines(specks, [fibre], False, float(rng.uniform(0.2, 0.6)), 1)
    tint = 1 - rng.uniform(0.85, 1, 3) * cv2.GaussianBlur(specks, (0, 0), 0.6)[..., None]
    light *= tint.astype(np.float32)
    traits["dust"] = True


def _pen_marks(rng: np.random.Generator, light: Floats, traits: dict[str, object]) -> Mask:
    """Draw strokes, rings, crosses and writing in one or two inks, in place; return where."""
    shape = light.shape[:2]
    pen = np.zeros(shape, bool)
    if rng.random() >= 0.45:
        return pen
    names = [str(name) for name in rng.choice(list(INKS), int(rng.integers(1, 3)), replace=False)]
    for _ in range(int(rng.integers(1, 4))):
        name = names[int(rng.integers(len(names)))]
        mark = np.zeros(shape, np.uint8)
        wide = int(rng.integers(14, 60))
        start = (float(rng.uniform(0, shape[1])), float(rng.uniform(0, shape[0])))
        kind = _pick(rng, {"stroke": 0.4, "ring": 0.25, "dots": 0.1, "writing": 0.25})
        if kind == "ring":
            axes = (int(rng.integers(60, 180)), int(rng.integers(60, 180)))
            centre = (int(start[0]), int(start[1]))
            cv2.ellipse(mark, centre, axes, float(rng.uniform(0, 180)), 0, 340, 1, wide // 2 + 5)
        elif kind == "dots":
            for _ in range(int(rng.integers(1, 5))):
                spot = (int(rng.integers(shape[1])), int(rng.integers(shape[0])))
                cv2.circle(mark, spot, wide // 2 + 6, 1, -1)
        elif kind == "writing":
            for i in range(int(rng.integers(2, 6))):
                letter = (start[0] + i * wide * 2.5, start[1])
                curve = _curve(rng, letter, float(rng.uniform(60, 160)), 0.6)
                cv2.polylines(mark, [curve], False, 1, max(8, wide // 3))
        else:
            curve = _curve(rng, start, float(rng.uniform(100, 500)), 0.12)
            cv2.polylines(mark, [curve], False, 1, wide)
        ink = np.array(INKS[name]) * rng.uniform(0.85, 1.15, 3) * rng.uniform(0.55, 1.4)
        body = mark.astype(np.float32) * (1 + 0.12 * _noise(rng, shape, 40, 2)).clip(0.6, 1.4)
        rim = mark - cv2.erode(mark, np.ones((5, 5), np.uint8))
        body = cv2.GaussianBlur(body * (1 + 0.25 * rim), (0, 0), 1.0)
        light *= np.exp(-body[..., None] * ink.astype(np.float32))
        pen |= mark > 0
    # Ink stops no light completely: the scanner's lens scatters some.
    light[:] = light * 0.97 + 6.0
    traits |= {"pen": "+".join(sorted(names)), "pen_share": round(float(pen.mean()), 3)}
    return pen


# --- the scanner ------------------------------------------------------------------------------


def _pad(
    rng: np.random.Generator, rgb: NDArray[np.uint8], content: Mask, traits: dict[str, object]
) -> Mask:
    """Replace unscanned areas by one colour, in place; return where."""
    kind = _pick(rng, {"none": 0.66, "frame": 0.12, "blocks": 0.12, "cut": 0.1})
    padded = np.zeros(content.shape, bool)
    if kind == "none":
        return padded
    height, width = content.shape
    fill = _pick(rng, {"black": 0.55, "grey": 0.25, "white": 0.2})
    grey = {"black": rng.integers(0, 12), "grey": rng.integers(100, 225), "white": 255}[fill]
    if kind == "frame":
        top, bottom = (int(rng.integers(0, height // 7)) for _ in range(2))
        left, right = (int(rng.integers(0, width // 7)) for _ in range(2))
        padded[:] = True
        padded[top : height - bottom, left : width - right] = False
    elif kind == "blocks":
        edge = int(rng.integers(50, 120))
        for y in range(0, height, edge):
            for x in range(0, width, edge):
                cell = np.s_[y : y + edge, x : x + edge]
                padded[cell] = not content[cell].any()
    else:
        reach = 2 * int(rng.integers(10, 41)) + 1
        near = cv2.dilate(content.astype(np.uint8), np.ones((reach, reach), np.uint8))
        padded[:] = near == 0
    rgb[padded] = int(grey)
    traits["padding"] = f"{fill} {kind}"
    return padded


def _jpeg(
    rng: np.random.Generator, rgb: NDArray[np.uint8], traits: dict[str, object]
) -> NDArray[np.uint8]:
    quality = int(rng.integers(30, 91))
    sampling = [
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ][int(rng.integers(3))]
    height, width = rgb.shape[:2]
    finer = bool(rng.random() < 0.5)
    if finer:
        # The overview is averaged from a stored level of half the pixel size.
        rgb = np.asarray(cv2.resize(rgb, (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR))
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    _, encoded = cv2.imencode(".jpg", rgb[..., ::-1], options)
    traits |= {"quality": quality, "finer": finer}
    decoded = np.ascontiguousarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1])
    if finer:
        decoded = cv2.resize(decoded, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(decoded, np.uint8)
