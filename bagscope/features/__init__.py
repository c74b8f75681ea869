"""Features: encoders, the extraction engine, the feature store, foreign layouts.

Names are imported on first use, so that light commands stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagscope.features.feature_file import (
        FeatureFile,
        FeatureHeader,
        read_feature_file,
        write_feature_file,
    )
    from bagscope.features.store import FeatureStore, PatientBag, SlideBag

__all__ = [
    "FeatureFile",
    "FeatureHeader",
    "FeatureStore",
    "PatientBag",
    "SlideBag",
    "read_feature_file",
    "write_feature_file",
]

_HOMES = {
    "FeatureFile": "feature_file",
    "FeatureHeader": "feature_file",
    "FeatureStore": "store",
    "PatientBag": "store",
    "SlideBag": "store",
    "read_feature_file": "feature_file",
    "write_feature_file": "feature_file",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
