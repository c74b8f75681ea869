"""What a training tells of its epochs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

_OWN = ("validation_loss", "metric", "lr", "tiles", "seconds", "waited_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """What an epoch came to.

    Attributes:
        number: from 1.
        losses: mean of each term over the bags, before its weight; "total" is what was minimised.
        validation_loss: of the inner validation part; NaN without one.
        metric: of the first target there (see `monitoring.METRICS`); NaN where not defined.
        lr: learning rate of the last step.
        tiles: that were learnt from.
        waited_s: of `seconds`, for data.
    """

    number: int
    losses: Mapping[str, float]
    validation_loss: float
    metric: float
    lr: float
    tiles: int
    seconds: float
    waited_s: float

    def plain(self) -> dict[str, Any]:
        """Return the epoch as plain values."""
        return asdict(self)


def metrics_csv(history: Sequence[Epoch]) -> str:
    """Return one line per epoch as CSV."""
    names = list(dict.fromkeys(name for epoch in history for name in epoch.losses))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", *(f"loss_{name}" for name in names), *_OWN])
    for epoch in history:
        losses = [f"{epoch.losses.get(name, math.nan):.8g}" for name in names]
        writer.writerow([epoch.number, *losses, *(f"{getattr(epoch, name):.8g}" for name in _OWN)])
    return text.getvalue()


@dataclass
class Means:
    """Of each term of the loss, over the bags of an epoch."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, total: float, count: int) -> None:
        """Take in the sum of a term over so many bags."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0) + count

    def found(self) -> dict[str, float]:
        """Return the mean of each term that any bag took part in."""
        return {
            name: total / self.counts[name]
            for name, total in self.sums.items()
            if self.counts[name]
        }
