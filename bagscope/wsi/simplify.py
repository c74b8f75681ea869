"""Fewer points per outline, without a ring ever crossing itself or another.

Rings are simplified one by one (Douglas-Peucker); those that then cross, touch, collapse or leave
their exterior are tried again at half the tolerance, and in the end keep every point. Exact rings
don't cross, so this ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.float64]
"""(n, 2) as (x, y), open."""

_SMALLEST_TOLERANCE = 0.5
_PAIRS_AT_ONCE = 1_000_000


def simplify_rings(fragments: Sequence[Sequence[Ring]], tolerance: float) -> list[list[Ring]]:
    """Simplify the rings of fragments, each an exterior followed by its holes.

    Args:
        fragments: rings with whole-number coordinates that touch at points at most.
        tolerance: the farthest that a ring may stray, in the rings' own unit.
    """
    exact = [ring for rings in fragments for ring in rings]
    owner = [f for f, rings in enumerate(fragments) for _ in rings]
    tolerances = np.full(len(exact), tolerance)
    simple = list(exact)
    redo = set(range(len(exact)))
    while redo:
        for i in redo:
            simple[i] = _thinned(exact[i], tolerances[i]) if tolerances[i] > 0 else exact[i]
        faulty = {i for i in redo if _collapsed(simple[i], exact[i])}
        if not faulty:
            faulty = crossing_rings(simple, settled=tolerances == 0)
        if not faulty:
            faulty = _strayed(simple, owner, tolerances == 0)
        for i in faulty:
            halved = tolerances[i] / 2
            tolerances[i] = halved if halved >= _SMALLEST_TOLERANCE else 0.0
        redo = faulty
    out: list[list[Ring]] = [[] for _ in fragments]
    for i, ring in enumerate(simple):
        out[owner[i]].append(ring)
    return out


def _thinned(ring: Ring, tolerance: float) -> Ring:
    """Return the points of a ring that keep every other point within `tolerance` of an edge.

    Distances are to edges and not to the lines through them, which lie nearer.
    """
    closed = np.concatenate([ring, ring[:1]])
    far = int(np.argmax(((ring - ring[0]) ** 2).sum(axis=1)))
    kept = np.zeros(len(closed), np.bool_)
    kept[[0, far]] = True
    chains = [(0, far), (far, len(ring))]
    while chains:
        first, last = chains.pop()
        if last - first < 2:
            continue
        start, along = closed[first], closed[last] - closed[first]
        offsets = closed[first + 1 : last] - start
        length = float(along @ along)
        share = np.clip(offsets @ along / length, 0, 1) if length else np.zeros(len(offsets))
        apart = ((offsets - share[:, None] * along) ** 2).sum(axis=1)
        worst = int(np.argmax(apart))
        if apart[worst] > tolerance**2:
            middle = first + 1 + worst
            kept[middle] = True
            chains += [(first, middle), (middle, last)]
    return ring[kept[:-1]]


def crossing_rings(rings: Sequence[Ring], *, settled: NDArray[np.bool_] | None = None) -> set[int]:
    """Return the indices of rings that cross or touch themselves or another.

    Args:
        rings: open rings in one frame.
        settled: (len(rings),) bool; between two settled rings, and within one, nothing is sought.
    """
    if not rings:
        return set()
    ring_of = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    first = np.concatenate([[0], np.cumsum([len(ring) for ring in rings])[:-1]])
    position = np.arange(len(start)) - first[ring_of]
    length = np.array([len(ring) for ring in rings])[ring_of]
    fixed = np.zeros(len(rings), np.bool_) if settled is None else settled

    order = np.argsort(np.minimum(start[:, 0], end[:, 0]), kind="stable")
    start, end, ring_of = start[order], end[order], ring_of[order]
    position, length = position[order], length[order]
    low, high = np.minimum(start, end), np.maximum(start, end)
    # Sorted by their left ends, a segment's partners are those that begin before it ends.
    partners = np.searchsorted(low[:, 0], high[:, 0], side="right") - np.arange(len(start)) - 1
    found: set[int] = set()
    for chunk in _chunks(partners):
        a = np.repeat(chunk, partners[chunk])
        offset = np.cumsum(partners[chunk]) - partners[chunk]
        b = a + 1 + np.arange(len(a)) - np.repeat(offset, partners[chunk])
        near = (low[a, 1] <= high[b, 1]) & (low[b, 1] <= high[a, 1])
        near &= ~(fixed[ring_of[a]] & fixed[ring_of[b]])
        a, b = a[near], b[near]
        step = np.abs(position[a] - position[b])
        same = ring_of[a] == ring_of[b]
        neighbours = same & ((step == 1) | (step == length[a] - 1))
        meet = _meet(start[a], end[a], start[b], end[b])
        meet[neighbours] = _fold_back(
            start[a[neighbours]], end[a[neighbours]], start[b[neighbours]], end[b[neighbours]]
        )
        found |= set(ring_of[a[meet]].tolist()) | set(ring_of[b[meet]].tolist())
    return {i for i in found if not fixed[i]}


def _chunks(partners: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Split segment indices so that no part has many more than `_PAIRS_AT_ONCE` pairs."""
    part = np.cumsum(partners) // _PAIRS_AT_ONCE
    return np.split(np.arange(len(partners)), np.flatnonzero(np.diff(part)) + 1)


