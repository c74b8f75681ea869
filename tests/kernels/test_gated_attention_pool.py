from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.kernels.dispatch import keeping
from bagscope.kernels.gated_attention_pool import PooledBags, gated_attention_pool
from bagscope.kernels.segment_softmax_pool import attention_weights
from tests.kernels.packed import (
    LONG_BESIDE_SHORT,
    RAGGED,
    ROOT,
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
)

FEATURES, HIDDEN, GATES, BRANCHES = 14, 10, 6, 3
OUTPUTS = PooledBags._fields


def problem(
    lengths: tuple[int, ...] = RAGGED,
    *,
    has_projection: bool = True,
    is_gated: bool = True,
    has_biases: bool = True,
    branches: int = BRANCHES,
) -> dict[str, Tensor | None]:
    wide = FEATURES if has_projection else HIDDEN
    return {
        "x": normal(sum(lengths), wide, seed=1),
        "cu_seqlens": borders(lengths),
        "weight": normal(HIDDEN, FEATURES, seed=2, scale=0.3) if has_projection else None,
        "bias": normal(HIDDEN, seed=3) if has_projection and has_biases else None,
        "weight_v": normal(GATES, HIDDEN, seed=4, scale=0.4),
        "bias_v": normal(GATES, seed=5) if has_biases else None,
        "weight_u": normal(GATES, HIDDEN, seed=6, scale=0.4) if is_gated else None,
        "bias_u": normal(GATES, seed=7) if has_biases and is_gated else None,
        "weight_w": normal(branches, GATES, seed=8),
        "bias_w": normal(branches, seed=9) if has_biases else None,
        "mask": None,
    }


def ours(*, weight: Tensor | None, bias: Tensor | None, **given: Any) -> PooledBags:
    projection = None if weight is None else (weight, bias)
    return gated_attention_pool(projection=projection, **given)


def plain(
    x: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_v: Tensor,
    bias_v: Tensor | None,
    weight_u: Tensor | None,
    bias_u: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
    mask: Tensor | None,
    activation: str = "relu",
    gate: str = "tanh",
) -> tuple[Tensor, ...]:
    """Compute what every published implementation does, bag by bag."""
    if weight is not None:
        x = functional.linear(x, weight, bias)
        x = {"relu": torch.relu, "gelu": functional.gelu, "identity": torch.clone}[activation](x)
    z = functional.linear(x, weight_v, bias_v)
    z = torch.tanh(z) if gate == "tanh" else torch.relu(z)
    if weight_u is not None:
        z = z * torch.sigmoid(functional.linear(x, weight_u, bias_u))
    scores = functional.linear(z, weight_w, bias_w)
    pooled, lse, entropy = [], [], []
    hidden = scores if mask is None else scores.masked_fill(mask, -torch.inf)
    for e, h in zip(bags_of(hidden, cu_seqlens), bags_of(x, cu_seqlens), strict=True):
        a = e.softmax(0)
        pooled.append(a.T @ h)
        lse.append(e.logsumexp(0))
        entropy.append(-torch.special.xlogy(a, a.clamp_min(1e-300)).sum(0))
    return torch.stack(pooled), scores, torch.stack(lse), torch.stack(entropy)


def assert_equal_to_plain(
    given: dict[str, Tensor | None],
    options: dict[str, str] | None = None,
    rtol: float = 1e-5,
    **how: Any,
) -> None:
    options = options or {}
    found, grads = gradients(ours, given, **options, **how)
    truth, true_grads = gradients(plain, doubled(given), **options)
    for name, a, b in zip(OUTPUTS, found, truth, strict=True):
        is_empty = b == -torch.inf
        assert (a[is_empty] == -torch.inf).all()
        assert_close_to_float64(a[~is_empty], b[~is_empty], rtol=rtol, what=name)
    assert set(grads) == set(true_grads)
    for name, grad in grads.items():
        # Additive biases of the logits shift nothing but lse: their gradients are small sums.
        assert_close_to_float64(grad, true_grads[name], rtol=rtol, atol=1e-6, what=name)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("keep", ["all", "nothing"])
