"""The selective scan of Mamba-1 (S6), over packed bags.

For channel c and state n, along the rows t of each bag, with the state zero before its first row:

    Δ_t = softplus(delta_t + delta_bias)
    s_t[c, n] = exp(Δ_t[c]·A[c, n])·s_{t−1}[c, n] + Δ_t[c]·u_t[c]·B_t[n]
    y_t[c] = Σ_n s_t[c, n]·C_t[n] + D[c]·u_t[c],     out_t = y_t·SiLU(z_t)

Shapes: T rows of all bags, D channels, N states. `reverse` runs each bag from its last row to its
first; `order` runs through the rows in another order, as SR-Mamba does, and puts the results back.

Memory: beside inputs and outputs, the state at every chunk's border and, with a gate, the ungated
output: 4·D·N / (rows per chunk) + 4·D bytes per row (6 KiB at D = 1,024 and N = 16 on the CPU). The
rest of the T × D × N states exist a chunk at a time and are computed again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bagscope.kernels import dispatch
from bagscope.kernels.segments import require_borders
from bagscope.kernels.selective_scan import cpu
from bagscope.kernels.selective_scan.lanes import require_order
from bagscope.kernels.selective_scan.reference import selective_scan_reference

__all__ = ["selective_scan", "selective_scan_reference"]

_MOST_STATES = 256


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor,
    reverse: bool = False,
    order: Tensor | None = None,
) -> Tensor:
    """Return the gated outputs of the selective scan, (T, D).

    Args:
        u: (T, D) inputs.
        delta: (T, D) step sizes, before bias and softplus.
        A: (D, N) rates, negative.
        B: (T, N) input weights.
        C: (T, N) output weights.
        D: (D,) weights of the skip connection, or None.
        z: (T, D) gate, or None.
        delta_bias: (D,), or None.
        delta_softplus: whether the step sizes pass a softplus.
        cu_seqlens: (bags + 1,) int32 borders; no state crosses them.
        reverse: from each bag's last row to its first.
        order: (T,) int64 permutation that keeps every bag's rows within its borders: the p-th row
            visited is `order[p]`, and its result goes to `order[p]`.

    Raises:
        ValueError: shapes, borders or order don't fit.
    """
    _require_shapes(u, delta, A, B, C, D, z, delta_bias)
    inputs = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, reverse, order)
    # The compiler can't look at the environment; and autograd can't look into an operator.
    if not torch.compiler.is_compiling() and _way(u, A) == "reference":
        require_borders(cu_seqlens, len(u))
        require_order(order, cu_seqlens, len(u))
        return selective_scan_reference(*inputs)
    out: Tensor = _forward(*inputs)[0]
    return out


def _require_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.ndim != 2 or A.ndim != 2:
        raise ValueError(
            f"u is {tuple(u.shape)} and A {tuple(A.shape)}; pass (tiles, D) and (D, N)"
        )
    (tiles, features), states = u.shape, A.shape[1]
    wanted = {
        "delta": (delta, (tiles, features)),
        "A": (A, (features, states)),
        "B": (B, (tiles, states)),
        "C": (C, (tiles, states)),
        "D": (D, (features,)),
        "z": (z, (tiles, features)),
        "delta_bias": (delta_bias, (features,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; beside u and A it must be {shape}")


def _way(u: Tensor, A: Tensor) -> dispatch.Way:
    refuses = "" if A.shape[1] <= _MOST_STATES else f"{A.shape[1]} states"
    return dispatch.choose("selective_scan", u, refuses=refuses)


_TENSORS = 8
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus, Tensor cu_seqlens, bool reverse, Tensor? order"
)


@torch.library.custom_op(
    "bagscope::selective_scan",
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, A, cu_seqlens, order = inputs[0], inputs[2], inputs[9], inputs[11]
    require_borders(cu_seqlens, len(u))
    require_order(order, cu_seqlens, len(u))
    way = _way(u, A)
    if way in ("reference", "cpu"):
        return cpu.forward(*inputs)
    from bagscope.kernels.selective_scan import triton

    return triton.forward(*inputs)


@_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, z = inputs[0], inputs[6]
    kept = torch.library.get_ctx().new_dynamic_size()
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    ungated = u.new_empty(0) if z is None else u.new_empty(u.shape)
    return u.new_empty(u.shape), ungated, u.new_empty(kept, dtype=wide)


@torch.library.custom_op(
    "bagscope::selective_scan_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor ungated, Tensor states, {_INPUTS}) -> Tensor[]",
)
def _backward(dout: Tensor, ungated: Tensor, states: Tensor, *inputs: Any) -> list[Tensor]:
    way = _way(inputs[0], inputs[2])
    if way in ("reference", "cpu"):
        return list(cpu.backward(dout, ungated, states, *inputs))
    from bagscope.kernels.selective_scan import triton

    return list(triton.backward(dout, ungated, states, *inputs))


@_backward.register_fake
def _(dout: Tensor, ungated: Tensor, states: Tensor, *inputs: Any) -> list[Tensor]:
    u = inputs[0]
    return [u.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:_TENSORS]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, softplus, cu_seqlens, reverse, order = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *given, cu_seqlens, order)
    ctx.settings = softplus, reverse


def _differentiate(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * (_TENSORS + 4)
    ungated, states, *given, cu_seqlens, order = ctx.saved_tensors
    softplus, reverse = ctx.settings
    grads = _backward(dout, ungated, states, *given, softplus, cu_seqlens, reverse, order)
    kept = (None if t is None else g for t, g in zip(given, grads, strict=True))
    return (*kept, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
