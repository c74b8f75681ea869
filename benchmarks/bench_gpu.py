"""Every operation but gated pooling on a GPU: a step against plain torch, libraries and the device.

    python benchmarks/bench_gpu.py [--record] [--compile] [--device cpu] [--sizes small]

A step is forward and backward with all gradients, in bfloat16 on CUDA and float32 on a processor,
where it is but a rehearsal. Each operation is first compared with its formula in float64, and each
library with that formula; what differs is not timed. The rivals take turns within each round.
Bandwidth and matrix rate are measured in the same call. `bytes` are what a step must move at least:
each input read once forward and once backward, each output and gradient written once.

The formula in plain torch is `eager`; attention has torch's SDPA and, compiled, flex attention as
rivals too; the Mamba-2 scan and the convolution have the kernels of flash-linear-attention, where
`fla` can be imported (its linear attention is causal and ours is not, so these are not compared).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import recording
import torch
from bench_kernels import ratio, timed
from gpu_cases import OPERATIONS, Case, Operation, Step
from torch import Tensor

BAGS = 32
_COMPILED_MOST = 200_000
SIZES = {"small": [64, 130], "full": [10_000, 200_000, 1_000_000]}


def main() -> None:
    """Check, measure, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (a C++ compiler)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--only", choices=OPERATIONS, nargs="+", default=list(OPERATIONS))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; rehearse with --device cpu --sizes small")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if find_spec("fla") is None:
        print("flash-linear-attention is not installed; its kernels are left out")
    rates = measured_rates(device, dtype, small=arguments.sizes == "small")
    rows = rate_rows(rates, device)
    for name in arguments.only:
        operation = OPERATIONS[name]
        check(name, operation, device, dtype)
        rows += size_rows(name, operation, device, dtype, rates, arguments)
        rows += packed_rows(name, operation, device, dtype, arguments.sizes == "small")
    recording.show(rows)
    if arguments.record:
        on = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        recording.record("gpu", rows, packages=["torch", "triton"], on=on)


# --- measuring ------------------------------------------------------------------------------


def step(case: Case, function: Step, cotangent: Tensor | None = None) -> list[Tensor]:
    """Return output and gradients of a step; without a cotangent the output alone weighs."""
    inputs = (*case.shared, *case.rows)
    out = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    given = torch.ones_like(out) if cotangent is None else cotangent.to(out)
    return [out.detach(), *torch.autograd.grad(out, wanted, given)]


