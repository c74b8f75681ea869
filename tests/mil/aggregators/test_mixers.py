"""The mixers against their formulas written down anew, one bag after the other, in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.mixers import MIXERS, Mixer, MixerName, MixerOptions, Rows
from bagscope.mil.aggregators.mixers.agent import Agent, pooling, window_cells
from bagscope.mil.aggregators.mixers.around import around
from bagscope.mil.aggregators.mixers.lightning import Lightning, slopes_of
from bagscope.mil.bags import Bags
from tests.kernels.packed import normal

WIDTH, HEADS = 16, 4
LENGTHS = (23, 1, 6)


def mixer_of(name: MixerName, *, layer: int = 0, layers: int = 1, **options: Any) -> Mixer:
    torch.manual_seed(0)
    spec = MixerOptions(**{"heads": HEADS, **options})
    return MIXERS[name](WIDTH, spec, layer, layers).double().eval()


def bags_of(lengths: tuple[int, ...] = LENGTHS, *, slides: int = 1, mpp: float = 0.5) -> Bags:
    """Return bags on a lattice five tiles wide, of `slides` slides each, one after the other."""
    features = torch.cat([normal(n, WIDTH, seed=n, dtype=torch.float64) for n in lengths])
    own = torch.cat([torch.arange(n) for n in lengths])
    grid = torch.stack([own % 5, own // 5], 1).int()
    slide = torch.cat([torch.arange(n) * slides // n for n in lengths])
    bag = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Bags(
        features=features,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        bag_ids=tuple(f"bag {n}" for n in lengths),
        grid=grid,
        coords_l0=grid * round(128 / mpp) + 10_000,
        slide_ids=tuple(map(str, range(slides * len(lengths)))),
        tile_slide=(bag * slides + slide).int(),
        mpp_l0=torch.full((slides * len(lengths),), mpp, dtype=torch.float64),
    )


def run(mixer: Mixer, bags: Bags) -> Tensor:
    found: Tensor = mixer(bags.features, mixer.prepared(Rows.of(bags)))
    return found


def heads_first(x: Tensor) -> Tensor:
    return x.reshape(len(x), HEADS, -1).transpose(0, 1)


def joined(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


def softmax_attention(mixer: Any, x: Tensor, less: Tensor) -> Tensor:
    q, k, v = (heads_first(part) for part in mixer.qkv(x).chunk(3, 1))
    scores = q @ k.mT / q.shape[-1] ** 0.5 - less
    return mixer.proj(joined(torch.softmax(scores, -1) @ v))


def test_every_name_has_a_mixer() -> None:
    assert set(MIXERS) == set(get_args(MixerName))
    own = set(MixerOptions.model_fields) - {"heads"}
    assert set().union(*(kind.uses for kind in MIXERS.values())) == own


@pytest.mark.parametrize(("name", "slides"), [("softmax", 1), ("alibi", 1), ("alibi", 2)])
def test_exact_attention(name: MixerName, slides: int) -> None:
    mixer, bags = mixer_of(name, alibi_um=200.0), bags_of(slides=slides)
    assert bags.grid is not None and bags.tile_slide is not None
    found = run(mixer, bags)
    for a, b in pairwise(bags.cu_seqlens.tolist()):
        less = torch.zeros(HEADS, 1, 1, dtype=torch.float64)
        if name == "alibi":
            flat = (bags.grid[a:b, None] - bags.grid[None, a:b]).double().norm(dim=-1) * 128
            slide = bags.tile_slide[a:b].double()
            apart = (flat**2 + (30_000 * (slide[:, None] - slide)) ** 2).sqrt()
            slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
            less = slopes[:, None, None] * apart / 200
        torch.testing.assert_close(found[a:b], softmax_attention(mixer, bags.features[a:b], less))


def test_neighbours_look_no_farther_than_the_radius() -> None:
    mixer, bags = mixer_of("neighbours", radius=1), bags_of()
    assert bags.grid is not None
    found = run(mixer, bags)
    for a, b in pairwise(bags.cu_seqlens.tolist()):
        steps = (bags.grid[a:b, None] - bags.grid[None, a:b]).abs().amax(-1)
        less = torch.zeros(steps.shape, dtype=torch.float64).masked_fill(steps > 1, torch.inf)
        torch.testing.assert_close(found[a:b], softmax_attention(mixer, bags.features[a:b], less))


def test_linear_attention_divides_by_its_sum() -> None:
    mixer: Any = mixer_of("linear")
    bags = bags_of()
    found = run(mixer, bags)
    for a, b in pairwise(bags.cu_seqlens.tolist()):
        q, k, v = (heads_first(part) for part in mixer.qkv(bags.features[a:b]).chunk(3, 1))
        weights = (functional.elu(q) + 1) @ (functional.elu(k) + 1).mT
        out = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
        torch.testing.assert_close(found[a:b], mixer.proj(joined(out)))


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("reads", ["both", "forward"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "simplermsnorm"])
def test_lightning_attention(reads: str, decay: bool, norm: str) -> None:
    mixer = mixer_of("lightning", layer=1, layers=4, reads=reads, decay=decay, norm=norm)
    assert isinstance(mixer, Lightning)
    bags = bags_of()
    found = run(mixer, bags)
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64)
    rates = slopes * (1 - 1 / 3 + 1e-5) if decay else torch.zeros(HEADS, dtype=torch.float64)
    for a, b in pairwise(bags.cu_seqlens.tolist()):
        x = bags.features[a:b]
        q, k, v = (
            functional.silu(heads_first(layer(x)))
            for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        )
        apart = torch.arange(b - a)[:, None] - torch.arange(b - a)
        weights = (q @ k.mT) * torch.exp(-rates[:, None, None] * apart.abs())
        if reads == "forward":
            weights = weights.tril()
        out = joined(weights @ v)
        if norm == "layernorm":
            out = functional.layer_norm(out, (WIDTH,))
        else:
            out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        gate = torch.sigmoid(mixer.output_gate(x))
        # The slopes of a layer are kept in float32.
        torch.testing.assert_close(
            found[a:b], mixer.o_proj(out * gate), rtol=1e-5 if decay else 1e-9, atol=1e-7
        )


def test_slopes_of_any_number_of_heads() -> None:
    assert slopes_of(1) == [2.0**-8]
    assert slopes_of(8) == [2.0 ** -(h + 1) for h in range(8)]
    # Those of 4 heads, then the first two of every second one of 8.
    assert slopes_of(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


def test_around_is_a_convolution_where_tiles_are() -> None:
    x, kernels = normal(30, 3, dtype=torch.float64), normal(3, 9, seed=1, dtype=torch.float64)
    at = torch.arange(30)
    grid = torch.stack([at % 5 + 7, at // 5 + 2], 1)
    picture = x.T.reshape(1, 3, 6, 5)
    wanted = functional.conv2d(picture, kernels.reshape(3, 1, 3, 3), padding=1, groups=3)
    one = torch.zeros(30, dtype=torch.long)
    torch.testing.assert_close(around(x, grid, one, kernels), wanted.flatten(2)[0].T)
    # A hole is a tile of zeros, and the order of the tiles does not matter.
    kept = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:19]
    holed = torch.zeros_like(x).index_copy(0, kept, x[kept])
    whole = around(holed, grid, one, kernels)[kept]
    torch.testing.assert_close(around(x[kept], grid[kept], one[kept], kernels), whole)


def test_a_tile_of_another_bag_is_not_around() -> None:
    x, grid = normal(2, 3), torch.tensor([[4, 4], [5, 4]])
    kernels = torch.ones(3, 9)
    assert torch.equal(around(x, grid, torch.tensor([0, 1]), kernels), x)
    assert torch.equal(around(x, grid, torch.tensor([0, 0]), kernels), x.sum(0).expand(2, 3))


@pytest.mark.parametrize(("side", "few"), [(6, 3), (7, 3), (5, 2), (2, 3), (4, 4)])
def test_agents_of_a_window_are_pooled_adaptively(side: int, few: int) -> None:
    cells = normal(side * side)
    pool = pooling(side, few)
    wanted = functional.adaptive_avg_pool2d(cells.reshape(1, side, side), few).flatten()
    torch.testing.assert_close(pool @ cells / pool.sum(1), wanted)


def test_the_window_is_the_square_around_a_bag() -> None:
    bags = Bags.of(
        [normal(3, WIDTH), normal(2, WIDTH)],
        grid=[torch.tensor([[10, 3], [13, 4], [11, 5]]), torch.tensor([[0, 0], [1, 0]])],
    )
    mixer = mixer_of("agent", agents=4, window=2)
    rows = mixer.prepared(Rows.of(bags, 1))
    assert window_cells(rows, 2).tolist() == [4, 0, 1, 2, 4, 0, 1]


def test_agents_without_tiles_tell_nothing() -> None:
    """Two tiles at opposite corners: only the agents there are asked."""
    mixer = mixer_of("agent", agents=4, window=2)
    assert isinstance(mixer, Agent)
    x = normal(2, WIDTH, dtype=torch.float64)
    bags = Bags.of([x], grid=[torch.tensor([[0, 0], [9, 9]])])
    q, k, v = (heads_first(part) for part in mixer.qkv(x).chunk(3, 1))
    asking, answering = mixer._biases()
    scale, cells = q.shape[-1] ** -0.5, [0, 3]
    told = torch.softmax(scale * q @ k.mT + asking[:, cells][..., cells], -1) @ v
    back = torch.softmax(scale * q @ q.mT + answering[:, cells][..., cells].mT, -1) @ told
    near = v.transpose(0, 1).flatten(1) * mixer.dwc.weight[:, 0, 1, 1] + mixer.dwc.bias
    torch.testing.assert_close(run(mixer, bags), mixer.proj(joined(back) + near))


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("neighbours", {}, "mixer neighbours goes by the tiles' lattice, and those of slide"),
        ("inline", {"local": True}, "local of mixer inline goes by the tiles' lattice"),
        ("agent", {"window": 3, "agents": 4}, "window of mixer agent goes by the tiles' lattice"),
        ("alibi", {}, "the tiles of slide have no coordinates"),
    ],
)
def test_tiles_without_places(name: MixerName, options: dict[str, Any], what: str) -> None:
    bags = Bags.of([normal(5, WIDTH)], bag_ids=["slide"])
    with pytest.raises(ConfigError, match=what):
        mixer_of(name, **options).prepared(Rows.of(bags))


def test_slides_without_a_pixel_size() -> None:
    bags = bags_of()
    assert bags.mpp_l0 is not None
    bags.mpp_l0[-1] = torch.nan
    with pytest.raises(ConfigError, match="have no micrometres per pixel"):
        mixer_of("alibi").prepared(Rows.of(bags))


def test_impossible_heads_and_agents_are_refused() -> None:
    with pytest.raises(ConfigError, match="hidden is 16, which 5 heads do not divide"):
        mixer_of("softmax", heads=5)
    with pytest.raises(ConfigError, match="agents is 5, and a window has a square number"):
        mixer_of("agent", agents=5, window=3)


def test_tiles_of_two_slides_of_a_bag_are_no_neighbours() -> None:
    mixer, bags = mixer_of("neighbours", radius=3), bags_of((24,), slides=2)
    changed = replace(bags, features=bags.features.clone())
    changed.features[12:] += 1.0
    one, other = run(mixer, bags), run(mixer, changed)
    assert torch.equal(one[:12], other[:12])
    assert not torch.allclose(one[12:], other[12:])
