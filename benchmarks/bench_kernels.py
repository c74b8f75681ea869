"""Gated attention pooling 1,024 → 512 → 256: a training step against eager torch and the products.

    python benchmarks/bench_kernels.py [--record] [--quick] [--device cuda]

A step is forward and backward of one bag, all parameters, no gradient of the features. The rivals
take turns within each round, and ratios are medians of the rounds' ratios. Memory is the high-water
mark of a process of its own that does one step.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from bagscope.arithmetic import avoid_broken_units

avoid_broken_units()

import recording  # noqa: E402
import torch  # noqa: E402
from high_water import HighWater  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from bagscope.kernels.dispatch import float32_policy, own_arithmetic  # noqa: E402
from bagscope.kernels.gated_attention_pool import gated_attention_pool  # noqa: E402
from bagscope.kernels.gated_attention_pool.reference import (  # noqa: E402
    gated_attention_pool_reference,
)

FEATURES, HIDDEN, GATES = 1024, 512, 256
Params = dict[str, Tensor]


def main() -> None:
    """Check, measure, compare with the targets, record."""
    arguments = parse_arguments()
    if arguments.memory_of:
        print(step_memory_mib(arguments.memory_of, arguments.tiles))
        return
    device = torch.device(arguments.device)
    check(device)
    sizes = [1000, 4000] if arguments.quick else [1000, 10_000, 100_000, 500_000]
    if device.type == "cuda" and not arguments.quick:
        sizes = [10_000, 200_000, 1_000_000]
    rows = []
    if "steps" in arguments.parts:
        for tiles in arguments.sizes or sizes:
            for branches in (1, 5):
                rows += step_rows(tiles, branches, device, arguments)
    if "packed" in arguments.parts:
        rows += packed_rows(device, arguments)
    if "rest" in arguments.parts:
        for tiles in [20_000] if arguments.quick else [20_000, 100_000]:
            rows += memory_rows(tiles) if device.type == "cpu" else []
        rows += rate_rows(device) if device.type == "cuda" else []
    print(f"float32 products: {float32_policy()[1]}")
    recording.show(rows)
    if arguments.record:
        on_gpu = device.type == "cuda"
        recording.record(
            "kernels_gpu" if on_gpu else "kernels",
            rows,
            packages=["torch", "triton"],
            script=Path(__file__).name,
            on=torch.cuda.get_device_name(device) if on_gpu else None,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    parser.add_argument("--quick", action="store_true", help="small bags, few rounds")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (a C++ compiler)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, help="rounds beyond the first, which is not counted")
    parser.add_argument("--sizes", type=int, nargs="+", help="tiles of the bag")
    parts = ("steps", "packed", "rest")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--tiles", type=int, default=100_000, help=argparse.SUPPRESS)
    return parser.parse_args()


def parameters(branches: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Params:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "weight": (HIDDEN, FEATURES),
        "bias": (HIDDEN,),
        "weight_v": (GATES, HIDDEN),
        "bias_v": (GATES,),
        "weight_u": (GATES, HIDDEN),
        "bias_u": (GATES,),
        "weight_w": (branches, GATES),
        "bias_w": (branches,),
    }
    return {
        name: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5)
        .to(device, dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    }


def bag(tiles: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(tiles, FEATURES, generator=generator, device=device, dtype=dtype)


def eager(x: Tensor, p: Params) -> Tensor:
    """Pool one bag the way every public implementation does."""
    h = functional.relu(functional.linear(x, p["weight"], p["bias"]))
    v = torch.tanh(functional.linear(h, p["weight_v"], p["bias_v"]))
    u = torch.sigmoid(functional.linear(h, p["weight_u"], p["bias_u"]))
    e = functional.linear(v * u, p["weight_w"], p["bias_w"])
    return e.softmax(0).T @ h


def padded(x: Tensor, is_tile: Tensor, p: Params) -> Tensor:
    """Pool bags (B, longest, F) with a mask, as padded batches are."""
    h = functional.relu(functional.linear(x, p["weight"], p["bias"]))
    v = torch.tanh(functional.linear(h, p["weight_v"], p["bias_v"]))
    u = torch.sigmoid(functional.linear(h, p["weight_u"], p["bias_u"]))
    e = functional.linear(v * u, p["weight_w"], p["bias_w"])
    return e.masked_fill(~is_tile[..., None], -torch.inf).softmax(1).transpose(1, 2) @ h


def ours(x: Tensor, p: Params, borders: Tensor, keep: str = "auto") -> Tensor:
    gates = {name: p[name] for name in list(p)[2:]}
    projection = (p["weight"], p["bias"])
    found = gated_attention_pool(x, borders, projection=projection, keep=keep, **gates)  # type: ignore[arg-type]
    return found.pooled


def step(p: Params, forward: Callable[[], Tensor]) -> None:
    for tensor in p.values():
        tensor.grad = None
    forward().float().square().mean().backward()


def products(x: Tensor, p: Params) -> Callable[[], None]:
    """Return the step's five matrix products alone, into memory made beforehand."""
    weight = p["weight"].detach()
    gates = torch.cat((p["weight_v"], p["weight_u"])).detach()
    h, dh = x.new_empty(len(x), HIDDEN), x.new_empty(len(x), HIDDEN)
    z = x.new_empty(len(x), 2 * GATES)
    grad_gates, grad_weight = torch.empty_like(gates), torch.empty_like(weight)

    def work() -> None:
        with policy(x):
            torch.mm(x, weight.T, out=h)
            torch.mm(h, gates.T, out=z)
            torch.mm(z.T, h, out=grad_gates)
            torch.mm(z, gates, out=dh)
            torch.mm(dh.T, x, out=grad_weight)

    return work


