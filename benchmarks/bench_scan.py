"""Time and memory of the scans: two Mamba layers as in MambaMIL, forward and backward.

    python benchmarks/bench_scan.py [--record] [--tiles 4000 10000] [--peer-tiles 4000]

The peer is `mambapy`, a public parallel scan in plain torch (`pip install mambapy`; left out where
it is missing). Every case runs in a process of its own, which reports its own peak memory. Threads
wait asleep (`OMP_WAIT_POLICY=passive`): where other programs use the cores too, a thread that spins
for one without a core loses a scheduler's slice at every small step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from recording import Row, record, show
from torch import Tensor, nn

from bagscope.arithmetic import avoid_broken_units
from bagscope.kernels.causal_conv1d import causal_conv1d
from bagscope.kernels.selective_scan import selective_scan, selective_scan_reference
from bagscope.kernels.ssd_scan import ssd_scan

WIDTH, LAYERS, STATES, TAPS = 512, 2, 16, 4
INNER, RANK = 2 * WIDTH, WIDTH // 16
HEADS, HEAD_WIDTH, SSD_STATES = INNER // 64, 64, 128
THREADS = 2


class Layer(nn.Module):
    """One residual S6 layer on packed bags."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.enter = nn.Linear(WIDTH, 2 * INNER, bias=False)
        self.taps = nn.Parameter(torch.randn(INNER, TAPS) / 2)
        self.constant = nn.Parameter(torch.zeros(INNER))
        self.project = nn.Linear(INNER, RANK + 2 * STATES, bias=False)
        self.step = nn.Linear(RANK, INNER)
        self.log_rates = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(INNER, 1))
        self.skip = nn.Parameter(torch.ones(INNER))
        self.leave = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, h: Tensor, borders: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        x, z = self.enter(self.norm(h)).chunk(2, 1)
        x = causal_conv1d(x, self.taps, self.constant, True, borders)
        step, b, c = self.project(x).split([RANK, STATES, STATES], 1)
        y = selective_scan(
            x, F.linear(step, self.step.weight), -self.log_rates.exp(), b, c, self.skip, z,
            self.step.bias, True, borders,
        )  # fmt: skip
        return h + self.leave(y)


def ours(tiles: int) -> tuple[float, float]:
    """Return the seconds and the KiB per tile of a step of two layers."""
    layers = [Layer() for _ in range(LAYERS)]

    def work(h: Tensor) -> Tensor:
        borders = torch.tensor([0, len(h)], dtype=torch.int32)
        for layer in layers:
            h = layer(h, borders)
        return h

    return timed(work, tiles)


def peer(tiles: int) -> tuple[float, float]:
    """Return the same of the public parallel scan."""
    from mambapy.mamba import Mamba, MambaConfig

    model = Mamba(MambaConfig(d_model=WIDTH, n_layers=LAYERS, d_state=STATES, d_conv=TAPS))
    return timed(lambda h: model(h[None])[0], tiles)


def dual(tiles: int) -> tuple[float, float]:
    """Return the same of the bare Mamba-2 scan, one layer."""
    rates = -torch.rand(HEADS)
    b, c = (torch.randn(tiles, 1, SSD_STATES, requires_grad=True) for _ in range(2))
    dt = torch.rand(tiles, HEADS, requires_grad=True)
    widen = torch.randn(WIDTH, INNER) / math.sqrt(WIDTH)

    def work(h: Tensor) -> Tensor:
        n = len(h)
        x = (h @ widen).unflatten(1, (HEADS, HEAD_WIDTH))
        borders = torch.tensor([0, n], dtype=torch.int32)
        return ssd_scan(x, dt[:n], rates, b[:n], c[:n], None, None, borders)

    return timed(work, tiles)


