"""Foreign features become our feature files, each slide on its own."""

from __future__ import annotations

import contextlib
import difflib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py

from bagscope.artifacts import Json, portable_name_problem, require_same, sha256_of_file
from bagscope.cohort.table import Cohort, SlideRow, load_cohort, write_cohort_csv
from bagscope.errors import CohortError, ConfigError, FingerprintMismatch, SchemaError, SlideError
from bagscope.features.feature_file import (
    UNKNOWN,
    FeatureHeader,
    StoredDtype,
    read_feature_file,
    write_feature_file,
)
from bagscope.features.interop import (
    atlaspatch,
    clam,
    hs2p,
    plain,
    slideflow,
    stamp,
    torchmil,
    trident,
)
from bagscope.features.interop.conversion import (
    ConversionReport,
    OnSlide,
    SlideOutcome,
    each_slide,
)
from bagscope.features.interop.encoder_names import our_name
from bagscope.features.interop.foreign import (
    ForeignBag,
    Layout,
    SlideFacts,
    Source,
    readable,
)
from bagscope.features.interop.placing import PlacedBag, fits_float16, place
from bagscope.features.interop.recognition import Recognised, recognise
from bagscope.wording import counted
from bagscope.wsi.identity import slide_identity
from bagscope.wsi.opening import open_slide
from bagscope.wsi.spacing import find_spacing

NUMERICS = 1
COHORT_NAME = "cohort.csv"
DEFAULT_DTYPE: StoredDtype = "float16"

