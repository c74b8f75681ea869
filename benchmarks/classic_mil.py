"""MUSK1, FOX and alt.atheism by cross-validation, every model on the same splits.

    python benchmarks/classic_mil.py FOLDER [--seeds 0 1 2 3 4] [--record]

FOLDER holds musk1.npz, fox.npz and alt_atheism.npz: x (tiles, D), bag (tiles,), y (bags,) and,
of alt.atheism, inst (tiles,). Ten stratified folds for each seed. A fifth of the training bags is
the inner validation part: it chooses the epoch of the networks and the penalty of the logistic
regression, which neither learns from. Settings are the same for all data sets: Ilse's learning rate
and decay, taken over after a first trial with another rate on one fold of another split seed (100,
not among those below), which printed its test scores too. An interrupted run goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import recording
from bag_training import WORK, Labelled, kept, score, train, widths
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bagscope.mil.evaluation.paired import Comparison, corrected_resampled_t_test
from bagscope.pipeline.recipes import load_recipe

FOLDS, INNER = 10, 0.2
LOGISTIC = "logistic (mean+max)"
RECIPES = ("mean", "max", "abmil", "abmil_gated", "clam_sb", "acmil", "aem")
BANDS = {"musk1": (0.83, 0.93), "fox": (0.55, 0.68)}
SETTINGS = {
    # Bags are small and few: narrow networks, every value dropped now and then. Learning rate and
    # decay are those of Ilse et al. (2018) for MUSK1 and FOX.
    "bags": {"standardise": True, "bags_per_step": 4, "feature_dropout": 0.1, "balanced": False},
    "optimiser": {"lr": 5e-4, "weight_decay": 5e-3, "schedule": "cosine"},
    "training": {"epochs": 40, "patience": 10, "min_epochs": 10},
}
PENALTIES = (0.01, 0.1)
"""At most two configurations, as for the networks, which have one."""
PAGE = Path(__file__).with_name("classic_mil.md")


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """A data set; `truth` (n,) of each bag says which tiles made it positive, where it is known."""

    name: str
    labelled: Labelled
    truth: tuple[NDArray[np.bool_], ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """Places of the bags on each side."""

    seed: int
    number: int
    learn: NDArray[np.int64]
    inner: NDArray[np.int64]
    test: NDArray[np.int64]


def main() -> None:
    """Train what is not trained yet, show and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--data", nargs="+", default=["musk1", "fox", "alt_atheism"])
    parser.add_argument(
        "--work", type=Path, default=WORK / "classic", help="where results are kept"
    )
    parser.add_argument("--record", action="store_true", help=f"append, and write {PAGE.name}")
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in arguments.data:
        data = read(arguments.folder / f"{name}.npz")
        for fold in folds_of(data, arguments.seeds):
            for model in (LOGISTIC, *RECIPES):
                path = arguments.work / name / f"{model.split()[0]}_{fold.seed}_{fold.number}.json"
                result = kept(path, lambda: run(model, data, fold))  # noqa: B023  # called at once
                found.setdefault(name, {}).setdefault(model, []).append(result)
            print(name, fold.seed, fold.number, flush=True)
    rows = [row for name in found for row in rows_of(name, found[name])]
    recording.show(rows)
    if arguments.record:
        recording.record(
            "classic_mil", rows, packages=["torch", "scikit-learn"], script="classic_mil.py"
        )
        PAGE.write_text(as_markdown(found, len(arguments.seeds)), encoding="utf-8")


def read(path: Path) -> Data:
    with np.load(path) as file:
        bag = file["bag"]
        order = np.argsort(bag, kind="stable")
        borders = np.flatnonzero(np.diff(bag[order])) + 1
        inst = file["inst"][order].astype(bool) if "inst" in file else None
        return Data(
            name=path.stem,
            labelled=Labelled(
                bags=np.split(file["x"][order], borders), labels=file["y"].astype(np.int64)
            ),
            truth=None if inst is None else tuple(np.split(inst, borders)),
        )


def folds_of(data: Data, seeds: list[int]) -> Iterator[Fold]:
    labels = data.labelled.labels
    for seed in seeds:
        cut = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        for number, (rest, test) in enumerate(cut.split(labels, labels)):
            learn, inner = train_test_split(
                rest, test_size=INNER, stratify=labels[rest], random_state=seed
            )
            yield Fold(seed=seed, number=number, learn=learn, inner=inner, test=test)


def run(model: str, data: Data, fold: Fold) -> dict[str, Any]:
    """Return what a fold's test part comes to."""
    if model == LOGISTIC:
        return judged(logistic(data.labelled, fold), None, data, fold)
    kind = load_recipe(model).aggregator.name
    attention = {"aggregator": {"options": widths(kind, 64, 32)}}
    recipe = load_recipe(model, {**SETTINGS, **attention})
    trained = train(recipe, data.labelled, fold.learn, fold.inner, fold.seed)
    said = score(trained, recipe, data.labelled, fold.test)
    return {**judged(said.margins, said.tiles, data, fold), "epoch": trained.epoch}


