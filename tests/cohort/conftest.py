from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bagscope.cohort.progress import Event
from bagscope.cohort.runner import Job, RunOptions, RunReport, run_cohort

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
# Workers, and the subprocesses of tests, import the planted stages by name.
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))


class Listener:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def run(tmp_path: Path, listener: Listener) -> Callable[..., RunReport]:
    """Run planted jobs, given as slide id → payload, in a study in tmp_path."""
    import planted

    def run_them(
        payloads: dict[str, Any], *, work: Any = planted.behave, **options: Any
    ) -> RunReport:
        return run_cohort(
            [Job(slide_id=slide_id, payload=payload) for slide_id, payload in payloads.items()],
            work,
            stage="plant",
            status_dir=tmp_path / "status",
            options=RunOptions(**{"workers": 2, **options}),
            report=listener,
        )

    return run_them


@pytest.fixture
def script_environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), str(HERE)])
    return {**os.environ, "PYTHONPATH": path}
