"""The contract of every registered encoder, on torch's meta device: nothing is downloaded.

Dimension, tokens before the patches, size of the network and transform are compared with what the
built network says and with what the authors publish.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from bagscope.features.encoders import EncoderSpec, WeightSource, encoder_specs, find_encoder
from bagscope.features.encoders.builders import load_transformers, timm_keys, timm_trunk
from bagscope.features.encoders.ctranspath import timm_swin_keys
from bagscope.features.encoders.loading import pool
from bagscope.features.encoders.networks import Answer, ConvStem, Features, Headed

SPECS = encoder_specs()
NATIVE = [name for name, spec in SPECS.items() if spec.is_native and spec.source != "bagscope"]
# Millions of parameters as the model cards or papers state them.
PUBLISHED_SIZE = {
    "gigapath": 1135,
    "h-optimus-0": 1135,
    "h0-mini": 86,
    "uni": 303,
    "uni2-h": 681,
    "virchow": 632,
    "virchow2": 632,
    "phikon": 86,
    "phikon-v2": 303,
    "midnight-12k": 1136,
    "kaiko-vits16": 22,
    "dinov2-vitg14": 1136,
    "dinov3-vithplus16": 840,
    "dinov3-vit7b16": 6716,
    "ctranspath": 28,
    "plip": 88,
}
# As the cards and the tools that use them state: length of the vector, edge of the input, resize
# before a crop, interpolation, first of the means, recommended edge of a tile.
STATED = {
    "uni": (1024, 224, None, "bilinear", 0.485, 256),
    "uni2-h": (1536, 224, None, "bilinear", 0.485, 256),
    "conch-v1": (512, 448, None, "bicubic", 0.48145466, 512),
    "conch-v1.5": (768, 448, None, "bilinear", 0.485, 512),
    "virchow": (2560, 224, None, "bicubic", 0.485, 224),
    "virchow2": (2560, 224, None, "bicubic", 0.485, 224),
    "virchow2-cls": (1280, 224, None, "bicubic", 0.485, 224),
    "gigapath": (1536, 224, 256, "bicubic", 0.485, 256),
    "h-optimus-0": (1536, 224, None, "bilinear", 0.707223, 224),
    "h-optimus-1": (1536, 224, None, "bilinear", 0.707223, 224),
    "h0-mini": (768, 224, None, "bicubic", 0.707223, 224),
    "h0-mini-cls-mean": (1536, 224, None, "bicubic", 0.707223, 224),
    "phikon": (768, 224, None, "bilinear", 0.485, 224),
    "phikon-v2": (1024, 224, None, "bilinear", 0.485, 224),
    "kaiko-vits8": (384, 224, None, "bilinear", 0.5, 256),
    "kaiko-vitb16": (768, 224, None, "bilinear", 0.5, 256),
    "kaiko-vitl14": (1024, 224, None, "bilinear", 0.5, 256),
    "midnight-12k": (3072, 224, None, "bilinear", 0.5, 224),
    "openmidnight": (1536, 224, None, "bilinear", 0.485, 224),
    "gpfm": (1024, 224, None, "bicubic", 0.485, 224),
    "hibou-b": (768, 224, None, "bicubic", 0.7068, 224),
    "hibou-l": (1024, 224, None, "bicubic", 0.7068, 224),
    "lunit-vits8": (384, 224, None, "bicubic", 0.70322989, 224),
    "ctranspath": (768, 224, None, "bilinear", 0.485, 256),
    "musk": (1024, 384, None, "bicubic", 0.5, 384),
    "musk-ms": (2048, 384, None, "bicubic", 0.5, 384),
    "keep": (768, 224, None, "bicubic", 0.485, 256),
    "plip": (512, 224, None, "bicubic", 0.48145466, 224),
    "quiltnet-b16-pmb": (512, 224, None, "bicubic", 0.48145466, 224),
    "genbio-pathfm": (4608, 224, None, "bilinear", 0.697, 224),
    "pathorchestra": (1024, 224, None, "bilinear", 0.485, 256),
    "mstar": (1024, 224, None, "bilinear", 0.485, 256),
    "resnet50-trunc": (1024, 224, None, "bilinear", 0.485, 256),
}
TOKENS = ("token", "token+mean", "mean")


@cache
def one_network(name: str) -> nn.Module:
    spec = SPECS[name]
    if spec.source in ("transformers", "open_clip"):
        pytest.importorskip(spec.source)
    with torch.device("meta"):
        return find_encoder(name).build(spec, WeightSource(random=True)).eval()


def built(name: str) -> nn.Module:
    """Build a network on the meta device, once for all names that build the same."""
    wanted = find_encoder(name)
    for other in NATIVE:
        found = find_encoder(other)
        same = (found.build, found.spec.architecture, found.spec.builder_args) == (
            wanted.build,
            wanted.spec.architecture,
            wanted.spec.builder_args,
        )
        if same and (found.spec.pooling == "output") == (wanted.spec.pooling == "output"):
            return one_network(other)
    raise AssertionError(name)


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_encoder_keeps_what_its_spec_says(name: str) -> None:
    spec, network = SPECS[name], built(name)
    images = torch.empty(2, 3, spec.input_px, spec.input_px, device="meta")
    output = network(images)
    assert pool(output, spec).shape == (2, spec.dimension)
    if spec.pooling in TOKENS:
        assert output.ndim == 3
        assert (output.shape[1] - spec.prefix_tokens) ** 0.5 % 1 == 0, "patches form a square"
    if isinstance(network, Features) and spec.pooling in TOKENS:
        assert network.trunk.num_prefix_tokens == spec.prefix_tokens
        assert isinstance(network.trunk.norm, nn.LayerNorm), "tokens are taken after the norm"
    if isinstance(network, Answer) and spec.pooling in TOKENS:
        assert spec.prefix_tokens == 1


@pytest.mark.parametrize("name", PUBLISHED_SIZE)
def test_a_network_is_as_large_as_published(name: str) -> None:
    millions = sum(parameter.numel() for parameter in built(name).parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED_SIZE[name], rel=0.02)


@pytest.mark.parametrize("name", [n for n in NATIVE if (SPECS[n].hub_id or "").startswith("timm/")])
def test_the_transform_is_that_which_timm_knows(name: str) -> None:
    """Compare with timm's own facts; of weights that are not its own it knows none."""
    spec = SPECS[name]
    facts = timm.get_pretrained_cfg(spec.architecture)
    assert spec.hub_id == facts.hf_hub_id
    assert spec.mean == tuple(facts.mean)
    assert spec.std == tuple(facts.std)
    assert spec.interpolation == facts.interpolation
    assert spec.licence.lower().replace(" ", "-") == facts.license


