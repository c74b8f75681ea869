"""The kernels of attention become machine code for a GPU that is not there.

The interpreter runs kernels as Python and takes much that the compiler refuses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

FORMS = [("bf16", 16), ("bf16", 64), ("bf16", 128), ("fp16", 64), ("fp32", 64)]
each_form = pytest.mark.parametrize(("dtype", "width"), FORMS)
INT64 = ("bag_ptr", "start_ptr", "stop_ptr", "first_ptr", "near_ptr")
# In float32 whatever the bag's dtype is; which gradients are differs between operations.
SUMS = (
    "peak_ptr", "mass_ptr", "mixed_ptr", "scores_ptr", "lse_ptr", "delta_ptr", "kv_ptr",
    "total_ptr", "grad_weights_ptr", "grad_kv_ptr", "grad_total_ptr", "grad_lse_ptr",
    "grad_lses_ptr",
)  # fmt: skip


def compile_kernel(
    kernel: Any, dtype: str, constants: dict[str, Any], sums: tuple[str, ...] = ()
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {
        name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants
    }
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "places_ptr":
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            exact = name in SUMS or name in sums
            signature[name] = "*i64" if name in INT64 else "*fp32" if exact else f"*{dtype}"
        else:
            signature[name] = "fp32" if name in ("scale", "eps") else "i32"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    # What an A100 can give a block.
    assert found.metadata.shared <= 160 * 1024


@each_form
def test_merging(dtype: str, width: int) -> None:
    from bagscope.kernels import merge_partials as kernels

    compile_kernel(kernels.merge_partials_fwd_kernel, dtype, {"BLOCK_D": width})
    compile_kernel(kernels.merge_partials_bwd_kernel, dtype, {"BLOCK_D": width})


@each_form
def test_pooling(dtype: str, width: int) -> None:
    from bagscope.kernels.cross_attention_pool import triton as kernels

    sizes = {"M": 5, "D": width, "DV": width, **kernels.blocks(10_000, 5, 8, width, width)}
    sums = ("q_ptr", "grad_ptr", "grad_q_ptr")
    forward = {"SCORES": True, **sizes}
    compile_kernel(kernels.cross_attention_pool_fwd_kernel, dtype, forward, sums)
    backward = {"WEIGHTS": True, **sizes}
    compile_kernel(kernels.cross_attention_pool_bwd_kernel, dtype, backward, sums)


@each_form
def test_neighbourhoods(dtype: str, width: int) -> None:
    from bagscope.kernels.varlen_self_attention import triton as kernels

    rows = torch.empty(1, 1, width)
    for kernel in (
        kernels.neighbourhood_attention_fwd_kernel,
        kernels.neighbourhood_attention_bwd_kernel_q,
        kernels.neighbourhood_attention_bwd_kernel_kv,
    ):
        compile_kernel(kernel, dtype, kernels.block_sizes(rows, rows))


@each_form
def test_linear_attention(dtype: str, width: int) -> None:
    from bagscope.kernels.linear_attention import triton as kernels

    rows = torch.empty(0, dtype=torch.float32 if dtype == "fp32" else torch.float16)
    sizes = kernels.sizes(rows, width, width, "elu+1")
    compile_kernel(kernels.linear_attention_fwd_kernel_gather, dtype, dict(sizes))
    compile_kernel(kernels.linear_attention_bwd_kernel_gather, dtype, dict(sizes))
    asking = {"DIVIDE": True, **sizes}
    compile_kernel(kernels.linear_attention_fwd_kernel_ask, dtype, dict(asking))
    compile_kernel(kernels.linear_attention_bwd_kernel_ask, dtype, dict(asking))
