"""What is wrong with an artefact, in sentences: tile files, feature files, folder artefacts.

A file's seal is checked before any library may read the file: HDF5 trusts what it reads, and one
flipped bit can keep it busy for ever. Only what is as it was written is opened here; anything else
is looked into by a process of its own, which may crash or be stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagscope.artifacts import folder_faults, is_complete, seal_holds, stated_seal
from bagscope.errors import ArtifactError
from bagscope.features.feature_file import CRC_ROWS, FeatureFile, read_feature_file
from bagscope.wsi.tile_file import TileFile, read_tile_file

LOOK_INTO_S = 60.0
"""How long a damaged file may be looked into; that it is damaged is known before."""

_CHANGED = "content changed since it was written (its hash is not the one that it states)"
_LISTED = 5


@dataclass(frozen=True, order=True, slots=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        path: file or folder.
        sentence: what is wrong and what to do, without the path.
    """

    path: Path
    sentence: str


def verify_tile_file(path: Path) -> list[Fault]:
    """Check a tile file: seal, schema, fingerprint, counts, positions, duplicates.

    Files of the first versions have no seal; their content is checked all the same.
    """
    return _verify(path, "tiles", None)


def verify_feature_file(path: Path, *, tiles: Path | None = None) -> list[Fault]:
    """Check a feature file: seal, schema, fingerprint, counts, checksums, numbers, duplicates.

    Args:
        path: the feature file.
        tiles: a sound tile file of the slide, which its rows are then compared with.
    """
    return _verify(path, "features", tiles)


def verify_folder(path: Path) -> list[Fault]:
    """Check a folder artefact: complete, and every file as `complete.json` states it."""
    if not is_complete(path):
        return [Fault(path, "incomplete (no complete.json); make it again")]
    try:
        return [_split(path, sentence) for sentence in folder_faults(path)]
    except (ArtifactError, OSError, AttributeError, TypeError) as error:
        return [_split(path, str(error))]


def _verify(path: Path, kind: str, tiles: Path | None) -> list[Fault]:
    try:
        if not path.stat().st_size:
            return [Fault(path, "empty; make it again")]
        stated, holds = stated_seal(path), seal_holds(path)
    except OSError as error:
        return [Fault(path, f"can't be read ({error.strerror})")]
    if holds:
        sentences = content_faults(path, kind, tiles)
    else:
        sentences = _look_into(path, kind, tiles)
        if stated is not None or kind == "features":
            sentences = [_CHANGED, *sentences]
    return [Fault(path, sentence) for sentence in sentences]


