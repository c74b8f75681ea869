"""Evaluation of a model over a source: whole bags, nothing sampled, nothing disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bagscope.errors import ArtifactError
from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import BagOutput, Bags
from bagscope.mil.loading import Prefetched, Presentation, load_batch, pack
from bagscope.mil.recipe import BagSpec
from bagscope.mil.sources import BagSource
from bagscope.mil.statistics import Scale

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inferred:
    """What a model says of cases, in the source's order.

    Attributes:
        logits: (n, C) float64.
        embedding: (n, E) float32.
    """

    logits: NDArray[np.float64]
    embedding: NDArray[np.float32]


def outputs(
    model: Aggregator,
    source: BagSource,
    spec: BagSpec,
    *,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    scale: Scale | None = None,
) -> Iterator[tuple[Bags, BagOutput]]:
    """Yield each batch and what the model makes of it, in the source's order.

    Raises:
        ArtifactError: logits that are no finite numbers, which would else pass for a class.
    """
    batches = pack(range(len(source.cases)), source.lengths, spec.batch_tiles)
    how = Presentation(spec=spec, dtype=DTYPES[precision], scale=scale)
    was_training = model.training
    model.eval()
    ready: Prefetched[Bags] = Prefetched(batches, lambda batch: load_batch(source, batch, how))
    try:
        with torch.inference_mode():
            for bags in ready:
                moved = bags.to(device)
                output = model(moved)
                _require_finite(bags, output)
                yield moved, output
    finally:
        ready.close()
        model.train(was_training)


def infer(
    model: Aggregator,
    source: BagSource,
    spec: BagSpec,
    *,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    scale: Scale | None = None,
) -> Inferred:
    """Return logits and embedding of every case.

    Raises:
        ArtifactError: as `outputs` does.
    """
    logits, embedding = [], []
    found = outputs(model, source, spec, device=device, precision=precision, scale=scale)
    for _, output in found:
        logits.append(output.logits.double().cpu().numpy())
        embedding.append(output.embedding.float().cpu().numpy())
    return Inferred(logits=np.concatenate(logits), embedding=np.concatenate(embedding))


def _require_finite(bags: Bags, output: BagOutput) -> None:
    fine = torch.isfinite(output.logits).all(dim=1).tolist()
    if not all(fine):
        place = fine.index(False)
        said = ", ".join(f"{value:g}" for value in output.logits[place].tolist()[:5])
        raise ArtifactError(
            f"{bags.bag_ids[place]}: the model's logits are {said}, which says nothing; extract "
            "the features anew where they are damaged, else train in float32 or with a lower "
            "optimiser.lr"
        )