def timed(work: Callable[[Tensor], Tensor], tiles: int) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass, and the memory it adds to the bag."""
    work(torch.randn(64, WIDTH, requires_grad=True)).sum().backward()
    h = torch.randn(tiles, WIDTH, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    work(h).square().sum().backward()
    seconds = time.perf_counter() - begin
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / tiles


def one_bag(tiles: int) -> tuple[float, float]:
    """Return the same of one bare S6 scan over one bag."""
    return bare([tiles], tiles)


def small_bags(tiles: int) -> tuple[float, float]:
    """Return the same over bags of ten tiles."""
    return bare([10] * (tiles // 10), tiles)


def bare(lengths: list[int], tiles: int) -> tuple[float, float]:
    step, z = (torch.randn(tiles, INNER, requires_grad=True) for _ in range(2))
    b, c = (torch.randn(tiles, STATES, requires_grad=True) for _ in range(2))
    rates, widen = -torch.rand(INNER, STATES) - 0.5, torch.randn(WIDTH, INNER) / math.sqrt(WIDTH)
    whole = torch.tensor([0, *lengths]).cumsum(0).int()

    def work(h: Tensor) -> Tensor:
        n = len(h)
        borders = whole if n == tiles else torch.tensor([0, n], dtype=torch.int32)
        return selective_scan(
            h @ widen, step[:n], rates, b[:n], c[:n], None, z[:n], None, True, borders
        )

    return timed(work, tiles)


CASES = {"ours": ours, "peer": peer, "dual": dual, "one_bag": one_bag, "small_bags": small_bags}


def check() -> None:
    """Refuse to time what is wrong."""
    borders = torch.tensor([0, 40, 41, 100], dtype=torch.int32)
    x, step, z = (torch.randn(100, 32, dtype=torch.float64) for _ in range(3))
    b, c = (torch.randn(100, STATES, dtype=torch.float64) for _ in range(2))
    rates = -torch.rand(32, STATES, dtype=torch.float64)
    inputs = (x, step, rates, b, c, None, z, None, True, borders)
    truth = selective_scan_reference(*inputs)
    if not torch.allclose(selective_scan(*inputs), truth, rtol=1e-9, atol=1e-9):
        raise SystemExit("selective_scan is wrong; nothing was timed")


def case(name: str, tiles: int) -> dict[str, float]:
    """Run a case in a process of its own."""
    run = subprocess.run(
        [sys.executable, __file__, "--case", name, str(tiles)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--tiles", type=int, nargs="*", default=[4000, 10_000])
    parser.add_argument("--peer-tiles", type=int, nargs="*", default=[4000])
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    avoid_broken_units()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    if arguments.case:
        seconds, kib = CASES[arguments.case[0]](int(arguments.case[1]))
        print(json.dumps({"seconds": seconds, "kib": kib}))
        return
    check()
    rows = []
    for tiles in arguments.tiles:
        found = case("ours", tiles)
        rows.append(Row(f"two S6 layers, step, {tiles:,} tiles", found["seconds"], "s"))
        target = 120 if tiles >= 10_000 else None
        name = f"two S6 layers, memory, {tiles:,} tiles"
        rows.append(Row(name, found["kib"], "KiB/tile", at_most=target))
    tiles = min(max(arguments.tiles), 10_000)
    rows.append(Row(f"SSD scan, step, {tiles:,} tiles", case("dual", tiles)["seconds"], "s"))
    for tiles in arguments.peer_tiles if find_spec("mambapy") is not None else ():
        own, other = case("ours", tiles), case("peer", tiles)
        ratio = other["seconds"] / own["seconds"]
        rows.append(Row(f"mambapy, step, {tiles:,} tiles", other["seconds"], "s"))
        goal = 8 if tiles >= 10_000 else None
        rows.append(Row(f"speed, {tiles:,} tiles, beside mambapy", ratio, "×", at_least=goal))
        name = f"memory, {tiles:,} tiles, beside mambapy"
        rows.append(Row(name, other["kib"] / own["kib"], "× less"))
    single, packed = case("one_bag", 2000), case("small_bags", 2000)
    ratio = packed["seconds"] / single["seconds"]
    rows.append(Row("S6 scan, 200 bags of 10 against one of 2,000", ratio, "× time"))
    show(rows)
    if arguments.record:
        record("scan", rows, packages=("torch",))


if __name__ == "__main__":
    main()
