from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest

from bagscope.wsi.synthetic import (
    corrupt_tile_copy,
    missing_tile_copy,
    truncated_copy,
    zero_byte_file,
)
from tests.builders import build_svs


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.svs"
    build_svs(path)
    return path


def test_truncated(good: Path, tmp_path: Path) -> None:
    bad = truncated_copy(good, tmp_path / "bad.svs", keep=0.5)
    assert bad.stat().st_size == good.stat().st_size // 2
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(bad)


def test_zero_bytes(tmp_path: Path) -> None:
    bad = zero_byte_file(tmp_path / "bad.svs")
    assert bad.stat().st_size == 0
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(bad)


def test_a_corrupt_tile_fails_alone(good: Path, tmp_path: Path) -> None:
    bad = corrupt_tile_copy(good, tmp_path / "bad.svs", tiles=[5])
    with openslide.OpenSlide(bad) as slide, openslide.OpenSlide(good) as reference:
        for place in ((0, 0), (512, 256)):
            read, due = (s.read_region(place, 0, (256, 256)) for s in (slide, reference))
            assert read.tobytes() == due.tobytes()
        with pytest.raises(openslide.OpenSlideError):
            slide.read_region((256, 256), 0, (256, 256))


@pytest.mark.parametrize("bigtiff", [False, True])
def test_a_missing_tile_is_transparent(tmp_path: Path, bigtiff: bool) -> None:
    good = tmp_path / "good.svs"
    build_svs(good, bigtiff=bigtiff)
    bad = missing_tile_copy(good, tmp_path / "bad.svs", tiles=[5])
    with openslide.OpenSlide(bad) as slide:
        assert not np.asarray(slide.read_region((256, 256), 0, (256, 256)))[..., 3].any()
        assert np.asarray(slide.read_region((512, 256), 0, (256, 256)))[..., 3].all()
