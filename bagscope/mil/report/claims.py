"""The first lines of a report: in plain words, what a study can claim and what it can't."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bagscope.mil.baselines import LEAKS
from bagscope.mil.evaluation.bootstrap import Estimate
from bagscope.mil.report.results import Rival, RunResult, TargetResult
from bagscope.wording import counted

Tone = Literal["finding", "good", "warning", "note"]

FEW_PATIENTS = 30
"""Of a class, or with an event; below it, intervals are wide and subgroups say nothing."""
_LEAK_SAYS = {
    "size": "tile count and tissue area alone come to",
    "site": "site alone comes to",
}
_LEAK_KNOWS = {
    "size": "how much tissue a slide holds",
    "site": "where a slide comes from",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One sentence or two, and how it is to be taken."""

    tone: Tone
    text: str


def claims_of(run: RunResult, result: TargetResult) -> tuple[Claim, ...]:
    """Return the first lines for one target, the weightiest first."""
    found = [
        _headline(run, result),
        *_chance(result),
        *_leaks(result),
        *_rivals(result),
        *_few(result),
        *_patients(run),
        *_seeds(result),
        *_calibration(run, result),
        _reach(run),
    ]
    order: dict[Tone, int] = {"finding": 0, "warning": 1, "good": 2, "note": 3}
    return tuple(sorted(found, key=lambda claim: order[claim.tone]))


def number_text(value: float, digits: int = 2) -> str:
    """Return a number as people write it, "–" for none."""
    if math.isnan(value):
        return "–"
    if abs(value) >= 100:
        return f"{value:.4g}"
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def interval_text(estimate: Estimate, digits: int = 2) -> str:
    """Return "low to high", "–" where there is no interval."""
    if math.isnan(estimate.low):
        return "–"
    return f"{number_text(estimate.low, digits)} to {number_text(estimate.high, digits)}"


def _headline(run: RunResult, result: TargetResult) -> Claim:
    scores, estimate = result.scores, result.scores.headline_estimate
    label = scores.headline.label
    name = result.answers.target.name
    if math.isnan(estimate.value):
        reasons = [why for fold in scores.by_fold for why in fold.undefined.values()]
        why = f" ({reasons[0]})" if reasons else ""
        return Claim(tone="finding", text=f"{name}: {label} could not be computed{why}.")
    told = f"{label} {number_text(estimate.value)}"
    if math.isnan(estimate.low):
        told += f" (no interval: {estimate.note or 'too few patients'})"
    else:
        told += f" ({estimate.level * 100:g} % interval {interval_text(estimate)})"
    several = len(scores.by_fold) > 1
    if scores.scope == "folds" and several:
        how = f"the mean over {len(scores.by_fold)} folds"
    else:
        how = "all test patients pooled" if several else "on one held-out set"
        if (rounds := len(result.answers.repeat_rows)) > 1:
            how = f"test patients pooled within each of {rounds} rounds"
    tested = "" if run.method == "external" else ", each tested by models that never saw them"
    return Claim(tone="finding", text=f"{name}: {told}, {how}. {_who(run, result)}{tested}.")


def _who(run: RunResult, result: TargetResult) -> str:
    text, counts = counted(result.patients, "patient"), result.counts
    task = result.answers.target.task
    if task == "survival":
        text += f" ({counts['event']} with an event)"
    elif task != "regression" and len(counts) <= 6:
        text += f" ({_of_classes(counts)})"
    if run.per == "slide" and result.cases != result.patients:
        text += f" with {counted(result.cases, 'slide')}"
    return text


def _of_classes(counts: Mapping[str, int]) -> str:
    return ", ".join(
        f"{count} of class {name}" if name[:1].isdigit() else f"{count} {name}"
        for name, count in counts.items()
    )


def _chance(result: TargetResult) -> Iterator[Claim]:
    chance = result.scores.headline.chance
    estimate = result.scores.headline_estimate
    is_regression = result.answers.target.task == "regression"
    plain = "the mean alone" if is_regression else "chance"
    if chance is None:
        return
    if estimate.high < chance:
        how = "predicts worse" if is_regression else "ranks test patients the wrong way round"
        yield Claim(
            tone="warning",
            text=f"The whole interval lies below {plain} ({chance:g}): the model {how}, as small "
            "folds can make it where nothing was learnt.",
        )
    elif estimate.low <= chance:
        yield Claim(
            tone="warning",
            text=f"The interval reaches down to {number_text(estimate.low)} and so does not rule "
            f"out {plain} ({chance:g}).",
        )


