"""TransMIL: what a training step costs beside the published shape of the network in eager torch.

    python benchmarks/bench_transmil.py [--sizes 10000] [--rounds 5] [--threads 2] [--record]

The rival is written down from its formulas as its public implementations run: every matrix whole,
zeros in front, S₁ Z first, three convolutions, torch's defaults. Weights go from ours into it, and
both must agree before anything is timed. Each runs in processes of its own, which take turns; ours
with the memory setting that `bagscope train` uses, the rival with and without it. Seconds are the
medians of the rounds' medians; memory is by how much a first step raises a process's high-water
mark above the bag, without that setting, the median of the rounds: what the C library does with
freed blocks differs from run to run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from bagscope.arithmetic import avoid_broken_units, keep_freed_memory

avoid_broken_units()

import recording  # noqa: E402
import torch  # noqa: E402
from eager_models import relative_error  # noqa: E402
from high_water import HighWater  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from bagscope.mil.aggregators.registry import Aggregator, build_aggregator  # noqa: E402
from bagscope.mil.bags import Bags  # noqa: E402
from bagscope.mil.originals import from_original  # noqa: E402

FEATURES, TARGET_TILES = 1024, 10_000
WAYS = ("eager", "eager, memory kept", "ours")
FASTER, LEANER = 3.0, 4.0


class EagerNystrom(nn.Module):
    """Nyström attention with every matrix whole."""

    def __init__(self, width: int, heads: int = 8, landmarks: int = 256) -> None:
        super().__init__()
        self.heads, self.landmarks = heads, landmarks
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))
        self.res_conv = nn.Conv2d(heads, heads, (33, 1), padding=(16, 0), groups=heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (1, n, width) of the same."""
        rows, heads, m = x.shape[1], self.heads, self.landmarks
        x = functional.pad(x, (0, 0, -rows % m, 0))
        padded = x.shape[1]
        q, k, v = (
            part.view(1, padded, heads, -1).transpose(1, 2) for part in self.to_qkv(x).chunk(3, -1)
        )
        q = q * q.shape[-1] ** -0.5
        means = (x.reshape(1, heads, m, padded // m, -1).mean(3) for x in (q, k))
        q_means, k_means = means
        s1 = (q @ k_means.mT).softmax(-1)
        s2 = (q_means @ k_means.mT).softmax(-1)
        s3 = (q_means @ k.mT).softmax(-1)
        found = (s1 @ self.pseudo_inverse(s2)) @ (s3 @ v) + self.res_conv(v)
        out: Tensor = self.to_out(found.transpose(1, 2).reshape(1, padded, -1))
        return out[:, -rows:]

    @staticmethod
    def pseudo_inverse(s: Tensor) -> Tensor:
        """Return Z after six iterations, started with one scale."""
        z = s.mT / (s.sum(-2).max() * s.sum(-1).max())
        identity = torch.eye(s.shape[-1])
        for _ in range(6):
            a = s @ z
            z = 0.25 * z @ (13 * identity - a @ (15 * identity - a @ (7 * identity - a)))
        return z


class EagerLayer(nn.Module):
    """Norm and attention, added to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = EagerNystrom(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (1, n, width) of the same."""
        added: Tensor = self.attn(self.norm(x))
        return x + added


class EagerPositions(nn.Module):
    """Three depthwise convolutions of the square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj, self.proj1, self.proj2 = (
            nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in (7, 5, 3)
        )

    def forward(self, x: Tensor, side: int) -> Tensor:
        """Return (1, 1 + side², width) of the same."""
        square = x[:, 1:].transpose(1, 2).reshape(1, -1, side, side)
        square = square + self.proj(square) + self.proj1(square) + self.proj2(square)
        return torch.cat([x[:, :1], square.flatten(2).transpose(1, 2)], 1)


class EagerTransMIL(nn.Module):
    """The network, layers named as its authors name them."""

    def __init__(self, features: int, outputs: int, width: int = 512) -> None:
        super().__init__()
        self._fc1 = nn.Sequential(nn.Linear(features, width), nn.ReLU())
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.layer1, self.layer2 = EagerLayer(width), EagerLayer(width)
        self.pos_layer = EagerPositions(width)
        self.norm = nn.LayerNorm(width)
        self._fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (1, C) of a bag (N, F)."""
        h = self._fc1(x[None])
        side = math.ceil(math.sqrt(h.shape[1]))
        h = torch.cat([self.cls_token, h, h[:, : side * side - h.shape[1]]], 1)
        h = self.layer2(self.pos_layer(self.layer1(h), side))
        logits: Tensor = self._fc2(self.norm(h)[:, 0])
        return logits


def main() -> None:
    """Check, measure, compare with the targets, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[TARGET_TILES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        what, way = arguments.one
        measure = median_step_s if what == "seconds" else first_step_mib
        print(measure(way, arguments.sizes[0]))
        return
    check()
    rows: list[recording.Row] = []
    for tiles in arguments.sizes:
        rows += rows_of(tiles, arguments.rounds, arguments.threads)
    recording.show(rows)
    if arguments.record:
        recording.record("transmil", rows, packages=["torch"])


def rows_of(tiles: int, rounds: int, threads: int) -> list[recording.Row]:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            seconds[way].append(alone("seconds", way, tiles, threads))
    mib = {
        way: statistics.median(alone("memory", way, tiles, threads) for _ in range(rounds))
        for way in ("eager", "ours")
    }
    case = f"transmil, {tiles:,} tiles: "
    is_target = tiles == TARGET_TILES
    ratios = {
        way: statistics.median(a / b for a, b in zip(seconds[way], seconds["ours"], strict=True))
        for way in WAYS[:2]
    }
    faster, leaner = (FASTER, LEANER) if is_target else (None, None)
    return [
        *(
            recording.Row(f"{case}{way}, a step", statistics.median(values), "s")
            for way, values in seconds.items()
        ),
        recording.Row(case + "eager ÷ ours", ratios["eager"], "×", at_least=faster),
        recording.Row(case + "eager, memory kept ÷ ours", ratios["eager, memory kept"], "×"),
        *(recording.Row(f"{case}{way}, memory", value, "MiB") for way, value in mib.items()),
        recording.Row(case + "memory, eager ÷ ours", mib["eager"] / mib["ours"], "×", leaner),
    ]


def alone(what: str, way: str, tiles: int, threads: int) -> float:
    """Return what a process of its own measures."""
    command = [sys.executable, __file__, "--one", what, way]
    command += ["--sizes", str(tiles), "--threads", str(threads)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(run.stdout.split()[-1])


def check() -> None:
    """Refuse to time what differs: both must agree on the logits of a bag."""
    rival = EagerTransMIL(FEATURES, 2).eval()
    ours = ours_of(dropout=0.0, faithful_pads=True, faithful_start=True).eval()
    ours.load_state_dict(from_original("transmil", rival.state_dict(), ours.state_dict()))
    x = bag(700)
    with torch.no_grad():
        error = relative_error(ours(Bags.of([x])).logits, rival(x))
    if error > 1e-4:
        raise SystemExit(f"logits differ from eager by {error:.1e}; not timing it")


def bag(tiles: int) -> Tensor:
    return torch.randn(tiles, FEATURES, generator=torch.Generator().manual_seed(0))


def ours_of(**options: object) -> Aggregator:
    return build_aggregator("transmil", FEATURES, 2, options)


def given_to(way: str, x: Tensor) -> Bags | Tensor:
    """Return a bag as a network takes it."""
    return Bags.of([x]) if way == "ours" else x


def step_of(way: str, given: Bags | Tensor) -> Callable[[], None]:
    """Return a training step: forward, loss, backward, optimiser."""
    torch.manual_seed(0)
    model: nn.Module = ours_of() if way == "ours" else EagerTransMIL(FEATURES, 2)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5)
    label = torch.ones(1, dtype=torch.int64)
    model.train()

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        found = model(given)
        logits = found.logits if way == "ours" else found
        functional.cross_entropy(logits, label).backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return step


def median_step_s(way: str, tiles: int, steps: int = 3) -> float:
    """Return the median time of a step, the first left out."""
    if way != "eager":
        keep_freed_memory()
    step = step_of(way, given_to(way, bag(tiles)))
    found = []
    for _ in range(steps + 1):
        began_s = time.perf_counter()
        step()
        found.append(time.perf_counter() - began_s)
    return statistics.median(found[1:])


def first_step_mib(way: str, tiles: int) -> float:
    """Return by how much one step raises this process's high-water mark."""
    # Libraries load, and threads start, before the bag is there.
    step_of(way, given_to(way, bag(300)))()
    given = given_to(way, bag(tiles))
    memory = HighWater()
    step_of(way, given)()
    return memory.raised_mib


if __name__ == "__main__":
    main()