def logistic(data: Labelled, fold: Fold) -> NDArray[np.float64]:
    """Return the margins of a logistic regression on each bag's mean and maximum."""
    x = np.stack([np.concatenate([bag.mean(axis=0), bag.max(axis=0)]) for bag in data.bags])
    best, margins = np.inf, np.empty(0)
    for penalty in PENALTIES:
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000))
        fitted.fit(x[fold.learn], data.labels[fold.learn])
        loss = log_loss(data.labels[fold.inner], fitted.predict_proba(x[fold.inner]))
        if loss < best:
            best, margins = loss, fitted.decision_function(x[fold.test])
    return margins


def judged(
    margins: NDArray[np.float64],
    tiles: tuple[NDArray[np.float64], ...] | None,
    data: Data,
    fold: Fold,
) -> dict[str, Any]:
    labels = data.labelled.labels[fold.test]
    found: dict[str, Any] = {
        "accuracy": float(((margins > 0) == labels).mean()),
        "auroc": float(roc_auc_score(labels, margins)),
        "seed": fold.seed,
        "learn": len(fold.learn) + len(fold.inner),
        "test": len(fold.test),
    }
    if data.truth is not None and tiles is not None:
        of_tiles = [
            roc_auc_score(data.truth[place], own)
            for place, own in zip(fold.test, tiles, strict=True)
            if data.labelled.labels[place] and 0 < data.truth[place].mean() < 1
        ]
        found["tiles"] = float(np.mean(of_tiles))
    return found


def against_logistic(results: dict[str, list[dict[str, Any]]], model: str, what: str) -> Comparison:
    """Return the model's difference from the logistic regression over the same folds."""
    one, other = results[model], results[LOGISTIC]
    return corrected_resampled_t_test(
        [fold[what] for fold in one],
        [fold[what] for fold in other],
        train_cases=float(np.mean([fold["learn"] for fold in one])),
        test_cases=float(np.mean([fold["test"] for fold in one])),
    )


def over_seeds(results: list[dict[str, Any]], what: str) -> NDArray[np.float64]:
    """Return the mean over folds of each seed."""
    seeds = sorted({fold["seed"] for fold in results})
    return np.array([np.mean([f[what] for f in results if f["seed"] == seed]) for seed in seeds])


def rows_of(name: str, results: dict[str, list[dict[str, Any]]]) -> list[recording.Row]:
    rows = []
    for model, folds in results.items():
        for what in ("accuracy", "auroc", "tiles"):
            if what in folds[0]:
                value = float(over_seeds(folds, what).mean())
                rows.append(recording.Row(f"{name}, {model}: {what}", value, what))
    return rows


def as_markdown(found: dict[str, dict[str, list[dict[str, Any]]]], seeds: int) -> str:
    """Return a table for each data set."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [
        "# Classic bags",
        "",
        f"`python benchmarks/classic_mil.py FOLDER --record`, {date}, commit {recording.commit()}.",
        "",
        f"{FOLDS} stratified folds × {seeds} seeds, the same for every model; accuracy at ½. "
        "Mean of the folds, ± standard",
        "deviation over seeds. The last columns: difference from the logistic regression with its "
        "95 % interval of the",
        "corrected resampled t-test over all folds.",
    ]
    for name, results in found.items():
        has_tiles = any("tiles" in folds[0] for folds in results.values())
        band = f", sanity band of the accuracy {BANDS[name]}" if name in BANDS else ""
        lines += [
            "",
            f"## {name}{band}",
            "",
            f"| | accuracy | AUROC | {'AUROC of tiles | ' if has_tiles else ''}"
            "accuracy − logistic | AUROC − logistic | |",
            f"|---|---:|---:|{'---:|' if has_tiles else ''}---:|---:|---|",
            *(line_of(name, model, results, has_tiles) for model in results),
        ]
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    remarks = old.rsplit("|\n", 1)[-1] if "|\n" in old else ""
    return "\n".join(lines) + "\n" + remarks


def line_of(
    name: str, model: str, results: dict[str, list[dict[str, Any]]], has_tiles: bool
) -> str:
    folds = results[model]
    cells = [model]
    for what in ("accuracy", "auroc", *(["tiles"] if has_tiles else [])):
        if what in folds[0]:
            values = over_seeds(folds, what)
            cells.append(f"{values.mean():.3f} ± {values.std():.3f}")
        else:
            cells.append("")
    notes = []
    accuracy = float(over_seeds(folds, "accuracy").mean())
    if name in BANDS and not BANDS[name][0] <= accuracy <= BANDS[name][1]:
        notes.append("outside the band")
    for what in ("accuracy", "auroc"):
        if model == LOGISTIC:
            cells.append("")
            continue
        compared = against_logistic(results, model, what)
        cells.append(f"{compared.difference:+.3f} ({compared.low:+.3f} to {compared.high:+.3f})")
        if compared.high < 0:
            notes.append(f"{what} below the logistic regression")
        if compared.low > 0:
            notes.append(f"{what} above the logistic regression")
    return f"| {' | '.join(cells)} | {'; '.join(notes)} |"


if __name__ == "__main__":
    main()
