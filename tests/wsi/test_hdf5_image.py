from __future__ import annotations

import io
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bagscope.wsi.hdf5_image import SparseImage

PLACES = st.integers(0, 3 << 16)
CONTENTS = st.binary(max_size=9) | st.integers(0, 600).map(lambda n: bytes(range(256)) * n)
STEPS = st.lists(
    st.tuples(PLACES, CONTENTS) | st.tuples(PLACES, st.integers(0, 70_000)), max_size=8
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_it_is_a_file_like_any_other(tmp_path: Path, steps: list[tuple[int, bytes | int]]) -> None:
    image, reference = SparseImage(), io.BytesIO()
    for place, content in steps:
        assert image.seek(place) == reference.seek(place)
        if isinstance(content, int):
            found = reference.read(content)
            assert image.read(content)[: len(found)] == found
        else:
            assert image.write(content) == reference.write(content)
            assert image.tell() == reference.tell()
            assert image.seek(0, os.SEEK_END) == reference.seek(0, os.SEEK_END)
    path = tmp_path / "a"
    path.unlink(missing_ok=True)
    image.write_to(path)
    assert path.read_bytes() == reference.getvalue()


def test_hdf5_finds_in_it_what_it_wrote(tmp_path: Path) -> None:
    image = SparseImage()
    values = np.random.default_rng(0).normal(size=(50_000, 7))
    with h5py.File(image, "w") as file:
        file["values"] = values
        file.attrs["name"] = "µ"
    image.write_to(tmp_path / "image.h5")
    with h5py.File(tmp_path / "image.h5") as file:
        np.testing.assert_array_equal(file["values"][:], values)
        assert file.attrs["name"] == "µ"


def test_truncating_cuts_and_extends(tmp_path: Path) -> None:
    image = SparseImage()
    image.write(b"x" * 70_000)
    image.truncate(66_000)
    image.write_to(tmp_path / "cut")
    assert (tmp_path / "cut").read_bytes() == b"x" * 66_000
    image.truncate(1 << 33)
    image.write_to(tmp_path / "long")
    found = (tmp_path / "long").stat()
    assert found.st_size == 1 << 33
    # Room that was only made takes none.
    assert found.st_blocks * 512 < 1 << 20


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("kept")
    with pytest.raises(FileExistsError):
        SparseImage().write_to(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "kept"
