"""What a finer pass starts from: the members that scored a slide, its features, their encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagscope import artifacts
from bagscope.errors import BagscopeError, ConfigError, FingerprintMismatch, SlideError
from bagscope.pipeline.bundle import scoring_bundle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bagscope.features.session import EncoderSession
    from bagscope.features.store import FeatureStore, SlideRecord
    from bagscope.mil.member import Member
    from bagscope.mil.score_file import ScoreFile
    from bagscope.pipeline.study import Study


def members_of(
    place: Path, study: Study, file: ScoreFile, model: Path | None = None
) -> tuple[Member, ...]:
    """Return the members whose scores a file holds, in its order.

    Args:
        place: the run or the prediction.
        study: that it lies in.
        file: the slide's score file.
        model: the bundle; that of the run that scored it if None.

    Raises:
        ConfigError: no bundle there.
        FingerprintMismatch: it has other members.
    """
    from bagscope.mil.bundle import FINAL_NAME
    from bagscope.mil.member import FACTS_NAME, load_member

    bundle = scoring_bundle(place, study, model)
    found = []
    for name, sha256 in file.fields["members"].items():
        folder = bundle / name if name == FINAL_NAME else bundle / "members" / name
        facts = folder / FACTS_NAME
        if not facts.is_file() or artifacts.sha256_of_file(facts) != sha256:
            raise FingerprintMismatch(
                f"{file.slide_id}: was scored by a member {name} that {bundle} does not hold; "
                "score it anew, or name its model with --model"
            )
        found.append(load_member(folder))
    return tuple(found)


def features_of(study: Study, file: ScoreFile) -> FeatureStore:
    """Return the store of the features that a file's scores were made of, by their fingerprint.

    Raises:
        ConfigError: they are not in the study.
    """
    from bagscope.features.store import FeatureStore

    slides: Mapping[str, str] = file.fields["slides"]
    for folder in study.feature_folders():
        if not all((folder / f"{slide_id}.h5").is_file() for slide_id in slides):
            continue
        store = FeatureStore.open(folder, only=list(slides))
        with contextlib.suppress(BagscopeError):  # a damaged file is not the one
            if all(store.record(one).fingerprint == stated for one, stated in slides.items()):
                return store
    raise ConfigError(
        f"{study.folder / 'features'}: holds no features that the scores of {file.slide_id} were "
        "made of; a finer pass needs those, extract and score the slide anew (imported features "
        "do not say how a tile is encoded)"
    )


def encoder_session(study: Study, record: SlideRecord) -> EncoderSession:
    """Bring the encoder of a slide's features onto a device, as it ran when they were made.

    Raises:
        ConfigError: the features do not say what they were made by.
        EncoderUnavailable: weights or a package missing.
        FingerprintMismatch: the weights at hand are others.
    """
    from pydantic import ValidationError

    from bagscope.features.encoders.spec import EncoderSpec
    from bagscope.features.feature_file import UNKNOWN
    from bagscope.features.session import EncoderSession, device_text, require_device
    from bagscope.pipeline.extract import load_encoders, resolve_devices

    name = str(record.encoder.get("name", UNKNOWN))
    if UNKNOWN in (name, record.weights_sha256):
        raise ConfigError(
            f"{record.slide_id}: its features were imported and do not say which encoder with "
            "which weights made them, so finer tiles can't be encoded alike; extract the slide "
            "with bagscope"
        )
    spec = study.spec.features.model_copy(
        update={"encoders": (name,), "stain": record.encoder.get("stain", "none")}
    )
    (encoder,) = load_encoders(spec)
    try:
        identity = EncoderSpec.model_validate(dict(record.encoder)).identity()
    except ValidationError:  # of another version
        identity = dict(record.encoder)
    artifacts.require_same(
        {"encoder": identity, "weights_sha256": record.weights_sha256},
        {"encoder": encoder.spec.identity(), "weights_sha256": encoder.weights_sha256},
        what=f"{record.slide_id}: features of {name}",
        remedy="get the encoder that they were made with, or extract and train anew",
    )
    device = resolve_devices(spec.device)[0]
    recorded: Mapping[str, Any] = record.recorded
    same_device = recorded.get("device") == device_text(require_device(device))
    return EncoderSession(
        encoder,
        device=device,
        tile_px=int(record.attributes["tile_px"]),
        precision=recorded.get("precision") if same_device else None,
        batch_size=recorded.get("batch_size") if same_device else None,
    )


def tile_file_of(study: Study, file: ScoreFile) -> Path:
    """Return the tile file that a slide's tiles are of.

    Raises:
        SlideError: there is none.
    """
    import numpy as np

    from bagscope.wsi.tile_file import read_tile_file

    for path in _tile_files(study, file.slide_id):
        with contextlib.suppress(BagscopeError):
            if file.coords_l0 is not None and np.array_equal(
                read_tile_file(path).coords_l0, file.coords_l0
            ):
                return path
    raise SlideError(
        f"{file.slide_id}: {study.folder / 'tilings'} has no tile file of its tiles, which says "
        "how they were cut; a finer pass needs a slide that was tiled by bagscope"
    )


def _tile_files(study: Study, slide_id: str) -> Sequence[Path]:
    return sorted((study.folder / "tilings").glob(f"*/{slide_id}.h5"))
