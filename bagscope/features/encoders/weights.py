"""Where an encoder's weights come from, and how they are read without executing anything.

A builder receives a `WeightSource` and asks it for a state dict. safetensors is preferred; other
checkpoints are read with `weights_only=True`, which refuses code. Gated, missing and unreachable
files each become one sentence with what to do.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.errors import EncoderUnavailable, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bagscope.features.encoders.spec import EncoderSpec

_HUB_NAMES = ("model.safetensors", "pytorch_model.bin")
SHOWN_KEYS = 4
REASON_LETTERS = 200
_SIGNS_OF_CODE = ("Unsupported global", "Unsupported class", "unrecognized function")
"""What torch says of an object that is not a tensor or a plain container."""


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


def fetched_folder(spec: EncoderSpec, folder: Path) -> Path:
    """Return where below `folder` an encoder's weights are kept, whatever the stain before it."""
    return folder / spec.model_copy(update={"stain": "none"}).folder


def hub_file(spec: EncoderSpec, source: WeightSource) -> Path:
    """Return the local path of an encoder's weights, downloaded where they are not at hand.

    Raises:
        EncoderUnavailable: gated, missing, or the hub can't be reached; says which, and the page.
    """
    names = weight_files(spec)
    if source.folder is not None:
        for name in names:
            path = fetched_folder(spec, source.folder) / name
            if path.is_file():
                return path
    if spec.hub_id is None:
        where = fetched_folder(spec, source.folder or Path("DIR"))
        raise EncoderUnavailable(
            f"encoder {spec.name}: its weights can't be downloaded by a program; get them from "
            f"{spec.card or 'their authors'}, put {names[0]} into {where}, and pass --weights "
            f"{source.folder or 'DIR'}"
        )
    return _download(spec, names)


def hub_folder(spec: EncoderSpec, source: WeightSource) -> Path:
    """Return the local folder of a whole repository, downloaded where it is not at hand.

    Raises:
        EncoderUnavailable: gated, missing, or the hub can't be reached; says which, and the page.
    """
    if source.folder is not None:
        folder = fetched_folder(spec, source.folder)
        if folder.is_dir():
            return folder
    from huggingface_hub import snapshot_download

    repository, kind = repository_of(spec)
    with _plain_words(spec):
        return Path(snapshot_download(repository, revision=spec.revision, repo_type=kind))


def _download(spec: EncoderSpec, names: tuple[str, ...]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, kind = repository_of(spec)
    unreached: LocalEntryNotFoundError | None = None
    with _plain_words(spec):
        for name in names:
            try:
                return Path(
                    hf_hub_download(repository, name, revision=spec.revision, repo_type=kind)
                )
            except LocalEntryNotFoundError as error:
                unreached = error  # without a connection, the next name may still be in the cache
            except EntryNotFoundError:
                continue
        if unreached is not None:
            raise unreached
    raise EncoderUnavailable(
        f"encoder {spec.name}: {page_of(spec)} holds none of {', '.join(names)}"
    )


def page_of(spec: EncoderSpec) -> str:
    """Return the page of an encoder's weights, where access is asked for."""
    return spec.card or (f"https://huggingface.co/{spec.hub_id}" if spec.hub_id else "")


def repository_of(spec: EncoderSpec) -> tuple[str, str]:
    """Return the name and the kind ("model", "dataset") of the repository with the weights."""
    assert spec.hub_id is not None
    name = spec.hub_id.removeprefix("datasets/")
    return name, "model" if name == spec.hub_id else "dataset"


@contextmanager
def _plain_words(spec: EncoderSpec) -> Iterator[None]:
    """Turn what the hub raises into one sentence with what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    card = page_of(spec)
    fetched = f"bagscope encoders fetch {spec.name} --to DIR"
    try:
        yield
    except GatedRepoError as error:
        raise EncoderUnavailable(
            f"encoder {spec.name}: access to its weights must be granted; ask for it at {card}, "
            "then run hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise EncoderUnavailable(
            f"encoder {spec.name}: {card} does not exist or needs a login; run hf auth login"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:  # and not in the cache
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise EncoderUnavailable(
            f"encoder {spec.name}: its weights are not at hand and {card} can't be reached"
            f"{offline}; on a machine with a connection run {fetched}, and pass --weights DIR here"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = first_line(error, longest=REASON_LETTERS)
        raise EncoderUnavailable(
            f"encoder {spec.name}: {card} could not be read ({reason}); try again, or fetch the "
            f"weights elsewhere with {fetched}"
        ) from error


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
        code = any(sign in str(error) for sign in _SIGNS_OF_CODE)
        reason = (
            "it holds Python code, which is not run"
            if code
            else first_line(error, longest=REASON_LETTERS)
        )
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
        findings.append(f"{len(missing)} missing such as {', '.join(missing[:SHOWN_KEYS])}")
    if unexpected:
        findings.append(f"{len(unexpected)} unknown such as {', '.join(unexpected[:SHOWN_KEYS])}")
    findings += shapes[:SHOWN_KEYS]
    if findings:
        raise EncoderUnavailable(
            f"encoder {what}: the weights are of another architecture ({'; '.join(findings)})"
        )
    network.load_state_dict(dict(state))


def weights_sha256(network: nn.Module) -> str:
    """Return a hash of a network's parameters and buffers: shapes, dtypes and bytes.

    Their names and order are left out: libraries rename parameters between versions, and the same
    weights have to keep their hash. Which tensor goes where follows from the architecture.
    """
    import torch

    digests = []
    for tensor in network.state_dict().values():
        plain = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tuple(plain.shape)} {plain.dtype}\n".encode())
        digest.update(memoryview(plain.reshape(-1).view(torch.uint8).numpy()))
        digests.append(digest.hexdigest())
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
