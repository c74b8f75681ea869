"""One aggregator under test: how it is built, which bags it gets, how its answers are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from bagscope.errors import first_line
from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import BagOutput, Bags

LENGTHS = (40, 1, 7, 130, 2, 3)
TOLERANCE = 1e-5

Build = Callable[[int, int], Aggregator]


def require(holds: bool, name: str, sentence: str) -> None:
    """Say how the aggregator of that name breaks the contract, unless it holds."""
    # Not the statement assert: python -O would leave it out.
    if not holds:
        raise AssertionError(f"aggregator {name}: {sentence}")


@dataclass(frozen=True, slots=True)
class Case:
    """One aggregator, how it is built, and what is asked of it."""

    name: str
    build: Build
    features: int
    outputs: int

    def require(self, holds: bool, sentence: str) -> None:
        """Say how it breaks the contract, unless it holds."""
        require(holds, self.name, sentence)

    def model(self, seed: int = 0, *, drops: bool = False) -> Aggregator:
        """Return a fresh one, its parameters moved from where they start, its dropout off or on."""
        torch.manual_seed(seed)
        model = self.build(self.features, self.outputs)
        self.require(
            isinstance(model, nn.Module),
            f"what was built is {type(model).__name__}, expected a torch.nn.Module",
        )
        for name, parameter in model.named_parameters():
            self.require(
                parameter.dtype == torch.float32,
                f"parameter {name} is {parameter.dtype}, expected float32",
            )
            # Zeros and ones to start with would hide what they are multiplied with.
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for layer in model.modules():
            if isinstance(layer, nn.Dropout) and not drops:
                layer.p = 0.0
        return model.eval()

    def bags(self) -> Bags:
        """Return bags of `LENGTHS` tiles on a lattice, with a class each, one of them missing."""
        random = torch.Generator().manual_seed(1)
        tiles, count = sum(LENGTHS), len(LENGTHS)
        classes = torch.arange(count, dtype=torch.float64) % max(self.outputs, 2)
        classes[-1] = torch.nan
        places = torch.cat([torch.arange(length, dtype=torch.int32) for length in LENGTHS])
        grid = torch.stack([places % 8, places // 8], 1)
        return Bags(
            features=torch.randn(tiles, self.features, generator=random),
            cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32),
            bag_ids=tuple(f"bag {bag}" for bag in range(count)),
            grid=grid,
            coords_l0=grid * 256,
            slide_ids=tuple(f"slide {bag}" for bag in range(count)),
            tile_slide=torch.arange(count, dtype=torch.int32).repeat_interleave(
                torch.tensor(LENGTHS)
            ),
            tile_row=places,
            tile_um=torch.full((count,), 128.0, dtype=torch.float64),
            mpp_l0=torch.full((count,), 0.5, dtype=torch.float64),
            targets={"class": classes[:, None]},
            seed=5,
            step=3,
        )

    def call(self, model: Callable[[Bags], BagOutput], bags: Bags, what: str = "") -> BagOutput:
        """Return its output, or say which bags it can't take."""
        lengths = bags.lengths.tolist()
        what = what or (f"a bag of {lengths[0]} tiles" if len(lengths) == 1 else f"bags {lengths}")
        try:
            found = model(bags)
        except Exception as error:
            raise AssertionError(
                f"aggregator {self.name}: fails for {what} with {type(error).__name__} "
                f"({first_line(error)})"
            ) from error
        self.require(
            isinstance(found, BagOutput),
            f"forward returned {type(found).__name__}, expected a BagOutput",
        )
        return found

    def in_float64(self, model: Aggregator, bags: Bags) -> BagOutput:
        """Return what it makes of the same numbers in float64."""
        precise = copy.deepcopy(model).double()
        return self.call(precise, bags.to("cpu", torch.float64), "float64 features and parameters")

    def with_gradients(
        self, model: Aggregator, bags: Bags, *, one_by_one: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return outputs by name, and the gradients of their sum with fixed random weights."""
        features = bags.features.clone().requires_grad_()
        bags = replace(bags, features=features)
        model.zero_grad(set_to_none=True)
        if one_by_one:
            parts = [tensors(self.call(model, bags.one(bag))) for bag in range(len(bags))]
            found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        else:
            found = tensors(self.call(model, bags))
        loss = torch.zeros((), dtype=features.dtype)
        for name, value in found.items():
            random = torch.Generator().manual_seed(sum(name.encode()))
            weights = torch.randn(value.shape, generator=random, dtype=torch.float64)
            loss = loss + (value * weights.to(value.dtype)).sum()
        torch.autograd.backward(loss)
        grads = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        }
        if features.grad is not None:
            grads["the features"] = features.grad
        return {name: value.detach() for name, value in found.items()}, grads

    def same(self, first: BagOutput, second: BagOutput, what: str) -> None:
        """Require the same bits."""
        others = tensors(second)
        for name, value in tensors(first).items():
            self.require(
                name in others and torch.equal(value, others[name]),
                f"{what} gave other {name}; expected the same bits",
            )

    def close(
        self,
        found: Tensor,
        wanted: Tensor,
        truth: Tensor,
        what: str,
        *,
        tolerance: float = TOLERANCE,
        floor: float = 0.0,
    ) -> None:
        """Require max |found − wanted| ≤ tolerance · max |truth| + floor."""
        same = found.shape == wanted.shape
        shapes = f"{tuple(found.shape)} and {tuple(wanted.shape)}"
        self.require(same, f"{what} differ in shape: {shapes}")
        worst = float((found.double() - wanted.double()).abs().max())
        allowed = tolerance * float(truth.abs().max()) + floor
        self.require(worst <= allowed, f"{what} differ by {worst:.2g}; {allowed:.2g} is allowed")


def tensors(output: BagOutput) -> dict[str, Tensor]:
    """Return all that is there, by name; losses as "loss 'name'"."""
    found = {
        field.name: value
        for field in fields(output)
        if isinstance(value := getattr(output, field.name), Tensor)
    }
    return found | {f"loss {name!r}": value for name, value in output.losses.items()}


def reordered(bags: Bags, order: Tensor) -> Bags:
    """Return the batch with its tiles in another order."""
    parts: dict[str, Any] = {
        name: None if (value := getattr(bags, name)) is None else value[order]
        for name in ("features", "coords_l0", "grid", "tile_slide", "tile_row")
    }
    return replace(bags, **parts)
