"""Features that a model knows: found in a study, or made of its slides as the model needs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bagscope.cohort.jobs import RunReport
from bagscope.cohort.progress import Reporter
from bagscope.errors import ConfigError, FingerprintMismatch
from bagscope.features.extraction import ExtractSpec
from bagscope.pipeline.extract import ExtractOptions, extract_cohort, load_encoders
from bagscope.pipeline.study import Study
from bagscope.wsi.tiling import TilingSpec, tiling_name

if TYPE_CHECKING:
    from bagscope.artifacts import Json
    from bagscope.mil.feature_origin import FeatureOrigin


def find_known_features(study: Study, origin: FeatureOrigin) -> str | None:
    """Return where a study's features of a model's encoder lie; None where they are to be made.

    Raises:
        ConfigError: the model doesn't say what its features are made by, and none are there.
    """
    from bagscope.pipeline.train_data import find_features

    if not _can_be_made(origin):
        return find_features(study, None, None)
    wanted = _study_for(study, origin)
    folder = wanted.features_folder(tiling_name(wanted.spec.tiling)) / _folder_name(origin)
    missing = [row for row in study.cohort().rows if not (folder / f"{row.slide_id}.h5").is_file()]
    # Without its slide, a missing one would only fail twice.
    if any(row.path.exists() for row in missing) or not folder.is_dir():
        return None
    return str(folder)


def make_features(
    study: Study, origin: FeatureOrigin, report: Reporter
) -> tuple[str, tuple[RunReport, ...]]:
    """Tile and extract a study's slides as a model needs them; return where the features lie.

    Raises:
        FingerprintMismatch: the encoder's weights at hand are not the model's.
        EncoderUnavailable: there are none.
        ConfigError: no slide could be extracted.
    """
    wanted = _study_for(study, origin)
    (encoder,) = load_encoders(wanted.spec.features)
    if encoder.weights_sha256 != origin.weights_sha256:
        raise FingerprintMismatch(
            f"weights_sha256 of {origin.name} is {encoder.weights_sha256[:12]}…, the model's is "
            f"{origin.weights_sha256[:12]}…; get the weights that the model was trained on"
        )
    result = extract_cohort(wanted, report, ExtractOptions())
    folder = wanted.features_folder(tiling_name(wanted.spec.tiling)) / _folder_name(origin)
    if not result.report.interrupted and not any(folder.glob("[!.]*.h5")):
        raise ConfigError(
            f"{folder}: no slide could be extracted; run bagscope extract {study.folder} to see why"
        )
    return str(folder), (result.report,)


def _can_be_made(origin: FeatureOrigin) -> bool:
    from bagscope.features.feature_file import UNKNOWN

    return origin.weights_sha256 != UNKNOWN and len(origin.mpp) == 1 and len(origin.tile_px) == 1


def _study_for(study: Study, origin: FeatureOrigin) -> Study:
    """Return the study with the model's tile size, resolution and encoder."""
    tiling = study.spec.tiling.model_dump() | {
        "mpp": origin.mpp[0],
        "tile_px": origin.tile_px[0],
        "coarser_mpp": (),
    }
    encoder: Mapping[str, Json] = origin.encoder
    features = study.spec.features.model_dump() | {
        "encoders": (origin.name,),
        "stain": encoder.get("stain", ExtractSpec.model_fields["stain"].get_default()),
    }
    spec = study.spec.model_copy(
        update={
            "tiling": TilingSpec.model_validate(tiling),
            "features": ExtractSpec.model_validate(features),
        }
    )
    return Study(folder=study.folder, spec=spec)


def _folder_name(origin: FeatureOrigin) -> str:
    from pydantic import ValidationError

    from bagscope.features.encoders.spec import EncoderSpec

    try:
        return EncoderSpec.model_validate(dict(origin.encoder)).folder
    except ValidationError:  # of another version, or a third party's own
        return origin.name
