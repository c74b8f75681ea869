"""Folds of whole sites, against every possible division."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bagscope.mil.splits.sites import divide_sites
from bagscope.mil.splits.strata import Patient

Counts = list[tuple[int, int]]


def patients_at(counts: Counts) -> list[Patient]:
    """Return so many patients of class a and of class b for each site."""
    return [
        Patient(
            patient_id=f"{site}-{label}{i}",
            case_ids=(),
            labels=frozenset({label}),
            sites=frozenset({f"site{site:02d}"}),
        )
        for site, pair in enumerate(counts)
        for label, count in zip("ab", pair, strict=True)
        for i in range(count)
    ]


def cost(counts: Counts, fold_of: tuple[int, ...], folds: int) -> float:
    """Return the cost as the module states it, patient by patient."""
    total = 0.0
    for label in (0, 1):
        everywhere = sum(pair[label] for pair in counts)
        for fold in range(folds):
            here = sum(p[label] for p, f in zip(counts, fold_of, strict=True) if f == fold)
            total += (here - everywhere / folds) ** 2 / max(everywhere, 1)
    return total


def divided(counts: Counts, folds: int, salt: str = "") -> tuple[int, ...]:
    patients = patients_at(counts)
    strata = {patient.patient_id: min(patient.labels) for patient in patients}
    fold_of = divide_sites(patients, strata, folds, salt)
    return tuple(fold_of[f"site{site:02d}"] for site in range(len(counts)))


@settings(max_examples=30)
@example([(3, 1), (4, 6), (3, 9), (6, 1), (8, 1), (0, 10), (1, 1)], 2)  # no move or swap helps
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=3, max_size=7),
    st.integers(2, 3),
)
def test_no_division_of_few_sites_is_better(counts: Counts, folds: int) -> None:
    found = divided(counts, folds)
    assert set(found) == set(range(folds))
    best = min(
        cost(counts, fold_of, folds)
        for fold_of in itertools.product(range(folds), repeat=len(counts))
        if len(set(fold_of)) == folds
    )
    assert cost(counts, found, folds) <= best + 1e-6


def test_a_perfect_division_is_found() -> None:
    counts = [(9, 1), (1, 9), (8, 2), (2, 8), (5, 5), (10, 10), (5, 5), (10, 0), (0, 10), (20, 20)]
    found = divided(counts, 2)
    sums = Counter()
    for (a, b), fold in zip(counts, found, strict=True):
        sums.update({(fold, "a"): a, (fold, "b"): b})
    assert sums == {(0, "a"): 35, (0, "b"): 35, (1, "a"): 35, (1, "b"): 35}


@pytest.mark.parametrize("folds", [2, 5, 40])
def test_many_sites_come_out_even_and_no_fold_is_empty(folds: int) -> None:
    counts = [(1 + i % 7, 1 + i % 3) for i in range(40)]
    found = divided(counts, folds)
    assert set(found) == set(range(folds))
    if folds < 40:
        sizes = [
            sum(sum(pair) for pair, f in zip(counts, found, strict=True) if f == fold)
            for fold in range(folds)
        ]
        assert max(sizes) - min(sizes) <= 2


def test_one_big_site_leaves_the_others_to_the_rest() -> None:
    found = divided([(100, 100), (3, 3), (3, 3), (3, 3), (3, 3)], 3)
    assert found.count(found[0]) == 1
    assert sorted(Counter(found[1:]).values()) == [2, 2]
