"""OME-TIFF through tifffile, OME-Zarr (NGFF 0.4 and 0.5) through zarr, both as zarr arrays.

One image of a file is one slide (`scene` chooses). Only what is certain is read: eight bits, one
plane in depth and time, and one, three or (with alpha) four channels; anything else is refused
in words, since a fluorescence channel taken for red would look like an answer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from bagscope.errors import ConfigError, ReadError, SlideError, UnsupportedSlide
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

_PRIVATE_WORDS = ("label", "macro")


@dataclass(slots=True)
class _Source:
    """An open file: the arrays of one image's levels, finest first, and what is said of it.

    `axes` names each array axis by one letter: y, x, and c or s for the channels.
    """

    format: str
    axes: str
    arrays: Sequence[Any]
    properties: dict[str, str]
    associated: tuple[str, ...] = ()
    files: list[Any] = field(default_factory=list)

    def close(self) -> None:
        """Close what is open."""
        for file in self.files:
            file.close()


class OmeSlide:
    """One image of an OME-TIFF or OME-Zarr. See `bagscope.wsi.slide.Slide` for the methods."""

    def __init__(
        self,
        path: Path,
        *,
        mpp: float | None = None,
        allow_estimated_mpp: bool = False,
        scene: int = 0,
    ) -> None:
        self._path = path
        self._scene = scene
        self._lock = threading.Lock()
        source = _open(path, scene)
        self._source: _Source | None = source
        self._pid = os.getpid()
        try:
            _require_plain_colours(path, source)
            spacing = find_spacing(
                source.properties, override_mpp=mpp, allow_estimated=allow_estimated_mpp
            )
        except SlideError:
            self.close()
            raise
        sizes = [_size_px(source.axes, array.shape) for array in source.arrays]
        width_l0, height_l0 = sizes[0]
        self.info = SlideInfo(
            path=path,
            format=source.format,
            backend="ome",
            width_l0=width_l0,
            height_l0=height_l0,
            levels=tuple(
                Level(
                    width_px=width_px,
                    height_px=height_px,
                    downsample=(width_l0 / width_px + height_l0 / height_px) / 2,
                )
                for width_px, height_px in sizes
            ),
            bounds_l0=RectL0(x_l0=0, y_l0=0, width_l0=width_l0, height_l0=height_l0),
            spacing=spacing.spacing,
            spacing_problem=spacing.problem,
            warnings=spacing.warnings,
            objective=objective_power(source.properties),
            associated=source.associated,
            properties=source.properties,
        )

    def read_level(
        self, level: int, x_lv: int, y_lv: int, width_px: int, height_px: int
    ) -> NDArray[np.uint8]:
        """Read a rectangle of a level through zarr."""
        require_level(self.info, level, width_px, height_px)
        source = self._open_source()
        stored = self.info.levels[level]

        def read(x0: int, y0: int, x1: int, y1: int) -> NDArray[np.uint8]:
            window = {"y": slice(y0, y1), "x": slice(x0, x1)}
            selection = tuple(
                window.get(axis, slice(None) if axis in "cs" else 0) for axis in source.axes
            )
            try:
                block = source.arrays[level][selection]
            # Codecs and stores raise whatever they like; here it becomes one kind of error.
            except Exception as error:
                raise ReadError(f"stored block does not decode ({error})") from error
            return _to_rgb(block, source.axes)

        return cut_out(
            (stored.width_px, stored.height_px),
            (x_lv, y_lv, width_px, height_px),
            self.info.background,
            read,
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
        """Read tiles; `downscale` is always by area."""
        return read_tiles_by_region(self, corners_l0, plan, threads=threads, out=out)

    def read_associated(self, name: str) -> NDArray[np.uint8]:
        """Refuse: the only associated images that OME files name are labels and macros."""
        refuse_private(name, (), self._path.name)
        raise AssertionError("refuse_private raises for every name")

    def close(self) -> None:
        """Release the file; closing twice is fine."""
        with self._lock:
            source, self._source = self._source, None
            self._pid = 0
        if source is not None:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_source(self) -> _Source:
        """Return this process's arrays; file positions must not be shared over a fork."""
        if self._pid not in (0, os.getpid()):
            # A thread that the fork left behind may have held the lock.
            self._lock = threading.Lock()
        with self._lock:
            if self._source is None:
                raise ReadError(f"{self._path.name}: read after it was closed")
            if self._pid != os.getpid():
                self._source.close()
                self._source = _open(self._path, self._scene)
                self._pid = os.getpid()
            return self._source


