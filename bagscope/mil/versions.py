"""The versions of what computes numbers: recorded beside them, never compared."""

from __future__ import annotations

import importlib.metadata
import platform

from bagscope import __version__

_PACKAGES = ("numpy", "scipy", "scikit-learn", "torch", "matplotlib")


def versions() -> dict[str, str]:
    """Return the version of bagscope, of Python and of each package by its name."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"bagscope": __version__, "python": platform.python_version(), **found}
