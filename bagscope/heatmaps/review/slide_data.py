"""What the page is told of one slide: places, layers of numbers, colours, gallery, annotations.

The page draws the overlay itself, so numbers go out as they are and not as pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagscope.artifacts import Json
from bagscope.heatmaps.colours import lookup_table
from bagscope.heatmaps.gallery import SIDES, Side, pick_sides
from bagscope.heatmaps.review.choices import GALLERY_TILES
from bagscope.heatmaps.review.folder import TILES_NAME, slide_url
from bagscope.heatmaps.review.scripts import base64_of

if TYPE_CHECKING:
    from bagscope.heatmaps.judgement import Judgement
    from bagscope.heatmaps.layers import Layer
    from bagscope.heatmaps.review.pyramid import Picture
    from bagscope.heatmaps.tile_places import TilePlaces
    from bagscope.wsi.outline import Region

APART = 2.0
"""Least distance between two tiles of a gallery, in tile edges."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryTile:
    """A tile of the gallery.

    Attributes:
        layer: id of the layer whose highest or lowest it is.
        side: which.
        rank: from 1.
        row: of the slide's tiles.
        value: in the layer.
    """

    layer: str
    side: Side
    rank: int
    row: int
    value: float

    @property
    def name(self) -> str:
        """Return the name of its picture; several layers share one picture of a tile."""
        return f"{TILES_NAME}/{self.row}.jpg"


def pick_gallery(
    layers: Sequence[Layer], places: TilePlaces, count: int = GALLERY_TILES
) -> tuple[GalleryTile, ...]:
    """Return the highest and lowest tiles of every layer."""
    found = []
    for layer in layers:
        picked = pick_sides(layer.values, places, count, min_distance_l0=APART * places.extent_l0)
        found += [
            GalleryTile(
                layer=layer.kind.id, side=side, rank=rank, row=row, value=float(layer.values[row])
            )
            for side in SIDES
            for rank, row in enumerate(picked[side].tolist(), 1)
        ]
    return tuple(found)


def slide_data(
    key: str,
    *,
    places: TilePlaces | None,
    layers: Sequence[Layer] = (),
    first_layer: str = "",
    picture: Picture | None = None,
    gallery: Sequence[GalleryTile] = (),
    cut: frozenset[int] = frozenset(),
    faithfulness: Json = None,
    judged: Mapping[str, Json] | None = None,
    agreement: str = "",
    annotations: Sequence[Region] = (),
    notes: Sequence[str] = (),
) -> dict[str, Json]:
    """Return what the page is told of one slide.

    Args:
        key: the slide's id, or its pseudonym.
        places: of its tiles; None where there are no scores to show.
        layers: of its scores.
        first_layer: id of the one to show first; the first if empty.
        picture: of the slide, None where it can't be shown.
        gallery: tiles to show beside it.
        cut: rows of the tiles that have a picture of their own.
        faithfulness: of the case, JSON.
        judged: faithfulness of each layer that has one of its own, by the layer's id.
        agreement: how far models agree on the tiles, a sentence; empty of a single model.
        annotations: in level-0 pixels.
        notes: sentences that a reader must know.
    """
    width_l0, height_l0 = _size_l0(places, picture)
    return {
        "key": key,
        "width_l0": width_l0,
        "height_l0": height_l0,
        "mpp": None if places is None or places.mpp is None else sum(places.mpp) / 2,
        "frame_note": _frame_note(places),
        "picture": None if picture is None else picture.to_json(),
        "tiles": {
            "count": 0 if places is None else len(places),
            "size_l0": None if places is None else places.extent_l0,
            "coords": "" if places is None else base64_of(places.coords_l0, "<i4"),
        },
        "layers": [
            {**layer_data(layer), "faithfulness": (judged or {}).get(layer.kind.id)}
            for layer in layers
        ],
        "initial_layer": first_layer or layers[0].kind.id if layers else None,
        "gallery": [
            {
                "layer": tile.layer,
                "side": tile.side,
                "rank": tile.rank,
                "tile": tile.row,
                "value": tile.value,
                "image": slide_url(key, tile.name) if tile.row in cut else None,
            }
            for tile in gallery
        ],
        "faithfulness": faithfulness,
        "agreement": agreement,
        "annotations": annotations_data(annotations),
        "notes": list(notes),
    }


def layer_data(layer: Layer) -> dict[str, Json]:
    """Return one layer: its numbers, what they mean and which colours they have."""
    colours = layer.colours
    return {
        "id": layer.kind.id,
        "title": layer.title,
        "class": layer.class_name or None,
        "scale": layer.kind.scale,
        "meaning": layer.meaning,
        "low": colours.low,
        "high": colours.high,
        "log": colours.logarithmic,
        "ticks": [[tick, colours.tick_text(tick)] for tick in colours.ticks()],
        "lut": base64_of(lookup_table(colours.map_name), "u1"),
        "unit_text": UNITS.get(layer.kind.scale, "") if layer.kind.shows == "score" else "",
        "values": base64_of(layer.values, "<f4"),
        "kind": layer.kind.shows,
    }


UNITS: Mapping[str, str] = {"ratio": "× uniform", "rollout": "× uniform", "percentile": "%"}
"""What stands behind a number on some scales."""


def faithfulness_data(judged: Judgement) -> dict[str, Json]:
    """Return whether the heatmap can be believed: score, warning, sentence and curves."""
    curves = judged.entry.get("curves") if judged.entry else None
    return {
        "score": judged.score,
        "warning": judged.warning,
        "text": judged.text,
        "curves": None
        if curves is None
        else {
            "shares": curves["deletion"]["shares"],
            "deletion": curves["deletion"]["answers"],
            "random_deletion": curves["deletion"]["random"],
            "insertion_shares": curves["insertion"]["shares"],
            "insertion": curves["insertion"]["answers"],
            "random_insertion": curves["insertion"]["random"],
        },
    }


def annotations_data(regions: Sequence[Region]) -> list[Json]:
    """Return annotations as polygons of rings, the exterior first; those of a class together."""
    polygons: dict[str, list[Json]] = {}
    for region in regions:
        polygons.setdefault(region.class_name, []).extend(
            [ring.round(2).tolist() for ring in polygon.rings_l0] for polygon in region.polygons
        )
    return [{"class": name, "polygons": found} for name, found in polygons.items()]


def _size_l0(places: TilePlaces | None, picture: Picture | None) -> tuple[float, float]:
    """Return the size of level 0, as far as it is known."""
    if places is not None and places.size_l0 is not None:
        return places.size_l0
    if places is not None:
        area = places.area_l0
        return area.x_l0 + area.width_l0, area.y_l0 + area.height_l0
    if picture is not None:
        return (
            picture.x_l0 + picture.width * picture.downsample,
            picture.y_l0 + picture.height * picture.downsample,
        )
    return 0, 0


def _frame_note(places: TilePlaces | None) -> str:
    """Return in what places are counted, and how to find them in QuPath."""
    if places is None or not places.is_slide:
        return "Places are those of the features, not of a slide."
    note = "Places are pixels of the slide's full resolution, from its upper left corner."
    area = places.area_l0
    if area.x_l0 or area.y_l0:
        note += (
            f" QuPath counts from the scanned area: there x is less by {area.x_l0}, y by "
            f"{area.y_l0}."
        )
    return note
