"""The fast path: tiled JPEG TIFFs, their stored tiles read with `pread` and decoded directly.

The facts of the slide, and whatever is out of the ordinary, come from OpenSlide; the pixels come
from libjpeg-turbo, identical to OpenSlide's, several times faster, on any number of threads
(neither `pread` nor decoding holds the interpreter's lock).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from bagscope.errors import ReadError
from bagscope.wsi.geometry import ReadPlan
from bagscope.wsi.jpeg_stream import chroma_subsampling, complete_stream, decode_rgb
from bagscope.wsi.openslide_backend import OpenSlideSlide
from bagscope.wsi.reading import (
    Problems,
    corners_lv,
    in_threads,
    prepare_batch,
    require_level,
    resize_into,
)
from bagscope.wsi.slide import Downscale, RectL0, SlideInfo, TileBatch
from bagscope.wsi.stored_tiles import stored_levels
from bagscope.wsi.tiff_directory import read_structure
from bagscope.wsi.tile_assembly import Pieces, TileGrid, assemble, plan_requests

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

_DCT_FACTORS = (2, 4, 8)
_DCT_SUBSAMPLINGS = ("444", "420", "Gray")
"""Where DCT-scaled decoding stays 40 dB or more from the area mean; 4:2:2 does not."""


class JpegTiffSlide:
    """A tiled JPEG TIFF. See `bagscope.wsi.slide.Slide` for the methods.

    Raises:
        NotStoredAsTiles: the file is of another kind, and OpenSlide should read it.
    """

    def __init__(
        self, path: Path, *, mpp: float | None = None, allow_estimated_mpp: bool = False
    ) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._openslide = OpenSlideSlide(
            path, mpp=mpp, allow_estimated_mpp=allow_estimated_mpp, backend="jpegtiff"
        )
        self.info: SlideInfo = self._openslide.info
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            structure = read_structure(self._descriptor)
            self._levels = stored_levels(structure, self.info.format, self.info.levels)
        except BaseException:
            self.close()
            raise
        self._file_bytes = os.fstat(self._descriptor).st_size
        self._subsampling: dict[int, str] = {}
        self._at_hand: tuple[tuple[int, int, bool], dict[int, NDArray[np.uint8] | None]] | None
        self._at_hand = None

    # --- the protocol -----------------------------------------------------------------------

    def read_level(
        self, level: int, x_lv: int, y_lv: int, width_px: int, height_px: int
    ) -> NDArray[np.uint8]:
        """Read a rectangle of a level, decoding the stored tiles under it."""
        import numpy as np

        require_level(self.info, level, width_px, height_px)
        stored = self._levels[level]
        out = np.empty((height_px, width_px, 3), np.uint8)
        tile_width, tile_height = stored.tile_width_px, stored.tile_height_px
        columns = range(
            max(0, x_lv // tile_width), min(stored.across, -(-(x_lv + width_px) // tile_width))
        )
        rows = range(
            max(0, y_lv // tile_height), min(stored.down, -(-(y_lv + height_px) // tile_height))
        )
        if (
            x_lv < 0
            or y_lv < 0
            or x_lv + width_px > stored.across * tile_width
            or y_lv + height_px > stored.down * tile_height
        ):
            out[...] = self.info.background
        for row in rows:
            top = row * tile_height - y_lv
            y0, y1 = max(top, 0), min(top + tile_height, height_px)
            for column in columns:
                left = column * tile_width - x_lv
                x0, x1 = max(left, 0), min(left + tile_width, width_px)
                pixels = self._stored_tile(level, row * stored.across + column)
                if pixels is None:
                    out[y0:y1, x0:x1] = self.info.background
                else:
                    out[y0:y1, x0:x1] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def read_tiles(
        self,
        corners_l0: NDArray[np.int32],
        plan: ReadPlan,
        *,
        downscale: Downscale = "area",
        threads: int = 1,
        out: NDArray[np.uint8] | None = None,
    ) -> TileBatch:
        """Read tiles, decoding each stored tile once."""
        import numpy as np

        images, readable = prepare_batch(len(corners_l0), plan, out)
        problems = Problems()
        if len(corners_l0) == 0:
            return TileBatch(images=images, readable=readable)
        batch = _Batch(corners_l0, images, readable, problems, self.info.background)
        positions = corners_lv(corners_l0, plan)
        stored = self._levels[plan.level]
        factor = plan.region_px // plan.tile_px
        whole = factor >= 1 and factor * plan.tile_px == plan.region_px
        whole = whole and stored.tile_width_px % factor == stored.tile_height_px % factor == 0
        if whole and factor == 1 and self._read_direct(positions, plan, batch, threads):
            return TileBatch(images=images, readable=readable, problems=problems.sentences())
        # Whether a tile is reduced before or after assembly must depend on that tile alone:
        # what it is read together with never changes its pixels.
        on_grid = (positions % factor == 0).all(axis=1) if whole else np.zeros(len(positions), bool)
        dct = (
            downscale == "dct"
            and factor >= 2
            and factor & (factor - 1) == 0
            and self._chroma(plan.level) in _DCT_SUBSAMPLINGS
        )
        for chosen, reduce in ((on_grid, factor), (~on_grid, 1)):
            rows = np.flatnonzero(chosen)
            if rows.size:
                self._read_assembled(
                    positions[rows], rows, plan, batch, threads, reduce=reduce, dct=dct
                )
        return TileBatch(images=images, readable=readable, problems=problems.sentences())

    def read_associated(self, name: str) -> NDArray[np.uint8]:
        """Read an associated image; `label` and `macro` are refused."""
        return self._openslide.read_associated(name)

    def stored_faults_l0(self) -> list[RectL0]:
        """Return the level-0 rectangles of stored tiles that lie beyond the end of the file."""
        import numpy as np

        stored = self._levels[0]
        ends = stored.offsets + stored.byte_counts
        faults = np.flatnonzero((stored.byte_counts > 0) & (ends > self._file_bytes))
        rectangles = []
        for number in faults.tolist():
            x_l0 = number % stored.across * stored.tile_width_px
            y_l0 = number // stored.across * stored.tile_height_px
            rectangles.append(
                RectL0(
                    x_l0=x_l0,
                    y_l0=y_l0,
                    width_l0=min(stored.tile_width_px, stored.width_lv - x_l0),
                    height_l0=min(stored.tile_height_px, stored.height_lv - y_l0),
                )
            )
        return rectangles

    def close(self) -> None:
        """Release the handles; closing twice is fine."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        self._openslide.close()
        self._at_hand = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- tiles ------------------------------------------------------------------------------

    def _read_direct(
        self, positions: NDArray[np.int64], plan: ReadPlan, batch: _Batch, threads: int
    ) -> bool:
        """Decode straight into the batch where every tile is one stored tile; else say no."""
        stored = self._levels[plan.level]
        tile_px = plan.tile_px
        if not (stored.tile_width_px == stored.tile_height_px == tile_px):
            return False
        columns, rows = positions[:, 0] // tile_px, positions[:, 1] // tile_px
        aligned = (positions % tile_px == 0).all()
        inside = (
            (columns >= 0) & (columns < stored.across) & (rows >= 0) & (rows < stored.down)
        ).all()
        if not (aligned and inside):
            return False
        numbers = (rows * stored.across + columns).tolist()

        def work(share: Sequence[int]) -> None:
            for row in share:
                try:
                    if self._stored_tile(plan.level, numbers[row], out=batch.images[row]) is None:
                        batch.images[row] = self.info.background
                except ReadError as error:
                    batch.fail(row, error)

        in_threads(threads, range(len(numbers)), work)
        return True

    def _read_assembled(
        self,
        positions: NDArray[np.int64],
        rows: NDArray[np.int64],
        plan: ReadPlan,
        batch: _Batch,
        threads: int,
        *,
        reduce: int,
        dct: bool,
    ) -> None:
        """Put tiles together from stored ones, these reduced by `reduce` beforehand."""
        import numpy as np

        stored = self._levels[plan.level]
        grid = TileGrid(
            tile_width_gr=stored.tile_width_px // reduce,
            tile_height_gr=stored.tile_height_px // reduce,
            across=stored.across,
            down=stored.down,
        )
        edge_gr = plan.region_px // reduce
        requests = plan_requests(positions // reduce, rows, edge_gr, grid)
        resampled = edge_gr != plan.tile_px
        scratch = threading.local()

        def prepare(number: int) -> NDArray[np.uint8] | ReadError | None:
            try:
                return self._prepared_tile(plan.level, number, reduce, dct, scratch)
            except ReadError as error:
                return error

        def deliver(row: int, pieces: Pieces) -> None:
            try:
                if not resampled:
                    pieces.paste_into(batch.images[row], self.info.background)
                    return
                region = getattr(scratch, "region", None)
                if region is None:
                    region = scratch.region = np.empty((edge_gr, edge_gr, 3), np.uint8)
                pieces.paste_into(region, self.info.background)
                resize_into(region, batch.images[row])
            except ReadError as error:
                batch.fail(row, error)

        kind = (plan.level, reduce, dct and reduce > 1)
        kept = self._at_hand
        left = assemble(
            requests,
            grid,
            prepare=prepare,
            deliver=deliver,
            at_hand=kept[1] if kept is not None and kept[0] == kind else {},
            threads=threads,
        )
        # One assignment, so that threads which read at the same time need no lock.
        self._at_hand = (kind, left)

    def _prepared_tile(
        self, level: int, number: int, reduce: int, dct: bool, scratch: threading.local
    ) -> NDArray[np.uint8] | None:
        """Return a stored tile reduced by a whole number, or None where it is missing."""
        import numpy as np

        if reduce == 1:
            return self._stored_tile(level, number)
        stored = self._levels[level]
        decoded_at = min(reduce, _DCT_FACTORS[-1]) if dct and number not in stored.redrawn else 1
        if dct and self._overhangs(level, number):
            # Background is laid around the image before it is reduced, which takes all pixels.
            decoded_at = 1
        shape = (stored.tile_height_px // decoded_at, stored.tile_width_px // decoded_at, 3)
        full = getattr(scratch, "full", None)
        if full is None or full.shape != shape:
            full = scratch.full = np.empty(shape, np.uint8)
        pixels = self._stored_tile(level, number, out=full, decoded_at=decoded_at)
        if pixels is None:
            return None
        small = np.empty(
            (stored.tile_height_px // reduce, stored.tile_width_px // reduce, 3), np.uint8
        )
        resize_into(pixels, small)
        return small

    def _stored_tile(
        self,
        level: int,
        number: int,
        *,
        out: NDArray[np.uint8] | None = None,
        decoded_at: int = 1,
    ) -> NDArray[np.uint8] | None:
        """Decode one stored tile, background beyond the level's edge; None where it is missing.

        Raises:
            ReadError: it lies beyond the end of the file, or does not decode.
        """
        import numpy as np

        stored = self._levels[level]
        if out is None:
            out = np.empty((stored.tile_height_px, stored.tile_width_px, 3), np.uint8)
        if number in stored.redrawn:
            if level == 0:
                return None
            out[...] = self._redrawn_tile(level, number)
            return out
        if stored.byte_counts[number] == 0:
            return None
        decode_rgb(self._stream(level, number), out, reduce=decoded_at)
        if self._overhangs(level, number):
            right = stored.width_lv - number % stored.across * stored.tile_width_px
            below = stored.height_lv - number // stored.across * stored.tile_height_px
            out[:, max(0, right) :] = self.info.background
            out[max(0, below) :] = self.info.background
        return out

    def _stream(self, level: int, number: int) -> bytes:
        stored = self._levels[level]
        length, offset = int(stored.byte_counts[number]), int(stored.offsets[number])
        descriptor = self._descriptor
        if descriptor < 0:
            raise ReadError(f"{self._path.name}: read after it was closed")
        try:
            data = os.pread(descriptor, length, offset)
        except OSError as error:
            raise ReadError(f"stored tile could not be read ({error.strerror})") from error
        if len(data) != length:
            raise ReadError(
                f"stored tile lies beyond the end of the file ({self._file_bytes:,} bytes); "
                "the file is cut short: copy it again"
            )
        return complete_stream(stored.prefix, data)

    def _overhangs(self, level: int, number: int) -> bool:
        stored = self._levels[level]
        row, column = divmod(number, stored.across)
        return (column + 1) * stored.tile_width_px > stored.width_lv or (
            row + 1
        ) * stored.tile_height_px > stored.height_lv

    def _redrawn_tile(self, level: int, number: int) -> NDArray[np.uint8]:
        """Let OpenSlide draw a tile that it derives from the level above."""
        stored = self._levels[level]
        row, column = divmod(number, stored.across)
        return self._openslide.read_level(
            level,
            column * stored.tile_width_px,
            row * stored.tile_height_px,
            stored.tile_width_px,
            stored.tile_height_px,
        )

    def _chroma(self, level: int) -> str:
        """Return the chroma subsampling of a level's first stored tile that has a header."""
        import numpy as np

        found = self._subsampling.get(level)
        if found is None:
            found = ""
            for number in np.flatnonzero(self._levels[level].byte_counts)[:16].tolist():
                try:
                    found = chroma_subsampling(self._stream(level, number))
                    break
                except ReadError:
                    continue
            self._subsampling[level] = found
        return found


class _Batch:
    """A batch while it is filled."""

    __slots__ = ("_background", "_corners_l0", "_problems", "_readable", "images")

    def __init__(
        self,
        corners_l0: NDArray[np.int32],
        images: NDArray[np.uint8],
        readable: NDArray[np.bool_],
        problems: Problems,
        background: tuple[int, int, int],
    ) -> None:
        self._corners_l0 = corners_l0
        self.images = images
        self._readable = readable
        self._problems = problems
        self._background = background

    def fail(self, row: int, error: ReadError) -> None:
        """Mark a tile as unreadable."""
        self._readable[row] = False
        self.images[row] = self._background
        x_l0, y_l0 = self._corners_l0[row].tolist()
        self._problems.add(str(error), row, x_l0, y_l0)
