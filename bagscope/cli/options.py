"""Options that several verbs share; help texts and defaults are read from the specs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bagscope.pipeline.study import RunSpec
from bagscope.specs import Spec
from bagscope.wsi.tiling import TilingSpec


def of(kind: type[Spec], field: str, *names: str) -> Any:
    """Return the typer option for a spec's field; None on the command line keeps the study's."""
    info = kind.model_fields[field]
    default = info.get_default()
    shown = "none" if default is None or default == () else default
    if isinstance(shown, tuple):
        shown = ", ".join(map(str, shown))
    return typer.Option(*names, help=f"{info.description} (default: {shown})", show_default=False)


Study = Annotated[Path, typer.Argument(help="the study folder", show_default=False)]
Scored = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|PREDICTIONS", help="a run, or a folder of predictions", show_default=False
    ),
]
OnlySlides = Annotated[
    list[str] | None,
    typer.Option("--slide", help="only this one; may be repeated", show_default=False),
]
Slides = Annotated[
    str | None,
    typer.Option(
        "--slides",
        help="a table (CSV, TSV, Parquet, XLSX), a folder or a glob of slides; makes the study",
        show_default=False,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", help="clinical table, joined by patient_id", show_default=False),
]

MppOption = Annotated[float | None, of(TilingSpec, "mpp", "--mpp")]
TilePx = Annotated[int | None, of(TilingSpec, "tile_px", "--tile-px")]
OverlapPx = Annotated[int | None, of(TilingSpec, "overlap_px", "--overlap-px")]
CoarserMpp = Annotated[list[float] | None, of(TilingSpec, "coarser_mpp", "--coarser-mpp")]
MinTissue = Annotated[float | None, of(TilingSpec, "min_tissue", "--min-tissue")]
MaxPen = Annotated[float | None, of(TilingSpec, "max_pen", "--max-pen")]
MaxFold = Annotated[float | None, of(TilingSpec, "max_fold", "--max-fold")]
MinSharpness = Annotated[float | None, of(TilingSpec, "min_sharpness", "--min-sharpness")]
MaxUnreadable = Annotated[float | None, of(TilingSpec, "max_unreadable", "--max-unreadable")]
MaxTiles = Annotated[int | None, of(TilingSpec, "max_tiles", "--max-tiles")]
Seed = Annotated[int | None, of(TilingSpec, "seed", "--seed")]
Downscale = Annotated[str | None, of(TilingSpec, "downscale", "--downscale")]
AllowUpsampling = Annotated[
    bool | None,
    of(TilingSpec, "allow_upsampling", "--allow-upsampling/--no-allow-upsampling"),
]
AllowEstimatedMpp = Annotated[
    bool | None,
    of(TilingSpec, "allow_estimated_mpp", "--allow-estimated-mpp/--no-allow-estimated-mpp"),
]

Workers = Annotated[int | None, of(RunSpec, "workers", "--workers", "-j")]
TimeoutMinutes = Annotated[float | None, of(RunSpec, "timeout_minutes", "--timeout-minutes")]
MemoryLimitGib = Annotated[float | None, of(RunSpec, "memory_limit_gib", "--memory-limit-gib")]

Shard = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="i/n", help="work on the i-th of n parts only", show_default=False
    ),
]
Dask = Annotated[
    str | None,
    typer.Option(
        "--dask", metavar="ADDRESS", help="run on a Dask cluster's workers", show_default=False
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend", help="read slides with this backend; automatic if not set", show_default=False
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="replace what was made with other settings")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="say what would be done, and write nothing")
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object per line, for programs")]
