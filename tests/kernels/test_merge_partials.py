"""Pieces of bags merged: as if the bag had been whole, in one process or in several."""

from __future__ import annotations

import socket
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bagscope.kernels.merge_partials import (
    merge_partials,
    merge_partials_across,
    merge_partials_reference,
)
from tests.kernels.packed import (
    assert_at_most_twice,
    assert_close_to_float64,
    gradients,
    normal,
    run_interpreted,
    strided,
)

NONE = float("-inf")


def partials(pieces: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    pooled = normal(pieces, 3, 2, 5, dtype=dtype)
    lse = normal(pieces, 3, 2, seed=1, scale=9).to(torch.promote_types(dtype, torch.float32))
    lse[0, 0] = NONE
    lse[:, 2, 1] = NONE
    return {"pooled": pooled, "lse": lse}


def whole_bag(scores: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    return torch.softmax(scores, 0) @ features, torch.logsumexp(scores, 0)


def test_pieces_give_the_whole_bag() -> None:
    scores, features = normal(4097, dtype=torch.float64, scale=5), normal(4097, 6).double()
    borders = [0, 1, 64, 64, 3000, 4097]
    parts = [
        whole_bag(scores[a:b], features[a:b]) if b > a else (torch.zeros(6), torch.tensor(NONE))
        for a, b in pairwise(borders)
    ]
    pooled = torch.stack([p.double() for p, _ in parts])
    lse = torch.stack([s.double() for _, s in parts])
    for merge in (merge_partials, merge_partials_reference):
        found, total = merge(pooled, lse)
        expected, expected_total = whole_bag(scores, features)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(total, expected_total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pieces", [1, 2, 9])
def test_outputs_and_gradients(pieces: int) -> None:
    inputs = partials(pieces)
    found, grads = gradients(merge_partials, inputs)
    doubled = {name: value.double() for name, value in inputs.items() if value is not None}
    doubled["lse"] = doubled["lse"].nan_to_num(neginf=-1e6)
    truth, true_grads = gradients(merge_partials_reference, dict(doubled))
    assert (found[1][2, 1], found[0][2, 1].abs().sum()) == (NONE, 0)
    truth[0][2, 1], truth[1][2, 1] = 0.0, 0.0
    true_grads["lse"][:, 2, 1] = true_grads["pooled"][:, 2, 1] = 0.0
    if pieces == 1:
        truth[0][0], true_grads["pooled"][0, 0], true_grads["lse"][0, 0] = 0.0, 0.0, 0.0
        truth[1][0] = 0.0
    found[1].masked_fill_(found[1] == NONE, 0.0)
    for name in ("pooled", "lse"):
        assert_close_to_float64(grads[name], true_grads[name], what=name)
    for output, expected in zip(found, truth, strict=True):
        assert_close_to_float64(output, expected)


def test_gradcheck() -> None:
    pooled = normal(3, 2, 4, dtype=torch.float64).requires_grad_()
    lse = normal(3, 2, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(merge_partials, (pooled, lse))


def test_merging_in_two_steps_is_merging_once() -> None:
    pooled, lse = normal(6, 4, 5, dtype=torch.float64), normal(6, 4, seed=2, dtype=torch.float64)
    halves = [merge_partials(pooled[a:b], lse[a:b]) for a, b in ((0, 2), (2, 6))]
    found = merge_partials(torch.stack([p for p, _ in halves]), torch.stack([s for _, s in halves]))
    for output, expected in zip(found, merge_partials(pooled, lse), strict=True):
        torch.testing.assert_close(output, expected)


def test_empty_pieces_may_hold_anything() -> None:
    pooled, lse = normal(2, 1, 4), torch.tensor([[0.3], [NONE]])
    pooled[1] = float("nan")
    found, grads = gradients(merge_partials, {"pooled": pooled, "lse": lse})
    torch.testing.assert_close(found[0][0], pooled[0, 0])
    assert all(bool(g.isfinite().all()) for g in grads.values())
    assert not grads["pooled"][1].any() and not grads["lse"][1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    inputs = partials(9, dtype)
    inputs["lse"] = inputs["lse"].clamp_min(-20)  # type: ignore[union-attr]
    found, grads = gradients(merge_partials, inputs)
    plain, plain_grads = gradients(
        lambda pooled, lse: (
            (lse.softmax(0)[..., None].to(dtype) * pooled).sum(0),
            lse.logsumexp(0),
        ),
        inputs,
    )
    doubled = {name: value.double() for name, value in inputs.items() if value is not None}
    truth, true_grads = gradients(merge_partials_reference, dict(doubled))
    assert_at_most_twice(found[0], plain[0], truth[0])
    for name in grads:
        assert_at_most_twice(grads[name], plain_grads[name], true_grads[name], what=name)


@pytest.mark.usefixtures("poisoned_memory")
def test_strides_and_unwritten_memory_do_not_matter() -> None:
    inputs = partials(4)
    spread = {name: strided(value) for name, value in inputs.items() if value is not None}
    for found, expected in zip(merge_partials(**spread), merge_partials(**inputs), strict=True):  # type: ignore[arg-type]
        assert torch.equal(found, expected)


def test_compiles_whole() -> None:
    compiled = torch.compile(merge_partials, fullgraph=True, backend="aot_eager")
    inputs = partials(4)
    found, grads = gradients(compiled, inputs)
    expected, expected_grads = gradients(merge_partials, inputs)
    for a, b in zip([*found, *grads.values()], [*expected, *expected_grads.values()], strict=True):
        assert torch.equal(a, b)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"\(pieces, \.\.\., features\)"):
        merge_partials(torch.zeros(2, 3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no pieces"):
        merge_partials(torch.zeros(0, 3, 4), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="choose same or summed"):
        merge_partials_across(torch.zeros(3, 4), torch.zeros(3), loss="mean")  # type: ignore[arg-type]


def test_several_processes_equal_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(hold_one_piece, args=(2, port), nprocs=2)  # type: ignore[no-untyped-call]


def hold_one_piece(rank: int, world: int, port: int) -> None:
    """Merge one of two pieces per process; compare with the same in this process alone."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    inputs: dict[str, Any] = partials(world)
    mine = {name: value[rank] for name, value in inputs.items()}
    for loss in ("same", "summed"):
        # The loss is the same sum in each process: added up, it counts `world` times.
        times = world if loss == "summed" else 1
        found, grads = gradients(merge_partials_across, mine, loss=loss)
        expected, expected_grads = gradients(merge_partials, inputs)
        for output, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(output, wanted)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, times * expected_grads[name][rank])
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    inputs = partials(9, dtype)
    device = {name: value.cuda() for name, value in inputs.items() if value is not None}
    found, grads = gradients(merge_partials, dict(device))
    expected, expected_grads = gradients(merge_partials, inputs)
    rtol = 1e-5 if dtype is torch.float32 else 1e-2
    for a, b in zip([*found, *grads.values()], [*expected, *expected_grads.values()], strict=True):
        assert_close_to_float64(a.nan_to_num(neginf=0), b.nan_to_num(neginf=0), rtol=rtol)


def test_interpreted_kernels() -> None:
    run_interpreted("test_merge_partials.py")