def scene_count(path: Path) -> int:
    """Return how many images of a file can be opened as slides.

    Raises:
        ReadError, UnsupportedSlide: as opening it would.
    """
    if path.is_dir():
        return len(_zarr_scenes(path))
    file, series, _ = _tiff_series(path)
    file.close()
    return len(series)


def _open(path: Path, scene: int) -> _Source:
    return _open_zarr(path, scene) if path.is_dir() else _open_tiff(path, scene)


def _chosen(path: Path, scenes: Sequence[Any], scene: int) -> Any:
    if not scenes:
        raise UnsupportedSlide(f"{path.name}: an OME file without an image of a slide")
    if not 0 <= scene < len(scenes):
        raise ConfigError(f"{path.name}: has scenes 0 to {len(scenes) - 1}, not {scene}")
    return scenes[scene]


# --- OME-TIFF -------------------------------------------------------------------------------


def _open_tiff(path: Path, scene: int) -> _Source:
    import zarr

    file, series, private = _tiff_series(path)
    try:
        index, chosen = _chosen(path, series, scene)
        # Tiles that a sparse file leaves out show background, not black.
        arrays = [
            zarr.open_array(chosen.aszarr(level=level, fillvalue=255), mode="r")
            for level in range(len(chosen.levels))
        ]
        properties = _ome_properties(file.ome_metadata or "", index)
        properties["tiff.Photometric"] = getattr(chosen.keyframe.photometric, "name", "")
        if 34675 in chosen.keyframe.tags:
            properties["icc"] = "present"
    except BaseException:
        file.close()
        raise
    return _Source(
        format="ome-tiff",
        axes=chosen.axes.lower(),
        arrays=arrays,
        properties=properties,
        associated=private,
        files=[file],
    )


def _tiff_series(path: Path) -> tuple[Any, list[tuple[int, Any]], tuple[str, ...]]:
    """Return the open file, its images with their index in the XML, and names of private ones."""
    import tifffile

    try:
        file = tifffile.TiffFile(path)
        try:
            all_series = list(enumerate(file.series))
        except BaseException:
            file.close()
            raise
    except (tifffile.TiffFileError, ValueError, KeyError, IndexError, OSError) as error:
        raise ReadError(f"{path.name}: damaged OME-TIFF ({error}); copy it again") from error
    private = tuple(
        word
        for word in _PRIVATE_WORDS
        if any(word in (series.name or "").lower() for _, series in all_series)
    )
    public = [
        (i, series)
        for i, series in all_series
        if not any(word in (series.name or "").lower() for word in _PRIVATE_WORDS)
    ]
    return file, public, private


def _ome_properties(xml: str, index: int) -> dict[str, str]:
    """Return pixel size and magnification of one image of OME-XML."""
    from xml.etree import ElementTree

    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return {}
    images = root.findall("{*}Image")
    if index >= len(images):
        return {}
    properties = {}
    pixels = images[index].find("{*}Pixels")
    for name in ("PhysicalSizeX", "PhysicalSizeXUnit", "PhysicalSizeY", "PhysicalSizeYUnit"):
        if pixels is not None and name in pixels.attrib:
            properties[f"ome.{name}"] = pixels.attrib[name]
    settings = images[index].find("{*}ObjectiveSettings")
    for objective in root.iterfind("{*}Instrument/{*}Objective"):
        used = settings is not None and settings.attrib.get("ID") == objective.attrib.get("ID")
        if used and "NominalMagnification" in objective.attrib:
            properties["ome.NominalMagnification"] = objective.attrib["NominalMagnification"]
    return properties


# --- OME-Zarr -------------------------------------------------------------------------------


def _open_zarr(path: Path, scene: int) -> _Source:
    import zarr

    folder, multiscale = _chosen(path, _zarr_scenes(path), scene)
    try:
        axes = "".join(axis["name"].lower()[:1] for axis in multiscale["axes"])
        arrays = [
            zarr.open_array(folder / dataset["path"], mode="r")
            for dataset in multiscale["datasets"]
        ]
        properties = _zarr_properties(multiscale)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ReadError(f"{path.name}: damaged OME-Zarr metadata ({error!r})") from error
    return _Source(format="ome-zarr", axes=axes, arrays=arrays, properties=properties)


