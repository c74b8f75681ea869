"""A checkpoint of somebody's training as a plain state dict, read without running any of its code.

safetensors hold no code; everything else is unpickled with `weights_only=True`, which refuses it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bagscope.errors import ConfigError, first_line

_USUAL = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
"""What training scripts call the state dict among other things that they keep."""
_DEEPEST = 4
_SIGNS_OF_CODE = ("Unsupported global", "Unsupported class", "TorchScript", "unrecognized function")


def read_checkpoint(
    path: Path, key: str | None = None, together: Collection[frozenset[str]] = ()
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under their names; floating ones become float32.

    Args:
        path: of safetensors, or of what `torch.save` wrote.
        key: where in it the state dict lies, as `model` or `teacher.state_dict`; found if None.
        together: keys of state dicts that are one model where they lie side by side; without a
            key, a tensor's name then begins with that of its state dict.

    Raises:
        ConfigError: missing, damaged, code, no state dict in it, or several.
    """
    found = dict(_state_dicts(_content(path)))
    if not found:
        raise ConfigError(
            f"{path}: holds no state dict, which is tensors by name; save one with "
            "torch.save(model.state_dict(), FILE) and convert that"
        )
    parts = next((keys for keys in together if keys <= found.keys()), None)
    if key is None and parts is not None:
        return _floats(
            {f"{part}.{name}": t for part in sorted(parts) for name, t in found[part].items()}
        )
    usual = [name for name in found if name.rpartition(".")[2] in _USUAL]
    chosen = [key] if key is not None else list(found) if len(found) == 1 else usual
    if len(chosen) != 1 or chosen[0] not in found:
        asked = "" if key is None else f"no state dict {key!r}; "
        raise ConfigError(
            f"{path}: {asked}there are {', '.join(found)}; name one of them with --key"
        )
    return _floats(found[chosen[0]])


def without(tensors: dict[str, Tensor], patterns: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors whose names match none of the patterns (`*` and `?` as in file names).

    Raises:
        ConfigError: a pattern that matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in tensors):
            raise ConfigError(
                f"--ignore {pattern!r}: no tensor has such a name (the first is "
                f"{next(iter(tensors))})"
            )
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _content(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; name a checkpoint")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is raised depends on where the bytes stop making sense
        if any(sign in str(error) for sign in _SIGNS_OF_CODE):
            raise ConfigError(
                f"{path}: holds Python objects beside tensors, and code is not run; load it where "
                "it is trusted, and save its weights alone: torch.save(model.state_dict(), FILE)"
            ) from error
        said = first_line(error)
        reason = said if " " in said else "it is no checkpoint"  # a key or nothing tells nobody
        raise ConfigError(
            f"{path}: can't be read as weights ({reason}); copy or download it again"
        ) from error


def _state_dicts(content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield every dictionary of tensors alone, with the keys that lead to it."""
    if not isinstance(content, dict) or depth > _DEEPEST:
        return
    if content and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        yield name, content
        return
    for key, value in content.items():
        if isinstance(key, str):
            yield from _state_dicts(value, f"{name}.{key}" if name else key, depth + 1)
