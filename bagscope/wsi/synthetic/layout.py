"""Where things are on a synthetic slide: outlines, compartments, tumour, and each nucleus.

Fields are sampled every `FIELD_STEP_UM` in micrometres, so that a layout knows nothing of pixels
and one seed gives one field at every resolution. Frame: `_um` from level 0's top-left corner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bagscope.wsi.synthetic.noise import smooth_noise
from bagscope.wsi.synthetic.tissue_texture import REFERENCE_MPP, tissue_kit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.synthetic.spec import SyntheticSpec

FIELD_STEP_UM = 8.0
NEST_THRESHOLD = 122
"""Above this value of the kit's blob texture, tumour grows in a nest."""

MARKED_EVERY = 4

_DEEP_UM = 1e4
_STRIP_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """Smooth functions of the position, (rows, columns) float32 each.

    Attributes:
        depth_um: how deep inside the tissue (negative outside).
        fibre_u_um, fibre_v_um: where in the texture a point lies; fibres run along lines of
            constant v.
        fat: above 0 inside fat.
        gland: above 0 where glands grow.
        lymph: above 0 inside lymphocyte clusters.
        thickness: factor on all stain.
        tumor_um: about how deep inside tumour (negative outside).
    """

    depth_um: NDArray[np.float32]
    fibre_u_um: NDArray[np.float32]
    fibre_v_um: NDArray[np.float32]
    fat: NDArray[np.float32]
    gland: NDArray[np.float32]
    lymph: NDArray[np.float32]
    thickness: NDArray[np.float32]
    tumor_um: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Things to be stamped, ordered by y.

    Attributes:
        kinds: what each `kind` number stands for.
        x_um, y_um: (N,) float32 centres.
        kind: (N,) uint8.
        angle: (N,) float32 along the fibres, radians.
        pick: (N,) uint16 random number that chooses the variant.
        in_tumor: (N,) bool.
    """

    kinds: tuple[str, ...]
    x_um: NDArray[np.float32]
    y_um: NDArray[np.float32]
    kind: NDArray[np.uint8]
    angle: NDArray[np.float32]
    pick: NDArray[np.uint16]
    in_tumor: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Everything on a slide but its artefacts.

    `normal_*` is the tissue as if there were no tumour; inside tumour, `tumor_*` stands instead.
    Where `marked`, one nucleus in `MARKED_EVERY` carries the second stain, as DAB does.
    """

    marked: bool
    fields: Fields
    normal_structures: Places
    normal_nuclei: Places
    tumor_structures: Places
    tumor_nuclei: Places


def plan_layout(spec: SyntheticSpec) -> Layout:
    """Draw the layout of a slide from its seed."""
    import numpy as np

    width_um, height_um = spec.width_px * spec.mpp, spec.height_px * spec.mpp
    rng = np.random.default_rng([1, spec.seed])
    shape = tuple(int(np.ceil(edge / FIELD_STEP_UM)) + 1 for edge in (height_um, width_um))
    depth_um, turn = _fragments(rng, shape, spec.tissue_fraction)
    tumor_um = _tumor(np.random.default_rng([2, spec.seed]), depth_um, spec.tumor_fraction)
    rng = np.random.default_rng([3, spec.seed])
    fields = _compartments(rng, depth_um, tumor_um, turn, spec.variety)
    return _populate(rng, width_um, height_um, fields, marked=spec.stain == "dab")


