"""Bags lie end to end, come apart again, and say what they know."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bagscope.mil.bags import Bags, PoolingTerms, key_of, segment_softmax
from tests.kernels.packed import assert_close_to_float64, normal

LENGTHS = (3, 1, 4)


def made(**changes: object) -> Bags:
    tiles = sum(LENGTHS)
    bags = Bags(
        features=normal(tiles, 5),
        cu_seqlens=torch.tensor([0, 3, 4, 8], dtype=torch.int32),
        bag_ids=("a", "b", "c"),
        coords_l0=torch.arange(2 * tiles, dtype=torch.int32).view(-1, 2) * 256,
        grid=torch.arange(2 * tiles, dtype=torch.int32).view(-1, 2),
        slide_ids=("s", "t"),
        tile_slide=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.int32),
        tile_row=torch.tensor([0, 1, 2, 5, 0, 1, 2, 3], dtype=torch.int32),
        tile_um=torch.tensor([128.0, 256.0], dtype=torch.float64),
        mpp_l0=torch.tensor([0.25, 0.5], dtype=torch.float64),
        targets={"class": torch.tensor([[1.0], [torch.nan], [0.0]], dtype=torch.float64)},
        seed=4,
        step=2,
    )
    return replace(bags, **changes)  # type: ignore[arg-type]


@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=8))
def test_bags_laid_end_to_end_come_apart_again(lengths: list[int]) -> None:
    parts = [normal(n, 3, seed=i) for i, n in enumerate(lengths)]
    bags = Bags.of(parts)
    assert len(bags) == len(lengths)
    assert bags.lengths.tolist() == lengths
    assert bags.cu_seqlens.dtype == torch.int32
    for bag, part in enumerate(parts):
        one = bags.one(bag)
        assert torch.equal(one.features, part)
        assert one.bag_ids == (str(bag),)
        assert one.cu_seqlens.tolist() == [0, len(part)]


def test_no_bags_are_refused() -> None:
    with pytest.raises(ValueError, match="no bags; give at least one"):
        Bags.of([])


def test_one_bag_keeps_all_that_belongs_to_it() -> None:
    bags = made()
    one = bags.one(2)
    for name in ("features", "coords_l0", "grid", "tile_slide", "tile_row"):
        assert torch.equal(getattr(one, name), getattr(bags, name)[4:8]), name
    assert one.bag_ids == ("c",)
    assert (one.seed, one.step, one.slide_ids) == (4, 2, ("s", "t"))
    assert one.targets is not None
    assert one.targets["class"].tolist() == [[0.0]]
    assert one.features.data_ptr() == bags.features[4:].data_ptr()
    bare = made(coords_l0=None, grid=None, tile_slide=None, tile_row=None, targets=None).one(0)
    assert bare.coords_l0 is bare.grid is bare.tile_slide is bare.tile_row is bare.targets is None


def test_only_features_change_their_dtype() -> None:
    bags = made()
    moved = bags.to("cpu", torch.bfloat16)
    assert moved.features.dtype == torch.bfloat16
    assert moved.targets is not None
    assert moved.targets["class"].dtype == torch.float64
    for name in ("cu_seqlens", "coords_l0", "grid", "tile_slide", "tile_row", "tile_um", "mpp_l0"):
        assert torch.equal(getattr(moved, name), getattr(bags, name)), name
    kept = made(targets=None, grid=None).to("cpu")
    assert kept.features.dtype == torch.float32
    assert kept.targets is kept.grid is None


def test_every_tensor_moves() -> None:
    moved = made().to("meta")
    tensors = [
        value for name in Bags.__slots__ if isinstance(value := getattr(moved, name), Tensor)
    ]
    assert len(tensors) == 9
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.targets is not None
    assert moved.targets["class"].device.type == "meta"


def test_the_class_is_known_where_a_single_column_tells_it() -> None:
    bags = made()
    assert bags.class_index is not None
    assert bags.class_index.tolist() == [1, -1, 0]
    assert bags.class_index.dtype == torch.int64
    two = torch.zeros(3, 2, dtype=torch.float64)
    assert made(targets=None).class_index is None
    assert made(targets={"survival": two}).class_index is None
    assert made(targets={"a": two[:, :1], "b": two[:, :1]}).class_index is None


def test_keys_follow_the_names() -> None:
    # Fixed: a draw keyed by a name is the same on every machine and in every version.
    assert key_of("slide-1") == 6620912933616697081
    bags = made()
    assert bags.bag_keys.dtype == torch.int64
    assert bags.bag_keys.tolist() == [key_of("a"), key_of("b"), key_of("c")]
    assert bags.one(1).bag_keys.tolist() == [key_of("b")]
    assert all(key_of(str(i)) >= 0 for i in range(1000))
    assert len({key_of(str(i)) for i in range(1000)}) == 1000


def test_softmax_within_bags() -> None:
    scores = normal(8, 2, scale=40.0)
    index = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    found = segment_softmax(scores, index, 3)
    wanted = torch.cat([part.double().softmax(0) for part in scores.split(LENGTHS)])
    assert_close_to_float64(found, wanted)


def test_softmax_within_bags_has_its_gradient() -> None:
    index = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    scores = normal(8, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: segment_softmax(e, index, 3), (scores,))


def test_terms_add_up_to_logits() -> None:
    terms = PoolingTerms(scores=normal(8, 2), values=normal(8, 2, 3, seed=1), bias=normal(3))
    found = terms.logits(made().cu_seqlens)
    wanted = terms.bias.double().repeat(3, 1)
    for bag, (scores, values) in enumerate(
        zip(terms.scores.split(LENGTHS), terms.values.split(LENGTHS), strict=True)
    ):
        weights = scores.double().softmax(0)
        for column in range(2):
            wanted[bag] += weights[:, column] @ values[:, column].double()
    assert_close_to_float64(found, wanted)