@pytest.mark.parametrize("has_projection", [True, False])
@pytest.mark.parametrize("lengths", [RAGGED, LONG_BESIDE_SHORT, (1,), (2, 63), (0,)], ids=str)
def test_equals_torch_in_float64(lengths: tuple[int, ...], has_projection: bool, keep: str) -> None:
    assert_equal_to_plain(problem(lengths, has_projection=has_projection), keep=keep)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("keep", ["all", "nothing"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
@pytest.mark.parametrize("gate", ["tanh", "relu"])
@pytest.mark.parametrize("has_biases", [True, False])
@pytest.mark.parametrize("is_gated", [True, False])
def test_every_form(
    activation: str, gate: str, has_biases: bool, is_gated: bool, keep: str
) -> None:
    given = problem((3, 2200), is_gated=is_gated, has_biases=has_biases)
    assert_equal_to_plain(given, {"activation": activation, "gate": gate}, keep=keep)


@pytest.mark.parametrize("way", ["cpu", "reference"])
@pytest.mark.parametrize("branches", [1, 5, 16, 17])
def test_any_number_of_branches(monkeypatch: pytest.MonkeyPatch, branches: int, way: str) -> None:
    monkeypatch.setenv("BAGSCOPE_KERNELS", way)
    assert_equal_to_plain(problem((7, 100, 2), branches=branches))


@pytest.mark.parametrize("keep", ["all", "nothing"])
def test_masked_tiles_weigh_nothing(keep: str) -> None:
    lengths = (9, 100, 2100)
    mask = normal(sum(lengths), BRANCHES, seed=20) > 0.5
    mask[:3] = False
    mask[9] = False
    given = {**problem(lengths), "mask": mask}
    assert_equal_to_plain(given, keep=keep)
    pooled = ours(**given)
    a = attention_weights(pooled.scores, pooled.lse, given["cu_seqlens"], mask=mask)  # type: ignore[arg-type]
    assert (a[mask] == 0).all()


@pytest.mark.parametrize("output", range(4))
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_gradcheck_of_each_output(output: int, activation: str) -> None:
    given = doubled(problem((4, 1), branches=2))
    mask = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 0], [0, 0]], dtype=torch.bool)
    names = [name for name, t in given.items() if t is not None and t.is_floating_point()]

    def one(*tensors: Tensor) -> Tensor:
        values = {**given, **dict(zip(names, tensors, strict=True)), "mask": mask}
        return ours(**values, activation=activation, keep="nothing")[output]

    leaves = [t.requires_grad_() for name in names if (t := given[name]) is not None]
    assert torch.autograd.gradcheck(one, leaves)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("keep", ["all", "nothing"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_dropout_has_the_gradients_of_what_it_drew(
    monkeypatch: pytest.MonkeyPatch, activation: str, keep: str
) -> None:
    given = problem((3, 4097))
    settings: dict[str, Any] = {
        "activation": activation, "dropout_p": 0.25, "projection_dropout_p": 0.3, "seed": 12,
    }  # fmt: skip
    found, grads = gradients(ours, given, keep=keep, **settings)
    assert not torch.allclose(found[0], ours(**given).pooled)
    monkeypatch.setenv("BAGSCOPE_KERNELS", "reference")
    truth, true_grads = gradients(ours, doubled(given), **settings)
    for a, b in zip(found, truth, strict=True):
        assert_close_to_float64(a, b)
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name], atol=1e-6, what=name)


def test_gradients_only_where_asked_for() -> None:
    given = problem()
    assert given["weight_w"] is not None and given["x"] is not None
    given["weight_w"].requires_grad_()
    ours(**given).entropy.sum().backward()
    assert given["weight_w"].grad is not None and given["x"].grad is None
    _, grads = gradients(plain, doubled(problem()))
    assert grads["weight_w"].shape == given["weight_w"].grad.shape
    with torch.no_grad():
        assert not ours(**given).pooled.requires_grad


@pytest.mark.parametrize("output", range(4))
def test_one_output_alone_gives_its_gradients(output: int) -> None:
    given = problem((5, 3000))
    _, grads = gradients(lambda **k: ours(**k)[output], given)
    _, truth = gradients(lambda **k: plain(**k)[output], doubled(given))
    for name, grad in grads.items():
        assert_close_to_float64(grad, truth[name], atol=1e-6, what=name)