def _turn(a: Ring, b: Ring, c: Ring) -> NDArray[np.float64]:
    """Return the sign of the turn a → b → c, row by row."""
    u, v = b - a, c - a
    turn: NDArray[np.float64] = np.sign(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0])
    return turn


def _meet(a: Ring, b: Ring, c: Ring, d: Ring) -> NDArray[np.bool_]:
    """Return whether segments a-b and c-d, whose bounding boxes overlap, have a point in common."""
    met: NDArray[np.bool_] = (_turn(a, b, c) * _turn(a, b, d) <= 0) & (
        _turn(c, d, a) * _turn(c, d, b) <= 0
    )
    return met


def _fold_back(a: Ring, b: Ring, c: Ring, d: Ring) -> NDArray[np.bool_]:
    """Return whether consecutive segments a-b and c-d run back over each other."""
    u, v = b - a, d - c
    folded: NDArray[np.bool_] = (u[:, 0] * v[:, 1] == u[:, 1] * v[:, 0]) & ((u * v).sum(axis=1) < 0)
    return folded


def _collapsed(ring: Ring, exact: Ring) -> bool:
    if len(ring) == len(exact):
        return False
    return len(ring) < 3 or np.sign(_area(ring)) != np.sign(_area(exact))


def _area(ring: Ring) -> float:
    x, y = ring.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def _strayed(rings: Sequence[Ring], owner: Sequence[int], settled: NDArray[np.bool_]) -> set[int]:
    """Return rings, of a set that doesn't cross, of which a hole lies where no hole can be."""
    found: set[int] = set()
    low = np.array([ring.min(axis=0) for ring in rings])
    high = np.array([ring.max(axis=0) for ring in rings])
    members: dict[int, list[int]] = {}
    for i, fragment in enumerate(owner):
        members.setdefault(fragment, []).append(i)
    for exterior, *holes in members.values():
        for hole in holes:
            outside = _contains(rings[exterior], rings[hole]) <= 0
            if outside and not (settled[exterior] and settled[hole]):
                found |= {exterior, hole}
        inside = (low[holes][:, None] >= low[holes]).all(2) & (
            high[holes][:, None] <= high[holes]
        ).all(2)
        for inner, outer in np.argwhere(inside & ~np.eye(len(holes), dtype=np.bool_)).tolist():
            i, o = holes[inner], holes[outer]
            if not (settled[i] and settled[o]) and _contains(rings[o], rings[i]) > 0:
                found |= {i, o}
    return {i for i in found if not settled[i]}


def _contains(outer: Ring, inner: Ring) -> float:
    """Return 1 where the first point of `inner` lies inside `outer`, 0 on it, -1 outside."""
    import cv2

    point = (float(inner[0, 0]), float(inner[0, 1]))
    return cv2.pointPolygonTest(outer.astype(np.float32), point, False)
