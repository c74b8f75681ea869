"""`bagscope explain`: what each prediction rests on, and whether the heatmap shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bagscope.cli import console, options
from bagscope.cohort.jobs import parse_shard
from bagscope.errors import ConfigError
from bagscope.pipeline.explain_options import CONTROLS, METHODS, SHARES, ExplainOptions
from bagscope.wording import counted

if TYPE_CHECKING:
    from bagscope.cohort.jobs import RunReport
    from bagscope.pipeline.explain import PlannedExplanations
    from bagscope.pipeline.explain_options import Method
    from bagscope.pipeline.explain_summary import Summary

_SHARES = ",".join(f"{share:g}" for share in SHARES)


def explain(
    place: options.Scored,
    slide: options.OnlySlides = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="the model's first one if not set", show_default=False),
    ] = None,
    class_name: Annotated[
        str | None,
        typer.Option(
            "--class", help="whose probability; the predicted one if not set", show_default=False
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help=f"separated by commas, of {', '.join(METHODS)}; all that are not slow if not set",
            show_default=False,
        ),
    ] = None,
    shares: Annotated[
        str, typer.Option("--shares", help="of the hottest tiles to take out, and to keep alone")
    ] = _SHARES,
    dose_share: Annotated[
        float, typer.Option("--dose-share", help="of the hottest tiles to repeat")
    ] = ExplainOptions().dose_share,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds", help="tiles that a search takes out (default: 1 %)", show_default=False
        ),
    ] = None,
    controls: Annotated[
        int, typer.Option("--controls", help="random draws beside each effect")
    ] = CONTROLS,
    seed: Annotated[int, typer.Option("--seed", help="of all draws")] = 0,
    transplant: Annotated[
        str | None,
        typer.Option(
            "--transplant", metavar="SLIDE", help="put this slide's tiles in", show_default=False
        ),
    ] = None,
    donor_region: Annotated[
        Path | None,
        typer.Option(
            "--donor-region",
            metavar="GEOJSON",
            help="its tiles in here, not its hottest",
            show_default=False,
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            "--annotations",
            metavar="GEOJSON|FOLDER",
            help="what was drawn, <slide_id>.geojson each",
            show_default=False,
        ),
    ] = None,
    annotation_class: Annotated[
        list[str] | None,
        typer.Option(
            "--annotation-class",
            help="only regions of this class; may be repeated",
            show_default=False,
        ),
    ] = None,
    table: Annotated[
        Literal["csv", "parquet"], typer.Option("--table", help="format of the table of tiles")
    ] = "csv",
    model: Annotated[
        Path | None,
        typer.Option("--model", help="the bundle that made the scores", show_default=False),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features", help="folder or URL; found in the study if not set", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="(default: STUDY/explanations/RUN)", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, or cuda")] = "cpu",
    workers: options.Workers = None,
    shard: options.Shard = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Ask what every prediction rests on: tiles taken out, kept, repeated, searched; resumes."""
    from bagscope.pipeline.explain import ExplainRequest, explain, plan_explanations

    request = ExplainRequest(
        place=place,
        options=ExplainOptions(
            target=target,
            class_name=class_name,
            methods=None if methods is None else _methods(methods),
            shares=_numbers(shares),
            dose_share=dose_share,
            rounds=rounds,
            controls=controls,
            annotation_classes=tuple(annotation_class) if annotation_class else None,
            seed=seed,
            table=table,
        ),
        slides=tuple(slide or ()),
        model=model,
        features=features,
        annotations=annotations,
        donor=transplant,
        donor_region=donor_region,
        out=out,
        device=device,
        workers=workers,
        overwrite=overwrite,
        shard=parse_shard(shard) if shard else None,
    )
    planned = plan_explanations(request)
    _print_plan(planned, as_json=as_json)
    if dry_run:
        return
    report = explain(planned, request, console.reporter(as_json=as_json))
    console.print_report(report, as_json=as_json)
    if not report.interrupted:
        from bagscope.pipeline.explain_summary import summarise

        _print_summary(summarise(planned), planned, report, as_json=as_json)
    raise typer.Exit(report.exit_code or int(bool(planned.damaged)))


def _methods(text: str) -> tuple[Method, ...]:
    names = dict.fromkeys(name.strip() for name in text.split(",") if name.strip())
    return tuple(names)  # type: ignore[arg-type]  # what is none of them is refused with a sentence


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--shares is {text!r}; write numbers separated by commas") from None


def _print_plan(planned: PlannedExplanations, *, as_json: bool) -> None:
    if as_json:
        from bagscope.pipeline.explain import describe

        console.print_json("plan", describe(planned))
        return
    for note in planned.notes:
        typer.echo(f"  note: {note}")
    first = next(iter(planned.tasks.values()))
    whose = (
        "out of fold, by the members that never saw them"
        if first.is_out_of_fold
        else "by the model that predicted them"
    )
    typer.echo(f"{counted(len(planned.tasks), 'case')}, {planned.target}, {whose}")


def _print_summary(
    summary: Summary | None, planned: PlannedExplanations, report: RunReport, *, as_json: bool
) -> None:
    if as_json:
        if summary is not None:
            said = list(summary.sentences)
            facts = {"summary": str(summary.path), "cases": summary.cases, "sentences": said}
            console.print_json("explained", facts)
        return
    for sentence in () if summary is None else summary.sentences:
        typer.echo(f"  {sentence}")
    if len(report.failures) < report.total:
        typer.echo(f"explanations: {planned.folder}")
