from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file
from torch import nn

from bagscope.errors import EncoderUnavailable
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import (
    WeightSource,
    hub_file,
    hub_folder,
    load_exactly,
    read_state_dict,
    weights_sha256,
)

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def spec_of(**changes: Any) -> EncoderSpec:
    values: dict[str, Any] = {
        "name": "vit",
        "source": "timm",
        "input_px": 16,
        "dimension": 8,
        "hub_id": "lab/vit",
        "card": "https://huggingface.co/lab/card",
    }
    return EncoderSpec(**(values | changes))


def refused(path: Path) -> str:
    with pytest.raises(EncoderUnavailable) as caught:
        read_state_dict(path, what="vit")
    return str(caught.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {"teacher": state, "student": {}, "lr": [0.1]},
        lambda state: {"model": {"state_dict": state}},
    ],
)
def test_a_checkpoint_is_taken_out_of_its_wrappers(
    wrap: Callable[[dict[str, torch.Tensor]], object], tmp_path: Path
) -> None:
    torch.save(wrap(STATE), tmp_path / "w.pth")
    read = read_state_dict(tmp_path / "w.pth", what="vit")
    assert read.keys() == STATE.keys()
    assert all(torch.equal(read[k], STATE[k]) for k in STATE)


def test_safetensors_and_pickled_tensors_are_the_same(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    read = read_state_dict(tmp_path / "w.safetensors", what="vit")
    assert all(torch.equal(read[k], STATE[k]) for k in STATE)


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("kind", ["zip", "old", "plain"])
def test_a_checkpoint_with_code_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / "w.pth"
    content = {**STATE, "bomb": Bomb(mark)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    message = refused(path)
    assert "holds Python code, which is not run" in message and str(path) in message
    assert "\n" not in message
    assert not mark.exists()
    # The fixture is sharp: pickle itself would have run it.
    if kind == "plain":
        pickle.loads(path.read_bytes())
        assert mark.exists()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_checkpoint_is_refused(kept: float, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    message = refused(path)
    assert "can't be read as weights" in message and "Python code" not in message
    assert "copy the file again" in message and "\n" not in message


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"state_dict": {"a": 1}}])
def test_a_file_without_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert "holds no state dict" in refused(tmp_path / "w.pth")


def test_weights_of_another_network_name_the_keys_that_differ() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    state = {"0.weight": torch.zeros(2, 4), "0.bias": torch.zeros(2), "head.weight": torch.ones(1)}
    before = weights_sha256(network)
    with pytest.raises(EncoderUnavailable) as caught:
        load_exactly(network, state, what="vit")
    message = str(caught.value)
    assert "2 missing such as 1.bias, 1.weight" in message
    assert "1 unknown such as head.weight" in message
    assert "0.weight is (2, 4), expected (2, 3)" in message
    assert weights_sha256(network) == before, "nothing was loaded"


def test_the_hash_follows_the_tensors_and_not_their_names() -> None:
    class Renamed(nn.Module):
        def __init__(self, other: nn.Linear) -> None:
            super().__init__()
            self.shift, self.scale = other.bias, other.weight

    linear = nn.Linear(3, 2)
    seen = weights_sha256(linear)
    assert weights_sha256(Renamed(linear)) == seen
    with torch.no_grad():
        linear.weight[1, 2] += 1e-7 + linear.weight[1, 2].abs() * 1e-6
    assert weights_sha256(linear) != seen
    assert weights_sha256(linear.to(torch.bfloat16)) != seen


def test_the_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    source = WeightSource(folder=tmp_path)
    (tmp_path / "vit").mkdir()
    for name in ("pytorch_model.bin", "model.safetensors"):  # the better one comes last
        (tmp_path / "vit" / name).touch()
        assert hub_file(spec_of(), source).name == name
    assert hub_folder(spec_of(), source) == tmp_path / "vit"


def test_weights_that_no_program_can_download_say_where_they_are(tmp_path: Path) -> None:
    spec = spec_of(hub_id=None, weights_file="w.pth")
    with pytest.raises(EncoderUnavailable, match=r"put w\.pth into .*vit, and pass --weights"):
        hub_file(spec, WeightSource(folder=tmp_path))


def no_network(*arguments: object, **options: object) -> str:
    raise AssertionError("the network was touched")


def hub_error(kind: type[Exception]) -> Exception:
    if issubclass(kind, errors.HfHubHTTPError):
        return kind("403 Client Error.\nmore", response=Mock())
    return kind("no route")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, "access to its weights must be granted; ask for it at "),
        (errors.RepositoryNotFoundError, "does not exist or needs a login; run hf auth login"),
        (errors.LocalEntryNotFoundError, "can't be reached; on a machine with a connection run "),
        (errors.OfflineModeIsEnabled, "can't be reached"),
        (errors.HfHubHTTPError, "could not be read (403 Client Error.); try again"),
        (ConnectionError, "could not be read (no route)"),
        (errors.RemoteEntryNotFoundError, "holds none of model.safetensors, pytorch_model.bin"),
    ],
)
def test_each_answer_of_the_hub_is_one_sentence(
    kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*arguments: object, **options: object) -> str:
        raise hub_error(kind)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(EncoderUnavailable) as caught:
        hub_file(spec_of(), WeightSource())
    message = str(caught.value)
    assert said in message and "https://huggingface.co/lab/card" in message
    assert "\n" not in message and message.startswith("encoder vit: ")


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: object, **options: object) -> str:
        raise errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(EncoderUnavailable, match=r"HF_HUB_OFFLINE is set.*encoders fetch vit --to"):
        hub_file(spec_of(), WeightSource())


@pytest.mark.parametrize("kind", [errors.LocalEntryNotFoundError, errors.RemoteEntryNotFoundError])
def test_the_second_name_is_tried_where_the_first_is_missing(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Offline, a cache that holds pytorch_model.bin alone is enough."""

    def download(repository: str, name: str, **options: object) -> str:
        if name == "model.safetensors":
            raise hub_error(kind)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hub_file(spec_of(), WeightSource()) == tmp_path / "pytorch_model.bin"


def test_a_data_set_and_a_revision_are_asked_for_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def download(*arguments: object, **options: object) -> str:
        asked.append((*arguments, options))
        return "/w"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    spec = spec_of(hub_id="datasets/lab/bench", weights_file="a/w.pth", revision="0123")
    hub_file(spec, WeightSource())
    assert asked == [("lab/bench", "a/w.pth", {"revision": "0123", "repo_type": "dataset"})]


def test_a_whole_repository_fails_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: object, **options: object) -> str:
        raise hub_error(errors.GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(EncoderUnavailable, match="access to its weights must be granted"):
        hub_folder(spec_of(), WeightSource())
