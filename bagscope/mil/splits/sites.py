"""Folds of whole sites whose classes are as equal as a search can make them.

A model that is tested on a site that it has not seen can't have learned the site's stain in place
of the disease. The cost of a division is what is to be kept small,

    sum over folds f and strata s of (n_fs - N_s / folds)² / N_s,

with n_fs the patients of stratum s in fold f and N_s in all. From several orders of the sites (by
size, then hashed ones) each site goes to the fold where it costs least; then single moves and
swaps of two sites are made as long as one lowers the cost. The best result counts. Of few sites
every division is looked at too, and one that is better taken; of many there is no proof of the
optimum, which 1,000 sites would not allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bagscope.mil.splits.strata import Patient, hash_order

STARTS = 16
MOST_DIVISIONS = 1 << 16
"""Up to so many, all are looked at: 17 sites in two folds, 8 in five."""
_NO_GAIN = 1e-9


def divide_sites(
    patients: Sequence[Patient], strata: Mapping[str, str], folds: int, salt: str
) -> dict[str, int]:
    """Return the fold of every site; no fold is empty.

    Args:
        patients: each of one site.
        strata: of the patients, by id.
        folds: at most as many as there are sites.
        salt: other salts start from other orders.
    """
    sites = sorted({site for patient in patients for site in patient.sites})
    names = sorted(set(strata.values()))
    counts = np.zeros((len(sites), len(names)))
    for patient in patients:
        (site,) = patient.sites
        counts[sites.index(site), names.index(strata[patient.patient_id])] += 1
    weighted = counts / np.sqrt(counts.sum(axis=0))  # then the cost is a plain sum of squares
    by_size = sorted(range(len(sites)), key=lambda i: (-counts[i].sum(), sites[i]))
    orders = [by_size]
    for start in range(STARTS - 1):
        orders.append([sites.index(site) for site in hash_order(sites, f"{salt}/{start}")])
    divisions = [_improved(weighted, _greedy(weighted, folds, order), folds) for order in orders]
    # Last, so that what moves and swaps found stays where it is as good.
    divisions += _best_of_all(weighted, folds)
    best: NDArray[np.int64] | None = None
    for found in divisions:
        if best is None or _cost(weighted, found, folds) < _cost(weighted, best, folds) - _NO_GAIN:
            best = found
    assert best is not None
    return {site: int(fold) for site, fold in zip(sites, best, strict=True)}


def _totals(
    weighted: NDArray[np.float64], fold_of: NDArray[np.int64], folds: int
) -> NDArray[np.float64]:
    totals = np.zeros((folds, weighted.shape[1]))
    np.add.at(totals, fold_of, weighted)
    return totals


def _cost(weighted: NDArray[np.float64], fold_of: NDArray[np.int64], folds: int) -> float:
    ideal = weighted.sum(axis=0) / folds
    return float(((_totals(weighted, fold_of, folds) - ideal) ** 2).sum())


def _greedy(weighted: NDArray[np.float64], folds: int, order: Sequence[int]) -> NDArray[np.int64]:
    ideal = weighted.sum(axis=0) / folds
    totals = np.zeros((folds, weighted.shape[1]))
    filled = np.zeros(folds, np.int64)
    fold_of = np.zeros(len(order), np.int64)
    for done, site in enumerate(order):
        off = totals - ideal
        added = (2 * off * weighted[site]).sum(axis=1)  # each fold also gains |site|², all alike
        if len(order) - done <= int((filled == 0).sum()):
            added[filled > 0] = np.inf  # the rest is just enough to leave no fold empty
        fold = int(added.argmin())
        fold_of[site] = fold
        totals[fold] += weighted[site]
        filled[fold] += 1
    return fold_of


def _best_of_all(weighted: NDArray[np.float64], folds: int) -> list[NDArray[np.int64]]:
    """Return the best division that leaves no fold empty; none where there are too many."""
    sites = len(weighted)
    # Folds have no order, so the first site may stay in the first one.
    count = folds ** (sites - 1)
    if count > MOST_DIVISIONS:
        return []
    fold_of = np.zeros((count, sites), np.int64)
    numbers = np.arange(count)
    for site in range(1, sites):
        numbers, fold_of[:, site] = np.divmod(numbers, folds)
    ideal = weighted.sum(axis=0) / folds
    costs = np.zeros(count)
    for fold in range(folds):
        mine = fold_of == fold
        costs += ((mine @ weighted - ideal) ** 2).sum(axis=1)
        costs[~mine.any(axis=1)] = np.inf
    return [fold_of[costs.argmin()]]


def _improved(
    weighted: NDArray[np.float64], fold_of: NDArray[np.int64], folds: int
) -> NDArray[np.int64]:
    """Return a division that no single move and no swap of two sites makes better."""
    totals = _totals(weighted, fold_of, folds)
    sizes = np.bincount(fold_of, minlength=folds)
    while True:
        change = _first_gain(weighted, fold_of, totals, sizes)
        if change is None:
            return fold_of
        for site, fold in change:
            totals[fold_of[site]] -= weighted[site]
            totals[fold] += weighted[site]
            fold_of[site] = fold
        sizes = np.bincount(fold_of, minlength=folds)


def _first_gain(
    weighted: NDArray[np.float64],
    fold_of: NDArray[np.int64],
    totals: NDArray[np.float64],
    sizes: NDArray[np.int64],
) -> list[tuple[int, int]] | None:
    for site in range(len(weighted)):
        home = int(fold_of[site])
        if sizes[home] > 1:
            # Moving x from a to b changes the cost by 2 x·(b - a + x).
            gains = 2 * ((totals - totals[home] + weighted[site]) * weighted[site]).sum(axis=1)
            gains[home] = 0.0
            if gains.min() < -_NO_GAIN:
                return [(site, int(gains.argmin()))]
        # Swapping x and y is moving x - y.
        moved = weighted[site] - weighted[site + 1 :]
        there = totals[fold_of[site + 1 :]]
        gains = 2 * ((there - totals[home] + moved) * moved).sum(axis=1)
        gains[fold_of[site + 1 :] == home] = 0.0
        if gains.size and gains.min() < -_NO_GAIN:
            other = site + 1 + int(gains.argmin())
            return [(site, int(fold_of[other])), (other, home)]
    return None
