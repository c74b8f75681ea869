from __future__ import annotations

import pytest

from bagscope.wording import counted, listed


def test_long_lists_are_cut() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(12)], 2) == "0, 1 and 10 more"


@pytest.mark.parametrize(
    ("number", "told"), [(0, "0 slides"), (1, "1 slide"), (2, "2 slides"), (1200, "1,200 slides")]
)
def test_one_is_counted_in_the_singular(number: int, told: str) -> None:
    assert counted(number, "slide") == told


def test_plurals_are_spelt_as_they_are_spoken() -> None:
    assert [counted(n, "class") for n in (1, 3)] == ["1 class", "3 classes"]
    assert counted(2, "search") == "2 searches"
