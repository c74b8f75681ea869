"""Two resolutions as one: beside each tile's vector that of the coarser tile that holds it.

    FINE::COARSE        two feature folders, or URLs, of aligned tilings (`tile --coarser-mpp`)

A tile's parent is found by its place: lattices that are aligned begin at one corner, and a coarse
tile is a whole number of fine ones wide. A slide of other tilings is refused.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bagscope.artifacts import fingerprint
from bagscope.errors import SchemaError
from bagscope.features.feature_file import UNKNOWN

if TYPE_CHECKING:
    from bagscope.features.store import FeatureStore, SlideRecord

SEPARATOR = "::"
_SLACK_L0 = 0.01
"""Of a step: lattices are stored as float64, and steps of odd scanners are no whole numbers."""


def two_of(location: str) -> tuple[str, str] | None:
    """Return the fine and the coarse place that a location names; None where it names one.

    Raises:
        SchemaError: it names more than two, or an empty one.
    """
    if SEPARATOR not in location:
        return None
    places = location.split(SEPARATOR)
    if len(places) != 2 or not all(places):
        raise SchemaError(
            f"{location}: names {len(places)} places of features; write FINE{SEPARATOR}COARSE"
        )
    return places[0], places[1]


class AlignedBackend:
    """The slides that both stores have."""

    def __init__(self, fine: FeatureStore, coarse: FeatureStore) -> None:
        self._fine, self._coarse = fine, coarse
        self.slide_ids = tuple(slide_id for slide_id in fine.slide_ids if slide_id in coarse)
        if not self.slide_ids:
            raise SchemaError(
                f"{fine.location} and {coarse.location} have no slide in common; extract both"
            )
        self._records: dict[str, tuple[SlideRecord, NDArray[np.int64]]] = {}

    def record(self, slide_id: str) -> SlideRecord:
        """Return what is known of a slide: the fine tiles, and which coarse ones hold them."""
        return self._of(slide_id)[0]

    def features(
        self, slide_id: str, rows: NDArray[np.int64] | None, *, copy: bool = False
    ) -> NDArray[Any]:
        """Return the vectors of both resolutions side by side, in memory of their own."""
        parent = self._of(slide_id)[1]
        fine = self._fine.bag(slide_id, rows).features
        coarse = self._coarse.bag(slide_id).features
        return np.concatenate([fine, coarse[parent if rows is None else parent[rows]]], axis=1)

    def _of(self, slide_id: str) -> tuple[SlideRecord, NDArray[np.int64]]:
        if slide_id not in self._records:
            fine, coarse = self._fine.record(slide_id), self._coarse.record(slide_id)
            parent = parents_of(fine, coarse)
            self._records[slide_id] = _joined(fine, coarse, parent), parent
        return self._records[slide_id]


def parents_of(fine: SlideRecord, coarse: SlideRecord) -> NDArray[np.int64]:
    """Return the row of the coarse tile that holds each fine one: (N,).

    Raises:
        SchemaError: the tilings are not aligned, or a fine tile lies in no coarse one.
    """
    steps, origins = _lattice_of(fine), _lattice_of(coarse)
    ratio = round(origins[0] / steps[0])
    is_whole = ratio >= 1 and abs(origins[0] - ratio * steps[0]) <= _SLACK_L0 * steps[0]
    is_same = np.allclose(steps[1], origins[1], rtol=0, atol=_SLACK_L0 * steps[0])
    if not is_whole or not is_same or fine.grid is None or coarse.grid is None:
        raise _not_aligned(fine, coarse, "their lattices do not fall together")
    row_of = {place: row for row, place in enumerate(map(tuple, coarse.grid.tolist()))}
    parent = np.array([row_of.get(cell, -1) for cell in map(tuple, (fine.grid // ratio).tolist())])
    if alone := int((parent < 0).sum()):
        raise _not_aligned(fine, coarse, f"{alone} of {len(parent)} tiles lie in no coarse tile")
    return parent.astype(np.int64)


def _not_aligned(fine: SlideRecord, coarse: SlideRecord, why: str) -> SchemaError:
    return SchemaError(
        f"{fine.slide_id}: {fine.source} and {coarse.source} are not of aligned tilings ({why}); "
        "tile both resolutions at once, with bagscope tile --mpp FINE --coarser-mpp COARSE"
    )


def _lattice_of(record: SlideRecord) -> tuple[float, NDArray[np.float64]]:
    """Return step and origin in level-0 pixels; the step is NaN where they are not known."""
    step = record.attributes.get("step_l0")
    origin = record.attributes.get("origin_l0")
    if step is None or origin is None:
        raise SchemaError(
            f"{record.source}: does not say on which lattice its tiles lie, so no coarser tile can "
            "be found; extract it with bagscope"
        )
    return float(np.ravel(step)[0]), np.asarray(origin, np.float64)


def _joined(fine: SlideRecord, coarse: SlideRecord, parent: NDArray[np.int64]) -> SlideRecord:
    from dataclasses import replace

    hashes = fine.weights_sha256, coarse.weights_sha256
    fields = {"fine": fine.fingerprint, "coarse": coarse.fingerprint}
    return replace(
        fine,
        shape=(fine.shape[0], fine.shape[1] + coarse.shape[1]),
        dtype=np.result_type(fine.dtype, coarse.dtype).name,
        encoder={
            "name": f"{fine.encoder.get('name', UNKNOWN)}{SEPARATOR}"
            f"{coarse.encoder.get('name', UNKNOWN)}",
            "fine": dict(fine.encoder),
            "coarse": dict(coarse.encoder),
            # The coarse tiling is part of what a model was trained on; that of the fine tiles
            # stands in the attributes, as always.
            "coarse_mpp": coarse.attributes.get("mpp"),
            "coarse_tile_px": coarse.attributes.get("tile_px"),
        },
        weights_sha256=UNKNOWN
        if UNKNOWN in hashes
        else hashlib.sha256("".join(hashes).encode()).hexdigest(),
        fields=fields,
        fingerprint=fingerprint(fields),
        parent=parent,
    )