def _leaks(result: TargetResult) -> Iterator[Claim]:
    estimate = result.scores.headline_estimate
    chance = result.scores.headline.chance
    sure = not math.isnan(estimate.low)
    bound = estimate.low if sure else estimate.value
    what = "the model's interval" if sure else "what the model reaches"
    below: dict[Tone, list[str]] = {"good": [], "note": []}
    for rival in result.rivals:
        if rival.name not in LEAKS:
            continue
        value = rival.estimate.value
        told = f"{_LEAK_SAYS[rival.name]} {number_text(value)}"
        side = _side_of_chance(result, rival)
        # What ranks no better than chance leaks nothing, however wide the interval.
        if value >= bound and (chance is None or value > chance):
            where = "above" if value > (estimate.high if sure else estimate.value) else "within"
            yield Claim(
                tone="warning",
                text=f"{_sentence([told])}, {where} {what}: the model may have learnt little more "
                f"than {_LEAK_KNOWS[rival.name]}.",
            )
        elif side == "below":
            yield Claim(
                tone="note",
                text=f"{_sentence([told])} ({interval_text(rival.estimate)}), away from chance "
                f"({chance:g}) on the lower side: it ranks test patients the wrong way round, as "
                "small folds can make it. That is no sign that the label has nothing to do with "
                f"{_LEAK_KNOWS[rival.name]}.",
            )
        elif side == "above":
            yield Claim(
                tone="note",
                text=f"{_sentence([told])} ({interval_text(rival.estimate)}), below {what} but "
                f"above chance ({chance:g}): the label has to do with {_LEAK_KNOWS[rival.name]}, "
                "and the model may have learnt some of it.",
            )
        elif value < bound:
            below["note" if math.isnan(rival.estimate.low) else "good"].append(told)
    for tone, names in below.items():
        if names:
            yield Claim(tone=tone, text=f"{_sentence(names)}, below {what}.")
    for label, reason in result.skipped.items():
        if "not at hand" in reason and "alone" in label:
            yield Claim(tone="warning", text=f"{label} was not looked at: {reason}.")


def _side_of_chance(result: TargetResult, rival: Rival) -> Literal["below", "above", ""]:
    """Return where a rival's whole interval lies; nothing where it holds chance or is not known.

    An R² below that of the mean ranks nothing the wrong way round: it is as good as chance.
    """
    chance, estimate = result.scores.headline.chance, rival.estimate
    if chance is None:
        return ""
    if estimate.high < chance and result.answers.target.task != "regression":
        return "below"
    return "above" if estimate.low > chance else ""


def _rivals(result: TargetResult) -> Iterator[Claim]:
    for rival in result.rivals:
        if rival.name in LEAKS or rival.name == "constant":
            continue
        told = (
            f"{_lower(rival.label)} ({number_text(rival.estimate.value)}; difference "
            f"{_signed(rival.versus.difference)}, {_signed(rival.versus.low)} to "
            f"{_signed(rival.versus.high)})"
        )
        if rival.versus.low > 0:
            yield Claim(tone="good", text=f"The model is better than {told}.")
        elif rival.versus.high < 0:
            yield Claim(
                tone="warning",
                text=f"The model is worse than {told}: it adds nothing over a simple model.",
            )
        else:
            yield Claim(tone="warning", text=f"The model is not shown to be better than {told}.")


def _few(result: TargetResult) -> Iterator[Claim]:
    task, counts = result.answers.target.task, result.counts
    if task == "regression":
        if result.patients < FEW_PATIENTS:
            yield _few_claim(f"There are only {result.patients} patients")
        return
    named = {name: count for name, count in counts.items() if count < FEW_PATIENTS}
    if not named:
        return
    if task == "survival":
        yield _few_claim(f"Only {counted(counts['event'], 'patient')} had an event")
        return
    yield _few_claim(f"A class has few patients ({_of_classes(named)})")


def _few_claim(what: str) -> Claim:
    return Claim(
        tone="warning", text=f"{what}: intervals are wide, and subgroups can hardly be judged."
    )


def _patients(run: RunResult) -> Iterator[Claim]:
    if not run.patients_known:
        yield Claim(
            tone="warning",
            text="The cohort table names no patients, so each slide counts as one: two slides of "
            "a patient may stand on both sides of a split, and intervals are too narrow then.",
        )


def _seeds(result: TargetResult) -> Iterator[Claim]:
    name = result.scores.headline.name
    values = [own[name] for own in result.scores.by_seed.values() if not math.isnan(own[name])]
    if len(values) > 1:
        yield Claim(
            tone="note",
            text=f"The answers are means over {len(values)} seeds, which alone give "
            f"{number_text(min(values))} to {number_text(max(values))}.",
        )


def _calibration(run: RunResult, result: TargetResult) -> Iterator[Claim]:
    target = result.answers.target
    missing = [one for one in run.members if target.name in one.uncalibrated]
    if missing and target.task not in ("regression", "survival"):
        reason = missing[0].uncalibrated[target.name]
        calibrated = len(run.members) - len(missing)
        if len(run.members) == 1:
            told = "The model is not calibrated"
        else:
            told = f"{f'Only {calibrated}' if calibrated else 'None'} of the {len(run.members)} "
            told += f"models {'are' if calibrated > 1 else 'is'} calibrated"
        yield Claim(tone="note", text=f"{told} ({reason}): take probabilities as scores.")


def _reach(run: RunResult) -> Claim:
    if run.method == "external":
        return Claim(
            tone="note",
            text="The cohort is another than the model was trained on. No rival was fitted, so "
            "whether cheap clues such as tissue size explain the result was not looked at.",
        )
    if run.method == "site_out":
        return Claim(
            tone="note",
            text="Each site was tested by models that never saw it. Sites outside the study may "
            "differ still.",
        )
    return Claim(
        tone="note",
        text="Training and test patients come from one cohort. How the model does at other sites, "
        "on other scanners or in another case mix, this study can't say.",
    )


def _signed(value: float) -> str:
    text = number_text(value, 3)
    return f"+{text}" if value > 0 else text


def _lower(label: str) -> str:
    return label[0].lower() + label[1:]


def _sentence(parts: Sequence[str]) -> str:
    text = " and ".join(parts)
    return text[0].upper() + text[1:]


def rival_verdict(rival: Rival) -> str:
    """Return in two words how the model compares."""
    if math.isnan(rival.versus.low):
        return "not compared"
    if rival.versus.low > 0:
        return "model better"
    return "model worse" if rival.versus.high < 0 else "not told apart"
