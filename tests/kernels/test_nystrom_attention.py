"""Nyström attention in chunks, against every matrix whole in float64 and the recorded originals."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.kernels import dispatch
from bagscope.kernels.nystrom_attention import (
    head_conv,
    landmark_means,
    nystrom_attention,
    nystrom_attention_reference,
    nystrom_first_rows,
)
from bagscope.kernels.nystrom_attention.landmarks import runs
from bagscope.kernels.nystrom_attention.pseudo_inverse import IteratedInverse
from bagscope.kernels.nystrom_attention.reference import attention_matrix, pseudo_inverse
from bagscope.kernels.nystrom_attention.spectral_inverse import SpectralInverse
from tests.kernels.packed import (
    RAGGED,
    assert_close_to_float64,
    borders,
    doubled,
    gradients,
    normal,
    relative_error,
    strided,
    vectors,
)

HEADS, WIDTH = 4, 8
KINDS = [(pads, start) for pads in (False, True) for start in (False, True)]
BEYOND_A_CHUNK = (5, 700, 33, 1)


def case(lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    tiles = sum(lengths)
    return {
        name: normal(tiles, HEADS, WIDTH, seed=seed, dtype=dtype, scale=2.0)
        for seed, name in enumerate("qkv")
    }


def settings(lengths: tuple[int, ...], landmarks: int, kind: tuple[bool, bool]) -> dict[str, Any]:
    return {
        "cu_seqlens": borders(lengths),
        "landmarks": landmarks,
        "zero_pads": kind[0],
        "shared_start": kind[1],
    }


def attend(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    return nystrom_attention(q, k, v, **how)[0]


def first_rows(q: Tensor, k: Tensor, **how: Any) -> Tensor:
    """Return the op's weights, with landmarks of the queries from the queries."""
    means = landmark_means(
        q.flatten(1), how["cu_seqlens"], how["landmarks"], zero_pads=how["zero_pads"]
    )
    first = q[how["cu_seqlens"][:-1].long()]
    return nystrom_first_rows(first, means.unflatten(1, q.shape[1:]), k, **how)


def rows_of_matrix(q: Tensor, k: Tensor, **how: Any) -> Tensor:
    found = []
    for a, b in pairwise(how["cu_seqlens"].tolist()):
        matrix = attention_matrix(
            q[a:b] * WIDTH**-0.5, k[a:b], how["landmarks"], 6, how["zero_pads"], how["shared_start"]
        )
        found.append(matrix[:, a - b, a - b :].T)
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("landmarks", [7, 16])
@pytest.mark.parametrize("lengths", [RAGGED, BEYOND_A_CHUNK])
def test_it_is_what_whole_matrices_give(
    lengths: tuple[int, ...], landmarks: int, kind: tuple[bool, bool]
) -> None:
    inputs, how = case(lengths), settings(lengths, landmarks, kind)
    (found,), grads = gradients(attend, inputs, **how)
    (truth,), true_grads = gradients(nystrom_attention_reference, doubled(inputs), **how)
    assert_close_to_float64(found, truth, rtol=1e-5)
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name], rtol=2e-5, what=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("landmarks", [7, 16])
def test_the_first_row_alone(landmarks: int, kind: tuple[bool, bool]) -> None:
    inputs, how = case(BEYOND_A_CHUNK), settings(BEYOND_A_CHUNK, landmarks, kind)
    asked = {name: inputs[name] for name in "qk"}
    (found,), grads = gradients(first_rows, asked, **how)
    (truth,), true_grads = gradients(rows_of_matrix, doubled(asked), **how)
    assert_close_to_float64(found, truth, rtol=2e-5)
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name], rtol=2e-5, what=name)
    _, beside = nystrom_attention(**inputs, **how, with_first_rows=True)
    assert beside is not None
    assert_close_to_float64(beside, truth, rtol=2e-5)


@pytest.mark.parametrize(
    ("variant", "kind", "landmarks"),
    [
        ("landmarks16-faithful", (True, True), 16),
        ("landmarks64-faithful", (True, True), 64),
        ("landmarks16-fixed-perheadscale", (True, False), 16),
        ("landmarks16-fixed-maskedpads", (False, False), 16),
    ],
)
def test_it_is_the_original_s(variant: str, kind: tuple[bool, bool], landmarks: int) -> None:
    tensors, meta = vectors(f"nystrom-attention_{variant}_A")
    config = meta["config"]
    assert config["landmarks"] == landmarks
    weights = {
        name.removeprefix("weights/"): value.clone().requires_grad_()
        for name, value in tensors.items()
        if name.startswith("weights/")
    }
    x = tensors["input/x"].clone().requires_grad_()
    how = settings((len(x),), landmarks, kind) | {"iterations": config["pinv_iterations"]}
    parts = functional.linear(x, weights["to_qkv.weight"]).chunk(3, 1)
    q, k, v = (part.unflatten(1, (config["heads"], config["head_dim"])) for part in parts)
    taps = weights["res_conv.weight"][:, 0, :, 0]
    found, row = nystrom_attention(q, k, v, taps=taps, with_first_rows=True, **how)
    out = functional.linear(found.flatten(1), weights["to_out.0.weight"], weights["to_out.0.bias"])
    assert_close_to_float64(out, tensors["output/out"], rtol=1e-5)
    recorded = tensors["output/attention"]
    assert row is not None
    assert_close_to_float64(row, recorded[:, -len(x), -len(x) :].T, rtol=1e-5)
    matrix = attention_matrix(q * config["head_dim"] ** -0.5, k, landmarks, 6, *kind)
    matrix = matrix[:, -recorded.shape[1] :, -len(x) :]
    assert_close_to_float64(matrix, recorded[:, :, -len(x) :], rtol=1e-5)
    (out * tensors["input/cotangent"]).sum().backward()
    for name, leaf in {"x": x, **weights}.items():
        assert leaf.grad is not None
        assert_close_to_float64(leaf.grad, tensors[f"grad/{name}"], rtol=2e-5, what=name)