@pytest.mark.parametrize("name", SPECS)
def test_facts_are_complete_and_hold_together(name: str) -> None:
    spec = SPECS[name]
    assert EncoderSpec.model_validate(spec.model_dump()) == spec
    assert spec.name == name and spec.folder == name
    assert spec.title
    if spec.source == "bagscope":
        return
    assert spec.card.startswith("https://")
    assert spec.hub_id or name in ("ctranspath", "efficientnet-lite0")
    assert spec.architecture
    assert min(spec.std) > 0.1 and max(spec.mean) < 1
    assert spec.tile_px in (224, 256, 384, 512) and spec.mpp in (0.5, 1.0)
    if spec.commercial_use is False:
        assert (
            "NC" in spec.licence
            or "non-commercial" in spec.licence.lower()
            or name in ("genbio-pathfm",)
        )
    if not spec.licence:
        assert spec.commercial_use is None


@pytest.mark.parametrize("name", STATED)
def test_facts_are_those_that_are_stated(name: str) -> None:
    spec = SPECS[name]
    seen = (spec.dimension, spec.input_px, spec.resize_px, spec.interpolation)
    assert (*seen, spec.mean[0], spec.tile_px) == STATED[name]
    assert spec.mpp == (1.0 if name == "ctranspath" else 0.5)


def test_names_of_one_network_share_its_weights_and_differ_in_their_vector() -> None:
    groups: dict[tuple[Any, ...], list[EncoderSpec]] = {}
    for spec in SPECS.values():
        if spec.hub_id:
            groups.setdefault((spec.hub_id, spec.weights_file), []).append(spec)
    pairs = [specs for specs in groups.values() if len(specs) > 1]
    assert sorted(spec.name for specs in pairs for spec in specs) == [
        "h0-mini",
        "h0-mini-cls-mean",
        "midnight-12k",
        "midnight-12k-cls",
        "musk",
        "musk-ms",
        "virchow",
        "virchow-cls",
        "virchow2",
        "virchow2-cls",
    ]
    for first, second in pairs:
        assert first.dimension != second.dimension


def test_only_what_was_run_with_its_weights_says_so() -> None:
    run = {name for name, spec in SPECS.items() if spec.run_here and spec.source != "bagscope"}
    assert run == {"efficientnet-lite0"}


