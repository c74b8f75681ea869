"""Recorded weights of every original, at small widths, answer as recorded once they are fitted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.originals.shapes import fit, recognise
from tests.kernels.packed import assert_close_to_float64, vectors

# What no shape tells, where the recording differs from what the authors usually have.
RECORDED: dict[str, tuple[str, dict[str, Any]]] = {
    "abmil_hippo-gated_A": ("hippo-gated", {}),
    "abmil_hippo-tanh_A": ("hippo-tanh", {}),
    "abmil_mhim-relu-nobias_A": ("mhim-abmil", {}),
    "abmil_millab-gated_A": ("millab-gated", {}),
    "abmil_millab-tanh_A": ("millab-tanh", {}),
    "abmil_packmil-tanh-gelu_A": ("packmil-abmil", {}),
    "acmil-ga_m1_A": ("acmil-ga", {}),
    "acmil-ga_m5_A": ("acmil-ga", {}),
    "acmil-mha_m5_A": ("acmil-mha", {}),
    "aem_abmil-lambda01_A": ("aem-abmil", {}),
    "clam-mb_plain-svm_A": ("clam-mb", {}),
    "clam-sb_subtyping-ce_A": ("clam-sb", {}),
    "dsmil_default_A": ("dsmil", {}),
    "dsmil_linear-q_A": ("dsmil", {}),
    "dsmil_one-class_A": ("dsmil", {}),
    "dsmil_passing-v_A": ("dsmil", {}),
    "ilra_r1_A": ("ilra", {"heads": 4}),
    "ilra_r4_A": ("ilra", {"heads": 4}),
    "mambamil_bi-fixed-init_A": ("mambamil", {"ways": "bi"}),
    "mambamil_plain-fixed-init_A": ("mambamil", {}),
    "mambamil_sr-faithful-init_A": ("mambamil", {}),
    "rrt_epeg15-cr3_A": ("rrt", {}),
    "rrt_epeg21-cr5_A": ("rrt", {"cross_heads": 4}),
    "rrt_epeg9-cr1-shortcut_A": ("rrt", {"shortcut": True}),
    "set-transformer_full_A": ("set-transformer", {}),
    "transmil_faithful_A": ("transmil", {}),
    "transmil_fixed-perheadscale_A": ("transmil", {"faithful_start": False}),
}
WITH_TWINS: dict[str, str] = {
    "pooling_max_A": "mambamil-max",
    "pooling_mean_A": "mambamil-mean",
}
"""Originals that share their tensors' names and shapes, and have to be named."""
LOGITS = ("logits", "slide_logits", "bag_logits")


@pytest.mark.parametrize("file", [*RECORDED, *WITH_TWINS])
def test_recorded_weights_answer_as_recorded(file: str) -> None:
    tensors, _ = vectors(file)
    weights = {
        name.removeprefix("weights/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights/")
    }
    if file in WITH_TWINS:
        fitted = fit(WITH_TWINS[file], weights)
    else:
        source, settings = RECORDED[file]
        fitted = recognise(weights, settings)
        assert fitted.source == source
    model = build_aggregator(fitted.aggregator, fitted.features, fitted.outputs, fitted.options)
    model.load_state_dict(dict(fitted.weights))
    with torch.inference_mode():
        found = model.eval()(Bags.of([tensors["input/x"]])).logits
    wanted = next(tensors[f"output/{name}"] for name in LOGITS if f"output/{name}" in tensors)
    # ILRA has a row of logits for each seed.
    wanted = wanted.reshape(-1, fitted.outputs).mean(0, keepdim=True)
    assert_close_to_float64(found, wanted, rtol=1e-5, atol=1e-6, what="logits")
