"""What PackMIL is made of: shares and packs, labels of hyperslides, the downsampler."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from bagscope.mil.regimes import hyperslides
from bagscope.mil.regimes.downsampler import Downsampler
from bagscope.mil.regimes.packing import Part, capacity_of, cut, kept, next_fit, split
from tests.kernels.packed import borders, normal, shuffle_within

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=6)


def per_bag(part: Part) -> list[list[int]]:
    return [part.rows[a:b].tolist() for a, b in pairwise(part.cu_seqlens.tolist())]


@settings(max_examples=80)
@given(LENGTHS, st.floats(0.01, 0.99), st.integers(0, 8), st.booleans())
def test_a_bag_is_shared_out(lengths: list[int], share: float, shortest: int, borrow: bool) -> None:
    cu_seqlens = borders(lengths)
    order = shuffle_within(cu_seqlens)
    parts = split(order, cu_seqlens, share, shortest=shortest, borrow=borrow)
    rows = per_bag(Part(order, cu_seqlens))
    for own, main, residual in zip(rows, *map(per_bag, parts), strict=True):
        count = len(own)
        assert set(main) | set(residual) == set(own)
        assert len(set(main)) == len(main) > 0 and len(set(residual)) == len(residual) > 0
        if count < max(shortest, 2):
            assert main == residual == own
        elif not borrow:
            assert len(main) + len(residual) == count
            assert len(main) == max(1, int(count * share))
        else:
            # The published condition for lending: the smaller share is below the shortest.
            lends = int(count * share) < shortest or count - int(count * share) < shortest
            assert min(len(main), len(residual)) >= shortest
            assert lends or len(main) + len(residual) == count or int(count * share) == 0


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 12))
def test_parts_are_cut(lengths: list[int], most: int) -> None:
    part = Part(torch.arange(sum(lengths)) * 2, borders(lengths))
    for own, left in zip(per_bag(part), per_bag(cut(part, most)), strict=True):
        assert left == own[:most]
    keep = torch.tensor([place % 2 == 0 for place in range(len(lengths))])
    found = per_bag(kept(part, keep))
    for place, (own, left) in enumerate(zip(per_bag(part), found, strict=True)):
        assert left == (own if place % 2 == 0 else [])


@settings(max_examples=80)
@given(LENGTHS, st.integers(1, 40))
def test_bags_fill_packs_in_order(lengths: list[int], capacity: int) -> None:
    packs = next_fit(lengths, capacity)
    assert packs[0] == 0 and all(b - a in (0, 1) for a, b in pairwise(packs))
    for place, (before, pack) in enumerate(pairwise(packs), start=1):
        filled = sum(n for n, where in zip(lengths[:place], packs, strict=False) if where == before)
        assert (pack > before) == (filled + lengths[place] > capacity)


def test_packs_are_twice_as_large_for_a_long_residual() -> None:
    assert capacity_of(1001, 0.5, 500, 1) == 500
    assert capacity_of(1002, 0.5, 500, 1) == 1000
    assert capacity_of(2003, 0.5, 500, 2) == 500
    assert capacity_of(2004, 0.5, 500, 2) == 1000


# --- labels -------------------------------------------------------------------------------------


def graded(*grades: int, weights: list[float] | None = None, benign: str = "alone") -> int:
    of_all = torch.tensor(weights) if weights else torch.ones(len(grades))
    pack = torch.zeros(len(grades), dtype=torch.int64)
    merged = hyperslides.merged_grades(torch.tensor(grades), pack, of_all, benign)  # type: ignore[arg-type]
    assert merged.shape == (1, 6)
    torch.testing.assert_close(merged.sum(), torch.tensor(1.0))
    return int(merged.argmax())


def test_grades_merge_as_gleason_patterns_do() -> None:
    for grade in range(1, 6):
        for benign in ("alone", "zero", "published"):
            assert graded(grade, grade, benign=benign) == grade
    # What was published never calls anything benign.
    assert graded(0, 0, benign="published") == 1
    assert graded(0, 0, benign="alone") == graded(0, 0, benign="zero") == 0
    assert graded(0, 5, benign="published") == graded(0, 5, benign="alone") == 2
    assert graded(0, 5, benign="zero") == 1
    assert graded(0, 5, weights=[1.0, 9.0]) > graded(0, 5, weights=[9.0, 1.0])


def test_classes_merge_into_a_soft_multi_hot() -> None:
    onehot = functional.one_hot(torch.tensor([0, 2, 2, 1]), 3).float()
    pack = torch.tensor([0, 0, 0, 1])
    merged = hyperslides.merged_classes(onehot, pack, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(merged, torch.tensor([[0.2, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    # Of a multi-label target, a bag may have no label at all.
    nothing = hyperslides.merged_classes(torch.zeros(2, 3), torch.tensor([0, 0]), torch.ones(2))
    assert torch.equal(nothing, torch.zeros(1, 3))


def test_the_earliest_event_is_a_hyperslide_s() -> None:
    bins = torch.tensor([2, 1, 3, 1, 1, 2])
    censored = torch.tensor([False, True, False, True, False, True])
    pack = torch.tensor([0, 0, 0, 1, 1, 2])
    found = hyperslides.merged_survival(bins, censored, pack, torch.ones(6))
    # The censored one comes first in time, or in the pack; the only one is censored.
    assert found.event_bin.tolist() == [2, 1, 2]
    assert found.censored_bin.tolist() == [1, 1, 2]
    torch.testing.assert_close(found.censored, torch.tensor([1 / 3, 1 / 2, 1.0]))


def test_an_ordinal_target_s_steps_are_probabilities_of_its_classes() -> None:
    steps = normal(4, 5, dtype=torch.float64)
    p = hyperslides.log_probabilities(steps).exp()
    passed = steps.sigmoid().cumprod(1)
    torch.testing.assert_close(p[:, 1:].flip(1).cumsum(1).flip(1), passed)
    torch.testing.assert_close(p.sum(1), torch.ones(4, dtype=torch.float64))


# --- downsampler --------------------------------------------------------------------------------


def ads(features: int = 6, r: int = 3) -> Downsampler:
    torch.manual_seed(0)
    model = Downsampler(features, r, attention=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def formula(model: Downsampler, x: Tensor) -> Tensor:
    """Return GELU(E (x + α x)) of one bag, in float64."""
    linear = functional.linear
    alpha = linear(linear(x, *of(model.v)).tanh(), *of(model.w)).softmax(0)
    return functional.gelu(linear(x * (1 + alpha), *of(model.embed)))


def of(layer: torch.nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight.double(), layer.bias.double()


def test_it_has_as_many_parameters_as_the_original() -> None:
    assert sum(p.numel() for p in Downsampler(1024, 4).parameters()) == 2_230_529


def test_nothing_is_compressed_in_evaluation() -> None:
    model, lengths = ads(), [5, 1, 8]
    x = normal(sum(lengths), 6)
    wanted = [
        functional.linear(formula(model, bag.double()), *of(model.out)) for bag in x.split(lengths)
    ]
    found = model(x, borders(lengths))
    torch.testing.assert_close(found, torch.cat(wanted).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["max", "random"])
def test_groups_of_tiles_become_one(kind: str) -> None:
    model, lengths = ads(), [7, 2, 6, 0]
    x, cu_seqlens = normal(sum(lengths), 6), borders(lengths)
    is_long = cu_seqlens.diff() > 2
    filled = model.padded(cu_seqlens, is_long)
    assert filled.diff().tolist() == [9, 2, 6, 0]
    order = shuffle_within(filled, seed=1)
    coordinates = None
    if kind == "random":
        draws = [torch.randperm(18, generator=torch.Generator().manual_seed(b)) for b in range(4)]
        coordinates = torch.stack([draw[:6].sort().values for draw in draws])
    found, made = model.compressed(
        x, cu_seqlens, is_long=is_long, order=order, coordinates=coordinates
    )
    assert made.diff().tolist() == [3, 2, 2, 0]
    wanted = []
    for bag, tiles in enumerate(x.double().split(lengths)):
        own = order[filled[bag] : filled[bag + 1]] - filled[bag]
        zeros = torch.zeros(len(own) - len(tiles), 6, dtype=torch.float64)
        empty = functional.gelu(functional.linear(zeros, *of(model.embed)))
        h = torch.cat([formula(model, tiles), empty])[own]
        if is_long[bag]:
            groups = h.view(-1, 3, 6)
            if coordinates is None:
                h = groups.amax(1)
            else:
                h = groups.transpose(1, 2).flatten(1)[:, coordinates[bag]]
        wanted.append(functional.linear(h, *of(model.out)))
    torch.testing.assert_close(found, torch.cat(wanted).float(), rtol=1e-5, atol=1e-6)
