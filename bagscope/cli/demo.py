"""`bagscope demo`: synthetic slides through the whole line."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagscope.cli import console, options
from bagscope.cohort.progress import Event, Reporter, RunStarted
from bagscope.pipeline.demo import (
    STAGES,
    DemoRequest,
    DemoStage,
    DemoStageDone,
    demo_findings,
    parse_demo_stage,
    run_demo,
)
from bagscope.pipeline.demo_slides import TUMOR_FRACTIONS, SlidesSpec
from bagscope.wording import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bagscope.cohort.jobs import RunReport
    from bagscope.pipeline.demo_findings import DemoFindings

_SAYS: dict[DemoStage, str] = {
    "slides": "draw slides, half of them with a little tumour",
    "scan": "open every slide: what is there, what will it cost",
    "tile": "find the tissue and cut it into tiles",
    "extract": "turn every tile into 1,280 numbers with EfficientNet-Lite0",
    "train": "learn from slide labels alone, one model per fold",
    "evaluate": "what can be claimed, and what simpler models come to",
    "heatmap": "draw what each slide's held-out model looked at",
    "review": "put slides, heatmaps and answers on one page",
}
_SHOWS: dict[DemoStage, str] = {
    "tile": "the tissue and the tiles of every slide",
    "evaluate": "what can be claimed, and what simpler models come to",
    "heatmap": "a folder per slide: a picture, and GeoJSON for QuPath",
    "review": "every slide with its heatmap, the planted tumour outlined",
}
_USUAL = SlidesSpec()
_WIDTH = 79


def demo(
    folder: Annotated[Path, typer.Argument(help="where to", show_default=True)] = Path("demo"),
    until: Annotated[str, typer.Option(help=f"last stage: {', '.join(STAGES)}")] = STAGES[-1],
    slides: Annotated[int, typer.Option(min=12, help="how many slides")] = _USUAL.slides,
    size_px: Annotated[
        int, typer.Option(min=512, help="edge of a slide in pixels of 0.5 µm")
    ] = _USUAL.size_px,
    seed: Annotated[int, typer.Option(min=0, help="of the slides")] = _USUAL.seed,
    workers: options.Workers = None,
    as_json: options.AsJson = False,
) -> None:
    """Make synthetic slides and take them through the whole line; resumes where it stopped."""
    request = DemoRequest(
        folder=folder,
        slides=SlidesSpec(slides=slides, size_px=size_px, seed=seed),
        workers=workers,
        until=parse_demo_stage(until),
    )
    listener = console.reporter(as_json=as_json)
    titles = None if as_json else _Titles(listener, request.stages)
    code = 0
    done: dict[DemoStage, DemoStageDone] = {}
    for stage in run_demo(request, titles or listener):
        done[stage.stage] = stage
        code = stage.exit_code
        if stage.report is not None:
            _print_stage(stage.stage, stage.report, as_json=as_json)
        if titles is not None and not code:
            titles.follow(stage.stage)
    findings = None if code or "evaluate" not in done else demo_findings(request)
    if as_json:
        pages = {name: str(one.page) for name, one in done.items() if one.page is not None}
        found = None if findings is None else asdict(findings)
        console.print_json("demo", {"findings": found, "pages": pages})
    elif not code:
        _print_closing(done, findings)
    raise typer.Exit(code)


class _Titles:
    """Says above each stage's progress what the stage is for."""

    def __init__(self, inner: Reporter, stages: Sequence[DemoStage]) -> None:
        self._inner, self._stages = inner, stages
        self._told: set[DemoStage] = set()

    def emit(self, event: Event) -> None:
        """Print the title where a stage starts; pass the event on."""
        if isinstance(event, RunStarted):
            name = event.stage.partition("/")[0]
            for stage in self._stages:
                if stage == name:
                    self._tell(stage)
        self._inner.emit(event)

    def follow(self, stage: DemoStage) -> None:
        """Print the title of what follows a stage, which may take a while to start."""
        place = self._stages.index(stage) + 1
        # A study is scanned once, so nobody knows yet what follows its slides.
        if stage != "slides" and place < len(self._stages):
            self._tell(self._stages[place])

    def _tell(self, stage: DemoStage) -> None:
        if stage not in self._told:
            self._told.add(stage)
            place = f"{self._stages.index(stage) + 1}/{len(self._stages)}"
            typer.echo(f"\n[{place}] {stage}: {_SAYS[stage]}")


def _print_stage(stage: DemoStage, report: RunReport, *, as_json: bool) -> None:
    if report.exit_code or as_json:
        console.print_report(report, as_json=as_json)
        return
    made, found = report.counts.get("done", 0), report.counts.get("skipped", 0)
    noun = "model" if stage == "train" else "slide"
    parts = [f"{counted(made, noun)} done"] if made or not found else []
    parts += [f"{counted(found, noun)} there already"] if found else []
    if stage in ("scan", "tile", "extract"):
        parts.append(counted(report.tiles, "tile"))
    typer.echo(f"{', '.join(parts)}, {console.duration_text(report.seconds)}")


def _print_closing(done: Mapping[DemoStage, DemoStageDone], findings: DemoFindings | None) -> None:
    typer.echo()
    if findings is not None:
        _print_findings(findings)
    pages = [(one.stage, one.page) for one in reversed([*done.values()]) if one.page is not None]
    for place, (stage, page) in enumerate(pages):
        if place < 2:
            typer.echo("and then:" if place else "open first:")
        typer.echo(f"  {console.from_here(page)}\n    {_SHOWS[stage]}")
    typer.echo("\nyour own slides, with a column of labels in their table:")
    typer.echo("  bagscope init STUDY --slides SLIDES.csv --target COLUMN")
    typer.echo("  bagscope run STUDY")


def _print_findings(found: DemoFindings) -> None:
    low, high = (round(100 * share) for share in TUMOR_FRACTIONS)
    _print_wrapped(
        f"{found.slides} slides, half of them with tumour on {low} to {high} % of their tissue: "
        f"{found.tumor_tiles} of {found.tiles:,} tiles. The models were told the slides' labels, "
        "and nothing of where."
    )
    typer.echo()
    typer.echo("slides with tumour told from those without (AUROC, slides never seen):")
    typer.echo(f"  {found.auroc:.2f}  the models ({found.auroc_low:.2f} to {found.auroc_high:.2f})")
    typer.echo(f"  {found.linear_auroc:.2f}  a logistic regression on the mean of a slide's tiles")
    typer.echo(f"  {found.colour_auroc:.2f}  a logistic regression on its tissue's mean colour")
    if found.tile_auroc is not None:
        typer.echo("tiles of the planted tumour found (AUROC, slides never seen):")
        typer.echo(f"  {found.tile_auroc:.2f}  attention, all slides on one scale")
        typer.echo(f"  {found.tile_auroc_within:.2f}  attention, within the slides with tumour")
    warned = found.warned_tumor + found.warned_normal
    if warned:
        _print_wrapped(
            f"{warned} of {found.slides} heatmaps warn that attention does not drive the answer: "
            f"{found.warned_tumor} of slides with tumour, and {found.warned_normal} of slides "
            "without, where there is nothing to find."
        )
    if found.slides < _USUAL.slides:
        _print_wrapped(f"So few slides teach and prove little; the usual demo has {_USUAL.slides}.")
    typer.echo()


def _print_wrapped(text: str) -> None:
    typer.echo(textwrap.fill(text, _WIDTH))
