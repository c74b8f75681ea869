"""Directories against tifffile's, and against files that lie."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from bagscope.errors import ReadError
from bagscope.wsi import tiff_directory as tiff
from tests.wsi.tiff_builders import build_tiff


def structure_of(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return tiff.read_structure(descriptor)
    finally:
        os.close(descriptor)


def written(tmp_path, content):
    path = tmp_path / "x.tif"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("byte_order", "<>")
@pytest.mark.parametrize("bigtiff", [False, True])
def test_tags_equal_tifffiles(tmp_path, byte_order, bigtiff):
    path = tmp_path / "x.tif"
    build_tiff(path, vendor="aperio", byte_order=byte_order, bigtiff=bigtiff)
    descriptor = os.open(path, os.O_RDONLY)
    with tifffile.TiffFile(path) as file:
        found = tiff.read_structure(descriptor).directories
        assert len(found) == len(file.pages)
        for directory, page in zip(found, file.pages, strict=True):
            assert set(directory.entries) == {tag.code for tag in page.tags}
            assert directory.is_tiled
            for tag in (tiff.IMAGE_WIDTH, tiff.TILE_OFFSETS, tiff.TILE_BYTE_COUNTS, 258, 262):
                expected = np.atleast_1d(page.tags[tag].value).astype(np.int64)
                assert np.array_equal(directory.values(tag), expected)
        assert found[0].text(tiff.IMAGE_DESCRIPTION) == file.pages[0].description
        assert found[0].value(tiff.JPEG_TABLES, 17) == 17
        assert found[0].raw(tiff.JPEG_TABLES) == b""
    os.close(descriptor)


def test_spans_cover_the_directories_and_not_the_pixels(tmp_path):
    path = tmp_path / "x.tif"
    build_tiff(path)
    spans = structure_of(path).spans
    covered = {i for offset, length in spans for i in range(offset, offset + length)}
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert page.offset in covered
        assert page.tags["TileOffsets"].valueoffset in covered
        assert page.dataoffsets[3] not in covered


@pytest.mark.parametrize(
    "content", [b"", b"II", b"II*\0", b"GIF89a..", b"II+\0\x08\0\0\0", b"MM\0*"]
)
def test_what_is_no_tiff_is_refused(tmp_path, content):
    with pytest.raises(ReadError):
        structure_of(written(tmp_path, content))


def test_directories_in_a_circle_are_refused(tmp_path):
    directory = struct.pack("<H", 1) + struct.pack("<HHII", 256, 3, 1, 5) + struct.pack("<I", 8)
    with pytest.raises(ReadError, match="loop"):
        structure_of(written(tmp_path, struct.pack("<2sHI", b"II", 42, 8) + directory))


def test_values_beyond_the_file_are_refused_when_asked_for(tmp_path):
    entry = struct.pack("<HHII", tiff.TILE_OFFSETS, 4, 2**31, 100)
    directory = struct.pack("<H", 1) + entry + struct.pack("<I", 0)
    path = written(tmp_path, struct.pack("<2sHI", b"II", 42, 8) + directory)
    descriptor = os.open(path, os.O_RDONLY)
    (found,) = tiff.read_structure(descriptor).directories
    with pytest.raises(ReadError, match="cut short or damaged"):
        found.values(tiff.TILE_OFFSETS)
    os.close(descriptor)


@settings(max_examples=150)
@given(data=st.data())
def test_damage_never_raises_anything_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.tif"
    build_tiff(
        path, sizes_px=((64, 64),), tile_px=(32, 32), byte_order=data.draw(st.sampled_from("<>"))
    )
    content = bytearray(path.read_bytes()[: data.draw(st.integers(0, 1200))])
    for place in data.draw(st.lists(st.integers(0, 700), max_size=6)):
        if place < len(content):
            content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for directory in tiff.read_structure(descriptor).directories:
            for tag in directory.entries:
                directory.values(tag)
                directory.text(tag)
    except ReadError:
        pass
    finally:
        os.close(descriptor)
