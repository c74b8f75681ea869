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


def test_a_plural_may_be_named() -> None:
    assert counted(1, "class", "classes") == "1 class"
    assert counted(3, "class", "classes") == "3 classes"
