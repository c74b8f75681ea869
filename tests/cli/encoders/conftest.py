"""A small hub that lies on disk, and four encoders, for `encoders list|show|check|fetch`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from torch import nn

from bagscope.cli.encoders import encoders
from bagscope.features.encoders import registry
from bagscope.features.encoders.registry import Registered
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import WeightSource, hub_file, read_state_dict
from tests.cli.conftest import Ran, runner_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Command = Callable[..., Ran]
VIT = EncoderSpec(
    name="hub-vit",
    title="A small network",
    source="timm",
    hub_id="lab/vit",
    input_px=16,
    tile_px=20,
    mpp=0.25,
    dimension=3,
    licence="CC0",
    commercial_use=True,
    gated=True,
    card="https://huggingface.co/lab/vit",
)
BUILT_IN = VIT.model_copy(
    update={"name": "no-weights", "source": "bagscope", "hub_id": None, "card": "", "gated": False}
)
PACKAGED = BUILT_IN.model_copy(
    update={"name": "in-package", "card": "https://pypi.org/project/numpy/"}
)
FOREIGN = VIT.model_copy(
    update={"name": "foreign", "source": "package", "package": "nowhere", "architecture": "nowhere"}
)


class Small(nn.Module):
    """(B, 3, h, w) → (B, 3): a weighted mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)) * self.weight


def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    network = Small()
    if spec.hub_id is not None:
        network.load_state_dict(read_state_dict(hub_file(spec, source), what=spec.name))
    return network


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Registered]:
    """Replace the registered encoders by four small ones."""
    specs = (VIT, BUILT_IN, PACKAGED, FOREIGN)
    known = {spec.name: Registered(spec=spec, build=build) for spec in specs}
    monkeypatch.setattr(registry, "_registered", known)
    monkeypatch.setattr(registry, "_loaded", True)
    return known


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test an empty cache and no connection; return the cache's folder of lab/vit."""

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    from_cache = partial(huggingface_hub.hf_hub_download, local_files_only=True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_cache)
    return tmp_path / "hub" / "models--lab--vit"


def put_in_cache(hub: Path, name: str = "pytorch_model.bin", weight: float = 2.0) -> Path:
    """Lay weights into the cache as the hub's client does."""
    path = hub / "snapshots" / COMMIT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.full((3,), weight)}, path)
    (hub / "refs").mkdir(exist_ok=True)
    (hub / "refs" / "main").write_text(COMMIT)
    return path


@pytest.fixture
def downloads(hub: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the hub hold `pytorch_model.bin` for whoever asks; return the names asked for."""
    asked: list[str] = []

    def download(repository: str, name: str, **options: object) -> str:
        assert repository == "lab/vit"
        asked.append(name)
        if name != "pytorch_model.bin":
            raise refusal(errors.RemoteEntryNotFoundError)
        return str(put_in_cache(hub))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", Mock())
    return asked


def refusal(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    return kind("no", response=Mock(headers={}))


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    for name in ("get_hf_file_metadata", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, Mock(side_effect=error))


@pytest.fixture
def command() -> Command:
    """Run `bagscope encoders ...` in this process, as `main` would."""
    return runner_of(encoders)


def lines(ran: Ran) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ran.out.splitlines()]
