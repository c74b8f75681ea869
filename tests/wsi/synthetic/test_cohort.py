from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bagscope.wsi.synthetic as synthetic
from bagscope.wsi.synthetic import SyntheticSpec, plan_cohort, write_cohort


@settings(max_examples=40, deadline=None)
@given(data=st.data(), slides=st.integers(1, 60), sites=st.integers(1, 3), seed=st.integers(0, 9))
def test_a_planned_cohort_is_what_was_asked_for(
    data: st.DataObject, slides: int, sites: int, seed: int
) -> None:
    positives = data.draw(st.integers(0, slides))
    planned = plan_cohort(slides=slides, positives=positives, seed=seed, sites=sites)
    assert len({row.slide_id for row in planned}) == slides
    assert sum(row.label == "tumor" for row in planned) == positives
    assert len({row.spec.seed for row in planned}) == slides
    patients = defaultdict(list)
    for row in planned:
        patients[row.patient_id].append(row)
        assert (0.01 <= row.spec.tumor_fraction <= 0.3) == (row.label == "tumor")
        assert row.label == "tumor" or row.spec.tumor_fraction == 0
    for rows in patients.values():
        assert len({(row.label, row.site) for row in rows}) == 1
        assert len(rows) <= 2


def test_the_default_cohort_has_pairs_and_both_sites_in_both_labels() -> None:
    planned = plan_cohort(slides=40, positives=20, seed=0)
    patients = {row.patient_id for row in planned}
    assert 30 <= len(patients) < 38
    counts = defaultdict(int)
    for row in planned:
        counts[row.label, row.site] += 1
    assert len(counts) == 4
    assert min(counts.values()) >= 7


@pytest.mark.parametrize(("slides", "positives"), [(0, 0), (3, 4), (3, -1)])
def test_impossible_cohorts_are_refused(slides: int, positives: int) -> None:
    with pytest.raises(ValueError, match="can't be made"):
        plan_cohort(slides=slides, positives=positives, seed=0)


def test_slides_and_table_are_written(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    table = write_cohort(
        tmp_path / "new",
        slides=3,
        positives=2,
        size_px=1024,
        workers=1,
        base=SyntheticSpec(quality=60, downsamples=(1, 4)),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with table.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == ["slide_id", "path", "patient_id", "label", "site"]
    assert sorted(row["label"] for row in rows) == ["normal", "tumor", "tumor"]
    for row in rows:
        slide = table.parent / row["path"]
        assert slide.is_file()
        outlines = slide.with_suffix(".truth.geojson").read_text(encoding="utf-8")
        assert ('"Tumor"' in outlines) == (row["label"] == "tumor")
        assert slide.with_suffix(".truth.png").is_file()
    assert not [p for p in table.parent.iterdir() if p.suffix == ".tmp"]


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    for workers in (1, 2):
        write_cohort(
            tmp_path / str(workers), slides=2, positives=1, size_px=512, mpp=0.5, workers=workers
        )
    names = sorted(p.name for p in (tmp_path / "1").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "2").iterdir())
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_what_is_public_is_there_and_listed_in_order() -> None:
    assert synthetic.__all__ == sorted(synthetic.__all__)
    for name in synthetic.__all__:
        assert getattr(synthetic, name).__name__ == name
        assert sys.modules[getattr(synthetic, name).__module__]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = synthetic.nothing  # type: ignore[attr-defined]
