"""What a table of predictions says of each case, in words for a picture."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseCaption:
    """A case's prediction.

    Attributes:
        text: predictions and labels of all targets, empty where there is no table.
        predicted: the predicted class, of a single target with classes.
    """

    text: str = ""
    predicted: str | None = None


def read_captions(table: Path) -> Mapping[str, CaseCaption]:
    """Return each case's caption; cases that the table lacks have an empty one.

    Several rows of a case, of repeats and seeds, are averaged.
    """
    captions: dict[str, CaseCaption] = defaultdict(CaseCaption)
    if not table.is_file():
        return captions
    rows: dict[str, list[dict[str, str]]] = {}
    with table.open(encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            rows.setdefault(row["case_id"], []).append(row)
    for case_id, found in rows.items():
        columns = list(found[0])
        targets = [c.removesuffix("_predicted") for c in columns if c.endswith("_predicted")]
        said = [_target_text(name, columns, found) for name in targets]
        risks = [c for c in columns if c.endswith("_risk")]
        texts = [text for text, _ in said]
        texts += [f"{c.removesuffix('_risk')}: risk {_mean(found, c):.3g}" for c in risks]
        captions[case_id] = CaseCaption(
            text=" · ".join(texts), predicted=said[0][1] if len(said) == 1 else None
        )
    return captions


def _target_text(
    name: str, columns: Sequence[str], rows: Sequence[Mapping[str, str]]
) -> tuple[str, str | None]:
    """Return what is said of a target, and the predicted class where it has classes."""
    prefix = f"{name}_p_"
    means = {c.removeprefix(prefix): _mean(rows, c) for c in columns if c.startswith(prefix)}
    label = rows[0].get(name, "")
    known = f", labelled {label}" if label else ""
    if not means:
        return f"{name}: predicted {_mean(rows, f'{name}_predicted'):.4g}{known}", None
    own = {row[f"{name}_predicted"] for row in rows}
    predicted = own.pop() if len(own) == 1 else max(means, key=lambda one: means[one])
    listed = ", ".join(f"{one} {value:.2f}" for one, value in means.items())
    return f"{name}: predicted {predicted} ({listed}){known}", predicted


def _mean(rows: Sequence[Mapping[str, str]], column: str) -> float:
    values = [float(row[column]) for row in rows if row[column]]
    return sum(values) / len(values) if values else float("nan")
