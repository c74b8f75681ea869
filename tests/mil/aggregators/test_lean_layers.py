"""Layers that keep less: the same numbers and gradients as torch's own, and less is kept."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from bagscope.kernels.gated_scores.dropout import tile_dropout
from bagscope.mil.aggregators.lean_layers import (
    add_dropped,
    laid_out,
    normed_products,
    normed_rows,
)
from tests.kernels.packed import normal

ROWS, WIDTH = 4_100, 6
"""Two chunks and a piece of one."""


def norm_of() -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(normal(WIDTH, seed=3).double())
        norm.bias.copy_(normal(WIDTH, seed=4).double())
    return norm


def leaf(*shape: int, seed: int) -> Tensor:
    return normal(*shape, seed=seed).double().requires_grad_()


def assert_same(found: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    """Compare values, and gradients of a loss that weighs every number differently."""
    torch.testing.assert_close(found, wanted)
    weights = normal(*found.shape, seed=9).double()
    grads = (torch.autograd.grad((x * weights).sum(), leaves) for x in (found, wanted))
    for mine, plain in zip(*grads, strict=True):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("unkept", [0, 2])
def test_products_of_a_norm_have_the_same_gradients_kept_or_made_again(unkept: int) -> None:
    norm, x = norm_of(), leaf(ROWS, WIDTH, seed=0)
    weights = tuple(leaf(5, WIDTH, seed=seed) for seed in (1, 2))
    (a, b), context = normed_products(x, norm, weights, torch.float64, unkept)
    with context:
        found = a * b + b.tanh()
    plain = norm(x)
    a, b = (plain @ weight.T for weight in weights)
    assert_same(found, a * b + b.tanh(), [x, *weights, *norm.parameters()])


def test_rows_of_a_norm_are_made_again_for_gradients() -> None:
    norm, x, weight = norm_of(), leaf(ROWS, WIDTH, seed=0), leaf(5, WIDTH, seed=1)
    normed, context = normed_rows(x, norm, torch.float64)
    with context:
        found = normed @ weight.T + normed.view(ROWS, 2, -1).square().sum((1, 2))[:, None]
    plain = norm(x)
    wanted = plain @ weight.T + plain.square().sum(1, keepdim=True)
    assert_same(found, wanted, [x, weight, *norm.parameters()])


def test_what_is_made_again_is_freed() -> None:
    norm, x, weight = norm_of(), leaf(ROWS, WIDTH, seed=0), leaf(5, WIDTH, seed=1)
    (product,), context = normed_products(x, norm, (weight,), torch.float64, 1)
    with context:
        found = product.square()
    freed = weakref.ref(product.untyped_storage())
    del product
    assert freed() is None
    assert_same(found, (norm(x) @ weight.T).square(), [x, weight, *norm.parameters()])


@pytest.mark.parametrize("lengths", [[3], [4, 0, 1, 5]])
def test_rows_are_laid_between_tokens_and_what_is_repeated(lengths: list[int]) -> None:
    before, token = leaf(sum(lengths), WIDTH, seed=0), leaf(1, WIDTH, seed=1)
    repeats = [length // 2 for length in lengths]
    found = laid_out(before, token, lengths, repeats, torch.float64)
    parts: list[Tensor] = []
    for tiles, more in zip(before.relu().split(lengths), repeats, strict=True):
        parts += [token, tiles, tiles[:more]]
    assert_same(found, torch.cat(parts), [before, token])


def test_dropout_of_what_is_added_has_the_gradients_of_its_mask() -> None:
    x, added = leaf(ROWS, WIDTH, seed=0), leaf(ROWS, WIDTH, seed=1)
    mask = tile_dropout(ROWS, WIDTH, 0.3, 7, added)
    assert 0.6 < float((mask > 0).double().mean()) < 0.8
    assert_same(add_dropped(x, added, 0.3, 7), x + mask * added, [x, added])
