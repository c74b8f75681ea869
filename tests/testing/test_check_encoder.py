"""`check_encoder` takes right encoders and catches wrong ones, each with its own sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from bagscope.errors import ConfigError, EncoderUnavailable
from bagscope.features.encoders.registry import Registered
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import WeightSource
from bagscope.testing import check_encoder

PX = 16
DIMENSION = 12


def spec_of(**changes: Any) -> EncoderSpec:
    values: dict[str, Any] = {
        "name": "tiny",
        "source": "timm",
        "input_px": PX,
        "tile_px": 20,
        "dimension": DIMENSION,
    }
    return EncoderSpec(**(values | changes))


def registered(network: Callable[[], nn.Module] | nn.Module, **changes: Any) -> Registered:
    def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
        torch.manual_seed(0)
        return network if isinstance(network, nn.Module) else network()

    return Registered(spec=spec_of(**changes), build=build)


class Plain(nn.Module):
    """A convolution, batch norm and mean: (B, D)."""

    def __init__(self, dimension: int = DIMENSION) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, dimension, 4, stride=4)
        self.norm = nn.BatchNorm2d(dimension)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.norm(self.conv(x))).mean(dim=(2, 3))


class Tokens(Plain):
    """The same as tokens: (B, prefix + 16, D)."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.num_prefix_tokens = prefix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.conv(x).flatten(2).transpose(1, 2)
        return torch.cat([patches[:, : self.num_prefix_tokens] * 2, patches], dim=1)


def altered(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], nn.Module]:
    """Return a builder of a plain network whose vectors are changed."""

    class Altered(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return change(super().forward(x))

    return Altered


@pytest.mark.parametrize(
    "encoder",
    [
        registered(Plain),
        registered(lambda: Tokens(1), pooling="token", prefix_tokens=1),
        registered(lambda: Tokens(5), pooling="mean", prefix_tokens=5),
        registered(
            lambda: Tokens(5), pooling="token+mean", prefix_tokens=5, dimension=2 * DIMENSION
        ),
        registered(lambda: nn.Conv2d(3, DIMENSION, 4, stride=4), pooling="map"),
        registered(Plain, resize_px=18, normalise=True),
        registered(altered(lambda v: v.bfloat16())),
    ],
    ids=["output", "token", "registers", "token+mean", "map", "crop", "bfloat16"],
)
def test_a_right_encoder_passes(encoder: Registered) -> None:
    check_encoder(encoder)


def test_the_default_encoder_passes_with_random_weights() -> None:
    check_encoder("efficientnet-lite0")


def noise(vectors: torch.Tensor) -> torch.Tensor:
    return vectors + 1e-6 * torch.rand(vectors.shape)


def place(vectors: torch.Tensor) -> torch.Tensor:
    return vectors + torch.arange(len(vectors))[:, None]


class AlwaysTraining(Plain):
    """Batch norm over the batch, although eval was asked for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(self.conv(x), None, None, training=True).mean(dim=(2, 3))


class NeverEval(Plain):
    """Ignores eval: the flag stays, and dropout with it."""

    def train(self, mode: bool = True) -> NeverEval:
        return self


class InPlace(Plain):
    """Normalises its input where it lies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(2))


@pytest.mark.parametrize(
    ("encoder", "sentence"),
    [
        (registered(lambda: Plain(11)), r"3 tiles gave \(3, 11\), expected \(3, 12\)"),
        (registered(AlwaysTraining), "in another order|beside other neighbours"),
        (registered(altered(lambda v: v - v.mean(0))), "in another order|other neighbours"),
        (registered(altered(place)), "the same tiles in another order gave other vectors"),
        (registered(altered(lambda v: v + v[:1].sum())), "in another order|other neighbours"),
        (registered(altered(lambda v: v / 0)), "vectors hold NaN or infinity"),
        (registered(altered(lambda v: v * float("nan"))), "vectors hold NaN or infinity"),
        (registered(altered(noise)), "the same batch a second time gave other vectors"),
        (registered(altered(lambda v: v * 0)), "two different tiles gave the same vector"),
        (registered(altered(lambda v: (v * 100).long())), r"torch.int64, expected floating point"),
        (registered(altered(lambda v: (v, v))), "returned tuple, expected a tensor"),  # type: ignore[arg-type, return-value]
        (registered(NeverEval), r"still in training mode"),
        (registered(InPlace), "changed its input"),
        (registered(lambda: nn.Conv2d(3, DIMENSION, 4)), r"'output' needs 2 axes"),
        (registered(lambda: nn.Linear(5, DIMENSION)), r"can't take \(3, 3, 16, 16\)"),
        (
            registered(lambda: Tokens(5), pooling="token", prefix_tokens=1),
            "prefix_tokens is 1, but the network has 5",
        ),
        (registered(lambda: Tokens(0), pooling="token"), "there is no class token"),
        (
            registered(
                lambda: nn.Sequential(nn.Conv2d(3, DIMENSION, 4, stride=4), nn.Flatten(2)),
                pooling="mean",
                prefix_tokens=1,
            ),
            "11 patch tokens, which is no square",
        ),
        (registered(Plain, std=(0.5, 0.0, 0.5)), "expected numbers above 0"),
        (registered(Plain, mean=(float("nan"), 0.5, 0.5)), "another one|finite"),
        (registered(Plain, mpp=0), "recommended mpp is 0"),
        (registered(Plain, name="con"), "can't be a folder name"),
        (registered(Plain, builder_args={"act_layer": nn.GELU}), "can't be written as JSON"),
    ],
)
def test_a_wrong_encoder_is_caught(encoder: Registered, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence) as caught:
        check_encoder(encoder)
    assert str(caught.value).startswith(f"encoder {encoder.spec.name}: ")


def test_a_spec_that_was_changed_without_validation_is_caught() -> None:
    encoder = registered(Plain)
    spec = encoder.spec.model_copy(update={"resize_px": 4})
    with pytest.raises(AssertionError, match="its spec is not valid"):
        check_encoder(Registered(spec=spec, build=encoder.build))


def test_a_builder_that_returns_no_network_is_caught() -> None:
    def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
        return "network"  # type: ignore[return-value]

    with pytest.raises(AssertionError, match=r"returned str, expected a torch\.nn\.Module"):
        check_encoder(Registered(spec=spec_of(), build=build))


def test_no_weights_are_asked_for_unless_a_source_is_given() -> None:
    asked = []

    def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
        asked.append(source.random)
        return Plain()

    encoder = Registered(spec=spec_of(), build=build)
    check_encoder(encoder)
    check_encoder(encoder, source=WeightSource())
    assert asked == [True, False]


def test_what_can_not_be_built_here_is_not_called_wrong() -> None:
    with pytest.raises(EncoderUnavailable, match="trust-remote-code"):
        check_encoder(registered(Plain, source="remote-code", hub_id="someone/network"))
    with pytest.raises(ConfigError, match="did you mean"):
        check_encoder("efficientnet-lite")


def test_the_module_is_light_until_it_is_used() -> None:
    script = (
        "import json, sys\n"
        "import bagscope.testing\n"
        "bagscope.testing.check_encoder\n"
        "print(json.dumps([m for m in ('torch', 'scipy', 'cv2', 'pandas') if m in sys.modules]))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == []
