from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bagscope.kernels.segment_softmax_pool import (
    attention_weights,
    segment_softmax_pool,
)
from tests.kernels.packed import (
    LONG_BESIDE_SHORT,
    RAGGED,
    assert_at_most_twice,
    assert_close_to_float64,
    bags_of,
    borders,
    doubled,
    gradients,
    normal,
    run_interpreted,
    shuffle_within,
    strided,
    vectors,
)

OUTPUTS = ("pooled", "lse", "entropy")


def problem(
    lengths: tuple[int, ...] = RAGGED, branches: int = 3, features: int = 12
) -> dict[str, Tensor | None]:
    tiles = sum(lengths)
    return {
        "scores": normal(tiles, branches, seed=1, scale=3.0),
        "h": normal(tiles, features, seed=2),
        "cu_seqlens": borders(lengths),
        "mask": None,
    }


def plain(
    scores: Tensor, h: Tensor, cu_seqlens: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool by torch's softmax, bag by bag; bags with every tile masked give zeros."""
    pooled, lse, entropy = [], [], []
    for start, stop in pairwise(cu_seqlens.tolist()):
        columns: list[tuple[Tensor, Tensor, Tensor]] = []
        for branch in range(scores.shape[1]):
            e, rows = scores[start:stop, branch], h[start:stop]
            if mask is not None:
                seen = ~mask[start:stop, branch]
                e, rows = e[seen], rows[seen]
            log_a = e.log_softmax(0)
            a = log_a.exp()
            columns.append((a @ rows, e.logsumexp(0), -(a * log_a).sum()))
        for kind, column in zip((pooled, lse, entropy), zip(*columns, strict=True), strict=True):
            kind.append(torch.stack(column))
    return torch.stack(pooled), torch.stack(lse), torch.stack(entropy)


def ours(**given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return segment_softmax_pool(**given)[:3]  # type: ignore[arg-type]


def assert_equal_to_plain(given: dict[str, Tensor | None], rtol: float = 1e-5) -> None:
    found, grads = gradients(ours, given)
    truth, true_grads = gradients(plain, doubled(given))
    for name, a, b in zip(OUTPUTS, found, truth, strict=True):
        is_empty = b == -torch.inf
        assert (a[is_empty] == -torch.inf).all()
        assert_close_to_float64(a[~is_empty], b[~is_empty], rtol=rtol, what=name)
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name], rtol=rtol, what=f"gradient of {name}")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("lengths", [RAGGED, LONG_BESIDE_SHORT, (1,), (0,), (4097,)], ids=str)
def test_equals_torch_in_float64(lengths: tuple[int, ...], is_masked: bool) -> None:
    given = problem(lengths)
    if is_masked:
        given["mask"] = normal(sum(lengths), 3, seed=5) > 0.7
    assert_equal_to_plain(given)


@pytest.mark.parametrize("way", ["cpu", "reference"])
@pytest.mark.parametrize("branches", [1, 16, 20])
def test_any_number_of_branches(monkeypatch: pytest.MonkeyPatch, branches: int, way: str) -> None:
    monkeypatch.setenv("BAGSCOPE_KERNELS", way)
    assert_equal_to_plain(problem((7, 100, 2), branches))


@pytest.mark.parametrize("output", range(3))
def test_gradcheck_of_each_output(output: int) -> None:
    given = doubled(problem((0, 4, 1), branches=2, features=3))
    mask = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 0], [0, 0]], dtype=torch.bool)
    cu_seqlens = given["cu_seqlens"]
    leaves = tuple(t.requires_grad_() for t in (given["scores"], given["h"]) if t is not None)

    def one(scores: Tensor, h: Tensor) -> Tensor:
        assert cu_seqlens is not None
        # The empty bag's lse is minus infinity, which has no difference quotient.
        return segment_softmax_pool(scores, h, cu_seqlens, mask=mask)[output][1:]

    assert torch.autograd.gradcheck(one, leaves)


@pytest.mark.usefixtures("poisoned_memory")
def test_empty_and_fully_masked_bags_give_zeros_and_no_gradient() -> None:
    given = problem((0, 3, 5))
    mask = torch.zeros(8, 3, dtype=torch.bool)
    mask[:3, 1] = True
    scores, h, cu_seqlens = given["scores"], given["h"], given["cu_seqlens"]
    assert scores is not None and h is not None and cu_seqlens is not None
    found = segment_softmax_pool(scores, h, cu_seqlens, mask=mask)
    for bag, branch in ((0, 0), (1, 1)):
        assert (found.pooled[bag, branch] == 0).all() and found.lse[bag, branch] == -torch.inf
        assert found.entropy[bag, branch] == 0 and found.top[bag, branch] == 0
    _, grads = gradients(ours, {**given, "mask": mask})
    assert (grads["scores"][mask] == 0).all() and grads["h"].isfinite().all()


def test_one_tile_is_its_own_mean() -> None:
    h = normal(1, 6)
    found = segment_softmax_pool(normal(1, 2, scale=50), h, borders([1]))
    assert found.pooled.equal(h.expand(1, 2, 6)) and (found.entropy == 0).all()
    assert (found.top == 1).all()


