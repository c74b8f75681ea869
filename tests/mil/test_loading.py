from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bagscope.mil.loading import Prefetched, Presentation, Step, load_batch, pack, plan_epoch
from bagscope.mil.recipe import BagSpec
from bagscope.mil.sources import StoreSource
from bagscope.mil.statistics import Scale
from tests.mil.made_bags import made_source
from tests.mil.stored_bags import case_of, store_slides


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 60))
def test_packing_keeps_the_order_and_the_budget(lengths: list[int], budget: int) -> None:
    tiles = np.array(lengths)
    batches = pack(range(len(lengths)), tiles, budget)
    assert [place for batch in batches for place in batch] == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or tiles[list(batch)].sum() <= budget
    for one, following in itertools.pairwise(batches):
        # Greedy: the next bag did not fit any more.
        assert tiles[list(one)].sum() + tiles[following[0]] > budget


def test_without_a_budget_all_is_one_batch() -> None:
    assert pack([2, 0, 1], np.array([9, 9, 9]), None) == ((2, 0, 1),)
    assert pack([], np.array([9]), 3) == ()


def test_an_epoch_shows_every_case_once_in_an_order_of_its_own() -> None:
    lengths = np.arange(1, 24)
    spec = BagSpec(bags_per_step=4, batch_tiles=20)
    epochs = [plan_epoch(lengths, spec, seed=3, epoch=epoch) for epoch in (0, 1)]
    orders = []
    for number, steps in enumerate(epochs):
        assert [step.number for step in steps] == list(range(6 * number, 6 * number + 6))
        assert [step.size for step in steps] == [4, 4, 4, 4, 4, 3]
        orders.append([place for step in steps for batch in step.batches for place in batch])
        assert sorted(orders[-1]) == list(range(23))
    assert orders[0] != orders[1]
    assert plan_epoch(lengths, spec, seed=3, epoch=1) == epochs[1]
    assert plan_epoch(lengths, spec, seed=4, epoch=1) != epochs[1]


def test_the_budget_counts_the_tiles_that_are_sampled() -> None:
    lengths = np.full(8, 1000)
    spec = BagSpec(bags_per_step=8, batch_tiles=40, sample_tiles=10)
    (step,) = plan_epoch(lengths, spec, seed=0, epoch=0)
    assert [len(batch) for batch in step.batches] == [4, 4]
    (whole,) = plan_epoch(lengths, spec, seed=0, epoch=0, whole_steps=True)
    assert [len(batch) for batch in whole.batches] == [8]


@given(st.integers(1, 200), st.integers(1, 20))
def test_where_bags_are_compared_none_is_left_over(count: int, size: int) -> None:
    spec = BagSpec(bags_per_step=size, batch_tiles=1)
    steps = plan_epoch(np.ones(count, int), spec, seed=0, epoch=2, whole_steps=True)
    shown = [place for step in steps for batch in step.batches for place in batch]
    assert sorted(shown) == list(range(count))
    assert [step.number for step in steps] == [2 * len(steps) + i for i in range(len(steps))]
    assert all(len(step.batches) == 1 for step in steps)
    assert min(step.size for step in steps) >= min(size, count)
    assert max(step.size for step in steps) < 2 * max(size, 1) or len(steps) == 1


def test_weights_say_how_often_a_case_comes() -> None:
    weights = np.array([1.0, 0.0, 3.0])
    counts = np.zeros(3)
    for epoch in range(800):
        for step in plan_epoch(np.ones(3, int), BagSpec(), seed=0, epoch=epoch, weights=weights):
            for (place,) in step.batches:
                counts[place] += 1
    assert counts[1] == 0
    # 2,400 draws: three standard deviations of a share of ¾ are 0.027.
    assert counts[2] / counts.sum() == pytest.approx(0.75, abs=0.03)


def test_a_batch_is_what_a_hand_would_lay_end_to_end(tmp_path: Path) -> None:
    store = store_slides(tmp_path, {"a": 3, "b": 2, "c": 4})
    source = StoreSource(store, [case_of("x", "a", "b", label=1.0), case_of("y", "c")])
    bags = load_batch(source, (1, 0), Presentation(spec=BagSpec()), step=7)
    assert bags.bag_ids == ("y", "x")
    assert bags.cu_seqlens.tolist() == [0, 4, 9]
    assert bags.cu_seqlens.dtype == torch.int32
    assert bags.features[:, 0].tolist() == [200, 201, 202, 203, 0, 1, 2, 100, 101]
    assert bags.features.dtype == torch.float32
    assert bags.slide_ids == ("c", "a", "b")
    assert bags.tile_slide is not None
    assert bags.tile_slide.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert bags.tile_row is not None
    assert bags.tile_row.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert bags.grid is not None
    # Slide b lies beside slide a, one column apart.
    assert bags.grid.tolist()[4:] == [[0, 0], [1, 0], [2, 0], [4, 0], [5, 0]]
    assert bags.coords_l0 is not None
    assert bags.coords_l0.tolist()[7:] == [[0, 0], [512, 0]]
    assert bags.tile_um is not None
    assert bags.tile_um.tolist() == [128.0] * 3
    assert bags.targets is not None
    assert bags.targets["label"].tolist() == [[0.0], [1.0]]
    assert (bags.seed, bags.step) == (0, 7)


