"""Plain images as slides of one level: PNG, JPEG, and TIFF without tiles.

The whole image is decoded at the first read and kept, so there is a limit to its size. Pixel
density in PNG and JPEG files is about printing and is ignored; a TIFF's resolution is believed
where it has a unit and a microscope's size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from bagscope.errors import ReadError, UnsupportedSlide
from bagscope.wsi.geometry import ReadPlan
from bagscope.wsi.reading import (
    composite,
    cut_out,
    read_tiles_by_region,
    refuse_private,
    require_level,
)
from bagscope.wsi.slide import WHITE, Downscale, Level, RectL0, SlideInfo, TileBatch
from bagscope.wsi.spacing import find_spacing, objective_power

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_PIXELS = 200_000_000
"""600 MB as RGB: what one process can be expected to hold."""
_RESOLUTION_UNITS = {2: "inch", 3: "centimeter"}


@dataclass(frozen=True, slots=True)
class _Image:
    """A recognised image file: its facts, and how to decode it to (H, W, 3) uint8 RGB."""

    format: str
    width_px: int
    height_px: int
    properties: dict[str, str]
    decode: Callable[[], NDArray[np.uint8]]


class ImageSlide:
    """A plain image. See `bagscope.wsi.slide.Slide` for the methods."""

    def __init__(
        self, path: Path, *, mpp: float | None = None, allow_estimated_mpp: bool = False
    ) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._pixels: NDArray[np.uint8] | None = None
        self._image: _Image | None = _recognise(path)
        image = self._image
        spacing = find_spacing(
            image.properties, override_mpp=mpp, allow_estimated=allow_estimated_mpp
        )
        self.info = SlideInfo(
            path=path,
            format=image.format,
            backend="image",
            width_l0=image.width_px,
            height_l0=image.height_px,
            levels=(Level(width_px=image.width_px, height_px=image.height_px, downsample=1.0),),
            bounds_l0=RectL0(x_l0=0, y_l0=0, width_l0=image.width_px, height_l0=image.height_px),
            spacing=spacing.spacing,
            spacing_problem=spacing.problem,
            warnings=spacing.warnings,
            objective=objective_power(image.properties),
            properties=image.properties,
        )

    def read_level(
        self, level: int, x_lv: int, y_lv: int, width_px: int, height_px: int
    ) -> NDArray[np.uint8]:
        """Read a rectangle; the first call decodes the whole image."""
        require_level(self.info, level, width_px, height_px)
        pixels = self._decoded()
        return cut_out(
            (self.info.width_l0, self.info.height_l0),
            (x_lv, y_lv, width_px, height_px),
            self.info.background,
            lambda x0, y0, x1, y1: pixels[y0:y1, x0:x1],
        )

    def read_tiles(
        self,
        corners_l0: NDArray[np.int32],
        plan: ReadPlan,
        *,
        downscale: Downscale = "area",
        threads: int = 1,
        out: NDArray[np.uint8] | None = None,
    ) -> TileBatch:
        """Read tiles; `downscale` is always by area, as the image is decoded once and whole."""
        return read_tiles_by_region(self, corners_l0, plan, threads=threads, out=out)

    def read_associated(self, name: str) -> NDArray[np.uint8]:
        """Refuse: a plain image has no associated images."""
        refuse_private(name, (), self._path.name)
        raise AssertionError("refuse_private raises for every name")

    def close(self) -> None:
        """Let go of the pixels; closing twice is fine."""
        with self._lock:
            self._image = None
            self._pixels = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _decoded(self) -> NDArray[np.uint8]:
        with self._lock:
            if self._image is None:
                raise ReadError(f"{self._path.name}: read after it was closed")
            if self._pixels is None:
                self._pixels = self._image.decode()
            return self._pixels


# --- formats --------------------------------------------------------------------------------


def _recognise(path: Path) -> _Image:
    """Read an image file's facts.

    Raises:
        UnsupportedSlide: not PNG, JPEG or TIFF, too large, or of colours that are not handled.
        ReadError: damaged.
    """
    with path.open("rb") as handle:
        head = handle.read(8)
    if head.startswith(b"\x89PNG"):
        return _png(path)
    if head.startswith(b"\xff\xd8"):
        return _jpeg(path)
    if head[:2] in (b"II", b"MM"):
        return _tiff(path)
    raise UnsupportedSlide(
        f"{path.name}: not a slide (neither OpenSlide's, OME, PNG, JPEG nor TIFF)"
    )


def _jpeg(path: Path) -> _Image:
    import simplejpeg

    data = path.read_bytes()
    try:
        height_px, width_px, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise ReadError(f"{path.name}: damaged JPEG ({error}); copy it again") from error
    if colours in ("CMYK", "YCCK"):
        raise _wrong_colours(path, "CMYK")
    _require_moderate(path, width_px, height_px)

    def decode() -> NDArray[np.uint8]:
        try:
            return simplejpeg.decode_jpeg(path.read_bytes(), "RGB")  # type: ignore[no-any-return]
        except (ValueError, OSError) as error:
            raise ReadError(f"{path.name}: does not decode ({error})") from error

    properties = {"icc": "present"} if b"ICC_PROFILE\0" in data[:65536] else {}
    return _Image("jpeg", width_px, height_px, properties, decode)


def _png(path: Path) -> _Image:
    with path.open("rb") as handle:
        head = handle.read(65536)
    if len(head) < 33 or head[12:16] != b"IHDR":
        raise ReadError(f"{path.name}: damaged PNG header; copy it again")
    width_px, height_px = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if head[24] == 16:
        raise _wrong_colours(path, "16-bit")
    _require_moderate(path, width_px, height_px)

    def decode() -> NDArray[np.uint8]:
        import imagecodecs

        try:
            return _to_rgb(imagecodecs.png_decode(path.read_bytes()), path)
        except (RuntimeError, ValueError, OSError) as error:
            raise ReadError(f"{path.name}: does not decode ({error})") from error

    properties = {"icc": "present"} if b"iCCP" in head else {}
    return _Image("png", width_px, height_px, properties, decode)


def _tiff(path: Path) -> _Image:
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            photometric = int(page.photometric)
            samples, bits = page.samplesperpixel, page.bitspersample
            width_px, height_px = page.imagewidth, page.imagelength
            properties = _tiff_properties(page)
            colormap = getattr(page, "colormap", None)
    except (tifffile.TiffFileError, ValueError, KeyError, IndexError, OSError) as error:
        raise ReadError(f"{path.name}: damaged TIFF ({error}); copy it again") from error
    if photometric == _PALETTE and colormap is None:
        raise ReadError(f"{path.name}: a palette TIFF without its palette")
    if photometric not in _TIFF_COLOURS:
        raise _wrong_colours(
            path, "CMYK" if photometric == 5 else f"TIFF photometric {photometric}"
        )
    if bits != 8:
        raise _wrong_colours(path, f"{bits}-bit")
    _require_moderate(path, width_px, height_px)

    def decode() -> NDArray[np.uint8]:
        import numpy as np

        try:
            with tifffile.TiffFile(path) as file:
                pixels = file.pages.first.asarray()
        except (RuntimeError, ValueError, OSError, tifffile.TiffFileError) as error:
            raise ReadError(f"{path.name}: does not decode ({error})") from error
        if photometric == _PALETTE:
            pixels = (np.asarray(colormap).T >> 8).astype(np.uint8)[pixels]
        elif photometric == _WHITE_IS_ZERO:
            pixels = 255 - pixels
        if pixels.ndim == 3 and samples == pixels.shape[0] and samples != pixels.shape[-1]:
            pixels = np.moveaxis(pixels, 0, -1)
        return _to_rgb(pixels, path)

    return _Image("tiff", width_px, height_px, properties, decode)


_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_TIFF_COLOURS = (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR)


def _tiff_properties(page: Any) -> dict[str, str]:
    """Return resolution and profile of a TIFF page, named as OpenSlide names them."""
    properties = {}
    for name in ("XResolution", "YResolution"):
        tag = page.tags.get(name)
        if tag is not None and tag.value[1]:
            properties[f"tiff.{name}"] = repr(tag.value[0] / tag.value[1])
    unit = page.tags.get("ResolutionUnit")
    # The TIFF standard's default is the inch.
    unit_name = _RESOLUTION_UNITS.get(int(unit.value) if unit is not None else 2)
    if unit_name is not None:
        properties["tiff.ResolutionUnit"] = unit_name
    if 34675 in page.tags:
        properties["icc"] = "present"
    return properties


def _to_rgb(pixels: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    """Return grey, grey with alpha, RGB or RGBA as (H, W, 3); transparency becomes white."""
    import numpy as np

    if pixels.dtype != np.uint8:
        raise _wrong_colours(path, f"{pixels.dtype.itemsize * 8}-bit")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels = pixels.shape[2]
    if channels in (1, 2):
        pixels = np.concatenate([pixels[..., :1]] * 3 + [pixels[..., 1:]], axis=2)
    elif channels not in (3, 4):
        raise _wrong_colours(path, f"{channels}-channel")
    if pixels.shape[2] == 4:
        return composite(pixels, WHITE)
    return np.ascontiguousarray(pixels)


def _wrong_colours(path: Path, kind: str) -> UnsupportedSlide:
    return UnsupportedSlide(
        f"{path.name}: {kind} pixels; convert it to 8-bit RGB first, with its own colour profile"
    )


def _require_moderate(path: Path, width_px: int, height_px: int) -> None:
    if width_px * height_px > MAX_PIXELS:
        raise UnsupportedSlide(
            f"{path.name}: {width_px:,}×{height_px:,} px are too many for an image without a "
            f"pyramid (at most {MAX_PIXELS:,} pixels); convert it to a tiled pyramidal TIFF"
        )
