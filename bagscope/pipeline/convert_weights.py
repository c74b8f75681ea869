"""A published checkpoint → a bundle that predicts as its authors' model does. Light to import.

What a checkpoint does not hold is never made up: there are no statistics of training features, so
no case is flagged as unlike them; no calibration, and the threshold is one half; and where the
features come from is what the user says of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.errors import ConfigError
from bagscope.specs import parse_spec

if TYPE_CHECKING:
    from bagscope.mil.feature_origin import FeatureOrigin
    from bagscope.mil.member import Member
    from bagscope.mil.objectives.fitted import AnyCriterion, FittedObjective
    from bagscope.mil.originals.shapes import Fitted
    from bagscope.mil.targets import TargetSpec

STAGE = "convert-weights"
NUMERICS = 1
"""Raised by hand, with a changelog line, when the same checkpoint would become other weights."""
SUFFIX = ".bagscope"
MEMBER_NAME = "converted"
HALF = 0.5
LABEL = "label"
"""The column of labels where none is named."""

WeightTask = Literal["classes", "multilabel", "survival"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsRequest:
    """What is to be converted, as asked for.

    Attributes:
        checkpoint: a file of safetensors, or of what `torch.save` wrote.
        out: the bundle.
        classes: a name for each logit, in order; of two, the last is the positive. None of
            survival.
        source: the original; recognised by its tensors if None.
        target: what the classes are of: a column of labels; of survival, a name.
        task: whether a bag has one of the classes, or any of them, or a risk.
        time: of survival, the column of the follow-up time.
        event: of survival, the column of the event.
        edges: of survival in bins, where the bins of the training begin and end, in the unit of
            the time: one more than there are logits. Cox's single logit has none.
        features: of the kind that the model was trained on; says all that follows.
        encoder: of the training features; unknown if None.
        mpp: requested of the training tiles; unknown if None.
        tile_px: of the training tiles; unknown if None.
        settings: options of the aggregator, over what is read and assumed.
        ignore: patterns of tensors that are left out.
        key: where in the checkpoint the state dict lies; found if None.
        overwrite: replace a bundle that was made otherwise.
    """

    checkpoint: Path
    out: Path
    classes: tuple[str, ...] = ()
    source: str | None = None
    target: str | None = None
    task: WeightTask = "classes"
    time: str | None = None
    event: str | None = None
    edges: tuple[float, ...] = ()
    features: Path | None = None
    encoder: str | None = None
    mpp: float | None = None
    tile_px: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    key: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBundle:
    """A conversion before anything is written.

    Attributes:
        fitted: the weights, in an aggregator of ours.
        member: the model.
        origin: of the features that it takes.
        notes: sentences that the user should see.
    """

    fitted: Fitted
    member: Member
    origin: FeatureOrigin
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedWeights:
    """A conversion: its plan, and whether the bundle is new or was there already."""

    planned: PlannedBundle
    path: Path
    is_new: bool


def plan_weights(request: WeightsRequest) -> PlannedBundle:
    """Read a checkpoint and say what would be made of it; write nothing.

    Raises:
        ConfigError: it can't be read, fits no original, or does not go with the options.
    """
    from bagscope.mil.originals import PARTS
    from bagscope.mil.originals.checkpoint import read_checkpoint, without
    from bagscope.mil.originals.shapes import fit, recognise

    if request.out.suffix != SUFFIX:
        raise ConfigError(f"--out is {request.out}; a bundle's name ends in {SUFFIX}")
    if problem := artifacts.portable_name_problem(request.out.stem):
        raise ConfigError(f"--out: the name {request.out.stem!r} {problem}; choose another")
    target = _target(request)
    tensors = without(read_checkpoint(request.checkpoint, request.key, PARTS), request.ignore)
    try:
        fitted = (
            recognise(tensors, request.settings)
            if request.source is None
            else fit(request.source, tensors, request.settings)
        )
    except ConfigError as error:
        raise ConfigError(f"{request.checkpoint}: {error}") from error
    _require_logits(fitted, target, request.edges)
    _require_numbers(fitted, request.checkpoint)
    origin = _origin(request, fitted.features)
    return PlannedBundle(
        fitted=fitted,
        member=_member(request, fitted, target, origin),
        origin=origin,
        notes=_notes(fitted, origin, request.settings),
    )


def convert_weights(request: WeightsRequest) -> ConvertedWeights:
    """Write the bundle of a checkpoint, if it is not there yet.

    Raises:
        ConfigError: as of `plan_weights`, or something else is there.
        FingerprintMismatch: another bundle is there.
    """
    from bagscope.mil.bundle import MemberPlace, load_bundle, write_bundle
    from bagscope.mil.member import save_member

    planned = plan_weights(request)
    out = request.out
    if out.exists() and not request.overwrite:
        if not artifacts.is_complete(out):
            raise ConfigError(
                f"{out}: is there and no bundle; choose another --out, or replace it with "
                "--overwrite"
            )
        stored = load_bundle(out).members.get(MEMBER_NAME)
        artifacts.require_same(
            {} if stored is None else stored.fields,
            planned.member.fields,
            what=str(out),
            remedy="choose another --out, or replace it with --overwrite",
        )
        return ConvertedWeights(planned=planned, path=out, is_new=False)
    with tempfile.TemporaryDirectory() as folder:
        save_member(planned.member, Path(folder))
        is_new = write_bundle(
            out,
            run=out.stem,
            per=planned.member.recipe.bags.per,
            origin=planned.origin,
            members=[(MemberPlace(name=MEMBER_NAME), Path(folder))],
        )
    return ConvertedWeights(planned=planned, path=out, is_new=is_new)


def _target(request: WeightsRequest) -> TargetSpec:
    from bagscope.mil.targets import TargetSpec

    values: dict[str, Any] = {"task": request.task, "classes": request.classes}
    if request.task == "survival":
        own = {"column": request.target or "", "time": request.time, "event": request.event}
    elif request.time or request.event or request.edges:
        raise ConfigError(
            f"--time, --event and --edges belong to survival, and --task is {request.task}; pass "
            "--task survival, or leave them out"
        )
    else:
        own = {"column": request.target or LABEL}
    return parse_spec(TargetSpec, {**values, **own}, where="options")


def _member(
    request: WeightsRequest, fitted: Fitted, target: TargetSpec, origin: FeatureOrigin
) -> Member:
    from bagscope.mil.member import Member
    from bagscope.mil.statistics import FeatureStatistics

    aggregator: dict[str, Json] = {"name": fitted.aggregator, "options": dict(fitted.options)}
    more: dict[str, Json] = {} if fitted.regime is None else {"regime": dict(fitted.regime)}
    if request.edges:
        more["edges"] = list(request.edges)
    reason = f"the weights came from {fitted.source} without cases to choose by"
    has_threshold = target.task == "classes" and len(target.classes) == 2
    return Member(
        recipe=fitted.recipe,
        targets=(target,),
        objective=_objective(target, request.edges),
        weights=dict(fitted.weights),
        statistics=FeatureStatistics.unknown(fitted.features),
        uncalibrated={target.name: reason},
        thresholds={target.name: HALF} if has_threshold else {},
        unchosen={target.name: reason} if has_threshold else {},
        fields={
            "stage": STAGE,
            "numerics": NUMERICS,
            "original": fitted.source,
            "checkpoint_sha256": artifacts.sha256_of_file(request.checkpoint),
            "key": request.key,
            "ignored": list(request.ignore),
            "aggregator": aggregator,
            **more,
            "target": target.model_dump(mode="json"),
            "features": origin.to_json(),
        },
    )


def _objective(target: TargetSpec, edges: tuple[float, ...]) -> FittedObjective:
    """Return how logits are read, of an objective that has seen no labels."""
    from bagscope.mil.objectives.classes import ClassesCriterion
    from bagscope.mil.objectives.cox import CoxCriterion
    from bagscope.mil.objectives.discrete_time import DiscreteTimeCriterion
    from bagscope.mil.objectives.fitted import FittedObjective
    from bagscope.mil.objectives.multilabel import MultilabelCriterion
    from bagscope.mil.objectives.spec import ObjectiveSpec

    def read_by(criterion: AnyCriterion, **spec: Any) -> FittedObjective:
        return FittedObjective(targets=(target,), spec=ObjectiveSpec(**spec), criteria=(criterion,))

    if target.task == "survival" and not edges:
        return read_by(CoxCriterion(), survival="cox")
    if target.task == "survival":
        criterion = DiscreteTimeCriterion(form="nll", alpha=0.0, edges=edges)
        return read_by(criterion, bins=len(edges) - 1)
    alike = (1.0,) * len(target.classes)
    plain: dict[str, Any] = {"classes": target.classes, "smoothing": 0.0, "gamma": 0.0}
    if target.task == "classes":
        return read_by(ClassesCriterion(weights=alike, **plain))
    return read_by(MultilabelCriterion(weights_if_absent=alike, weights_if_present=alike, **plain))


def _require_logits(fitted: Fitted, target: TargetSpec, edges: tuple[float, ...]) -> None:
    if target.task == "survival":
        _require_bins(fitted, edges)
        return
    if fitted.outputs == 1 and target.task == "classes":
        raise ConfigError(
            f"{fitted.source}: the weights give one logit, which says whether a single class is "
            "there; pass --task multilabel and its name as --classes"
        )
    if fitted.outputs != len(target.classes):
        raise ConfigError(
            f"{fitted.source}: the weights give {fitted.outputs} logits, and --classes names "
            f"{len(target.classes)} ({', '.join(target.classes) or 'none'}); name one for each, in "
            "the order of the training"
        )


def _require_bins(fitted: Fitted, edges: tuple[float, ...]) -> None:
    """Refuse logits of survival that are not one for each bin of time, or Cox's single one."""
    wanted = fitted.outputs + 1 if fitted.outputs > 1 else 0
    if len(edges) != wanted:
        needs = (
            f"{fitted.outputs} logits, the hazards of as many bins of time, which have {wanted} "
            "edges; pass those of the training, in the unit of --time"
            if wanted
            else "one logit, a risk by Cox, which has no bins of time; leave --edges out"
        )
        raise ConfigError(
            f"{fitted.source}: --edges names {len(edges)}, and the weights give {needs}"
        )
    if any(high <= low for low, high in pairwise(edges)):
        raise ConfigError(
            f"--edges are {', '.join(f'{edge:g}' for edge in edges)}, which do not rise; give "
            "them from the first to the last"
        )


