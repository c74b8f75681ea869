"""What a split is: a spec that asks for one, and the plan that answers.

Every split has three sides. `train` teaches; `val` is the inner validation part, carved from what
would else be training, and chooses epoch, threshold and calibration; `test` is only ever asked at
the end. A patient is on one side of a split, whatever else happens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from bagscope.artifacts import Json, fingerprint
from bagscope.mil.cases import CaseTable, Per
from bagscope.mil.targets import TargetSpec, is_missing
from bagscope.specs import Spec

DEFAULT_NAME = "default"
"""Of a study's splits."""

Method = Literal["kfold", "monte_carlo", "fixed", "site_out", "site_preserving"]
Side = Literal["train", "val", "test"]
SIDES: tuple[Side, ...] = ("train", "val", "test")

# Which options a method makes use of, beside `SHARED_OPTIONS`.
_USED: Mapping[str, frozenset[str]] = {
    "kfold": frozenset({"folds", "repeats"}),
    "monte_carlo": frozenset({"repeats", "test_share"}),
    "fixed": frozenset({"file"}),
    "site_out": frozenset(),
    "site_preserving": frozenset({"folds"}),
}
_OPTIONAL = frozenset().union(*_USED.values())
SHARED_OPTIONS = ("val_share", "seed", "stratify")
"""Options that every method makes use of."""


class SplitSpec(Spec):
    """How cases are put on sides."""

    method: Method = Field(
        default="kfold",
        description="kfold, monte_carlo, fixed (the table's column split, or a file), site_out "
        "(each site tested once) or site_preserving (folds of whole sites)",
    )
    folds: int = Field(default=5, ge=2, description="of kfold and site_preserving")
    repeats: int = Field(default=1, ge=1, description="of kfold; draws of monte_carlo")
    test_share: float = Field(
        default=0.2, gt=0, lt=1, description="of the patients that monte_carlo tests on"
    )
    val_share: float = Field(
        default=0.2, ge=0, lt=1, description="of the training patients that choose, not teach"
    )
    seed: int = Field(default=0, ge=0, description="other seeds give other splits")
    file: str | None = Field(
        default=None, description="table of case_id, patient_id or slide_id, and split, for fixed"
    )
    stratify: bool = Field(default=True, description="keep the classes' shares on every side")

    @model_validator(mode="after")
    def _nothing_ignored(self) -> SplitSpec:
        ignored = sorted((self.model_fields_set & _OPTIONAL) - _USED[self.method])
        ignored = [name for name in ignored if getattr(self, name) is not None]
        if ignored:
            raise ValueError(f"{self.method} makes no use of {', '.join(ignored)}; leave it out")
        return self

    def as_json(self) -> dict[str, Json]:
        """Return the options that matter; a file by its name alone."""
        unused = _OPTIONAL - _USED[self.method]
        values = self.model_dump(mode="json", exclude=set(unused))
        if self.file is not None:
            values["file"] = Path(self.file).name
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One division of the cases; each side holds case ids in order of name.

    Attributes:
        repeat: which round of folds, or which draw.
        fold: within the repeat.
        site: the site that is held out; empty where the method does not hold out one.
    """

    repeat: int = 0
    fold: int = 0
    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    site: str = ""

    @property
    def name(self) -> str:
        """Return what the split is called in files."""
        return f"r{self.repeat}_f{self.fold}"

    def sides(self) -> Iterator[tuple[Side, tuple[str, ...]]]:
        """Yield each side and its cases."""
        for side in SIDES:
            yield side, self.of(side)

    def of(self, side: Side) -> tuple[str, ...]:
        """Return the cases of one side."""
        cases: Any = getattr(self, side)
        return tuple(cases)

    def restricted_to(self, case_ids: Collection[str]) -> Split:
        """Return the split with the named cases alone."""
        kept = {side: tuple(c for c in cases if c in case_ids) for side, cases in self.sides()}
        return replace(self, **kept)  # type: ignore[arg-type]  # the sides' names are fields


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPlan:
    """All splits of a cohort.

    Attributes:
        splits: in order of repeat and fold.
        spec: that they were made by.
        patient_of: the patient of every case, by case id.
        per: what a case is.
        targets: that the cases were labelled with, classes resolved; the first one stratifies.
        labels: fingerprint of the labels that were split (see `labels_fingerprint`).
        notes: sentences that the user should see.
    """

    splits: tuple[Split, ...]
    spec: SplitSpec
    patient_of: Mapping[str, str]
    per: Per | None = None
    targets: tuple[TargetSpec, ...] = ()
    labels: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def case_ids(self) -> tuple[str, ...]:
        """Return every case, in order of name."""
        return tuple(sorted(self.patient_of))

    def restricted_to(self, case_ids: Collection[str]) -> SplitPlan:
        """Return the plan without the other cases, such as those that have no features."""
        kept = frozenset(case_ids)
        return replace(
            self,
            splits=tuple(split.restricted_to(kept) for split in self.splits),
            patient_of={c: patient for c, patient in self.patient_of.items() if c in kept},
        )


def labels_fingerprint(table: CaseTable) -> str:
    """Return the fingerprint of who the cases are and what labels they have, in any order."""
    return fingerprint(
        {
            case.case_id: {
                "patient": case.patient_id,
                "site": case.site,
                "slides": sorted(case.slide_ids),
                "targets": {
                    name: None if is_missing(value) else list(value)
                    for name, value in case.targets.items()
                },
            }
            for case in table.cases
        }
    )
