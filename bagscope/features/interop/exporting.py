"""Our feature files become other tools' files, each slide on its own.

What was written stands in `status/export-<layout>/<slide_id>.json` beside it, so that a second run
skips what is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from bagscope.artifacts import fingerprint
from bagscope.cohort.status import Status, read_status, write_status
from bagscope.errors import ConfigError, FingerprintMismatch
from bagscope.features.interop import anndata_export, clam, stamp, torchmil, trident
from bagscope.features.interop.conversion import (
    ConversionReport,
    OnSlide,
    SlideOutcome,
    each_slide,
)
from bagscope.features.interop.recognition import content_of_h5
from bagscope.features.interop.writing import OurBag, open_bag
from bagscope.specs import did_you_mean

NUMERICS = 1
Target = Literal["anndata", "anndata-zarr", "clam", "stamp", "torchmil", "trident"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Writer:
    """How a layout is written: which files a bag becomes, and the writing."""

    plan: Callable[[OurBag, Path], list[Path]]
    write: Callable[[OurBag, Path], None]


_WRITERS: Mapping[Target, _Writer] = {
    "anndata": _Writer(plan=anndata_export.plan, write=anndata_export.write),
    "anndata-zarr": _Writer(plan=anndata_export.plan_zarr, write=anndata_export.write_zarr),
    "clam": _Writer(plan=clam.plan, write=clam.write),
    "stamp": _Writer(plan=stamp.plan, write=stamp.write),
    "torchmil": _Writer(plan=torchmil.plan, write=torchmil.write),
    "trident": _Writer(plan=trident.plan, write=trident.write),
}


def find_feature_files(source: Path) -> list[Path]:
    """Return our feature files in a folder, or the one given, in order of name.

    Damaged h5 files count, so that they are reported.

    Raises:
        ConfigError: there are none.
    """
    candidates = [source] if source.is_file() else sorted(source.glob("[!.]*.h5"))
    found = [path for path in candidates if content_of_h5(path) in ("bagscope", "unreadable")]
    if not found:
        raise ConfigError(
            f"{source}: holds no feature files of bagscope; give the folder "
            "features/<tiling>/<encoder> of a study, or import foreign files with --to bagscope"
        )
    return found


def export_features(
    files: Sequence[Path],
    out: Path,
    *,
    to: Target,
    encoder: str | None = None,
    labels: Mapping[str, str] | None = None,
    overwrite: bool = False,
    on_slide: OnSlide | None = None,
) -> ConversionReport:
    """Write feature files of ours in another tool's layout.

    Args:
        files: the feature files, one per slide.
        out: the folder to write into.
        to: whose layout.
        encoder: name of the encoder in folders and attributes, over that of the files.
        labels: by slide id, for layouts that carry labels.
        overwrite: replace what is there.
        on_slide: is told of each slide.

    Raises:
        ConfigError: no such layout, or a package that it needs is missing.
    """
    if to not in _WRITERS:
        raise ConfigError(f"no layout {to!r} to write{did_you_mean(to, TARGETS)}")
    if to in ("anndata", "anndata-zarr"):
        anndata_export.require_anndata()

    def convert(path: Path) -> SlideOutcome:
        label = (labels or {}).get(path.stem)
        return _export_one(
            open_bag(path, encoder=encoder, label=label), out, to=to, overwrite=overwrite
        )

    outcomes = each_slide([(path.stem, path) for path in files], convert, on_slide)
    return ConversionReport(layout=to, outcomes=tuple(outcomes))


def _export_one(bag: OurBag, out: Path, *, to: Target, overwrite: bool) -> SlideOutcome:
    stage, status_dir = f"export-{to}", out / "status"
    made_of = fingerprint(
        {
            "stage": stage,
            "numerics": NUMERICS,
            "source_sha256": bag.file.sha256,
            "encoder": bag.encoder,
            "label": bag.label,
        }
    )
    planned = _WRITERS[to].plan(bag, out)
    there = [path for path in planned if path.exists()]
    if there and not overwrite:
        record = read_status(status_dir, stage, bag.slide_id)
        if record is not None and record.fingerprint == made_of:
            if len(there) == len(planned):
                return SlideOutcome(slide_id=bag.slide_id, outcome="skipped")
        else:
            raise FingerprintMismatch(
                f"{there[0]}: is there and was not made from this {bag.file.path.name}; pass "
                "--overwrite to replace it, or choose another folder"
            )
    _WRITERS[to].write(bag, out)
    status = Status(
        slide_id=bag.slide_id,
        stage=stage,
        outcome="done",
        seconds=0.0,
        # The folder is made to be given away; whose machine wrote it is nobody's business.
        host="",
        fingerprint=made_of,
        facts={
            "tiles": len(bag.file),
            "files": [path.relative_to(out).as_posix() for path in planned],
        },
    )
    write_status(status_dir, status)
    return SlideOutcome(slide_id=bag.slide_id, outcome="done", tiles=len(bag.file))
