"""Attention inside bags, between all tiles and between neighbours, against every score at once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bagscope.kernels.varlen_self_attention import (
    find_neighbours,
    jagged_attention,
    varlen_self_attention,
    varlen_self_attention_reference,
)
from bagscope.kernels.varlen_self_attention.hilbert import hilbert_index
from tests.kernels.packed import (
    RAGGED,
    assert_at_most_twice,
    assert_close_to_float64,
    borders,
    doubled,
    gradients,
    normal,
    run_interpreted,
    shuffle_within,
    strided,
)


def case(
    lengths: tuple[int, ...] = RAGGED,
    heads: int = 2,
    d: int = 8,
    dv: int = 8,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    tiles = sum(lengths)
    return {
        "q": normal(tiles, heads, d, dtype=dtype, scale=2),
        "k": normal(tiles, heads, d, seed=1, dtype=dtype),
        "v": normal(tiles, heads, dv, seed=2, dtype=dtype),
        "cu_seqlens": borders(lengths),
    }


def ragged_tissue(tiles: int, seed: int = 5) -> Tensor:
    """Return distinct places with holes, in no order, some of them left of zero."""
    side = int((2 * tiles) ** 0.5) + 2
    chosen = torch.randperm(side * side, generator=torch.Generator().manual_seed(seed))[:tiles]
    return torch.stack([chosen % side - 3, chosen // side], 1)


def reference(neighbours: Any = None, **inputs: Any) -> Tensor:
    return varlen_self_attention_reference(
        **inputs, scale=inputs["q"].shape[-1] ** -0.5, neighbours=neighbours
    )


def check(inputs: dict[str, Tensor | None], neighbours: Any = None, rtol: float = 1e-5) -> None:
    found, grads = gradients(varlen_self_attention, inputs, neighbours=neighbours)
    truth, true_grads = gradients(reference, doubled(inputs), neighbours=neighbours)
    assert_close_to_float64(found[0], truth[0], rtol=rtol)
    for name in ("q", "k", "v"):
        # A tile that sees only itself has gradients of zero up to rounding.
        assert_close_to_float64(grads[name], true_grads[name], rtol=rtol, atol=1e-5, what=name)


def test_hilbert_curve_visits_every_place_by_single_steps() -> None:
    for bits in (1, 2, 5):
        side = 1 << bits
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        index = hilbert_index(places[:, 0], places[:, 1], bits)
        assert torch.equal(index.sort().values, torch.arange(side * side))
        walk = places[index.argsort()]
        assert torch.equal(walk.diff(dim=0).abs().sum(1), torch.ones(side * side - 1).long())
        # It fills a quarter before it enters the next, at every scale.
        for size in (4**level for level in range(1, bits)):
            for part in walk.split(size):
                extent = part.amax(0) - part.amin(0) + 1
                assert extent.prod() == size


@pytest.mark.parametrize("r", [0, 1, 3])
def test_blocks_hold_every_near_pair_and_none_of_another_bag(r: int) -> None:
    lengths = (0, 1, 130, 0, 300)
    cu, grid = borders(lengths), ragged_tissue(sum(lengths))
    found = find_neighbours(grid, cu, r)
    assert torch.equal(found.order.sort().values, torch.arange(sum(lengths)))
    assert torch.equal(found.places.long(), grid[found.order])
    bag = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    pairs = set()
    for block, (low, high) in enumerate(pairwise(found.first.tolist())):
        for near in found.near[low:high].tolist():
            rows, others = (found.order[found.start[n] : found.stop[n]] for n in (block, near))
            assert bag[rows].unique().equal(bag[others].unique())
            pairs |= set(map(tuple, torch.cartesian_prod(rows, others).tolist()))
    steps = (grid[:, None] - grid[None]).abs().amax(-1)
    near_pairs = ((steps <= r) & (bag[:, None] == bag[None])).nonzero().tolist()
    assert set(map(tuple, near_pairs)) <= pairs
    assert len(pairs) < sum(n * n for n in lengths)


@pytest.mark.parametrize(("heads", "d", "dv"), [(1, 16, 16), (2, 8, 5), (1, 4, 32)])
def test_between_all(heads: int, d: int, dv: int) -> None:
    check(case(heads=heads, d=d, dv=dv))


@pytest.mark.parametrize("r", [0, 1, 4, 100])
def test_between_neighbours(r: int) -> None:
    inputs = case(dv=5)
    check(inputs, (ragged_tissue(sum(RAGGED)), r))


def test_a_long_bag_beside_short_ones() -> None:
    lengths = (3, 1, 4097, 5)
    inputs = case(lengths, heads=1)
    check(inputs)
    check(inputs, (ragged_tissue(sum(lengths)), 2))


def test_more_keys_than_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagscope.kernels.varlen_self_attention.cpu._KEYS_AT_ONCE", 130)
    check(case((700, 30)), (ragged_tissue(730), 9))


@pytest.mark.parametrize("lengths", [(0,), (1,), (0, 0)])
def test_tiny(lengths: tuple[int, ...]) -> None:
    check(case(lengths))
    check(case(lengths), (ragged_tissue(sum(lengths)), 1))


@pytest.mark.parametrize("r", [None, 1])
def test_gradcheck(r: int | None) -> None:
    inputs: dict[str, Any] = case((2, 1, 5), d=3, dv=2, dtype=torch.float64)
    cu = inputs.pop("cu_seqlens")
    near = None if r is None else (ragged_tissue(8), r)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_self_attention(q, k, v, cu, neighbours=near)

    assert torch.autograd.gradcheck(attend, tuple(x.requires_grad_() for x in inputs.values()))


def test_fewer_heads_of_keys() -> None:
    inputs: dict[str, Any] = case(heads=4)
    few = {**inputs, "k": inputs["k"][:, :2], "v": inputs["v"][:, :2]}
    many = {**few, **{n: few[n].repeat_interleave(2, 1) for n in "kv"}}
    torch.testing.assert_close(varlen_self_attention(**few), varlen_self_attention(**many))


@pytest.mark.parametrize("r", [None, 2])
def test_packed_is_one_by_one_and_order_does_not_matter(r: int | None) -> None:
    inputs: dict[str, Any] = case(dtype=torch.float64)
    grid, cu = ragged_tissue(sum(RAGGED)), inputs["cu_seqlens"]
    names = ("q", "k", "v")

    def attend(rows: Any, cu: Tensor) -> Tensor:
        near = None if r is None else (grid[rows], r)
        return varlen_self_attention(*(inputs[n][rows] for n in names), cu, neighbours=near)

    whole = attend(slice(None), cu)
    for a, b in pairwise(cu.tolist()):
        torch.testing.assert_close(attend(slice(a, b), borders([b - a])), whole[a:b])
    order = shuffle_within(cu)
    torch.testing.assert_close(attend(order, cu), whole[order])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("r", [None, 2])
def test_strides_and_unwritten_memory_do_not_matter_and_bits_repeat(r: int | None) -> None:
    inputs = case()
    cu = inputs.pop("cu_seqlens")
    near = None if r is None else (ragged_tissue(sum(RAGGED)), r)
    spread = {name: strided(value) for name, value in inputs.items() if value is not None}
    runs = [
        gradients(varlen_self_attention, {**x, "cu_seqlens": cu}, neighbours=near)
        for x in (inputs, inputs, spread)
    ]
    assert bool(runs[0][0][0].isfinite().all())
    for found, grads in runs[1:]:
        assert torch.equal(found[0], runs[0][0][0])
        for name, grad in grads.items():
            assert torch.equal(grad, runs[0][1][name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r", [None, 2])
def test_low_precision(dtype: torch.dtype, r: int | None) -> None:
    inputs = case((100, 1, 63), dtype=dtype, d=16, dv=16)
    near = None if r is None else (ragged_tissue(164), r)
    found, grads = gradients(varlen_self_attention, inputs, neighbours=near)
    rough, rough_grads = gradients(reference, inputs, neighbours=near)
    truth, true_grads = gradients(reference, doubled(inputs), neighbours=near)
    assert found[0].dtype == dtype
    assert_at_most_twice(found[0], rough[0], truth[0])
    for name in ("q", "k", "v"):
        assert_at_most_twice(grads[name], rough_grads[name], true_grads[name], what=name)


@pytest.mark.parametrize("r", [None, 2])
def test_compiles_whole(r: int | None) -> None:
    inputs = case()
    grid = ragged_tissue(sum(RAGGED))

    def attend(grid: Tensor, **inputs: Any) -> Tensor:
        near = None if r is None else (grid, r)
        return varlen_self_attention(**inputs, neighbours=near)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found, grads = gradients(compiled, {**inputs, "grid": grid})
    expected, expected_grads = gradients(attend, {**inputs, "grid": grid})
    assert torch.equal(found[0], expected[0])
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_attention_is_the_same() -> None:
    # What GPUs run for float32; there is no bag without tiles in torch's jagged fallback here.
    inputs: dict[str, Any] = case((3, 50, 7))
    found = jagged_attention(**inputs, scale=0.3, longest=60)
    expected = varlen_self_attention(**inputs, scale=0.3)
    torch.testing.assert_close(found, expected)


def test_refusals() -> None:
    inputs: dict[str, Any] = case()
    with pytest.raises(ValueError, match=r"pass \(T, H, d\)"):
        varlen_self_attention(**{**inputs, "k": inputs["k"][:-1]})
    with pytest.raises(ValueError, match="cu_seqlens"):
        varlen_self_attention(**{**inputs, "cu_seqlens": inputs["cu_seqlens"] + 1})
    with pytest.raises(ValueError, match="one row per tile"):
        varlen_self_attention(**inputs, neighbours=(torch.zeros(3, 2).long(), 1))
    with pytest.raises(ValueError, match="integers"):
        find_neighbours(torch.zeros(3, 2), borders([3]), 1)
    with pytest.raises(ValueError, match="at least themselves"):
        find_neighbours(torch.zeros(3, 2).long(), borders([3]), -1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r", [None, 3])
def test_on_a_gpu(dtype: torch.dtype, r: int | None) -> None:
    inputs = case((3, 1, 4097, 0, 100), d=64, dv=64, dtype=dtype)
    device = {name: value.cuda() for name, value in inputs.items() if value is not None}
    grid = ragged_tissue(4201)
    near = [None if r is None else (g, r) for g in (grid.cuda(), grid)]
    found, grads = gradients(varlen_self_attention, dict(device), neighbours=near[0])
    truth, true_grads = gradients(reference, doubled(inputs), neighbours=near[1])
    rtol = 1e-4 if dtype is torch.float32 else 3e-2
    assert_close_to_float64(found[0], truth[0], rtol=rtol)
    for name in ("q", "k", "v"):
        assert_close_to_float64(grads[name], true_grads[name], rtol=rtol, what=name)


def test_interpreted_kernels() -> None:
    run_interpreted("test_varlen_self_attention.py")