_READERS: Mapping[Layout, Callable[[Source, SlideFacts | None], ForeignBag]] = {
    "clam": clam.read,
    "hs2p": hs2p.read,
    "plain": plain.read,
    "slideflow": slideflow.read,
    "stamp": stamp.read,
    "torchmil": torchmil.read,
    "trident": trident.read,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """What holds for all slides of one import; the last three fill while it runs."""

    out: Path
    encoder: str | None
    mpp: float | None
    slides: Mapping[str, SlideRow] | None
    dtype: StoredDtype | None
    overwrite: bool
    hashes: dict[Path, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    said: Counter[str] = field(default_factory=Counter)


def import_features(
    source: Path | Recognised,
    out: Path,
    *,
    encoder: str | None = None,
    mpp: float | None = None,
    slides: Mapping[str, SlideRow] | None = None,
    dtype: StoredDtype | None = None,
    overwrite: bool = False,
    on_slide: OnSlide | None = None,
) -> ConversionReport:
    """Import features that another tool wrote as `<out>/<slide_id>.h5`, one file per slide.

    Labels that the layout carries become `<out>/cohort.csv`.

    Args:
        source: a file or folder, or what `recognise` found there.
        out: the folder to write into.
        encoder: name of the encoder, over what the layout says.
        mpp: micrometres per level-0 pixel of all slides, over what the slides say.
        slides: the slides by id, for their pixel size; every bag must have one.
        dtype: to store; float16 where not given. float16 that would overflow is float32.
        overwrite: replace files that were made differently.
        on_slide: is told of each slide.

    Raises:
        ConfigError: nothing that can be imported, or more than one set of features.
        SpacingError: `mpp` is not a believable pixel size.
    """
    found = source if isinstance(source, Recognised) else recognise(source)
    find_spacing({}, override_mpp=mpp)
    _require_distinct_ids(found)
    request = _Request(
        out=out, encoder=encoder, mpp=mpp, slides=slides, dtype=dtype, overwrite=overwrite
    )
    outcomes = each_slide(
        [(one.slide_id, one) for one in found.sources],
        lambda one: _import_one(one, request),
        on_slide,
    )
    repeated = [f"{n} slides: {said}" for said, n in request.said.items() if n > 1]
    notes = [*found.notes, *repeated, *_write_labels(request)]
    return ConversionReport(layout=found.layout, outcomes=tuple(outcomes), notes=tuple(notes))


def _require_distinct_ids(found: Recognised) -> None:
    first: dict[str, Source] = {}
    for source in found.sources:
        other = first.setdefault(source.slide_id.casefold(), source)
        if other is not source:
            raise ConfigError(
                f"{source.path}: {source.slide_id!r} and {other.slide_id!r} would be the same file "
                "on some systems; rename one of them"
            )


def _import_one(source: Source, request: _Request) -> SlideOutcome:
    slide_id = source.slide_id
    if problem := portable_name_problem(slide_id):
        raise SlideError(
            f"{source.path}: {slide_id!r} can't be a slide id, it {problem}; rename it"
        )
    slide = _slide_facts(source, request)
    bag = _read(source, slide, request.encoder)
    if bag.features.shape == (0, 0):
        return SlideOutcome(
            slide_id=slide_id, outcome="skipped", warnings=("holds no tiles; nothing to import",)
        )
    placed = place(source.path, bag, slide)
    name = request.encoder or our_name(source.layout, bag.encoder, placed.features.shape[1])
    fields = _fields(source, name, placed, slide, request)
    warnings = _warnings(source, bag, placed, request)
    if bag.label is not None:
        request.labels[slide_id] = bag.label
    path = request.out / f"{slide_id}.h5"
    if path.exists() and not request.overwrite:
        _require_made_so(path, fields, placed, request.dtype)
        return SlideOutcome(slide_id=slide_id, outcome="skipped", warnings=warnings)
    header = FeatureHeader(
        slide_id=slide_id,
        fields=fields,
        encoder={
            "name": name or UNKNOWN,
            "imported_from": source.layout,
            "imported_as": bag.encoder or UNKNOWN,
        },
        weights_sha256=UNKNOWN,
        coords_l0=placed.coords_l0,
        grid=placed.grid,
        tile=placed.tile,
        extra=placed.extra,
    )
    write_feature_file(path, header, placed.features, dtype=request.dtype or DEFAULT_DTYPE)
    return SlideOutcome(
        slide_id=slide_id, outcome="done", tiles=len(placed.features), warnings=warnings
    )


def _read(source: Source, slide: SlideFacts | None, encoder: str | None) -> ForeignBag:
    if source.layout == "atlaspatch":
        return atlaspatch.read(source, slide, encoder=encoder)
    if source.layout == "unreadable":
        if source.path.suffix == ".npz":
            plain.find(source.path)
        with readable(source.path):
            h5py.File(source.path, "r").close()
        raise SchemaError(f"{source.path}: can't be read; get or make the file again")
    return _READERS[source.layout](source, slide)


def _warnings(
    source: Source, bag: ForeignBag, placed: PlacedBag, request: _Request
) -> tuple[str, ...]:
    """Return what the user should know of a slide, each sentence with its first slide only."""
    found = list(bag.warnings)
    stated = (bag.encoder, our_name(source.layout, bag.encoder, placed.features.shape[1]))
    if request.encoder and bag.encoder and request.encoder not in stated:
        found.append(f"the file says encoder {bag.encoder!r}; taken as {request.encoder!r}")
    if not request.encoder and not bag.encoder and source.layout != "plain":
        found.append("the file does not name its encoder; pass --encoder NAME")
    if placed.coords_l0 is not None and "mpp_x_l0" not in placed.tile:
        found.append(
            "the pixel size is not known, so nothing can be said in micrometres; give the slides "
            "with --slides TABLE, or pass --mpp"
        )
    new = tuple(sentence for sentence in found if sentence not in request.said)
    request.said.update(found)
    return new


# --- provenance -----------------------------------------------------------------------------


def _fields(
    source: Source, name: str, placed: PlacedBag, slide: SlideFacts | None, request: _Request
) -> dict[str, Json]:
    """Return what the imported file's fingerprint is made of."""

    def hash_of(path: Path) -> str:
        if path not in request.hashes:
            with readable(path):
                request.hashes[path] = sha256_of_file(path)
        return request.hashes[path]

    tiling = ("extent_l0", "tile_px", "mpp_x_l0", "mpp_y_l0", "mpp")
    return {
        "stage": "import",
        "numerics": NUMERICS,
        "layout": source.layout,
        "source_sha256": hash_of(source.path),
        "source_key": source.key,
        "companions_sha256": {
            role: hash_of(path) for role, path in sorted(source.companions.items())
        },
        "encoder": name or UNKNOWN,
        "tiling": {key: placed.tile[key] for key in tiling if key in placed.tile},
        "slide": None if slide is None or slide.identity is None else dict(slide.identity),
    }


def _require_made_so(
    path: Path, fields: Mapping[str, Json], placed: PlacedBag, dtype: StoredDtype | None
) -> None:
    """Refuse a file that is there and was made differently, or is stored in another dtype."""
    there = read_feature_file(path)
    remedy = "pass --overwrite to replace it"
    require_same(there.fields, fields, what=str(path), remedy=remedy)
    if dtype is None:
        return
    wanted = dtype if fits_float16(placed.features) else "float32"
    if there.features.dtype != wanted:
        raise FingerprintMismatch(
            f"{path}: is stored as {there.features.dtype}, asked for {wanted}; {remedy}"
        )


# --- slides ---------------------------------------------------------------------------------


def _slide_facts(source: Source, request: _Request) -> SlideFacts | None:
    """Return what the slide itself says, or `--mpp` alone, or None where there is neither."""
    if request.slides is None:
        spacing = find_spacing({}, override_mpp=request.mpp).spacing
        return None if spacing is None else SlideFacts(spacing=spacing)
    row = request.slides.get(source.slide_id)
    if row is None:
        near = difflib.get_close_matches(source.slide_id, request.slides, n=1)
        hint = f" (the nearest is {near[0]!r})" if near else ""
        raise SlideError(
            f"{source.path}: no slide {source.slide_id!r} among the {len(request.slides)} of "
            f"--slides{hint}; add it there, or leave the file out"
        )
    mpp = request.mpp or row.mpp
    if not row.path.exists() and mpp is not None:
        return SlideFacts(spacing=find_spacing({}, override_mpp=mpp).spacing)
    with open_slide(row.path, mpp=mpp) as slide:
        info = slide.info
        return SlideFacts(
            spacing=info.spacing,
            width_l0=info.width_l0,
            height_l0=info.height_l0,
            bounds_l0=info.bounds_l0,
            downsamples=tuple(level.downsample for level in info.levels),
            identity=slide_identity(row.path),
        )


# --- labels ---------------------------------------------------------------------------------


def _write_labels(request: _Request) -> list[str]:
    """Write the labels that came with the bags as a cohort table; return what to say about it."""
    if not request.labels:
        return []
    table = request.out / COHORT_NAME
    rows = []
    for slide_id, label in sorted(request.labels.items()):
        row = (request.slides or {}).get(slide_id)
        # A bag that never was a slide has no other file than its features.
        path = (request.out / f"{slide_id}.h5").absolute() if row is None else row.path
        patient_id = slide_id if row is None else row.patient_id
        rows.append(
            SlideRow(slide_id=slide_id, path=path, patient_id=patient_id, columns={"label": label})
        )
    cohort = Cohort(
        rows=tuple(rows),
        source=str(table),
        columns=("label",),
        patient_id_given=any(row.patient_id != row.slide_id for row in rows),
    )
    if table.exists() and not request.overwrite:
        with contextlib.suppress(CohortError):
            there = {row.slide_id: row.columns.get("label") for row in load_cohort(table).rows}
            if there == request.labels:
                return []
        return [
            f"{table}: is there and was kept, though the labels differ; --overwrite replaces it"
        ]
    write_cohort_csv(cohort, table)
    return [f"{table}: the labels of {counted(len(rows), 'bag')}, as a cohort to train on"]
