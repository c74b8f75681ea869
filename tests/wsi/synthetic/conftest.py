from __future__ import annotations

from dataclasses import replace

import numpy as np
import openslide
import pytest
from numpy.typing import NDArray

from bagscope.wsi.synthetic import SyntheticSpec, SyntheticTruth, write_slide

SMALL = SyntheticSpec(
    width_px=2048, height_px=1600, seed=4, tumor_fraction=0.25, downsamples=(1, 4)
)


def level_rgb(truth: SyntheticTruth, level: int = 0) -> NDArray[np.int16]:
    with openslide.OpenSlide(truth.slide) as slide:
        region = slide.read_region((0, 0), level, slide.level_dimensions[level])
        return np.asarray(region.convert("RGB"), dtype=np.int16)


@pytest.fixture(scope="session")
def small_truth(tmp_path_factory: pytest.TempPathFactory) -> SyntheticTruth:
    return write_slide(tmp_path_factory.mktemp("small") / "small.svs", SMALL)


@pytest.fixture(scope="session")
def small_rgb(small_truth: SyntheticTruth) -> NDArray[np.int16]:
    return level_rgb(small_truth)


@pytest.fixture(scope="session")
def plain_rgb(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.int16]:
    """The small slide without tumour, the ground that artefacts are compared with."""
    path = tmp_path_factory.mktemp("plain") / "plain.svs"
    return level_rgb(write_slide(path, replace(SMALL, tumor_fraction=0.0)))
