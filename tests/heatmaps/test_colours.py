from __future__ import annotations

import numpy as np
import pytest

from bagscope.heatmaps.colours import EMPTY_RGB, lookup_table, shared_scale, usual_range


def test_a_colour_means_the_same_number_on_every_slide() -> None:
    slides = [np.array([0.5, 1.0, 3.0]), np.array([0.9, 1.0, 1.1])]
    scale = shared_scale("ratio", "log_weight", [usual_range(one) for one in slides])
    assert (scale.low, scale.high) == (0.25, 4.0)
    first, second = (scale.rgb(one)[1] for one in slides)
    np.testing.assert_array_equal(first, second)
    assert scale.positions(np.array([0.25, 0.5, 1, 2, 4, 99])).tolist() == [
        0,
        0.25,
        0.5,
        0.75,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((0.5, 2.0), [0.5, 1, 2]),
        ((1 / 32, 32.0), [1 / 32, 1 / 4, 1, 4, 32]),
        ((0.1, 6.0), [0.1, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 6]),
        ((2.0, 9.0), [2, 4, 8, 9]),
    ],
)
def test_a_legend_marks_both_ends_and_never_many(
    limits: tuple[float, float], expected: list[float]
) -> None:
    assert shared_scale("ratio", "log_weight", limits=limits).ticks() == expected


def test_one_hot_tile_does_not_bleach_the_others() -> None:
    values = np.concatenate([np.full(999, 1.0), [900.0]])
    assert shared_scale("ratio", "log_weight", [usual_range(values)]).high == 2.0


def test_no_tile_is_white_and_no_other_colour_is() -> None:
    scale = shared_scale("probability", "instance_logit")
    assert scale.rgb(np.array([[np.nan]])).tolist() == [[list(EMPTY_RGB)]]
    for name in ("viridis", "RdBu_r"):
        assert not (lookup_table(name) == EMPTY_RGB).all(axis=1).any()
    np.testing.assert_array_equal(
        scale.rgb(np.array([0.0, 1.0])), lookup_table("viridis")[[0, 255]]
    )


@pytest.mark.parametrize(
    ("kind", "ranges", "expected"),
    [
        ("log_weight", [(-9.32, -2.11), (-5.0, -1.98)], (-9.4, -1.9)),
        ("log_weight", [(-2.0, -2.0)], (-2.0, -1.9)),
        ("instance_logit", [(-1.2, 3.1)], (-5.0, 5.0)),
        ("instance_logit", [(0.0, 0.0)], (-1.0, 1.0)),
    ],
)
def test_ranges_hold_all_slides(
    kind: str, ranges: list[tuple[float, float]], expected: tuple[float, float]
) -> None:
    scale = shared_scale("logit", kind, ranges)  # type: ignore[arg-type]
    assert (scale.low, scale.high) == pytest.approx(expected)
    assert scale.ticks()[0] == pytest.approx(scale.low)
    assert scale.ticks()[-1] == pytest.approx(scale.high)


def test_lightness_grows_along_the_sequential_map() -> None:
    lightness = lookup_table("viridis") @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > -1).all()
    assert lightness[-1] - lightness[0] > 150
