"""Splicing and decoding, against encoders that say what they wrote."""

from __future__ import annotations

import contextlib

import imagecodecs
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from bagscope.errors import ReadError
from bagscope.wsi.jpeg_stream import (
    cached_buffer,
    chroma_subsampling,
    complete_stream,
    decode_rgb,
    stream_prefix,
    without_colour_markers,
)
from bagscope.wsi.synthetic.jpeg_tiles import TileEncoder
from tests.builders import field_rgb
from tests.wsi.tiff_builders import encode

TILE = field_rgb(128, 96)


def decoded(stream, shape=TILE.shape, **more):
    out = np.zeros(shape, np.uint8)
    decode_rgb(stream, out, **more)
    return out


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "rgb"])
def test_tables_are_spliced_and_the_stated_colours_hold(subsampling):
    tile = field_rgb(128, 128)
    encoder = TileEncoder(quality=90, subsampling=subsampling)
    prefix = stream_prefix(encoder.tables, is_rgb=subsampling == "rgb")
    found = decoded(complete_stream(prefix, encoder.encode(tile)), tile.shape)
    assert np.abs(found.astype(int) - tile).mean() < 3


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("chroma", ["444", "rgb"])
def test_what_the_tiff_says_wins_over_the_streams_own_markers(chroma, stated):
    """Components decode as the TIFF states, whatever JFIF or Adobe markers claim."""
    plain = without_colour_markers(encode(TILE, chroma))
    jfif = bytes.fromhex("ffe000104a46494600010100000100010000")
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
    results = [
        decoded(complete_stream(stream_prefix(b"", is_rgb=stated), plain[:2] + claim + plain[2:]))
        for claim in (b"", jfif, adobe, jfif + adobe)
    ]
    assert all(np.array_equal(results[0], other) for other in results[1:])
    right = np.abs(results[0].astype(int) - TILE).mean() < 3
    assert right == (stated == (chroma == "rgb"))


def test_decoding_is_libjpegs_exact_one():
    stream = encode(TILE, "420")
    assert np.array_equal(decoded(stream), imagecodecs.jpeg8_decode(stream))
    fast = simplejpeg.decode_jpeg(stream, "RGB", fastdct=True, fastupsample=True)
    assert not np.array_equal(decoded(stream), fast)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
def test_a_cut_short_stream_is_never_filled_up(part):
    stream = encode(TILE, "422")
    cut = stream[: int(len(stream) * part)]
    with pytest.raises(ReadError):
        decoded(complete_stream(stream_prefix(b"", is_rgb=False), cut))


@settings(max_examples=200)
@given(data=st.data())
def test_damage_never_raises_anything_else(data):
    stream = bytearray(encode(TILE, "420"))
    for place in data.draw(st.lists(st.integers(0, len(stream) - 1), max_size=8)):
        stream[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ReadError):
        decoded(complete_stream(stream_prefix(b"", is_rgb=False), bytes(stream)))


@pytest.mark.parametrize(
    "stored", [b"", b"\xff", b"\0" * 100, b"\xff\xd8", b"\xff\xd8\xff\xe0\x00"]
)
def test_what_is_no_jpeg_is_refused(stored):
    with pytest.raises(ReadError):
        decoded(complete_stream(stream_prefix(b"", is_rgb=False), stored))


@pytest.mark.parametrize("shape", [(96, 64, 3), (48, 64, 3), (192, 256, 3), (96, 129, 3)])
def test_a_stream_of_another_size_is_refused(shape):
    with pytest.raises(ReadError):
        decoded(encode(TILE, "420"), shape)


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_scaled_decoding_checks_the_full_size(reduce):
    small = (96 // reduce, 128 // reduce, 3)
    assert decoded(encode(TILE, "420"), small, reduce=reduce).any()
    with pytest.raises(ReadError, match="px where"):
        decoded(encode(field_rgb(128, 128), "420"), small, reduce=reduce)


@pytest.mark.parametrize("channels", [3, 4])
def test_buffers_are_off_the_boundary_at_which_the_cache_is_passed_by(channels):
    for height, width in ((240, 240), (256, 256), (17, 31)):
        buffer = cached_buffer(height, width, channels)
        assert buffer.shape == (height, width, channels)
        assert buffer.flags.c_contiguous and buffer.ctypes.data % 32 == 16


def test_padding_in_a_fourth_channel_changes_no_colour():
    stream = encode(TILE, "422")
    assert np.array_equal(decoded(stream, (96, 128, 4))[..., :3], decoded(stream))


@pytest.mark.parametrize("chroma", ["444", "422", "420"])
def test_chroma_subsampling_is_read_from_the_header(chroma):
    assert chroma_subsampling(encode(TILE, chroma)) == chroma
    with pytest.raises(ReadError):
        chroma_subsampling(b"\xff\xd8nothing")
