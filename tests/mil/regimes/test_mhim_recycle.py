"""The recycle network: which tiles stay, what the others become, how its queries move."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from bagscope.mil.aggregators.layers import draw_seed, dropped
from bagscope.mil.bags import Bags
from bagscope.mil.regimes.recycle import Recycle, RecycleSpec
from tests.kernels.packed import assert_close_to_float64, normal

WIDTH, LENGTHS = 12, (20, 1, 3, 11)
SPEC = RecycleSpec(queries=3, keep=0.7, heads=2, head=5, momentum=0.9, dropout=0.0)


def made(spec: RecycleSpec = SPEC) -> Recycle:
    torch.manual_seed(0)
    return Recycle(WIDTH, spec).train()


def bags(step: int = 0) -> Bags:
    found = Bags.of([normal(n, WIDTH, seed=n) for n in LENGTHS], seed=3, step=step)
    places = torch.zeros(len(found.features), 2, dtype=torch.int32)
    return replace(found, grid=places, coords_l0=places, parent=places[:, 0], tile_row=places[:, 0])


def numbers(tiles: int = sum(LENGTHS)) -> Tensor:
    return torch.rand(tiles, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def attended(model: Recycle, rest: Tensor, kept: Tensor | float = 1.0) -> Tensor:
    """Return the recycled tokens (k, w) of the tiles (n, w) of one bag, by plain attention.

    `kept` (H, k, n) is what each weight is multiplied with after the softmax.
    """
    spec = model.spec

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), spec.heads, spec.head).transpose(0, 1)

    x, g = model.norm(rest), model.norm(model.query)
    key, value = model.key_value(x).chunk(2, 1)
    weights = (heads(model.ask(g)) @ heads(key).mT / spec.head**0.5).softmax(2) * kept
    tokens: Tensor = model.out((weights @ heads(value)).transpose(0, 1).flatten(1))
    return tokens


def test_tiles_stay_in_their_order_and_tokens_follow() -> None:
    model, given = made(), bags()
    precise = copy.deepcopy(model).double()
    found = model(given, numbers())
    for field in ("grid", "coords_l0", "parent", "tile_row", "tile_slide"):
        assert getattr(found, field) is None
    for bag, (start, stop) in enumerate(pairwise(given.cu_seqlens.tolist())):
        own = given.features[start:stop]
        stays = int(0.7 * len(own))
        order = numbers()[start:stop].argsort()
        kept, rest = order[:stays].sort().values, order[stays:].sort().values
        tokens = found.one(bag).features
        assert torch.equal(tokens[:stays], own[kept])
        assert_close_to_float64(tokens[stays:], attended(precise, own[rest].double()))
    assert found.cu_seqlens.dtype == torch.int32


def test_queries_follow_the_mean_over_the_step_however_it_is_cut() -> None:
    whole, cut = made(), made()
    before = whole.query.clone()
    tokens = whole(bags(), numbers())
    assert torch.equal(whole.query, before)
    recycled = torch.stack([tokens.one(bag).features[-3:] for bag in range(len(LENGTHS))])
    whole.after_step()
    assert_close_to_float64(whole.query, 0.9 * before + 0.1 * recycled.mean(0).detach())
    for bag, (start, stop) in enumerate(pairwise(bags().cu_seqlens.tolist())):
        cut(bags().one(bag), numbers()[start:stop])
    cut.after_step()
    assert_close_to_float64(cut.query, whole.query.double())
    after = whole.query.clone()
    whole.after_step()
    assert torch.equal(whole.query, after)
    whole.eval()(bags(), numbers())
    whole.after_step()
    assert torch.equal(whole.query, after)


def test_queries_are_kept_but_not_learnt() -> None:
    model = made()
    assert "query" in model.state_dict()
    assert "query" not in dict(model.named_parameters())
    assert model.query.abs().max() <= (6 / (768 + WIDTH)) ** 0.5


def test_dropped_weights_are_left_out_after_the_softmax() -> None:
    spec = SPEC.model_copy(update={"dropout": 0.4})
    model, given = made(spec), bags(step=5)
    found = tokens_of(model, given)
    precise = copy.deepcopy(model).double()
    at = 0
    rows = sum(length - int(0.7 * length) for length in LENGTHS)
    ones = torch.ones(rows, spec.queries * spec.heads)
    kept = dropped(ones, 0.4, draw_seed(given, use=5)).double()
    kept = kept.view(rows, spec.queries, spec.heads).permute(2, 1, 0)
    ones = torch.ones(len(LENGTHS) * spec.queries, WIDTH)
    kept_out = dropped(ones, 0.4, draw_seed(given, use=6)).double().view_as(found)
    for bag, (start, stop) in enumerate(pairwise(given.cu_seqlens.tolist())):
        order = numbers()[start:stop].argsort()
        rest = given.features[start:stop][order[int(0.7 * len(order)) :].sort().values].double()
        own = kept[:, :, at : at + len(rest)]
        at += len(rest)
        wanted = attended(precise, rest, own) * kept_out[bag]
        assert_close_to_float64(found[bag], wanted, rtol=1e-4)
    assert at == rows
    assert torch.equal(tokens_of(model, given), found)
    assert not torch.equal(tokens_of(model, replace(given, step=6)), found)


def tokens_of(model: Recycle, given: Bags) -> Tensor:
    found = model(given, numbers())
    return torch.stack([found.one(bag).features[-3:] for bag in range(len(LENGTHS))])


def test_with_all_weights_dropped_nothing_is_pooled_and_gradients_are_numbers() -> None:
    spec = SPEC.model_copy(update={"dropout": 0.9})
    model, given = made(spec), bags()
    nn.init.zeros_(model.out.bias)
    features = given.features.clone().requires_grad_()
    # One tile is taken away of the bag of one tile: at 0.9, most of its heads see nothing.
    tokens = tokens_of(model, replace(given, features=features))
    tokens.sum().backward()
    assert features.grad is not None and bool(features.grad.isfinite().all())
    for weight in model.parameters():
        assert weight.grad is None or bool(weight.grad.isfinite().all())
    assert bool(tokens.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_tiles_stay_narrow(dtype: torch.dtype) -> None:
    model = made(SPEC.model_copy(update={"dropout": 0.1}))
    found = model(bags().to("cpu", dtype), numbers())
    assert found.features.dtype == dtype
    wide = made(SPEC.model_copy(update={"dropout": 0.1}))(bags(), numbers()).features
    assert_close_to_float64(found.features, wide, rtol=0.05)
