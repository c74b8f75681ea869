from __future__ import annotations

from tests.mil.training.conftest import one_thread

__all__ = ["one_thread"]
