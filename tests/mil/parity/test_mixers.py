"""Our mixers with the originals' weights give the originals' outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bagscope.mil.aggregators.mixers import MIXERS, Mixer, MixerName, MixerOptions, Rows
from bagscope.mil.aggregators.mixers.flow import Flow
from bagscope.mil.bags import Bags
from tests.kernels.packed import assert_close_to_float64, borders, vectors

RELATIVE = 1e-5
ZERO = 1e-6
"""A bias of all keys alike has a gradient that is zero up to rounding."""


class RecordedMixer:
    """A file's tensors, our mixer with its weights, and its rows: a class token and a square."""

    def __init__(self, file: str, name: MixerName, **options: Any) -> None:
        self.tensors, meta = vectors(file)
        self.config: dict[str, Any] = meta["config"]
        self.x = self.tensors["input/x"].clone().requires_grad_()
        given = {
            ours: self.config[theirs[1:]] if str(theirs).startswith("=") else theirs
            for ours, theirs in options.items()
        }
        layer, layers = self.config.get("layer_index", 0), self.config.get("layers", 1)
        spec = MixerOptions(heads=self.config["heads"], **given)
        self.mixer: Mixer = MIXERS[name](self.x.shape[1], spec, layer, layers)
        weights = {
            key.removeprefix("weights/"): value
            for key, value in self.tensors.items()
            if key.startswith("weights/")
        }
        self.names = set(weights) & set(dict(self.mixer.named_parameters()))
        if "out_projection.weight" in weights:
            self.mixer.out_projection = torch.nn.Linear(
                self.x.shape[1], len(weights["out_projection.weight"])
            )
        self.mixer.load_state_dict({name: weights[name] for name in self.names})

    def rows(self) -> Rows:
        tiles = len(self.x) - 1
        side = round(tiles**0.5)
        at = torch.arange(tiles)
        bags = Bags.of([self.x[1:]], grid=[torch.stack([at % side, at // side], 1)])
        return self.mixer.prepared(Rows.of(bags, 1))

    def compare(self, out: Tensor, *, at_least: int) -> None:
        wanted = self.tensors["output/out"]
        assert_close_to_float64(out, wanted, rtol=RELATIVE, atol=ZERO, what="out")
        (out * self.tensors["input/cotangent"]).sum().backward()
        assert self.x.grad is not None
        grad_x = self.tensors["grad/x"]
        assert_close_to_float64(self.x.grad, grad_x, rtol=RELATIVE, atol=ZERO, what="x")
        for name in sorted(self.names):
            grad = self.mixer.get_parameter(name).grad
            assert grad is not None, name
            wanted = self.tensors[f"grad/{name}"]
            assert_close_to_float64(grad, wanted, rtol=RELATIVE, atol=ZERO, what=name)
        assert len(self.names) >= at_least


def test_agents_of_consecutive_tiles() -> None:
    recorded = RecordedMixer("agent-attention_1d-core_A", "agent", agents="=agents")
    recorded.compare(recorded.mixer(recorded.x, recorded.rows()), at_least=4)


def test_agents_of_a_window() -> None:
    recorded = RecordedMixer(
        "agent-attention_2d-faithful_A", "agent", agents="=agents", window="=window"
    )
    recorded.compare(recorded.mixer(recorded.x, recorded.rows()), at_least=14)


@pytest.mark.parametrize("local", [False, True])
def test_inline(local: bool) -> None:
    file = "inline-attention_2d-faithful_A" if local else "inline-attention_1d-core_A"
    recorded = RecordedMixer(file, "inline", local=local)
    recorded.compare(recorded.mixer(recorded.x, recorded.rows()), at_least=8 if local else 4)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("noncausal", {}),
        ("causal", {"reads": "forward"}),
        ("causal-decay", {"reads": "forward", "decay": True}),
    ],
)
def test_lightning(variant: str, options: dict[str, Any]) -> None:
    recorded = RecordedMixer(
        f"lightning-attention_{variant}_A", "lightning", norm="=norm", **options
    )
    recorded.compare(recorded.mixer(recorded.x, recorded.rows()), at_least=8)


def test_flow_among_themselves() -> None:
    recorded = RecordedMixer("flow-attention_self_A", "flow")
    recorded.compare(recorded.mixer(recorded.x, recorded.rows()), at_least=8)


def test_flow_to_others() -> None:
    recorded = RecordedMixer("flow-attention_cross_A", "flow")
    stored = recorded.tensors["input/keys"]
    assert isinstance(recorded.mixer, Flow)
    out = recorded.mixer.across(
        recorded.x, stored, borders([len(recorded.x)]), borders([len(stored)])
    )
    recorded.compare(out, at_least=8)
