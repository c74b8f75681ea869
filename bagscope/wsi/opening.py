"""Opening a file as a slide: which backend reads it, and one clear sentence where none does."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from bagscope.errors import ConfigError, ReadError, UnsupportedSlide

if TYPE_CHECKING:
    from bagscope.wsi.openslide_backend import OpenSlideSlide
    from bagscope.wsi.slide import RectL0, Slide

_log = logging.getLogger(__name__)

BackendName = Literal["jpegtiff", "openslide", "ome", "image"]
_IMAGE_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_ZARR_MARKS = ("zarr.json", ".zgroup", ".zattrs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One way of reading slides: its name, what it reads, and whether its libraries load.

    `version` names the libraries that do the work; `problem` says why it is not available.
    """

    name: BackendName
    reads: str
    available: bool
    version: str = ""
    problem: str = ""


def open_slide(
    path: Path | str,
    *,
    mpp: float | None = None,
    backend: str | None = None,
    allow_estimated_mpp: bool = False,
    scene: int | None = None,
) -> Slide:
    """Open a whole-slide image.

    Args:
        path: a file, or the folder of an OME-Zarr or of one DICOM series.
        mpp: micrometres per level-0 pixel, instead of what the file states.
        backend: "jpegtiff", "openslide", "ome" or "image"; chosen by content if None.
        allow_estimated_mpp: accept 10 / objective power where no pixel size is stated.
        scene: which image of a file that holds several (OME only), from 0.

    Raises:
        UnsupportedSlide: nothing here opens it.
        SpacingError: `mpp` is not a believable pixel size.
        ReadError: the file is of a known kind, but damaged or not readable.
        ConfigError: no such backend or scene.
    """
    path = Path(path)
    head = _head(path)
    require_backend(backend)
    names: Sequence[str] = [backend] if backend is not None else _candidates(path, head)
    if scene and names[0] != "ome":
        raise ConfigError(f"{path.name}: scene {scene} asked for, but the file holds one image")
    if path.is_dir() and names[0] != "ome":
        path = _first_dicom(path)
    return _open_first(path, names, mpp, allow_estimated_mpp, scene or 0)


def require_backend(name: str | None) -> None:
    """Refuse a backend's name that is not one; None, the automatic choice, is fine.

    Raises:
        ConfigError: lists the names.
    """
    if name is not None and name not in get_args(BackendName):
        raise ConfigError(f"no backend {name!r}; there are {', '.join(get_args(BackendName))}")


def stored_faults_l0(slide: Slide) -> list[RectL0]:
    """Return the level-0 rectangles whose stored bytes lie beyond the end of a cut-short file.

    Only the backend that knows where tiles are stored can tell; others return an empty list.
    """
    from bagscope.wsi.jpegtiff_backend import JpegTiffSlide

    return slide.stored_faults_l0() if isinstance(slide, JpegTiffSlide) else []


def backends() -> tuple[Backend, ...]:
    """List the backends, best first, and whether each would work here."""
    from importlib.metadata import PackageNotFoundError, version

    def entry(name: BackendName, reads: str, packages: Sequence[str]) -> Backend:
        try:
            versions = ", ".join(f"{package} {version(package)}" for package in packages)
        except PackageNotFoundError as error:
            missing = f"{error.name} is not installed"
            return Backend(name=name, reads=reads, available=False, problem=missing)
        return Backend(name=name, reads=reads, available=True, version=versions)

    openslide = ("openslide-python", "openslide-bin")
    return (
        entry("jpegtiff", "tiled JPEG TIFF: SVS, generic, Philips", ("simplejpeg", *openslide)),
        entry("openslide", "everything that OpenSlide opens", openslide),
        entry("ome", "OME-TIFF, OME-Zarr 0.4 and 0.5", ("tifffile", "zarr")),
        entry("image", "PNG, JPEG, TIFF without a pyramid", ("simplejpeg", "tifffile")),
    )


