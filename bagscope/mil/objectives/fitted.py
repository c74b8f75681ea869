"""Several targets side by side, and the terms beside the main loss.

total = Σ_k weight_k · mean_k,  the mean of term k over the bags that take part in it

Where a step is cut into batches, means are over the bags of the whole step, so that its batches'
totals add up to the step's.

bag        Σ over targets of weight_t · ℓ_t; a bag without a target's label takes no part in it
semantic   the same loss of every branch of `branch_logits`, averaged over the branches
entropy    see `entropy`; its weight is the schedule's
the rest   whatever else the aggregator reports in `losses`, averaged over all bags
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from bagscope.errors import ConfigError, SchemaError
from bagscope.mil.bags import BagOutput
from bagscope.mil.objectives.classes import ClassesCriterion
from bagscope.mil.objectives.cox import CoxCriterion
from bagscope.mil.objectives.criterion import Array, Criterion
from bagscope.mil.objectives.discrete_time import DiscreteTimeCriterion
from bagscope.mil.objectives.entropy import entropy_weight, negative_entropy
from bagscope.mil.objectives.multilabel import MultilabelCriterion
from bagscope.mil.objectives.ordinal import OrdinalCriterion
from bagscope.mil.objectives.regression import RegressionCriterion
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.targets import TargetSpec, width_of
from bagscope.specs import Spec

AnyCriterion = Annotated[
    ClassesCriterion
    | MultilabelCriterion
    | OrdinalCriterion
    | RegressionCriterion
    | DiscreteTimeCriterion
    | CoxCriterion,
    Field(discriminator="kind"),
]

OWN_TERMS = ("bag", "semantic", "entropy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Over how many bags means are taken: whole numbers without an axis.

    Attributes:
        bags: all of them.
        labelled: those with a label of any target.
        of_target: those with each target's label.
    """

    bags: Tensor
    labelled: Tensor
    of_target: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """What a batch costs.

    Attributes:
        total: scalar, to be differentiated.
        terms: (B,) by name for reports, unreduced, before weights, without a graph, zero where a
            bag takes no part: "bag", with several targets also "bag/<target>", and one entry per
            auxiliary. With labels missing, "bag" holds each target's part scaled so that its mean
            is the sum of the targets' means.
        present: (B,) bool by name, which bags take part; reports average over these.
        weights: by name, what each term's mean is multiplied by in the total; 0 for "bag/…".
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    present: Mapping[str, Tensor]
    weights: Mapping[str, float]

    def mean(self, name: str) -> Tensor:
        """Return a term's mean over the bags that take part, 0 where none does."""
        return _mean(self.terms[name], self.present[name])