def test_a_small_bag_gets_the_softmax() -> None:
    inputs = case((16,))
    q, k, v = (inputs[name] for name in "qkv")
    assert q is not None and k is not None and v is not None
    found = attend(q, k, v, **settings((16,), 16, (False, False)))
    truth = functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1) for x in (q, k, v))
    )
    assert_close_to_float64(found, truth.transpose(0, 1))


def test_no_landmark_is_without_rows() -> None:
    for rows in range(1, 70):
        (run,) = runs(borders((rows,)), 16, False)
        if rows <= 16:
            assert run.count == 0
            continue
        ones = landmark_means(torch.ones(rows, 1), borders((rows,)), 16)
        assert ones[: run.count].eq(1).all()
        assert not ones[run.count :].any()
        assert 8 <= run.count <= 16
        assert run.first + (run.count - 1) * run.length == rows
        assert 1 <= run.first <= run.length


def test_no_weight_falls_on_what_is_not_there() -> None:
    # With equal keys all weights are equal; zeros in front would take a share of them.
    q, v = normal(37, 1, WIDTH), torch.ones(37, 1, WIDTH)
    k = torch.zeros(37, 1, WIDTH)
    masked = attend(q, k, v, **settings((37,), 16, (False, False)))
    padded = attend(q, k, v, **settings((37,), 16, (True, False)))
    # All landmarks alike: the pseudo-inverse of a matrix of equal rows is not reached, only neared.
    assert float(padded.mean() / masked.mean()) == pytest.approx(37 / 48, rel=1e-3)


