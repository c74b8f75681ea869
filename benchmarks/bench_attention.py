"""Attention over long bags: forward + backward against what torch gives without these operations.

    python benchmarks/bench_attention.py [--record] [--parts pooling linear attention]
        [--tiles 50000] [--attended 10000 50000] [--rounds 3] [--threads 2]

Each case is first compared with its plain form and aborts where they differ (self-attention of more
than 20,000 tiles, minutes a step, is timed alone). Eight heads of 64,
float32, one bag unless said. Memory is what the process grew by at its worst, inputs and their
gradients not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from recording import Row, record, show
from torch import Tensor

from bagscope.arithmetic import avoid_broken_units
from bagscope.kernels.cross_attention_pool import cross_attention_pool
from bagscope.kernels.linear_attention import linear_attention, linear_attention_reference
from bagscope.kernels.varlen_self_attention import find_neighbours, varlen_self_attention

HEADS, WIDTH = 8, 64
BAGS = 32
NEAR = 3
MIB = 2**20

Step = Callable[[], Tensor]


def memory_now(key: str) -> float:
    """Return VmRSS or VmHWM of this process in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure(step: Step, leaves: list[Tensor], rounds: int) -> tuple[float, float]:
    """Return the median seconds of forward + backward, and the MiB it needs beside its leaves."""
    seconds, grown = [], []
    for _ in range(rounds):
        for leaf in leaves:
            leaf.grad = None
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = memory_now("VmRSS")
        begin = time.perf_counter()
        step().sum().backward()
        seconds.append(time.perf_counter() - begin)
        gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves) / MIB
        grown.append(memory_now("VmHWM") - before - gradients)
    return statistics.median(seconds), statistics.median(grown)


def compare(
    case: str, ours: Step, plain: Step, leaves: list[Tensor], rounds: int = 3, *, check: bool = True
) -> list[Row]:
    """Return times, their ratio and memory of both, once their gradients agree."""
    if check:
        require_same_gradients(case, ours, plain, leaves)
    (ours_s, ours_mib), (plain_s, plain_mib) = (measure(s, leaves, rounds) for s in (ours, plain))
    return [
        Row(case, ours_s, "s"),
        Row(f"{case}, times as fast as plain", plain_s / ours_s, "×"),
        Row(f"{case}, memory", ours_mib, "MiB"),
        Row(f"{case}, memory of plain", plain_mib, "MiB"),
    ]


def require_same_gradients(case: str, ours: Step, plain: Step, leaves: list[Tensor]) -> None:
    """Refuse to time what is wrong."""
    found = []
    for step in (ours, plain):
        for leaf in leaves:
            leaf.grad = None
        step().square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for mine, other in zip(*found, strict=True):
        assert mine is not None and other is not None
        off = float((mine - other).abs().max() / other.abs().max())
        if off > 1e-4:
            raise SystemExit(f"{case}: gradients differ by {off:.1e}")


