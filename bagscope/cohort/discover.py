"""Finds the slides in a folder or behind a glob: paths alone, no file is opened."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bagscope.artifacts import portable_name_problem
from bagscope.cohort.cells import refuse
from bagscope.errors import CohortError
from bagscope.wording import counted

COMPOUND_SUFFIXES = (".ome.tiff", ".ome.tif", ".ome.zarr")
SLIDE_SUFFIXES = (
    ".svs",
    ".tiff",
    ".tif",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".bif",
    ".svslide",
    ".vms",
    ".vmu",
)
DICOM_SUFFIX = ".dcm"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
"""Taken from a folder only where it holds nothing else, for they are mostly thumbnails."""

_COMPANION_OWNERS = (".vms", ".vmu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Slides found, in order of path, and sentences on what was left out."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def find_slides(source: Path | str) -> Found:
    """Find the slides in a folder (and those below it), or behind a glob.

    An MRXS file and its folder are one slide, and so are a folder of DICOM files and an OME-Zarr.
    Hidden files and folders are skipped.

    Raises:
        CohortError: nothing there is a slide.
    """
    folder = Path(source)
    if folder.is_dir():
        return _from_folder(folder)
    # Path.glob wants a folder and a pattern apart; this takes what the user wrote.
    matched = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]  # noqa: PTH207
    found = sorted(set(_from_matches(matched)))
    if not found:
        raise CohortError(
            f"{source}: matches no slide ({len(matched)} other files and folders); "
            f"{_looked_for((*SLIDE_SUFFIXES, *IMAGE_SUFFIXES))}"
        )
    return Found(paths=tuple(found))


def slide_ids_of(source: Path | str, paths: Iterable[Path]) -> list[str]:
    """Return the slide id of each path: its name without suffix.

    Raises:
        CohortError: two files have the same one, or one can't be an id; each is named.
    """
    ids, problems = [], []
    first: dict[str, Path] = {}
    for path in paths:
        slide_id = stem_of(path)
        ids.append(slide_id)
        if problem := portable_name_problem(slide_id):
            problems.append(
                f"{path}: its name can't be a slide id, {slide_id!r} {problem}; rename it, or "
                "give a table"
            )
        other = first.setdefault(slide_id.casefold(), path)
        if other is not path:
            problems.append(
                f"{other} and {path} would have the same slide id {slide_id!r}; give a table "
                "with an id for each, or leave one out"
            )
    refuse(Path(source), problems)
    return ids


def is_slide_name(path: Path) -> bool:
    """Return whether a name ends like that of a slide, an image or an OME-Zarr."""
    return _suffix_of(path) in (*COMPOUND_SUFFIXES, *SLIDE_SUFFIXES, *IMAGE_SUFFIXES, DICOM_SUFFIX)


def stem_of(path: Path) -> str:
    """Return the name without its suffix; `.ome.tiff` and `.ome.zarr` go as a whole."""
    suffix = _suffix_of(path)
    return path.name[: -len(suffix)] if suffix and is_slide_name(path) else path.name


def _suffix_of(path: Path) -> str:
    name = path.name.lower()
    compound = [suffix for suffix in COMPOUND_SUFFIXES if name.endswith(suffix)]
    return compound[0] if compound else path.suffix.lower()


def _from_folder(folder: Path) -> Found:
    found = sorted(_walk(folder, seen=set()))
    slides = [path for path in found if _suffix_of(path) not in IMAGE_SUFFIXES]
    images = [path for path in found if _suffix_of(path) in IMAGE_SUFFIXES]
    if slides:
        notes: tuple[str, ...] = ()
        if images:
            notes = (
                f"{folder}: left out {len(images)} PNG and JPEG files beside "
                f"{counted(len(slides), 'slide')}; give a glob or a table to include them",
            )
        return Found(paths=tuple(slides), notes=notes)
    if images:
        return Found(paths=tuple(images))
    raise CohortError(f"{folder}: no slide in this folder or below; {_looked_for(SLIDE_SUFFIXES)}")


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        stat = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise CohortError(
            f"{folder}: can't be listed ({error.strerror or error}); check its permissions"
        ) from error
    # Links may lead back up; each folder is looked into once.
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    visible = [Path(entry.path) for entry in entries if not entry.name.startswith(".")]
    files = [path for path in visible if not path.is_dir()]
    if any(path.suffix.lower() == DICOM_SUFFIX for path in files):
        yield folder
    suffixes = {_suffix_of(path) for path in files}
    has_companions = bool(suffixes.intersection(_COMPANION_OWNERS))
    for path in files:
        suffix = _suffix_of(path)
        if suffix in IMAGE_SUFFIXES and has_companions:
            continue
        if suffix in (*COMPOUND_SUFFIXES, *SLIDE_SUFFIXES, *IMAGE_SUFFIXES):
            yield path
    owned = {path.stem for path in files if path.suffix.lower() == ".mrxs"}
    for path in visible:
        if not path.is_dir() or path.name in owned:
            continue
        if path.suffix.lower() == ".zarr":
            if _suffix_of(path) == ".ome.zarr":
                yield path
        else:
            yield from _walk(path, seen)


def _from_matches(matched: Iterable[Path]) -> Iterator[Path]:
    """Turn what a glob matched into slides: a DICOM file stands for its folder."""
    for path in matched:
        suffix = _suffix_of(path)
        if path.is_dir():
            if suffix == ".ome.zarr" or any(path.glob(f"[!.]*{DICOM_SUFFIX}")):
                yield path
        elif suffix == DICOM_SUFFIX:
            yield path.parent
        elif is_slide_name(path) and not _belongs_to_mrxs(path):
            yield path


def _belongs_to_mrxs(path: Path) -> bool:
    return path.parent.with_name(path.parent.name + ".mrxs").is_file()


def _looked_for(suffixes: Iterable[str]) -> str:
    return f"looked for {', '.join((*COMPOUND_SUFFIXES, *suffixes))} and folders of DICOM files"
