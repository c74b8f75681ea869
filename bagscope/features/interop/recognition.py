"""Whose files are these? Looks at names and at what is inside, never at a promise."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py

from bagscope.errors import ConfigError
from bagscope.features.feature_file import SCHEMA as FEATURE_SCHEMA
from bagscope.features.interop import clam, hs2p, plain, slideflow, stamp, torchmil
from bagscope.features.interop.foreign import Layout, Source, attributes_of
from bagscope.wording import counted
from bagscope.wsi.tile_file import SCHEMA as TILE_SCHEMA

SUFFIXES = (".h5", ".hdf5", ".pt", ".npz", ".csv")
Content = Layout | Literal["bagscope", "coordinates", "slide-vectors", "wsinfer", "unknown"]
"""What an h5 holds: a layout with one vector per tile, or something that can't be imported."""

_WITHOUT_FEATURES = {
    "bagscope": "holds bagscope's own features; to write them for another tool pass --to",
    "coordinates": "holds coordinates and no features; give the features made from them, or run "
    "bagscope extract",
    "wsinfer": "holds wsinfer's coordinates and no features; run bagscope extract",
    "slide-vectors": "holds one vector for the whole slide; give the files with one vector per "
    "tile",
    "unknown": "is of no layout that is known here (CLAM, TRIDENT, STAMP, slideflow, AtlasPatch, "
    "hs2p, torchmil, plain npz or CSV)",
}
_LISTED = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Recognised:
    """The bags found, all of one layout, and sentences on what was left out."""

    layout: Layout
    sources: tuple[Source, ...]
    notes: tuple[str, ...] = ()


def recognise(source: Path) -> Recognised:
    """Find out which tool wrote a file or folder, and list its bags by slide id.

    A damaged file in a folder counts as a bag, so that it is reported and not left out silently.

    Raises:
        ConfigError: nothing there can be imported, or it is more than one set of features.
        SchemaError: a single file that can't be read.
    """
    if source.is_dir():
        return _in_folder(source)
    if not source.is_file():
        raise ConfigError(f"{source}: does not exist; give a file or a folder of features")
    found, content = _in_file(source)
    if not found:
        raise ConfigError(f"{source}: {_WITHOUT_FEATURES[content]}")
    return Recognised(layout=found[0].layout, sources=tuple(found))


def content_of_h5(path: Path) -> Content:
    """Return what an h5 holds, by its datasets and attributes."""
    try:
        with h5py.File(path, "r") as file:
            return _content(file)
    except (OSError, RuntimeError, KeyError):
        return "unreadable"


def _content(file: h5py.File) -> Content:
    root = attributes_of(file)
    if root.get("schema") == FEATURE_SCHEMA:
        return "bagscope"
    if root.get("schema") == TILE_SCHEMA:
        return "coordinates"
    if any(name in file for name in stamp.FEATURE_NAMES):
        return "stamp"
    if isinstance(file.get("features"), h5py.Group):
        return "atlaspatch"
    coords = attributes_of(file["coords"]) if "coords" in file else {}
    if "features" in file:
        shape = file["features"].shape
        if len(shape) == 1 and shape[0] > 0:
            return "slide-vectors"
        is_trident = "patch_size_level0" in coords or "patch_level" in coords
        return "trident" if is_trident else "clam"
    if "patch_spacing_um_px" in coords:
        return "wsinfer"
    return "coordinates" if "coords" in file else "unknown"


# --- one file -------------------------------------------------------------------------------


def _in_file(path: Path) -> tuple[list[Source], Content]:
    suffix = path.suffix.lower()
    if path.name.endswith((slideflow.INDEX_SUFFIX, hs2p.META_SUFFIX)):
        return [], "coordinates"
    if path.name.endswith(hs2p.COORDINATES_SUFFIX):
        slide_id = path.name.removesuffix(hs2p.COORDINATES_SUFFIX)
        companions = hs2p.find_companions(path, slide_id)
        return [Source(layout="hs2p", slide_id=slide_id, path=path, companions=companions)], "hs2p"
    if suffix in (".h5", ".hdf5"):
        content = content_of_h5(path)
        return _from_h5(path, content), content
    if suffix == ".pt":
        return [_from_pt(path)], "clam"
    if suffix in (".npz", ".csv"):
        return plain.find(path), "plain"
    return [], "unknown"


