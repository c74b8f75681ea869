from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bagscope.features import stain
from bagscope.features.stain import macenko, reinhard, stain_normaliser

METHODS = [macenko, reinhard]
# Natural absorbance of haematoxylin and eosin in red, green, blue, of two laboratories.
LABORATORIES = (
    ((0.74, 0.86, 0.42), (0.10, 0.78, 0.45)),
    ((0.86, 0.70, 0.30), (0.14, 0.94, 0.27)),
)


def rendered(laboratory: int, seed: int = 0, edge: int = 96, glass: float = 0.2) -> np.ndarray:
    """One piece of tissue in the stains of a laboratory: nuclei on eosin, part of it glass."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:edge, 0:edge]
    nuclei = np.sin(x / 3.1 + seed) * np.sin(y / 2.7) > 0.5
    h = np.where(nuclei, rng.uniform(0.7, 1.3, x.shape), rng.uniform(0, 0.06, x.shape))
    e = np.where(nuclei, rng.uniform(0.1, 0.3, x.shape), rng.uniform(0.3, 0.9, x.shape))
    inside = x >= glass * edge
    haematoxylin, eosin = (np.array(v) for v in LABORATORIES[laboratory])
    density = (h * inside)[..., None] * haematoxylin + (e * inside)[..., None] * eosin
    light = 243 * np.exp(-density) + rng.normal(0, 1, (edge, edge, 1))
    return np.clip(np.rint(light), 0, 255).astype(np.uint8)


def batch(*tiles: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(tiles))


# --- references from the papers' formulas, in float64 ----------------------------------------


def macenko_reference(tile: np.ndarray) -> np.ndarray:
    density = -np.log((tile.reshape(-1, 3) + 1.0) / 240)
    tissue = density[density.mean(axis=1) >= 0.15]
    _, vectors = np.linalg.eigh(np.cov(tissue.T))
    plane = vectors[:, [2, 1]]
    plane[:, plane.sum(axis=0) < 0] *= -1
    # The angle is taken from a direction in the middle, so that it does not wrap around.
    middle = tissue.mean(axis=0) @ plane
    offset = np.arctan2(middle[1], middle[0])
    projected = tissue @ plane
    angles = np.arctan2(projected[:, 1], projected[:, 0]) - offset
    angles = (angles + np.pi) % (2 * np.pi) - np.pi
    ends = np.percentile(angles, [1, 99]) + offset
    first, second = (plane @ np.array([np.cos(a), np.sin(a)]) for a in ends)
    stains = np.stack(sorted((first, second), key=lambda v: -v[0]), axis=1)
    amounts = np.linalg.lstsq(stains, density.T, rcond=None)[0]
    amounts *= (np.array([1.9705, 1.0308]) / np.percentile(amounts, 99, axis=1))[:, None]
    reference = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
    light = 240 * np.exp(-(reference @ amounts))
    return np.clip(np.rint(light), 0, 255).T.reshape(tile.shape)


def reinhard_reference(tile: np.ndarray) -> np.ndarray:
    lab = cv2.cvtColor(tile.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).astype(np.float64)
    mean_density = -np.log((tile + 1.0) / 240).mean(axis=2)
    tissue = mean_density >= 0.15
    mean, std = lab[tissue].mean(axis=0), lab[tissue].std(axis=0)
    target = (lab - mean) / std * stain.REINHARD_STD + stain.REINHARD_MEAN
    lab += (target - lab) * np.clip(mean_density / 0.15, 0, 1)[..., None]
    rgb = cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_LAB2RGB)
    return np.clip(np.rint(rgb * 255), 0, 255)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("laboratory", [0, 1])
@pytest.mark.parametrize(
    ("method", "reference", "tolerance"),
    [(macenko, macenko_reference, 2), (reinhard, reinhard_reference, 1)],
)
def test_equals_the_papers_formulas(method, reference, tolerance, laboratory, seed) -> None:
    tile = rendered(laboratory, seed)
    got = method(batch(tile))
    assert got.dtype == torch.uint8
    difference = np.abs(got[0].numpy() - reference(tile))
    assert difference.max() <= tolerance
    assert difference.mean() < 0.15


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_two_renderings_of_one_tissue_come_closer(method, seed) -> None:
    tiles = batch(rendered(0, seed), rendered(1, seed)).double()
    before = (tiles[0] - tiles[1]).abs().mean()
    first, second = method(tiles.to(torch.uint8)).double()
    assert before > 5
    assert (first - second).abs().mean() < before / 2


def test_macenko_finds_the_stains_it_was_rendered_with() -> None:
    tile = batch(rendered(1, glass=0))
    planes = tile.reshape(1, -1, 3).permute(0, 2, 1)
    density, total = stain._densities(planes)
    found = stain._stain_vectors(density, total >= 3 * 0.15 * 1024, torch.tensor([True]))[0].T
    for got, expected in zip(found.numpy(), LABORATORIES[1], strict=True):
        cosine = got @ expected / np.linalg.norm(expected)
        # The extreme pixels still hold a little of the other stain.
        assert cosine > np.cos(np.radians(12))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grey", [0, 128, 243, 255])
def test_flat_tiles_give_flat_tiles(method, grey) -> None:
    tiles = torch.full((2, 40, 40, 3), grey, dtype=torch.uint8)
    got = method(tiles)
    assert len(got.unique()) <= 3
    if grey > 240:
        assert torch.equal(got, tiles)


@pytest.mark.parametrize("method", METHODS)
def test_tiles_with_hardly_any_tissue_come_back_unchanged(method) -> None:
    tile = rendered(0, glass=0.985)
    assert (tile < 200).any()
    assert torch.equal(method(batch(tile)), batch(tile))
    assert not torch.equal(method(batch(rendered(0, glass=0.9))), batch(rendered(0, glass=0.9)))


def test_macenko_leaves_a_tile_of_one_stain_alone() -> None:
    ramp = 243 * np.exp(-np.linspace(0.2, 1.5, 4096)[:, None] * LABORATORIES[0][0])
    tile = batch(np.rint(ramp).astype(np.uint8).reshape(64, 64, 3))
    assert torch.equal(macenko(tile), tile)


def test_reinhard_leaves_glass_as_it_is() -> None:
    tile = rendered(0, glass=0.5)
    tile[:, :48] = 243
    assert np.abs(reinhard(batch(tile))[0, :, :48].numpy().astype(int) - 243).max() <= 1


@pytest.mark.parametrize("method", METHODS)
@given(count=st.integers(1, 6), edge=st.integers(9, 70), seed=st.integers(0, 999))
@settings(max_examples=12)
def test_a_row_depends_on_its_own_tile_alone(method, count: int, edge: int, seed: int) -> None:
    tiles = batch(*(rendered(i % 2, seed + i, edge) for i in range(count)))
    together = method(tiles)
    assert together.shape == tiles.shape
    assert torch.equal(torch.cat([method(tile[None]) for tile in tiles]), together)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    assert torch.equal(method(tiles[order]), together[order])


@pytest.mark.parametrize("method", METHODS)
def test_large_batches_are_worked_on_in_groups_without_a_trace(method, monkeypatch) -> None:
    tiles = batch(*(rendered(i % 2, i, 64) for i in range(7)))
    whole = method(tiles)
    monkeypatch.setattr(stain, "_GROUP_PIXELS_CPU", 3 * 64 * 64)
    assert torch.equal(method(tiles), whole)


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_threads_does_not_matter(method) -> None:
    tiles = batch(*(rendered(i % 2, i, 150) for i in range(5)))
    many = method(tiles)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(method(tiles), many)
    finally:
        torch.set_num_threads(threads)


def test_rounding_steps_are_far_from_a_half() -> None:
    # Logarithms and exponentials may be a few units wrong; that must never turn a rounding.
    levels = np.arange(256)
    density = -np.log((levels + 1) / stain.GLASS) * stain._STEPS
    from_half = np.abs(density - np.floor(density) - 0.5)
    assert (from_half > 1.5 * np.spacing(np.abs(density).astype(np.float32))).all()
    steps = np.arange(-stain._OUT_STEPS // 10, 7 * stain._OUT_STEPS)
    light = stain.GLASS * np.exp(-steps / stain._OUT_STEPS)
    from_half = np.abs(light - np.floor(light) - 0.5)[light < 256]
    assert (from_half > 20 * np.spacing(light[light < 256].astype(np.float32))).all()


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_stays_empty(method) -> None:
    assert method(torch.zeros((0, 8, 8, 3), dtype=torch.uint8)).shape == (0, 8, 8, 3)


def test_methods_go_by_name() -> None:
    assert stain_normaliser("none") is None
    assert stain_normaliser("macenko") is macenko
    with pytest.raises(ValueError, match="no stain normalisation 'vahadane'; use one of none"):
        stain_normaliser("vahadane")
