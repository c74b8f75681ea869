"""What is asked of a model: its logits as numbers that people read, and the decision on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from bagscope.mil.evaluation.decisions import decide
from bagscope.mil.member import Member

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

NO_DECISION = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One target of a model.

    Attributes:
        columns: (A,) a name for each answer.
        read: logits (n, C) to answers (n, A), such as calibrated probabilities.
        decision: answers (n, A) to the column decided for (n,); None where nothing is decided, as
            of a risk.
    """

    columns: tuple[str, ...]
    read: Callable[[Array], Array]
    decision: Callable[[Array], Integers] | None = None

    def decided(self, answers: Array) -> Integers:
        """Return the column decided for, (n,), `NO_DECISION` where nothing is decided."""
        if self.decision is None:
            return np.full(len(answers), NO_DECISION)
        return self.decision(answers)


def probabilities(logits: Array) -> Array:
    """Return the softmax (n, C) of logits; of a single one, the chances (n, 2) of no and yes."""
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    return np.asarray(special.softmax(logits, axis=1))


def class_question(classes: Sequence[str], *, threshold: float | None = None) -> Question:
    """Return the question which class it is, answered by the softmax of the logits.

    Args:
        classes: in the order of the logits; two names for a single logit.
        threshold: of the last of two classes; without one the likeliest class is decided for.
    """
    return Question(
        columns=tuple(classes),
        read=probabilities,
        decision=lambda answers: decide(answers, threshold=threshold),
    )


def member_question(
    member: Member, target: str | None = None, *, threshold: float | None = None
) -> Question:
    """Return what a trained model is asked: calibrated predictions; of survival, the risk.

    Args:
        member: the model.
        target: by name; its first one where not given.
        threshold: of the last of two classes; the one chosen for the member where not given.

    Raises:
        ValueError: it has no such target.
    """
    named = {one.name: one for one in member.targets}
    name = member.targets[0].name if target is None else target
    if name not in named:
        raise ValueError(f"no target {name!r}; the model has {', '.join(named)}")
    spec = named[name]
    if threshold is None:
        threshold = member.thresholds.get(name)
    columns = member.objective.columns[name]
    if spec.task == "survival":
        columns = columns[:1]

    def read(logits: Array) -> Array:
        answers = np.asarray(member.predictions(logits)[name], np.float64)
        return answers.reshape(len(answers), -1)[:, : len(columns)]

    def decision(answers: Array) -> Integers:
        return decide(answers, threshold=threshold)

    return Question(
        columns=columns,
        read=read,
        decision=decision if spec.task in ("classes", "ordinal") else None,
    )
