"""Small cohorts with labels, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bagscope.cohort.table import Cohort, SlideRow
from bagscope.features.feature_file import FeatureHeader, write_feature_file
from bagscope.features.store import FeatureStore
from bagscope.mil.cases import CaseTable, Per, cases_of
from bagscope.mil.targets import TargetSpec

GRADE = TargetSpec(column="grade")


def cohort_of(rows: Iterable[Mapping[str, str]]) -> Cohort:
    """Return a cohort of rows, each with `slide_id` and what else it says of the slide."""
    own = ("slide_id", "patient_id", "site", "split")
    slides = [
        SlideRow(
            slide_id=row["slide_id"],
            path=Path(f"{row['slide_id']}.svs"),
            patient_id=row.get("patient_id", row["slide_id"]),
            site=row.get("site", ""),
            split=row.get("split", ""),
            columns={name: cell for name, cell in row.items() if name not in own},
        )
        for row in rows
    ]
    return Cohort(rows=tuple(slides), source="cohort.csv", patient_id_given=True)


def table_of(
    rows: Iterable[Mapping[str, str]],
    target: TargetSpec | Sequence[TargetSpec] = GRADE,
    per: Per = "slide",
) -> CaseTable:
    """Return the cases of rows."""
    targets = [target] if isinstance(target, TargetSpec) else target
    return cases_of(cohort_of(rows), targets, per=per)


def graded(counts: Mapping[str, int], slides: int = 1, **more: str) -> list[dict[str, str]]:
    """Return the rows of so many patients of each grade, each with some slides."""
    return [
        {"slide_id": f"{grade}{i}-{j}", "patient_id": f"{grade}{i}", "grade": grade, **more}
        for grade, count in counts.items()
        for i in range(count)
        for j in range(slides)
    ]


def store_vectors(folder: Path, slides: Mapping[str, np.ndarray]) -> FeatureStore:
    """Write a feature file for each slide's vectors, and open their folder."""
    for slide_id, features in slides.items():
        header = FeatureHeader(
            slide_id=slide_id,
            fields={"stage": "import", "slide": slide_id},
            encoder={"name": "planted"},
            weights_sha256="ab" * 32,
            coords_l0=None,
            grid=None,
            tile={},
            recorded={},
        )
        write_feature_file(folder / f"{slide_id}.h5", header, features)
    return FeatureStore.open(folder)
