"""The score file: what members say of a slide and of each of its tiles, for heatmaps and tables.

One HDF5 per slide, sealed like every file of ours. It holds the members' logits of the case,
so predictions are made of it without the features; datasets and attributes are listed in
docs/formats.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import h5py
import numpy as np
from numpy.typing import NDArray

from bagscope import __version__
from bagscope.artifacts import (
    SEAL_BLANK,
    Json,
    atomic_file,
    canonical_json,
    fingerprint,
    seal_file,
    seal_holds,
    step,
)
from bagscope.errors import ArtifactError, SchemaError
from bagscope.mil.bags import ScoreKind
from bagscope.wsi.hdf5_image import SparseImage

SCHEMA = "bagscope.scores"
SCHEMA_VERSION = 2
_ARRAYS = (
    "scores", "coords", "grid", "logits", "embedding", "ood_distance",
    "member_scores", "contributions", "contribution_bias",
    "rollout",
)  # fmt: skip
_FAITHFULNESS = "faithfulness"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreFile:
    """What members say of a slide; what version 1 did not hold is None.

    Attributes:
        slide_id: whose tiles these are.
        case_id: whose bag they were in; of a patient, other slides' tiles were in it too.
        fields: what the fingerprint is made of.
        members: names of those that were asked.
        scores: (n, K) float32, the mean over the members (see `prediction.mean_scores`).
        score_kind: what a score is; a log weight's weights add up to 1 over the bag.
        score_names: (K,) what each column is of: a class, or a number.
        coords_l0: (n, 2) int32, None for bags that never were a slide.
        grid: (n, 2) int32, None where there is none.
        tile: attributes of the feature file, as far as they are known.
        logits: (members, C) float64 of the case.
        embedding: (members, E) float32 of the case.
        ood_distance: (members,) of the case, in units of each member's limit; NaN where unknown.
        member_scores: (members, n, K) float32, what `scores` is the mean of; of log weights, the
            weights of every member and column add up to 1 over the bag.
        contributions: (n, C) float32, what a tile adds to each logit, the mean over the members;
            None where a member's logits are no sum over tiles.
        contribution_bias: (C,) float64; with the contributions of all of the case's tiles it adds
            up to the mean of the members' logits.
        contribution_names: (C,) what each logit is of: a class, or a target.
        rollout: (n,) float32, where the weight came from through all layers (see
            `explain.rollout`), times the tiles of the bag: their mean over the bag is 1; None where
            a member has none.
        faithfulness: whether heatmaps of the case can be believed (see docs/formats.md).
    """

    slide_id: str
    case_id: str
    fields: Mapping[str, Json]
    members: tuple[str, ...]
    scores: NDArray[np.float32]
    score_kind: ScoreKind
    score_names: tuple[str, ...]
    coords_l0: NDArray[np.int32] | None
    grid: NDArray[np.int32] | None
    tile: Mapping[str, Any]
    logits: NDArray[np.float64]
    embedding: NDArray[np.float32]
    ood_distance: NDArray[np.float64]
    member_scores: NDArray[np.float32] | None = None
    contributions: NDArray[np.float32] | None = None
    contribution_bias: NDArray[np.float64] | None = None
    contribution_names: tuple[str, ...] = ()
    rollout: NDArray[np.float32] | None = None
    faithfulness: Mapping[str, Json] | None = None


def write_score_file(path: Path, file: ScoreFile) -> None:
    """Write a score file atomically; the same content gives the same bytes."""
    image = SparseImage()
    with h5py.File(image, "w") as target:
        attributes: dict[str, Any] = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "bagscope_version": __version__,
            "sha256": np.bytes_(SEAL_BLANK),
            "fingerprint": fingerprint(file.fields),
            "fingerprint_fields": canonical_json(file.fields).decode(),
            "slide_id": file.slide_id,
            "case_id": file.case_id,
            "members": canonical_json(list(file.members)).decode(),
            "score_kind": file.score_kind,
            "score_names": canonical_json(list(file.score_names)).decode(),
            "tile": canonical_json(dict(file.tile)).decode(),
            "contribution_names": canonical_json(list(file.contribution_names)).decode(),
        }
        for name, value in attributes.items():
            target.attrs[name] = value
        for name in _ARRAYS:
            array = getattr(file, "coords_l0" if name == "coords" else name)
            if array is not None:
                target.create_dataset(name, data=array)
        if file.faithfulness is not None:
            # A dataset: curves of many classes would not fit an attribute.
            text = np.frombuffer(canonical_json(dict(file.faithfulness)), np.uint8)
            target.create_dataset(_FAITHFULNESS, data=text)
    with atomic_file(path) as temporary:
        image.write_to(temporary)
        step("scores-written")
        seal_file(temporary)


def read_score_file(path: Path) -> ScoreFile:
    """Read a score file.

    Raises:
        ArtifactError: missing.
        SchemaError: changed since it was written, no score file, or of a newer version.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such score file; run bagscope predict first")
    # Asked first: HDF5 trusts what it reads, and a flipped bit may keep it busy for ever.
    if not seal_holds(path):
        raise SchemaError(
            f"{path}: content changed since it was written (its hash is not the one that it "
            "states); delete it and make it again"
        )
    try:
        with h5py.File(path, "r") as source:
            attributes = dict(source.attrs)
            arrays = {
                name: source[name][:] if name in source else None
                for name in (*_ARRAYS, _FAITHFULNESS)
            }
        return _file_of(path, attributes, arrays)
    except (OSError, KeyError, ValueError) as error:
        raise SchemaError(
            f"{path}: not readable as a score file ({' '.join(str(error).split())}); make it again"
        ) from error