@pytest.mark.parametrize("keep", ["all", "nothing"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_as_much_as_torch(dtype: torch.dtype, keep: str) -> None:
    low = {
        name: t.to(dtype) if t is not None and t.is_floating_point() else t
        for name, t in problem((63, 2500)).items()
    }
    found, grads = gradients(ours, low, keep=keep)
    theirs, their_grads = gradients(plain, low)
    truth, true_grads = gradients(plain, doubled(low))
    for name, a, b, c in zip(OUTPUTS, found, theirs, truth, strict=True):
        assert_at_most_twice(a, b, c, what=name)
    for name in grads:
        assert_at_most_twice(grads[name], their_grads[name], true_grads[name], what=name)


def test_master_weights_keep_their_dtype() -> None:
    given = problem((63, 100))
    assert given["x"] is not None
    found, grads = gradients(ours, {**given, "x": given["x"].bfloat16()})
    truth, true_grads = gradients(plain, doubled(given))
    assert found[0].dtype == torch.float32 and grads["weight"].dtype == torch.float32
    assert_close_to_float64(found[0], truth[0], rtol=0.03)
    assert_close_to_float64(grads["weight"], true_grads["weight"], rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_computes_narrow_bags_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    given = problem()
    assert given["x"] is not None
    given["x"] = given["x"].to(dtype)
    monkeypatch.setenv("BAGSCOPE_KERNELS", "reference")
    settings: dict[str, Any] = {"dropout_p": 0.25, "projection_dropout_p": 0.3, "seed": 12}
    found, grads = gradients(ours, given, **settings)
    truth, true_grads = gradients(ours, doubled(given), **settings)
    for name, a, b in zip(OUTPUTS, found, truth, strict=True):
        is_empty = b == -torch.inf
        assert a.dtype == torch.float32
        assert_close_to_float64(a[~is_empty], b[~is_empty], what=name)
    for name, grad in grads.items():
        rtol = 1e-2 if name == "x" else 1e-5
        assert_close_to_float64(grad, true_grads[name], rtol=rtol, atol=1e-6, what=name)


def test_strided_inputs_and_permutations() -> None:
    given = problem(LONG_BESIDE_SHORT)
    found, _ = gradients(ours, given)
    apart = {
        name: strided(t) if t is not None and t.is_floating_point() else t
        for name, t in given.items()
    }
    for a, b in zip(ours(**apart), found, strict=True):
        assert_close_to_float64(a, b)
    assert given["x"] is not None and given["cu_seqlens"] is not None
    order = shuffle_within(given["cu_seqlens"])
    shuffled = ours(**{**given, "x": given["x"][order]})
    for name, a, b in zip(OUTPUTS, shuffled, found, strict=True):
        assert_close_to_float64(a, b[order] if name == "scores" else b, atol=1e-6)


def test_packed_equals_one_by_one() -> None:
    given = problem(LONG_BESIDE_SHORT)
    x, cu_seqlens = given["x"], given["cu_seqlens"]
    assert x is not None and cu_seqlens is not None
    learned = [n for n, t in given.items() if t is not None and t.is_floating_point() and n != "x"]
    weights = {n: given[n].clone().requires_grad_() for n in learned}  # type: ignore[union-attr]
    packed = ours(**{**given, **weights})
    (packed.pooled.square().sum() + packed.entropy.sum()).backward()
    whole = {n: t.grad.clone() for n, t in weights.items() if t.grad is not None}
    for t in weights.values():
        t.grad = None
    for bag, rows in enumerate(bags_of(x, cu_seqlens)):
        one = ours(**{**given, **weights, "x": rows, "cu_seqlens": borders([len(rows)])})
        assert_close_to_float64(one.pooled[0], packed.pooled[bag])
        assert_close_to_float64(one.scores, bags_of(packed.scores, cu_seqlens)[bag])
        (one.pooled.square().sum() + one.entropy.sum()).backward()
    for n, t in weights.items():
        if n != "bias_w":
            assert t.grad is not None
            assert_close_to_float64(t.grad, whole[n], atol=1e-6, what=n)


def test_the_same_bits_again_kept_or_not() -> None:
    given = problem(LONG_BESIDE_SHORT)
    found, grads = gradients(ours, given, keep="all")
    for keep in ("all", "nothing"):
        again, grads_again = gradients(ours, given, keep=keep)
        assert all(a.equal(b) for a, b in zip(found, again, strict=True))
        assert all(grads[name].equal(grads_again[name]) for name in grads)


def test_keeps_what_fits_the_budget_the_projection_first() -> None:
    given = problem((100,))
    assert given["weight_w"] is not None
    given["weight_w"].requires_grad_()

    def saved() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.untyped_storage().nbytes()), t)[1], lambda t: t
        ):
            ours(**given)
        return sum(sizes)

    everything = saved()
    h_bytes, gate_bytes = 100 * HIDDEN * 4, 100 * 2 * GATES * 4
    with keeping(h_bytes):
        assert everything - saved() == gate_bytes
    with keeping(0):
        assert everything - saved() == gate_bytes + h_bytes


