"""Names made on the spot: `timm:MODEL` and `local:PATH`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.data import create_transform
from torch import nn

from bagscope.errors import ConfigError, EncoderUnavailable
from bagscope.features.encoders import WeightSource, find_encoder, load_encoder
from bagscope.features.encoders.loading import pool

RANDOM = WeightSource(random=True)
TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    "model",
    [
        "resnet18",
        "vit_tiny_patch16_224",
        "convnext_atto.d2_in1k",
        "mobilenetv3_small_050.lamb_in1k",
    ],
)
def test_a_timm_model_has_timms_own_facts_and_transform(model: str) -> None:
    spec = find_encoder(f"timm:{model}").spec
    network = timm.create_model(model, num_classes=0)
    facts = timm.data.resolve_model_data_config(network)
    resize, crop, _, normalise = create_transform(**facts).transforms
    assert (spec.resize_px or spec.input_px) == resize.size
    assert (spec.input_px, spec.input_px) == tuple(crop.size)
    assert spec.interpolation == resize.interpolation.value
    torch.testing.assert_close(torch.tensor(spec.mean), normalise.mean, check_dtype=False)
    torch.testing.assert_close(torch.tensor(spec.std), normalise.std, check_dtype=False)
    assert spec.dimension == network(torch.randn(1, 3, spec.input_px, spec.input_px)).shape[1]
    assert spec.name == f"timm:{network.pretrained_cfg['architecture']}.{spec.name.split('.')[-1]}"
    assert spec.hub_id == network.pretrained_cfg["hf_hub_id"]
    assert spec.licence == network.pretrained_cfg["license"]
    assert spec.folder.startswith("timm-")


def test_the_tag_of_the_weights_is_part_of_the_name() -> None:
    assert find_encoder("timm:resnet18").spec == find_encoder("timm:resnet18.a1_in1k").spec


@pytest.mark.parametrize(
    ("model", "near"),
    [("resnet81", "resnet18"), ("resnet18.a1_in1", "resnet18.a1_in1k"), ("qqqq", "")],
)
def test_an_unknown_timm_model_names_the_nearest(model: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"knows no model '{model}' .did you mean '{near}") as bad:
        find_encoder(f"timm:{model}")
    assert len(str(bad.value)) < 200


def test_timm_weights_are_loaded_whole(tmp_path: Path) -> None:
    original = timm.create_model("resnet18.a1_in1k").eval()
    encoder = find_encoder("timm:resnet18")
    path = tmp_path / encoder.spec.folder / "model.safetensors"
    path.parent.mkdir()
    state = original.state_dict()
    save_file(state, path)
    loaded = load_encoder("timm:resnet18", source=WeightSource(folder=tmp_path))
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = original.forward_head(original.forward_features(images), pre_logits=True)
        assert torch.equal(pool(loaded.network(images), loaded.spec), expected)
    state.pop("layer1.0.conv1.weight")
    save_file(state, path)
    with pytest.raises(EncoderUnavailable, match=r"another architecture .*layer1\.0\.conv1") as bad:
        load_encoder("timm:resnet18", source=WeightSource(folder=tmp_path))
    assert "\n" not in str(bad.value)


def vit(**changes: Any) -> nn.Module:
    trunk: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", **{"num_classes": 0, **TINY, **changes}
    )
    for parameter in trunk.parameters():
        nn.init.normal_(parameter, std=0.3)
    return trunk.eval()


def description(**changes: Any) -> dict[str, Any]:
    values = {
        "architecture": "vit_tiny_patch16_224",
        "builder_args": TINY,
        "input_px": 32,
        "pooling": "token",
    }
    return values | changes


def write_folder(folder: Path, values: dict[str, Any], state: Any | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "encoder.yaml").write_text(yaml.safe_dump(values))
    torch.save(vit().state_dict() if state is None else state, folder / "pytorch_model.bin")
    return folder


def test_a_checkpoint_with_a_description_beside_it(tmp_path: Path) -> None:
    trunk = vit()
    teacher = {f"backbone.{k}": v for k, v in trunk.state_dict().items()}
    torch.save({"teacher": {**teacher, "head.last": torch.ones(1)}}, tmp_path / "cyto.pth")
    (tmp_path / "cyto.yaml").write_text(yaml.safe_dump(description(pooling="token+mean")))
    loaded = load_encoder(f"local:{tmp_path / 'cyto.pth'}")
    assert loaded.spec.name == "local:cyto" and loaded.spec.folder == "local-cyto"
    assert (loaded.spec.dimension, loaded.spec.prefix_tokens) == (48, 1)
    assert str(tmp_path) not in json.dumps(loaded.spec.identity())
    assert str(tmp_path) not in loaded.spec.model_dump_json()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = trunk.forward_features(images)
        expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        assert torch.equal(pool(loaded.network(images), loaded.spec), expected)


def test_a_folder_with_a_description(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "my vit", description(dimension=24, prefix_tokens=1))
    encoder = find_encoder(f"local:{folder}")
    assert encoder.spec.name == "local:my vit"
    assert encoder.spec.identity()["weights_file"] == "pytorch_model.bin"
    assert load_encoder(f"local:{folder}").spec == encoder.spec
    random = load_encoder(f"local:{folder}", source=RANDOM)
    assert random.weights_sha256 != load_encoder(f"local:{folder}").weights_sha256


def test_a_folder_as_timm_saves_it(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    network = timm.create_model("resnet10t", num_classes=7).eval()
    save_for_hf(network, tmp_path / "saved", safe_serialization=True)
    loaded = load_encoder(f"local:{tmp_path / 'saved'}")
    assert (loaded.spec.name, loaded.spec.architecture) == ("local:saved", "resnet10t")
    assert loaded.spec.dimension == 512
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
        assert torch.equal(loaded.network(images), expected)


def test_a_transformer_that_timm_saved_without_pooling_gives_its_class_token(
    tmp_path: Path,
) -> None:
    trunk = vit(global_pool="", reg_tokens=4)
    save_file(trunk.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "global_pool": "",
        "model_args": {**TINY, "global_pool": "", "reg_tokens": 4, "num_classes": 0},
        "pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 1.0, "mean": [0.5, 0.5, 0.5]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_encoder(f"local:{tmp_path}")
    assert (loaded.spec.pooling, loaded.spec.prefix_tokens) == ("token", 5)
    assert loaded.spec.mean == (0.5, 0.5, 0.5) and loaded.spec.resize_px is None
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(pool(loaded.network(images), loaded.spec), trunk(images)[:, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_tny"}, "timm can't build or run 'vit_tny'"),
        ({"architecture": None}, "architecture has to name a network of timm"),
        ({"source": "transformers"}, "architecture has to name a network of timm"),
        ({"input_px": "large"}, "input_px is 'large'"),
        ({"pooing": "token"}, "unknown option 'pooing' .did you mean 'pooling'"),
        ({"dimension": 99}, "dimension is 99, but vit_tiny_patch16_224 .* has 24"),
        ({"prefix_tokens": 5}, "prefix_tokens is 5, but vit_tiny_patch16_224 .* has 1"),
        ({"input_px": 48}, "timm can't build or run 'vit_tiny_patch16_224' with these options"),
        ({"builder_args": {"depht": 2}}, "timm can't build or run .*depht"),
        ({"weights_file": "w.pth"}, r"its weights are missing \(w\.pth in the same folder\)"),
        ({"pooling": "map"}, "timm can't build or run|not one vector"),
    ],
)
def test_a_description_that_does_not_hold_together_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "v", description(**changes))
    with pytest.raises(ConfigError, match=message) as bad:
        find_encoder(f"local:{folder}")
    assert "encoder.yaml" in str(bad.value) and "\n" not in str(bad.value)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "v", description(), vit(embed_dim=16).state_dict())
    with pytest.raises(EncoderUnavailable, match=r"another architecture \(.* expected "):
        load_encoder(f"local:{folder}")


@pytest.mark.parametrize(
    ("files", "asked", "message"),
    [
        ({}, "nowhere", "no such file or folder"),
        ({"d/x.txt": ""}, "d", "neither encoder.yaml nor config.json"),
        ({"w.pth": ""}, "w.pth", "w.yaml is missing beside it"),
        ({"d/config.json": "{"}, "d", "not readable as JSON"),
        (
            {"d/config.json": '{"model_type": "vit"}', "d/model.safetensors": ""},
            "d",
            "names no timm",
        ),
        ({"d/config.json": '{"architecture": "resnet18"}'}, "d", "its weights are missing"),
        ({"d/encoder.yaml": "a: ["}, "d", "not readable as YAML"),
        ({"d/encoder.yaml": "- a"}, "d", "expected options"),
    ],
)
def test_what_is_missing_is_named(
    files: dict[str, str], asked: str, message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as bad:
        find_encoder(f"local:{tmp_path / asked}")
    assert "\n" not in str(bad.value)
