"""The pooling's kernels become machine code for a GPU that is not there.

The interpreter runs kernels as Python and takes much that the compiler refuses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.slow

FLOATS = ("dropped", "scale")
INT64 = ("start_ptr", "stop_ptr", "bag_ptr", "first_ptr")
SUMS = (
    "scores_ptr", "top_ptr", "total_ptr", "mean_ptr", "pooled_ptr", "lse_ptr", "entropy_ptr",
    "largest_ptr", "out_ptr", "constant_ptr", "slope_ptr", "g_ptr", "grad_scores_ptr", "c_ptr",
    "grad_ptr", "grad_w_ptr",
)  # fmt: skip


def compile_kernel(kernel: Any, dtype: str, constants: dict[str, Any]) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: constants[key] for key in ("num_warps", "num_stages") if key in constants}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = "i64" if name in INT64 else "fp32" if name in SUMS else dtype
            signature[name] = "*u8" if name == "mask_ptr" else f"*{kind}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i64" if name == "seed" else "i32"
    places = {
        (place,): constants[name]
        for place, name in enumerate(kernel.arg_names)
        if name in constants
    }
    source = ASTSource(kernel, signature, constexprs=places)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    # What any device since 2018 can give a block.
    assert found.metadata.shared <= 64 * 1024


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_pooling(dtype: str) -> None:
    from bagscope.kernels.segment_softmax_pool import triton as kernels

    rows, block_d, block_k = kernels.blocks(512, 5)
    sizes = {"BM": rows, "BD": block_d, "BK": block_k}
    constants = {"HAS_MASK": True, "PRECISION": "tf32" if dtype == "fp32" else "ieee", **sizes}
    compile_kernel(kernels.segment_softmax_pool_fwd_kernel, dtype, constants)
    compile_kernel(kernels.segment_softmax_pool_bwd_kernel, dtype, constants)
    sizes.pop("BM")
    compile_kernel(kernels.segment_softmax_pool_merge_kernel, dtype, sizes)


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_gates(dtype: str, is_gated: bool) -> None:
    from bagscope.kernels.gated_scores import triton as kernels

    constants = {
        "IS_GATED": is_gated,
        "IS_TANH": is_gated,
        "HAS_BIAS": is_gated,
        "HAS_DROPOUT": is_gated,
        "KEEPS": not is_gated,
        "PRECISION": "tf32" if dtype == "fp32" else "ieee",
        **kernels.blocks(512, 256, 5, torch.float32 if dtype == "fp32" else torch.float16),
    }
    compile_kernel(kernels.gated_scores_fwd_kernel, dtype, {**constants, "HAS_C": True})
    compile_kernel(kernels.gated_scores_bwd_kernel, dtype, constants)
