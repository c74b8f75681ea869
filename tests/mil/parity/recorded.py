"""One recorded file of an original implementation, loaded into an aggregator of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import BagOutput, Bags
from bagscope.mil.originals import ORIGINALS, from_original
from tests.kernels.packed import assert_close_to_float64, vectors

RELATIVE = 1e-5
"""Of the largest entry of a tensor."""
ZERO = 1e-6
"""Biases of attention have gradients that are zero up to rounding."""


class Recorded:
    """A file's tensors, our aggregator with its weights, and its bag."""

    def __init__(
        self, file: str, source: str, options: Mapping[str, Any], *, features: Tensor | None = None
    ) -> None:
        self.tensors, self.meta = vectors(file)
        self.config = self.meta["config"]
        self.source = source
        self.x = self.tensors["input/x"] if features is None else features
        self.x = self.x.clone().requires_grad_()
        label = torch.tensor([self.meta["label"]]).flatten()
        self.label = self.tensors.get("input/label", label)
        resolved = {
            ours: self.config[theirs[1:]] if str(theirs).startswith("=") else theirs
            for ours, theirs in options.items()
        }
        name = ORIGINALS[source].aggregator
        outputs = self.config.get("n_classes", 1)
        self.model: Aggregator = build_aggregator(name, self.x.shape[1], outputs, resolved)
        self.model.load_state_dict(self.renamed("weights/"))

    def bags(self) -> Bags:
        return Bags.of([self.x], targets={"label": self.label.double().reshape(1, 1)})

    def output(self) -> BagOutput:
        return self.model(self.bags())

    def renamed(self, prefix: str) -> dict[str, Tensor]:
        """Return their tensors of a kind under our names; a gradient that is absent is zero."""
        weights = {
            name.removeprefix("weights/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith("weights/")
            and not name.startswith("weights/feature_extractor_part1")
        }
        theirs = {
            name: self.tensors.get(prefix + name, torch.zeros_like(tensor))
            for name, tensor in weights.items()
        }
        return from_original(self.source, theirs, self.model.state_dict())

    def compare(self, **found: Tensor) -> None:
        """Compare outputs with those recorded under the same names."""
        for name, values in found.items():
            wanted = self.tensors[f"output/{name}"]
            assert_close_to_float64(
                values.reshape(wanted.shape), wanted, rtol=RELATIVE, atol=ZERO, what=name
            )

    def compare_gradients(self, loss: Tensor) -> None:
        """Compare the loss, and its gradients in all parameters and the features."""
        self.compare(loss_total=loss)
        loss.sum().backward()
        wanted = self.renamed("grad/")
        compared = 0
        for name, parameter in self.model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_close_to_float64(grad, wanted[name], rtol=RELATIVE, atol=ZERO, what=name)
            compared += 1
        assert compared == len(wanted)
        assert self.x.grad is not None
        if self.x.shape == self.tensors["grad/x"].shape:
            assert_close_to_float64(
                self.x.grad, self.tensors["grad/x"], rtol=RELATIVE, atol=ZERO, what="x"
            )
