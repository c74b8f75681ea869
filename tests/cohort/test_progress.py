from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope.cohort.progress import SilentReporter, estimate_left_s


def test_nothing_is_said_before_anything_is_known():
    assert estimate_left_s(5.0, made_weight=0, found_weight=0, left_weight=3) is None
    assert estimate_left_s(5.0, made_weight=2, found_weight=0, left_weight=0) == 0


@given(
    pace=st.floats(0.01, 100),
    made=st.floats(0.1, 1e4),
    found=st.floats(0, 1e4),
    left=st.floats(0.1, 1e4),
)
def test_at_an_even_pace_the_estimate_is_exact(pace, made, found, left):
    """Slides found made take no time and do not make the rest look faster."""
    estimate = estimate_left_s(made * pace, made_weight=made, found_weight=found, left_weight=left)
    assert estimate == pytest.approx(left * pace)


def test_while_all_are_found_made_their_pace_counts():
    assert estimate_left_s(2.0, made_weight=0, found_weight=4, left_weight=6) == 3


def test_the_silent_reporter_is_silent(capsys):
    SilentReporter().emit(None)  # type: ignore[arg-type]
    assert capsys.readouterr() == ("", "")