def dinov2_state(trunk: nn.Module, registers: int) -> dict[str, torch.Tensor]:
    """Turn a timm transformer's state into one as DINOv2 saves it: names, positions, mask token."""
    state = {k: v.clone() for k, v in trunk.state_dict().items()}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        class_position = torch.randn_like(state["cls_token"])
        state["cls_token"] -= class_position
        state["pos_embed"] = torch.cat([class_position, state["pos_embed"]], dim=1)
    state = {
        k.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): v
        for k, v in state.items()
    }
    state["mask_token"] = torch.zeros(1, trunk.embed_dim)
    return state


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("wrapped", [False, True])
def test_dinov2_keys_become_what_timm_itself_makes_of_them(registers: int, wrapped: bool) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    reg4 = "reg4_" if registers else ""
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 28}
    trunk = timm_trunk(f"vit_giant_patch14_{reg4}dinov2", small)
    state = dinov2_state(trunk, registers)
    expected = checkpoint_filter_fn(dict(state), trunk)
    if wrapped:  # as the trainer saves it: heads beside the backbone, blocks in chunks
        state = {f"backbone.{k.replace('blocks.1.', 'blocks.0.1.')}": v for k, v in state.items()}
        state = {k.replace(".blocks.0.norm", ".blocks.0.0.norm"): v for k, v in state.items()}
        state["dino_head.mlp.0.weight"] = torch.zeros(2, 2)
    renamed = timm_keys(state)
    assert renamed.keys() == trunk.state_dict().keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(renamed[key], tensor)
    trunk.load_state_dict(renamed)


def test_other_keys_are_left_alone() -> None:
    state = timm_trunk("vit_tiny_patch16_224", {"depth": 1}).state_dict()
    assert timm_keys(state).keys() == state.keys()


def test_ctranspath_keys_become_what_timm_itself_makes_of_them() -> None:
    from timm.models.swin_transformer import checkpoint_filter_fn

    network = timm_trunk("swin_tiny_patch4_window7_224", {"depths": (2, 1, 1, 1)})
    network.patch_embed = ConvStem(96)
    saved = {}
    for key, tensor in network.state_dict().items():
        parts = key.split(".")
        if "downsample" in parts:  # stages ended with it
            parts[1] = str(int(parts[1]) - 1)
        saved[".".join(parts)] = tensor
    saved["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    saved["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    renamed = timm_swin_keys(saved)
    expected = checkpoint_filter_fn(dict(saved), network)
    assert renamed.keys() == expected.keys() == network.state_dict().keys()
    assert all(torch.equal(renamed[k], expected[k]) for k in expected)
    assert timm_swin_keys(renamed).keys() == renamed.keys()


def test_the_stem_of_ctranspath_ends_where_a_patch_embedding_would() -> None:
    ours = ConvStem(96)
    images = torch.randn(1, 3, 224, 224)
    usual = timm_trunk("swin_tiny_patch4_window7_224", {"depths": (2, 1, 1, 1)}).patch_embed
    assert ours(images).shape == usual(images).shape


def test_keep_projects_and_scales_to_length_one() -> None:
    spec = SPECS["keep"]
    trunk = timm_trunk("vit_tiny_patch16_224", {"depth": 1})
    network = Headed(trunk, nn.Linear(192, 8)).eval()
    with torch.inference_mode():
        vectors = pool(network(torch.randn(2, 3, 224, 224)), spec)
    np.testing.assert_allclose(vectors.norm(dim=1).numpy(), 1, rtol=1e-5)


def test_the_truncated_resnet_is_torchvisions_first_three_stages() -> None:
    torchvision = pytest.importorskip("torchvision")
    whole = torchvision.models.resnet50(weights=None).eval()
    spec = SPECS["resnet50-trunc"]
    network = find_encoder("resnet50-trunc").build(spec, WeightSource(random=True)).eval()
    kept = network.trunk.state_dict()
    network.trunk.load_state_dict({k: v for k, v in whole.state_dict().items() if k in kept})
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        x = whole.maxpool(whole.relu(whole.bn1(whole.conv1(images))))
        expected = whole.layer3(whole.layer2(whole.layer1(x))).mean(dim=(2, 3))
        torch.testing.assert_close(pool(network(images), spec), expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_transformers_is_loaded_whatever_its_version_calls_the_keys(
    tmp_path: Any,
) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    saved = transformers.Dinov2Model(config).eval()
    saved.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    loaded = load_transformers(
        transformers.Dinov2Model, config, SPECS["phikon-v2"], dict(state)
    ).eval()
    images = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        expected = saved(images).last_hidden_state
        assert torch.equal(Answer(loaded, "last_hidden_state")(images), expected)
