from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope import artifacts
from bagscope.errors import ArtifactError, FingerprintMismatch, SchemaError

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
json_objects = st.dictionaries(st.text(max_size=5), json_values, max_size=5)


@given(json_objects)
def test_canonical_json_is_read_back_and_ignores_key_order(fields: dict[str, object]) -> None:
    text = artifacts.canonical_json(fields)
    assert json.loads(text) == fields
    shuffled = dict(reversed(list(fields.items())))
    assert artifacts.canonical_json(shuffled) == text


def test_fingerprint_is_the_sha256_of_the_canonical_text() -> None:
    expected = hashlib.sha256('{"a":1,"b":[true,"µ"]}'.encode()).hexdigest()
    assert artifacts.fingerprint({"b": (True, "µ"), "a": 1}) == expected


def test_fingerprint_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        artifacts.fingerprint({"a": float("nan")})


@given(json_objects, json_objects)
def test_fields_differ_exactly_when_their_canonical_text_differs(
    one: dict[str, object], other: dict[str, object]
) -> None:
    same_text = artifacts.canonical_json(one) == artifacts.canonical_json(other)
    assert (artifacts.differing_fields(one, other) == []) == same_text


def test_a_mismatch_names_each_field_with_both_values() -> None:
    stored = {"spec": {"mpp": 0.5, "tile_px": 256}, "numerics": 1}
    requested = {"spec": {"mpp": 0.25, "tile_px": 256, "seed": 3}, "numerics": 1}
    with pytest.raises(FingerprintMismatch) as caught:
        artifacts.require_same(stored, requested, what="a.h5", remedy="pass --overwrite")
    message = str(caught.value)
    assert "spec.mpp is 0.5, asked for 0.25" in message
    assert "spec.seed is absent, asked for 3" in message
    assert "tile_px" not in message
    assert message.endswith("pass --overwrite")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with pytest.raises(RuntimeError), artifacts.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    artifacts.write_text(path, "whole\n")
    assert path.read_bytes() == b"whole\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_rewrite_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"kept": True})
    with pytest.raises(ValueError, match="JSON"):
        artifacts.write_json(path, {"bad": float("inf")})
    assert artifacts.read_json(path) == {"kept": True}


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with (
        pytest.raises(ArtifactError, match=r"a\.bin: could not be written \(No space left"),
        artifacts.atomic_file(path) as temporary,
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        temporary.touch()
        full.write(b"x" * 10_000)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "study").write_text("not a folder")
    with pytest.raises(ArtifactError, match="could not be written"):
        artifacts.write_text(tmp_path / "study" / "a.txt", "x")


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ArtifactError, match="does not exist"):
        artifacts.read_json(path)
    path.write_text("{")
    with pytest.raises(SchemaError, match="not readable as JSON"):
        artifacts.read_json(path)


def make_folder(path: Path, text: str = "one", **options: bool) -> None:
    with artifacts.atomic_folder(path, {"v": 1}, **options) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text(text)
        (folder / "b.txt").write_text("two")


def test_a_folder_carries_its_record_and_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "model.bagscope"
    make_folder(path)
    record = artifacts.read_complete(path)
    assert sorted(record["files"]) == ["b.txt", "inner/a.txt"]
    assert record["fingerprint"] == artifacts.fingerprint({"v": 1})
    assert artifacts.folder_faults(path) == []
    with pytest.raises(ArtifactError, match="exists already"):
        make_folder(path)
    make_folder(path, "changed", replace=True)
    assert (path / "inner" / "a.txt").read_text() == "changed"
    assert [p.name for p in tmp_path.iterdir()] == ["model.bagscope"]


def test_an_interrupted_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), artifacts.atomic_folder(tmp_path / "m", {}) as folder:
        (folder / "a").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_record_is_incomplete_and_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir()
    with pytest.raises(SchemaError, match="incomplete"):
        artifacts.read_complete(path)
    make_folder(path)
    assert artifacts.is_complete(path)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda p: (p / "b.txt").write_text("twO"), "content changed"),
        (lambda p: (p / "b.txt").unlink(), "missing"),
        (lambda p: (p / "new.txt").write_text(""), "not in complete.json"),
    ],
)
def test_each_fault_of_a_folder_is_listed(tmp_path: Path, damage, expected: str) -> None:
    path = tmp_path / "m"
    make_folder(path)
    damage(path)
    (fault,) = artifacts.folder_faults(path)
    assert expected in fault


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    make_folder(path)
    record = artifacts.read_json(path / "complete.json")
    artifacts.write_json(path / "complete.json", {**record, "fields": {"v": 2}})
    with pytest.raises(SchemaError, match="not that of its fields"):
        artifacts.read_complete(path)
    artifacts.write_json(path / "complete.json", {"fields": {}})
    with pytest.raises(SchemaError, match="lacks"):
        artifacts.read_complete(path)


def test_sweeping_removes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from bagscope import artifacts as a;"
        "p = a.temporary_path(pathlib.Path(sys.argv[1])); p.touch();"
        "q = a.temporary_path(pathlib.Path(sys.argv[1])); q.mkdir(); (q / 'x').touch()"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "dead.h5")], check=True)
    dead = set(tmp_path.iterdir())
    assert len(dead) == 2
    mine = artifacts.temporary_path(tmp_path / "mine.h5")
    mine.touch()
    foreign = tmp_path / f".a.h5.otherhost~{2**22 + 5}~0123abcd.tmp"
    foreign.touch()
    unrelated = tmp_path / ".notes.tmp"
    unrelated.touch()
    assert set(artifacts.sweep_temporaries(tmp_path)) == dead
    assert set(tmp_path.iterdir()) == {mine, foreign, unrelated}


def test_liveness_of_processes() -> None:
    assert artifacts.is_alive(os.getpid())
    assert artifacts.is_alive(1)
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    assert not artifacts.is_alive(finished.pid)


@pytest.mark.parametrize("name", ["007", "TCGA-A1-A0SB-01Z", "slide 1", "Präparat_3", "a#2"])
def test_portable_names_are_accepted(name: str) -> None:
    assert artifacts.portable_name_problem(name) is None


@pytest.mark.parametrize("name", ["", " a", "a.", ".a", "a/b", "a:b", "con", "LPT1.x", "é" * 91])
def test_names_that_some_system_refuses_are_refused(name: str) -> None:
    assert artifacts.portable_name_problem(name) is not None


def test_every_step_of_a_write_is_observed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(artifacts, "observe_step", seen.append)
    artifacts.write_text(tmp_path / "a", "text")
    assert seen == ["mid-write", "before-sync", "before-rename", "after-rename"]
