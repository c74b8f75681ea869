"""Checkpoints as their authors save them, small, through the families' own builders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from bagscope.errors import EncoderUnavailable
from bagscope.features.encoders import EncoderSpec, WeightSource, encoder_specs, find_encoder
from bagscope.features.encoders import keep as keep_family
from bagscope.features.encoders.builders import build_remote, timm_trunk
from bagscope.features.encoders.loading import pool

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(name: str, **builder_args: Any) -> EncoderSpec:
    update = {"builder_args": builder_args, "input_px": 32}
    return encoder_specs()[name].model_copy(update=update)


def run(spec: EncoderSpec, folder: Path) -> torch.Tensor:
    """Build with the weights in `folder` and encode."""
    network = find_encoder(spec.name).build(spec, WeightSource(folder=folder)).eval()
    with torch.inference_mode():
        return pool(network(IMAGES), spec)


def scrambled(model: Any) -> Any:
    """Give every parameter a value of its own: fresh biases, scales and positions hide mix-ups."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_phikon_is_the_class_token_of_what_its_authors_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    args = {**VISION, "intermediate_size": 64, "patch_size": 16, "image_size": 32}
    saved = scrambled(transformers.ViTModel(transformers.ViTConfig(**args)))  # with its pooler
    saved.save_pretrained(tmp_path / "phikon")
    with torch.inference_mode():
        expected = saved(IMAGES).last_hidden_state[:, 0]
    assert torch.equal(run(small("phikon", **args), tmp_path), expected)


@pytest.mark.parametrize("stored_px", [28, 56])
def test_a_dinov2_of_transformers_takes_its_grid_from_the_weights(
    stored_px: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    args = {**VISION, "patch_size": 14, "use_swiglu_ffn": True}
    config = transformers.Dinov2Config(image_size=stored_px, **args)
    saved = scrambled(transformers.Dinov2Model(config))
    saved.save_pretrained(tmp_path / "midnight-12k")
    images = torch.randn(2, 3, 28, 28)
    spec = small("midnight-12k", **args)
    network = find_encoder(spec.name).build(spec, WeightSource(folder=tmp_path)).eval()
    with torch.inference_mode():
        tokens = saved(images).last_hidden_state
        expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        assert torch.equal(pool(network(images), spec), expected)


def test_weights_that_do_not_fit_a_network_of_transformers_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    args = {**VISION, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, **args)).save_pretrained(
        tmp_path / "phikon-v2"
    )
    spec = small("phikon-v2", **{**args, "num_hidden_layers": 3})
    with pytest.raises(EncoderUnavailable, match=r"another architecture .* missing such as enc"):
        run(spec, tmp_path)
    spec = small("phikon-v2", **{**args, "mlp_ratio": 2})
    with pytest.raises(EncoderUnavailable, match=r"of another shape such as .*mlp\.fc1"):
        run(spec, tmp_path)


def test_plip_is_the_image_side_of_a_clip(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vision = {**VISION, "intermediate_size": 64, "patch_size": 16, "image_size": 32}
    text = {**VISION, "intermediate_size": 64, "vocab_size": 50}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    clip = scrambled(transformers.CLIPModel(config))
    clip.save_pretrained(tmp_path / "plip")
    with torch.inference_mode():
        expected = clip.visual_projection(clip.vision_model(IMAGES).pooler_output)
    assert torch.equal(run(small("plip", **vision, projection_dim=16), tmp_path), expected)


def test_quiltnet_is_the_image_side_of_an_open_clip(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP

    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}
    text = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 50, "context_length": 8}
    clip = scrambled(CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text))
    spec = small(
        "quiltnet-b32",
        image_size=32,
        patch_size=16,
        width=64,
        layers=2,
        heads=2,
        mlp_ratio=4.0,
        output_dim=16,
    )
    path = tmp_path / "quiltnet-b32" / str(spec.weights_file)
    path.parent.mkdir()
    torch.save(clip.state_dict(), path)
    with torch.inference_mode():
        torch.testing.assert_close(run(spec, tmp_path), clip.encode_image(IMAGES))


