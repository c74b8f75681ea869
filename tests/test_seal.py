from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bagscope.artifacts import (
    SEAL_BLANK,
    SEAL_MARK,
    atomic_folder,
    folder_faults,
    seal_file,
    seal_holds,
    stated_seal,
)
from bagscope.errors import ArtifactError

any_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def sealed(path: Path, before: bytes = b"head ", after: bytes = b" tail") -> str:
    path.write_bytes(before + SEAL_BLANK.encode() + after)
    return seal_file(path)


def test_the_seal_is_the_hash_of_the_file_with_zeros_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a"
    expected = hashlib.sha256(b"head " + SEAL_BLANK.encode() + b" tail").hexdigest()
    assert sealed(path) == expected
    assert path.read_bytes() == f"head {SEAL_MARK}{expected} tail".encode()
    assert stated_seal(path) == expected
    assert seal_holds(path)


@any_folder
@given(before=st.binary(max_size=80), after=st.binary(max_size=80), flip=st.integers(0))
def test_every_flipped_bit_breaks_it(
    tmp_path: Path, before: bytes, after: bytes, flip: int
) -> None:
    path = tmp_path / "a"
    sealed(path, before, after)
    content = bytearray(path.read_bytes())
    flip %= 8 * len(content)
    content[flip // 8] ^= 1 << flip % 8
    path.write_bytes(content)
    assert not seal_holds(path)


@any_folder
@given(after=st.binary(max_size=80), kept=st.floats(0, 1, exclude_max=True))
def test_every_truncation_breaks_it(tmp_path: Path, after: bytes, kept: float) -> None:
    path = tmp_path / "a"
    sealed(path, after=after)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert not seal_holds(path)


def test_a_seal_across_the_blocks_of_reading_holds(tmp_path: Path) -> None:
    for before in range((1 << 20) - 80, (1 << 20) + 2, 13):
        sealed(tmp_path / "a", b"x" * before, b"y" * 10)
        assert seal_holds(tmp_path / "a")


def test_zeros_and_a_bare_mark_are_no_seal(tmp_path: Path) -> None:
    path = tmp_path / "a"
    sealed(path, b"0" * 200 + SEAL_MARK.encode() + b"not digits ")
    assert seal_holds(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no blank seal"), (SEAL_BLANK.encode() * 2, "more than one blank seal")],
)
def test_a_file_without_one_blank_seal_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        seal_file(path)
    assert path.read_bytes() == content


def test_a_file_without_a_seal_states_none_and_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert stated_seal(tmp_path / "a") is None
    assert not seal_holds(tmp_path / "a")


def lose_the_line_end(content: bytes) -> bytes:
    return content[:-1]


def widen(content: bytes) -> bytes:
    return content.replace(b'": {', b'":  {', 1)


@pytest.mark.parametrize("change", [lose_the_line_end, widen])
def test_a_record_that_reads_the_same_but_is_not_is_a_fault(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path / "model"
    with atomic_folder(folder, {"a": 1.5, "µ": [None, "x"]}) as temporary:
        (temporary / "weights").write_bytes(b"123")
    assert folder_faults(folder) == []
    record = folder / "complete.json"
    record.write_bytes(change(record.read_bytes()))
    assert folder_faults(folder) == [f"{record}: content changed since it was written"]
