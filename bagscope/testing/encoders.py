"""The contract of an encoder, as one call for a test of yours.

    def test_my_encoder() -> None:
        check_encoder("my-vit")

What is asked: the facts agree with each other and with the network; three tiles give three finite
vectors of the stated dimension; a tile's vector is the same to the last bit wherever the tile
stands in its batch, whatever its neighbours are and however often it is asked for. Without this, a
run that was interrupted could not give the same files as one that was not.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from bagscope.artifacts import canonical_json, portable_name_problem
from bagscope.errors import first_line
from bagscope.features.encoders.loading import pool, require_buildable
from bagscope.features.encoders.registry import Registered, find_encoder
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import WeightSource

if TYPE_CHECKING:
    import torch
    from torch import nn

TILES = 3
_TOKEN_POOLINGS = ("token", "token+mean", "mean")


def check_encoder(
    name_or_registered: str | Registered, *, source: WeightSource | None = None
) -> None:
    """Check that an encoder keeps the contract; it runs on the CPU, in float32.

    Args:
        name_or_registered: a name that the registry knows, or a spec with its builder.
        source: where weights come from; random ones if None, so that nothing is downloaded.

    Raises:
        AssertionError: it does not; one sentence says how.
        EncoderUnavailable: it can't be built here; says what to do.
    """
    import torch

    if isinstance(name_or_registered, Registered):
        found = name_or_registered
    else:
        found = find_encoder(name_or_registered)
    spec = found.spec
    source = source or WeightSource(random=True)
    _check_spec(spec)
    require_buildable(spec, source)
    network = found.build(spec, source)
    _require(
        isinstance(network, torch.nn.Module),
        spec,
        f"the builder returned {type(network).__name__}, expected a torch.nn.Module",
    )
    network.eval()
    with torch.inference_mode():
        _check_network(spec, network)


def _require(holds: bool, spec: EncoderSpec, sentence: str) -> None:
    # Not the statement assert: python -O would leave it out.
    if not holds:
        raise AssertionError(f"encoder {spec.name}: {sentence}")


def _check_spec(spec: EncoderSpec) -> None:
    try:
        same = EncoderSpec.model_validate(spec.model_dump()) == spec
    except ValueError as error:
        raise AssertionError(f"encoder {spec.name}: its spec is not valid ({error})") from error
    _require(same, spec, "its spec is another one after being written and read")
    problem = portable_name_problem(spec.folder)
    _require(problem is None, spec, f"its name can't be a folder name: {spec.folder!r} {problem}")
    _require(min(spec.std) > 0, spec, f"std is {spec.std}, expected numbers above 0")
    _require(
        all(map(math.isfinite, (*spec.mean, *spec.std))), spec, "mean or std is not a finite number"
    )
    _require(spec.mpp > 0, spec, f"the recommended mpp is {spec.mpp}, expected a number above 0")
    _require(
        spec.pooling not in ("token", "token+mean") or spec.prefix_tokens >= 1,
        spec,
        f"pooling is {spec.pooling!r}, but prefix_tokens is 0, so that there is no class token",
    )
    try:
        text = canonical_json(spec.identity())
    except (TypeError, ValueError) as error:
        raise AssertionError(
            f"encoder {spec.name}: its identity can't be written as JSON ({error}); keep to "
            "numbers, text, lists and dicts in builder_args"
        ) from error
    _require(
        json.loads(text) == spec.identity(), spec, "its identity is another one after being read"
    )


def _check_network(spec: EncoderSpec, network: nn.Module) -> None:
    import torch

    batch = _input(spec, seed=0)
    others = _input(spec, seed=1)
    vectors = _vectors(spec, network, batch)
    _require(
        tuple(vectors.shape) == (TILES, spec.dimension),
        spec,
        f"{TILES} tiles gave {tuple(vectors.shape)}, expected {(TILES, spec.dimension)}",
    )
    _require(
        vectors.is_floating_point(), spec, f"vectors are {vectors.dtype}, expected floating point"
    )
    _require(bool(vectors.isfinite().all()), spec, "vectors hold NaN or infinity")
    _require(
        not torch.equal(vectors[0], vectors[1]), spec, "two different tiles gave the same vector"
    )
    training = [name or "the network" for name, part in network.named_modules() if part.training]
    _require(not training, spec, f"is still in training mode after eval(): {training[:1]}")
    _require_same(spec, vectors, _vectors(spec, network, batch), "the same batch a second time")
    order = [TILES - 1, *range(TILES - 1)]
    _require_same(
        spec,
        vectors[order],
        _vectors(spec, network, batch[order]),
        "the same tiles in another order",
    )
    mixed = torch.cat([batch[:1], others[1:]])
    _require_same(
        spec,
        vectors[:1],
        _vectors(spec, network, mixed)[:1],
        "the same tile beside other neighbours",
    )


def _require_same(
    spec: EncoderSpec, expected: torch.Tensor, found: torch.Tensor, what: str
) -> None:
    import torch

    difference = float((expected.double() - found.double()).abs().max())
    # Not by value alone: −0 and 0 are other bytes.
    _require(
        torch.equal(_bytes(expected), _bytes(found)),
        spec,
        f"{what} gave other vectors (by up to {difference:.3g}); a vector may depend on nothing "
        "but its tile",
    )


def _bytes(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.contiguous().view(torch.uint8)


def _vectors(spec: EncoderSpec, network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return what the network and the pooling make of a batch, having checked what is between."""
    import torch

    given = batch.clone()
    try:
        output = network(given)
    except Exception as error:
        reason = first_line(error)
        raise AssertionError(
            f"encoder {spec.name}: the network can't take {tuple(batch.shape)}, which the "
            f"transform makes ({reason}); correct input_px, or the network"
        ) from error
    _require(
        isinstance(output, torch.Tensor),
        spec,
        f"the network returned {type(output).__name__}, expected a tensor",
    )
    _require(torch.equal(given, batch), spec, "the network changed its input")
    _check_output(spec, network, output)
    return pool(output, spec)


