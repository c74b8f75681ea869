from __future__ import annotations

import json

import pytest

from bagscope.cohort.status import (
    Status,
    read_status,
    read_statuses,
    status_path,
    summarise,
    write_status,
)
from bagscope.errors import SchemaError


def status(slide_id: str, outcome: str = "done", **fields) -> Status:
    given = {"stage": "tile/a", "seconds": 1.5, "host": "h", **fields}
    return Status(slide_id=slide_id, outcome=outcome, **given)


def test_status_is_read_back_as_written(tmp_path):
    first = status("a", fingerprint="f", facts={"tiles": 3, "mpp": 0.5}, warnings=("pale",))
    second = status("b", "failed", error_class="ReadError", message="b: truncated")
    write_status(tmp_path, second)
    write_status(tmp_path, first)
    assert read_status(tmp_path, "tile/a", "a") == first
    assert read_status(tmp_path, "tile/a", "c") is None
    assert list(read_statuses(tmp_path, "tile/a").values()) == [first, second]
    assert read_statuses(tmp_path, "tile/b") == {}
    (tmp_path / "tile" / "a" / ".a.json.h~1~00000000.tmp").write_text("{")
    (tmp_path / "tile" / "a" / "a.claim").write_text("{")
    assert len(read_statuses(tmp_path, "tile/a")) == 2


def test_summary_counts(tmp_path):
    summary = summarise(
        [
            status("a", facts={"tiles": 3}),
            status("b", "skipped", facts={"tiles": 4}),
            status("c", "failed", error_class="ReadError"),
            status("d", "failed", error_class="WorkerDied", facts={"tiles": "many"}),
            status("e", "failed", error_class="ReadError"),
        ]
    )
    assert summary.counts == {"done": 1, "skipped": 1, "failed": 3}
    assert summary.errors == {"ReadError": 2, "WorkerDied": 1}
    assert (summary.tiles, summary.seconds) == (7, 7.5)


@pytest.mark.parametrize("content", ["{", "[]", '{"slide_id": "a"}'])
def test_a_damaged_status_is_named(tmp_path, content):
    path = status_path(tmp_path, "tile", "a")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(SchemaError, match=r"a\.json"):
        read_status(tmp_path, "tile", "a")


def test_later_fields_are_ignored_and_unknown_outcomes_refused(tmp_path):
    write_status(tmp_path, status("a"))
    path = status_path(tmp_path, "tile/a", "a")
    record = {**json.loads(path.read_text()), "colour": "blue"}
    path.write_text(json.dumps(record))
    assert read_status(tmp_path, "tile/a", "a") == status("a")
    path.write_text(json.dumps({**record, "outcome": "perhaps"}))
    with pytest.raises(SchemaError, match="'perhaps'"):
        read_status(tmp_path, "tile/a", "a")


@pytest.mark.parametrize("stage", ["", "../x", "a//b", "a/../b", "con"])
def test_a_stage_is_a_folder_below_status(tmp_path, stage):
    with pytest.raises(ValueError, match="stage"):
        status_path(tmp_path, stage, "a")