def _zarr_scenes(path: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """Return (folder, multiscale) of every image: one, or those of a bioformats2raw collection."""
    attributes = _zarr_attributes(path)
    if "plate" in attributes:
        raise UnsupportedSlide(f"{path.name}: a plate of wells, not a slide")
    if "bioformats2raw.layout" in attributes:
        folders = sorted(
            (p for p in path.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name)
        )
    else:
        folders = [path]
    scenes = []
    for folder in folders:
        multiscales = _zarr_attributes(folder).get("multiscales", [])
        scenes += [
            (folder, multiscale)
            for multiscale in multiscales
            if not any(word in str(multiscale.get("name", "")).lower() for word in _PRIVATE_WORDS)
        ]
    return scenes


def _zarr_attributes(folder: Path) -> Mapping[str, Any]:
    """Return a group's OME attributes: under `ome` since NGFF 0.5, at the top before."""
    import zarr

    try:
        attributes = zarr.open_group(folder, mode="r").attrs.asdict()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReadError(f"{folder.name}: not readable as Zarr ({error})") from error
    nested = attributes.get("ome", attributes)
    return nested if isinstance(nested, dict) else {}


def _zarr_properties(multiscale: Mapping[str, Any]) -> dict[str, str]:
    """Return the finest level's pixel size, named as in OME-XML."""
    axes = multiscale["axes"]
    scale = [1.0] * len(axes)
    transformations = [
        *multiscale["datasets"][0].get("coordinateTransformations", ()),
        *multiscale.get("coordinateTransformations", ()),
    ]
    for transformation in transformations:
        if transformation.get("type") == "scale":
            scale = [a * float(b) for a, b in zip(scale, transformation["scale"], strict=True)]
    properties = {}
    for axis, size in zip(axes, scale, strict=True):
        name = axis["name"].upper()
        if name in ("X", "Y"):
            properties[f"ome.PhysicalSize{name}"] = repr(size)
            properties[f"ome.PhysicalSize{name}Unit"] = axis.get("unit", "unstated")
    return properties


# --- pixels ---------------------------------------------------------------------------------


def _size_px(axes: str, shape: Sequence[int]) -> tuple[int, int]:
    return int(shape[axes.index("x")]), int(shape[axes.index("y")])


def _require_plain_colours(path: Path, source: _Source) -> None:
    """Refuse what can't be shown as RGB without guessing.

    Raises:
        UnsupportedSlide: says what the image holds.
    """
    array, axes = source.arrays[0], source.axes
    if "x" not in axes or "y" not in axes:
        raise UnsupportedSlide(f"{path.name}: axes {axes.upper()} without X and Y")
    if str(array.dtype) != "uint8":
        raise UnsupportedSlide(f"{path.name}: {array.dtype} pixels; convert it to 8-bit RGB first")
    sizes = dict(zip(axes, array.shape, strict=True))
    stacked = [f"{axis.upper()}={n}" for axis, n in sizes.items() if axis not in "xycs" and n > 1]
    channels = sizes.get("c", 1) * sizes.get("s", 1)
    if stacked:
        raise UnsupportedSlide(
            f"{path.name}: a stack ({', '.join(stacked)}); write one plane of it as a slide first"
        )
    if channels not in (1, 3, 4) or (channels == 4 and "s" not in axes):
        raise UnsupportedSlide(
            f"{path.name}: {channels} channels, not RGB; convert it to 8-bit RGB first"
        )
    if source.properties.get("tiff.Photometric") == "SEPARATED":
        raise UnsupportedSlide(f"{path.name}: CMYK pixels; convert it to 8-bit RGB first")


def _to_rgb(block: NDArray[np.uint8], axes: str) -> NDArray[np.uint8]:
    """Return a block as (h, w, 3): channels last, grey repeated, alpha over white."""
    import numpy as np

    remaining = [axis for axis in axes if axis in "yxcs"]
    channel_axes = [i for i, axis in enumerate(remaining) if axis in "cs"]
    order = [remaining.index("y"), remaining.index("x"), *channel_axes]
    pixels = np.transpose(block, order)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 4:
        return composite(pixels, WHITE)
    return pixels
