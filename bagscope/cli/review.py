"""`bagscope review`: a folder of static files in which a pathologist looks a run through."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagscope.cli import console, options
from bagscope.cohort.jobs import parse_shard
from bagscope.errors import ConfigError
from bagscope.heatmaps.review.choices import MAX_PX, QUALITY
from bagscope.wording import counted

if TYPE_CHECKING:
    from bagscope.heatmaps.review.verdicts import Merged
    from bagscope.pipeline.review import PlannedReview
    from bagscope.pipeline.review_folder import ReviewResult


def review(
    place: options.Scored,
    max_px: Annotated[
        int, typer.Option("--max-px", help="longer edge of a slide's picture, at most")
    ] = MAX_PX,
    quality: Annotated[int, typer.Option("--quality", help="of JPEG, 1 to 100")] = QUALITY,
    annotations: Annotated[
        Path | None,
        typer.Option(
            "--annotations",
            metavar="FOLDER",
            help="what was drawn, <slide_id>.geojson each, to show",
            show_default=False,
        ),
    ] = None,
    pseudonyms: Annotated[
        Path | None,
        typer.Option(
            "--pseudonymise",
            metavar="TABLE.csv",
            help="no id in the review, only pseudonyms; the table stays with you, made if missing",
            show_default=False,
        ),
    ] = None,
    verdicts: Annotated[
        Path | None,
        typer.Option(
            "--import-verdicts",
            metavar="VERDICTS.csv",
            help="what a reviewer exported from the page",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="(default: STUDY/review/RUN, or RUN-pseudonymised)", show_default=False
        ),
    ] = None,
    workers: options.Workers = None,
    shard: options.Shard = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Make a page to look a run through, slide by slide, that opens from a folder; resumes."""
    from bagscope.pipeline.review import ReviewRequest, plan_review
    from bagscope.pipeline.review_folder import import_verdicts, make_review

    if verdicts is not None and dry_run:
        raise ConfigError("--import-verdicts writes, and --dry-run is not to; give one of them")
    request = ReviewRequest(
        place=place,
        out=out,
        max_px=max_px,
        quality=quality,
        annotations=annotations,
        pseudonyms=pseudonyms,
        workers=workers,
        overwrite=overwrite,
        shard=parse_shard(shard) if shard else None,
    )
    planned = plan_review(request)
    if verdicts is not None:
        planned, merged = import_verdicts(planned, verdicts)
        _print_import(merged, planned, as_json=as_json)
    _print_plan(planned, as_json=as_json)
    if dry_run:
        return
    result = make_review(planned, request, console.reporter(as_json=as_json))
    console.print_report(result.report, as_json=as_json)
    _print_result(result, planned, as_json=as_json)
    raise typer.Exit(result.exit_code or int(bool(planned.run.damaged)))


def _print_import(merged: Merged, planned: PlannedReview, *, as_json: bool) -> None:
    counts = {
        "added": merged.added,
        "replaced": merged.replaced,
        "withdrawn": merged.withdrawn,
        "same": merged.same,
    }
    if as_json:
        console.print_json("verdicts", {**counts, "kept_in": str(planned.verdicts_path)})
        return
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    typer.echo(f"verdicts: {told}; of each reviewer and slide the newest counts")
    typer.echo(f"  kept in {planned.verdicts_path}")


def _print_plan(planned: PlannedReview, *, as_json: bool) -> None:
    if as_json:
        facts = {
            "slides": len(planned.tasks),
            "folder": str(planned.folder),
            "layers": [kind.id for kind in planned.run.colours],
            "notes": list(planned.notes),
        }
        console.print_json("plan", facts)
        return
    for note in planned.notes:
        typer.echo(f"  note: {note}")
    layers = ", ".join(kind.id for kind in planned.run.colours)
    typer.echo(f"{counted(len(planned.tasks), 'slide')} with {layers}; to {planned.folder}")


def _print_result(result: ReviewResult, planned: PlannedReview, *, as_json: bool) -> None:
    if as_json:
        facts = {
            "index": None if result.index is None else str(result.index),
            "missing": result.missing,
            "pictures": result.pictures,
            "longest_px": result.longest_px,
            "um_per_px": [result.finest_um, result.coarsest_um],
            "size_bytes": result.size_bytes,
            "agreement": list(result.agreement),
        }
        console.print_json("review", facts)
        return
    if result.missing:
        typer.echo(
            f"not complete: {counted(result.missing, 'slide')} left to other shards; run those too"
        )
    if result.index is None:
        return
    count = len(planned.tasks)
    typer.echo(
        f"review: {result.size_bytes / 1e6:,.0f} MB, {result.pictures} of {count} slides with a "
        f"picture{_resolution(result)}"
    )
    for sentence in result.agreement:
        typer.echo(f"  {sentence}")
    if planned.pseudonyms is not None:
        typer.echo("  pseudonymised; what is written on the tissue's glass can still be seen")
    typer.echo(f"open {result.index}")


def _resolution(result: ReviewResult) -> str:
    if not result.pictures:
        return ""
    told = f" of up to {result.longest_px:,} px"
    if result.finest_um is None or result.coarsest_um is None:
        return told
    sizes = dict.fromkeys(f"{size:.2g}" for size in (result.finest_um, result.coarsest_um))
    return f"{told}, {' to '.join(sizes)} µm each"