def _require_numbers(fitted: Fitted, checkpoint: Path) -> None:
    broken = [name for name, tensor in fitted.weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ConfigError(
            f"{checkpoint}: {', '.join(broken[:3])} hold values that are no finite numbers; get "
            "the checkpoint again, or an earlier one of the training"
        )


def _origin(request: WeightsRequest, width: int) -> FeatureOrigin:
    """Return where the features come from that a model takes, as far as anybody says."""
    from bagscope.features.encoders.registry import encoder_specs
    from bagscope.features.feature_file import UNKNOWN
    from bagscope.features.store import FeatureStore
    from bagscope.mil.feature_origin import FeatureOrigin, origin_of

    if request.features is not None:
        others = {
            "--encoder": request.encoder,
            "--mpp": request.mpp,
            "--tile-px": request.tile_px,
        }
        if said := [name for name, value in others.items() if value is not None]:
            raise ConfigError(f"--features says all of the features; leave {said[0]} out")
        store = FeatureStore.open(request.features)
        origin = origin_of(store.record(slide_id) for slide_id in store.slide_ids)
        what = f"--features {request.features}"
    else:
        origin = FeatureOrigin(
            encoder={"name": request.encoder or UNKNOWN},
            weights_sha256=UNKNOWN,
            dimension=width,
            mpp=() if request.mpp is None else (request.mpp,),
            tile_px=() if request.tile_px is None else (request.tile_px,),
            mpp_effective=None,
        )
        spec = encoder_specs().get(origin.name)
        what = f"--encoder {origin.name}"
        if spec is not None and spec.dimension != width:
            raise ConfigError(_other_width(request.checkpoint, width, what, spec.dimension))
    if origin.dimension != width:
        raise ConfigError(_other_width(request.checkpoint, width, what, origin.dimension))
    return origin


def _other_width(checkpoint: Path, width: int, what: str, found: int) -> str:
    return (
        f"{checkpoint}: takes vectors of {width} numbers, and those of {what} have {found}; name "
        "the encoder that the model was trained on"
    )


def _notes(fitted: Fitted, origin: FeatureOrigin, settings: Mapping[str, Any]) -> tuple[str, ...]:
    from bagscope.features.feature_file import UNKNOWN

    notes = []
    if fitted.assumed:
        notes.append(
            f"not in the weights, and answers depend on it: {_listed(fitted, fitted.assumed)}; "
            "compare with the original's settings, and change with --set"
        )
    known = {*fitted.told, *fitted.assumed, *settings}
    if idle := [name for name in fitted.options if name not in known]:
        notes.append(f"not in the weights, and of no effect on answers: {_listed(fitted, idle)}")
    notes.append(
        "the training features are not known: no case will be flagged as unlike them, chances are "
        "not calibrated, and the threshold is ½"
    )
    if origin.weights_sha256 == UNKNOWN:
        notes.append(
            f"the training features are of encoder {origin.name} with unknown weights: where "
            f"yours are of the same kind, say so with bagscope predict --assume {origin.name}"
        )
    return tuple(notes)


def _listed(fitted: Fitted, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {fitted.options[name]}" for name in names)