def score_file_faults(path: Path) -> list[str]:
    """Return what is wrong with a score file, in sentences without its path."""
    try:
        file = read_score_file(path)
    except ArtifactError as error:
        return [str(error).removeprefix(f"{path}: ")]
    if file.slide_id != path.stem:
        return [f"is of slide {file.slide_id!r}; give the file its slide's name"]
    if not np.isfinite(file.logits).all() or not np.isfinite(file.scores).all():
        return ["holds scores that are no finite numbers; make it again"]
    return []


def _file_of(path: Path, attributes: Mapping[str, Any], arrays: Mapping[str, Any]) -> ScoreFile:
    schema, version = attributes.get("schema"), attributes.get("schema_version", 0)
    if schema != SCHEMA:
        raise SchemaError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}")
    if version > SCHEMA_VERSION:
        raise SchemaError(
            f"{path}: schema version {version} is newer than {SCHEMA_VERSION}, the newest that "
            "this bagscope reads; update bagscope"
        )
    fields = json.loads(attributes["fingerprint_fields"])
    if fingerprint(fields) != attributes["fingerprint"]:
        raise SchemaError(f"{path}: its fingerprint is not that of its fields; make it again")
    kind = attributes["score_kind"]
    members = tuple(json.loads(attributes["members"]))
    names = tuple(json.loads(attributes["score_names"]))
    if kind not in get_args(ScoreKind):
        raise SchemaError(f"{path}: score_kind is {kind!r}; expected {get_args(ScoreKind)}")
    lengths = {len(arrays[name]) for name in ("logits", "embedding", "ood_distance")}
    added_names = tuple(json.loads(attributes.get("contribution_names", "[]")))
    shapes = {
        "member_scores": (len(members), *arrays["scores"].shape),
        "contributions": (len(arrays["scores"]), len(added_names)),
        "contribution_bias": (len(added_names),),
        "rollout": arrays["scores"].shape[:1],
    }
    fit = all(arrays[name] is None or arrays[name].shape == shapes[name] for name in shapes)
    if arrays["scores"].shape[1] != len(names) or lengths != {len(members)} or not fit:
        raise SchemaError(f"{path}: its datasets contradict its members or names; make it again")
    judged = arrays[_FAITHFULNESS]
    return ScoreFile(
        slide_id=str(attributes["slide_id"]),
        case_id=str(attributes["case_id"]),
        fields=fields,
        members=members,
        scores=arrays["scores"],
        score_kind=cast(ScoreKind, kind),
        score_names=names,
        coords_l0=arrays["coords"],
        grid=arrays["grid"],
        tile=json.loads(attributes["tile"]),
        logits=arrays["logits"],
        embedding=arrays["embedding"],
        ood_distance=arrays["ood_distance"],
        member_scores=arrays["member_scores"],
        contributions=arrays["contributions"],
        contribution_bias=arrays["contribution_bias"],
        contribution_names=added_names,
        rollout=arrays["rollout"],
        faithfulness=None if judged is None else json.loads(bytes(judged)),
    )
