"""A member: one trained model with all that is needed to predict, in two files.

`member.safetensors` holds weights, `member.json` everything else; the JSON is written last and
holds the hash of the weights, so a member without it, or with other weights, is no member.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.errors import SchemaError, first_line
from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.inference import Inferred, infer
from bagscope.mil.objectives.fitted import FittedObjective
from bagscope.mil.ood import OodReference
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes.registry import build_model
from bagscope.mil.sources import BagSource
from bagscope.mil.statistics import FeatureStatistics, Scale, scale_of
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.optimisation import Weights
from bagscope.mil.versions import versions
from bagscope.specs import parse_spec

WEIGHTS_NAME = "member.safetensors"
FACTS_NAME = "member.json"
SCHEMA_VERSION = 1
_NEEDED = (
    "recipe", "targets", "objective", "temperatures", "uncalibrated", "thresholds", "seed", "epoch",
    "epochs", "fields", "weights_sha256",
)  # fmt: skip
_MODEL, _STATISTICS, _OOD = "model.", "statistics.", "ood."


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A trained model.

    Attributes:
        statistics: of the training features.
        ood: what is usual among the training bags; None where nobody looked.
        temperatures: by target, where the inner validation part was large enough.
        uncalibrated: why a target has no temperature.
        thresholds: of the last of two classes, by target.
        unchosen: why a target's threshold is ½ and not a chosen one.
        seed: that it was trained with.
        epoch: whose weights these are.
        epochs: that were trained.
        fields: what the fingerprint is made of.
    """

    recipe: TrainSpec
    targets: tuple[TargetSpec, ...]
    objective: FittedObjective
    weights: Weights
    statistics: FeatureStatistics
    ood: OodReference | None = None
    temperatures: Mapping[str, float] = field(default_factory=dict)
    uncalibrated: Mapping[str, str] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    unchosen: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    epoch: int = 0
    epochs: int = 0
    fields: Mapping[str, Json] = field(default_factory=dict)

    @property
    def features(self) -> int:
        """Return the width of a tile's vector."""
        return len(self.statistics.mean)

    @property
    def scale(self) -> Scale | None:
        """Return what tiles are brought to before the model sees them; None for nothing."""
        return scale_of(self.statistics) if self.recipe.bags.standardise else None

    def infer(self, source: BagSource, device: torch.device | str = "cpu") -> Inferred:
        """Return the member's logits and embedding of every case."""
        return infer(
            self.model(device),
            source,
            self.recipe.bags,
            device=device,
            precision=self.recipe.training.precision,
            scale=self.scale,
        )

    def model(self, device: torch.device | str = "cpu") -> Aggregator:
        """Return the model, ready to predict."""
        model = build_model(self.recipe, self.features, self.objective.outputs)
        model.load_state_dict(dict(self.weights))
        return model.to(device).eval()

    def predictions(self, logits: NDArray[np.float64]) -> dict[str, Any]:
        """Return calibrated predictions of logits (n, C), by target."""
        return self.objective.predictions(logits, self.temperatures)


def save_member(member: Member, folder: Path) -> str:
    """Write a member into a folder; return the hash of its weights."""
    with artifacts.atomic_file(folder / WEIGHTS_NAME) as temporary:
        tensors = {
            **{f"{_MODEL}{name}": tensor for name, tensor in member.weights.items()},
            **{f"{_STATISTICS}{name}": t for name, t in member.statistics.tensors().items()},
            **{
                f"{_OOD}{name}": t
                for name, t in (member.ood.tensors() if member.ood else {}).items()
            },
        }
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(kept, temporary)
    artifacts.step("weights-written")
    digest = artifacts.sha256_of_file(folder / WEIGHTS_NAME)
    facts = {
        "schema_version": SCHEMA_VERSION,
        "recipe": member.recipe.model_dump(mode="json"),
        "targets": [target.model_dump(mode="json") for target in member.targets],
        "objective": member.objective.to_json(),
        "temperatures": dict(member.temperatures),
        "uncalibrated": dict(member.uncalibrated),
        "thresholds": dict(member.thresholds),
        "unchosen": dict(member.unchosen),
        "seed": member.seed,
        "epoch": member.epoch,
        "epochs": member.epochs,
        "fields": dict(member.fields),
        "fingerprint": artifacts.fingerprint(member.fields),
        "weights_sha256": digest,
        "versions": versions(),
    }
    artifacts.write_json(folder / FACTS_NAME, facts)
    return digest


def read_facts(folder: Path) -> dict[str, Json] | None:
    """Return what a member's JSON says; None where there is no finished member.

    Raises:
        SchemaError: it is damaged, or of a newer bagscope.
    """
    path = folder / FACTS_NAME
    if not path.exists():
        return None
    facts = artifacts.read_json(path)
    if not isinstance(facts, dict) or "schema_version" not in facts:
        raise SchemaError(f"{path}: is no member of a model; train it anew")
    if facts["schema_version"] > SCHEMA_VERSION:
        raise SchemaError(
            f"{path}: schema version {facts['schema_version']} is newer than {SCHEMA_VERSION}, the "
            "newest that this bagscope reads; update bagscope"
        )
    if lacking := [name for name in _NEEDED if name not in facts]:
        raise SchemaError(f"{path}: lacks {', '.join(lacking)}; train it anew")
    return facts


def load_member(folder: Path) -> Member:
    """Read a member.

    Raises:
        SchemaError: no finished member there, or its weights are not those that were written.
    """
    facts = read_facts(folder)
    if facts is None:
        raise SchemaError(f"{folder}: holds no finished member; run bagscope train again")
    path = folder / WEIGHTS_NAME
    if not path.exists() or artifacts.sha256_of_file(path) != facts["weights_sha256"]:
        raise SchemaError(f"{path}: missing, or changed since it was written; train it anew")
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception as error:  # the library's own error is not part of its interface
        raise SchemaError(f"{path}: can't be read ({first_line(error)}); train it anew") from error
    where = str(folder / FACTS_NAME)
    usual = _under(_OOD, tensors)
    return Member(
        recipe=parse_spec(TrainSpec, facts["recipe"], where=where),
        targets=_targets(facts["targets"], where),
        objective=FittedObjective.from_json(facts["objective"]),
        weights=_under(_MODEL, tensors),
        statistics=FeatureStatistics.of_tensors(_under(_STATISTICS, tensors)),
        ood=OodReference.of_tensors(usual) if usual else None,
        temperatures=facts["temperatures"],
        uncalibrated=facts["uncalibrated"],
        thresholds=facts["thresholds"],
        unchosen=facts.get("unchosen", {}),
        seed=facts["seed"],
        epoch=facts["epoch"],
        epochs=facts["epochs"],
        fields=facts["fields"],
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> Weights:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _targets(values: Sequence[Mapping[str, Any]], where: str) -> tuple[TargetSpec, ...]:
    return tuple(parse_spec(TargetSpec, value, where=where) for value in values)
