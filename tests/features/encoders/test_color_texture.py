from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bagscope.features.encoders.color_texture import SPEC, build
from bagscope.features.encoders.loading import pool
from bagscope.features.encoders.weights import WeightSource, weights_sha256
from bagscope.features.transform import TileTransform
from bagscope.wsi.synthetic.painter import SlidePainter
from bagscope.wsi.synthetic.render import Window, interpolated
from bagscope.wsi.synthetic.spec import SyntheticSpec

SLIDE_PX, TILE_PX, MPP = 1536, 256, 0.5
NETWORK = build(SPEC, WeightSource())
EDGE = SPEC.input_px


def encode(tiles: np.ndarray) -> np.ndarray:
    images = TileTransform(SPEC)(torch.from_numpy(tiles), torch.float32)
    return pool(NETWORK(images), SPEC).numpy()


def noise(count: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, EDGE, EDGE, 3)).astype(np.float32) / 255
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# --- the vector ------------------------------------------------------------------------------


def test_the_vector_is_what_the_spec_says() -> None:
    got = NETWORK(noise(3))
    assert got.shape == (3, SPEC.dimension)
    assert got.dtype == torch.float32
    assert NETWORK(noise(0)).shape == (0, SPEC.dimension)
    assert not list(NETWORK.parameters())
    assert weights_sha256(NETWORK) == weights_sha256(build(SPEC, WeightSource(random=True)))


@pytest.mark.parametrize(
    "image",
    [
        *(np.full((EDGE, EDGE, 3), grey) for grey in (0, 100, 255)),
        np.tile([200, 90, 160], (EDGE, EDGE, 1)),
        255 * (np.indices((EDGE, EDGE)).sum(axis=0)[..., None] % 2).repeat(3, axis=2),
        np.tile(np.linspace(0, 255, EDGE).round(), (3, EDGE, 1)).T,
        np.eye(3)[np.random.default_rng(0).integers(0, 3, (EDGE, EDGE))] * 255,
    ],
)
def test_vectors_are_finite_and_of_moderate_size(image: np.ndarray) -> None:
    got = encode(image.astype(np.uint8)[None])
    assert np.isfinite(got).all()
    assert np.abs(got).max() < 4


def test_flat_tiles_have_no_texture() -> None:
    got = encode(np.full((1, TILE_PX, TILE_PX, 3), 100, np.uint8))[0]
    assert not got[30:39].any()  # deviations and correlations
    assert not got[39:].any()


@pytest.mark.parametrize("count", [1, 2, 7, 19])
def test_a_row_depends_on_its_own_tile_alone(count: int) -> None:
    images = noise(20)
    together = NETWORK(images)
    assert torch.equal(NETWORK(images[:count]), together[:count])
    assert torch.equal(NETWORK(images[-count:].flip(0)), together[-count:].flip(0))
    channels_last = images[:count].contiguous(memory_format=torch.channels_last)
    assert torch.equal(NETWORK(channels_last), together[:count])


def test_the_number_of_threads_does_not_matter() -> None:
    images = noise(5)
    many = NETWORK(images)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(NETWORK(images), many)
    finally:
        torch.set_num_threads(threads)


def test_turning_and_mirroring_change_little() -> None:
    # Colours are counted in every other row, and squares of 4 × 4 pixels stay squares.
    images = noise(2)
    got = NETWORK(images)
    for other in (images.transpose(2, 3), images.flip(3), images.rot90(1, (2, 3))):
        assert torch.allclose(NETWORK(other), got, atol=0.03)


def test_refuses_images_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"images are \(1, 3, 64, 64\); pass \(B, 3, 128, 128\)"):
        NETWORK(torch.zeros(1, 3, 64, 64))


# --- against plain float64 -------------------------------------------------------------------


def spread(plane: np.ndarray, edges: tuple[int, ...]) -> np.ndarray:
    return np.array([np.clip((plane - a) / (b - a), 0, 1).mean() for a, b in pairwise(edges)])


def smooth_image() -> tuple[np.ndarray, torch.Tensor]:
    y, x = np.mgrid[0:EDGE, 0:EDGE]
    colour = [170 + 60 * np.sin(x / 5) * np.cos(y / 7), 120 + 40 * np.sin(x / 5), 150 + 30 * y / 99]
    rgb = np.rint(np.stack(colour, axis=2))
    return rgb, torch.from_numpy(rgb.transpose(2, 0, 1)[None] / 255).float()


def test_colour_equals_plain_arithmetic() -> None:
    rgb, images = smooth_image()
    got = NETWORK(images)[0].numpy()
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    density = -np.log((rgb + 1) / 256)
    h, e, d = (np.clip(density @ np.linalg.inv(stains) * 64, 0, 255)).transpose(2, 0, 1)
    saturation, brightness = rgb.max(axis=2) - rgb.min(axis=2), rgb.mean(axis=2)
    grey_edges = (0, 43, 85, 128, 170, 213, 255)
    pale_edges = (0, 5, 10, 16, 23, 32, 64)
    expected = [spread(plane, grey_edges) for plane in (saturation, brightness)]
    # Range by range, one plane after the other.
    np.testing.assert_allclose(got[:12].reshape(6, 2).T, expected, atol=0.02)
    np.testing.assert_allclose(got[12:18], spread(h, (0, 8, 16, 28, 44, 72, 160)), atol=0.02)
    expected = [spread(plane, pale_edges) for plane in (e, d)]
    np.testing.assert_allclose(got[18:30].reshape(6, 2).T, expected, atol=0.03)
    planes = (saturation, brightness, h, e, d)
    np.testing.assert_allclose(got[30:35], [p.std() / 64 for p in planes], atol=0.01)
    expected = [
        ((p - p.mean()) * (h - h.mean())).mean() / ((p.std() + 1) * (h.std() + 1))
        for p in (saturation, brightness, e, d)
    ]
    np.testing.assert_allclose(got[35:39], expected, atol=0.03)


