from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bagscope.wsi.synthetic as synthetic
from bagscope.wsi.synthetic import SyntheticSpec, plan_cohort, write_cohort, write_slide
from bagscope.wsi.synthetic.cohort import write_alone


@settings(max_examples=40)
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


def test_tumour_is_spread_between_the_fractions_asked_for() -> None:
    planned = plan_cohort(slides=40, positives=20, seed=0, tumor_fractions=(0.02, 0.06))
    shares = sorted(row.spec.tumor_fraction for row in planned if row.label == "tumor")
    # Evenly on a logarithmic scale, the two ends half a step away.
    steps = np.diff(np.log(shares))
    assert steps == pytest.approx(np.log(3) / 20, abs=0.01)
    assert shares[0] == pytest.approx(0.02 * 3 ** (1 / 40), abs=1e-4)
    assert shares[-1] == pytest.approx(0.06 / 3 ** (1 / 40), abs=1e-4)


@pytest.mark.parametrize("fractions", [(0.0, 0.1), (0.2, 0.1)])
def test_fractions_out_of_order_are_refused(fractions: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="tumor_fractions"):
        plan_cohort(slides=4, positives=2, seed=0, tumor_fractions=fractions)


def test_writing_alone_leaves_the_threads_of_others_as_they_were(tmp_path: Path) -> None:
    threads = cv2.getNumThreads()
    spec = SyntheticSpec(width_px=512, height_px=512, mpp=0.5, downsamples=(1, 4))
    alone = write_alone(tmp_path / "alone.svs", spec)
    assert cv2.getNumThreads() == threads
    usual = write_slide(tmp_path / "usual.svs", spec)
    assert alone.slide.read_bytes() == usual.slide.read_bytes()


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