def test_bags_do_not_see_each_other() -> None:
    lengths = (40, 3, 90)
    inputs, how = case(lengths), settings(lengths, 9, (False, False))
    q, k, v = (inputs[name] for name in "qkv")
    assert q is not None and k is not None and v is not None
    together = attend(q, k, v, **how)
    for a, b in pairwise(how["cu_seqlens"].tolist()):
        alone = attend(q[a:b], k[a:b], v[a:b], **{**how, "cu_seqlens": borders((b - a,))})
        torch.testing.assert_close(together[a:b], alone, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_made_again() -> None:
    inputs, how = case((90, 40)), settings((90, 40), 16, (False, False))
    (kept,), kept_grads = gradients(attend, inputs, **how)
    with dispatch.keeping(0):
        (anew,), grads = gradients(attend, inputs, **how)
    assert torch.equal(kept, anew)
    assert all(torch.equal(grad, kept_grads[name]) for name, grad in grads.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_reckoned_in_float32(dtype: torch.dtype) -> None:
    inputs, how = case((90, 5), dtype), settings((90, 5), 16, (False, False))
    (found,), grads = gradients(attend, inputs, **how)
    (truth,), true_grads = gradients(nystrom_attention_reference, doubled(inputs), **how)
    assert found.dtype == dtype
    assert relative_error(found, truth) < torch.finfo(dtype).eps
    for name, grad in grads.items():
        assert relative_error(grad, true_grads[name]) < 2 * torch.finfo(dtype).eps, name


def test_inputs_need_not_lie_together() -> None:
    inputs, how = case((90, 5)), settings((90, 5), 16, (False, False))
    loose = {name: strided(x) for name, x in inputs.items() if x is not None}
    torch.testing.assert_close(attend(**loose, **how), attend(**inputs, **how))


@pytest.mark.parametrize("kind", [IteratedInverse, SpectralInverse])
@pytest.mark.parametrize("shared", [False, True])
def test_the_pseudo_inverse(shared: bool, kind: type[IteratedInverse | SpectralInverse]) -> None:
    s = normal(3, 12, 12, dtype=torch.float64).mul(3).softmax(-1).requires_grad_()
    x = normal(3, 12, 5, dtype=torch.float64).requires_grad_()
    rows = normal(3, 2, 12, dtype=torch.float64).requires_grad_()
    z = pseudo_inverse(s, 6, shared)
    with torch.no_grad():
        kept = torch.empty(kind.matrices(6), *s.shape, dtype=s.dtype)
        ours = kind(s, 6, shared, kept, is_filled=False)
    for given, found, wanted, backward in (
        (x, ours.times(x), z @ x, ours.times_backward),
        (rows, ours.asked(rows), rows @ z, ours.asked_backward),
    ):
        assert_close_to_float64(found, wanted, rtol=1e-12)
        grad = normal(*wanted.shape, seed=3, dtype=torch.float64)
        truth = torch.autograd.grad(wanted, (given, s), grad, retain_graph=True)
        mine, of_s = backward(given, grad)
        assert_close_to_float64(mine, truth[0], rtol=1e-10)
        assert_close_to_float64(*(through_softmax(s, g) for g in (of_s, truth[1])), rtol=1e-10)
    # On the way to the inverse: what is not singular is.
    far = pseudo_inverse(s, 30, shared)
    assert_close_to_float64(far @ s, torch.eye(12).double().expand(3, 12, 12), rtol=1e-6)


def test_eigenvalues_may_be_the_same() -> None:
    """A row that all share, and one that each has: every eigenvalue but one comes many times."""
    s = torch.eye(12, dtype=torch.float64).mul(0.5).add(0.5 / 12).expand(2, 12, 12).clone()
    x, grad = (normal(2, 12, 3, seed=seed, dtype=torch.float64) for seed in (1, 2))
    ways = [
        kind(s, 6, False, s.new_empty(kind.matrices(6), *s.shape), is_filled=False)
        for kind in (SpectralInverse, IteratedInverse)
    ]
    mine, truth = (way.times_backward(x, grad) for way in ways)
    assert_close_to_float64(ways[0].times(x), ways[1].times(x), rtol=1e-10)
    assert_close_to_float64(mine[0], truth[0], rtol=1e-10)
    assert_close_to_float64(*(through_softmax(s, g) for g in (mine[1], truth[1])), rtol=1e-10)


def test_what_is_not_a_number_stays_that() -> None:
    inputs, how = case((40,)), settings((40,), 16, (False, False))
    q, k, v = (x for x in inputs.values() if x is not None)
    q[3, 0, 0] = float("nan")
    found = attend(q.requires_grad_(), k, v, **how)
    (grad,) = torch.autograd.grad(found.sum(), q)
    # One head's alone: the others know nothing of it.
    for x in (found, grad):
        assert bool(x[:, 0].isnan().any())
        assert not bool(x[:, 1:].isnan().any())


def through_softmax(s: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of what S is the softmax of: rows stay at a sum of one."""
    return (s * (grad - (s * grad).sum(-1, keepdim=True))).detach()


@pytest.mark.parametrize("taps", [1, 5, 33])
def test_the_convolution_stays_within_a_bag(taps: int) -> None:
    lengths = (3, 0, 50, 1, 2100)
    inputs = {"x": normal(sum(lengths), 2, 4), "taps": normal(2, taps, seed=1)}

    def plain(x: Tensor, taps: Tensor, cu_seqlens: Tensor) -> Tensor:
        kernels = taps.repeat_interleave(4, 0)[:, None]
        bags = x.flatten(1).split(cu_seqlens.diff().tolist())
        return torch.cat(
            [
                functional.conv1d(bag.T[None], kernels, padding=taps.shape[1] // 2, groups=8)[0].T
                for bag in bags
                if len(bag)
            ]
        ).unflatten(1, (2, 4))

    (found,), grads = gradients(head_conv, inputs, cu_seqlens=borders(lengths))
    (truth,), true_grads = gradients(plain, doubled(inputs), cu_seqlens=borders(lengths))
    assert_close_to_float64(found, truth)
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name], what=name)


def test_a_compiled_graph_is_whole_and_gives_the_same() -> None:
    inputs = case((90, 5)) | {"taps": normal(HEADS, 5, seed=7)}
    how = settings((90, 5), 16, (False, False))
    (found,), grads = gradients(torch.compile(attend, backend="aot_eager", fullgraph=True),
                                inputs, **how)  # fmt: skip
    (wanted,), wanted_grads = gradients(attend, inputs, **how)
    assert torch.equal(found, wanted)
    assert all(torch.equal(grad, wanted_grads[name]) for name, grad in grads.items())


def test_what_does_not_belong_together_is_refused() -> None:
    q, cu = normal(9, 2, 4), borders((9,))
    with pytest.raises(ValueError, match=r"pass \(T, H, d\) each"):
        nystrom_attention(q, q[:8], q, cu)
    with pytest.raises(ValueError, match="landmarks is 0 and iterations 6"):
        nystrom_attention(q, q, q, cu, landmarks=0)
    with pytest.raises(ValueError, match=r"taps \(2, 4\); pass .* W odd"):
        nystrom_attention(q, q, q, cu, taps=normal(2, 4))
    with pytest.raises(ValueError, match="with 1 bags and 4 landmarks"):
        nystrom_first_rows(q[:1], q, q, cu, landmarks=4)
