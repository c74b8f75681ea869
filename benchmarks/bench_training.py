"""Training steps and epochs: what a recipe costs, beside eager torch with its defaults.

    python benchmarks/bench_training.py [--parts steps memory cohort precision] [--sizes 1000 ...]
        [--methods abmil_gated ...] [--bags 1000] [--threads 2] [--record]

steps: seconds of a step (forward, loss, backward, optimiser) on one bag of N × 1,024; the rivals of
`eager_models.py` take turns with ours within each round, ratios are medians of the rounds' ratios.
memory: by how much one step raises the high-water mark of a process of its own.
cohort: an epoch over bags on disk, as `bagscope train` reads them.
precision: the test AUROC after bfloat16 training beside that after float32, on planted bags.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bagscope.arithmetic import avoid_broken_units, keep_freed_memory

avoid_broken_units()

import numpy as np  # noqa: E402
import recording  # noqa: E402
import torch  # noqa: E402
from bag_training import TARGET, Labelled, score, train, widths  # noqa: E402
from bench_kernels import has_fast_bf16  # noqa: E402
from eager_models import EAGER, relative_error  # noqa: E402
from high_water import HighWater  # noqa: E402
from scipy import stats  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bagscope.features.feature_file import FeatureHeader, write_feature_file  # noqa: E402
from bagscope.features.store import FeatureStore  # noqa: E402
from bagscope.kernels.dispatch import keeping, kept_bytes  # noqa: E402
from bagscope.mil.aggregators.registry import Aggregator, build_aggregator  # noqa: E402
from bagscope.mil.bags import Bags  # noqa: E402
from bagscope.mil.cases import Case  # noqa: E402
from bagscope.mil.objectives.objective import build_objective  # noqa: E402
from bagscope.mil.sources import StoreSource  # noqa: E402
from bagscope.mil.training.optimisation import build_optimiser  # noqa: E402
from bagscope.mil.training.trainer import Trainer  # noqa: E402
from bagscope.pipeline.recipes import load_recipe  # noqa: E402
from bagscope.testing import planted_bags  # noqa: E402

FEATURES = 1024
SIZES = (1_000, 10_000, 50_000, 100_000)
HUGE = 100_000
PARTS = ("steps", "memory", "cohort", "precision")
LEAST_TILES, MOST_TILES = 200, 20_000
DRAWS = 5
Step = Callable[[], None]


def main() -> None:
    """Check, measure, compare with the targets, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="tiles of the bag")
    parser.add_argument("--methods", nargs="+", choices=EAGER, default=tuple(EAGER))
    parser.add_argument("--rounds", type=int, help="beyond the first, which is not counted")
    parser.add_argument("--bags", type=int, default=100, help="of the cohort; in full, 1000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        way, method = arguments.memory_of
        print(step_memory_mib(way, method, arguments.sizes[0]))
        return
    keep_freed_memory()  # as the workers of `train` do; where memory is measured, it would hide
    rows: list[recording.Row] = []
    if "steps" in arguments.parts:
        for method in arguments.methods:
            check(method)
            for tiles in arguments.sizes:
                rows += step_rows(method, tiles, arguments.rounds)
    if "memory" in arguments.parts:
        for method in arguments.methods:
            rows += memory_rows(method, max(arguments.sizes), arguments.threads)
    if "cohort" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            rows += cohort_rows(Path(folder), arguments.bags)
    if "precision" in arguments.parts:
        rows += precision_rows()
    recording.show(rows)
    if arguments.record:
        recording.record("training", rows, packages=["torch"])


def bag(tiles: int, dtype: torch.dtype = torch.float32) -> Bags:
    x = torch.randn(tiles, FEATURES, generator=torch.Generator().manual_seed(0))
    label = torch.ones(1, 1, dtype=torch.float64)
    return Bags.of([x.to(dtype)], targets={TARGET.name: label}, seed=1)


def model_of(method: str, *, drops: bool = True) -> Aggregator:
    """Return ours, of the shipped recipe."""
    aggregator = load_recipe(method).aggregator
    options = dict(aggregator.options)
    if not drops:
        options |= {name: 0.0 for name in ("dropout", "attention_dropout") if name in options}
    torch.manual_seed(0)
    return build_aggregator(aggregator.name, FEATURES, 2, options)


def our_step(method: str, bags: Bags) -> Step:
    """Return what the trainer does for one step."""
    recipe, model = load_recipe(method), model_of(method)
    objective = build_objective([TARGET], recipe.objective).fit(
        {TARGET.name: np.array([[0.0], [1.0]])}
    )
    optimiser = build_optimiser(model, recipe.optimiser)
    model.train()

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        losses = objective(model(bags), bags.targets or {}, progress=0.0, lengths=bags.lengths)
        losses.total.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return step


def eager_step(method: str, x: Tensor) -> Step:
    model = EAGER[method](FEATURES, 2)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5)
    label = torch.ones(1, dtype=torch.int64)
    model.train()

    def step() -> None:
        optimiser.zero_grad()
        _, loss = model(x, label)
        loss.backward()
        optimiser.step()

    return step


