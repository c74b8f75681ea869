"""One slide imported, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from bagscope.features.feature_file import FeatureFile, read_feature_file
from bagscope.features.interop import ConversionReport, import_features
from tests.features.interop.layouts import Truth

MPP = 0.25


def imported(source: Path, out: Path, **options: Any) -> tuple[FeatureFile, ConversionReport]:
    """Import a source of one slide and open what came of it."""
    report = import_features(source, out, **options)
    assert report.failures == (), report.failures
    (outcome,) = report.outcomes
    return read_feature_file(out / f"{outcome.slide_id}.h5"), report


def failure(source: Path, out: Path, **options: Any) -> str:
    """Return why the one slide of a source failed."""
    report = import_features(source, out, **options)
    (outcome,) = report.failures
    assert not list(out.rglob("*.h5"))
    return outcome.message


def assert_same(file: FeatureFile, made: Truth) -> None:
    """Hold a feature file's tiles to those that a source was made of."""
    expected = made.sorted()
    assert file.coords_l0 is not None
    assert file.coords_l0.dtype == np.int32
    np.testing.assert_array_equal(file.coords_l0, expected.corners)
    np.testing.assert_array_equal(file.features, expected.features)


def extra(file: FeatureFile, name: str) -> Any:
    """Return a dataset that was kept beside the features."""
    with h5py.File(file.path) as content:
        return content[name][()]


def stored_order(made: Truth) -> list[int]:
    """Return a source's rows in the order in which a feature file holds them."""
    return sorted(range(len(made.corners)), key=lambda i: tuple(made.corners[i][::-1]))