def _from_h5(path: Path, content: Content) -> list[Source]:
    if content in _WITHOUT_FEATURES:
        return []
    layout: Layout = content  # type: ignore[assignment]  # what is no layout was left out above
    companions = clam.find_companions(path, path.stem) if layout == "clam" else {}
    return [Source(layout=layout, slide_id=path.stem, path=path, companions=companions)]


def _from_pt(path: Path) -> Source:
    companions = slideflow.find_companions(path, path.stem)
    layout: Layout = "slideflow" if "coords" in companions else "clam"
    if layout == "clam":
        companions = clam.find_companions(path, path.stem)
    return Source(layout=layout, slide_id=path.stem, path=path, companions=companions)


# --- a folder -------------------------------------------------------------------------------


def _in_folder(folder: Path) -> Recognised:
    if bags := torchmil.find(folder):
        return Recognised(layout="torchmil", sources=tuple(bags))
    found: list[Source] = []
    left_out: Counter[Content] = Counter()
    for path in _files(folder):
        sources, content = _in_file(path)
        found += sources
        if not sources:
            left_out[content] += 1
    layouts = {source.layout for source in found} - {"unreadable"}
    if "hs2p" in layouts:
        taken = {s.companions["features"] for s in found if "features" in s.companions}
        found = [source for source in found if source.path not in taken]
        layouts = {source.layout for source in found} - {"unreadable"}
    if layouts and layouts <= {"clam", "trident"}:
        # Their coordinates lie in a folder of that name, and a slide that needs them will say so.
        sound = [s for s in found if s.layout != "unreadable" or s.path.parent.name != "patches"]
        left_out["coordinates"] += len(found) - len(sound)
        found = sound
    if not found:
        reason = left_out.most_common(1)[0][0] if left_out else "unknown"
        said = _WITHOUT_FEATURES[reason] if left_out else "holds no h5, pt or npz files"
        raise ConfigError(f"{folder}: {said}")
    if len(layouts) > 1:
        raise ConfigError(
            f"{folder}: holds files of several layouts ({', '.join(sorted(layouts))}); give the "
            "folder of one of them"
        )
    (layout,) = layouts or {"unreadable"}
    chosen = _one_per_slide(folder, found)
    notes = [
        f"{counted(count, 'file')} left out: each {_WITHOUT_FEATURES[content]}"
        for content, count in sorted(left_out.items())
        if count
    ]
    return Recognised(layout=layout, sources=tuple(chosen), notes=tuple(notes))


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        # Tables beside features are lists of slides, splits and logs.
        if path.suffix.lower() in SUFFIXES and path.suffix.lower() != ".csv":
            yield path


def _one_per_slide(folder: Path, found: Sequence[Source]) -> list[Source]:
    """Return one source per slide; CLAM's h5 is preferred to the pt, which lacks coordinates."""
    by_slide: dict[str, list[Source]] = defaultdict(list)
    for source in found:
        by_slide[source.slide_id].append(source)
    chosen = []
    for slide_id, group in sorted(by_slide.items()):
        best = group
        if len(group) > 1 and {source.layout for source in group} <= {"clam", "unreadable"}:
            best = [source for source in group if source.path.suffix != ".pt"] or group
        if len(best) > 1:
            places = sorted({str(source.path.parent) for source in group})
            raise ConfigError(
                f"{folder}: has features of slide {slide_id!r} in {len(group)} files "
                f"({', '.join(places[:_LISTED])}); give the folder of one set"
            )
        chosen += best
    return chosen