def test_compiles_as_one_graph() -> None:
    def step(**given: Any) -> tuple[Tensor, ...]:
        pooled = ours(**given)
        return pooled.pooled.relu(), pooled.scores, pooled.entropy

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, grads = gradients(compiled, problem())
    truth, true_grads = gradients(step, problem())
    for a, b in zip(found, truth, strict=True):
        assert_close_to_float64(a, b)
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name], what=name)


CHANGES = [
    ({"x": torch.ones(5)}, "x is"),
    ({"weight": torch.ones(3, 3)}, r"weight is \(3, 3\); it must be \(10, 14\)"),
    ({"weight": None, "bias": None}, "x has 14 features and weight_v takes 10"),
    ({"activation": "silu"}, "choose one of relu, gelu, identity"),
    ({"keep": "some"}, "choose one of auto, all, nothing"),
    ({"projection_dropout_p": 1.0}, "projection_dropout_p is"),
    ({"mask": torch.ones(173, 3)}, "pass bool"),
    ({"cu_seqlens": borders([172])}, "must rise from 0 to the 173 tiles"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_refuses_what_does_not_fit(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ours(**{**problem(), **change})


def test_kernels_in_the_interpreter() -> None:
    run_interpreted("test_gated_attention_pool.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's memory marks")
def test_a_step_that_keeps_nothing_needs_little_memory() -> None:
    script = ROOT / "benchmarks/bench_kernels.py"
    command = [sys.executable, script, "--memory-of", "nothing", "--tiles", "20000"]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert float(run.stdout.split()[-1]) <= 64


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    compiled = torch.compile(ours, fullgraph=True)
    with warnings.catch_warnings():
        # Inductor's own imports warn of other packages' futures.
        warnings.simplefilter("ignore")
        found, grads = gradients(compiled, problem())
    truth, true_grads = gradients(ours, problem())
    for a, b in zip(found, truth, strict=True):
        is_empty = b == -torch.inf
        assert_close_to_float64(a[~is_empty], b[~is_empty])
    for name, grad in grads.items():
        assert_close_to_float64(grad, true_grads[name], what=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("keep", ["all", "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("branches", [1, 5, 16])
def test_on_a_gpu(dtype: torch.dtype, branches: int, keep: str) -> None:
    given = problem((*LONG_BESIDE_SHORT, 70_000), branches=branches)
    low = {
        name: None if t is None else t.to("cuda", dtype if t.is_floating_point() else t.dtype)
        for name, t in given.items()
    }
    found, grads = gradients(ours, low, keep=keep)
    theirs, their_grads = gradients(plain, low)
    truth, true_grads = gradients(plain, doubled(low))
    for name, a, b, c in zip(OUTPUTS, found, theirs, truth, strict=True):
        assert_at_most_twice(a, b, c, allowance=1e-4, what=name)
    for name in grads:
        if name != "bias_w":
            assert_at_most_twice(grads[name], their_grads[name], true_grads[name], what=name)
    again, _ = gradients(ours, low, keep=keep)
    assert all(a.equal(b) for a, b in zip(found, again, strict=True))
