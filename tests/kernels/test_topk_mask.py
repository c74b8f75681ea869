from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bagscope.kernels.topk_mask import topk_mask, topk_mask_reference
from tests.kernels.packed import RAGGED, bags_of, borders, normal, strided, vectors

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def bags(lengths: tuple[int, ...] = RAGGED, branches: int = 3) -> tuple[Tensor, Tensor]:
    return normal(sum(lengths), branches, seed=1), borders(lengths)


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("way", ["cpu", "interpret"])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.6, 1.0])
def test_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, way: str, exactly: bool, p: float
) -> None:
    monkeypatch.setenv("BAGSCOPE_KERNELS", way)
    scores, cu_seqlens = bags()
    found = topk_mask(scores, cu_seqlens, 10, p, seed=3, step=7, exactly=exactly)
    ids = torch.arange(len(RAGGED))
    assert found.equal(topk_mask_reference(scores, cu_seqlens, ids, 10, p, 3, 7, exactly))


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    k=st.integers(0, 12),
    p=st.floats(0, 1),
    step=st.integers(0, 1 << 40),
    exactly=st.booleans(),
)
@settings(max_examples=60)
def test_masks_only_the_highest_and_never_a_whole_bag(
    lengths: list[int], k: int, p: float, step: int, exactly: bool
) -> None:
    scores, cu_seqlens = normal(sum(lengths), 2, seed=step % 97), borders(lengths)
    mask = topk_mask(scores, cu_seqlens, k, p, seed=1, step=step, exactly=exactly)
    for e, masked in zip(bags_of(scores, cu_seqlens), bags_of(mask, cu_seqlens), strict=True):
        for branch in range(2):
            highest = set(e[:, branch].argsort(descending=True)[:k].tolist())
            chosen = set(masked[:, branch].nonzero()[:, 0].tolist())
            assert chosen <= highest
            assert not len(e) or len(chosen) < len(e)
            if exactly and len(e):
                share = int(min(k, len(e)) * p + 1e-9)
                assert len(chosen) == min(share, len(e) - 1)


def test_each_of_the_highest_is_masked_with_the_probability() -> None:
    scores, cu_seqlens = bags((50,) * 200, branches=5)
    mask = topk_mask(scores, cu_seqlens, 10, 0.6, seed=5, step=0)
    share = mask.sum() / (200 * 5 * 10)
    assert share == pytest.approx(0.6, abs=0.02)
    by_bag = torch.stack([part.sum(0) for part in bags_of(mask, cu_seqlens)]).double()
    # Binomial: ten draws with variance 0.24 each, independent of each other and of the bag.
    assert by_bag.var() == pytest.approx(2.4, abs=0.35)


@pytest.mark.parametrize("way", ["cpu", "interpret"])
def test_a_bag_is_masked_the_same_alone_and_packed(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("BAGSCOPE_KERNELS", way)
    scores, cu_seqlens = bags()
    ids = torch.tensor([40, 3, -7, 12, 5, 1 << 40, 9])
    packed = topk_mask(scores, cu_seqlens, 8, 0.5, seed=2, step=4, bag_ids=ids)
    for index, part in enumerate(bags_of(scores, cu_seqlens)):
        alone = topk_mask(
            part, borders([len(part)]), 8, 0.5, seed=2, step=4, bag_ids=ids[index : index + 1]
        )
        assert alone.equal(bags_of(packed, cu_seqlens)[index])


def test_depends_on_seed_step_bag_and_branch() -> None:
    scores = torch.arange(40.0)[:, None].expand(40, 2).contiguous()
    cu_seqlens = borders([40])
    first = topk_mask(scores, cu_seqlens, 30, 0.5, seed=0, step=0)
    assert first.equal(topk_mask(scores, cu_seqlens, 30, 0.5, seed=0, step=0))
    for change in ({"seed": 1}, {"step": 1}, {"bag_ids": torch.tensor([1])}):
        other = topk_mask(scores, cu_seqlens, 30, 0.5, **{"seed": 0, "step": 0, **change})  # type: ignore[arg-type]
        assert not first.equal(other)
    assert not first[:, 0].equal(first[:, 1])


def test_equal_scores_rank_by_row_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, cu_seqlens = torch.zeros(90, 2), borders([40, 50])
    by_bag = topk_mask(scores, cu_seqlens, 6, 1.0, seed=0, step=0)
    monkeypatch.setenv("BAGSCOPE_KERNELS", "interpret")
    assert by_bag.equal(topk_mask(scores, cu_seqlens, 6, 1.0, seed=0, step=0))
    assert by_bag[:6].all() and by_bag[40:46].all() and by_bag.sum() == 24


def test_takes_strided_scores_and_no_gradient() -> None:
    scores, cu_seqlens = bags()
    wanted = topk_mask(scores, cu_seqlens, 5, 0.5, seed=0, step=0)
    found = topk_mask(strided(scores).requires_grad_(), cu_seqlens, 5, 0.5, seed=0, step=0)
    assert found.equal(wanted) and not found.requires_grad


@pytest.mark.parametrize("name", ["acmil-ga_m5-stkim10p6_A", "acmil-ga_m3-stkim8p5_A"])
def test_takes_from_the_same_tiles_and_as_many_as_acmil(name: str) -> None:
    tensors, meta = vectors(name)
    scores = tensors["output/attention_raw"].T.contiguous()
    k, p = meta["config"]["stkim_k"], meta["config"]["stkim_p"]
    mask = topk_mask(scores, borders([len(scores)]), k, p, seed=0, step=0, exactly=True)
    assert (mask.sum(0) == tensors["output/masked_indices"].shape[1]).all()
    for branch, e in enumerate(scores.T):
        assert set(mask[:, branch].nonzero()[:, 0].tolist()) <= set(e.topk(k).indices.tolist())


def test_compiles_as_one_graph() -> None:
    def masked(scores: Tensor, cu_seqlens: Tensor) -> Tensor:
        return scores.masked_fill(topk_mask(scores, cu_seqlens, 5, 0.5, seed=0, step=0), -9.0)

    scores, cu_seqlens = bags()
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    assert compiled(scores, cu_seqlens).equal(masked(scores, cu_seqlens))


def test_refuses_what_does_not_fit() -> None:
    scores, cu_seqlens = bags()
    with pytest.raises(ValueError, match=r"p is 1\.5"):
        topk_mask(scores, cu_seqlens, 5, 1.5, seed=0, step=0)
    with pytest.raises(ValueError, match="bag_ids"):
        topk_mask(scores, cu_seqlens, 5, 0.5, seed=0, step=0, bag_ids=torch.arange(3))
    with pytest.raises(ValueError, match="must rise"):
        topk_mask(scores, borders([3, 5]), 5, 0.5, seed=0, step=0)
    with pytest.raises(ValueError, match="tiles, branches"):
        topk_mask(scores[:, 0], cu_seqlens, 5, 0.5, seed=0, step=0)
