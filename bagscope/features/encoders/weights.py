"""Where an encoder's weights come from, and how they are read without executing anything.

A builder receives a `WeightSource` and asks it for a state dict. safetensors is preferred; other
checkpoints are read with `weights_only=True`, which refuses code. Gated, missing and unreachable
files each become one sentence with what to do.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.errors import EncoderUnavailable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bagscope.features.encoders.spec import EncoderSpec

_HUB_NAMES = ("model.safetensors", "pytorch_model.bin")
_SHOWN_KEYS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """How weights may be obtained.

    Attributes:
        folder: where `bagscope encoders fetch --to` put them: `<folder>/<encoder folder>/...`;
            looked at before the hub.
        random: build the network with random weights; for tests, benchmarks and shape checks.
        trust_remote_code: allow code of a model's repository to run.
    """

    folder: Path | None = None
    random: bool = False
    trust_remote_code: bool = False


def weight_files(spec: EncoderSpec) -> tuple[str, ...]:
    """Return the names that an encoder's weights may have in its repository, best first."""
    return (spec.weights_file,) if spec.weights_file else _HUB_NAMES


def hub_file(spec: EncoderSpec, source: WeightSource) -> Path:
    """Return the local path of an encoder's weights, downloaded where they are not at hand.

    Raises:
        EncoderUnavailable: gated, missing, or the hub can't be reached; says which, and the page.
    """
    names = weight_files(spec)
    if source.folder is not None:
        for name in names:
            path = source.folder / spec.folder / name
            if path.is_file():
                return path
    if spec.hub_id is None:
        raise EncoderUnavailable(
            f"encoder {spec.name}: no weights at {source.folder}; put {names[0]} there"
        )
    return _download(spec, names)


def _download(spec: EncoderSpec, names: tuple[str, ...]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    card = spec.card or f"https://huggingface.co/{spec.hub_id}"
    assert spec.hub_id is not None
    for name in names:
        try:
            return Path(hf_hub_download(spec.hub_id, name, revision=spec.revision))
        except GatedRepoError as error:
            raise EncoderUnavailable(
                f"encoder {spec.name}: access to its weights must be granted; ask for it at "
                f"{card}, then run hf auth login"
            ) from error
        except LocalEntryNotFoundError as error:  # offline, and not in the cache
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
            raise EncoderUnavailable(
                f"encoder {spec.name}: its weights are not at hand and {card} can't be "
                f"reached{offline}; on a machine with a connection run bagscope encoders fetch "
                f"{spec.name} --to DIR, and pass --weights DIR here"
            ) from error
        except EntryNotFoundError:
            continue
        except RepositoryNotFoundError as error:
            raise EncoderUnavailable(
                f"encoder {spec.name}: {card} does not exist or needs a login; run hf auth login"
            ) from error
        except (HfHubHTTPError, OSError) as error:
            raise EncoderUnavailable(
                f"encoder {spec.name}: {card} could not be read ({_first_line(error)}); try "
                f"again, or fetch the weights elsewhere with bagscope encoders fetch {spec.name}"
            ) from error
    raise EncoderUnavailable(f"encoder {spec.name}: {card} holds none of {', '.join(names)}")


def read_state_dict(path: Path, *, what: str) -> dict[str, torch.Tensor]:
    """Read a checkpoint as a flat state dict, without executing anything in it.

    Wrappers that training scripts leave (`state_dict`, `model`, `teacher`; prefixes `module.`) are
    taken off.

    Raises:
        EncoderUnavailable: truncated, damaged, or it holds code.
    """
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = "it holds Python code" if "weights_only" in str(error) else _first_line(error)
        raise EncoderUnavailable(
            f"encoder {what}: {path} can't be read as weights ({reason}); copy the file again, or "
            "convert it to safetensors"
        ) from error
    return unwrapped(content, path=path, what=what)


def unwrapped(content: object, *, path: Path, what: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint without the wrappers around them."""
    import torch

    while isinstance(content, Mapping):
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return {str(k).removeprefix("module."): v for k, v in content.items()}
        inner = [content[k] for k in ("state_dict", "model", "teacher") if k in content]
        if not inner:
            break
        content = inner[0]
    raise EncoderUnavailable(f"encoder {what}: {path} holds no state dict of tensors")


def load_exactly(network: nn.Module, state: Mapping[str, torch.Tensor], *, what: str) -> None:
    """Load a state dict, every key and shape of which must fit.

    Raises:
        EncoderUnavailable: weights of another architecture; names the first keys that don't fit.
    """
    wanted = network.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & state.keys())
        if state[key].shape != wanted[key].shape
    ]
    findings = []
    if missing:
        findings.append(f"{len(missing)} missing such as {', '.join(missing[:_SHOWN_KEYS])}")
    if unexpected:
        findings.append(f"{len(unexpected)} unknown such as {', '.join(unexpected[:_SHOWN_KEYS])}")
    findings += shapes[:_SHOWN_KEYS]
    if findings:
        raise EncoderUnavailable(
            f"encoder {what}: the weights are of another architecture ({'; '.join(findings)})"
        )
    network.load_state_dict(dict(state))


def weights_sha256(network: nn.Module) -> str:
    """Return a hash of a network's parameters and buffers: names, shapes, dtypes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(plain.shape)} {plain.dtype}\n".encode())
        digest.update(memoryview(plain.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