def test_keep_is_found_in_its_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without memory: on the meta device, with the names that transformers gives on saving."""
    spec = encoder_specs()["keep"]
    with torch.device("meta"):
        network = find_encoder("keep").build(spec, WeightSource(random=True))
        state = {
            key.replace(".gamma", ".weight"): value for key, value in network.state_dict().items()
        }
        assert sum(".ls1.weight" in key for key in state) == 24
        state |= {"text.embeddings.weight": torch.empty(2, 2), "logit_scale": torch.empty(())}
        monkeypatch.setattr(keep_family, "hub_file", lambda *arguments: tmp_path)
        monkeypatch.setattr(keep_family, "read_state_dict", lambda *arguments, what: state)
        find_encoder("keep").build(spec, WeightSource())
        state.pop("visual_head.2.bias")
        with pytest.raises(EncoderUnavailable, match=r"1 missing such as visual_head\.2\.bias"):
            find_encoder("keep").build(spec, WeightSource())


def test_conch_is_asked_for_its_vector_before_the_projection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Any] = []

    class Model(nn.Module):
        def encode_image(self, images: torch.Tensor, **options: object) -> torch.Tensor:
            calls.append(options)
            return images.mean(dim=(2, 3))

    def create(model: str, path: str, **options: object) -> Model:
        calls.append((model, Path(path).name, options))
        return Model()

    spec = encoder_specs()["conch-v1"]
    module = ModuleType(spec.architecture)
    module.create_model_from_pretrained = create  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "conch", ModuleType("conch"))
    monkeypatch.setitem(sys.modules, spec.architecture, module)
    path = tmp_path / "conch-v1" / "pytorch_model.bin"
    path.parent.mkdir()
    path.touch()
    assert run(spec, tmp_path).shape == (2, 3)
    assert calls == [
        ("conch_ViT-B-16", "pytorch_model.bin", {"return_transform": False}),
        {"proj_contrast": False, "normalize": False},
    ]


@pytest.mark.parametrize(("name", "several"), [("musk", False), ("musk-ms", True)])
def test_musk_is_asked_for_one_scale_or_several(
    name: str, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    asked: dict[str, object] = {}

    class Model(nn.Module):
        def forward(self, **options: Any) -> tuple[torch.Tensor, None]:
            asked.update(options)
            return options["image"].mean(dim=(2, 3)), None

    spec = encoder_specs()[name]
    monkeypatch.setitem(sys.modules, "musk", ModuleType("musk"))
    monkeypatch.setitem(sys.modules, spec.architecture, ModuleType(spec.architecture))
    monkeypatch.setattr(timm, "create_model", lambda model: Model())
    network = find_encoder(name).build(spec, WeightSource(random=True))
    assert network(IMAGES).shape == (2, 3)
    asked.pop("image")
    assert asked == {
        "with_head": False,
        "ms_aug": several,
        "out_norm": False,
        "return_global": True,
    }


_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

class TinyConfig(PretrainedConfig):
    model_type = "tiny-of-a-test"

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(3, 5)
        self.post_init()
    def forward(self, pixel_values):
        return BaseModelOutputWithPooling(pooler_output=self.head(pixel_values.mean(dim=(2, 3))))
"""


@pytest.mark.parametrize("random", [False, True])
def test_code_of_a_repository_runs_from_a_fetched_folder(
    random: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of an air-gapped machine: the whole repository lies in the folder of weights."""
    pytest.importorskip("transformers")
    from safetensors.torch import save_file
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "hibou-b"
    folder.mkdir()
    (folder / "modeling_tiny.py").write_text(_CODE)
    config = {
        "model_type": "tiny-of-a-test",
        "architectures": ["TinyModel"],
        "auto_map": {
            "AutoConfig": "modeling_tiny.TinyConfig",
            "AutoModel": "modeling_tiny.TinyModel",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = {"head.weight": torch.randn(5, 3), "head.bias": torch.randn(5)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    source = WeightSource(folder=tmp_path, trust_remote_code=True, random=random)
    vectors = build_remote(encoder_specs()["hibou-b"], source).eval()(IMAGES)
    expected = nn.functional.linear(IMAGES.mean(dim=(2, 3)), *state.values())
    assert vectors.shape == (2, 5)
    assert torch.allclose(vectors, expected) is not random


def test_layers_are_given_by_name() -> None:
    args = {"depth": 1, "embed_dim": 24, "num_heads": 2, "mlp_layer": "SwiGLUPacked"}
    trunk = timm_trunk("vit_tiny_patch16_224", {**args, "act_layer": "silu"})
    mlp = trunk.blocks[0].mlp
    assert type(mlp).__name__ == "GluMlp" and isinstance(mlp.act, nn.SiLU)
