"""Random features, random labels, the whole of `train`: does a run say that there is nothing?

    python benchmarks/canary.py [--seeds 20] [--in-process] [--record]

For each seed a study with new features and new labels is written, its five folds are trained and
tested as `bagscope train` does, in processes of their own; with `--in-process` by the functions
that those processes call, since starting them is most of the time. The mean of the test AUROCs must
lie in its 99.9 % interval around ½. Two leaky twins, made here by handing the test cases to the
trainer's constructor, show that the canary would sing: one learns from them, one chooses its epoch
by them, as much published code does. Exit code 1 where any of the three is not as it should be. An
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import recording
import torch
from bag_training import WORK, kept
from scipy import stats

from bagscope.cohort.progress import SilentReporter
from bagscope.pipeline.study import open_study
from bagscope.pipeline.train import plan_training, train_run
from tests.pipeline.noise import (
    LEVEL,
    honest_aurocs,
    leaky_aurocs,
    noise_study,
    reach_of,
    read_aurocs,
)

PAGE = Path(__file__).with_name("canary.md")
WAYS = {
    "honest": "as `bagscope train` does",
    "inner": "twin: chooses its epoch by the test cases",
    "train": "twin: learns from the test cases too",
}


def main() -> int:
    """Run what was not run yet, judge, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--work", type=Path, default=WORK / "canary", help="where results are kept")
    parser.add_argument("--in-process", action="store_true", help="train in this process")
    parser.add_argument("--record", action="store_true", help=f"append, and write {PAGE.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seed in range(arguments.seeds):
        found.append(kept(arguments.work / f"{seed}.json", lambda: run(seed, arguments)))  # noqa: B023
        print(seed, {way: round(float(np.mean(found[-1][way])), 3) for way in WAYS}, flush=True)
    means = {way: float(np.mean([one[way] for one in found])) for way in WAYS}
    reach = found[0]["reach"] / np.sqrt(len(found))
    least_gain = gain_of(found)
    is_right = {
        "honest": bool(abs(means["honest"] - 0.5) < reach),
        "inner": least_gain > 0,
        "train": bool(means["train"] - 0.5 > reach),
    }
    rows = [
        recording.Row(f"noise, {WAYS[way]}: mean test AUROC", mean, "AUROC")
        for way, mean in means.items()
    ]
    rows.append(
        recording.Row(
            f"noise, choosing by the test cases: gain, lower end of {LEVEL:.1%}",
            least_gain,
            "AUROC",
            at_least=0.0,
        )
    )
    recording.show(rows)
    print(f"{LEVEL:.1%} interval: {0.5 - reach:.3f} to {0.5 + reach:.3f}; {is_right}")
    if arguments.record:
        recording.record("canary", rows, packages=["torch"], script="canary.py")
        PAGE.write_text(
            as_markdown(found, means, float(reach), is_right, arguments.in_process),
            encoding="utf-8",
        )
    return int(not all(is_right.values()))


def run(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the test AUROCs of one study's folds, of a run and of its two twins."""
    made = arguments.work / f"study_{seed}"
    folder, request = noise_study(made, seed)
    study = open_study(folder)
    if not arguments.in_process:
        result = train_run(study, request, SilentReporter())
        if not result.is_complete:
            sys.exit(f"seed {seed}: the run did not come to its end (exit code {result.exit_code})")
    planned = plan_training(study, request)
    honest = honest_aurocs(planned) if arguments.in_process else read_aurocs(planned)
    found = {
        "honest": honest.tolist(),
        **{leak: leaky_aurocs(planned, leak).tolist() for leak in ("inner", "train")},
        "reach": reach_of(planned, 1),
    }
    shutil.rmtree(made)
    return found


def gain_of(found: list[dict[str, Any]]) -> float:
    """Return the lower end of what a study gains by choosing its epoch by the test cases.

    The leak is small beside the spread of studies, so it is looked at study by study.
    """
    gains = [np.mean(one["inner"]) - np.mean(one["honest"]) for one in found]
    error = np.std(gains, ddof=1) / np.sqrt(len(gains))
    return float(np.mean(gains) - stats.t.ppf((1 + LEVEL) / 2, len(gains) - 1) * error)


def as_markdown(
    found: list[dict[str, Any]],
    means: dict[str, float],
    reach: float,
    is_right: dict[str, bool],
    in_process: bool,
) -> str:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    folds = len(found[0]["honest"])
    how = " --in-process" if in_process else ""
    return "\n".join(
        [
            "# Noise canary",
            "",
            f"`python benchmarks/canary.py --seeds {len(found)}{how} --record`, {date}, commit "
            f"{recording.commit()}.",
            "",
            f"{len(found)} studies of random features with random labels, {folds} folds each. The "
            f"{LEVEL:.1%} interval of the mean test AUROC",
            f"around ½ is {0.5 - reach:.3f} to {0.5 + reach:.3f}.",
            "",
            "| | mean test AUROC | standard deviation over studies | |",
            "|---|---:|---:|---|",
            *(
                f"| {WAYS[way]} | {means[way]:.3f} | "
                f"{np.std([np.mean(one[way]) for one in found]):.3f} | {verdict(way, is_right)} |"
                for way in WAYS
            ),
            "",
        ]
    )


def verdict(way: str, is_right: dict[str, bool]) -> str:
    if way == "honest":
        return "inside" if is_right[way] else "**outside: there is a leak**"
    above = "the honest runs, study by study" if way == "inner" else "the interval"
    return f"above {above}" if is_right[way] else f"**not above {above}: the canary is deaf**"


if __name__ == "__main__":
    sys.exit(main())
