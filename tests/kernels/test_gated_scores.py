from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.kernels.dispatch import keeping
from bagscope.kernels.gated_scores import gated_scores
from bagscope.kernels.gated_scores.dropout import chunk_dropout, gate_dropout
from tests.kernels.packed import (
    assert_at_most_twice,
    assert_close_to_float64,
    doubled,
    gradients,
    normal,
    run_interpreted,
    strided,
    vectors,
)

TILES, FEATURES, HIDDEN, BRANCHES = 4097, 20, 12, 3


def problem(
    tiles: int = TILES, *, is_gated: bool = True, has_biases: bool = True, branches: int = BRANCHES
) -> dict[str, Tensor | None]:
    return {
        "h": normal(tiles, FEATURES, seed=1),
        "weight_v": normal(HIDDEN, FEATURES, seed=2, scale=0.3),
        "bias_v": normal(HIDDEN, seed=3) if has_biases else None,
        "weight_u": normal(HIDDEN, FEATURES, seed=4, scale=0.3) if is_gated else None,
        "bias_u": normal(HIDDEN, seed=5) if is_gated and has_biases else None,
        "weight_w": normal(branches, HIDDEN, seed=6),
        "bias_w": normal(branches, seed=7) if has_biases else None,
    }


def plain(
    h: Tensor,
    weight_v: Tensor,
    bias_v: Tensor | None,
    weight_u: Tensor | None,
    bias_u: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
    gate: str = "tanh",
) -> Tensor:
    z = functional.linear(h, weight_v, bias_v)
    z = torch.tanh(z) if gate == "tanh" else torch.relu(z)
    if weight_u is not None:
        z = z * torch.sigmoid(functional.linear(h, weight_u, bias_u))
    return functional.linear(z, weight_w, bias_w)


def assert_equal_to_plain(given: dict[str, Tensor | None], gate: str = "tanh", **how: Any) -> None:
    found, grads = gradients(gated_scores, given, gate=gate, **how)
    truth, true_grads = gradients(plain, doubled(given), gate=gate)
    assert_close_to_float64(found[0], truth[0])
    assert set(grads) == set(true_grads)
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name], what=f"gradient of {name}")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("keep", ["all", "nothing"])
@pytest.mark.parametrize("gate", ["tanh", "relu"])
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("has_biases", [True, False])
def test_equals_torch_in_float64(is_gated: bool, has_biases: bool, gate: str, keep: str) -> None:
    given = problem(is_gated=is_gated, has_biases=has_biases)
    assert_equal_to_plain(given, gate, keep=keep)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("way", ["cpu", "reference"])
@pytest.mark.parametrize("tiles", [0, 1, 2, 63, 100])
def test_any_number_of_tiles(monkeypatch: pytest.MonkeyPatch, tiles: int, way: str) -> None:
    monkeypatch.setenv("BAGSCOPE_KERNELS", way)
    assert_equal_to_plain(problem(tiles))


@pytest.mark.parametrize("branches", [1, 16, 17])
def test_any_number_of_branches(branches: int) -> None:
    assert_equal_to_plain(problem(100, branches=branches))


def test_one_bias_of_two() -> None:
    for name in ("bias_v", "bias_u"):
        assert_equal_to_plain({**problem(100), name: None})


@pytest.mark.parametrize("keep", ["all", "nothing"])
def test_gradcheck(keep: str) -> None:
    given = {name: t for name, t in doubled(problem(5)).items() if t is not None}

    def scores(*tensors: Tensor) -> Tensor:
        return gated_scores(**dict(zip(given, tensors, strict=True)), keep=keep)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(scores, [t.requires_grad_() for t in given.values()])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("keep", ["all", "nothing"])
@pytest.mark.parametrize("is_gated", [True, False])
def test_dropout_has_the_gradients_of_what_it_drew(
    monkeypatch: pytest.MonkeyPatch, is_gated: bool, keep: str
) -> None:
    given = problem(is_gated=is_gated)
    found, grads = gradients(gated_scores, given, dropout_p=0.3, seed=11, keep=keep)
    without = gated_scores(**given)  # type: ignore[arg-type]
    assert not torch.allclose(found[0], without)
    monkeypatch.setenv("BAGSCOPE_KERNELS", "reference")
    truth, true_grads = gradients(gated_scores, doubled(given), dropout_p=0.3, seed=11)
    assert_close_to_float64(found[0], truth[0])
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name], what=name)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.9])
def test_dropout_drops_as_often_as_told_and_keeps_the_mean(p: float) -> None:
    mask = chunk_dropout(2048, 128, p, seed=3, start=0, like=torch.empty(0))
    assert (mask == 0).double().mean().item() == pytest.approx(p, abs=0.005)
    assert mask.mean().item() == pytest.approx(1.0, abs=0.02)
    # Rows, columns and chunks are not alike.
    assert p == 0 or not mask[0].equal(mask[1])
    assert p == 0 or not mask.equal(chunk_dropout(2048, 128, p, 3, 2048, torch.empty(0)))
    assert mask.equal(chunk_dropout(2048, 128, p, 3, 0, torch.empty(0)))