def sample(
    field: NDArray[np.float32], x_um: NDArray[np.float32], y_um: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return a field's values at points, bilinear, clamped at the borders: (N,) float32."""
    import numpy as np

    x = np.clip(x_um / FIELD_STEP_UM, 0, field.shape[1] - 1.001)
    y = np.clip(y_um / FIELD_STEP_UM, 0, field.shape[0] - 1.001)
    column, row = x.astype(np.intp), y.astype(np.intp)
    fx, fy = x - column, y - row
    upper = field[row, column] * (1 - fx) + field[row, column + 1] * fx
    lower = field[row + 1, column] * (1 - fx) + field[row + 1, column + 1] * fx
    return np.asarray(upper * (1 - fy) + lower * fy, np.float32)


# --- fields ---------------------------------------------------------------------------------


def _fragments(
    rng: np.random.Generator, shape: tuple[int, ...], tissue_fraction: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the depth inside the fragments, and each point's fibre direction (by fragment)."""
    import numpy as np

    rows, columns = shape
    edge = min(shape)
    y, x = np.arange(rows, dtype=np.float32)[:, None], np.arange(columns, dtype=np.float32)[None]
    count = int(rng.integers(1, 4)) + int(max(shape) > 1.6 * edge)
    near = np.full(shape, np.inf, np.float32)
    turn = np.zeros(shape, np.float32)
    for k in range(count):
        # Fragments take their turn along the longer side, so that they seldom merge.
        along, across = (k + rng.uniform(0.35, 0.65)) / count, rng.uniform(0.36, 0.64)
        cy, cx = (
            (along * rows, across * columns)
            if rows >= columns
            else (across * rows, along * columns)
        )
        angle, flat = rng.uniform(0, np.pi), rng.uniform(1.0, 1.9)
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        a = ((x - cx) * cos + (y - cy) * sin) / flat**0.5
        b = ((cx - x) * sin + (y - cy) * cos) * flat**0.5
        away = np.hypot(a, b, out=a)
        away /= edge / count**0.5 * rng.uniform(0.75, 1.15)
        turn[away < near] = rng.uniform(0, np.pi)
        near = np.minimum(near, away)
    shape2 = (rows, columns)
    rough = 0.16 * smooth_noise(rng, *shape2, edge / 9, edge / 9)
    rough += 0.06 * smooth_noise(rng, *shape2, edge / 30, edge / 30)
    rough += 0.012 * smooth_noise(rng, *shape2, 3, 3)
    score = np.subtract(rough, near, out=rough)
    border = np.minimum(np.minimum(x, columns - 1 - x), np.minimum(y, rows - 1 - y))
    score -= 0.8 * np.clip(1 - border / (0.06 * edge), 0, None)
    holes = smooth_noise(rng, *shape2, edge / 28, edge / 28) - 2.15
    threshold = float(np.quantile(score, 1 - tissue_fraction))
    inside = (score > threshold) & (holes < 0)
    inside = _without_specks(inside, max(12, inside.sum() // 400))
    return _signed_depth(inside), turn


def _without_specks(mask: NDArray[np.bool_], smallest: int) -> NDArray[np.bool_]:
    """Drop islands, and fill holes, of fewer than `smallest` cells."""
    import cv2
    import numpy as np

    for target in (True, False):
        _, labels, stats, _ = cv2.connectedComponentsWithStats((mask == target).astype(np.uint8))
        small = stats[:, cv2.CC_STAT_AREA] < (smallest if target else smallest // 6)
        small[0] = False
        mask = np.where(small[labels], not target, mask)
    return mask


def _signed_depth(inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    import cv2
    import numpy as np

    def distance(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        padded = np.pad(mask.astype(np.uint8), 1, mode="edge")
        found = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
        return np.asarray(found, np.float32)

    cells = np.where(inside, distance(inside) - 0.5, 0.5 - distance(~inside))
    smooth = cv2.GaussianBlur(cells.astype(np.float32), (0, 0), 0.8)
    return np.asarray(np.clip(smooth * FIELD_STEP_UM, -_DEEP_UM, _DEEP_UM), np.float32)


def _tumor(
    rng: np.random.Generator, depth_um: NDArray[np.float32], tumor_fraction: float
) -> NDArray[np.float32]:
    """Return how deep inside tumour each point is; the tumour's share of the tissue is exact."""
    import numpy as np

    if tumor_fraction <= 0:
        return np.full(depth_um.shape, -_DEEP_UM, np.float32)
    rows, columns = depth_um.shape
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    tissue = depth_um > 0
    area = float(tissue.sum()) * tumor_fraction
    # Seeds lie inside the tissue, as far in as a focus of that size needs.
    count = int(rng.integers(1, 4)) if area > 400 else 1
    radius = (area / count / np.pi) ** 0.5
    wanted = min(radius * FIELD_STEP_UM, float(np.quantile(depth_um[tissue], 0.85)))
    candidates = np.flatnonzero(depth_um >= wanted)
    near = np.full(depth_um.shape, np.inf, np.float32)
    for place in rng.choice(candidates, count):
        cy, cx = divmod(int(place), columns)
        away = np.sqrt((x - cx) ** 2 + (y - cy) ** 2) / (radius * rng.uniform(0.75, 1.3))
        near = np.minimum(near, away)
    uneven = max(2.0, radius / 3)
    score = 0.13 * smooth_noise(rng, rows, columns, uneven, uneven) - near
    threshold = float(np.quantile(score[tissue], 1 - tumor_fraction))
    return np.asarray((score - threshold) * radius * FIELD_STEP_UM, np.float32)


def _compartments(
    rng: np.random.Generator,
    depth_um: NDArray[np.float32],
    tumor_um: NDArray[np.float32],
    turn: NDArray[np.float32],
    variety: float,
) -> Fields:
    import numpy as np

    rows, columns = depth_um.shape

    def noise(scale_um: float) -> NDArray[np.float32]:
        cells = min(scale_um / FIELD_STEP_UM, min(rows, columns) / 5)
        return smooth_noise(rng, rows, columns, cells, cells)

    tissue = depth_um > 0

    def above_share(field: NDArray[np.float32], share: float) -> NDArray[np.float32]:
        """Shift a field so that it is above 0 in a share of the tissue."""
        return np.asarray(field - np.quantile(field[tissue], 1 - share), np.float32)

    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32) * np.float32(FIELD_STEP_UM)
    u = x * np.cos(turn) + y * np.sin(turn) + 40 * noise(90)
    v = -x * np.sin(turn) + y * np.cos(turn) + 55 * noise(105) + 8 * noise(38)
    more = variety - 1
    return Fields(
        depth_um=depth_um,
        tumor_um=tumor_um,
        fibre_u_um=u.astype(np.float32),
        fibre_v_um=v.astype(np.float32),
        fat=above_share(noise(130), rng.uniform(0.0, 0.05 * variety)),
        gland=above_share(noise(190), rng.uniform(0.3 - 0.15 * more, 0.6 + 0.15 * more)),
        lymph=above_share(noise(60), rng.uniform(0.02 / variety, 0.06 + 0.04 * more)),
        thickness=1 + 0.10 * noise(300) + 0.05 * noise(50),
    )


# --- places ---------------------------------------------------------------------------------

_FIBROBLAST, _LYMPHOCYTE, _TUMOR_CELL = 0, 1, 2
_NUCLEI = ("fibroblast", "lymphocyte", "tumor")


def _populate(
    rng: np.random.Generator,
    width_um: float,
    height_um: float,
    fields: Fields,
    *,
    marked: bool,
) -> Layout:
    """Place structures and nuclei."""
    import numpy as np

    def scatter(
        spacing_um: float, field: NDArray[np.float32], keep: float, jitter: float = 0.8
    ) -> NDArray[np.float32]:
        """Return (N, 2) points (x, y) of a jittered lattice where `field` is above 0."""
        columns, rows = (max(1, round(edge / spacing_um)) for edge in (width_um, height_um))
        pitch = np.array([width_um / columns, height_um / rows], np.float32)
        found = []
        # In strips, because on a large slide most points of the lattice lie on bare glass.
        for first in range(0, rows, _STRIP_ROWS):
            strip = np.arange(first, min(first + _STRIP_ROWS, rows), dtype=np.float32)
            lattice = np.stack(np.meshgrid(np.arange(columns, dtype=np.float32), strip), -1)
            shifts = 0.5 + jitter * (rng.random(lattice.shape, dtype=np.float32) - 0.5)
            points = ((lattice + shifts) * pitch).reshape(-1, 2)
            points = points[rng.random(len(points), dtype=np.float32) < keep]
            found.append(points[sample(field, points[:, 0], points[:, 1]) > 0])
        return np.asarray(np.concatenate(found), np.float32)

    depth, tumor, fat = fields.depth_um, fields.tumor_um, fields.fat
    stroma = np.minimum(depth - 4, -fat)
    cellular = np.minimum(stroma, fields.thickness - 0.97)
    glands = scatter(112, np.minimum(np.minimum(depth - 45, fields.gland), -fat - 0.3), 0.92, 0.62)
    vessels = scatter(150, np.minimum(np.minimum(depth - 30, -fields.gland), -fat - 0.1), 0.5)
    groups = {
        "normal_structures": (("gland", "vessel"), [glands, vessels]),
        "tumor_structures": (
            ("tumor_gland",),
            [scatter(88, np.minimum(np.minimum(tumor - 20, depth - 35), fields.gland), 0.8, 0.5)],
        ),
        "normal_nuclei": (
            _NUCLEI,
            [
                np.concatenate([scatter(17, stroma, 0.7), scatter(17, cellular, 0.7, 1.0)]),
                np.concatenate(
                    [
                        scatter(38, stroma, 0.45),
                        scatter(7.6, np.minimum(fields.lymph, depth - 6), 0.8),
                    ]
                ),
            ],
        ),
        "tumor_nuclei": (
            _NUCLEI,
            [
                scatter(19, np.minimum(tumor, depth - 4), 0.7),
                scatter(26, np.minimum(tumor, depth - 4), 0.5),
                scatter(10.8, np.minimum(tumor - 3, depth - 8), 0.97, 0.6),
            ],
        ),
    }
    places = {name: _places(rng, fields, kinds, points) for name, (kinds, points) in groups.items()}
    for which in ("normal", "tumor"):
        nuclei = places[f"{which}_nuclei"]
        free = _outside_structures(nuclei, places[f"{which}_structures"])
        if which == "tumor":
            # Tumour cells keep to their nests, and other cells keep out.
            free &= in_nest(fields, nuclei) == (nuclei.kind == _TUMOR_CELL)
        places[f"{which}_nuclei"] = _chosen(nuclei, free)
    return Layout(marked=marked, fields=fields, **places)


def in_nest(fields: Fields, places: Places) -> NDArray[np.bool_]:
    """Return whether each place lies where tumour grows in a nest: (N,) bool."""
    import numpy as np

    kit = tissue_kit(REFERENCE_MPP)
    column, row = (
        np.floor(sample(field, places.x_um, places.y_um) / kit.mpp).astype(np.intp) % kit.period_px
        for field in (fields.fibre_u_um, fields.fibre_v_um)
    )
    return np.asarray(kit.textures[row, column, 3] > NEST_THRESHOLD + 3, np.bool_)


def _outside_structures(nuclei: Places, structures: Places) -> NDArray[np.bool_]:
    """Return which nuclei no gland or vessel covers: (N,) bool."""
    import numpy as np

    kit = tissue_kit(REFERENCE_MPP)
    free = np.ones(len(nuclei.x_um), np.bool_)
    for i in range(len(structures.x_um)):
        stamps = kit.structures[structures.kinds[structures.kind[i]]]
        opaque = stamps[structures.pick[i] % len(stamps)].opaque
        assert opaque is not None
        half_um = opaque.shape[0] / 2 * kit.mpp
        y_um, x_um = float(structures.y_um[i]), float(structures.x_um[i])
        first, last = np.searchsorted(nuclei.y_um, [y_um - half_um, y_um + half_um])
        row = ((nuclei.y_um[first:last] - y_um + half_um) / kit.mpp).astype(np.intp)
        column = np.floor((nuclei.x_um[first:last] - x_um + half_um) / kit.mpp).astype(np.intp)
        inside = (column >= 0) & (column < opaque.shape[1]) & (row < opaque.shape[0])
        covered = np.flatnonzero(inside)
        free[first + covered[opaque[row[covered], column[covered]]]] = False
    return free


def _chosen(places: Places, keep: NDArray[np.bool_]) -> Places:
    return replace(
        places,
        **{
            n: getattr(places, n)[keep]
            for n in ("x_um", "y_um", "kind", "angle", "pick", "in_tumor")
        },
    )


def _places(
    rng: np.random.Generator,
    fields: Fields,
    kinds: tuple[str, ...],
    points: list[NDArray[np.float32]],
) -> Places:
    import numpy as np

    kind = np.repeat(np.arange(len(points)), [len(p) for p in points])
    xy = np.concatenate(points)
    v_y, v_x = np.gradient(fields.fibre_v_um)
    x, y = xy[:, 0], xy[:, 1]
    slope_x, slope_y = (sample(np.asarray(v, np.float32), x, y) for v in (v_x, v_y))
    angle = np.arctan2(-slope_x, slope_y)
    angle = angle + rng.normal(0, 0.22, len(x))
    pick = rng.integers(0, 65536, len(x))
    in_tumor = sample(fields.tumor_um, x, y) > 0
    order = np.lexsort((x, y))
    return Places(
        kinds=kinds,
        x_um=x[order].astype(np.float32),
        y_um=y[order].astype(np.float32),
        kind=kind[order].astype(np.uint8),
        angle=angle[order].astype(np.float32),
        pick=pick[order].astype(np.uint16),
        in_tumor=in_tumor[order],
    )
