"""Several encoders' vectors of the same tiles, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bagscope.errors import SchemaError
from bagscope.features.store import FeatureStore, Rows, SlideBag, SlideRecord, read_only


class SideBySide:
    """Several encoders' stores of the same tiles.

    Attributes:
        stores: in the order of their columns.
        slide_ids: that all stores have, in order of name.
        missing: slides that only some stores have, and the places that lack them.
    """

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        if not stores:
            raise ValueError("no stores; give at least one")
        self.stores = tuple(stores)
        every = sorted({slide_id for store in stores for slide_id in store.slide_ids})
        lacking = {
            slide_id: tuple(store.location for store in stores if slide_id not in store)
            for slide_id in every
        }
        self.slide_ids = tuple(slide_id for slide_id in every if not lacking[slide_id])
        self.missing = {slide_id: places for slide_id, places in lacking.items() if places}

    def bags(self, slide_id: str, rows: Rows | None = None) -> tuple[SlideBag, ...]:
        """Return each encoder's bag of a slide; row i is the same tile in all of them.

        Raises:
            SchemaError: the stores hold other tiles of the slide.
            ArtifactError, IndexError: as of `FeatureStore.bag`.
        """
        records = [store.record(slide_id) for store in self.stores]
        for other in records[1:]:
            if difference := _tile_difference(records[0], other):
                raise SchemaError(
                    f"{slide_id}: {records[0].source} and {other.source} are not of the same "
                    f"tiles ({difference}); extract both from one tiling"
                )
        return tuple(store.bag(slide_id, rows) for store in self.stores)

    def bag(self, slide_id: str, rows: Rows | None = None) -> SlideBag:
        """Return one bag whose vectors are those of all encoders, one after the other (a copy).

        Raises:
            ArtifactError, IndexError: as of `bags`.
        """
        bags = self.bags(slide_id, rows)
        features = np.concatenate([bag.features for bag in bags], axis=1)
        return replace(bags[0], features=read_only(features))


def _tile_difference(one: SlideRecord, other: SlideRecord) -> str:
    """Return in words why two records are not of the same tiles; empty where they are."""
    if one.shape[0] != other.shape[0]:
        return f"{one.shape[0]} and {other.shape[0]} of them"
    if one.coords_l0 is None or other.coords_l0 is None:
        return "" if one.coords_l0 is other.coords_l0 else "one has no coordinates"
    rows = np.flatnonzero((one.coords_l0 != other.coords_l0).any(axis=1))
    if not rows.size:
        return ""
    places = [tuple(coords[rows[0]].tolist()) for coords in (one.coords_l0, other.coords_l0)]
    return f"row {rows[0]} lies at {places[0]} and {places[1]}"