def check(method: str) -> None:
    """Refuse to time what differs: ours and eager must agree on the logits of a bag."""
    ours, rival = model_of(method, drops=False).eval(), EAGER[method](FEATURES, 2).eval()
    named = {name.removeprefix("branches."): w for name, w in ours.state_dict().items()}
    given = {name: weight for name, weight in named.items() if name in names_of(rival)}
    rival.load_state_dict(given, strict=False)
    shared = {name for name in names_of(rival) if name.startswith(("attention.", "classifier."))}
    if shared - given.keys():
        raise SystemExit(f"{method}: ours has no {sorted(shared - given.keys())}; not timing it")
    bags = bag(500)
    with torch.no_grad():
        error = relative_error(ours(bags).logits, rival(bags.features)[0])
    if error > 1e-4:
        raise SystemExit(f"{method}: logits differ from eager by {error:.1e}; not timing it")


def names_of(model: nn.Module) -> set[str]:
    return set(model.state_dict())


def timed(work: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each in every round but the first; all take turns in each round."""
    samples: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            began_s = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - began_s)
    return {name: values[1:] for name, values in samples.items()}


def ratio(samples: dict[str, list[float]], above: str, below: str) -> float:
    pairs = zip(samples[above], samples[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def step_rows(method: str, tiles: int, rounds: int | None) -> list[recording.Row]:
    wide = bag(tiles)
    work = {
        "eager": eager_step(method, wide.features),
        "ours": our_step(method, wide),
        "bf16": our_step(method, wide.to("cpu", torch.bfloat16)),
    }
    samples = timed(work, rounds or (3 if tiles > 20_000 else 15))
    case = f"{method}, {tiles:,} tiles: "
    # Half precision is asked to be fast where the processor's products are.
    fast = 4.0 if tiles == HUGE and has_fast_bf16(torch.device("cpu")) else None
    goals = {"ours": 2.5 if tiles == HUGE else 1.0, "bf16": fast}
    return [
        *(
            recording.Row(case + f"{name}, a step", statistics.median(seconds) * 1000, "ms")
            for name, seconds in samples.items()
        ),
        *(
            recording.Row(
                case + f"eager ÷ {name}", ratio(samples, "eager", name), "×", at_least=goals[name]
            )
            for name in ("ours", "bf16")
        ),
    ]


def memory_rows(method: str, tiles: int, threads: int) -> list[recording.Row]:
    found = {}
    for way in ("eager", "ours", "recompute"):
        command = [sys.executable, __file__, "--memory-of", way, method]
        command += ["--sizes", str(tiles), "--threads", str(threads)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = float(run.stdout.split()[-1])
    case = f"{method}, {tiles:,} tiles: "
    goal = 7.0 if tiles == HUGE else None
    return [
        *(
            recording.Row(case + f"{way}, memory above the bag", mib, "MiB")
            for way, mib in found.items()
        ),
        recording.Row(case + "memory, eager ÷ ours", found["eager"] / found["ours"], "×"),
        recording.Row(
            case + "memory, eager ÷ recompute",
            found["eager"] / found["recompute"],
            "×",
            at_least=goal,
        ),
    ]


def step_memory_mib(way: str, method: str, tiles: int) -> float:
    """Return by how much one step raises this process's high-water mark."""
    most_bytes = 0 if way == "recompute" else kept_bytes()

    def one(bags: Bags) -> None:
        step = eager_step(method, bags.features) if way == "eager" else our_step(method, bags)
        with keeping(most_bytes):
            step()

    one(bag(64))  # libraries load, and threads start, before the bag is there
    bags = bag(tiles)
    memory = HighWater()
    one(bags)
    return memory.raised_mib


def cohort_rows(folder: Path, count: int) -> list[recording.Row]:
    """Time one epoch of gated ABMIL over bags on disk, packed and bag by bag."""
    source = written_cohort(folder, count)
    case = f"{count:,} bags of {int(source.lengths.sum()):,} tiles: "
    rates, rows = {}, []
    ways = {"packed": {}, "bag by bag": {"batch_tiles": 1}}
    for way, options in ways.items():
        recipe = load_recipe("abmil_gated", {"bags": {"bags_per_step": 16, **options}})
        began_s = time.perf_counter()
        trainer = Trainer(recipe, [TARGET], source, None, seed=0, stop_after=1)
        ready_s = time.perf_counter() - began_s
        (epoch,) = trainer.run().history
        rates[way] = epoch.tiles / epoch.seconds
        if way == "packed":
            rows.append(recording.Row(case + "statistics before the first epoch", ready_s, "s"))
            share = 100 * epoch.waited_s / epoch.seconds
            rows.append(recording.Row(case + "waiting for data", share, "%", at_most=5.0))
        rows.append(recording.Row(case + f"an epoch, {way}", rates[way], "tiles/s"))
    faster = rates["packed"] / rates["bag by bag"]
    return [*rows, recording.Row(case + "packed ÷ bag by bag", faster, "×")]


def written_cohort(folder: Path, count: int) -> StoreSource:
    chance = np.random.default_rng(0)
    sizes = np.exp(chance.uniform(np.log(LEAST_TILES), np.log(MOST_TILES), count)).astype(int)
    pool = chance.standard_normal((MOST_TILES, FEATURES), np.float32).astype(np.float16)
    cases = []
    for place, size in enumerate(sizes):
        name = f"slide{place:04d}"
        header = FeatureHeader(
            slide_id=name,
            fields={},
            encoder={"name": "random"},
            weights_sha256="unknown",
            coords_l0=np.zeros((size, 2), np.int32),
        )
        start = int(chance.integers(0, MOST_TILES - size + 1))
        write_feature_file(folder / f"{name}.h5", header, pool[start : start + size])
        cases.append(
            Case(
                case_id=name,
                patient_id=name,
                slide_ids=(name,),
                targets={TARGET.name: (float(place % 2),)},
            )
        )
    return StoreSource(FeatureStore.open(folder), cases)


def precision_rows() -> list[recording.Row]:
    """Train on several draws in both precisions and compare the test AUROCs, paired by draw.

    The interval is Student's over draws. One of the test bags of a single draw would tell how well
    these two models are known, and leave out that any other rounding trains another model.
    """
    aurocs = np.array([precision_pair(seed) for seed in range(11, 11 + DRAWS)])
    differences = aurocs[:, 1] - aurocs[:, 0]
    low, high = stats.t.interval(
        0.95, DRAWS - 1, loc=differences.mean(), scale=stats.sem(differences)
    )
    case = f"planted bags, 1 % of tiles, {DRAWS} draws: "
    return [
        recording.Row(case + "AUROC after float32", aurocs[:, 0].mean(), "AUROC"),
        recording.Row(case + "AUROC after bfloat16", aurocs[:, 1].mean(), "AUROC"),
        recording.Row(case + "difference", differences.mean(), "AUROC"),
        recording.Row(case + "difference, lower end of 95 %", low, "AUROC", at_most=0.0),
        recording.Row(case + "difference, upper end of 95 %", high, "AUROC", at_least=0.0),
    ]


def precision_pair(seed: int) -> tuple[float, float]:
    """Return the test AUROC after float32 and after bfloat16, of one draw."""
    made = planted_bags(900, tiles=(100, 200), dimension=32, shift=4.5, seed=seed)
    data = Labelled(bags=made.bags, labels=made.labels)
    learn, inner, test = np.split(np.arange(len(made)), [200, 260])

    def auroc(precision: str) -> float:
        recipe = load_recipe(
            "abmil_gated",
            {
                "aggregator": {"options": widths("abmil", 128, 64)},
                "optimiser": {"lr": 1e-3},
                "bags": {"bags_per_step": 4},
                "training": {"epochs": 15, "patience": None, "precision": precision},
            },
        )
        trained = train(recipe, data, learn, inner, 0)
        return float(roc_auc_score(made.labels[test], score(trained, recipe, data, test).margins))

    return auroc("float32"), auroc("bfloat16")


if __name__ == "__main__":
    main()
