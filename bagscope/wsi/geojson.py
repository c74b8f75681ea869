"""Regions as GeoJSON that QuPath opens, and whatever people draw there read back.

Frames: inside bagscope every coordinate is in level-0 pixels of the whole image. QuPath crops
slides that state bounds, so that its (0, 0) is the corner of the bounds: the `qupath` frame. The
`openslide` frame is level 0 itself. A file says which one it uses in its `bagscope` member; QuPath
drops that member when it saves, and what it saves is in its own frame.
"""

from __future__ import annotations

import gzip
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bagscope.artifacts import canonical_json, write_bytes
from bagscope.wsi.geojson_parse import named_classes, parse_features, read_document
from bagscope.wsi.outline import FOLD, PEN, TISSUE, Polygon, Region, signed_area

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.slide import RectL0, Rgb

Frame = Literal["qupath", "openslide"]

SCHEMA_VERSION = 1
DECIMALS = 2
"""QuPath's own precision: a hundredth of a level-0 pixel."""

COLOURS: Mapping[str, Rgb] = {TISSUE: (0, 158, 115), PEN: (213, 94, 0), FOLD: (240, 228, 66)}
"""Okabe and Ito's, told apart by any kind of colour vision; no stain looks like them."""

MEANINGS: Mapping[str, str] = {
    TISSUE: "area that tiles are taken from",
    PEN: "pen marks; tiles on them are left out",
    FOLD: "folded tissue; tiles on it are left out",
}

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_OID, "bagscope regions")


# --- writing --------------------------------------------------------------------------------


def write_regions(
    path: Path,
    regions: Sequence[Region],
    *,
    bounds_l0: RectL0,
    slide_name: str,
    frame: Frame = "qupath",
) -> None:
    """Write regions as a FeatureCollection, atomically; compressed where `path` ends in `.gz`.

    The same regions give the same bytes, ids included.

    Args:
        path: where to.
        regions: in level-0 pixels.
        bounds_l0: the slide's bounds, whose corner is the origin of the `qupath` frame.
        slide_name: says which slide the file belongs to, and makes ids unique across slides.
        frame: where the file's (0, 0) lies.
    """
    content = dump_regions(regions, bounds_l0=bounds_l0, slide_name=slide_name, frame=frame)
    if path.suffix == ".gz":
        write_bytes(path, gzip.compress(content.encode(), mtime=0))
    else:
        write_bytes(path, content.encode())


def dump_regions(
    regions: Sequence[Region],
    *,
    bounds_l0: RectL0,
    slide_name: str,
    frame: Frame = "qupath",
) -> str:
    """Return regions as GeoJSON text, one feature a line (see `write_regions`)."""
    return "".join(
        region_texts(
            regions,
            bounds_l0=bounds_l0,
            slide_name=slide_name,
            frame=frame,
            class_names={r.class_name for r in regions},
        )
    )


