"""TransMIL: its neighbours, its scores, its last layer made for class tokens alone."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.kernels.dispatch import keeping
from bagscope.kernels.nystrom_attention.reference import attention_matrix
from bagscope.mil.aggregators.ppeg import PPEG
from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.aggregators.transmil import LEAST_SHARE, TransMIL
from bagscope.mil.bags import Bags
from tests.kernels.packed import assert_close_to_float64, borders, normal

SMALL: dict[str, Any] = {"hidden": 16, "heads": 2, "landmarks": 6, "ppeg_sizes": (5, 3), "taps": 5}


def model_of(**options: Any) -> TransMIL:
    torch.manual_seed(0)
    small = dict(SMALL)
    if options.get("attention") == "exact":
        del small["landmarks"]
    model = build_aggregator("transmil", 12, 2, {**small, **options}).eval()
    assert isinstance(model, TransMIL)
    return model


def plain(model: TransMIL, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (1, C), and the first layer's weights (n,) of the class token, of one bag."""
    options = model.options
    h = functional.relu(model.projection(x))
    side = math.ceil(math.sqrt(len(h)))
    h = torch.cat([model.class_token, h, h[: side * side - len(h)]])
    seen: list[Tensor] = []

    def attention(layer: Any, h: Tensor) -> Tensor:
        parts = layer.qkv(layer.norm(h)).chunk(3, 1)
        q, k, v = (part.unflatten(1, (options.heads, -1)) for part in parts)
        q = q * q.shape[-1] ** -0.5
        landmarks = options.landmarks if options.attention == "nystrom" else len(h)
        pads, start = options.faithful_pads, options.faithful_start
        matrix = attention_matrix(q, k, landmarks, options.iterations, pads, start)
        matrix = matrix[:, -len(h) :, -len(h) :]
        seen.append(matrix[:, 0].mean(0))
        found = torch.einsum("hij,jhd->ihd", matrix, v)
        kernels = layer.taps.repeat_interleave(v.shape[-1], 0)[:, None]
        along = functional.conv1d(
            v.flatten(1).T[None], kernels, padding=options.taps // 2, groups=options.hidden
        )
        return layer.out(found.flatten(1) + along[0].T)

    h = h + attention(model.layers[0], h)
    square = h[1:].T.reshape(1, -1, side, side)
    square = square + sum(conv(square) for conv in model.ppeg.convs)
    h = torch.cat([h[:1], square.flatten(2)[0].T])
    h = h + attention(model.layers[1], h)
    return model.classifier(model.norm(h[:1])), seen[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"faithful_pads": True, "faithful_start": True}, {"attention": "exact"}, {"taps": 33}],
    ids=str,
)
@pytest.mark.parametrize("tiles", [1, 2, 5, 30])
def test_it_is_what_the_formulas_say(options: dict[str, Any], tiles: int) -> None:
    model = model_of(**options).double()
    x = normal(tiles, 12, dtype=torch.float64)
    found = model(Bags.of([x]))
    logits, weights = plain(model, x)
    assert_close_to_float64(found.logits, logits, rtol=1e-10)
    share = weights[1 : tiles + 1].clone()
    again = weights[tiles + 1 :]
    share[: len(again)] += again
    wanted = (share * tiles).clamp(min=LEAST_SHARE)
    assert_close_to_float64(found.scores[:, 0].exp(), wanted, rtol=1e-10)


def test_a_negative_weight_is_shown_as_the_least() -> None:
    model = model_of(heads=1).double()
    with torch.no_grad():
        model.layers[0].qkv.weight.mul_(6)
    x = normal(60, 12, dtype=torch.float64)
    _, weights = plain(model, x)
    assert bool((weights[5:61] < 0).any())
    scores = model(Bags.of([x])).scores[:, 0]
    assert torch.equal(scores[4:] == math.log(LEAST_SHARE), weights[5:61] * 60 <= LEAST_SHARE)


def test_queries_and_keys_made_again_give_the_same() -> None:
    model, bags = model_of(dropout=0.0), Bags.of([normal(30, 12), normal(7, 12, seed=1)])
    found = []
    for most_bytes in (0, 1 << 30):
        with keeping(most_bytes):
            logits = model(bags).logits
            grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        found.append([logits, *grads])
    for again, kept in zip(*found, strict=True):
        torch.testing.assert_close(again, kept)


