"""The operations that bench_gpu.py times, each beside its formula in plain torch and libraries.

Shapes: eight heads of 64 features for attention; scans of 1,024 channels, 16 states (S6) or 16
heads of 64 and 128 states (Mamba-2); one branch over 512 features for pooling by scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bagscope.kernels.causal_conv1d import causal_conv1d
from bagscope.kernels.cross_attention_pool import cross_attention_pool
from bagscope.kernels.linear_attention import linear_attention
from bagscope.kernels.segment_softmax_pool import segment_softmax_pool
from bagscope.kernels.selective_scan import selective_scan, selective_scan_reference
from bagscope.kernels.ssd_scan import ssd_scan
from bagscope.kernels.varlen_self_attention import find_neighbours, varlen_self_attention

HEADS, WIDTH, QUERIES, NEAR = 8, 64, 16, 3
INNER, STATES, SSD_HEADS, SSD_STATES, TAPS, CHUNK = 1024, 16, 16, 128, 4, 64
Step = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation over bags of some lengths.

    Attributes:
        shared: what all bags share, such as weights.
        rows: tensors with one row per tile.
        ours: takes `shared` and `rows`, all bags packed.
        plain: takes `shared` and the rows of one bag, in plain torch.
        rivals: libraries, for one bag, by name; they take what `plain` takes.
        operations: of a step's matrix products, all tiles.
        bytes: that a step must move at least.
    """

    lengths: list[int]
    shared: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    ours: Step
    plain: Step
    rivals: dict[str, Step] = field(default_factory=dict)
    operations: float = 0.0
    bytes: float = 0.0

    def loop(self, *inputs: Tensor) -> Tensor:
        """Return what `plain` makes of one bag after the other."""
        shared, rows = inputs[: len(self.shared)], inputs[len(self.shared) :]
        parts = zip(*(x.split(self.lengths) for x in rows), strict=True)
        return torch.cat([self.plain(*shared, *part) for part in parts])


@dataclass(frozen=True, slots=True)
class Operation:
    """How to make the case of an operation, and up to how many tiles it is worth the time.

    Attributes:
        plain_most: tiles of a bag that the plain formula has memory or time for.
        most: tiles that the operation itself is timed with.
        compiles: whether torch.compile can take the plain formula; loops over rows it can't.
    """

    build: Callable[[list[int], torch.device, torch.dtype, bool], Case]
    plain_most: int = 1_000_000
    most: int = 1_000_000
    compiles: bool = True


