from __future__ import annotations

import csv
import io
import math

from bagscope.mil.training.history import Epoch, metrics_csv


def epoch(number: int, **losses: float) -> Epoch:
    return Epoch(
        number=number,
        losses=losses,
        validation_loss=0.1 + 0.2,
        metric=math.nan,
        lr=1e-4,
        tiles=12,
        seconds=0.5,
        waited_s=0.25,
    )


def rows_of(history: list[Epoch]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(metrics_csv(history))))


def test_every_epoch_is_a_line_and_every_term_a_column() -> None:
    rows = rows_of([epoch(1, total=1.5, bag=1.0), epoch(2, total=0.75, bag=0.5, entropy=-1.0)])
    assert list(rows[0]) == [
        "epoch", "loss_total", "loss_bag", "loss_entropy", "validation_loss", "metric", "lr",
        "tiles", "seconds", "waited_s",
    ]  # fmt: skip
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [float(row["loss_total"]) for row in rows] == [1.5, 0.75]
    assert math.isnan(float(rows[0]["loss_entropy"]))
    assert math.isnan(float(rows[0]["metric"]))
    assert float(rows[0]["validation_loss"]) == 0.3
    assert rows[0]["lr"] == "0.0001"
    assert rows[0]["tiles"] == "12"


def test_an_epoch_comes_back_from_its_plain_values() -> None:
    made = epoch(3, total=1.0)
    again = Epoch(**made.plain())
    assert repr(again) == repr(made)  # NaN is not equal to itself


def test_no_epoch_is_a_head_alone() -> None:
    assert metrics_csv([]).count("\n") == 1