@contextmanager
def policy(x: Tensor) -> Iterator[None]:
    """Do float32 products on a processor as the package does."""
    with own_arithmetic() if x.device.type == "cpu" else nullcontext():
        yield


def check(device: torch.device) -> None:
    """Refuse to time what is wrong: outputs and gradients against float64."""
    borders = torch.tensor([0, 3000, 3000, 4100], dtype=torch.int32, device=device)
    x, p = bag(4100, device), parameters(5, device)
    exact = {name: t.detach().double().requires_grad_() for name, t in p.items()}
    truth = gated_attention_pool_reference(x.double(), borders, *(exact[name] for name in exact))[0]
    truth.square().mean().backward()
    for keep in ("all", "nothing"):
        found = ours(x, p, borders, keep)
        for tensor in p.values():
            tensor.grad = None
        found.square().mean().backward()
        errors = {"pooled": _error(found, truth)}
        errors |= {n: _error(p[n].grad, exact[n].grad) for n in p if n != "bias_w"}
        if (worst := max(errors.values())) > 1e-4:
            raise SystemExit(f"keep={keep}: relative error {worst:.1e} ({errors}); not timing it")


def _error(found: Tensor | None, truth: Tensor | None) -> float:
    assert found is not None and truth is not None
    return float(
        (found.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max()
    )


def timed(
    work: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of each in every round but the first; all take turns in each round."""
    samples: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            wait(device)
            begin = time.perf_counter()
            run()
            wait(device)
            samples[name].append(time.perf_counter() - begin)
    return {name: values[1:] for name, values in samples.items()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ratio(samples: dict[str, list[float]], above: str, below: str) -> float:
    pairs = zip(samples[above], samples[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def step_rows(
    tiles: int, branches: int, device: torch.device, arguments: argparse.Namespace
) -> list[recording.Row]:
    x, p = bag(tiles, device), parameters(branches, device)
    borders = torch.tensor([0, tiles], dtype=torch.int32, device=device)

    def with_policy() -> None:
        with policy(x):
            step(p, lambda: eager(x, p))

    work: dict[str, Callable[[], None]] = {
        "eager": lambda: step(p, lambda: eager(x, p)),
        "eager, our policy": with_policy,
        "products": products(x, p),
        "ours": lambda: step(p, lambda: ours(x, p, borders)),
        "ours, nothing kept": lambda: step(p, lambda: ours(x, p, borders, "nothing")),
    }
    if arguments.compile:
        compiled = torch.compile(eager, dynamic=False)
        work["compiled"] = lambda: step(p, lambda: compiled(x, p))
    # Where it is slower than float32, once, to know by how much.
    if (is_fast := has_fast_bf16(device)) or tiles == 10_000:
        low, low_p = x.bfloat16(), parameters(branches, device, torch.bfloat16)
        work["bf16 products"] = products(low, low_p)
        work["ours, bf16"] = lambda: step(p, lambda: ours(low, p, borders))
    rounds = arguments.rounds or (3 if arguments.quick or tiles > 50_000 else 9)
    samples = timed(work, rounds, device)
    case = f"gated pooling, {tiles:,} tiles, K = {branches}: "
    return rows_of(samples, case, tiles, device, is_bf16_fast=is_fast)


def rows_of(
    samples: dict[str, list[float]],
    case: str,
    tiles: int,
    device: torch.device,
    *,
    is_bf16_fast: bool,
) -> list[recording.Row]:
    on_cpu = device.type == "cpu"
    big, huge = tiles >= 10_000, tiles == 100_000

    def row(words: str, above: str, below: str, **target: float) -> recording.Row:
        return recording.Row(case + words, ratio(samples, above, below), "×", **target)

    limit = {"at_most": 1.4} if big and on_cpu else {}
    speed = {"at_least": 2.5} if huge and on_cpu else {}
    if not on_cpu and tiles == 200_000:
        speed = {"at_least": 3.0}
    rows = [
        recording.Row(case + "a step", statistics.median(samples["ours"]) * 1000, "ms"),
        row("a step ÷ its products", "ours", "products", **limit),
        row("default eager ÷ a step", "eager", "ours", **speed),
        row("a step ÷ eager with our policy", "ours", "eager, our policy", at_most=1.05),
        row(
            "nothing kept ÷ kept",
            "ours, nothing kept",
            "ours",
            **({"at_most": 1.35} if huge else {}),
        ),
    ]
    if "compiled" in samples:
        rows.append(row("torch.compile ÷ a step", "compiled", "ours"))
    if "ours, bf16" in samples:
        low = {"at_most": 1.6} if big and is_bf16_fast else {}
        fast = {"at_least": 4.0} if huge and is_bf16_fast else {}
        rows.append(row("bf16 step ÷ its products", "ours, bf16", "bf16 products", **low))
        rows.append(row("default eager ÷ bf16 step", "eager", "ours, bf16", **fast))
    return rows


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether bf16 products are faster than float32 ones here."""
    if device.type == "cuda":
        return True
    a = torch.randn(512, 512)
    low = a.bfloat16()
    work: dict[str, Callable[[], None]] = {
        "float32": lambda: _discard(torch.mm(a, a)),
        "bf16": lambda: _discard(torch.mm(low, low)),
    }
    return ratio(timed(work, 5, device), "float32", "bf16") > 1.2


def packed_rows(device: torch.device, arguments: argparse.Namespace) -> list[recording.Row]:
    """Time 32 ragged bags packed, in a loop, and padded."""
    generator = torch.Generator().manual_seed(2)
    mean = 100 if arguments.quick else 1000
    spread = torch.randn(32, generator=generator).exp()
    lengths = (spread / spread.mean() * mean).long().clamp_min(1)
    borders = torch.cat((torch.zeros(1), lengths.cumsum(0))).to(device, torch.int32)
    x, p = bag(int(lengths.sum()), device), parameters(1, device)
    parts = x.split(lengths.tolist())
    batch = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    is_tile = (torch.arange(batch.shape[1]) < lengths[:, None]).to(device)
    work: dict[str, Callable[[], None]] = {
        "packed": lambda: step(p, lambda: ours(x, p, borders)),
        "loop": lambda: step(p, lambda: torch.stack([eager(part, p) for part in parts])),
        "padded": lambda: step(p, lambda: padded(batch, is_tile, p)),
    }
    samples = timed(work, arguments.rounds or 5, device)
    case = f"32 ragged bags, {len(x):,} tiles (longest {int(lengths.max()):,}): "
    target = {"at_least": 5.0} if device.type == "cuda" else {}
    return [
        recording.Row(
            case + "eager loop ÷ packed", ratio(samples, "loop", "packed"), "×", **target
        ),
        recording.Row(case + "eager padded ÷ packed", ratio(samples, "padded", "packed"), "×"),
    ]


def memory_rows(tiles: int) -> list[recording.Row]:
    rows = []
    for name in ("eager", "all", "nothing"):
        run = subprocess.run(
            [sys.executable, __file__, "--memory-of", name, "--tiles", str(tiles)],
            check=True,
            capture_output=True,
            text=True,
        )
        words = {"eager": "eager", "all": "all kept", "nothing": "nothing kept"}[name]
        rows.append(
            recording.Row(
                f"step memory above the bag, {tiles:,} tiles: {words}",
                float(run.stdout.split()[-1]),
                "MiB",
                at_most=128 if name == "nothing" else None,
            )
        )
    return rows


def step_memory_mib(name: str, tiles: int) -> float:
    """Return by how much one step raises this process's high-water mark."""
    device = torch.device("cpu")
    p = parameters(1, device)

    def one(x: Tensor) -> None:
        borders = torch.tensor([0, len(x)], dtype=torch.int32)
        step(p, lambda: eager(x, p)[None] if name == "eager" else ours(x, p, borders, name))

    # Libraries load, and threads start, before the bag is there.
    one(bag(64, device))
    for tensor in p.values():
        tensor.grad = None
    x = bag(tiles, device)
    memory = HighWater()
    one(x)
    return memory.raised_mib


def rate_rows(device: torch.device) -> list[recording.Row]:
    """Measure bandwidth and matrix rate, and where gated pooling stands to them, on a GPU."""
    tiles = 200_000
    low = torch.bfloat16
    x, p = bag(tiles, device, low), parameters(1, device)
    borders = torch.tensor([0, tiles], dtype=torch.int32, device=device)
    a, copy = torch.randn(8192, 8192, device=device, dtype=low), torch.empty_like(x)
    work: dict[str, Callable[[], None]] = {
        "product": lambda: _discard(torch.mm(a, a)),
        "copy": lambda: _discard(copy.copy_(x)),
        "step": lambda: step(p, lambda: ours(x, p, borders)),
    }
    seconds = {name: statistics.median(s) for name, s in timed(work, 9, device).items()}
    operations_s = 2 * 8192**3 / seconds["product"]
    bytes_s = 2 * x.nbytes / seconds["copy"]
    operations = 2 * tiles * (2 * FEATURES * HIDDEN + 3 * HIDDEN * 2 * GATES)
    roofline_s = max(operations / operations_s, 2 * x.nbytes / bytes_s)
    return [
        recording.Row("measured bf16 product rate", operations_s / 1e12, "TFLOP/s"),
        recording.Row("measured copy bandwidth", bytes_s / 1e9, "GB/s"),
        recording.Row(
            f"gated pooling, {tiles:,} tiles, bf16: step ÷ roofline",
            seconds["step"] / roofline_s,
            "×",
            at_most=2.0,
        ),
    ]


def _discard(_: Tensor) -> None:
    return None


if __name__ == "__main__":
    main()