def maker(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return what makes random leaves, each of another seed."""
    seeds: Iterator[int] = iter(range(100))

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(device).manual_seed(next(seeds))
        made = torch.randn(*shape, generator=generator, device=device, dtype=dtype) * scale
        return made.requires_grad_()

    return make


def borders(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def pooling(lengths: list[int], device: torch.device, dtype: torch.dtype, compiled: bool) -> Case:
    tiles, make, cu = sum(lengths), maker(device, dtype), borders(lengths, device)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("mhd,thd->hmt", q, k) * WIDTH**-0.5, -1)
        return torch.einsum("hmt,the->mhe", weights, v)[None]

    return Case(
        lengths=lengths,
        shared=(make(QUERIES, HEADS, WIDTH),),
        rows=(make(tiles, HEADS, WIDTH), make(tiles, HEADS, WIDTH)),
        ours=lambda q, k, v: cross_attention_pool(q, k, v, cu)[0],
        plain=plain,
        rivals={"SDPA": sdpa},
        operations=3.5 * 4 * tiles * QUERIES * HEADS * WIDTH,
        bytes=6 * tiles * HEADS * WIDTH * dtype.itemsize,
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention of one bag by torch, (1, m, H, d) for pooling queries."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention(lengths: list[int], device: torch.device, dtype: torch.dtype, compiled: bool) -> Case:
    tiles, make, cu = sum(lengths), maker(device, dtype), borders(lengths, device)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("ihd,jhd->hij", q, k) * WIDTH**-0.5, -1)
        return torch.einsum("hij,jhe->ihe", weights, v)

    return Case(
        lengths=lengths,
        shared=(),
        rows=tuple(make(tiles, HEADS, WIDTH) for _ in range(3)),
        ours=lambda q, k, v: varlen_self_attention(q, k, v, cu, longest=max(lengths)),
        plain=plain,
        rivals={"SDPA": lambda q, k, v: sdpa(q, k, v)[0]},
        operations=3.5 * 4 * sum(n * n for n in lengths) * HEADS * WIDTH,
        bytes=11 * tiles * HEADS * WIDTH * dtype.itemsize,
    )


def lattice(tiles: int) -> Tensor:
    """Return the places of tissue that fills two thirds of a square, in no order."""
    side = int((1.5 * tiles) ** 0.5) + 1
    places = torch.randperm(side * side, generator=torch.Generator().manual_seed(0))[:tiles]
    return torch.stack([places % side, places // side], 1)


def neighbourhood(
    lengths: list[int], device: torch.device, dtype: torch.dtype, compiled: bool
) -> Case:
    tiles, make, cu = sum(lengths), maker(device, dtype), borders(lengths, device)
    grid = torch.cat([lattice(n) for n in lengths]).to(device)
    near = find_neighbours(grid, cu, NEAR)

    def plain(q: Tensor, k: Tensor, v: Tensor, grid: Tensor) -> Tensor:
        is_near = (grid[:, None] - grid[None]).abs().amax(-1) <= NEAR
        scores = torch.einsum("ihd,jhd->hij", q, k) * WIDTH**-0.5
        weights = torch.softmax(scores.masked_fill(~is_near, -torch.inf), -1)
        return torch.einsum("hij,jhe->ihe", weights, v)

    def flex(q: Tensor, k: Tensor, v: Tensor, grid: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled_flex(q, k, v, block_mask=blocks)[0].transpose(0, 1)

    rivals: dict[str, Step] = {}
    if compiled and tiles <= 50_000:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def is_near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (grid[i] - grid[j]).abs().amax(-1) <= NEAR

        compiled_flex = torch.compile(flex_attention)
        blocks = create_block_mask(is_near, None, None, tiles, tiles, device=str(device))
        rivals["flex attention"] = flex
    return Case(
        lengths=lengths,
        shared=(),
        rows=(*(make(tiles, HEADS, WIDTH) for _ in range(3)), grid),
        ours=lambda q, k, v, grid: varlen_self_attention(q, k, v, cu, neighbours=near),
        plain=plain,
        rivals=rivals,
        operations=3.5 * 4 * tiles * (2 * NEAR + 1) ** 2 / 1.5 * HEADS * WIDTH,
        bytes=11 * tiles * HEADS * WIDTH * dtype.itemsize,
    )


def linear(lengths: list[int], device: torch.device, dtype: torch.dtype, compiled: bool) -> Case:
    tiles, make, cu = sum(lengths), maker(device, dtype), borders(lengths, device)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        mixed = torch.einsum("ihd,hde->ihe", q, torch.einsum("jhd,jhe->hde", k, v))
        return mixed / (torch.einsum("ihd,hd->ih", q, k.sum(0)) + 1e-6)[..., None]

    return Case(
        lengths=lengths,
        shared=(),
        rows=tuple(make(tiles, HEADS, WIDTH) for _ in range(3)),
        ours=lambda q, k, v: linear_attention(q, k, v, cu),
        plain=plain,
        operations=3 * 4 * tiles * HEADS * WIDTH**2,
        bytes=11 * tiles * HEADS * WIDTH * dtype.itemsize,
    )


def convolution(
    lengths: list[int], device: torch.device, dtype: torch.dtype, compiled: bool
) -> Case:
    tiles, make, cu = sum(lengths), maker(device, dtype), borders(lengths, device)

    def plain(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        rows = F.pad(x.T[None], (TAPS - 1, 0))
        return F.silu(F.conv1d(rows, weight[:, None], bias, groups=INNER))[0].T

    rivals: dict[str, Step] = {}
    if find_spec("fla") is not None:

        def fla(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
            from fla.modules.convolution import causal_conv1d as theirs

            found = theirs(x[None], weight, bias, activation="silu")
            out: Tensor = (found[0] if isinstance(found, tuple) else found)[0]
            return out

        rivals["fla"] = fla
    return Case(
        lengths=lengths,
        shared=(make(INNER, TAPS, scale=0.5), make(INNER)),
        rows=(make(tiles, INNER),),
        ours=lambda weight, bias, x: causal_conv1d(x, weight, bias, True, cu),
        plain=plain,
        rivals=rivals,
        bytes=5 * tiles * INNER * dtype.itemsize,
    )


def s6(lengths: list[int], device: torch.device, dtype: torch.dtype, compiled: bool) -> Case:
    tiles, make, cu = sum(lengths), maker(device, dtype), borders(lengths, device)
    states = torch.arange(1.0, STATES + 1, device=device)
    rates = -states.repeat(INNER, 1).to(dtype).requires_grad_()

    def plain(A: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        one = borders([len(u)], device)
        return selective_scan_reference(u, delta, A, B, C, None, z, None, True, one)

    return Case(
        lengths=lengths,
        shared=(rates,),
        rows=tuple(make(tiles, wide) for wide in (INNER, INNER, STATES, STATES, INNER)),
        ours=lambda A, u, delta, B, C, z: selective_scan(
            u, delta, A, B, C, None, z, None, True, cu
        ),
        plain=plain,
        bytes=(11 * INNER + 6 * STATES) * tiles * dtype.itemsize,
    )


def ssd(lengths: list[int], device: torch.device, dtype: torch.dtype, compiled: bool) -> Case:
    tiles, make, cu = sum(lengths), maker(device, dtype), borders(lengths, device)
    steps = make(tiles, SSD_HEADS).detach().abs().mul_(0.1).requires_grad_()
    rates = make(SSD_HEADS).detach().abs().neg_().requires_grad_()

    def plain(A: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """Return y = (C Bᵀ ∘ exp of the decay between) Δx, every pair of rows at once."""
        wide = torch.promote_types(x.dtype, torch.float32)
        total = (dt.to(wide) * A.to(wide)).cumsum(0).T
        between = (total[:, :, None] - total[:, None]).tril().exp().tril()
        along = (C[:, 0] @ B[:, 0].T) * between
        return torch.einsum("hij,jhp->ihp", along.to(x.dtype), dt[..., None] * x)

    rivals: dict[str, Step] = {}
    if find_spec("fla") is not None:

        def fla(A: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
            from fla.ops.simple_gla import chunk_simple_gla

            shape = (1, len(x), SSD_HEADS, SSD_STATES)
            q, k = (y[None].expand(shape).contiguous() for y in (C, B))
            decay = (dt.float() * A.float())[None]
            out: Tensor = chunk_simple_gla(q, k, (dt[..., None] * x)[None], decay, scale=1.0)[0][0]
            return out

        rivals["fla"] = fla
    return Case(
        lengths=lengths,
        shared=(rates,),
        rows=(
            make(tiles, SSD_HEADS, WIDTH),
            steps,
            *(make(tiles, 1, SSD_STATES, scale=0.3) for _ in range(2)),
        ),
        ours=lambda A, x, dt, B, C: ssd_scan(x, dt, A, B, C, None, None, cu, CHUNK),
        plain=plain,
        rivals=rivals,
        operations=3
        * 2
        * tiles
        * (CHUNK * (SSD_STATES + INNER) + 2 * WIDTH * SSD_STATES * SSD_HEADS),
        bytes=(5 * INNER + 5 * SSD_HEADS + 6 * SSD_STATES) * tiles * dtype.itemsize,
    )


def segments(lengths: list[int], device: torch.device, dtype: torch.dtype, compiled: bool) -> Case:
    tiles, make, cu = sum(lengths), maker(device, dtype), borders(lengths, device)
    return Case(
        lengths=lengths,
        shared=(),
        rows=(make(tiles, 1), make(tiles, HEADS * WIDTH)),
        ours=lambda scores, h: segment_softmax_pool(scores, h, cu).pooled,
        plain=lambda scores, h: (scores.softmax(0).T @ h)[None],
        bytes=(3 * HEADS * WIDTH + 3) * tiles * dtype.itemsize,
    )


OPERATIONS = {
    "cross_attention_pool": Operation(pooling),
    "varlen_self_attention": Operation(attention, plain_most=10_000, most=50_000),
    "attention within 3 steps": Operation(neighbourhood, plain_most=10_000),
    "linear_attention": Operation(linear),
    "causal_conv1d": Operation(convolution),
    # Row by row, a thousand rows are a second.
    "selective_scan": Operation(s6, plain_most=1000, compiles=False),
    "ssd_scan": Operation(ssd, plain_most=4000),
    "segment_softmax_pool": Operation(segments),
}