def test_one_draw_stands_for_the_dropout_of_both_gates() -> None:
    survives = (1 - 0.25) ** 2
    assert 1 - gate_dropout(0.25, is_gated=True) == pytest.approx(survives)
    assert gate_dropout(0.25, is_gated=False) == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_as_much_as_torch(dtype: torch.dtype) -> None:
    low = {name: None if t is None else t.to(dtype) for name, t in problem(600).items()}
    found, grads = gradients(gated_scores, low)
    theirs, their_grads = gradients(plain, low)
    truth, true_grads = gradients(plain, doubled(low))
    assert_at_most_twice(found[0], theirs[0], truth[0])
    for name in grads:
        assert_at_most_twice(grads[name], their_grads[name], true_grads[name], what=name)


def test_master_weights_keep_their_dtype() -> None:
    given = problem(100)
    assert given["h"] is not None
    found, grads = gradients(gated_scores, {**given, "h": given["h"].bfloat16()})
    truth, _ = gradients(plain, doubled(given))
    assert found[0].dtype == torch.float32 and grads["weight_v"].dtype == torch.float32
    assert grads["h"].dtype == torch.bfloat16
    assert_close_to_float64(found[0], truth[0], rtol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_computes_narrow_tiles_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    given = problem(100)
    assert given["h"] is not None
    given["h"] = given["h"].to(dtype)
    monkeypatch.setenv("BAGSCOPE_KERNELS", "reference")
    found, grads = gradients(gated_scores, given, dropout_p=0.3, seed=11)
    truth, true_grads = gradients(gated_scores, doubled(given), dropout_p=0.3, seed=11)
    assert found[0].dtype == torch.float32
    assert_close_to_float64(found[0], truth[0])
    for name, grad in grads.items():
        rtol = 1e-2 if name == "h" else 1e-5
        assert_close_to_float64(grad, true_grads[name], rtol=rtol, what=name)


def test_strided_inputs_and_the_same_bits_again() -> None:
    given = problem()
    found, grads = gradients(gated_scores, given)
    again, grads_again = gradients(gated_scores, given)
    assert found[0].equal(again[0])
    assert all(grads[name].equal(grads_again[name]) for name in grads)
    apart = {name: None if t is None else strided(t) for name, t in given.items()}
    assert_close_to_float64(gated_scores(**apart), found[0])  # type: ignore[arg-type]


def test_keeps_activations_only_within_the_budget() -> None:
    def saved() -> int:
        given = problem(100)
        sizes = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.untyped_storage().nbytes())
            return tensor

        assert given["weight_w"] is not None
        given["weight_w"].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            gated_scores(**given)  # type: ignore[arg-type]
        return sum(sizes)

    with_activations = saved()
    with keeping(1000):
        assert with_activations - saved() == 100 * 2 * HIDDEN * 4
    assert saved() == with_activations


def test_the_original_clam_gives_these_logits() -> None:
    tensors, _ = vectors("clam-mb_plain-ce_A")
    net = {k.removeprefix("weights/attention_net."): v for k, v in tensors.items()}
    h = functional.linear(tensors["input/x"], net["0.weight"], net["0.bias"]).relu()
    scores = gated_scores(
        h,
        weight_v=net["3.attention_a.0.weight"],
        bias_v=net["3.attention_a.0.bias"],
        weight_u=net["3.attention_b.0.weight"],
        bias_u=net["3.attention_b.0.bias"],
        weight_w=net["3.attention_c.weight"],
        bias_w=net["3.attention_c.bias"],
    )
    assert_close_to_float64(scores.T, tensors["output/attention_raw"])


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(gated_scores, fullgraph=True, backend="aot_eager")
    found, grads = gradients(compiled, problem(100))
    truth, true_grads = gradients(gated_scores, problem(100))
    assert_close_to_float64(found[0], truth[0])
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_v": torch.ones(12, 5)}, r"weight_v is \(12, 5\)"),
        ({"weight_u": torch.ones(5, 20)}, "weight_u is"),
        ({"weight_u": None}, "bias_u is given"),
        ({"weight_w": torch.ones(3, 5)}, "weight_w is"),
        ({"bias_w": torch.ones(4)}, r"bias_w is \(4,\); it must be \(3,\)"),
        ({"gate": "gelu"}, "choose one of tanh, relu"),
        ({"dropout_p": 1.0}, r"dropout_p is 1\.0"),
        ({"h": torch.ones(3)}, "h is"),
        ({"keep": "some"}, "keep is"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gated_scores(**{**problem(10), **change})


def test_kernels_in_the_interpreter() -> None:
    run_interpreted("test_gated_scores.py")
