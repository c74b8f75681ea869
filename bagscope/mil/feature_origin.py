"""Where features come from, and whether a model may be asked about them.

Features that were imported say `unknown` where their source said nothing. Unknown matches only the
same source (layout, and what it called the encoder), or what the user vouches for with `--assume`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from bagscope.artifacts import Json, canonical_json, differing_fields
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.feature_file import UNKNOWN
from bagscope.features.store import SlideRecord

EFFECTIVE_TOLERANCE = 0.02
"""How far effective mpp may lie outside those that a model was trained on."""
_SAME = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureOrigin:
    """Where the features of several slides come from.

    Attributes:
        encoder: its spec, or what an import knows of it.
        weights_sha256: of its weights, or "unknown".
        dimension: of a tile's vector.
        mpp: every requested one, rising; empty where unknown.
        tile_px: every tile edge, rising; empty where unknown.
        mpp_effective: the lowest and the highest; None where unknown.
    """

    encoder: Mapping[str, Json]
    weights_sha256: str
    dimension: int
    mpp: tuple[float, ...]
    tile_px: tuple[int, ...]
    mpp_effective: tuple[float, float] | None

    @property
    def name(self) -> str:
        """Return the encoder's name, or "unknown"."""
        return str(self.encoder.get("name", UNKNOWN))

    def to_json(self) -> dict[str, Json]:
        """Return the fields as plain JSON."""
        return {
            "encoder": dict(self.encoder),
            "weights_sha256": self.weights_sha256,
            "dimension": self.dimension,
            "mpp": list(self.mpp),
            "tile_px": list(self.tile_px),
            "mpp_effective": None if self.mpp_effective is None else list(self.mpp_effective),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FeatureOrigin:
        """Return what `to_json` wrote."""
        effective = values["mpp_effective"]
        return cls(
            encoder=values["encoder"],
            weights_sha256=values["weights_sha256"],
            dimension=values["dimension"],
            mpp=tuple(values["mpp"]),
            tile_px=tuple(values["tile_px"]),
            mpp_effective=None if effective is None else (effective[0], effective[1]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What came of comparing a slide's features with those of a training.

    Attributes:
        fault: why the model may not be asked, in one sentence without the slide; empty if it may.
        of_encoder: whether the fault is the encoder's, and so all slides'.
        assumed: fields that are unknown and were taken as the model's on the user's word.
    """

    fault: str = ""
    of_encoder: bool = False
    assumed: tuple[str, ...] = ()


def origin_of(records: Iterable[SlideRecord]) -> FeatureOrigin:
    """Return where the features of slides of one store come from."""
    listed = list(records)
    first = listed[0]

    def values(name: str) -> set[float]:
        found = (_number(record.attributes.get(name)) for record in listed)
        return {number for number in found if number is not None}

    effective = values("mpp_effective")
    return FeatureOrigin(
        encoder=dict(first.encoder),
        weights_sha256=first.weights_sha256,
        dimension=first.shape[1],
        mpp=tuple(sorted(values("mpp"))),
        tile_px=tuple(sorted(int(number) for number in values("tile_px"))),
        mpp_effective=(min(effective), max(effective)) if effective else None,
    )


def compare(trained: FeatureOrigin, record: SlideRecord, assume: str | None = None) -> Comparison:
    """Compare a slide's features with those that a model was trained on.

    Args:
        trained: what the model was trained on.
        record: of the slide.
        assume: the encoder that unknown features are vouched to be of.
    """
    if record.shape[1] != trained.dimension:
        fault = f"dimension is {record.shape[1]}, the model's is {trained.dimension}"
        known = trained.name != UNKNOWN
        remedy = f"extract with {trained.name}" if known else "take features of the same encoder"
        return Comparison(fault=f"{fault}; {remedy}", of_encoder=True)
    fault, is_known = _encoder_fault(trained, record)
    if fault:
        return Comparison(fault=fault, of_encoder=True)
    same_source = not is_known and _is_same_source(trained, record)
    vouched = assume is not None and assume == trained.name
    remedy = f"pass --assume {trained.name} if they are the same"
    assumed: list[str] = []
    if not is_known and not same_source:
        if not vouched:
            return Comparison(
                fault=f"encoder is {_shown(record.encoder, record.weights_sha256)}, the model's is "
                f"{_shown(trained.encoder, trained.weights_sha256)}; {remedy}",
                of_encoder=True,
            )
        assumed.append("encoder")
    effective = trained.mpp_effective
    for name, wanted, text, tolerance in (
        ("tile_px", trained.tile_px, _listed(trained.tile_px), 0.0),
        ("mpp", trained.mpp, _listed(trained.mpp), _SAME),
        ("mpp_effective", effective or (), _range(effective), EFFECTIVE_TOLERANCE),
    ):
        found = _number(record.attributes.get(name))
        if found is None and not wanted:
            continue  # neither says anything: what is known of the encoder has to do
        if found is None or not wanted:
            if not vouched:
                shown = UNKNOWN if found is None else f"{found:g}"
                return Comparison(fault=f"{name} is {shown}, the model's is {text}; {remedy}")
            assumed.append(name)
        elif not _fits(found, wanted, tolerance, within=name == "mpp_effective"):
            return Comparison(
                fault=f"{name} is {found:g}, the model's is {text}; tile and extract as it was "
                "trained"
            )
    return Comparison(assumed=tuple(assumed))


def _encoder_fault(trained: FeatureOrigin, record: SlideRecord) -> tuple[str, bool]:
    """Return how two encoders contradict each other, and whether both are fully known."""
    names = str(record.encoder.get("name", UNKNOWN)), trained.name
    if UNKNOWN not in names and names[0] != names[1]:
        return f"encoder is {names[0]}, the model's is {names[1]}; extract with {names[1]}", False
    hashes = record.weights_sha256, trained.weights_sha256
    if UNKNOWN in (*names, *hashes):
        return "", False
    if hashes[0] != hashes[1]:
        return (
            f"weights_sha256 of {names[0]} is {hashes[0][:12]}…, the model's is {hashes[1][:12]}…; "
            "extract with the model's weights",
            True,
        )
    if different := differing_fields(_identity(record.encoder), _identity(trained.encoder)):
        field, found, wanted = different[0]
        return (
            f"encoder.{field} is {found}, the model's is {wanted}; extract with the model's",
            True,
        )
    return "", True


def _is_same_source(trained: FeatureOrigin, record: SlideRecord) -> bool:
    same_weights = trained.weights_sha256 == record.weights_sha256
    return same_weights and canonical_json(trained.encoder) == canonical_json(record.encoder)


def _identity(encoder: Mapping[str, Json]) -> Mapping[str, Json]:
    try:
        return EncoderSpec.model_validate(dict(encoder)).identity()
    except ValidationError:  # of another version, or a third party's own
        return encoder


def _fits(found: float, wanted: tuple[float, ...], tolerance: float, *, within: bool) -> bool:
    if within:
        return wanted[0] * (1 - tolerance) <= found <= wanted[1] * (1 + tolerance)
    return any(math.isclose(found, value, rel_tol=tolerance, abs_tol=0.0) for value in wanted)


def _shown(encoder: Mapping[str, Json], weights_sha256: str) -> str:
    name = str(encoder.get("name", UNKNOWN))
    if weights_sha256 != UNKNOWN:
        return name
    source = f"from {encoder['imported_from']} " if "imported_from" in encoder else ""
    stated = encoder.get("imported_as", UNKNOWN)
    return f"{name} (imported {source}as {stated}, weights unknown)"


def _listed(values: tuple[float, ...]) -> str:
    return " or ".join(f"{value:g}" for value in values) or UNKNOWN


def _range(values: tuple[float, float] | None) -> str:
    if values is None:
        return UNKNOWN
    low, high = values
    return f"{low:g}" if math.isclose(low, high) else f"{low:g} to {high:g}"


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
