"""Thumbnails in JPEG files, read back by another library."""

import io

import numpy as np
import pytest
import simplejpeg
from PIL import ExifTags, Image

from bagscope.wsi import exif_thumbnail


def jpeg(side: int, **options) -> bytes:
    pixels = np.random.default_rng(side).integers(0, 255, (side, side, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", **options)
    return encoded.getvalue()


def test_the_thumbnail_comes_back_and_the_picture_is_unchanged():
    large, small = jpeg(200), jpeg(20)
    both = exif_thumbnail.embed(large, small)
    assert exif_thumbnail.extract(both) == small
    assert np.array_equal(simplejpeg.decode_jpeg(both), simplejpeg.decode_jpeg(large))


def test_pillow_finds_the_thumbnail():
    both = exif_thumbnail.embed(jpeg(200), jpeg(20))
    directory = Image.open(io.BytesIO(both)).getexif().get_ifd(ExifTags.IFD.IFD1)
    assert directory[0x0103] == 6
    raw = Image.open(io.BytesIO(both)).info["exif"][6:]
    start, length = directory[0x0201], directory[0x0202]
    assert raw[start : start + length] == jpeg(20)


def test_a_thumbnail_in_big_endian_exif_is_found():
    exif = Image.Exif()
    exif.endian = ">"
    small = jpeg(20)
    both = exif_thumbnail.embed(jpeg(50), small)
    little = both.index(b"II*\0")
    # The same directories, written the other way round.
    content = bytearray(both)
    content[little : little + 8] = b"MM\0*\0\0\0\x08"
    at = little + 8
    content[at : at + 6] = (0).to_bytes(2, "big") + (14).to_bytes(4, "big")
    at += 6
    content[at : at + 2] = (3).to_bytes(2, "big")
    fields = ((0x0103, 3, 6 << 16), (0x0201, 4, 56), (0x0202, 4, len(small)))
    for i, (tag, kind, value) in enumerate(fields):
        entry = tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + (1).to_bytes(4, "big")
        content[at + 2 + 12 * i : at + 14 + 12 * i] = entry + value.to_bytes(4, "big")
    assert exif_thumbnail.extract(bytes(content)) == small


@pytest.mark.parametrize("name", ["plain", "exif without", "not jpeg", "empty", "cut"])
def test_files_without_a_thumbnail_have_none(name):
    exif = Image.Exif()
    exif[0x0112] = 1
    files = {
        "plain": jpeg(50),
        "exif without": jpeg(50, exif=exif),
        "not jpeg": b"\x89PNG....",
        "empty": b"",
        "cut": exif_thumbnail.embed(jpeg(50), jpeg(20))[:60],
    }
    assert exif_thumbnail.extract(files[name]) is None


def test_a_thumbnail_too_large_for_its_place_is_refused():
    with pytest.raises(ValueError, match="70000 bytes"):
        exif_thumbnail.embed(jpeg(50), b"\xff\xd8" + bytes(69_998))
