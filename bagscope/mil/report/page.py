"""The report of a run as one page: first lines, numbers, figures, and how it was done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import yaml

from bagscope.mil.report.claims import Claim, number_text, rival_verdict
from bagscope.mil.report.drawing import Picture
from bagscope.mil.report.markup import (
    Markup,
    details,
    element,
    estimate_cell,
    figure,
    first_lines,
    page,
    table,
)
from bagscope.mil.report.results import RunResult, TargetResult
from bagscope.mil.targets import TargetSpec

_FOLD_METRICS = 3
"""Columns of the table of folds, which is wide enough with these."""
_MOST_LEFT_OUT = 50
_METHODS = {
    "kfold": "cross-validation, folds of patients",
    "monte_carlo": "repeated random division of patients",
    "fixed": "a fixed division, given by the table or a file",
    "site_out": "each site tested once by models trained on the others",
    "site_preserving": "folds of whole sites",
    "external": "a cohort that no model was trained on",
}
_CAVEATS = {
    "several": "Pooled values set scores of different models side by side as if on one scale; the "
    "mean over folds does not, and rests on fewer patients each. A class or label that a fold "
    "lacks is left out of the means over classes there.",
    "classes": "Pooled values set scores of different models side by side as if on one scale; the "
    "mean over folds does not, and rests on fewer patients each. Predictive values hold at "
    "this cohort's share of positives. Thresholds come from inner validation "
    "patients, or are 0.5 where those were too few; never from test patients, but for the two rows "
    "“at 90 %”, which choose theirs on the test patients and are on the bright side.",
    "survival": "Risks of different models are on no common scale, so the headline is the mean "
    "over folds of values within each. Times are quartiles of the times of events.",
    "regression": "R² compares with the mean of these very test cases; below 0, that mean would "
    "have been closer.",
}


def report_page(
    run: RunResult,
    claims: Mapping[str, Sequence[Claim]],
    pictures: Mapping[str, Sequence[Picture]],
) -> str:
    """Return the whole page.

    Args:
        run: all that was found.
        claims: the first lines, by target.
        pictures: by target.
    """
    body: list[str] = [
        element("h1", f"{run.run}: what this study can claim"),
        element("p", _subtitle(run), "soft"),
    ]
    body += [first_lines(own) for own in _without_repeats(run, claims)]
    for name, result in run.targets.items():
        body += _target(result, pictures[name], several=len(run.targets) > 1)
    body += [*_how(run), element("footer", _foot(run))]
    return page(f"{run.run} · report", body)


def _subtitle(run: RunResult) -> str:
    recipe = run.config.get("recipe_name", "model")
    encoder = run.config.get("features", {}).get("encoder", {}).get("name", "unknown")
    known = "an encoder that is not known" if encoder == "unknown" else encoder
    told = f"Recipe {recipe} on features of {known}; {_METHODS[run.method]}"
    return f"{told}; one prediction per {run.per}."


def _target(
    result: TargetResult, pictures: Sequence[Picture], *, several: bool
) -> Iterator[Markup]:
    target = result.answers.target
    prefix = f"{target.name}: " if several else ""
    shown = {one.name: one for one in pictures}
    forest = shown.pop("baselines", None)
    if result.rivals and forest is not None:
        yield element("h2", f"{prefix}Beside simple rivals")
        yield element(
            "p",
            "The same test patients, the same folds. Tile count and site look at nothing of the "
            "tissue: where they come close, a model may have learnt no more than they.",
            "about",
        )
        yield figure(forest)
        yield from _rivals(result)
    else:
        for name, why in result.skipped.items():
            yield element("p", f"Not shown: {_lower(name)} ({why}).", "about")
    yield element("h2", f"{prefix}All numbers")
    yield _numbers(result)
    yield element("p", _caveat(target), "about")
    yield element("h2", f"{prefix}Figures")
    for one in shown.values():
        yield figure(one)
    if len(result.scores.by_fold) > 1:
        yield element("h2", f"{prefix}Fold by fold")
        yield from _folds(result)
    if result.scores.by_seed:
        yield element("h3", "Seed by seed")
        yield _seeds(result)
    for column, groups in result.subgroups.items():
        yield element("h2", f"{prefix}By {column}")
        yield table(
            (column, "Patients", "Cases", f"{result.scores.headline.label} (95 %)"),
            [
                (one.value, f"{one.patients}", f"{one.cases}", estimate_cell(one.estimate))
                for one in groups
            ],
        )
        reasons = dict.fromkeys(f"{one.value}: {one.undefined}" for one in groups if one.undefined)
        if reasons:
            yield element("p", f"– {'; '.join(reasons)}.", "about")
        yield element(
            "p",
            "Pooled over folds. Differences between groups were not tested, and the more groups "
            "one looks at, the more stand out by chance.",
            "about",
        )


def _rivals(result: TargetResult) -> Iterator[Markup]:
    own = result.scores.headline_estimate
    label = result.scores.headline.label
    rows: list[Sequence[str]] = [("This model", estimate_cell(own), "", "")]
    for rival in result.rivals:
        versus = rival.versus
        difference = "–"
        if versus.low == versus.low:
            difference = Markup(
                f"{number_text(versus.difference, 3)} <span class='i'>"
                f"({number_text(versus.low, 3)} to {number_text(versus.high, 3)})</span>"
            )
        rows.append((rival.label, estimate_cell(rival.estimate), difference, rival_verdict(rival)))
    yield table(("", f"{label} (95 %)", "Model minus rival (95 %)", "Verdict"), rows, first=True)
    for name, why in result.skipped.items():
        yield element("p", f"Not shown: {_lower(name)} ({why}).", "about")


def _caveat(target: TargetSpec) -> str:
    if target.task in _CAVEATS and (target.task != "classes" or len(target.classes) == 2):
        return _CAVEATS[target.task]
    return _CAVEATS["several"]


def _without_repeats(
    run: RunResult, claims: Mapping[str, Sequence[Claim]]
) -> Iterator[Sequence[Claim]]:
    """Yield each target's first lines, a note that holds for the whole run only once."""
    told: set[str] = set()
    for name in run.targets:
        own = [one for one in claims[name] if one.tone != "note" or one.text not in told]
        told.update(one.text for one in own)
        yield own


