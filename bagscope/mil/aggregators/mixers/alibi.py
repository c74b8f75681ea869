"""Exact attention that pays for distance: ALiBi in two dimensions, in micrometres on the slide.

    softmax_j(q_i·k_j / √d − slope_h |p_i − p_j| / u)

p is a tile's corner in micrometres, u = `alibi_um`, slope_h = 2^(−8 (h + 1) / H): distances mean
the same at every resolution, tile size and scanner.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bagscope.kernels.varlen_self_attention.alibi import alibi_attention
from bagscope.mil.aggregators.mixers.base import MixerOptions
from bagscope.mil.aggregators.mixers.lightning import slopes_of
from bagscope.mil.aggregators.mixers.rows import Rows, micrometres
from bagscope.mil.aggregators.mixers.softmax import Softmax


class Alibi(Softmax):
    """Every tile looks at every tile of its bag, and less at far ones."""

    uses = frozenset({"alibi_um"})
    slopes: Tensor

    def __init__(self, width: int, options: MixerOptions, layer: int = 0, layers: int = 1) -> None:
        super().__init__(width, options, layer, layers)
        slopes = torch.tensor(slopes_of(options.heads)) / options.alibi_um
        self.register_buffer("slopes", slopes, persistent=False)

    def prepared(self, rows: Rows) -> Rows:
        """Return the rows with their places."""
        return dataclasses.replace(rows, places_um=micrometres(rows, "mixer alibi"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Return A v (T, H, dv)."""
        assert rows.places_um is not None, "prepared"
        return alibi_attention(q, k, v, rows.cu_seqlens, rows.places_um, self.slopes)