def leaf(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


def eager_pool(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("mhd,thd->hmt", q, k) * WIDTH**-0.5, -1)
    return torch.einsum("hmt,the->mhe", weights, v)


def padded(x: Tensor, lengths: list[int]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True)


def pooling(tiles: int) -> list[Row]:
    rows = []
    cu = torch.tensor([0, tiles], dtype=torch.int32)
    k, v = (leaf(tiles, HEADS, WIDTH, seed=s) for s in (1, 2))
    for m in (1, 16):
        q = leaf(m, HEADS, WIDTH, seed=0)
        rows += compare(
            f"pooling, {m} queries, {tiles:,} tiles",
            lambda q=q: cross_attention_pool(q, k, v, cu)[0][0],
            lambda q=q: eager_pool(q, k, v),
            [q, k, v],
        )
    lengths = [int(tiles * (2 * i + 1) / BAGS**2) for i in range(BAGS)]
    lengths[-1] += tiles - sum(lengths)
    ragged = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    q = leaf(4, HEADS, WIDTH, seed=0)

    def loop() -> Tensor:
        parts = [eager_pool(q, k[a:b], v[a:b]) for a, b in pairwise(ragged.tolist())]
        return torch.stack(parts)

    def padding() -> Tensor:
        keys, values = padded(k, lengths).transpose(1, 2), padded(v, lengths).transpose(1, 2)
        inside = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        queries = q.transpose(0, 1)[None].expand(BAGS, -1, -1, -1)
        mask = inside[:, None, None]
        return F.scaled_dot_product_attention(queries, keys, values, mask).transpose(1, 2)

    def packed() -> Tensor:
        return cross_attention_pool(q, k, v, ragged)[0]

    case = f"pooling, 4 queries, {BAGS} bags of {min(lengths):,} to {max(lengths):,}"
    rows += compare(f"{case} (plain: a loop)", packed, loop, [q, k, v])
    return rows + compare(f"{case} (plain: padding)", packed, padding, [q, k, v])[1:2]


def linear(tiles: int) -> list[Row]:
    cu = torch.tensor([0, tiles], dtype=torch.int32)
    leaves = [leaf(tiles, HEADS, WIDTH, seed=s) for s in range(3)]

    def plain() -> Tensor:
        queries, keys = (F.elu(x) + 1 for x in leaves[:2])
        kv = torch.einsum("thd,the->hde", keys, leaves[2])
        mass = torch.einsum("thd,hd->th", queries, keys.sum(0)) + 1e-6
        return torch.einsum("thd,hde->the", queries, kv) / mass[..., None]

    few = [x[:300].detach() for x in leaves]
    exact = linear_attention_reference(
        *few, torch.tensor([0, 300], dtype=torch.int32), "elu+1", "denominator", 1e-6
    )
    short = linear_attention(*few, torch.tensor([0, 300], dtype=torch.int32))
    torch.testing.assert_close(short, exact, rtol=1e-4, atol=1e-5)
    case = f"linear attention, {tiles:,} tiles"
    return compare(case, lambda: linear_attention(*leaves, cu), plain, leaves)


def attention(tiles: int, rounds: int) -> list[Row]:
    cu = torch.tensor([0, tiles], dtype=torch.int32)
    leaves = [leaf(tiles, HEADS, WIDTH, seed=s) for s in range(3)]

    def plain() -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in leaves)
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)

    rows = compare(
        f"self-attention, {tiles:,} tiles (plain: SDPA, default settings)",
        lambda: varlen_self_attention(*leaves, cu),
        plain,
        leaves,
        rounds,
        check=tiles <= 20_000,
    )
    side = int((1.5 * tiles) ** 0.5)
    places = torch.randperm(side * side, generator=torch.Generator().manual_seed(0))[:tiles]
    grid = torch.stack([places % side, places // side], 1)
    begin = time.perf_counter()
    near = find_neighbours(grid, cu, NEAR)
    found_s = time.perf_counter() - begin
    seconds, mib = measure(
        lambda: varlen_self_attention(*leaves, cu, neighbours=near), leaves, rounds
    )
    case = f"attention within {NEAR} steps, {tiles:,} tiles"
    return [
        *rows,
        Row(case, seconds, "s"),
        Row(f"{case}, times as fast as among all", rows[0].value / seconds, "×"),
        Row(f"{case}, memory", mib, "MiB"),
        Row(f"{case}, finding neighbours", found_s, "s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    parts = ("pooling", "linear", "attention")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--tiles", type=int, default=50_000)
    parser.add_argument("--attended", type=int, nargs="+", default=[10_000])
    parser.add_argument("--rounds", type=int, default=3, help="of self-attention")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    avoid_broken_units()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    if "pooling" in arguments.parts:
        rows += pooling(arguments.tiles)
    if "linear" in arguments.parts:
        rows += linear(arguments.tiles)
    if "attention" in arguments.parts:
        for tiles in arguments.attended:
            rows += attention(tiles, arguments.rounds)
    show(rows)
    if arguments.record:
        record("attention", rows, packages=("torch",))


if __name__ == "__main__":
    main()
