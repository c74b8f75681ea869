"""Reading that no backend needs to know about: resizing, tiles by region, regions, thumbnails.

A position is turned into a level's pixel once, by `corner_lv`, and everything after that is whole
pixels, so that every backend gives the same pixels for the same plan. Pixels that are coarser
than the level are area means; finer ones are interpolated linearly; and a region that already has
its final size is never resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from bagscope.errors import ReadError
from bagscope.wsi.geometry import ReadPlan, choose_level, corner_lv
from bagscope.wsi.slide import Rgb, Slide, SlideInfo, TileBatch
from bagscope.wsi.spacing import require_spacing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MAX_REGION_BYTES = 48 << 20
"""What one strip of a large region may weigh before it is reduced."""

_Item = TypeVar("_Item")


# --- shared by the backends -----------------------------------------------------------------


def resize_into(region: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Resize `region` (h, w, 3) into `out` (H, W, 3): area mean if coarser, linear if finer."""
    if region.shape == out.shape:
        out[...] = region
        return
    import cv2

    coarser = region.shape[0] >= out.shape[0] and region.shape[1] >= out.shape[1]
    method = cv2.INTER_AREA if coarser else cv2.INTER_LINEAR
    resized = cv2.resize(region, (out.shape[1], out.shape[0]), dst=out, interpolation=method)
    if resized is not out:
        out[...] = resized


