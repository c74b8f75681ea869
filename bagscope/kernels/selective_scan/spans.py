"""Channels apart, each span of them in a thread of its own.

Channels don't know of each other in the scan. A thread that keeps its span for the whole bag waits
for nobody and finds its buffers in its core's cache; torch's own threads would meet at the end of
every small step, and one that spins there without a core loses a scheduler's slice.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

_STEP_ELEMENTS = 1 << 13
"""Elements of a step in a span: more don't stay in the cache for a chunk of steps, and fewer cost
less than the call that does them."""
_LEAST_ELEMENTS = 1 << 11
_MOST_THREADS = 8
"""Python hands out one call at a time; beyond this the threads wait for it."""


def spans_of(features: int, states: int) -> list[slice]:
    """Cut the channels into spans, at least one per thread where a span is worth a thread."""
    elements = features * states
    wanted = max(_threads(), elements // _STEP_ELEMENTS)
    count = max(1, min(wanted, elements // _LEAST_ELEMENTS, features))
    borders = [features * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(borders)]


def over_spans(work: Callable[[int, slice], None], spans: list[slice]) -> None:
    """Run `work(index, span)` for every span; it writes to tensors that are there."""

    def alone(index: int) -> None:
        # Thread by thread, like the settings of `_prepare`; it also keeps autograd out.
        with torch.inference_mode():
            work(index, spans[index])

    threads = torch.get_num_threads()
    workers = min(_threads(), len(spans))
    try:
        with ThreadPoolExecutor(workers, "selective-scan", initializer=_prepare) as pool:
            list(pool.map(alone, range(len(spans))))
    finally:
        # The number set in a thread is also what later threads begin with.
        torch.set_num_threads(threads)


def add_products_in_turn(
    targets: tuple[Tensor, ...], left: tuple[Tensor, ...], right: tuple[Tensor, ...]
) -> None:
    """Add `left[i] * right[i]` to `targets[i]`, the second after the first: a recurrence.

    `right[i + 1]` may be `targets[i]`. One call of torch that loops over the list inside is three
    times as fast for small steps, and leaves Python to the other threads meanwhile.
    """
    if _lists_go_in_turn():
        torch._foreach_addcmul_(targets, left, right)
        return
    for target, a, b in zip(targets, left, right, strict=True):
        target.addcmul_(a, b)


@lru_cache(maxsize=1)
def _lists_go_in_turn() -> bool:
    """Try what torch does on processors but doesn't promise."""
    rows = torch.arange(1.0, 5.0)[:, None].repeat(1, 64)
    steps = rows.clone().unbind(0)
    torch._foreach_addcmul_(steps[1:], rows[1:].unbind(0), steps[:-1])
    return [float(step[-1]) for step in steps] == [1.0, 4.0, 15.0, 64.0]


def _threads() -> int:
    return min(torch.get_num_threads(), _MOST_THREADS)


def _prepare() -> None:
    torch.set_num_threads(1)
    # Decayed states end in denormal numbers, which some processors multiply at a fortieth of the
    # speed; where the processor can't flush them, they stay.
    torch.set_flush_denormal(True)
