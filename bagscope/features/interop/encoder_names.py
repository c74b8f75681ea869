"""What other tools call the encoders that we know, where the embedding is the same one.

A name stands here only where the tool's vectors mean the same as ours: same weights, pooling and
projection. Where a tool writes two widths under one name, the width decides. Any other name stays
as the tool wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping

NAMES: Mapping[str, Mapping[tuple[str, int], str]] = {
    "trident": {
        ("uni_v1", 1024): "uni",
        ("uni_v2", 1536): "uni2-h",
        ("conch_v1", 512): "conch-v1",
        ("conch_v15", 768): "conch-v1.5",
        ("virchow", 2560): "virchow",
        ("virchow", 1280): "virchow-cls",
        ("virchow2", 2560): "virchow2",
        ("virchow2", 1280): "virchow2-cls",
        ("hoptimus0", 1536): "h-optimus-0",
        ("hoptimus1", 1536): "h-optimus-1",
        ("h0-mini", 768): "h0-mini",
        ("h0-mini", 1536): "h0-mini-cls-mean",
        ("phikon_v2", 1024): "phikon-v2",
        ("midnight12k", 1536): "midnight-12k-cls",
        ("midnight12k", 3072): "midnight-12k",
        ("hibou_l", 1024): "hibou-l",
        ("musk", 1024): "musk",
        # TRIDENT's ctranspath has the weights of CHIEF.
        ("ctranspath", 768): "chief-ctranspath",
        ("resnet50", 1024): "resnet50-trunc",
    },
    # Not keep: STAMP scales its vectors to length 1.
    "stamp": {
        ("uni", 1024): "uni",
        ("uni2", 1536): "uni2-h",
        ("conch", 512): "conch-v1",
        ("conch1_5", 768): "conch-v1.5",
        ("virchow", 1280): "virchow-cls",
        ("virchow-full", 2560): "virchow",
        ("virchow2", 1280): "virchow2-cls",
        ("gigapath", 1536): "gigapath",
        ("h_optimus_0", 1536): "h-optimus-0",
        ("h_optimus_1", 1536): "h-optimus-1",
        ("ctranspath", 768): "ctranspath",
        ("chief-ctranspath", 768): "chief-ctranspath",
        ("musk", 2048): "musk-ms",
        ("mstar", 1024): "mstar",
        ("plip", 512): "plip",
    },
    "atlaspatch": {("uni_v1", 1024): "uni", ("uni_v2", 1536): "uni2-h"},
}
"""By layout: (the tool's name, width) → our name."""


def our_name(layout: str, foreign: str, dimension: int) -> str:
    """Return our name of an encoder, or the tool's own where there is no counterpart."""
    return NAMES.get(layout, {}).get((foreign, dimension), foreign)


def foreign_name(layout: str, ours: str) -> str:
    """Return what a tool calls an encoder of ours, or our own name where it has none."""
    for (foreign, _), name in NAMES.get(layout, {}).items():
        if name == ours:
            return foreign
    return ours
