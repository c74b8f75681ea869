"""A slide's identity: its content decides, its name, place and times do not."""

from __future__ import annotations

import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bagscope.errors import ReadError
from bagscope.wsi.identity import (
    BLOCK_BYTES,
    SAMPLED_BLOCKS,
    sampled_blocks,
    slide_files,
    slide_identity,
)
from tests.builders import build_svs
from tests.wsi.tiff_builders import overwrite, stored_span


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    path = tmp_path_factory.mktemp("identity") / "slide.svs"
    build_svs(path, width_px=1500, height_px=1200)
    return path


def flipped(path, offset):
    with path.open("rb") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
    overwrite(path, offset, bytes([byte ^ 0x40]))


def test_a_copy_elsewhere_under_another_name_is_the_same_slide(svs, tmp_path):
    copy = tmp_path / "renamed.svs"
    copy.write_bytes(svs.read_bytes())
    os.utime(copy, (1, 1))
    assert slide_identity(copy) == slide_identity(svs)
    assert str(tmp_path) not in str(slide_identity(copy))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(block=st.integers(0, SAMPLED_BLOCKS - 1), byte=st.integers(0, BLOCK_BYTES - 1))
def test_any_flipped_byte_of_a_sampled_block_changes_it(svs, tmp_path, block, byte):
    copy = tmp_path / "copy.svs"
    copy.write_bytes(svs.read_bytes())
    _, offset, length = sampled_blocks([(copy.stat().st_size, copy)])[block]
    flipped(copy, offset + byte % length)
    assert slide_identity(copy) != slide_identity(svs)


def test_blocks_are_spread_from_the_first_byte_to_the_last(svs):
    size = svs.stat().st_size
    blocks = sampled_blocks([(size, svs)])
    assert len(blocks) == SAMPLED_BLOCKS
    assert blocks[0][1] == 0
    assert blocks[-1][1] + blocks[-1][2] == size


def test_the_directories_are_covered_wherever_they_lie(svs, tmp_path):
    copy = tmp_path / "copy.svs"
    copy.write_bytes(svs.read_bytes())
    place = copy.read_bytes().index(b"MPP = ")
    flipped(copy, place + len(b"MPP = "))
    assert slide_identity(copy)["header_sha256"] != slide_identity(svs)["header_sha256"]


def test_a_longer_file_is_another_slide(svs, tmp_path):
    copy = tmp_path / "copy.svs"
    copy.write_bytes(svs.read_bytes() + b"\0")
    assert slide_identity(copy)["size_bytes"] != slide_identity(svs)["size_bytes"]


@given(sizes=st.lists(st.integers(0, 20000), min_size=1, max_size=12))
def test_blocks_lie_inside_their_files(tmp_path_factory, sizes):
    files = [(size, tmp_path_factory.getbasetemp() / str(i)) for i, size in enumerate(sizes)]
    for path, offset, length in sampled_blocks(files):
        size = sizes[int(path.name)]
        assert 0 <= offset < size
        assert 0 < length <= BLOCK_BYTES
        assert offset + length <= size


@pytest.mark.parametrize("change", ["content", "name", "size", "added"])
def test_every_file_of_an_mrxs_counts(tmp_path, change):
    main, folder = tmp_path / "a.mrxs", tmp_path / "a"
    folder.mkdir()
    main.write_bytes(b"m" * 100)
    for i in range(3):
        (folder / f"Data{i}.dat").write_bytes(bytes([i]) * 3000)
    before = slide_identity(main)
    assert before["files"] == 4
    if change == "content":
        flipped(folder / "Data1.dat", 0)
    elif change == "name":
        (folder / "Data1.dat").rename(folder / "Data9.dat")
    elif change == "size":
        (folder / "Data2.dat").write_bytes(b"\2" * 2999)
    else:
        (folder / "Data3.dat").write_bytes(b"")
    assert slide_identity(main) != before


def test_an_mrxs_renamed_with_its_folder_is_the_same_slide(tmp_path):
    main, folder = tmp_path / "a.mrxs", tmp_path / "a"
    folder.mkdir()
    main.write_bytes(b"m" * 100)
    (folder / "Index.dat").write_bytes(b"i" * 9000)
    before = slide_identity(main)
    main.rename(tmp_path / "b.mrxs")
    folder.rename(tmp_path / "b")
    assert slide_identity(tmp_path / "b.mrxs") == before


def test_a_dicom_series_is_one_slide_by_whichever_file(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.dcm").write_bytes(bytes([i]) * 1000)
    (tmp_path / "notes.txt").write_text("x")
    assert [p.name for p in slide_files(tmp_path / "1.dcm")] == ["0.dcm", "1.dcm", "2.dcm"]
    assert slide_identity(tmp_path / "1.dcm") == slide_identity(tmp_path / "2.dcm")


def test_a_hamamatsu_vms_brings_the_files_that_it_names(tmp_path):
    (tmp_path / "s.vms").write_text("[Virtual]\nImageFile=s.jpg\nMacroImage=none.jpg\n")
    (tmp_path / "s.jpg").write_bytes(b"j" * 10)
    assert [p.name for p in slide_files(tmp_path / "s.vms")] == ["s.vms", "s.jpg"]


def test_a_zarr_folder_counts_names_relative_to_itself(tmp_path):
    for name in ("a.zarr", "b.zarr"):
        folder = tmp_path / name / "0"
        folder.mkdir(parents=True)
        (folder / "0.0.0").write_bytes(b"c" * 5000)
        (tmp_path / name / "zarr.json").write_text("{}")
    assert slide_identity(tmp_path / "a.zarr") == slide_identity(tmp_path / "b.zarr")
    (tmp_path / "b.zarr" / "0" / "0.0.1").write_bytes(b"c")
    assert slide_identity(tmp_path / "a.zarr") != slide_identity(tmp_path / "b.zarr")


def test_damaged_directories_do_not_stop_it(svs, tmp_path):
    copy = tmp_path / "cut.svs"
    offset, _ = stored_span(svs, 0, 20)
    copy.write_bytes(svs.read_bytes()[:offset])
    assert slide_identity(copy)["size_bytes"] == offset


def test_what_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ReadError, match="can't be read"):
        slide_identity(tmp_path / "none.svs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReadError, match="holds no file"):
        slide_identity(tmp_path / "empty")


def test_it_is_fast(svs):
    slide_identity(svs)
    # The best of several, since what is tested is the work and not the machine's other load.
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        slide_identity(svs)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.005
