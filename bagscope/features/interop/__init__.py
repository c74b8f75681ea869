"""Other tools' feature files: recognised, imported, exported. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagscope.features.interop.conversion import ConversionReport, SlideOutcome
    from bagscope.features.interop.exporting import export_features, find_feature_files
    from bagscope.features.interop.importing import import_features
    from bagscope.features.interop.recognition import Recognised, recognise

__all__ = [
    "ConversionReport",
    "Recognised",
    "SlideOutcome",
    "export_features",
    "find_feature_files",
    "import_features",
    "recognise",
]

_HOMES = {
    "ConversionReport": "conversion",
    "Recognised": "recognition",
    "SlideOutcome": "conversion",
    "export_features": "exporting",
    "find_feature_files": "exporting",
    "import_features": "importing",
    "recognise": "recognition",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
