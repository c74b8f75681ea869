from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bagscope.mil.recipe import BagSpec
from bagscope.mil.sampling import disturb, leave_out, sample_rows, shown_at

KEY = (0, 0, "case", 0)


def lattice(columns: int, rows: int) -> np.ndarray:
    row, column = np.mgrid[:rows, :columns]
    return np.stack([column.ravel(), row.ravel()], axis=1).astype(np.int32)


@settings(max_examples=40)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from(["uniform", "spatial"]),
    st.integers(0, 99),
)
def test_rows_are_as_many_as_asked_rising_and_each_once(
    length: int, most: int, sampling: str, step: int
) -> None:
    grid = lattice(8, 8)[:length]
    rows = sample_rows(length, most, sampling, grid, key=(1, step, "x", 0))  # type: ignore[arg-type]
    if length <= most:
        assert rows is None
        return
    assert rows is not None
    assert len(rows) == most
    assert (np.diff(rows) > 0).all()
    assert rows.min() >= 0
    assert rows.max() < length


@pytest.mark.parametrize("sampling", ["uniform", "spatial"])
def test_seed_step_case_and_turn_decide_and_nothing_else_does(sampling: str) -> None:
    def drawn(*key: object) -> list[int]:
        np.random.default_rng().random()
        rows = sample_rows(256, 20, sampling, lattice(16, 16), key=key)  # type: ignore[arg-type]
        assert rows is not None
        return rows.tolist()

    first = drawn(0, 0, "a", 0)
    assert drawn(0, 0, "a", 0) == first
    others = [drawn(1, 0, "a", 0), drawn(0, 1, "a", 0), drawn(0, 0, "b", 0), drawn(0, 0, "a", 1)]
    assert first not in others


@pytest.mark.parametrize("sampling", ["uniform", "spatial"])
def test_every_tile_comes_equally_often(sampling: str) -> None:
    counts = np.zeros(64)
    for step in range(500):
        rows = sample_rows(64, 16, sampling, lattice(8, 8), key=(0, step, "a", 0))  # type: ignore[arg-type]
        counts[rows] += 1
    # 125 expected, standard deviation 10: five of them.
    assert np.abs(counts - 125).max() < 50


def test_spatial_sees_every_region_each_time() -> None:
    grid = lattice(16, 16)
    quarter = grid[:, 0] // 4 + 4 * (grid[:, 1] // 4)
    for step in range(50):
        rows = sample_rows(256, 16, "spatial", grid, key=(0, step, "a", 0))
        # A stretch of 16 on a Hilbert curve is one of the sixteen squares of 4 × 4.
        assert sorted(quarter[rows]) == list(range(16))
    uniform = sample_rows(256, 16, "uniform", grid, key=KEY)
    assert len(set(quarter[uniform])) < 16


def test_spatial_without_a_lattice_is_uniform() -> None:
    spatial = sample_rows(100, 10, "spatial", None, key=KEY)
    uniform = sample_rows(100, 10, "uniform", None, key=KEY)
    np.testing.assert_array_equal(spatial, uniform)


def test_undisturbed_features_are_the_very_same() -> None:
    features = torch.randn(3, 4).half()
    assert disturb(features, dropout=0.0, noise=0.0, key=KEY) is features


def test_dropout_takes_its_share_and_keeps_the_mean() -> None:
    features = torch.full((200, 500), 3.0)
    found = disturb(features, dropout=0.3, noise=0.0, key=KEY)
    kept = found != 0
    # 100,000 draws: five standard deviations are 0.0073.
    assert float((~kept).double().mean()) == pytest.approx(0.3, abs=0.0073)
    torch.testing.assert_close(found[kept], torch.full((int(kept.sum()),), 3.0 / 0.7))
    assert float(found.double().mean()) == pytest.approx(3.0, abs=0.035)


def test_noise_is_as_large_as_asked_in_the_bag_s_own_measure() -> None:
    generator = torch.Generator().manual_seed(1)
    features = 5.0 + 4.0 * torch.randn(250, 400, generator=generator)
    noise = disturb(features, dropout=0.0, noise=0.25, key=KEY) - features
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(noise.std()) == pytest.approx(0.25 * float(features.std()), rel=0.01)


def test_disturbing_is_keyed_and_leaves_the_global_generator_alone() -> None:
    features = torch.randn(5, 6)
    before = torch.get_rng_state()
    once = disturb(features, dropout=0.2, noise=0.1, key=(1, 2, "a", 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(once, disturb(features, dropout=0.2, noise=0.1, key=(1, 2, "a", 0)))
    assert not torch.equal(once, disturb(features, dropout=0.2, noise=0.1, key=(1, 3, "a", 0)))
    # Adding dropout does not change which noise is drawn.
    noisy = disturb(features, dropout=0.0, noise=0.1, key=(1, 2, "a", 0))
    kept = once != 0
    torch.testing.assert_close(once[kept], noisy[kept] / 0.8)


def test_a_bag_of_one_number_is_disturbed_too() -> None:
    found = disturb(torch.ones(1, 1), dropout=0.0, noise=0.5, key=KEY)
    assert torch.isfinite(found).all()
    assert found.item() != 1.0


def test_a_curriculum_grows_by_the_same_factor_and_ends_at_whole_bags() -> None:
    spec = BagSpec(first_tiles=10, grow_share=0.5)
    shown = [shown_at(spec, 640, epoch / 12).sample_tiles for epoch in range(12)]
    assert shown[:6] == [10, 20, 40, 80, 160, 320]
    assert shown[6:] == [None] * 6
    bounded = spec.model_copy(update={"sample_tiles": 40})
    assert shown_at(bounded, 640, 0.25).sample_tiles == 20
    assert shown_at(bounded, 640, 0.5).sample_tiles == 40
    # Bags that are shorter than the first stage are whole from the beginning.
    assert shown_at(spec, 7, 0.0).sample_tiles == 7


def test_a_curriculum_that_would_shrink_is_refused() -> None:
    with pytest.raises(ValidationError, match="first_tiles is 50 and is to grow to sample_tiles"):
        BagSpec(first_tiles=50, sample_tiles=40)


@given(st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 1000))
def test_some_tiles_are_left_out_and_never_all(length: int, share: float, step: int) -> None:
    rows = leave_out(None, length, share, key=(0, step, "a", 0))
    if rows is None:
        assert not share
        return
    assert 1 <= len(rows) <= length
    assert sorted(set(rows.tolist())) == rows.tolist()


def test_the_share_that_is_left_out_is_the_one_asked_for() -> None:
    everything = np.arange(500)
    kept = [leave_out(everything, 500, 0.3, key=(0, step, "a", 0)) for step in range(40)]
    assert abs(np.mean([len(rows) for rows in kept if rows is not None]) / 500 - 0.7) < 0.01
    chosen = np.arange(0, 500, 5)
    some = leave_out(chosen, 500, 0.5, key=(0, 0, "a", 0))
    assert some is not None and set(some.tolist()) < set(chosen.tolist())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"sampling": "spatial"}, "sampling is spatial, and steps see all tiles"),
        ({"grow_share": 0.3}, "grow_share is of first_tiles, and there are none"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        BagSpec(**values)
    # As a run's config.yaml has it, with every default written out.
    whole = BagSpec(**values, first_tiles=10)
    assert BagSpec.model_validate(whole.model_dump()) == whole
    assert BagSpec.model_validate(BagSpec().model_dump()) == BagSpec()
