"""Widths are those of the originals: the published numbers of parameters."""

from __future__ import annotations

from typing import Any

import pytest

from bagscope.mil.aggregators.registry import build_aggregator

COUNTS: tuple[tuple[str, int, dict[str, Any], int], ...] = (
    ("abmil", 1024, {}, 591_619),
    ("abmil", 1024, {"gated": True}, 657_283),
    ("abmil", 1024, {"gated": True, "attention": 384}, 920_195),
    ("clam_sb", 1024, {}, 790_791),
    ("clam_mb", 1024, {}, 791_048),
    ("acmil", 384, {}, 84_369),
    ("dsmil", 512, {}, 85_252),
    ("mambamil", 1024, {}, 4_227_843),
    ("transmil", 1024, {}, 2_672_146),
)


@pytest.mark.parametrize(("name", "features", "options", "count"), COUNTS)
def test_parameter_count(name: str, features: int, options: dict[str, Any], count: int) -> None:
    model = build_aggregator(name, features, 2, options)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_big_clam_is_wider_in_its_gates_alone() -> None:
    small = build_aggregator("clam_sb", 1024, 2)
    big = build_aggregator("clam_sb", 1024, 2, {"size": "big"})
    more = sum(p.numel() for p in big.parameters()) - sum(p.numel() for p in small.parameters())
    assert more == 128 * (2 * 513 + 1)
