"""GeoJSON as the tools of this field write it, down to regions; every refusal names its feature."""

from __future__ import annotations

import gzip
import json
import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagscope.errors import SlideError
from bagscope.wsi.outline import Polygon, Region

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.slide import Rgb

_log = logging.getLogger(__name__)

_AREAS = ("Polygon", "MultiPolygon", "GeometryCollection")
_NOT_AREAS = ("Point", "MultiPoint", "LineString", "MultiLineString")
_ELLIPSE_POINTS = 256


def read_document(path: Path) -> Any:
    """Return the JSON of a file, unpacked where it is gzipped.

    Raises:
        SlideError: missing, unreadable, or not JSON.
    """
    try:
        raw = path.read_bytes()
        if raw.startswith(b"\x1f\x8b"):
            raw = gzip.decompress(raw)
        return json.loads(raw.decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise SlideError(f"{path}: no such GeoJSON file; check the path") from error
    except (OSError, EOFError, zlib.error) as error:
        raise SlideError(f"{path.name}: could not be read ({error}); export it again") from error
    except (ValueError, RecursionError) as error:
        raise SlideError(f"{path.name}: not JSON ({error}); export it again") from error


def parse_features(name: str, document: Any, shift: tuple[float, float]) -> list[Region]:
    """Return the regions of a GeoJSON document, moved by `shift` (x, y).

    Args:
        name: the file's name, for messages.
        document: parsed JSON.
        shift: what is added to every coordinate.

    Raises:
        SlideError: no polygon among its features, or one that makes no sense.
    """
    regions = []
    passed_over = []
    for where, feature in _walk(name, document):
        geometry = feature.get("geometry")
        shapes = _shapes(where, geometry)
        if not shapes:
            passed_over.append(f"{where} ({_kind(geometry)})")
            continue
        properties = _mapping(feature.get("properties"))
        class_name, colour = _classification(properties)
        regions.append(
            Region(
                class_name=class_name,
                polygons=tuple(_moved(piece, shift) for s in shapes for piece in _valid(where, s)),
                name=_text(properties.get("name")),
                object_type=_object_type(properties),
                colour=colour,
                measurements=_measurements(properties.get("measurements")),
            )
        )
    if passed_over and not regions:
        raise SlideError(f"{passed_over[0]}: the file holds no polygon; draw areas, not lines")
    if passed_over:
        _log.warning("%s: not an area; passed over", ", ".join(passed_over[:5]))
    return regions


def named_classes(name: str, document: Any) -> frozenset[str]:
    """Return the class names of all area features, an empty string for "no class"."""
    return frozenset(
        _classification(_mapping(feature.get("properties")))[0]
        for _, feature in _walk(name, document)
        if _kind(feature.get("geometry")) in _AREAS
    )


# --- features -------------------------------------------------------------------------------


def _walk(name: str, document: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place for messages, feature) for every feature, children after their parent."""
    kind = _kind(document)
    if isinstance(document, list):
        listed = document
    elif kind == "FeatureCollection" and isinstance(document.get("features"), list):
        listed = document["features"]
    elif kind == "Feature" or kind in _AREAS or kind in _NOT_AREAS:
        listed = [document]
    else:
        raise SlideError(
            f"{name}: neither a FeatureCollection, nor features, nor a geometry "
            f"(found {_brief(document)}); export the annotations as GeoJSON"
        )
    for i, item in enumerate(listed):
        yield from _feature_and_children(f"{name}: features[{i}]", item)


def _feature_and_children(where: str, item: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    kind = _kind(item)
    if kind == "Feature":
        yield where, item
        children = item.get("childObjects")
        for i, child in enumerate(children if isinstance(children, list) else ()):
            yield from _feature_and_children(f"{where}.childObjects[{i}]", child)
    elif kind in _AREAS or kind in _NOT_AREAS:
        yield where, {"geometry": item}
    else:
        raise SlideError(f"{where} is {_brief(item)}, not a GeoJSON feature; remove or redraw it")


def _kind(item: Any) -> str:
    """Return the GeoJSON type of an item; empty where it has none."""
    if not isinstance(item, Mapping):
        return ""
    kind = item.get("type")
    return kind if isinstance(kind, str) else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _classification(properties: Mapping[str, Any]) -> tuple[str, Rgb | None]:
    """Return class name and colour from any of the forms in use."""
    label = properties.get("classification")
    if isinstance(label, str) and label.lstrip().startswith("{"):
        try:
            label = json.loads(label)
        except ValueError:
            return _text(label), None
    if isinstance(label, Mapping):
        names = label.get("names")
        if isinstance(names, list):
            text = ": ".join(_text(part) for part in names if _text(part))
        else:
            text = _text(label.get("name"))
        colour = label.get("color", label.get("colorRGB"))
        return text or _text(properties.get("name")), _colour(colour)
    return _text(label) or _text(properties.get("name")), None


def _colour(value: Any) -> Rgb | None:
    """Return a colour given as [r, g, b(, a)] or as a packed, perhaps negative, integer."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value >> 16) & 255, (value >> 8) & 255, value & 255
    if isinstance(value, list) and len(value) >= 3:
        red, green, blue = value[:3]
        if all(isinstance(v, int) and 0 <= v <= 255 for v in (red, green, blue)):
            return red, green, blue
    return None


def _object_type(properties: Mapping[str, Any]) -> str:
    for key in ("objectType", "object_type", "type"):
        if _text(properties.get(key)):
            return _text(properties[key])
    return "annotation"


def _measurements(value: Any) -> dict[str, float]:
    """Return the finite measurements of an object or of a list of {name, value}."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = [(m.get("name"), m.get("value")) for m in value if isinstance(m, Mapping)]
    return {
        key: float(number)
        for key, number in pairs
        if isinstance(key, str)
        and isinstance(number, (int, float))
        and not isinstance(number, bool)
        and math.isfinite(number)
    }


# --- geometry -------------------------------------------------------------------------------


def _shapes(where: str, geometry: Any) -> list[Polygon]:
    """Return the polygons of a geometry; none where it is not an area."""
    if geometry is None:
        return []
    kind = _kind(geometry)
    if kind in _NOT_AREAS:
        return []
    if kind not in _AREAS:
        raise SlideError(f"{where}: its geometry is {_brief(geometry)}; draw it again as a polygon")
    if kind == "GeometryCollection":
        parts = geometry.get("geometries")
        if not isinstance(parts, list):
            raise SlideError(f"{where}: a GeometryCollection without a list of geometries")
        return [shape for part in parts for shape in _shapes(where, part)]
    coordinates = geometry.get("coordinates")
    if kind == "Polygon":
        shapes = [_polygon(where, coordinates)]
    elif isinstance(coordinates, list) and coordinates:
        shapes = [_polygon(where, part) for part in coordinates]
    else:
        raise SlideError(f"{where}: a MultiPolygon whose coordinates are {_brief(coordinates)}")
    if geometry.get("isEllipse") is True:
        return [_ellipse_within(shapes)]
    return shapes


def _polygon(where: str, rings: Any) -> Polygon:
    if not isinstance(rings, list) or not rings:
        raise SlideError(f"{where}: a polygon whose coordinates are {_brief(rings)}; redraw it")
    exterior, *holes = (_ring(where, ring) for ring in rings)
    return Polygon(exterior_l0=exterior, holes_l0=tuple(holes))


def _ring(where: str, points: Any) -> NDArray[np.float64]:
    """Return a ring as (n, 2), open, without points that repeat the one before."""
    import numpy as np

    if not isinstance(points, list):
        raise SlideError(f"{where}: a ring is {_brief(points)}, not a list of points")
    for point in points:
        if not _is_point(point):
            raise SlideError(f"{where}: a point is {_brief(point)}, not two numbers; redraw it")
    ring: NDArray[np.float64] = np.array([point[:2] for point in points], np.float64)
    ring = ring.reshape(-1, 2)
    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)]
    if len(np.unique(ring, axis=0)) < 3:
        raise SlideError(
            f"{where}: a ring of {len(points)} points ({_brief(points)}) encloses nothing; "
            "redraw or remove it"
        )
    return ring


def _is_point(point: Any) -> bool:
    return (
        isinstance(point, list)
        and len(point) >= 2
        and type(point[0]) in (int, float)
        and type(point[1]) in (int, float)
        and math.isfinite(point[0])
        and math.isfinite(point[1])
    )


def _ellipse_within(shapes: Sequence[Polygon]) -> Polygon:
    """Return the ellipse that fills the shapes' bounding box, which is how QuPath reads one."""
    import numpy as np

    points = np.concatenate([shape.exterior_l0 for shape in shapes])
    low, high = points.min(axis=0), points.max(axis=0)
    angle = np.arange(_ELLIPSE_POINTS) * (2 * np.pi / _ELLIPSE_POINTS)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    # A polygon on the ellipse covers a little less than the ellipse; this gives its area back.
    scale = math.sqrt(2 * math.pi / (_ELLIPSE_POINTS * math.sin(2 * math.pi / _ELLIPSE_POINTS)))
    return Polygon(exterior_l0=(low + high) / 2 + circle * scale * (high - low) / 2)


def _valid(where: str, shape: Polygon) -> list[Polygon]:
    """Return the polygon itself, or what becomes of it where its rings cross."""
    from bagscope.wsi.simplify import crossing_rings

    if not crossing_rings(shape.rings_l0):
        return [shape]
    import numpy as np
    import shapely

    repaired = shapely.make_valid(shapely.Polygon(shape.exterior_l0, shape.holes_l0))
    pieces = [
        piece
        for part in shapely.get_parts(repaired)
        for piece in shapely.get_parts(part)
        if piece.geom_type == "Polygon" and piece.area > 0
    ]
    if not pieces:
        raise SlideError(
            f"{where}: its outline ({_brief(shape.exterior_l0.tolist())}) encloses nothing; "
            "redraw or remove it"
        )

    def ring(line: Any) -> NDArray[np.float64]:
        return np.asarray(line.coords, np.float64)[:-1, :2]

    return [
        Polygon(exterior_l0=ring(piece.exterior), holes_l0=tuple(ring(h) for h in piece.interiors))
        for piece in pieces
    ]


def _moved(shape: Polygon, shift: tuple[float, float]) -> Polygon:
    return Polygon(
        exterior_l0=shape.exterior_l0 + shift,
        holes_l0=tuple(hole + shift for hole in shape.holes_l0),
    )


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
