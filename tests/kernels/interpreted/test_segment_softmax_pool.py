from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bagscope.kernels.segment_softmax_pool import segment_softmax_pool
from bagscope.kernels.segment_softmax_pool.cpu import (
    segment_softmax_pool_backward_cpu,
    segment_softmax_pool_cpu,
)
from bagscope.kernels.segment_softmax_pool.triton import split_bags
from tests.kernels.packed import (
    RAGGED,
    assert_close_to_float64,
    borders,
    gradients,
    normal,
    strided,
)

LENGTHS = (*RAGGED, 513, 0)


def ours(**given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return segment_softmax_pool(**given)[:3]  # type: ignore[arg-type]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("branches", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_streaming_path(dtype: torch.dtype, branches: int, is_masked: bool) -> None:
    tiles = sum(LENGTHS)
    cu_seqlens = borders(LENGTHS)
    scores = normal(tiles, branches, seed=1, scale=2.0)
    h = normal(tiles, 20, seed=2, dtype=dtype)
    mask = normal(tiles, branches, seed=3) > 0.8 if is_masked else None
    given = {"scores": scores, "h": strided(h), "cu_seqlens": cu_seqlens, "mask": mask}
    found, grads = gradients(ours, given)
    truth = segment_softmax_pool_cpu(scores.double(), h.double(), cu_seqlens, mask)
    weights = [normal(*output.shape, seed=99 + i) for i, output in enumerate(truth[:3])]
    true_grads = segment_softmax_pool_backward_cpu(
        scores.double(), h.double(), cu_seqlens, mask, truth[:3], tuple(weights)
    )
    rtol = 1e-5 if dtype == torch.float32 else 2e-3
    for a, b in zip(found, truth[:3], strict=True):
        is_empty = b == -torch.inf
        assert (a[is_empty] == -torch.inf).all()
        assert_close_to_float64(a[~is_empty], b[~is_empty], rtol=rtol)
    assert_close_to_float64(grads["scores"], true_grads[0], rtol=rtol)
    assert_close_to_float64(grads["h"], true_grads[1], rtol=rtol)


@pytest.mark.parametrize("lengths", [(0,), (1, 600, 0, 256), (0, 0, 257), (512,)])
def test_splits_cover_each_row_once_and_cross_no_border(lengths: tuple[int, ...]) -> None:
    splits = split_bags(borders(lengths), sum(lengths), rows=256)
    covered = []
    edges = borders(lengths).tolist()
    for bag, start, stop in zip(*(t.tolist() for t in splits[:3]), strict=True):
        covered += range(start, stop)
        assert stop <= start or edges[bag] <= start < stop <= min(edges[bag + 1], start + 256)
    assert covered == list(range(sum(lengths)))
