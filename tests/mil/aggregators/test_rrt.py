"""RRT-MIL: the published code written down plainly, regions and what is in them, refusals."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.region_layers import lattice_regions, stored_regions
from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import Bags
from tests.kernels.packed import assert_close_to_float64, borders, normal

SMALL: dict[str, Any] = {"hidden": 16, "heads": 4, "cross_heads": 2, "attention": 6, "epeg": 5}


def model_of(**options: Any) -> Aggregator:
    torch.manual_seed(0)
    model = build_aggregator("rrt", 12, 2, {**SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().double()


def published(model: Aggregator, x: Tensor, side: int, *, masks: bool, shortcut: bool) -> Tensor:
    """Return the logits of one bag by dense matrices over a square filled up with zeros.

    `masks` takes the zeros out of every softmax, convolution and extreme.
    """
    state = model.state_dict()

    def layer(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (16,), state[f"{name}.weight"], state[f"{name}.bias"])

    def heads_of(name: str, x: Tensor, heads: int) -> list[Tensor]:
        parts = layer(f"{name}.qkv", x).unflatten(-1, (3, heads, -1)).movedim(-3, 0)
        return [part.movedim(-2, -3) for part in parts]

    count, wide = len(x), math.ceil(math.ceil(math.sqrt(len(x))) / side) * side

    def cut(x: Tensor) -> Tensor:
        square = functional.pad(x, (0, 0, 0, wide * wide - len(x)))
        square = square.view(side, wide // side, side, wide // side, -1)
        return square.transpose(1, 2).reshape(side * side, -1, x.shape[1])

    def put_back(regions: Tensor) -> Tensor:
        square = regions.view(side, side, wide // side, wide // side, -1)
        return square.transpose(1, 2).reshape(wide * wide, -1)[:count]

    is_tile = (
        cut(torch.ones(count, 1))[..., 0] > 0 if masks else cut(torch.ones(count, 1))[..., 0] >= 0
    )
    h = embedded = layer("projection", x).relu()
    q, k, v = heads_of("mixers.0", cut(norm("norms.0", h)), 4)
    scores = (q * 2**-1) @ k.mT
    scores = scores * is_tile[:, None, :, None]
    taps = state["mixers.0.epeg"]
    scores = scores + functional.conv2d(
        scores, taps[:, None, :, None], padding=(taps.shape[1] // 2, 0), groups=4
    )
    weights = scores.masked_fill(~is_tile[:, None, None], -torch.inf).softmax(-1).nan_to_num(0)
    h = h + put_back(layer("mixers.0.proj", (weights @ v).transpose(1, 2).flatten(2)))

    regions = cut(norm("cross_norm", h))
    logits = (regions @ state["cross.phi"]).transpose(1, 2)
    shown = logits.masked_fill(~is_tile[:, None], -torch.inf)
    combine = shown.softmax(-1).nan_to_num(0)
    rows = (combine @ regions).transpose(0, 1)
    q, k, v = heads_of("cross", rows, 2)
    between = q * 8**-0.5 @ k.mT
    between = between.masked_fill(~is_tile.any(1), -torch.inf).softmax(-1)
    told = layer("cross.proj", (between @ v).transpose(1, 2).flatten(2)).transpose(0, 1)
    low = logits.masked_fill(~is_tile[:, None], torch.inf).amin(-1, keepdim=True)
    high = shown.amax(-1, keepdim=True)
    spread = (logits - low) / (high - low + 1e-8) * logits.softmax(1)
    h = h + put_back(torch.einsum("wnc,wnp->wpc", told, spread).nan_to_num(0))
    h = norm("norm", h + embedded if shortcut else h)
    attention = layer("w", layer("v", h).relu()).softmax(0)
    return layer("classifier", (attention * h).sum(0))


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"regions": 2}, {"regions": 3, "shortcut": True, "representatives": 2}],
    ids=json.dumps,
)
def test_it_is_the_formulas(options: dict[str, Any], masks: bool) -> None:
    model = model_of(**options, faithful_pads=not masks)
    bags = [normal(count, 12, seed=count, dtype=torch.float64) for count in (71, 1, 36, 5, 130)]
    found = model(Bags.of(bags)).logits
    for bag, x in enumerate(bags):
        wanted = published(
            model, x, options["regions"], masks=masks, shortcut=options.get("shortcut", False)
        )
        assert_close_to_float64(found[bag], wanted, rtol=1e-9, what=f"{len(x)} tiles")


def test_pads_change_what_is_said_and_a_full_square_has_none() -> None:
    masked, published = model_of(regions=2), model_of(regions=2, faithful_pads=True)
    partly, full = Bags.of([normal(71, 12).double()]), Bags.of([normal(64, 12).double()])
    assert not torch.allclose(masked(partly).logits, published(partly).logits, rtol=1e-3)
    torch.testing.assert_close(masked(full).logits, published(full).logits)


def test_regions_of_a_square_are_its_blocks() -> None:
    # Seven tiles fill a square of four a side, of which only two rows are there.
    way = stored_regions(borders([7]), 7, 2, is_filled=False)
    assert way.rows.tolist() == [0, 1, 4, 5, 2, 3, 6]
    assert way.borders.tolist() == [0, 4, 7, 7, 7]
    filled = stored_regions(borders([7]), 7, 2, is_filled=True)
    assert filled.rows.tolist() == [0, 1, 4, 5, 2, 3, 6, 7] + 8 * [7]
    assert filled.borders.tolist() == [0, 4, 8, 12, 16]
    assert torch.equal(filled.rows[filled.places], torch.arange(7))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 4096, 4097])
def test_the_square_is_no_larger_than_it_must_be(count: int) -> None:
    way = stored_regions(borders([count]), count, 8, is_filled=True)
    side = math.isqrt(len(way.rows))
    assert side**2 == len(way.rows) >= count
    assert side % 8 == 0 and (side == 8 or (side - 8) ** 2 < count)


def test_regions_of_the_lattice_are_rectangles_of_each_bag() -> None:
    tall = torch.tensor([(5, 9), (5, 2), (6, 2), (6, 9), (5, 5)])
    wide = torch.tensor([(0, 0), (7, 0), (3, 0)])
    way = lattice_regions(torch.cat([tall, wide]).int(), borders([5, 3]), 2)
    assert way.rows.tolist() == [1, 4, 2, 0, 3, 5, 7, 6]
    assert way.borders.tolist() == [0, 2, 3, 4, 5, 7, 8, 8, 8]


def test_on_the_lattice_it_does_not_matter_how_tiles_are_stored() -> None:
    model = model_of(regions=3, places="lattice")
    places = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:40]
    grid = torch.stack([places % 10, places // 10], 1).int()
    features, order = normal(40, 12).double(), torch.arange(39, -1, -1)
    one = model(Bags.of([features], grid=[grid]))
    other = model(Bags.of([features[order]], grid=[grid[order]]))
    torch.testing.assert_close(one.logits, other.logits)
    torch.testing.assert_close(one.scores[order], other.scores)
    with pytest.raises(ConfigError, match=r"tiles of 0 have no places on one; give features"):
        model(Bags.of([features]))


def test_nothing_kept_for_the_backward_pass_grows_with_the_square_of_a_region() -> None:
    tiles, sizes = 900, []
    model = model_of(regions=1)

    def size_of(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(size_of, lambda tensor: tensor):
        found = model(Bags.of([normal(tiles, 12).double()]))
    found.logits.sum().backward()
    assert max(sizes) <= tiles * 3 * SMALL["hidden"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epeg": 4}, r"epeg is 4, and has no middle; choose an odd number, or 0"),
        ({"faithful_pads": True, "places": "lattice"}, r"no meaning with places lattice"),
        ({"cross_heads": 3}, r"hidden is 16, no multiple of the 3 cross_heads"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of(**options)