def _lower(label: str) -> str:
    return label[0].lower() + label[1:]


def _numbers(result: TargetResult) -> Markup:
    scores = result.scores
    head = ["", "Pooled (95 %)"]
    if scores.over_folds:
        head.append("Mean over folds (95 %)")
    rows = []
    for metric in scores.metrics:
        arrow = "" if metric.higher_is_better else " ↓"
        row = [f"{metric.label}{arrow}", estimate_cell(scores.pooled[metric.name])]
        if scores.over_folds:
            row.append(estimate_cell(scores.over_folds[metric.name]))
        rows.append(row)
    if any(not metric.higher_is_better for metric in scores.metrics):
        head[0] = "↓ lower is better"
    return table(head, rows, first=True)


def _folds(result: TargetResult) -> Iterator[Markup]:
    metrics = result.scores.metrics[:_FOLD_METRICS]
    rows = [
        (
            one.name,
            f"{one.patients}",
            *(estimate_cell(one.values.get(metric.name), 2) for metric in metrics),
        )
        for one in result.scores.by_fold
    ]
    yield table(("Fold", "Patients", *(metric.label for metric in metrics)), rows)
    reasons = dict.fromkeys(
        f"{one.name}: {one.undefined[metric.name]}"
        for one in result.scores.by_fold
        for metric in metrics
        if metric.name in one.undefined
    )
    if reasons:
        yield element("p", f"– means that there is no value. {'; '.join(reasons)}.", "about")


def _seeds(result: TargetResult) -> Markup:
    metrics = result.scores.metrics[:_FOLD_METRICS]
    return table(
        ("Seed", *(metric.label for metric in metrics)),
        [
            (f"{seed}", *(number_text(values[metric.name], 3) for metric in metrics))
            for seed, values in result.scores.by_seed.items()
        ],
    )


def _how(run: RunResult) -> Iterator[Markup]:
    if run.members:
        yield element("h2", "Models, calibration, thresholds")
        yield from _members(run)
    if run.folds:
        yield element("h2", "Who was on which side")
        yield element("p", f"Patients per fold; {_METHODS[run.method]}.", "about")
        sited = any(one.site for one in run.folds)
        head = ["Fold", "Train", "Inner validation", "Test", *(["Site tested"] if sited else [])]
        yield table(
            head,
            [
                [
                    one.name, f"{one.train}", f"{one.val}", f"{one.test}",
                    *([one.site] if sited else []),
                ]
                for one in run.folds
            ],
        )  # fmt: skip
    yield element("h2", "Left out, and noted")
    if run.left_out:
        shown = list(run.left_out.items())[:_MOST_LEFT_OUT]
        yield table(("Slide or case", "Why"), shown, words=2)
        if len(run.left_out) > len(shown):
            yield element("p", f"And {len(run.left_out) - len(shown)} more.", "about")
    else:
        yield element("p", "No slide and no case was left out.", "about")
    for note in run.notes:
        yield element("p", f"{note[0].upper()}{note[1:]}.".replace("..", "."), "about")
    yield element("h2", "How this was computed")
    yield element(
        "p",
        "Intervals: 95 %, percentiles of a bootstrap that draws patients, so that slides of one "
        "patient come and go together. Differences: the same draws for both sides. The test "
        "patients of a fold took no part in training, in choosing the epoch, in calibration or in "
        "the threshold of its model.",
        "about",
    )
    yield details("Packages", table(("", ""), list(run.versions.items()), words=2))
    text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
    yield details("Configuration of the run", element("pre", text))


def _members(run: RunResult) -> Iterator[Markup]:
    rows: list[tuple[str, ...]] = []
    reasons: dict[str, None] = {}
    for one in run.members:
        for name in run.targets:
            prefix = f"{one.name}, {name}" if len(run.targets) > 1 else one.name
            if name in one.temperatures:
                calibrated = f"temperature {one.temperatures[name]:.2f}"
            else:
                calibrated = "–"
                if name in one.uncalibrated:
                    reasons[one.uncalibrated[name]] = None
            threshold = f"{one.thresholds[name]:.3f}" if name in one.thresholds else "–"
            rows.append((prefix, f"{one.epoch} of {one.epochs}", calibrated, threshold))
    yield element(
        "p",
        "Calibration and threshold are fitted on each fold's own inner validation patients, never "
        "on test patients. Where those are too few, nothing is fitted and the threshold is 0.5.",
        "about",
    )
    yield table(("Model", "Epoch kept", "Calibration", "Threshold"), rows)
    for reason in reasons:
        yield element("p", f"– Not calibrated: {reason}.", "about")


def _foot(run: RunResult) -> str:
    seeds = ", ".join(map(str, run.seeds))
    told = f"bagscope {run.versions.get('bagscope', '')}"
    return f"{told}; seeds {seeds}." if run.seeds else f"{told}."
