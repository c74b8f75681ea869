"""Write one synthetic slide and what is known of it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.artifacts import atomic_file, write_bytes
from bagscope.wsi.geojson import write_regions
from bagscope.wsi.outline import MaskFrame, Region, polygons
from bagscope.wsi.slide import RectL0
from bagscope.wsi.synthetic import faults
from bagscope.wsi.synthetic.painter import SlidePainter
from bagscope.wsi.synthetic.render import Window, interpolated
from bagscope.wsi.synthetic.spec import (
    TISSUE_GREY,
    TUMOR_GREY,
    SyntheticSpec,
    SyntheticTruth,
)
from bagscope.wsi.synthetic.svs_writer import SvsHeader, SvsWriter, TileMap

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.synthetic.layout import Layout

MASK_DOWNSAMPLE = 16
TUMOR_CLASS = "Tumor"
TUMOR_RGB = (200, 0, 0)

_BAND_PX = 512
_BAND_PIXELS = 2**24
_THUMBNAIL_PX = 768


def write_slide(path: Path, spec: SyntheticSpec, *, threads: int = 1) -> SyntheticTruth:
    """Write an Aperio-style SVS of synthetic tissue, its truth mask and its tumour outlines.

    Beside `<name>.svs` come `<name>.truth.png` and `<name>.truth.geojson`. Each file is written
    atomically; memory holds a few rows of tiles, whatever the slide's height.

    Args:
        path: the SVS; its folder is made where it is missing.
        spec: the slide. Equal specs make equal bytes, whatever `threads`.
        threads: how many paint and encode.

    Raises:
        ArtifactError: a file could not be written.
        ValueError: the levels or the tile size can't be written.
    """
    painter = SlidePainter(spec)
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(atomic_file(path))
        pool = stack.enter_context(ThreadPoolExecutor(threads)) if threads > 1 else None
        _write_pyramid(temporary, painter, pool)
        _apply_faults(temporary, painter)
    return _write_truth(path, spec, painter.layout)


def _write_pyramid(path: Path, painter: SlidePainter, pool: ThreadPoolExecutor | None) -> None:
    spec = painter.spec
    run: TileMap = pool.map if pool else map
    sizes = [(spec.width_px // d, spec.height_px // d) for d in spec.downsamples]
    with SvsWriter(
        path,
        sizes,
        tile_px=spec.tile_px,
        header=SvsHeader(
            mpp=spec.mpp if spec.state_mpp else None,
            objective=spec.objective,
            extra={"ScanScope ID": f"SYNTHETIC{spec.site}", "Filename": f"{spec.seed}"},
        ),
        quality=spec.quality,
        subsampling=spec.subsampling,
        force_bigtiff=spec.bigtiff,
        tile_map=run,
    ) as writer:
        levels = _LowerLevels(writer, spec)
        blanks: dict[Hashable, bytes] = {}
        for top, band in _bands(painter, pool):
            for y in range(0, band.shape[0], spec.tile_px):
                rows = band[y : y + spec.tile_px]
                writer.write_tile_row(0, rows, _known_tiles(painter, writer, rows, top + y, blanks))
                levels.feed(rows)
        thumbnail = levels.thumbnail()
        writer.write_associated("thumbnail", thumbnail)
        if spec.label_and_macro:
            writer.write_associated("label", _label(spec))
            writer.write_associated("macro", _macro(thumbnail))


def _bands(
    painter: SlidePainter, pool: ThreadPoolExecutor | None
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (top row, rows) from the top, each a whole number of tile rows but for the last."""
    import numpy as np

    spec = painter.spec
    height_px = min(_BAND_PX, _BAND_PIXELS // spec.width_px)
    step = spec.tile_px * max(1, height_px // spec.tile_px)
    band = np.empty((step, spec.width_px, 3), np.uint8)
    for top in range(0, spec.height_px, step):
        height = min(step, spec.height_px - top)

        def paint(left: int, top: int = top, height: int = height) -> None:
            width = min(_BAND_PX, spec.width_px - left)
            window = Window(x_l0=left, y_l0=top, width_px=width, height_px=height)
            band[:height, left : left + width] = painter.paint(window)

        lefts = range(0, spec.width_px, _BAND_PX)
        for _ in pool.map(paint, lefts) if pool else map(paint, lefts):
            pass
        yield top, band[:height]


def _known_tiles(
    painter: SlidePainter,
    writer: SvsWriter,
    rows: NDArray[np.uint8],
    top: int,
    blanks: dict[Hashable, bytes],
) -> dict[int, bytes]:
    """Return the streams of this row's bare tiles, each kind of which is encoded only once."""
    edge = painter.spec.tile_px
    known: dict[int, bytes] = {}
    if rows.shape[0] < edge:
        return known
    for column in range(rows.shape[1] // edge):
        window = Window(x_l0=column * edge, y_l0=top, width_px=edge, height_px=edge)
        key = painter.blank_key(window)
        if key is None:
            continue
        if key not in blanks:
            blanks[key] = writer.encoder.encode(rows[:, column * edge : (column + 1) * edge])
        known[column] = blanks[key]
    return known


class _LowerLevels:
    """Makes each coarser level from the one before it, as rows come in from the top.

    Args:
        writer: where finished rows of tiles go.
        spec: the slide.

    Raises:
        ValueError: a level is not a whole multiple of the one before it.
    """

    def __init__(self, writer: SvsWriter, spec: SyntheticSpec) -> None:
        downsamples = spec.downsamples
        pairs = list(itertools.pairwise(downsamples))
        if downsamples[:1] != (1,) or any(b <= a or b % a for a, b in pairs):
            raise ValueError(
                f"downsamples are {downsamples}; start at 1, and let each be a whole multiple of "
                "the one before"
            )
        self._writer, self._tile_px = writer, spec.tile_px
        self._ratios = [b // a for a, b in pairs]
        self._left_px = [spec.height_px // d for d in downsamples[1:]]
        self._width_px = [spec.width_px // d for d in downsamples[1:]]
        # Per level: rows of the level before that make no whole row yet, and finished rows.
        self._rest: list[NDArray[np.uint8] | None] = [None for _ in pairs]
        self._waiting: list[list[NDArray[np.uint8]]] = [[] for _ in pairs]
        self._coarsest: list[NDArray[np.uint8]] = []

    def feed(self, rows: NDArray[np.uint8], index: int = 0) -> None:
        """Take rows of the level before number `index`; write what has become complete."""
        import cv2
        import numpy as np

        if index == len(self._ratios):
            shrink = max(1, -(-rows.shape[1] // _THUMBNAIL_PX))
            size = (rows.shape[1] // shrink, max(1, rows.shape[0] // shrink))
            small = cv2.resize(rows, size, interpolation=cv2.INTER_AREA)
            self._coarsest.append(np.asarray(small, np.uint8))
            return
        ratio, waiting, rest = self._ratios[index], self._waiting[index], self._rest[index]
        if rest is not None and len(rest):
            rows = np.concatenate([rest, rows])
        whole = rows.shape[0] // ratio
        # A copy, because the caller paints its next rows into the same memory.
        self._rest[index] = rows[whole * ratio :].copy()
        if whole:
            size = (self._width_px[index], whole)
            source = rows[: whole * ratio, : size[0] * ratio]
            mean = cv2.resize(source, size, interpolation=cv2.INTER_AREA)
            waiting.append(np.asarray(mean, np.uint8))
        while self._left_px[index]:
            due = min(self._tile_px, self._left_px[index])
            if sum(len(w) for w in waiting) < due:
                return
            block = np.concatenate(waiting)
            waiting[:] = [block[due:]]
            self._left_px[index] -= due
            self._writer.write_tile_row(index + 1, block[:due])
            self.feed(block[:due], index + 1)

    def thumbnail(self) -> NDArray[np.uint8]:
        """Return a small picture of the whole slide, once all rows were fed."""
        import numpy as np

        return np.concatenate(self._coarsest)


def _label(spec: SyntheticSpec) -> NDArray[np.uint8]:
    """Return a picture such as a pathology label; nothing downstream may ever show it."""
    import cv2
    import numpy as np

    image = np.full((160, 240, 3), 250, np.uint8)
    for line, text in enumerate(("SYNTHETIC", f"SEED {spec.seed}", f"SITE {spec.site}")):
        place = (14, 45 + 45 * line)
        cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.9, (20, 20, 20), 2)
    return image


def _macro(thumbnail: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2
    import numpy as np

    height = 200
    width = max(1, round(thumbnail.shape[1] * height / thumbnail.shape[0]))
    small = cv2.resize(thumbnail, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(
        cv2.copyMakeBorder(small, 20, 20, 180, 20, cv2.BORDER_CONSTANT, None, (225,) * 3)
    )


def _apply_faults(path: Path, painter: SlidePainter) -> None:
    """Damage the finished file as the spec asks: tiles inside tissue first."""
    import numpy as np

    spec = painter.spec
    wanted = spec.missing_tiles + spec.corrupt_tiles
    if wanted:
        columns, rows = (-(-n // spec.tile_px) for n in (spec.width_px, spec.height_px))
        step_px = MASK_DOWNSAMPLE
        tissue, _ = _truth_masks(spec, painter.layout)
        ys, xs = np.nonzero(tissue)
        inside = np.unique((ys * step_px // spec.tile_px) * columns + xs * step_px // spec.tile_px)
        order = np.random.default_rng([8, spec.seed]).permutation(inside)
        others = np.setdiff1d(np.arange(columns * rows), inside)
        chosen = np.concatenate([order, others])[:wanted].tolist()
        faults.corrupt_tiles(path, chosen[: spec.corrupt_tiles])
        faults.remove_tiles(path, chosen[spec.corrupt_tiles :])
    if spec.truncated is not None:
        faults.truncate(path, spec.truncated)


# --- truth ----------------------------------------------------------------------------------


def _truth_masks(
    spec: SyntheticSpec, layout: Layout
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return (tissue, tumour) every `MASK_DOWNSAMPLE` level-0 pixels, by each square's centre."""
    import numpy as np

    height, width = (-(-n // MASK_DOWNSAMPLE) for n in (spec.height_px, spec.width_px))
    tissue, tumor = np.zeros((2, height, width), np.bool_)
    for top in range(0, height, 512):
        window = Window(x_l0=0, y_l0=top, width_px=width, height_px=min(512, height - top))
        place = np.s_[top : top + window.height_px]
        mask_mpp = spec.mpp * MASK_DOWNSAMPLE
        tissue[place] = interpolated(layout.fields.depth_um, window, mask_mpp) > 0
        inside = interpolated(layout.fields.tumor_um, window, mask_mpp) > 0
        tumor[place] = tissue[place] & inside
    return tissue, tumor


def _write_truth(path: Path, spec: SyntheticSpec, layout: Layout) -> SyntheticTruth:
    import cv2
    import numpy as np

    tissue, tumor = _truth_masks(spec, layout)
    grey = np.where(tumor, TUMOR_GREY, np.where(tissue, TISSUE_GREY, 0)).astype(np.uint8)
    _, png = cv2.imencode(".png", grey)
    mask, outlines = path.with_suffix(".truth.png"), path.with_suffix(".truth.geojson")
    write_bytes(mask, png.tobytes())
    step = float(MASK_DOWNSAMPLE)
    frame = MaskFrame(shape=tumor.shape, origin_x_l0=0, origin_y_l0=0, px_l0_x=step, px_l0_y=step)
    regions = [
        Region(class_name=TUMOR_CLASS, polygons=(shape,), colour=TUMOR_RGB)
        for shape in polygons(tumor, frame)
    ]
    whole = RectL0(x_l0=0, y_l0=0, width_l0=spec.width_px, height_l0=spec.height_px)
    write_regions(outlines, regions, bounds_l0=whole, slide_name=path.name)
    mask_mpp = spec.mpp * MASK_DOWNSAMPLE
    return SyntheticTruth(
        slide=path,
        mask=mask,
        mask_downsample=MASK_DOWNSAMPLE,
        mask_mpp=mask_mpp,
        geojson=outlines,
        tissue_area_um2=float(tissue.sum()) * mask_mpp**2,
        tumor_area_um2=float(tumor.sum()) * mask_mpp**2,
    )