class FittedObjective(Spec):
    """An objective that has seen the training cases' labels.

    Attributes:
        targets: with their classes.
        spec: the options.
        criteria: one per target, with all that its loss and its predictions need.
    """

    targets: tuple[TargetSpec, ...]
    spec: ObjectiveSpec
    criteria: tuple[AnyCriterion, ...]

    @property
    def outputs(self) -> int:
        """Return the number of logits of all targets."""
        return sum(self._widths)

    @property
    def slices(self) -> Mapping[str, slice]:
        """Return where each target's logits stand."""
        return slices_of(self.targets, self._widths)

    @property
    def columns(self) -> Mapping[str, tuple[str, ...]]:
        """Return a name for each column of each target's predictions."""
        return {
            target.name: criterion.columns
            for target, criterion in zip(self.targets, self.criteria, strict=True)
        }

    @property
    def needs_batch_of_bags(self) -> bool:
        """Return whether the loss compares the bags of a batch, which then must be many."""
        return any(isinstance(criterion, CoxCriterion) for criterion in self.criteria)

    def __call__(
        self,
        output: BagOutput,
        targets: Mapping[str, Tensor],
        *,
        progress: float,
        lengths: Tensor | None = None,
        step: Counts | None = None,
    ) -> Losses:
        """Return the losses of a batch while training.

        Args:
            output: of the aggregator, in training mode.
            targets: (B, w) float64 by name, NaN where missing.
            progress: share of the training that is done, from 0 to 1, for schedules.
            lengths: (B,) tiles of each bag; only `entropy.per_log_n` needs them.
            step: of the bags of which the batch is a part; of the batch itself if None.

        Raises:
            ConfigError: a weight for a term that isn't there, or entropy of an aggregator that
                reports none.
        """
        everyone = torch.ones(len(output.logits), dtype=torch.bool, device=output.logits.device)
        counts = self.counts(targets) if step is None else step
        terms, present = self._main(self.criteria, output.logits, targets, counts)
        weights = dict.fromkeys(terms, 0.0) | {"bag": self._weight("bag")}
        if output.branch_logits is not None:
            terms["semantic"] = self._semantic(output.branch_logits, targets, counts)
            present["semantic"] = present["bag"]
            weights["semantic"] = self._weight("semantic")
        for name, term in output.losses.items():
            if name in terms or name in OWN_TERMS:
                raise ValueError(f"the aggregator names a loss {name!r}, a name that is taken")
            terms[name], present[name], weights[name] = term, everyone, self._weight(name)
        self._refuse_unknown_terms([name for name in terms if not name.startswith("bag/")])
        if self.spec.entropy.is_on:
            terms["entropy"] = negative_entropy(self.spec.entropy, output, lengths)
            present["entropy"] = everyone
            weights["entropy"] = entropy_weight(self.spec.entropy, progress)
        of_labelled = ("bag", "semantic")
        weighted = [
            weights[name]
            * _sum(terms[name], present[name])
            / (counts.labelled if name in of_labelled else counts.bags).clamp(min=1)
            for name in terms
            if weights[name] or name == "bag"
        ]
        return Losses(
            total=torch.stack(weighted).sum(),
            terms={name: term.detach() for name, term in terms.items()},
            present=present,
            weights=weights,
        )

    def counts(self, targets: Mapping[str, Tensor]) -> Counts:
        """Return how many bags have their labels, of rows (n, w) by target, NaN where missing."""
        has = torch.stack([~rows_of(targets, one).isnan().any(1) for one in self.targets])
        return Counts(
            bags=torch.tensor(has.shape[1]),
            labelled=has.any(0).sum(),
            of_target=tuple(has.sum(1)),
        )

    def validation_loss(self, logits: Tensor, targets: Mapping[str, Tensor]) -> float:
        """Return the main loss of a whole part at once, in float64.

        The weighted sum over targets of the mean over labelled cases, with class weights, without
        auxiliary terms, label smoothing and focus, so that it can be compared between recipes and
        epochs. A target that these cases say nothing of (no label; of Cox, no event with another
        case at risk) is left out of the sum; the loss is NaN where that leaves none.

        Args:
            logits: (n, C).
            targets: (n, w) by name, NaN where missing.
        """
        found = []
        with torch.no_grad():
            parts = self._parts(
                [criterion.plain() for criterion in self.criteria], logits.double(), targets
            )
            for target, criterion, labels, loss, has in parts:
                if criterion.is_telling(labels, has):
                    found.append(target.weight * float(_mean(loss, has)))
        return sum(found) if found else float("nan")

    def predictions(
        self, logits: NDArray[Any], temperatures: Mapping[str, float] | None = None
    ) -> dict[str, Array]:
        """Return what is reported of logits (n, C), by target, in float64.

        classes and ordinal: probabilities (n, k). multilabel: (n, L). regression: values (n,) in
        the label's units. survival: (n, 1 + bins), the risk and the survival at the upper edge of
        each bin; of Cox (n, 1), the linear predictor. `columns` names them.

        Args:
            logits: (n, C).
            temperatures: by target, what its logits are divided by; 1 where not given.

        Raises:
            ValueError: a temperature of no target, of one without probabilities, or not above 0.
        """
        given = dict(temperatures or {})
        rows = np.asarray(logits, dtype=np.float64)
        _require_width(rows.shape, self.outputs)
        found = {}
        for target, criterion in zip(self.targets, self.criteria, strict=True):
            temperature = given.pop(target.name, 1.0)
            if not temperature > 0:
                raise ValueError(f"temperature of {target.name} is {temperature}; it is above 0")
            if temperature != 1 and not criterion.is_tempered:
                raise ValueError(f"{target.name} has no probabilities that a temperature changes")
            found[target.name] = criterion.predict(rows[:, self.slices[target.name]] / temperature)
        if given:
            raise ValueError(f"temperatures of no target: {', '.join(sorted(given))}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FittedObjective:
        """Return what `to_json` wrote; its predictions are the same bits.

        Raises:
            SchemaError: not what `to_json` writes.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "as a whole"
            raise SchemaError(
                f"stored objective: {where}: {first['msg']}; the file is damaged, or of another "
                "version; train again"
            ) from error

    @property
    def _widths(self) -> tuple[int, ...]:
        return tuple(
            type(criterion).outputs_of(target, self.spec)
            for target, criterion in zip(self.targets, self.criteria, strict=True)
        )

    def _weight(self, term: str) -> float:
        return self.spec.terms.get(term, 1.0)

    def _main(
        self,
        criteria: Sequence[Criterion],
        logits: Tensor,
        targets: Mapping[str, Tensor],
        counts: Counts,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the main terms and who takes part in them, (B,) by name."""
        parts = self._parts(criteria, logits, targets)
        has_any = torch.stack([has for *_, has in parts]).any(0)
        labelled = counts.labelled.to(parts[0][3].dtype)
        shares = [
            target.weight * loss * (labelled / count.clamp(min=1))
            for (target, _, _, loss, _), count in zip(parts, counts.of_target, strict=True)
        ]
        bags = torch.stack(shares).sum(0)
        terms, present = {"bag": bags}, {"bag": has_any}
        if len(parts) > 1:
            for target, _, _, loss, has in parts:
                terms[f"bag/{target.name}"], present[f"bag/{target.name}"] = loss, has
        return terms, present

    def _semantic(
        self, branch_logits: Tensor, targets: Mapping[str, Tensor], counts: Counts
    ) -> Tensor:
        """Return the mean over branches of the main loss, (B,) of logits (B, M, C)."""
        if self.needs_batch_of_bags:
            each = [
                self._main(self.criteria, logits, targets, counts)[0]["bag"]
                for logits in branch_logits.unbind(1)
            ]
            return torch.stack(each).mean(0)
        # Bags are judged one by one, so the branches can be so many more of them.
        bags, branches = branch_logits.shape[:2]
        rows = {name: rows.repeat_interleave(branches, 0) for name, rows in targets.items()}
        losses = self._main(self.criteria, branch_logits.flatten(0, 1), rows, counts)[0]["bag"]
        return losses.view(bags, branches).mean(1)

    def _parts(
        self, criteria: Sequence[Criterion], logits: Tensor, targets: Mapping[str, Tensor]
    ) -> Sequence[tuple[TargetSpec, Criterion, Tensor, Tensor, Tensor]]:
        """Return target, criterion, labels (B, w) without NaN, loss (B,), and who has a label."""
        _require_width(tuple(logits.shape), self.outputs)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        slices, found = self.slices, []
        for target, criterion in zip(self.targets, criteria, strict=True):
            labels = rows_of(targets, target)
            has = ~labels.isnan().any(1)
            labels = torch.where(has[:, None], labels, 0.0)
            loss = criterion.loss(logits[:, slices[target.name]], labels, has)
            found.append((target, criterion, labels, torch.where(has, loss, 0.0), has))
        return found

    def _refuse_unknown_terms(self, known: Sequence[str]) -> None:
        unknown = sorted(set(self.spec.terms) - set(known))
        if unknown:
            raise ConfigError(
                f"objective: terms gives a weight to {', '.join(unknown)}, and this aggregator has "
                f"no such term for these targets (there are: {', '.join(sorted(known))}); correct "
                "the name, or leave it out"
            )


def slices_of(targets: Sequence[TargetSpec], widths: Sequence[int]) -> Mapping[str, slice]:
    """Return where each target's logits stand, side by side in order."""
    borders = pairwise(accumulate(widths, initial=0))
    return {target.name: slice(*pair) for target, pair in zip(targets, borders, strict=True)}


def rows_of(values: Mapping[str, Any], target: TargetSpec) -> Any:
    """Return a target's label rows (n, w)."""
    rows = values.get(target.name)
    if rows is None:
        there = ", ".join(values) or "none"
        raise ValueError(f"no label rows of target {target.name!r} (there are: {there})")
    if rows.ndim != 2 or rows.shape[1] != width_of(target):
        raise ValueError(
            f"label rows of {target.name} have shape {tuple(rows.shape)}; they are "
            f"(n, {width_of(target)})"
        )
    return rows


def _require_width(shape: tuple[int, ...], outputs: int) -> None:
    if len(shape) != 2 or shape[1] != outputs:
        raise ValueError(f"logits have shape {tuple(shape)}; the objective has {outputs} outputs")


def _sum(term: Tensor, present: Tensor) -> Tensor:
    return torch.where(present, term, 0.0).sum()


def _mean(term: Tensor, present: Tensor) -> Tensor:
    return _sum(term, present) / present.sum().clamp(min=1)