def test_extreme_scores_stay_finite() -> None:
    scores = torch.tensor([[1e4, -1e4], [1e4, -1e4], [-1e4, 1e4]])
    found = segment_softmax_pool(scores, normal(3, 4), borders([3]))
    assert all(tensor.isfinite().all() for tensor in found)
    assert found.entropy[0].tolist() == pytest.approx(
        [torch.tensor(2.0).log().item(), 0.0], abs=2e-3
    )


def test_top_is_the_largest_weight() -> None:
    given = problem((5, 100))
    scores, cu_seqlens = given["scores"], given["cu_seqlens"]
    assert scores is not None and given["h"] is not None and cu_seqlens is not None
    found = segment_softmax_pool(scores, given["h"], cu_seqlens)
    for bag, e in enumerate(bags_of(scores, cu_seqlens)):
        assert_close_to_float64(found.top[bag], e.double().softmax(0).amax(0))


def test_weights_sum_to_one_and_pass_gradients_to_scores() -> None:
    given = problem((0, 9, 31))
    scores, h, cu_seqlens = given["scores"], given["h"], given["cu_seqlens"]
    assert scores is not None and h is not None and cu_seqlens is not None
    mask = normal(40, 3, seed=8) > 1
    u = normal(40, 3, seed=9)
    scores.requires_grad_()
    lse = segment_softmax_pool(scores, h, cu_seqlens, mask=mask).lse
    a = attention_weights(scores, lse, cu_seqlens, mask=mask)
    (a * u).sum().backward()
    assert (a[mask] == 0).all()
    for bag in bags_of(a, cu_seqlens)[1:]:
        assert_close_to_float64(bag.sum(0), torch.ones(3).double())
    # Given gradients u of the weights: a (u - Σ a u), per bag and branch.
    pairs = zip(bags_of(a, cu_seqlens), bags_of(u, cu_seqlens), strict=True)
    truth = [weights * (v - (weights * v).sum(0)) for weights, v in pairs]
    assert scores.grad is not None
    assert_close_to_float64(scores.grad, torch.cat(truth), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_as_much_as_torch(dtype: torch.dtype) -> None:
    given = problem((100, 4097, 3))
    low = {
        name: t.to(dtype) if t is not None and t.is_floating_point() else t
        for name, t in given.items()
    }
    found, grads = gradients(ours, low)
    theirs, their_grads = gradients(plain, low)
    truth, true_grads = gradients(plain, doubled(low))
    for name, a, b, c in zip(OUTPUTS, found, theirs, truth, strict=True):
        assert_at_most_twice(a, b, c, what=name)
    for name in grads:
        assert_at_most_twice(grads[name], their_grads[name], true_grads[name], what=name)


def test_strided_inputs_permutations_packing_and_repetition() -> None:
    given = problem(LONG_BESIDE_SHORT)
    scores, h, cu_seqlens = given["scores"], given["h"], given["cu_seqlens"]
    assert scores is not None and h is not None and cu_seqlens is not None
    found = segment_softmax_pool(scores, h, cu_seqlens)
    again = segment_softmax_pool(scores, h, cu_seqlens)
    assert all(a.equal(b) for a, b in zip(found, again, strict=True))
    order = shuffle_within(cu_seqlens)
    for other in (
        segment_softmax_pool(strided(scores), strided(h), cu_seqlens),
        segment_softmax_pool(scores[order], h[order], cu_seqlens),
    ):
        for a, b in zip(other, found, strict=True):
            assert_close_to_float64(a, b)
    for bag, (e, rows) in enumerate(
        zip(bags_of(scores, cu_seqlens), bags_of(h, cu_seqlens), strict=True)
    ):
        for a, b in zip(segment_softmax_pool(e, rows, borders([len(e)])), found, strict=True):
            assert_close_to_float64(a[0], b[bag], atol=1e-6)


def test_the_entropy_term_is_that_of_aem() -> None:
    tensors, _ = vectors("aem_loss_A")
    for form, rows in (("single", 1), ("rows", 3)):
        scores = tensors["input/attention_raw"][:rows].T.contiguous().requires_grad_()
        found = segment_softmax_pool(scores, scores.detach(), borders([len(scores)]))
        loss = -found.entropy.sum() / rows
        loss.backward()
        assert_close_to_float64(loss, tensors[f"output/loss_{form}"])
        assert scores.grad is not None
        assert_close_to_float64(scores.grad.T, tensors[f"grad/attention_raw_{form}"])


def test_compiles_as_one_graph() -> None:
    given = problem()

    def step(scores: Tensor, h: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
        found = segment_softmax_pool(scores, h, cu_seqlens, mask=mask)
        return found.pooled.sum((1, 2)) + found.entropy.sum(1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, grads = gradients(compiled, given)
    truth, true_grads = gradients(step, given)
    assert_close_to_float64(found[0], truth[0])
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name])


def test_refuses_what_does_not_fit() -> None:
    scores, h = normal(5, 2), normal(5, 3)
    with pytest.raises(ValueError, match="must rise from 0 to the 5 tiles"):
        segment_softmax_pool(scores, h, borders([4]))
    with pytest.raises(ValueError, match="int32"):
        segment_softmax_pool(scores, h, borders([5]).long())
    with pytest.raises(ValueError, match="mask is"):
        segment_softmax_pool(scores, h, borders([5]), mask=torch.ones(5, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"pass \(T, K\) and \(T, D\)"):
        segment_softmax_pool(scores[:4], h, borders([5]))


def test_kernels_in_the_interpreter() -> None:
    run_interpreted("test_segment_softmax_pool.py")
