"""The fast path: tiled JPEG TIFFs, their stored tiles read with `pread` and decoded directly.

The facts of the slide, and whatever is out of the ordinary, come from OpenSlide; the pixels come
from libjpeg-turbo, identical to OpenSlide's, several times faster, on any number of threads
(neither `pread` nor decoding holds the interpreter's lock).
"""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from bagscope.errors import ReadError
from bagscope.wsi.geometry import ReadPlan
from bagscope.wsi.jpeg_stream import cached_buffer, chroma_subsampling, complete_stream, decode_rgb
from bagscope.wsi.openslide_backend import OpenSlideSlide
from bagscope.wsi.reading import (
    Crew,
    Problems,
    corners_lv,
    halve_into,
    prepare_batch,
    require_level,
    resize_into,
)
from bagscope.wsi.slide import Downscale, RectL0, SlideInfo, TileBatch
from bagscope.wsi.stored_tiles import stored_levels
from bagscope.wsi.tile_assembly import TileGrid, TileStore, assemble, plan_assembly

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DCT_MOST = 8
_REGION_BYTES = 32 << 20
"""What the regions that are read at a time and then resized may weigh."""
_DCT_SUBSAMPLINGS = ("444", "420", "Gray")
"""Where DCT-scaled decoding stays 40 dB or more from the area mean; 4:2:2 does not."""