def region_texts(
    regions: Iterable[Region],
    *,
    bounds_l0: RectL0,
    slide_name: str,
    frame: Frame,
    class_names: Iterable[str],
    about: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Yield the parts of the text of `dump_regions`, for more regions than memory should hold.

    `class_names` are those of all regions: they are stated before the first, and so is what else
    is to be said `about` them.
    """
    shift = (bounds_l0.x_l0, bounds_l0.y_l0) if frame == "qupath" else (0, 0)
    stated = {
        **(about or {}),
        "schema": "regions",
        "schema_version": SCHEMA_VERSION,
        "slide": slide_name,
        "frame": frame,
        "bounds_l0": [
            bounds_l0.x_l0,
            bounds_l0.y_l0,
            bounds_l0.width_l0,
            bounds_l0.height_l0,
        ],
        "classes": {name: MEANINGS.get(name, "") for name in sorted({*class_names} - {""})},
    }
    times_seen: Counter[uuid.UUID] = Counter()
    between = (
        f'{{"type":"FeatureCollection","bagscope":{canonical_json(stated).decode()},"features":[\n'
    )
    for region in regions:
        geometry = _geometry_text(region.polygons, shift)
        properties = canonical_json(_properties(region)).decode()
        content = "\n".join((slide_name, frame, geometry, properties))
        # Twice the same region are two annotations in QuPath, and need two ids.
        key = uuid.uuid5(_NAMESPACE, content)
        feature_id = uuid.uuid5(_NAMESPACE, f"{content}\n{times_seen[key]}")
        times_seen[key] += 1
        yield (
            f'{between}{{"type":"Feature","id":"{feature_id}","geometry":{geometry},'
            f'"properties":{properties}}}'
        )
        between = ",\n"
    yield "\n]}\n" if between == ",\n" else f"{between}\n]}}\n"


def _properties(region: Region) -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": region.object_type}
    if region.name:
        properties["name"] = region.name
    if region.class_name:
        names = region.class_name.split(": ")
        label = {"name": names[0]} if len(names) == 1 else {"names": names}
        # Some versions of QuPath refuse a class without a colour.
        properties["classification"] = {**label, "color": list(class_colour(region))}
    elif region.colour is not None:
        properties["color"] = list(region.colour)
    if region.measurements:
        properties["measurements"] = dict(region.measurements)
    return properties


def class_colour(region: Region) -> Rgb:
    """Return a region's own colour, else its class's; unknown classes get one by their name."""
    if region.colour is not None:
        return region.colour
    if region.class_name in COLOURS:
        return COLOURS[region.class_name]
    digest = uuid.uuid5(_NAMESPACE, region.class_name).bytes
    return (64 + digest[0] // 2, 64 + digest[1] // 2, 64 + digest[2] // 2)


def _geometry_text(shapes: Sequence[Polygon], shift: tuple[int, int]) -> str:
    if not shapes:
        raise ValueError("a region needs at least one polygon")
    texts = [
        "["
        + ",".join(_ring_text(ring, shift, hole=i > 0) for i, ring in enumerate(shape.rings_l0))
        + "]"
        for shape in shapes
    ]
    if len(texts) == 1:
        return f'{{"type":"Polygon","coordinates":{texts[0]}}}'
    return f'{{"type":"MultiPolygon","coordinates":[{",".join(texts)}]}}'


def _ring_text(ring: NDArray[np.float64], shift: tuple[int, int], *, hole: bool) -> str:
    """Return a ring as JSON: closed, exteriors anticlockwise as RFC 7946 counts it."""
    import numpy as np

    turned = ring[::-1] if (signed_area(ring) < 0) != hole else ring
    closed = np.concatenate([turned, turned[:1]]) - shift
    # Adding zero turns a rounded -0.0 into 0.0.
    flat = (np.round(closed, DECIMALS) + 0.0).ravel()
    if not np.isfinite(flat).all():
        raise ValueError("a polygon has a coordinate that is not a number")
    pair = f"[%.{DECIMALS}f,%.{DECIMALS}f]"
    return "[" + ",".join([pair] * len(closed)) % tuple(flat.tolist()) + "]"


# --- reading --------------------------------------------------------------------------------


def read_regions(path: Path, *, bounds_l0: RectL0, default_frame: Frame = "qupath") -> list[Region]:
    """Read annotations as regions in level-0 pixels.

    Reads a FeatureCollection, a bare array of features, one feature, or one geometry, gzipped or
    not; polygons, multipolygons and QuPath's ellipses. Points and lines beside them are passed
    over. Rings are closed, and polygons that cross themselves repaired.

    Args:
        path: the file.
        bounds_l0: the slide's bounds, whose corner is the origin of the `qupath` frame.
        default_frame: what to assume where the file does not say.

    Raises:
        SlideError: the file can't be read, holds no polygon, or a polygon makes no sense; names
            the file, the feature and the value.
    """
    document = read_document(path)
    about = document.get("bagscope") if isinstance(document, dict) else None
    frame = about.get("frame") if isinstance(about, dict) else None
    in_qupath = (frame or default_frame) == "qupath"
    shift = (bounds_l0.x_l0, bounds_l0.y_l0) if in_qupath else (0, 0)
    return parse_features(path.name, document, shift)


def class_names(path: Path) -> frozenset[str]:
    """Return the class names that a GeoJSON file uses; an empty string for "no class".

    Raises:
        SlideError: as `read_regions`.
    """
    return named_classes(path.name, read_document(path))
