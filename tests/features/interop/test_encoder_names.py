from __future__ import annotations

import pytest

from bagscope.features.encoders.registry import encoder_specs
from bagscope.features.interop.encoder_names import NAMES, foreign_name, our_name

SPECS = encoder_specs()
PAIRS = [(layout, pair, ours) for layout, names in NAMES.items() for pair, ours in names.items()]


@pytest.mark.parametrize(("layout", "pair", "ours"), PAIRS)
def test_a_name_leads_to_an_encoder_of_that_width(
    layout: str, pair: tuple[str, int], ours: str
) -> None:
    foreign, dimension = pair
    assert SPECS[ours].dimension == dimension
    assert our_name(layout, foreign, dimension) == ours
    assert foreign_name(layout, ours) == foreign


def test_names_without_a_counterpart_stay() -> None:
    assert our_name("trident", "virchow", 1280) == "virchow-cls"
    assert our_name("trident", "virchow", 640) == "virchow"
    assert our_name("stamp", "keep", 768) == "keep"
    assert our_name("clam", "uni_v1", 1024) == "uni_v1"
    assert foreign_name("trident", "color-texture") == "color-texture"
