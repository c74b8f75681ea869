"""Mixers by name: a new one is a file of this folder, its name and its class in the table below."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from bagscope.mil.aggregators.mixers.agent import Agent
from bagscope.mil.aggregators.mixers.alibi import Alibi
from bagscope.mil.aggregators.mixers.base import Mixer, MixerOptions
from bagscope.mil.aggregators.mixers.flow import Flow
from bagscope.mil.aggregators.mixers.inline import InLine
from bagscope.mil.aggregators.mixers.lightning import Lightning
from bagscope.mil.aggregators.mixers.linear import Linear
from bagscope.mil.aggregators.mixers.neighbours import Neighbourhood
from bagscope.mil.aggregators.mixers.rows import Rows
from bagscope.mil.aggregators.mixers.softmax import Softmax

__all__ = ["MIXERS", "Mixer", "MixerName", "MixerOptions", "Rows"]

MixerName = Literal[
    "softmax", "alibi", "neighbours", "agent", "linear", "lightning", "flow", "inline"
]
MIXERS: Mapping[MixerName, type[Mixer]] = MappingProxyType(
    {
        "softmax": Softmax,
        "alibi": Alibi,
        "neighbours": Neighbourhood,
        "agent": Agent,
        "linear": Linear,
        "lightning": Lightning,
        "flow": Flow,
        "inline": InLine,
    }
)
