"""Slides through OpenSlide: every format that it opens, and the facts of those we read faster."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from bagscope.errors import ReadError, UnsupportedSlide
from bagscope.wsi.geometry import ReadPlan
from bagscope.wsi.reading import (
    composite,
    read_tiles_by_region,
    refuse_private,
    require_level,
)
from bagscope.wsi.slide import WHITE, Downscale, Level, RectL0, Rgb, SlideInfo, TileBatch
from bagscope.wsi.spacing import find_spacing, objective_power

if TYPE_CHECKING:
    import numpy as np
    import openslide
    from numpy.typing import NDArray

_log = logging.getLogger(__name__)

_EXACT_OFFSET_PX = 1 / 512
"""Cairo draws without resampling where a level position is this close to a whole pixel."""
_MAX_LEAD_PX = 64
"""How far before a region OpenSlide may be made to start for the sake of a whole pixel."""


class OpenSlideSlide:
    """A slide that OpenSlide reads. See `bagscope.wsi.slide.Slide` for the methods."""

    def __init__(
        self,
        path: Path,
        *,
        mpp: float | None = None,
        allow_estimated_mpp: bool = False,
        backend: str = "openslide",
    ) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle: openslide.OpenSlide | None = open_handle(path)
        self._pid = os.getpid()
        self._closed = False
        self.info: SlideInfo = describe(
            self._handle,
            path,
            backend=backend,
            mpp=mpp,
            allow_estimated_mpp=allow_estimated_mpp,
        )

    def read_level(
        self, level: int, x_lv: int, y_lv: int, width_px: int, height_px: int
    ) -> NDArray[np.uint8]:
        """Read a rectangle of a level; a level pixel is returned unresampled where it can be.

        OpenSlide is addressed in whole level-0 pixels and interpolates where such a position
        falls between two pixels of a level, so a region is started where it does not, if there is
        such a place close by.
        """
        require_level(self.info, level, width_px, height_px)
        downsample = self.info.levels[level].downsample
        x_l0, lead_x = reachable_start(x_lv, downsample)
        y_l0, lead_y = reachable_start(y_lv, downsample)
        size = (width_px + lead_x, height_px + lead_y)
        rgba = self._read_rgba((x_l0, y_l0), level, size)
        return composite(rgba[lead_y:, lead_x:], self.info.background)

    def read_tiles(
        self,
        corners_l0: NDArray[np.int32],
        plan: ReadPlan,
        *,
        downscale: Downscale = "area",
        threads: int = 1,
        out: NDArray[np.uint8] | None = None,
    ) -> TileBatch:
        """Read tiles; `downscale` is always by area, as OpenSlide decodes at full size only."""
        return read_tiles_by_region(self, corners_l0, plan, threads=threads, out=out)

    def read_associated(self, name: str) -> NDArray[np.uint8]:
        """Read an associated image; `label` and `macro` are refused."""
        import numpy as np

        refuse_private(name, self.info.associated, self._path.name)
        openslide_error = _openslide_error()
        handle = self._open_handle()
        try:
            image = handle.associated_images[name]
        except openslide_error as error:
            self._discard(handle)
            reason = _without_folder(error, self._path)
            raise ReadError(f"{self._path.name}: {name} image: {reason}") from error
        return composite(np.asarray(image.convert("RGBA")), self.info.background)

    def close(self) -> None:
        """Release the handle; closing twice is fine."""
        with self._lock:
            if self._handle is not None and self._pid == os.getpid():
                self._handle.close()
            self._handle = None
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read_rgba(
        self, location_l0: tuple[int, int], level: int, size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        import numpy as np

        openslide_error = _openslide_error()
        handle = self._open_handle()
        try:
            return np.asarray(handle.read_region(location_l0, level, size))
        except openslide_error as error:
            _log.debug("%s: reopened after %s", self._path.name, error)
            self._discard(handle)
        # A handle that failed once fails for ever, so the fault may be another thread's: only a
        # failure on a handle that nobody else has is this region's own.
        fresh = open_handle(self._path)
        try:
            rgba = np.asarray(fresh.read_region(location_l0, level, size))
        except openslide_error as error:
            reason = _without_folder(error, self._path)
            raise ReadError(f"OpenSlide could not read it ({reason})") from error
        with self._lock:
            if self._handle is None and not self._closed:
                self._handle = fresh
        return rgba

    def _open_handle(self) -> openslide.OpenSlide:
        """Return this process's handle; one that came through a fork is never used."""
        if self._pid != os.getpid():
            # A thread that the fork left behind may have held the lock.
            self._lock = threading.Lock()
            self._handle, self._pid = None, os.getpid()
        with self._lock:
            if self._closed:
                raise ReadError(f"{self._path.name}: read after it was closed")
            if self._handle is None:
                self._handle = open_handle(self._path)
            return self._handle

    def _discard(self, failed: openslide.OpenSlide) -> None:
        # It is left to the garbage collector: other threads may be inside it.
        with self._lock:
            if self._handle is failed:
                self._handle = None