def content_faults(path: Path, kind: str, tiles: Path | None) -> list[str]:
    """Return what is wrong with the content of a file of a kind, "tiles" or "features"."""
    try:
        if kind == "tiles":
            return _tile_faults(path, read_tile_file(path))
        file = read_feature_file(path)
        faults = _feature_faults(path, file)
        if tiles is not None:
            faults += _membership_faults(file, read_tile_file(tiles))
        return faults
    except (ArtifactError, OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        return [_split(path, " ".join(str(error).split())).sentence]


def _look_into(path: Path, kind: str, tiles: Path | None) -> list[str]:
    """Return what a process of its own finds wrong with the content of a doubtful file."""
    arguments = [str(path), kind, *([str(tiles)] if tiles else [])]
    command = [sys.executable, "-m", "bagscope.features.verify", *arguments]
    try:
        ran = subprocess.run(command, capture_output=True, timeout=LOOK_INTO_S, check=False)
    except subprocess.TimeoutExpired:
        return ["damaged beyond reading (HDF5 does not come to an end); make it again"]
    if ran.returncode:
        return [f"damaged beyond reading (HDF5 ended with {ran.returncode}); make it again"]
    found: list[str] = json.loads(ran.stdout)
    return found


# --- tile files -----------------------------------------------------------------------------


def _tile_faults(path: Path, file: TileFile) -> list[str]:
    faults = _name_faults(path, file.slide_id)
    if "sha256" in file.attributes and stated_seal(path) is None:
        faults.append("its seal is damaged; tile again")
    faults += _duplicates("coords", file.coords_l0)
    step_l0, origin_l0 = file.attributes["step_l0"], file.attributes["origin_l0"]
    expected = np.rint(origin_l0 + file.grid * step_l0)
    if (off := np.flatnonzero((expected != file.coords_l0).any(axis=1))).size:
        faults.append(f"coords and grid contradict each other in {_rows(off)}; tile again")
    for name in ("tissue", "pen", "fold"):
        values = getattr(file, name)
        if (bad := np.flatnonzero(~((values >= 0) & (values <= 1)))).size:
            faults.append(f"{name} is not within 0 and 1 in {_rows(bad)}; tile again")
    return faults


# --- feature files --------------------------------------------------------------------------


def _feature_faults(path: Path, file: FeatureFile) -> list[str]:
    faults = _name_faults(path, file.slide_id)
    damaged: list[int] = []
    not_finite: list[int] = []
    for block, start in enumerate(range(0, len(file), CRC_ROWS)):
        vectors = file.features[start : start + CRC_ROWS]
        if zlib.crc32(vectors.reshape(-1).view(np.uint8).data) != int(file.crc32[block]):
            damaged.append(start)
        not_finite += (start + np.flatnonzero(~_finite(vectors).all(axis=1))).tolist()
    for start in damaged[:_LISTED]:
        stop = min(start + CRC_ROWS, len(file)) - 1
        faults.append(f"rows {start} to {stop} are damaged (checksum); extract again")
    if len(damaged) > _LISTED:
        faults.append(f"{len(damaged) - _LISTED} more blocks of {CRC_ROWS} rows are damaged")
    if not_finite:
        faults.append(f"NaN or infinite values in {_rows(not_finite)}; extract again")
    if file.coords_l0 is not None:
        faults += _duplicates("coords", file.coords_l0)
    return faults


def _finite(vectors: NDArray[Any]) -> NDArray[np.bool_]:
    if vectors.dtype == np.float16:
        # NumPy converts float16 one by one; the exponent's bits tell as much.
        return np.asarray((vectors.view(np.uint16) & 0x7C00) != 0x7C00)
    return np.asarray(np.isfinite(vectors))


def _membership_faults(file: FeatureFile, tiles: TileFile) -> list[str]:
    """Return why features are not those of a tile file's tiles; imported ones never were."""
    if file.fields.get("stage") == "import":
        return []
    remedy = "extract again"
    faults = []
    if file.fields.get("tiles") != tiles.attributes["fingerprint"]:
        faults.append(f"extracted from another tiling than its tile file; {remedy}")
    if file.coords_l0 is None:
        return [*faults, f"lacks coords, which its tile file has; {remedy}"]
    places = {key: row for row, key in enumerate(_keys(tiles.coords_l0).tolist())}
    rows = np.array([places.get(key, -1) for key in _keys(file.coords_l0).tolist()], np.int64)
    if (strangers := np.flatnonzero(rows < 0)).size:
        faults.append(f"{_rows(strangers)} lie where its tile file has no tile; {remedy}")
    elif (np.diff(rows) <= 0).any():
        faults.append(f"its rows are in another order than the tiles of its tile file; {remedy}")
    elif file.grid is not None and not np.array_equal(file.grid, tiles.grid[rows]):
        faults.append(f"its grid is not that of its tile file; {remedy}")
    return faults


# --- sentences ------------------------------------------------------------------------------


def _name_faults(path: Path, slide_id: str) -> list[str]:
    if path.stem == slide_id:
        return []
    return [f"is of slide {slide_id!r}; give the file its slide's name"]


def _duplicates(name: str, positions: NDArray[np.int32]) -> list[str]:
    _, first, counts = np.unique(_keys(positions), return_index=True, return_counts=True)
    repeated = np.sort(first[counts > 1])
    return [f"{name} hold the same tile twice: {_rows(repeated)}"] if repeated.size else []


def _keys(positions: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return (N,) one number per position (N, 2)."""
    wide = positions.astype(np.int64)
    return np.asarray((wide[:, 0] << 32) + wide[:, 1])


def _rows(rows: Sequence[int] | NDArray[np.integer[Any]]) -> str:
    numbers = [int(row) for row in rows[:_LISTED]]
    text = f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, numbers))}"
    return text if len(rows) <= _LISTED else f"{text} and {len(rows) - _LISTED} more"


def _split(path: Path, sentence: str) -> Fault:
    """Return a fault of a sentence that may begin with the path that it is about."""
    place, separator, rest = sentence.partition(": ")
    if separator and place.startswith(str(path)):
        return Fault(Path(place), rest)
    return Fault(path, sentence)


def _main(arguments: Sequence[str]) -> None:
    path, kind, *tiles = arguments
    found = content_faults(Path(path), kind, Path(tiles[0]) if tiles else None)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1:])
