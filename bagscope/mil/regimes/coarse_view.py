"""The coarse tiles of a source of two resolutions, as a source of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bagscope.errors import ConfigError
from bagscope.mil.cases import Case
from bagscope.mil.sources import BagSource, CaseBag, Rows
from bagscope.mil.targets import TargetSpec


class CoarseView:
    """Each case's coarse tiles once, read beside the first fine tile that each of them holds."""

    def __init__(
        self,
        source: BagSource,
        width: int,
        targets: Sequence[TargetSpec],
        negative: Sequence[str],
    ) -> None:
        """Find the coarse tiles of every case.

        Args:
            source: of vectors [fine ‖ coarse].
            width: of the coarse part.
            targets: of the run.
            negative: classes of its single target that become one; labels stay where empty.

        Raises:
            ConfigError: tiles without a parent.
        """
        self._source = source
        self.dimension = width
        self.cases = tuple(_relabelled(case, targets, negative) for case in source.cases)
        self._firsts = [self._first_children(place) for place in range(len(source.cases))]
        self.lengths = np.array([len(rows) for rows in self._firsts], np.int64)

    def grid(self, index: int) -> NDArray[np.int32] | None:
        """Return None: places are those of fine tiles."""
        return None

    def parent(self, index: int) -> NDArray[np.int64] | None:
        """Return None: there is nothing coarser."""
        return None

    def read(self, index: int, rows: Rows | None = None) -> CaseBag:
        """Return a case's coarse tiles, or some of them."""
        firsts = self._firsts[index]
        bag = self._source.read(index, firsts if rows is None else firsts[rows])
        return replace(
            bag,
            case=self.cases[index],
            features=np.ascontiguousarray(bag.features[:, -self.dimension :]),
            coords_l0=None,
            grid=None,
            parent=None,
        )

    def _first_children(self, place: int) -> NDArray[np.int64]:
        parent = self._source.parent(place)
        if parent is None:
            raise ConfigError(
                f"regime two_stage: the features of {self._source.cases[place].case_id} are of one "
                "resolution; give those of two aligned tilings, as FINE::COARSE (bagscope tile "
                "--coarser-mpp)"
            )
        first: NDArray[np.int64] = np.unique(parent, return_index=True)[1]
        return np.sort(first)


def _relabelled(case: Case, targets: Sequence[TargetSpec], negative: Sequence[str]) -> Case:
    if not negative:
        return case
    (target,) = targets
    (label,) = case.targets[target.name]
    if label == label:
        label = float(target.classes[int(label)] not in negative)
    return replace(case, targets={target.name: (label,)})