def test_the_second_layer_s_score_is_its_own() -> None:
    bags = Bags.of([normal(30, 12)])
    first, second = (model_of(score_layer=layer)(bags) for layer in (1, 2))
    assert torch.equal(first.logits, second.logits)
    assert not torch.allclose(first.scores, second.scores, atol=1e-2)


def test_on_the_lattice_the_order_of_tiles_tells_no_neighbours() -> None:
    x, place = normal(40, 16), torch.randperm(90)[:40]
    grid = torch.stack([place % 10 + 7, place // 10 - 3], 1).int()
    torch.manual_seed(0)
    ppeg = PPEG(16, (7, 5, 3))
    bags = Bags.of([x], grid=[grid])
    canvas = torch.zeros(1, 16, 9, 10)
    canvas[0, :, place // 10, place % 10] = x.T
    dense = canvas + sum(conv(canvas) for conv in ppeg.convs)
    wanted = dense[0, :, place // 10, place % 10].T
    # A bias is added where a tile is, and places without one are zero to their neighbours.
    assert_close_to_float64(ppeg.on_lattice(x, bags), wanted, rtol=1e-5)
    order = torch.randperm(40)
    moved = ppeg.on_lattice(x[order], Bags.of([x[order]], grid=[grid[order]]))
    assert_close_to_float64(moved, wanted[order], rtol=1e-5)


def test_tiles_of_other_slides_and_bags_are_no_neighbours() -> None:
    x = normal(24, 16)
    grid = torch.stack([torch.arange(24) % 6, torch.arange(24) // 6], 1).int().repeat(1, 1)
    torch.manual_seed(0)
    ppeg = PPEG(16, (7, 3))
    bags = Bags.of([x[:12], x[12:]], grid=[grid[:12], grid[:12]])
    slides = replace(
        Bags.of([x], grid=[torch.cat([grid[:12], grid[:12]])]),
        tile_slide=torch.arange(2, dtype=torch.int32).repeat_interleave(12),
    )
    alone = [ppeg.on_lattice(part, Bags.of([part], grid=[grid[:12]])) for part in x.split(12)]
    assert torch.equal(ppeg.on_lattice(x, bags), torch.cat(alone))
    assert torch.equal(ppeg.on_lattice(x, slides), torch.cat(alone))


def test_gradients_of_the_square_are_torch_s() -> None:
    torch.manual_seed(0)
    ppeg = PPEG(6, (7, 5, 3)).double()
    lengths = (1 + 49, 1 + 1, 1 + 60 * 60, 1)
    x = normal(sum(lengths), 6, dtype=torch.float64).requires_grad_()
    grad = normal(sum(lengths), 6, seed=1, dtype=torch.float64)
    rows = []
    for a, b in pairwise(borders(lengths).tolist()):
        side = math.isqrt(b - a - 1)
        square = x[a + 1 : b].T.reshape(1, 6, side, side)
        if side:
            square = square + sum(conv(square) for conv in ppeg.convs)
        rows += [x[a : a + 1], square.flatten(2)[0].T]
    leaves = [x, *ppeg.parameters()]
    truth = torch.autograd.grad(torch.cat(rows), leaves, grad)
    found = ppeg.in_squares(x, borders(lengths))
    assert_close_to_float64(found, torch.cat(rows), rtol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(found, leaves, grad), truth, strict=True):
        assert_close_to_float64(mine, theirs, rtol=1e-11)


def test_dropout_in_training_is_drawn_by_seed_and_step() -> None:
    model = model_of(dropout=0.5).train()
    bags = Bags.of([normal(30, 12)], seed=3, step=2)
    first = model(bags).logits
    assert torch.equal(first, model(bags).logits)
    assert not torch.equal(first, model(replace(bags, step=3)).logits)
    assert torch.equal(model.eval()(bags).logits, model_of(dropout=0.0)(bags).logits)


def test_tiles_without_places_have_no_neighbours_on_the_lattice() -> None:
    with pytest.raises(ConfigError, match="tiles of slide have no places; give features with"):
        model_of(ppeg="lattice")(Bags.of([normal(5, 12)], bag_ids=["slide"]))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"heads": 3}, "hidden is 16, which 3 heads do not divide"),
        ({"taps": 4}, "must be odd"),
        ({"ppeg_sizes": (7, 4)}, "must be odd"),
        ({"attention": "exact", "faithful_pads": True}, "faithful_pads is of attention nystrom"),
        ({"attention": "exact", "landmarks": 7}, "landmarks is of attention nystrom"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        model_of(**options)