def halve_into(region: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Halve `region` (2H, 2W, 4), whose last channel is padding, into `out` (H, W, 3).

    The result is that of `resize_into` without the padding.
    """
    import cv2

    padded = cv2.resize(region, (out.shape[1], out.shape[0]), interpolation=cv2.INTER_AREA)
    plain = cv2.cvtColor(padded, cv2.COLOR_RGBA2RGB, dst=out)
    if plain is not out:
        out[...] = plain


def corners_lv(corners_l0: NDArray[np.int32], plan: ReadPlan) -> NDArray[np.int64]:
    """Return the pixels of the plan's level that level-0 corners fall on: (N, 2) int64.

    Rounds as `geometry.corner_lv` does, all corners at once.
    """
    import numpy as np

    corners: NDArray[np.int64] = np.rint(np.asarray(corners_l0) / plan.downsample).astype(np.int64)
    return corners


def prepare_batch(
    count: int, plan: ReadPlan, out: NDArray[np.uint8] | None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return images (count, tile_px, tile_px, 3), `out` where given, and an all-true mask.

    Raises:
        ValueError: `out` is not of that shape, dtype and memory order.
    """
    import numpy as np

    shape = (count, plan.tile_px, plan.tile_px, 3)
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous uint8 {shape}, is {out.dtype} {out.shape}")
    return out, np.ones(count, bool)


class Crew:
    """Threads that work off one list of items after the other; the caller's is one of them.

    Items are handed out one by one, so that nobody idles while another has a long row of slow
    ones; whether there is one thread or eight, `work` sees every item once.
    """

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self._pool: ThreadPoolExecutor | None = None

    def run(self, items: Iterable[_Item], work: Callable[[_Item], None]) -> None:
        """Call `work` with every item; return when all are done."""
        remaining = iter(items)

        def work_off() -> None:
            for item in remaining:
                work(item)

        if self._pool is None and self.threads > 1:
            self._pool = ThreadPoolExecutor(self.threads - 1)
        others = []
        if self._pool is not None:
            # An iterator over a list is advanced atomically, so it may be shared as it is.
            remaining = iter(list(remaining))
            others = [self._pool.submit(work_off) for _ in range(self.threads - 1)]
        work_off()
        for other in others:
            other.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()


class Problems:
    """One sentence per distinct cause of unreadable tiles, naming the first tile that met it."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, int, int]] = {}
        self._counts: dict[str, int] = {}

    def add(self, cause: str, row: int, x_l0: int, y_l0: int) -> None:
        """Note that tile `row` of the batch, at this corner, could not be read."""
        self._counts[cause] = self._counts.get(cause, 0) + 1
        self._first[cause] = min(self._first.get(cause, (row, x_l0, y_l0)), (row, x_l0, y_l0))

    def sentences(self) -> tuple[str, ...]:
        """Return the sentences, in the order of the first tiles."""
        found = sorted((first, cause) for cause, first in self._first.items())
        return tuple(
            f"tile at x={x_l0}, y={y_l0}: {cause}"
            + (f" (and {self._counts[cause] - 1} more)" if self._counts[cause] > 1 else "")
            for (_, x_l0, y_l0), cause in found
        )


def read_tiles_by_region(
    slide: Slide,
    corners_l0: NDArray[np.int32],
    plan: ReadPlan,
    *,
    threads: int = 1,
    out: NDArray[np.uint8] | None = None,
) -> TileBatch:
    """Read tiles with one `read_level` each: the way of backends without a faster one."""
    images, readable = prepare_batch(len(corners_l0), plan, out)
    positions = corners_lv(corners_l0, plan).tolist()
    problems = Problems()

    def read_one(row: int) -> None:
        x_lv, y_lv = positions[row]
        try:
            region = slide.read_level(plan.level, x_lv, y_lv, plan.region_px, plan.region_px)
            resize_into(region, images[row])
        except ReadError as error:
            readable[row] = False
            images[row] = slide.info.background
            problems.add(str(error), row, int(corners_l0[row, 0]), int(corners_l0[row, 1]))

    with Crew(threads) as crew:
        crew.run(range(len(corners_l0)), read_one)
    return TileBatch(images=images, readable=readable, problems=problems.sentences())


def cut_out(
    size_lv: tuple[int, int],
    window: tuple[int, int, int, int],
    background: Rgb,
    read: Callable[[int, int, int, int], NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """Read the part of a window that lies in a level; the rest of it shows background.

    Args:
        size_lv: the level's width and height.
        window: x, y, width and height; may reach beyond the level.
        background: the colour outside the level.
        read: returns the pixels (y1-y0, x1-x0, 3) of x0, y0, x1, y1, which lie inside the level.
    """
    import numpy as np

    x_lv, y_lv, width_px, height_px = window
    x0, y0 = max(x_lv, 0), max(y_lv, 0)
    x1, y1 = min(x_lv + width_px, size_lv[0]), min(y_lv + height_px, size_lv[1])
    out = np.empty((height_px, width_px, 3), np.uint8)
    if x1 - x0 < width_px or y1 - y0 < height_px:
        out[...] = background
    if x1 > x0 and y1 > y0:
        out[y0 - y_lv : y1 - y_lv, x0 - x_lv : x1 - x_lv] = read(x0, y0, x1, y1)
    return out


def composite(rgba: NDArray[np.uint8], background: Rgb) -> NDArray[np.uint8]:
    """Lay unassociated RGBA (H, W, 4) over a background: (H, W, 3) uint8, C-contiguous."""
    import numpy as np

    alpha = rgba[..., 3]
    lowest = int(alpha.min(initial=255))
    if lowest == 255:
        return np.ascontiguousarray(rgba[..., :3])
    if lowest == 0 and not np.any((alpha != 0) & (alpha != 255)):
        return np.where(alpha[..., None] == 0, np.asarray(background, np.uint8), rgba[..., :3])
    weight = alpha[..., None].astype(np.uint16)
    ground = np.asarray(background, np.uint16)
    mixed = (rgba[..., :3] * weight + ground * (255 - weight) + 127) // 255
    return mixed.astype(np.uint8)


def require_level(info: SlideInfo, level: int, width_px: int, height_px: int) -> None:
    """Refuse a level that the slide lacks, or a rectangle without pixels.

    Raises:
        ValueError: names the value.
    """
    if not 0 <= level < len(info.levels):
        raise ValueError(
            f"level {level} asked for; the slide has levels 0 to {len(info.levels) - 1}"
        )
    if width_px <= 0 or height_px <= 0:
        raise ValueError(f"a region of {width_px}×{height_px} px holds no pixel")


def refuse_private(name: str, associated: Sequence[str], file_name: str) -> None:
    """Refuse associated images that may show who the patient is, and those that are not there.

    Raises:
        ReadError: `name` is `label` or `macro`, or is not among `associated`.
    """
    if name.lower() in ("label", "macro"):
        raise ReadError(
            f"{file_name}: the {name} image may show the patient's name and is never read"
        )
    if name not in associated:
        listed = ", ".join(sorted(associated)) or "none"
        raise ReadError(f"{file_name}: no associated image {name!r} (it has: {listed})")


# --- for everyone ---------------------------------------------------------------------------


def read_region_mpp(
    slide: Slide,
    *,
    x_l0: int,
    y_l0: int,
    width_px: int,
    height_px: int,
    mpp: float,
) -> NDArray[np.uint8]:
    """Read a rectangle at a wanted resolution: (height_px, width_px, 3) uint8 RGB.

    Reads the coarsest level that is fine enough, a strip at a time, so that memory stays bounded
    where a slide has no pyramid.

    Args:
        slide: an open slide.
        x_l0: left edge in level-0 pixels.
        y_l0: top edge in level-0 pixels.
        width_px: of the result.
        height_px: of the result.
        mpp: micrometres per pixel of the result; may be finer than the scan.

    Raises:
        SpacingError: the slide has no pixel size.
        ReadError: pixels could not be decoded.
    """
    target = mpp / require_spacing(slide.info).mpp
    level = choose_level([level.downsample for level in slide.info.levels], target)
    downsample = slide.info.levels[level].downsample
    return read_resized(
        slide,
        level,
        (corner_lv(x_l0, downsample), corner_lv(y_l0, downsample)),
        (
            max(1, round(width_px * target / downsample)),
            max(1, round(height_px * target / downsample)),
        ),
        (width_px, height_px),
    )


def thumbnail(slide: Slide, *, longest_px: int = 1024) -> NDArray[np.uint8]:
    """Return the whole of level 0, small: its longer edge is `longest_px` or the slide's own.

    Raises:
        ReadError: pixels could not be decoded.
    """
    info = slide.info
    longest_l0 = max(info.width_l0, info.height_l0)
    target = max(1.0, longest_l0 / longest_px)
    level = choose_level([level.downsample for level in info.levels], target)
    stored = info.levels[level]
    size_px = (max(1, round(info.width_l0 / target)), max(1, round(info.height_l0 / target)))
    return read_resized(slide, level, (0, 0), (stored.width_px, stored.height_px), size_px)


def read_resized(
    slide: Slide,
    level: int,
    corner: tuple[int, int],
    size_lv: tuple[int, int],
    size_px: tuple[int, int],
) -> NDArray[np.uint8]:
    """Read a rectangle of a level and resize it, a strip at a time where it is large.

    Args:
        slide: an open slide.
        level: the stored level to read.
        corner: the rectangle's left and top in the level's pixels.
        size_lv: its width and height there.
        size_px: width and height of the result.

    Raises:
        ReadError: pixels could not be decoded.
    """
    import numpy as np

    (x_lv, y_lv), (width_lv, height_lv) = corner, size_lv
    out = np.empty((size_px[1], size_px[0], 3), np.uint8)
    if width_lv * height_lv * 3 <= _MAX_REGION_BYTES:
        resize_into(slide.read_level(level, x_lv, y_lv, width_lv, height_lv), out)
        return out
    # Whole-number reduction of each strip first: exact, and what remains to be resized is small.
    factor = max(1, min(width_lv // size_px[0], height_lv // size_px[1]))
    small_width, small_height = -(-width_lv // factor), -(-height_lv // factor)
    small = np.empty((small_height, small_width, 3), np.uint8)
    rows = max(1, _MAX_REGION_BYTES // (small_width * factor * factor * 3))
    for start in range(0, small_height, rows):
        end = min(start + rows, small_height)
        strip = slide.read_level(
            level, x_lv, y_lv + start * factor, small_width * factor, (end - start) * factor
        )
        resize_into(strip, small[start:end])
    # The last column and row of `small` may reach beyond the rectangle by a part of a pixel.
    resize_into(small[: max(1, height_lv // factor), : max(1, width_lv // factor)], out)
    return out