def check(name: str, operation: Operation, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse to time what is wrong: outputs and gradients of ragged bags against float64."""
    case = operation.build([40, 1, 259], device, dtype, False)
    worst = difference(case, case.ours, case.loop)
    if not worst <= (1e-4 if dtype == torch.float32 else 3e-2):
        raise SystemExit(f"{name}: relative error {worst:.1e}; not timing it")


def difference(case: Case, function: Step, plain: Step) -> float:
    """Return the largest relative error of output and gradients against float64."""
    exact = Case(
        lengths=case.lengths,
        shared=tuple(doubled(x) for x in case.shared),
        rows=tuple(doubled(x) for x in case.rows),
        ours=case.ours,
        plain=case.plain,
    )
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        shape = function(*case.shared, *case.rows).shape
    weights = torch.randn(shape, generator=generator)
    found, truth = step(case, function, weights), step(exact, plain, weights)
    pairs = zip(found, truth, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def doubled(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def size_rows(
    name: str,
    operation: Operation,
    device: torch.device,
    dtype: torch.dtype,
    rates: tuple[float, float],
    arguments: argparse.Namespace,
) -> list[recording.Row]:
    smallest, *larger = SIZES[arguments.sizes]
    sizes = {min(smallest, operation.plain_most)}
    sizes |= {min(tiles, operation.most) for tiles in (smallest, *larger)}
    # Compilers take seconds for every shape: one size shows what they bring.
    limit = min(operation.plain_most, _COMPILED_MOST)
    compiled_at = max(tiles for tiles in sizes if tiles <= limit)
    rows = []
    for tiles in sorted(sizes):
        compiled = arguments.compile and operation.compiles and tiles == compiled_at
        case = operation.build([tiles], device, dtype, compiled)
        contenders: dict[str, Step] = {"ours": case.ours}
        if tiles <= operation.plain_most:
            contenders["eager"] = case.plain
            if compiled:
                contenders["torch.compile"] = torch.compile(case.plain)
        contenders |= case.rivals
        rows += race(f"{name}, {tiles:,} tiles: ", case, contenders, device, rates)
        del case, contenders
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def race(
    words: str,
    case: Case,
    contenders: dict[str, Step],
    device: torch.device,
    rates: tuple[float, float],
) -> list[recording.Row]:
    """Time who can do it at all and gets the same; say who can't, and why."""
    work: dict[str, Callable[[], None]] = {
        name: partial(_run, case, function) for name, function in contenders.items()
    }
    expected: Tensor | None = None
    for name, function in contenders.items():
        try:
            out = step(case, function)[0].float()
        except Exception as error:  # whatever a library meets, the others are still timed
            if name == "ours":
                raise
            del work[name]
            print(f"{words}{name} is left out ({type(error).__name__}: {str(error)[:120]})")
            continue
        expected = out if expected is None else expected
        off = float((out - expected).abs().max() / expected.abs().max())
        if not off <= 0.1:
            del work[name]
            print(f"{words}{name} is left out: its result differs by {off:.1e}")
    # Few tiles are a rehearsal, and very many take long.
    rounds = 1 if sum(case.lengths) < 1000 else 5 if sum(case.lengths) < 500_000 else 3
    samples = timed(work, rounds, device)
    seconds = statistics.median(samples["ours"])
    operations_s, bytes_s = rates
    roofline_s = max(case.operations / operations_s, case.bytes / bytes_s)
    rows = [
        recording.Row(words + "a step", seconds * 1000, "ms"),
        recording.Row(words + "a step ÷ its roofline", seconds / roofline_s, "×"),
        recording.Row(words + "share of the bandwidth", case.bytes / seconds / bytes_s, ""),
    ]
    if case.operations:
        share = case.operations / seconds / operations_s
        rows.append(recording.Row(words + "share of the matrix rate", share, ""))
    rivals = [name for name in samples if name != "ours"]
    return rows + [
        recording.Row(f"{words}{name} ÷ a step", ratio(samples, name, "ours"), "×")
        for name in rivals
    ]


def packed_rows(
    name: str, operation: Operation, device: torch.device, dtype: torch.dtype, small: bool
) -> list[recording.Row]:
    """Time ragged bags packed and in a loop."""
    mean = 8 if small else 1000
    spread = torch.randn(BAGS, generator=torch.Generator().manual_seed(2)).exp()
    lengths = (spread / spread.mean() * mean).long().clamp(1, 4 * mean).tolist()
    if max(lengths) > operation.plain_most:
        return []
    case = operation.build(lengths, device, dtype, False)
    work: dict[str, Callable[[], None]] = {
        "packed": partial(_run, case, case.ours),
        "loop": partial(_run, case, case.loop),
    }
    samples = timed(work, 1 if small else 3, device)
    words = f"{name}, {BAGS} ragged bags, {sum(lengths):,} tiles: eager loop ÷ packed"
    return [recording.Row(words, ratio(samples, "loop", "packed"), "×")]


def measured_rates(device: torch.device, dtype: torch.dtype, *, small: bool) -> tuple[float, float]:
    """Return operations per second of products, and bytes per second of copies."""
    side, elements = (512, 1 << 20) if small else (8192, 1 << 28)
    a = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.ones(elements, device=device, dtype=dtype)
    copy = torch.empty_like(source)
    work: dict[str, Callable[[], None]] = {
        "product": lambda: _discard(torch.mm(a, a)),
        "copy": lambda: _discard(copy.copy_(source)),
    }
    seconds = {name: statistics.median(s) for name, s in timed(work, 9, device).items()}
    return 2 * side**3 / seconds["product"], 2 * source.nbytes / seconds["copy"]


def rate_rows(rates: tuple[float, float], device: torch.device) -> list[recording.Row]:
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"
    return [
        recording.Row(f"products of {model}", rates[0] / 1e12, "TFLOP/s"),
        recording.Row(f"copies of {model}", rates[1] / 1e9, "GB/s"),
    ]


def _run(case: Case, function: Step) -> None:
    step(case, function)


def _discard(_: Tensor) -> None:
    return None


if __name__ == "__main__":
    main()