def _check_output(spec: EncoderSpec, network: nn.Module, output: torch.Tensor) -> None:
    wanted = {"output": 2, "map": 4}.get(spec.pooling, 3)
    shape = tuple(output.shape)
    _require(
        output.ndim == wanted,
        spec,
        f"the network returned {shape}, but pooling {spec.pooling!r} needs {wanted} axes",
    )
    if spec.pooling not in _TOKEN_POOLINGS:
        return
    # What wraps a network need not repeat its attributes; the outermost one comes first.
    stated = [m.num_prefix_tokens for m in network.modules() if hasattr(m, "num_prefix_tokens")]
    _require(
        stated[:1] in ([], [spec.prefix_tokens]),
        spec,
        f"prefix_tokens is {spec.prefix_tokens}, but the network has {stated[0] if stated else 0}",
    )
    patches = output.shape[1] - spec.prefix_tokens
    _require(
        patches >= 1 and math.isqrt(patches) ** 2 == patches,
        spec,
        f"{output.shape[1]} tokens less {spec.prefix_tokens} prefix tokens leave {patches} patch "
        "tokens, which is no square; correct prefix_tokens",
    )


def _input(spec: EncoderSpec, *, seed: int) -> torch.Tensor:
    """Return `TILES` different tiles of tinted noise as the network sees them."""
    import torch

    from bagscope.features.transform import TileTransform

    random = torch.Generator().manual_seed(seed)
    tint = torch.randint(64, 192, (TILES, 1, 1, 3), generator=random)
    noise = torch.randint(-64, 64, (TILES, spec.tile_px, spec.tile_px, 3), generator=random)
    tiles = (tint + noise).to(torch.uint8)
    batch = TileTransform(spec)(tiles, torch.float32)
    expected = (TILES, 3, spec.input_px, spec.input_px)
    _require(
        tuple(batch.shape) == expected,
        spec,
        f"the transform made {tuple(batch.shape)} of tiles, expected {expected}",
    )
    return batch
