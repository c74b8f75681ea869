"""Tissue that was scanned twice, planted among tissue that was not."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bagscope.mil.splits import SplitSpec, duplicates, judge_shared_tiles, make_splits, shared_tiles
from tests.mil.splits.tables import graded, store_vectors, table_of


def vectors(seed: int, rows: int, dimension: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float16)


def found(
    folder: Path, slides: Mapping[str, np.ndarray], patient_of: Mapping[str, str] | None = None
):
    store = store_vectors(folder, slides)
    return shared_tiles(store, patient_of or {name: f"p-{name}" for name in slides})


def test_a_slide_filed_twice_is_found(tmp_path: Path) -> None:
    slides = {name: vectors(i, 300) for i, name in enumerate("abcd")}
    slides["e"] = slides["b"][::-1]  # in another order
    (pair,) = found(tmp_path, slides)
    assert pair.slide_ids == ("b", "e")
    assert pair.patient_ids == ("p-b", "p-e")
    assert (pair.tiles, pair.share) == (300, 1.0)


def test_a_part_of_a_slide_is_found_and_slides_of_one_patient_may_share(tmp_path: Path) -> None:
    slides = {name: vectors(i, 300) for i, name in enumerate("abc")}
    slides["d"] = np.concatenate([slides["a"][40:52], vectors(9, 500)])
    slides["e"] = slides["c"]
    patient_of = {"a": "p1", "b": "p2", "c": "p3", "d": "p4", "e": "p3"}
    (pair,) = found(tmp_path, slides, patient_of)
    assert pair.slide_ids == ("a", "d")
    assert (pair.tiles, pair.share) == (12, 12 / 300)


def test_blank_tiles_are_no_tissue(tmp_path: Path) -> None:
    blanks = vectors(99, 6)
    slides = {name: np.concatenate([vectors(i, 50), blanks]) for i, name in enumerate("abc")}
    # Many times in one slide, so of no account in the others.
    slides["c"] = np.concatenate([slides["c"], blanks, blanks])
    slides["d"] = np.zeros((60, 8), np.float16)
    slides["e"] = np.full((60, 8), 0.5, np.float16)
    slides["f"] = np.repeat(np.arange(60, dtype=np.float16)[:, None], 8, axis=1)
    slides["g"] = slides["f"].copy()
    assert found(tmp_path, slides) == ()


def test_a_few_equal_tiles_are_chance_unless_there_are_few_at_all(tmp_path: Path) -> None:
    shared = vectors(99, 4)
    slides = {name: np.concatenate([shared, vectors(i, 50)]) for i, name in enumerate("ab")}
    assert found(tmp_path / "big", slides) == ()
    slides["c"] = np.concatenate([shared, vectors(7, 2)])
    pairs = found(tmp_path / "small", slides)
    assert [pair.slide_ids for pair in pairs] == [("b", "c")]
    assert pairs[0].share == pytest.approx(2 / 3)


def test_slides_without_features_are_passed_over_and_progress_is_told(tmp_path: Path) -> None:
    store = store_vectors(tmp_path, {"a": vectors(0, 20), "b": vectors(1, 0)})
    told = []
    patient_of = {"a": "p1", "b": "p2", "gone": "p3"}
    assert shared_tiles(store, patient_of, lambda *at: told.append(at)) == ()
    assert told == [(1, 2), (2, 2)]


@settings(max_examples=60)
@given(st.data())
def test_hashes_are_equal_where_bytes_are(data: st.DataObject) -> None:
    dimension = data.draw(st.integers(2, 9))
    dtype = data.draw(st.sampled_from([np.float16, np.float32]))
    few = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0])  # rows that differ by a bit or two
    rows = data.draw(arrays(dtype, (30, dimension), elements=few))
    hashes = duplicates._row_hashes(rows)
    by_hand = [row.tobytes() for row in rows if len(set(row.tolist())) > 1]
    assert len(hashes) == len(by_hand)
    assert len(set(hashes.tolist())) == len(set(by_hand))
    for one, its_bytes in zip(hashes, by_hand, strict=True):
        same = [other == its_bytes for other in by_hand]
        np.testing.assert_array_equal(hashes == one, same)


def test_many_rows_that_differ_in_two_bits_have_different_hashes() -> None:
    rows = np.zeros((2**17, 24), np.uint16)
    index = np.arange(2**17)
    for bit in range(17):  # the highest bit of each of the first numbers
        rows[:, bit] = ((index >> bit) & 1) << 15
    rows[:, 23] = 1
    hashes = duplicates._row_hashes(rows.view(np.float16))
    assert len(np.unique(hashes)) == 2**17


def test_matching_in_parts_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides = {f"s{i}": vectors(i, 100) for i in range(6)}
    slides["t"] = np.concatenate([slides["s1"][:30], slides["s4"][:20]])
    whole = found(tmp_path / "whole", slides)
    monkeypatch.setattr(duplicates, "_PART_ROWS", 64)
    monkeypatch.setattr(duplicates, "_BLOCK_BYTES", 100)
    assert found(tmp_path / "parts", slides) == whole
    assert [(pair.slide_ids, pair.tiles) for pair in whole] == [
        (("s1", "t"), 30),
        (("s4", "t"), 20),
    ]


def test_memory_is_that_of_the_hashes(tmp_path: Path) -> None:
    slides = {f"s{i}": vectors(i, 4000, dimension=512) for i in range(10)}
    store = store_vectors(tmp_path, slides)
    shared_tiles(store, {"s0": "p"})
    tracemalloc.start()
    shared_tiles(store, {name: name for name in slides})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The rows hold 41 MB; a few blocks of 256 KiB and some arrays of 8 bytes a row are kept.
    assert peak < 15e6


def test_twins_on_two_sides_are_a_fault_on_one_a_note(tmp_path: Path) -> None:
    table = table_of(graded({"a": 6, "b": 6}))
    plan = make_splits(table, SplitSpec(folds=3))
    first = plan.splits[0]
    slides = {case.case_id: vectors(i, 20) for i, case in enumerate(table.cases)}
    slides[first.test[0]] = slides[first.train[0]]
    pairs = found(tmp_path, slides, {case.case_id: case.patient_id for case in table.cases})
    apart = judge_shared_tiles(plan, pairs, table)
    (fault,) = apart.faults
    for word in (first.test[0], first.train[0], "20 tiles", "r0_f0 (", "one patient_id"):
        assert word in fault
    once = make_splits(table, SplitSpec(method="monte_carlo"))
    (split,) = once.splits
    both = (split.test[0], split.test[1])
    slides = {case.case_id: vectors(i, 20) for i, case in enumerate(table.cases)}
    slides[both[0]] = slides[both[1]]
    pairs = found(tmp_path / "two", slides, {c.case_id: c.patient_id for c in table.cases})
    together = judge_shared_tiles(once, pairs, table)
    assert not together.faults
    assert "stand on one side" in together.notes[0]
