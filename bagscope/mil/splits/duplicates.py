"""Identical tiles in slides of different patients: tissue that was scanned, or filed, twice.

Two patients who are one by another name are a leak that no id shows. Equal pixels give equal
vectors, so slides that have rows in common to the last bit are the same scan or share a part of
it. Rows are compared by a 64-bit hash; 8 bytes a row are kept. Not counted: rows of one repeated
value, and rows that occur `BLANK_REPEATS` times in any one slide, as blank tiles do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagscope.features.store import FeatureStore
from bagscope.mil.cases import CaseTable
from bagscope.mil.splits.checking import SplitFindings
from bagscope.mil.splits.plan import Side, SplitPlan
from bagscope.wording import counted

BLANK_REPEATS = 3
LEAST_ROWS = 5
"""Fewer equal rows than that are chance, unless they are `LEAST_SHARE` of the smaller slide."""
LEAST_SHARE = 0.5
_BLOCK_BYTES = 1 << 18
_PART_ROWS = 1 << 22

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedTiles:
    """Two slides of different patients that have tiles in common.

    Attributes:
        tiles: how many different vectors stand in both.
        share: of the vectors of the slide that has fewer.
    """

    slide_ids: tuple[str, str]
    patient_ids: tuple[str, str]
    tiles: int
    share: float


def shared_tiles(
    store: FeatureStore,
    patient_of: Mapping[str, str],
    advance: Callable[[int, int], None] | None = None,
) -> tuple[SharedTiles, ...]:
    """Find slides of different patients that share tiles; most tiles first.

    Args:
        store: of the features.
        patient_of: the patient of each slide to look at; slides without features are passed over.
        advance: is told (done, total) after each slide.
    """
    slide_ids = sorted(slide_id for slide_id in patient_of if slide_id in store)
    hashes: list[Hashes] = []
    blank: list[Hashes] = []
    for done, slide_id in enumerate(slide_ids, start=1):
        found, counts = np.unique(_row_hashes(store.bag(slide_id).features), return_counts=True)
        blank.append(found[counts >= BLANK_REPEATS])
        hashes.append(found[counts < BLANK_REPEATS])
        if advance is not None:
            advance(done, len(slide_ids))
    patients = np.unique([patient_of[slide_id] for slide_id in slide_ids], return_inverse=True)[1]
    pairs = _pairs(hashes, _joined(blank), np.asarray(patients, np.int64))
    found_pairs = []
    for (one, other), tiles in pairs.items():
        share = tiles / min(len(hashes[one]), len(hashes[other]))
        if tiles >= LEAST_ROWS or share >= LEAST_SHARE:
            ids = slide_ids[one], slide_ids[other]
            found_pairs.append(
                SharedTiles(
                    slide_ids=ids,
                    patient_ids=(patient_of[ids[0]], patient_of[ids[1]]),
                    tiles=tiles,
                    share=share,
                )
            )
    return tuple(sorted(found_pairs, key=lambda pair: (-pair.tiles, pair.slide_ids)))


def judge_shared_tiles(
    plan: SplitPlan, pairs: Sequence[SharedTiles], table: CaseTable | None = None
) -> SplitFindings:
    """Say of each pair whether its patients stand on two sides (a fault) or on one (a note)."""
    patient_of = dict(plan.patient_of)
    if table is not None:
        patient_of |= {case.case_id: case.patient_id for case in table.cases}
    sides_of: dict[str, dict[str, Side]] = {split.name: {} for split in plan.splits}
    for split in plan.splits:
        for side, case_ids in split.sides():
            for case_id in case_ids:
                sides_of[split.name][patient_of.get(case_id, case_id)] = side
    faults, notes = [], []
    for pair in pairs:
        sentence = (
            f"slides {pair.slide_ids[0]} (patient {pair.patient_ids[0]}) and {pair.slide_ids[1]} "
            f"(patient {pair.patient_ids[1]}) have {counted(pair.tiles, 'tile')} in common "
            f"({pair.share:.0%} of the smaller one)"
        )
        apart = []
        for name, side_of in sides_of.items():
            one, other = (side_of.get(patient_id) for patient_id in pair.patient_ids)
            if one and other and one != other:
                apart.append(f"{name} ({one} and {other})")
        if apart:
            more = f" and {len(apart) - 3} more splits" if len(apart) > 3 else ""
            faults.append(
                f"{sentence} and stand on two sides in {', '.join(apart[:3])}{more}; give them "
                "one patient_id, or take one out of the table"
            )
        else:
            notes.append(f"{sentence}; they stand on one side")
    return SplitFindings(faults=tuple(faults), notes=tuple(notes))


# --- matching -------------------------------------------------------------------------------


def _pairs(
    hashes: Sequence[Hashes], blank: Hashes, patients: NDArray[np.int64]
) -> Counter[tuple[int, int]]:
    """Return how many hashes each pair of slides of different patients has in common.

    Args:
        hashes: of each slide, each once and in order.
        blank: that don't count.
        patients: number of each slide's patient.
    """
    pairs: Counter[tuple[int, int]] = Counter()
    parts = 1
    while sum(map(len, hashes)) > parts * _PART_ROWS:
        parts *= 2
    width = 2**64 // parts
    for part in range(parts):
        # Hashes are spread evenly, so their range can be worked through piece by piece.
        chosen = [_within(found, part * width, (part + 1) * width) for found in hashes]
        values = _joined(chosen)
        slides = np.repeat(np.arange(len(chosen)), [len(found) for found in chosen])
        order = np.argsort(values, kind="stable")  # so the slides of one hash stay in order
        values, slides = values[order], slides[order]
        same = values[1:] == values[:-1]
        same &= ~np.isin(values[1:], blank)
        # Neighbours alone: a row of all n slides makes n pairs and not n² of them.
        same &= patients[slides[1:]] != patients[slides[:-1]]
        found_here = np.stack([slides[:-1][same], slides[1:][same]], axis=1)
        distinct, counts = np.unique(found_here, axis=0, return_counts=True)
        for (one, other), count in zip(distinct.tolist(), counts.tolist(), strict=True):
            pairs[one, other] += count
    return pairs


def _within(found: Hashes, low: int, high: int) -> Hashes:
    begin = np.searchsorted(found, np.uint64(low))
    end = len(found) if high >= 2**64 else np.searchsorted(found, np.uint64(high))
    return found[begin:end]


def _joined(arrays: Sequence[Hashes]) -> Hashes:
    return np.concatenate([np.zeros(0, np.uint64), *arrays])


# --- hashing --------------------------------------------------------------------------------


def _row_hashes(features: NDArray[Any]) -> Hashes:
    """Return (n,) one hash per row of (N, D) that is not of one repeated value."""
    rows, dimension = features.shape
    row_bytes = dimension * features.dtype.itemsize
    words = -(-row_bytes // 8)
    added = np.random.default_rng(0).integers(0, 2**64, words, dtype=np.uint64)
    factors = added | np.uint64(1)
    hashes = [np.zeros(0, np.uint64)]
    step = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        block = np.ascontiguousarray(features[start : start + step])
        numbers = block.view(f"u{block.itemsize}")
        bits = block.view(np.uint8).reshape(len(block), row_bytes)
        bits = bits[(numbers != numbers[:, :1]).any(axis=1)]
        if row_bytes % 8:
            bits = np.pad(bits, ((0, 0), (0, 8 * words - row_bytes)))
        # Each word is mixed by itself, so that a change in its high bits reaches all of the sum's.
        mixed = np.ascontiguousarray(bits).view(np.uint64) + added
        mixed *= factors
        mixed ^= mixed >> np.uint64(32)
        mixed *= factors
        hashes.append(mixed.sum(axis=1, dtype=np.uint64))
    return np.concatenate(hashes)
