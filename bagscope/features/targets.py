"""The files that an extraction makes of a slide: one per encoder, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from bagscope import artifacts
from bagscope.artifacts import Json, fingerprint
from bagscope.cohort.executors.protocol import Record
from bagscope.cohort.jobs import StageResult
from bagscope.errors import ArtifactError
from bagscope.features.extraction import feature_fields
from bagscope.features.feature_file import (
    TILE_ATTRIBUTES,
    FeatureFile,
    FeatureHeader,
    FeatureWriter,
    StoredDtype,
    read_feature_file,
)
from bagscope.features.session import EncoderSession
from bagscope.wsi.tile_file import TileFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One encoder of a pass, and the folder that its files go to."""

    session: EncoderSession
    folder: Path
    stored_dtype: StoredDtype = "float16"

    def fields(self, tiles: TileFile) -> dict[str, Json]:
        """Return what the fingerprint of a slide's file is made of."""
        encoder = self.session.encoder
        return feature_fields(
            str(tiles.attributes["fingerprint"]), encoder.spec.identity(), encoder.weights_sha256
        )

    def path(self, slide_id: str) -> Path:
        """Return where a slide's file goes."""
        return self.folder / f"{slide_id}.h5"


def find_made(
    slide_id: str, target: Target, tiles: TileFile, *, overwrite: bool
) -> FeatureFile | None:
    """Return a slide's file if it is there and was made of the same, else None.

    Raises:
        FingerprintMismatch: it was made of something else, and is not to be replaced.
    """
    path = target.path(slide_id)
    if not path.exists():
        return None
    try:
        found = read_feature_file(path)
    except ArtifactError:
        return None  # a damaged file is no reason to stop: it is made again
    fields = target.fields(tiles)
    if found.fingerprint == fingerprint(fields):
        return found
    if not overwrite:
        artifacts.require_same(
            found.fields, fields, what=str(path), remedy="replace it with --overwrite"
        )
    return None


def slide_record(
    found: Sequence[FeatureFile],
    tiles: int,
    *,
    outcome: Literal["done", "skipped"],
    problems: Sequence[str] = (),
) -> Record:
    """Return the record of a slide of so many tiles, of its files, one per encoder."""
    unreadable = tiles - len(found[0])
    warnings: tuple[str, ...] = ()
    if unreadable and problems:
        warnings = (
            f"{unreadable} of {tiles} tiles can't be read and have no vector; {problems[0]}",
        )
    result = StageResult(
        outcome=outcome,
        fingerprint=_joined([file.fingerprint for file in found]),
        content_hash=_joined([file.sha256 for file in found]),
        facts={
            "tiles": len(found[0]),
            "unreadable": unreadable,
            "encoders": {str(file.encoder["name"]): file.features.dtype.name for file in found},
        },
        warnings=warnings,
    )
    return {**asdict(result), "warnings": list(warnings)}


def _joined(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else fingerprint({"of": list(hashes)})


def open_writer(
    slide_id: str, tiles: TileFile, target: Target, stored_dtype: StoredDtype
) -> FeatureWriter:
    """Open a slide's file for writing."""
    return FeatureWriter(
        target.path(slide_id),
        feature_header(slide_id, tiles, target),
        rows=len(tiles),
        dimension=target.session.spec.dimension,
        dtype=stored_dtype,
    )


def feature_header(slide_id: str, tiles: TileFile, target: Target) -> FeatureHeader:
    """Return everything of a slide's feature file but its vectors."""
    session, attributes = target.session, tiles.attributes
    return FeatureHeader(
        slide_id=slide_id,
        fields=target.fields(tiles),
        encoder=session.spec.model_dump(mode="json"),
        weights_sha256=session.encoder.weights_sha256,
        coords_l0=tiles.coords_l0,
        grid=tiles.grid,
        tile={name: attributes[name] for name in TILE_ATTRIBUTES if name in attributes},
        recorded={**session.execution.as_json(), **library_versions()},
    )


def library_versions() -> dict[str, str]:
    """Return the versions that numbers may depend on."""
    return {name: version(name) for name in ("torch", "timm", "numpy", "simplejpeg")}