def _head(path: Path) -> bytes:
    """Return a file's first bytes, or none of a folder.

    Raises:
        UnsupportedSlide: missing, empty, or not a file.
        ReadError: not readable.
    """
    try:
        if path.is_dir():
            os.scandir(path).close()
            return b""
        if not path.is_file():
            what = "is not a regular file" if path.exists() else "does not exist"
            raise UnsupportedSlide(f"{path}: {what}; check the path")
        with path.open("rb") as handle:
            head = handle.read(16)
    except PermissionError as error:
        raise ReadError(f"{path}: no permission to read it; change its mode or owner") from error
    except OSError as error:
        raise ReadError(f"{path}: can't be read ({error.strerror})") from error
    if not head:
        raise UnsupportedSlide(f"{path}: is empty (0 bytes); copy it again")
    return head


def _candidates(path: Path, head: bytes) -> list[str]:
    """Return the backends that may read a file, in the order in which they are tried."""
    from bagscope.wsi.tiff_directory import looks_like_tiff

    if path.is_dir():
        return ["ome"] if any((path / mark).is_file() for mark in _ZARR_MARKS) else ["openslide"]
    if head.startswith(_IMAGE_SIGNATURES):
        return ["image"]
    if not looks_like_tiff(head):
        return ["openslide"]
    description, damage = _first_description(path)
    if "<OME" in description:
        return ["ome"]
    # Half of a pyramid must not pass for a plain image.
    return ["fastest"] if damage else ["fastest", "image"]


def _first_description(path: Path) -> tuple[str, str]:
    """Return a TIFF's first image description, and what is wrong with its directories."""
    from bagscope.wsi import tiff_directory as tiff

    descriptor = os.open(path, os.O_RDONLY)
    try:
        first = tiff.read_structure(descriptor).directories[0]
        return first.text(tiff.IMAGE_DESCRIPTION)[:4096], ""
    except ReadError as error:
        return "", str(error)
    finally:
        os.close(descriptor)


def _open_first(
    path: Path, names: Sequence[str], mpp: float | None, allow_estimated_mpp: bool, scene: int
) -> Slide:
    """Open with the first backend that knows the file; the last one's refusal is the answer."""
    refusal: UnsupportedSlide | None = None
    for name in names:
        try:
            return _open_with(name, path, mpp, allow_estimated_mpp, scene)
        except UnsupportedSlide as error:
            refusal = error
    assert refusal is not None
    if names == ["fastest"]:
        raise ReadError(f"{path.name}: {_first_description(path)[1]}") from refusal
    raise refusal


def _open_with(
    name: str, path: Path, mpp: float | None, allow_estimated_mpp: bool, scene: int
) -> Slide:
    if name in ("fastest", "jpegtiff", "openslide"):
        from bagscope.wsi.openslide_backend import OpenSlideSlide

        opened = OpenSlideSlide(path, mpp=mpp, allow_estimated_mpp=allow_estimated_mpp)
        return opened if name == "openslide" else _fast(path, opened, required=name == "jpegtiff")
    if name == "ome":
        from bagscope.wsi.ome_backend import OmeSlide

        return OmeSlide(path, mpp=mpp, allow_estimated_mpp=allow_estimated_mpp, scene=scene)
    from bagscope.wsi.image_backend import ImageSlide

    return ImageSlide(path, mpp=mpp, allow_estimated_mpp=allow_estimated_mpp)


def _fast(path: Path, opened: OpenSlideSlide, *, required: bool) -> Slide:
    """Return the fast path's slide, or where it does not know the file OpenSlide's own.

    Raises:
        UnsupportedSlide: it does not know the file, and is required.
    """
    from bagscope.wsi.jpegtiff_backend import JpegTiffSlide
    from bagscope.wsi.stored_tiles import NotStoredAsTiles

    try:
        return JpegTiffSlide(path, opened=opened)
    except NotStoredAsTiles as reason:
        if not required:
            _log.debug("%s: no fast path: %s", path.name, reason)
            return opened
        opened.close()
        raise UnsupportedSlide(f"{path.name}: not for backend jpegtiff: {reason}") from reason


def _first_dicom(folder: Path) -> Path:
    """Return the file by which OpenSlide opens a DICOM series.

    Raises:
        UnsupportedSlide: the folder holds none.
    """
    files = sorted(folder.glob("*.dcm"))
    if not files:
        raise UnsupportedSlide(
            f"{folder}: is a folder, neither OME-Zarr nor a DICOM series; give the slide's file"
        )
    return files[0]