def test_what_any_case_lacks_the_batch_lacks(tmp_path: Path) -> None:
    store = store_slides(tmp_path, {"a": 3, "b": 2}, without_grid="a")
    source = StoreSource(store, [case_of("a"), case_of("b")])
    assert load_batch(source, (0, 1), Presentation(spec=BagSpec())).grid is None
    assert load_batch(source, (1,), Presentation(spec=BagSpec())).grid is not None


def test_a_scale_and_a_dtype_are_applied() -> None:
    source = made_source(3)
    scale = Scale(shift=torch.full((6,), 2.0), factor=torch.arange(6.0))
    how = Presentation(spec=BagSpec(), dtype=torch.bfloat16, scale=scale)
    bags = load_batch(source, (2,), how)
    raw = torch.from_numpy(source.read(2).features)
    assert torch.equal(bags.features, ((raw - 2.0) * torch.arange(6.0)).bfloat16())


def test_only_training_samples_and_disturbs() -> None:
    source = made_source(4, tiles=40)
    spec = BagSpec(sample_tiles=3, noise=0.5, feature_dropout=0.5)
    still = load_batch(source, (1, 2), Presentation(spec=spec))
    assert torch.equal(
        still.features, torch.cat([torch.from_numpy(source.read(i).features) for i in (1, 2)])
    )
    how = Presentation(spec=spec, training=True, seed=5)
    together = load_batch(source, (1, 2), how, step=2)
    assert together.lengths.tolist() == [min(3, int(source.lengths[i])) for i in (1, 2)]
    # What a bag becomes does not depend on the company that it comes in.
    alone = [load_batch(source, (i,), how, step=2).features for i in (2, 1)]
    assert torch.equal(together.features, torch.cat(alone[::-1]))
    later = load_batch(source, (1, 2), how, step=3)
    assert not torch.equal(together.features, later.features)


def test_tiles_are_left_out_of_training_alone_and_others_in_every_step() -> None:
    source = made_source(4, tiles=40)
    spec = BagSpec(tile_dropout=0.5)
    whole = int(source.lengths[1])
    assert load_batch(source, (1,), Presentation(spec=spec)).lengths.tolist() == [whole]
    how = Presentation(spec=spec, training=True, seed=5)
    one, other = (load_batch(source, (1,), how, step=step).tile_row for step in (0, 1))
    assert one is not None
    assert other is not None
    assert 1 <= len(one) < whole
    assert one.tolist() != other.tolist()


def test_a_case_that_comes_twice_in_a_step_shows_other_tiles_wherever_the_step_is_cut() -> None:
    source = made_source(2, tiles=40)
    how = Presentation(spec=BagSpec(sample_tiles=2, noise=0.5), training=True, seed=5)

    def bags_of(*batches: tuple[int, ...]) -> list[torch.Tensor]:
        step = Step(number=3, batches=batches)
        loaded = [
            load_batch(source, batch, how, step=step.number, turns=turns)
            for batch, turns in zip(step.batches, step.turns, strict=True)
        ]
        return [bag for one in loaded for bag in one.features.split(one.lengths.tolist())]

    whole = bags_of((1, 0, 1, 1))
    assert not any(torch.equal(whole[i], whole[j]) for i, j in ((0, 2), (0, 3), (2, 3)))
    for one, other in zip(whole, bags_of((1,), (0, 1), (1,)), strict=True):
        assert torch.equal(one, other)


def test_items_come_in_order_and_the_end_is_said_again() -> None:
    ready: Prefetched[int] = Prefetched(range(50), lambda item: item * item)
    assert list(ready) == [item * item for item in range(50)]
    with pytest.raises(StopIteration):
        next(ready)
    ready.close()


def test_an_error_comes_where_its_item_would_have() -> None:
    def make(item: int) -> int:
        if item == 3:
            raise OSError("the disk is gone")
        return item

    ready: Prefetched[int] = Prefetched(range(9), make)
    assert [next(ready) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(ready)
    ready.close()


def test_no_more_is_made_ahead_than_asked_for() -> None:
    made: list[int] = []
    ready: Prefetched[None] = Prefetched(range(100), made.append, ahead=2)
    next(ready)
    deadline_s = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline_s:
        time.sleep(0.001)
    time.sleep(0.05)
    # One was taken, two wait, and one is in the maker's hands.
    assert made == [0, 1, 2, 3]
    ready.close()


def test_closing_ends_the_thread_while_items_are_left() -> None:
    before = threading.active_count()
    ready: Prefetched[int] = Prefetched(range(10_000), lambda item: item)
    assert next(ready) == 0
    ready.close()
    assert threading.active_count() == before
    ready.close()


def test_waiting_is_measured() -> None:
    def slowly(item: int) -> int:
        time.sleep(0.05)
        return item

    ready: Prefetched[int] = Prefetched([0, 1], slowly)
    assert list(ready) == [0, 1]
    assert ready.waited_s >= 0.09
    ready.close()