class JpegTiffSlide:
    """A tiled JPEG TIFF. See `bagscope.wsi.slide.Slide` for the methods.

    `opened` is the same file through OpenSlide, where it is open already; it is closed together
    with this slide.

    Raises:
        NotStoredAsTiles: the file is of another kind, and OpenSlide should read it.
    """

    def __init__(
        self,
        path: Path,
        *,
        mpp: float | None = None,
        allow_estimated_mpp: bool = False,
        opened: OpenSlideSlide | None = None,
    ) -> None:
        self._path = path
        self._openslide = opened or OpenSlideSlide(
            path, mpp=mpp, allow_estimated_mpp=allow_estimated_mpp
        )
        self.info: SlideInfo = dataclasses.replace(self._openslide.info, backend="jpegtiff")
        self._levels = stored_levels(path, self.info.format, self.info.levels)
        self._descriptor = os.open(path, os.O_RDONLY)
        self._file_bytes = os.fstat(self._descriptor).st_size
        self._subsampling: dict[int, str] = {}
        self._stores: dict[_Kind, TileStore] = {}

    # --- the protocol -----------------------------------------------------------------------

    def read_level(
        self, level: int, x_lv: int, y_lv: int, width_px: int, height_px: int
    ) -> NDArray[np.uint8]:
        """Read a rectangle of a level, decoding the stored tiles under it."""
        import numpy as np

        require_level(self.info, level, width_px, height_px)
        stored = self._levels[level]
        out = np.empty((height_px, width_px, 3), np.uint8)
        tile = cached_buffer(stored.tile_height_px, stored.tile_width_px)
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
                if self._stored_tile(level, row * stored.across + column, tile):
                    out[y0:y1, x0:x1] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
                else:
                    out[y0:y1, x0:x1] = self.info.background
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
        batch = _Batch(corners_l0, images, readable, problems, self.info.background)
        positions = corners_lv(corners_l0, plan)
        stored = self._levels[plan.level]
        factor = plan.region_px // plan.tile_px
        whole = factor >= 1 and factor * plan.tile_px == plan.region_px
        whole = whole and stored.tile_width_px % factor == stored.tile_height_px % factor == 0
        dct = (
            downscale == "dct"
            and whole
            and factor >= 2
            and factor & (factor - 1) == 0
            and self._chroma(plan.level) in _DCT_SUBSAMPLINGS
        )
        # Whether a tile is reduced before or after assembly must depend on that tile alone:
        # what it is read together with never changes its pixels.
        on_grid = (positions % factor == 0).all(axis=1) if whole else np.zeros(len(positions), bool)
        with Crew(threads) as crew:
            for chosen, reduce in ((on_grid, factor), (~on_grid, 1)):
                rows = np.flatnonzero(chosen)
                kind = _Kind(plan.level, reduce, dct and reduce > 1)
                if rows.size == 0:
                    continue
                if plan.region_px == plan.tile_px * reduce:
                    self._read_squares(positions[rows], rows, images, kind, batch, crew)
                else:
                    self._read_resized(positions[rows], rows, plan, kind, batch, crew)
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
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        self._openslide.close()
        self._stores = {}

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

    def _read_squares(
        self,
        positions: NDArray[np.int64],
        rows: NDArray[np.int64],
        squares: NDArray[np.uint8],
        kind: _Kind,
        batch: _Batch,
        crew: Crew,
        places: list[int] | None = None,
    ) -> None:
        """Read squares at level positions into `squares`, at `places` if not at `rows`."""
        stored = self._levels[kind.level]
        grid = TileGrid(
            tile_width_gr=stored.tile_width_px // kind.reduce,
            tile_height_gr=stored.tile_height_px // kind.reduce,
            across=stored.across,
            down=stored.down,
        )
        local = threading.local()

        def fill(number: int, out: NDArray[np.uint8]) -> bool:
            return self._fill(number, kind, out, local)

        # Taking it away is one atomic step, so two readers never hold one store, and no lock can
        # come locked through a fork.
        store = self._stores.pop(kind, None) or TileStore()
        faults = assemble(
            plan_assembly(positions // kind.reduce, squares.shape[1], grid),
            grid,
            squares,
            places if places is not None else rows.tolist(),
            fill=fill,
            background=self.info.background,
            store=store,
            crew=crew,
        )
        self._stores = {kind: store}
        for request, error in faults.items():
            batch.fail(int(rows[request]), error)

    def _read_resized(
        self,
        positions: NDArray[np.int64],
        rows: NDArray[np.int64],
        plan: ReadPlan,
        kind: _Kind,
        batch: _Batch,
        crew: Crew,
    ) -> None:
        """Read whole regions, some at a time, and resize each into its place."""
        import numpy as np

        region_px = plan.region_px
        order = np.lexsort((positions[:, 0], positions[:, 1]))
        share = max(crew.threads, _REGION_BYTES // (region_px * region_px * 3))
        regions = np.empty((min(share, len(order)), region_px, region_px, 3), np.uint8)
        for start in range(0, len(order), share):
            part = order[start : start + share]
            self._read_squares(
                positions[part], rows[part], regions, kind, batch, crew, list(range(len(part)))
            )
            places = rows[part].tolist()

            def resize_one(i: int, places: list[int] = places) -> None:
                if batch.readable[places[i]]:
                    resize_into(regions[i], batch.images[places[i]])

            crew.run(range(len(part)), resize_one)

    def _fill(
        self, number: int, kind: _Kind, out: NDArray[np.uint8], local: threading.local
    ) -> bool:
        """Fill `out` with a stored tile, reduced as asked; false where the tile is missing.

        Args:
            number: of the stored tile.
            kind: level and reduction.
            out: of the reduced tile's size, not necessarily contiguous.
            local: this thread's memory.
        """
        level, reduce = kind.level, kind.reduce
        if reduce == 1 and out.flags.c_contiguous:
            return self._stored_tile(level, number, out)
        stored = self._levels[level]
        # Background around the image, and what OpenSlide redraws, is there at full size only.
        plain = number not in stored.redrawn and not self._overhangs(level, number)
        decoded_at = min(reduce, _DCT_MOST) if kind.dct and plain else 1
        # Halving four channels is vectorised in OpenCV and halving three is not.
        channels = 4 if reduce == 2 and decoded_at == 1 else 3
        shape = (stored.tile_height_px // decoded_at, stored.tile_width_px // decoded_at, channels)
        full = getattr(local, "full", None)
        if full is None or full.shape != shape:
            full = local.full = cached_buffer(*shape)
        if not self._stored_tile(level, number, full, decoded_at=decoded_at):
            return False
        if channels == 4:
            halve_into(full, out)
        else:
            resize_into(full, out)
        return True

    def _stored_tile(
        self, level: int, number: int, out: NDArray[np.uint8], *, decoded_at: int = 1
    ) -> bool:
        """Fill `out` with one stored tile, background beyond the level; false if missing.

        Raises:
            ReadError: it lies beyond the end of the file, or does not decode.
        """
        stored = self._levels[level]
        if number in stored.redrawn:
            if level == 0:
                return False
            out[..., :3] = self._redrawn_tile(level, number)
            return True
        if stored.byte_counts[number] == 0:
            return False
        decode_rgb(self._stream(level, number), out, reduce=decoded_at)
        if self._overhangs(level, number):
            right = stored.width_lv - number % stored.across * stored.tile_width_px
            below = stored.height_lv - number // stored.across * stored.tile_height_px
            out[:, max(0, right) :, :3] = self.info.background
            out[max(0, below) :, :, :3] = self.info.background
        return True

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


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    """Of which level stored tiles are, by how much they are reduced, and whether by a DCT."""

    level: int
    reduce: int
    dct: bool


class _Batch:
    """A batch while it is filled."""

    __slots__ = ("_background", "_corners_l0", "_problems", "images", "readable")

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
        self.readable = readable
        self._problems = problems
        self._background = background

    def fail(self, row: int, error: ReadError) -> None:
        """Mark a tile as unreadable."""
        self.readable[row] = False
        self.images[row] = self._background
        x_l0, y_l0 = self._corners_l0[row].tolist()
        self._problems.add(str(error), row, x_l0, y_l0)
