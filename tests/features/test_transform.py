from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bagscope.features.encoders.spec import CLIP_MEAN, CLIP_STD, EncoderSpec
from bagscope.features.transform import TileTransform, resized_in_float32

Interpolation = Literal["bilinear", "bicubic"]
INTERPOLATIONS = get_args(EncoderSpec.model_fields["interpolation"].annotation)
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def make_spec(**fields: object) -> EncoderSpec:
    settings = {"name": "x", "source": "bagscope", "input_px": 32, "dimension": 1, **fields}
    return EncoderSpec.model_validate(settings)


def make_tiles(count: int, edge: int, seed: int = 0) -> torch.Tensor:
    """Noise on waves: every frequency, and every grey level up to the ends."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:edge, 0:edge] / edge
    waves = [128 + 150 * np.sin(9 * x * (i + 1) + 5 * y) for i in range(count)]
    tiles = np.stack(waves)[..., None] + rng.normal(0, 30, (count, edge, edge, 3))
    return torch.from_numpy(np.clip(tiles, 0, 255).astype(np.uint8))


def pillow(tile: torch.Tensor, edge: int, interpolation: str) -> np.ndarray:
    return np.asarray(Image.fromarray(tile.numpy()).resize((edge, edge), PILLOW[interpolation]))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("tile_px", "input_px"), [(64, 32), (50, 47), (40, 56), (100, 24)])
def test_resizes_as_pillow_does(interpolation: str, tile_px: int, input_px: int) -> None:
    tiles = make_tiles(3, tile_px)
    transform = TileTransform(make_spec(input_px=input_px, interpolation=interpolation))
    expected = np.stack([pillow(tile, input_px, interpolation) for tile in tiles]).astype(int)
    for got in (
        transform.to_input_u8(tiles),
        resized_in_float32(tiles.permute(0, 3, 1, 2), input_px, interpolation),
    ):
        assert got.dtype == torch.uint8
        difference = np.abs(got.permute(0, 2, 3, 1).numpy() - expected)
        assert difference.max() <= 1
        assert difference.mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_whole_way_equals_pillow_and_plain_arithmetic(
    interpolation: str, dtype: torch.dtype
) -> None:
    spec = make_spec(
        resize_px=40, input_px=32, interpolation=interpolation, mean=CLIP_MEAN, std=CLIP_STD
    )
    tiles = make_tiles(4, 64)
    got = TileTransform(spec)(tiles, dtype)
    assert got.shape == (4, 3, 32, 32)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    images = np.stack([pillow(tile, 40, interpolation)[4:36, 4:36] for tile in tiles])
    expected = (images.transpose(0, 3, 1, 2) / 255 - np.reshape(CLIP_MEAN, (3, 1, 1))) / np.reshape(
        CLIP_STD, (3, 1, 1)
    )
    one_level = 1 / 255 / min(CLIP_STD)
    rounding = 3 * torch.finfo(dtype).eps
    assert np.abs(got.double().numpy() - expected).max() <= one_level + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalises_every_grey_level_as_float64_does(dtype: torch.dtype) -> None:
    mean, std = np.array(CLIP_MEAN), np.array(CLIP_STD)
    levels = np.arange(256)
    images = torch.from_numpy(np.tile(levels.astype(np.uint8), (3, 1))).reshape(1, 3, 16, 16)
    transform = TileTransform(make_spec(input_px=16, mean=CLIP_MEAN, std=CLIP_STD))
    got = transform.normalise(images.contiguous(memory_format=torch.channels_last), dtype)
    expected = (levels / 255 - mean[:, None]) / std[:, None]
    np.testing.assert_allclose(
        got.reshape(3, 256).double().numpy(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6
    )


def test_a_tile_that_fits_is_not_touched() -> None:
    tiles = make_tiles(3, 32)
    got = TileTransform(make_spec(input_px=32)).to_input_u8(tiles)
    assert torch.equal(got, tiles.permute(0, 3, 1, 2))


@pytest.mark.parametrize(("input_px", "start"), [(32, 4), (31, 4), (29, 6), (40, 0)])
def test_the_crop_is_in_the_middle(input_px: int, start: int) -> None:
    tiles = make_tiles(2, 40)
    got = TileTransform(make_spec(resize_px=40, input_px=input_px)).to_input_u8(tiles)
    middle = tiles[:, start : start + input_px, start : start + input_px]
    assert torch.equal(got, middle.permute(0, 3, 1, 2))
    assert got.is_contiguous(memory_format=torch.channels_last)


@given(
    count=st.integers(1, 9),
    tile_px=st.integers(20, 61),
    input_px=st.integers(16, 53),
    interpolation=st.sampled_from(INTERPOLATIONS),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_a_row_depends_on_its_own_tile_alone(
    count: int, tile_px: int, input_px: int, interpolation: str, seed: int
) -> None:
    transform = TileTransform(make_spec(input_px=input_px, interpolation=interpolation))
    tiles = make_tiles(count, tile_px, seed)
    together = transform(tiles, torch.float32)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    assert torch.equal(transform(tiles[order], torch.float32), together[order])
    alone = torch.cat([transform(tile[None], torch.float32) for tile in tiles])
    assert torch.equal(alone, together)


def test_equal_grey_levels_become_equal_numbers_wherever_they_are() -> None:
    # Odd sizes, so that loops of the processor end in the middle of rows.
    tiles = torch.full((7, 77, 77, 3), 201, dtype=torch.uint8)
    got = TileTransform(make_spec(input_px=77, mean=CLIP_MEAN, std=CLIP_STD))(tiles, torch.float32)
    assert all(len(got[:, channel].unique()) == 1 for channel in range(3))


def test_an_empty_batch_stays_empty() -> None:
    tiles = torch.zeros((0, 64, 64, 3), dtype=torch.uint8)
    assert TileTransform(make_spec())(tiles, torch.float32).shape == (0, 3, 32, 32)


def test_has_nothing_to_save() -> None:
    transform = TileTransform(make_spec())
    assert not transform.state_dict()
    assert not list(transform.parameters())


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (torch.zeros(2, 32, 32, 3), "pass uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "pass uint8"),
        (torch.zeros(32, 32, 3, dtype=torch.uint8), "pass uint8"),
        (torch.zeros(2, 32, 48, 3, dtype=torch.uint8), "48 × 32 px; pass square ones"),
    ],
)
def test_refuses_what_is_no_batch_of_tiles(tiles: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileTransform(make_spec())(tiles, torch.float32)


@pytest.mark.parametrize("stain", ["macenko", "reinhard"])
def test_the_stain_is_normalised_first(stain: str) -> None:
    from bagscope.features.stain import stain_normaliser

    normaliser = stain_normaliser(stain)
    assert normaliser is not None
    tiles = 100 + make_tiles(2, 64) // 2
    got = TileTransform(make_spec(stain=stain)).to_input_u8(tiles)
    assert not torch.equal(normaliser(tiles), tiles)
    assert torch.equal(got, TileTransform(make_spec()).to_input_u8(normaliser(tiles)))
