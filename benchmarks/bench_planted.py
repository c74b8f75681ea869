"""What each aggregator finds where one tile in a hundred, or in a thousand, decides the label.

    python benchmarks/bench_planted.py [--seeds 0 1 2] [--record]

The bags are those of `bagscope.testing.planted_bags`: 240 to learn from, 60 to choose the epoch by,
400 to test on. The recipes are the shipped ones, narrower and with a higher learning rate, for 20
epochs. Beside them stand a logistic regression on the bags' means, and an oracle that knows the
direction. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import recording
from bag_training import WORK, Labelled, kept, score, train, widths
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bagscope.pipeline.recipes import load_recipe
from bagscope.testing import PlantedBags, planted_bags

LEARN, INNER, TEST = 240, 60, 400
SHARES = {0.01: (300, 500), 0.001: (800, 1200)}
"""Share of shifted tiles, and the bags' sizes: one tile in a thousand needs as many."""
GOAL, CERTAIN = 0.95, 0.99
RECIPES = ("mean", "max", "abmil", "abmil_gated", "clam_sb", "clam_mb", "acmil", "aem")
"""Those that judge tiles one by one; what also sees other tiles stands in the zoo."""
PAGE = Path(__file__).with_name("planted.md")
ORACLE, BASELINE = "oracle", "logistic regression on means"


def main() -> None:
    """Train what is not trained yet, show and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--work", type=Path, default=WORK / "planted", help="where results are kept"
    )
    parser.add_argument("--record", action="store_true", help=f"append, and write {PAGE.name}")
    arguments = parser.parse_args()
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        for share in SHARES:
            made = None
            for name in (ORACLE, BASELINE, *RECIPES):
                path = arguments.work / f"{share}_{name.replace(' ', '-')}_{seed}.json"
                if made is None and not path.exists():
                    made = planted(share, seed)
                result = kept(path, lambda: run(name, made, seed, path))  # noqa: B023  # called at once
                found.setdefault((share, name), []).append(result)
                print(share, name, seed, {k: round(v, 3) for k, v in result.items()}, flush=True)
    rows = rows_of(found)
    recording.show(rows)
    if arguments.record:
        recording.record("planted", rows, packages=["torch", "scikit-learn"])
        PAGE.write_text(as_markdown(found, len(arguments.seeds)), encoding="utf-8")


def planted(share: float, seed: int) -> PlantedBags:
    return planted_bags(LEARN + INNER + TEST, tiles=SHARES[share], share=share, seed=seed)


def run(name: str, made: PlantedBags | None, seed: int, path: Path) -> dict[str, float]:
    """Return the AUROC over test bags, and the mean AUROC of tiles over positive ones."""
    assert made is not None
    places = np.arange(len(made))
    learn, inner, test = np.split(places, [LEARN, LEARN + INNER])
    held = made.chosen(slice(LEARN + INNER, None))
    if name == ORACLE:
        return aurocs(held, held.oracle_scores(), held.oracle_tile_scores())
    if name == BASELINE:
        means = np.stack([bag.mean(axis=0) for bag in made.bags])
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        model.fit(means[:-TEST], made.labels[:-TEST])
        # It is linear in the mean, so its score of a bag is the mean of its scores of tiles.
        tiles = tuple(model.decision_function(bag) for bag in held.bags)
        return aurocs(held, model.decision_function(means[-TEST:]), tiles)
    recipe = load_recipe(name)
    recipe = load_recipe(
        name,
        {
            "aggregator": {"options": widths(recipe.aggregator.name, 128, 64)},
            "optimiser": {"lr": 1e-3},
            "training": {"epochs": 20, "min_epochs": 0, "patience": None},
        },
    )
    data = Labelled(bags=made.bags, labels=made.labels)
    trained = train(recipe, data, learn, inner, seed, folder=path.with_suffix(".training"))
    said = score(trained, recipe, data, test)
    return aurocs(held, said.margins, said.tiles)


def aurocs(held: PlantedBags, scores: Any, tiles: Any) -> dict[str, float]:
    of_tiles = [
        roc_auc_score(truth, own)
        for truth, own in zip(held.truth, tiles, strict=True)
        if truth.any()
    ]
    return {
        "slides": float(roc_auc_score(held.labels, scores)),
        "tiles": float(np.mean(of_tiles)),
        "ceiling": held.mean_auroc,
    }


def rows_of(found: dict[tuple[float, str], list[dict[str, Any]]]) -> list[recording.Row]:
    rows = []
    for (share, name), results in found.items():
        goal = None
        sure = min(one["slides"] for one in found[share, ORACLE]) >= CERTAIN
        if share == max(SHARES) and name.startswith("abmil") and sure:
            goal = GOAL
        for what in ("slides", "tiles"):
            value = float(np.mean([one[what] for one in results]))
            case = f"{share:.1%}, {name}: AUROC of {what}"
            rows.append(
                recording.Row(case, value, "AUROC", at_least=goal if what == "slides" else None)
            )
    return rows


def as_markdown(found: dict[tuple[float, str], list[dict[str, Any]]], seeds: int) -> str:
    """Return the table, one line per method."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()

    def cell(share: float, name: str, what: str) -> str:
        values = [one[what] for one in found[share, name]]
        return f"{np.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"

    names = list(dict.fromkeys(name for _, name in found))
    ceilings = ", ".join(
        f"{max(one['ceiling'] for one in found[share, ORACLE]):.3f} at {share:.1%}"
        for share in SHARES
    )
    lines = [
        "# Planted signal",
        "",
        f"`python benchmarks/bench_planted.py --record`, {date}, commit {recording.commit()}.",
        f"{recording.device()}; mean over {seeds} draws of the bags (lowest–highest).",
        "",
        f"{LEARN} bags to learn from, {INNER} to choose the epoch by, {TEST} to test on, 64 "
        "features, a shift of 6 standard",
        "deviations, bags' offsets of 0.25. Tiles: mean AUROC within positive bags, the score of "
        "each tile against the",
        f"truth. What the means allow at best: {ceilings}.",
        "",
        "| | 1 %: slides | 1 %: tiles | 0.1 %: slides | 0.1 %: tiles |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | "
            + " | ".join(cell(s, name, what) for s in SHARES for what in ("slides", "tiles"))
            + " |"
            for name in names
        ),
        "",
    ]
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    remarks = old.rsplit("|\n", 1)[-1] if "|\n" in old else ""
    return "\n".join(lines) + remarks


if __name__ == "__main__":
    main()
