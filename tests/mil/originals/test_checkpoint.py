"""Checkpoints that are read, and those that are refused without running what is in them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from bagscope.errors import ConfigError
from bagscope.mil.originals.checkpoint import read_checkpoint, without

WEIGHTS = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}


class Trap:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "it ran"
    path = tmp_path / "model.pt"
    torch.save({"state_dict": WEIGHTS, "extra": Trap(trap)}, path)
    with pytest.raises(ConfigError, match=r"code is not run; .*torch\.save\(model\.state_dict\(\)"):
        read_checkpoint(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "content", [nn.Linear(3, 2), {"args": argparse.Namespace(lr=1), **WEIGHTS}]
)
def test_whole_models_and_settings_beside_weights_are_code_too(
    content: object, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="holds Python objects beside tensors"):
        read_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04cut"])
def test_damaged_files_are_refused_in_one_sentence(
    name: str, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"can't be read as weights \(.+\); copy") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ConfigError, match="can't be read as weights"):
        read_checkpoint(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pt: no such file"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ConfigError, match="no such file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [WEIGHTS], torch.zeros(3)])
def test_a_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="holds no state dict"):
        read_checkpoint(tmp_path / "model.pt")


def test_of_several_state_dicts_the_usual_one_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    other = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    torch.save({"model": WEIGHTS, "ema": {"shadow": other}}, path)
    assert torch.equal(read_checkpoint(path)["fc.weight"], WEIGHTS["fc.weight"])
    assert torch.equal(read_checkpoint(path, "ema.shadow")["fc.weight"], other["fc.weight"])
    with pytest.raises(ConfigError, match=r"no state dict 'teacher'; there are model, ema\.shadow"):
        read_checkpoint(path, "teacher")


def test_of_several_unusual_ones_the_user_chooses(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"student": WEIGHTS, "teacher": WEIGHTS}, path)
    with pytest.raises(
        ConfigError, match="there are student, teacher; name one of them with --key"
    ):
        read_checkpoint(path)
    assert set(read_checkpoint(path, "teacher")) == set(WEIGHTS)


def test_narrow_weights_become_float32_and_whole_numbers_stay(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.arange(2)}
    safetensors.torch.save_file(content, path)
    read = read_checkpoint(path)
    assert read["a"].dtype == torch.float32
    assert read["b"].dtype == torch.int64


def test_ignored_tensors_go_by_pattern() -> None:
    tensors = {**WEIGHTS, "loss.labels": torch.arange(2)}
    assert set(without(tensors, ("loss.*",))) == set(WEIGHTS)
    with pytest.raises(ConfigError, match=r"--ignore 'los': no tensor has such a name"):
        without(tensors, ("los",))