def reachable_start(position_lv: int, downsample: float) -> tuple[int, int]:
    """Return the level-0 position from which OpenSlide reaches a level pixel, and the lead.

    The lead is how many pixels before `position_lv` the reading starts. Without a position close
    by that falls on a whole pixel, the nearest is taken: off by half a level-0 pixel at most.
    """
    for lead_px in range(_MAX_LEAD_PX):
        exact_l0 = (position_lv - lead_px) * downsample
        position_l0 = round(exact_l0)
        if abs(exact_l0 - position_l0) < _EXACT_OFFSET_PX * downsample:
            return position_l0, lead_px
    return round(position_lv * downsample), 0


def open_handle(path: Path) -> openslide.OpenSlide:
    """Open a file with OpenSlide.

    Raises:
        UnsupportedSlide: OpenSlide does not know the format.
        ReadError: it knows the format, but the file is damaged.
    """
    import openslide

    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise UnsupportedSlide(
            f"{path.name}: not a slide that OpenSlide knows; check that the file is complete, "
            "or convert it to a pyramidal TIFF"
        ) from error
    except openslide.OpenSlideError as error:
        raise ReadError(
            f"{path.name}: OpenSlide can't open it ({_without_folder(error, path)}); "
            "the file may be damaged or cut short: copy it again"
        ) from error


def describe(
    handle: openslide.OpenSlide,
    path: Path,
    *,
    backend: str,
    mpp: float | None,
    allow_estimated_mpp: bool,
) -> SlideInfo:
    """Return the facts of a slide as OpenSlide states them."""
    properties = dict(handle.properties)
    if int(properties.get("openslide.icc-size", "0")) > 0:
        properties["icc"] = "present"
    width_l0, height_l0 = handle.dimensions
    spacing = find_spacing(properties, override_mpp=mpp, allow_estimated=allow_estimated_mpp)
    return SlideInfo(
        path=path,
        format=properties.get("openslide.vendor", "unknown"),
        backend=backend,
        width_l0=width_l0,
        height_l0=height_l0,
        levels=tuple(
            Level(width_px=width_px, height_px=height_px, downsample=downsample)
            for (width_px, height_px), downsample in zip(
                handle.level_dimensions, handle.level_downsamples, strict=True
            )
        ),
        bounds_l0=_bounds(properties, width_l0, height_l0),
        spacing=spacing.spacing,
        spacing_problem=spacing.problem,
        warnings=spacing.warnings,
        objective=objective_power(properties),
        background=_background(properties),
        associated=tuple(sorted(handle.associated_images)),
        properties=properties,
    )


def _bounds(properties: dict[str, str], width_l0: int, height_l0: int) -> RectL0:
    """Return the scanned area, clipped to level 0; the whole of it where none is stated."""
    try:
        x_l0, y_l0, width, height = (
            int(properties[f"openslide.bounds-{edge}"]) for edge in ("x", "y", "width", "height")
        )
    except (KeyError, ValueError):
        return RectL0(x_l0=0, y_l0=0, width_l0=width_l0, height_l0=height_l0)
    left, top = max(0, x_l0), max(0, y_l0)
    right, bottom = min(width_l0, x_l0 + width), min(height_l0, y_l0 + height)
    if right <= left or bottom <= top:
        return RectL0(x_l0=0, y_l0=0, width_l0=width_l0, height_l0=height_l0)
    return RectL0(x_l0=left, y_l0=top, width_l0=right - left, height_l0=bottom - top)


def _background(properties: dict[str, str]) -> Rgb:
    text = properties.get("openslide.background-color", "")
    if len(text) != 6:
        return WHITE
    try:
        red, green, blue = bytes.fromhex(text)
    except ValueError:
        return WHITE
    return red, green, blue


def _without_folder(error: Exception, path: Path) -> str:
    """Return an error's text without the folder, which has no place in reports."""
    return str(error).replace(str(path), path.name)


def _openslide_error() -> type[Exception]:
    import openslide

    return openslide.OpenSlideError