def test_texture_equals_a_loop_over_pixels() -> None:
    rng = np.random.default_rng(4)
    grey = np.rint(128 + 60 * rng.standard_normal((EDGE, EDGE)).clip(-2, 2))
    images = torch.from_numpy(np.repeat(grey[None, None] / 255, 3, axis=1)).float()
    got = NETWORK(images)[0].numpy()[39:]
    right, down = grey[:, 1:] - grey[:, :-1], grey[1:] - grey[:-1]
    steps = np.maximum(np.abs(right[1:]), np.abs(down[:, 1:]))
    np.testing.assert_allclose(got[0:8:2], spread(steps, (0, 4, 12, 32, 96)), atol=1e-6)
    squares = grey.reshape(EDGE // 4, 4, EDGE // 4, 4).transpose(0, 2, 1, 3).reshape(-1, 16)
    expected = spread(squares.std(axis=1), (0, 2, 6, 16, 48))
    np.testing.assert_allclose(got[8:16:2], expected, atol=2e-3)
    half = np.rint(grey.reshape(EDGE // 2, 2, EDGE // 2, 2).mean(axis=(1, 3)))
    above = np.zeros(5)
    for y in range(1, len(half) - 1):
        for x in range(1, len(half) - 1):
            around = (half[y - 1, x], half[y + 1, x], half[y, x - 1], half[y, x + 1])
            above[: 1 + sum(bool(half[y, x] - n > 3) for n in around)] += 1
    np.testing.assert_allclose(got[32:40:2], above[1:] / above[0], atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_bands_show_how_large_structures_are(size: int) -> None:
    board = np.indices((EDGE, EDGE)) // size
    grey = np.where(board.sum(axis=0) % 2, 90, 200)
    images = torch.from_numpy(np.repeat(grey[None, None] / 255, 3, axis=1)).float()
    bands = NETWORK(images)[0, -15:].reshape(5, 3)[:, 0]
    assert bands.argmax() == np.log2(size)
    assert bands.max() == pytest.approx(55 / 64, rel=0.01)


# --- tissue ----------------------------------------------------------------------------------

Tissue = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def tissue() -> Callable[[int], Tissue]:
    """Tiles of a slide (by seed) that lie inside tissue, and whether each is tumour."""

    @cache
    def paint(seed: int) -> Tissue:
        spec = SyntheticSpec(
            width_px=SLIDE_PX, height_px=SLIDE_PX, mpp=MPP, seed=seed, tissue_fraction=0.7,
            tumor_fraction=0.45,
        )  # fmt: skip
        painter = SlidePainter(spec)
        fields = painter.layout.fields
        tiles, tumor = [], []
        for y in range(0, SLIDE_PX, TILE_PX):
            for x in range(0, SLIDE_PX, TILE_PX):
                window = Window(x_l0=x, y_l0=y, width_px=TILE_PX, height_px=TILE_PX)
                share = (interpolated(fields.tumor_um, window, MPP) > 0).mean()
                inside = (interpolated(fields.depth_um, window, MPP) > 0).mean()
                if inside > 0.8 and not 0.2 < share < 0.8:
                    tiles.append(painter.paint(window))
                    tumor.append(share > 0.5)
        return np.stack(tiles), np.array(tumor)

    return paint


@pytest.mark.slow
def test_a_linear_probe_finds_tumor_that_has_the_tissues_mean_colour(
    tissue: Callable[[int], Tissue],
) -> None:
    train, test = [tissue(seed) for seed in (1, 2)], [tissue(seed) for seed in (3, 4)]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    probe.fit(
        np.concatenate([encode(tiles) for tiles, _ in train]),
        np.concatenate([tumor for _, tumor in train]),
    )
    truth = np.concatenate([tumor for _, tumor in test])
    assert min(truth.sum(), (~truth).sum()) >= 5
    scores = np.concatenate([probe.decision_function(encode(tiles)) for tiles, _ in test])
    assert roc_auc_score(truth, scores) > 0.9


def test_a_slightly_restained_tile_is_nearer_than_other_tissue(
    tissue: Callable[[int], Tissue],
) -> None:
    tiles, tumor = tissue(1)
    density = -np.log((tiles + 1.0) / 256) * (1.1, 0.95, 1.05)
    restained = np.clip(np.rint(256 * np.exp(-density) - 1), 0, 255).astype(np.uint8)
    original, copy = encode(tiles), encode(restained)
    spread_of_features = original.std(axis=0) + 1e-3
    to_copies = np.linalg.norm((original - copy) / spread_of_features, axis=1)
    between = (original[tumor][:, None] - copy[~tumor][None]) / spread_of_features
    to_others = np.linalg.norm(between, axis=2)
    assert np.median(to_copies) < np.median(to_others) / 2
