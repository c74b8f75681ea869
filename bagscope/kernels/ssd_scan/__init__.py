"""The state-space dual of Mamba-2, over packed bags: one decay per head, so chunks are products.

For head h of group g, along the rows t of each bag, with the state zero before its first row:

    S_t = exp(Δ_t·A_h)·S_{t−1} + Δ_t·x_t B_tᵀ,    y_t = S_t C_t + D_h·x_t,    out_t = y_t·SiLU(z_t)

Shapes: T rows of all bags, H heads of width P, N states, G groups of heads that share B and C.

Memory: beside inputs and outputs, the state at every chunk's border and, with a gate, the ungated
output: 4·H·P·N / chunk + 4·H·P bytes per row. Operations: 2·T·(chunk·(N·G + P·H) + 2·P·N·H), all of
them matrix products. Chunks go across bags, so many small bags cost no more than a single long one;
a NaN in a bag may therefore show in bags that share a chunk with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bagscope.kernels import dispatch
from bagscope.kernels.segments import require_borders
from bagscope.kernels.ssd_scan import cpu
from bagscope.kernels.ssd_scan.reference import ssd_scan_reference

__all__ = ["ssd_scan", "ssd_scan_reference"]

_TENSORS = 7
_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor cu_seqlens, "
    "int chunk"
)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor,
    chunk: int = 64,
) -> Tensor:
    """Return the gated outputs of the scan, (T, H, P).

    Args:
        x: (T, H, P) inputs.
        dt: (T, H) step sizes, positive: bias and softplus come before.
        A: (H,) rates, negative.
        B: (T, G, N) input weights; G divides H.
        C: (T, G, N) output weights.
        D: (H,) weights of the skip connection, or None.
        z: (T, H, P) gate, or None.
        cu_seqlens: (bags + 1,) int32 borders; no state crosses them.
        chunk: rows per chunk; changes time and memory, not the result.

    Raises:
        ValueError: shapes or borders don't fit.
    """
    _require_shapes(x, dt, A, B, C, D, z, chunk)
    if not torch.compiler.is_compiling() and _way(x, B) == "reference":
        require_borders(cu_seqlens, len(x))
        return ssd_scan_reference(x, dt, A, B, C, D, z, cu_seqlens, chunk)
    out: Tensor = _forward(x, dt, A, B, C, D, z, cu_seqlens, chunk)[0]
    return out


def _require_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    chunk: int,
) -> None:
    if x.ndim != 3 or B.ndim != 3 or not B.shape[1] or x.shape[1] % B.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)} and B {tuple(B.shape)}; pass (tiles, H, P) and (tiles, G, N), "
            "G a divisor of H"
        )
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; pass at least 1 row")
    tiles, heads = x.shape[:2]
    wanted = {
        "dt": (dt, (tiles, heads)),
        "A": (A, (heads,)),
        "B": (B, (tiles, *B.shape[1:])),
        "C": (C, (tiles, *B.shape[1:])),
        "D": (D, (heads,)),
        "z": (z, tuple(x.shape)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; beside x and B it must be {shape}")


def _way(x: Tensor, B: Tensor) -> dispatch.Way:
    widest = max(x.shape[2], B.shape[2])
    return dispatch.choose("ssd_scan", x, refuses=f"width {widest}" if widest > 128 else "")


@torch.library.custom_op(
    "bagscope::ssd_scan", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor)"
)
def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, B, cu_seqlens = inputs[0], inputs[3], inputs[7]
    require_borders(cu_seqlens, len(x))
    if _way(x, B) in ("reference", "cpu") or not x.numel():
        with dispatch.own_arithmetic():
            return cpu.forward(*inputs)
    from bagscope.kernels.ssd_scan import triton

    return triton.forward(*inputs)


@_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, z = inputs[0], inputs[6]
    kept = torch.library.get_ctx().new_dynamic_size()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    ungated = x.new_empty(0) if z is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), ungated, x.new_empty(kept, dtype=wide)


@torch.library.custom_op(
    "bagscope::ssd_scan_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor ungated, Tensor states, {_INPUTS}) -> Tensor[]",
)
def _backward(dout: Tensor, ungated: Tensor, states: Tensor, *inputs: Any) -> list[Tensor]:
    x, B = inputs[0], inputs[3]
    if _way(x, B) in ("reference", "cpu") or not x.numel():
        with dispatch.own_arithmetic():
            return list(cpu.backward(dout, ungated, states, *inputs))
    from bagscope.kernels.ssd_scan import triton

    return list(triton.backward(dout, ungated, states, *inputs))


@_backward.register_fake
def _(dout: Tensor, ungated: Tensor, states: Tensor, *inputs: Any) -> list[Tensor]:
    x = inputs[0]
    return [x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:_TENSORS]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, cu_seqlens, chunk = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *given, cu_seqlens)
    ctx.chunk = chunk


def _differentiate(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * (_TENSORS + 2)
    ungated, states, *given, cu_seqlens = ctx.saved_tensors
    grads = _backward(dout, ungated, states, *given, cu_seqlens, ctx.chunk)
    kept = (None if t is None else g for t, g in zip(given, grads, strict=True))
    return (*kept, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
