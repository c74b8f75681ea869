"""The contract of an aggregator, as one call for a test of yours.

    def test_my_aggregator() -> None:
        check_aggregator("my-pooling", features=64, outputs=3)

What is asked, on the CPU and with small bags of 1 to 130 tiles:

- logits, an embedding and at least one score for every tile, finite, in full precision, also for
  bags of float16 and bfloat16;
- a packed batch equals its bags one by one, outputs and gradients, in evaluation and, without
  dropout, in training; unless `mixes_bags` says otherwise;
- the order of a bag's tiles changes nothing; unless `is_order_free` says otherwise;
- evaluation is the same to the last bit every time, after saving and loading too, and whether or
  not the labels are there;
- the logits are rebuilt from `pooling_terms`, where there are any, and the scores tell the same;
- torch.compile changes nothing; no gradient is NaN; the bags are left as they were.

"Equals" is max |a − b| ≤ 1e-5 · max |the same in float64|.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import torch

from bagscope.errors import ConfigError, first_line
from bagscope.mil.aggregators.registry import Aggregator, AggregatorEntry, aggregator_entry
from bagscope.mil.bags import Bags, PoolingTerms, ScoreKind
from bagscope.specs import parse_spec
from bagscope.testing.aggregator_case import Build, Case, reordered, require, tensors

GRADIENT_FLOOR = 1e-5
"""This much of the gradient's largest entry over all parameters is rounding, as in all else: of a
small gradient behind several layers, or of one that is zero by nature, more than this is left."""
NARROW_TOLERANCE = 0.05


def check_aggregator(
    what: str | AggregatorEntry | Build,
    *,
    features: int = 32,
    outputs: int = 3,
    options: Mapping[str, Any] | None = None,
    is_order_free: bool = True,
    mixes_bags: bool = False,
    compiled: bool = True,
) -> None:
    """Check that an aggregator keeps the contract.

    Args:
        what: a registered name, its entry, or what builds one of (features, outputs); the last
            is to build without dropout, and is held to the two promises below.
        features: width of a tile's vector.
        outputs: number of logits.
        options: of a name or an entry.
        is_order_free: of what builds one; an entry says it itself.
        mixes_bags: likewise.
        compiled: whether torch.compile is tried as well, which takes longest.

    Raises:
        AssertionError: it does not; one sentence says how.
        ConfigError: no such aggregator, or options that it does not have.
    """
    entry = aggregator_entry(what) if isinstance(what, str) else what
    if isinstance(entry, AggregatorEntry):
        _check_entry(entry)
        build = _builder(entry, options or {}, without_dropout=True)
        case = Case(entry.name, build, features, outputs)
        is_order_free, mixes_bags = entry.is_order_free, entry.mixes_bags
        dropping = _builder(entry, options or {}, without_dropout=False)
    else:
        case = Case(getattr(what, "__name__", "it"), entry, features, outputs)
        dropping = entry
    with torch.random.fork_rng(devices=[]):
        model = case.model()
        bags = case.bags()
        _check_shapes(case, model, bags)
        _check_evaluation(case, model, bags)
        _check_training_step(case, replace(case, build=dropping).model(drops=True), bags)
        if is_order_free:
            _check_order(case, model, bags)
        if not mixes_bags:
            _check_packing(case, model.eval(), bags)
            _check_packing(case, model.train(), bags)
        model.eval()
        _check_terms(case, model, bags)
        _check_narrow(case, model, bags)
        _check_loading(case, model, bags)
        if compiled:
            _check_compiled(case, model, bags)


def _check_entry(entry: AggregatorEntry) -> None:
    name = entry.name
    require(bool(entry.summary.strip()), name, "its summary is empty; say in a sentence what it is")
    silent = [key for key, field in entry.options.model_fields.items() if not field.description]
    require(not silent, name, f"option {silent[:1]} has no description")


def _builder(entry: AggregatorEntry, options: Mapping[str, Any], *, without_dropout: bool) -> Build:
    where = f"aggregator {entry.name}"
    parsed = parse_spec(entry.options, options, where=where)
    if without_dropout:
        for key in entry.options.model_fields:
            # An option that another one excludes refuses the zero, and drops nothing.
            with suppress(ConfigError):
                if "dropout" in key:
                    zero = {**parsed.model_dump(), key: 0.0}
                    parsed = parse_spec(entry.options, zero, where=where)
    return lambda features, outputs: entry.build(features, outputs, parsed)


def _check_shapes(case: Case, model: Aggregator, bags: Bags) -> None:
    given = bags.features.clone()
    found = case.call(model, bags)
    case.require(torch.equal(given, bags.features), "changed the features of the bags")
    count, tiles = len(bags), len(bags.features)
    expected = (count, case.outputs)
    case.require(
        tuple(found.logits.shape) == expected,
        f"logits are {tuple(found.logits.shape)}, expected {expected}",
    )
    case.require(
        found.scores.ndim == 2 and len(found.scores) == tiles and found.scores.shape[1] >= 1,
        f"scores are {tuple(found.scores.shape)}, expected one or more for each of the "
        f"{tiles} tiles",
    )
    case.require(
        found.score_kind in get_args(ScoreKind),
        f"score_kind is {found.score_kind!r}, expected one of {', '.join(get_args(ScoreKind))}",
    )
    shapes = {"embedding": (2, None), "branch_logits": (3, case.outputs), "entropy": (2, None)}
    for name, (axes, last) in shapes.items():
        value = getattr(found, name)
        if value is not None:
            fits = value.ndim == axes and len(value) == count
            fits = fits and (last is None or value.shape[-1] == last)
            case.require(fits, f"{name} is {tuple(value.shape)}, not as BagOutput says")
    for name, value in found.losses.items():
        case.require(
            tuple(value.shape) == (count,),
            f"loss {name!r} is {tuple(value.shape)}, expected one number per bag, ({count},)",
        )
    for name, value in tensors(found).items():
        case.require(value.dtype == torch.float32, f"{name} is {value.dtype}, expected float32")
        case.require(bool(value.isfinite().all()), f"{name} holds NaN or infinity")


def _check_evaluation(case: Case, model: Aggregator, bags: Bags) -> None:
    with torch.no_grad():
        first = case.call(model, bags)
        torch.manual_seed(99)
        case.same(first, case.call(model, bags), "a second call in evaluation")
        later = replace(bags, seed=6, step=4)
        case.same(first, case.call(model, later), "another seed and step in evaluation")
        blind = case.call(model, replace(bags, targets=None), "bags without targets")
    case.require(
        torch.equal(first.logits, blind.logits) and torch.equal(first.scores, blind.scores),
        "logits or scores are others when the targets are not there; they may not see them",
    )


def _check_training_step(case: Case, model: Aggregator, bags: Bags) -> None:
    model.train()
    found = case.call(model, bags, "a training step")
    has_gradient = found.logits.requires_grad or not list(model.parameters())
    case.require(has_gradient, "no gradient of the logits reaches a parameter")
    outputs = [value.sum() for value in tensors(found).values() if value.requires_grad]
    if outputs:
        torch.autograd.backward(outputs)
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]
    case.require(not bad, f"the gradient of {bad[:1]} holds NaN or infinity after a step")


def _check_order(case: Case, model: Aggregator, bags: Bags) -> None:
    random = torch.Generator().manual_seed(2)
    order = torch.cat(
        [
            start + torch.randperm(stop - start, generator=random)
            for start, stop in pairwise(bags.cu_seqlens.tolist())
        ]
    )
    with torch.no_grad():
        truth = tensors(case.in_float64(model, bags))
        before = tensors(case.call(model, bags))
        after = tensors(case.call(model, reordered(bags, order)))
    for name, value in before.items():
        wanted = value[order] if name == "scores" else value
        case.close(
            after[name],
            wanted,
            truth[name],
            f"{name} when a bag's tiles come in another order; register it with "
            "is_order_free=False if that is meant",
        )


def _check_packing(case: Case, model: Aggregator, bags: Bags) -> None:
    mode = "training" if model.training else "evaluation"
    packed, packed_grads = case.with_gradients(model, bags)
    precise = copy.deepcopy(model).double()
    truth, truth_grads = case.with_gradients(
        precise, bags.to("cpu", torch.float64), one_by_one=True
    )
    single, single_grads = case.with_gradients(model, bags, one_by_one=True)
    case.require(
        packed.keys() == single.keys(),
        f"gives {', '.join(packed)} for a packed batch, and {', '.join(single)} bag by bag",
    )
    for name, value in packed.items():
        what = f"{name} of a packed batch and of its bags one by one, in {mode}"
        case.close(value, single[name], truth[name], what)
    largest = max((float(grad.abs().max()) for grad in truth_grads.values()), default=0.0)
    for name, grad in packed_grads.items():
        case.require(bool(grad.isfinite().all()), f"the gradient of {name} holds NaN or infinity")
        case.close(
            grad,
            single_grads[name],
            truth_grads[name],
            f"the gradient of {name} from a packed batch and from its bags one by one, in {mode}",
            floor=GRADIENT_FLOOR * largest,
        )


def _check_terms(case: Case, model: Aggregator, bags: Bags) -> None:
    with torch.no_grad():
        found = case.call(model, bags)
        terms = model.pooling_terms(bags)
        if terms is None:
            return
        case.require(
            isinstance(terms, PoolingTerms),
            f"pooling_terms returned {type(terms).__name__}, expected PoolingTerms or None",
        )
        truth = case.in_float64(model, bags)
        rebuilt = terms.logits(bags.cu_seqlens)
        case.close(rebuilt, found.logits, truth.logits, "logits and what pooling_terms add to")
    if found.score_kind != "log_weight":
        return
    for start, stop in pairwise(bags.cu_seqlens.tolist()):
        shown = found.scores[start:stop].softmax(0)
        used = terms.scores[start:stop].softmax(0)
        if shown.shape != used.shape:
            shown, used = shown.mean(1), used.mean(1)
        case.close(shown, used, used, "the weights that scores and that pooling_terms tell")
    if found.entropy is not None and found.entropy.shape[1] == found.scores.shape[1]:
        entropy = torch.stack(
            [
                torch.special.entr(found.scores[start:stop].softmax(0)).sum(0)
                for start, stop in pairwise(bags.cu_seqlens.tolist())
            ]
        )
        case.close(found.entropy, entropy, entropy, "entropy and that of the scores' softmax")


def _check_narrow(case: Case, model: Aggregator, bags: Bags) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        narrow = bags.to("cpu", dtype)
        with torch.no_grad():
            found = case.call(model, narrow, f"{name} features")
            truth = case.in_float64(model, narrow)
        for key in ("logits", "scores"):
            value = getattr(found, key)
            case.require(
                value.dtype == torch.float32,
                f"{key} of {name} features are {value.dtype}, expected float32",
            )
        case.close(
            found.logits,
            truth.logits.float(),
            truth.logits,
            f"logits of {name} features and the same in float64",
            tolerance=NARROW_TOLERANCE,
        )


def _check_loading(case: Case, model: Aggregator, bags: Bags) -> None:
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    other = case.model(seed=7)
    try:
        other.load_state_dict(torch.load(stored, weights_only=True))
    except Exception as error:
        raise AssertionError(
            f"aggregator {case.name}: its state can't be loaded ({first_line(error)})"
        ) from error
    with torch.no_grad():
        case.same(case.call(model, bags), case.call(other, bags), "saving and loading")


def _check_compiled(case: Case, model: Aggregator, bags: Bags) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        truth = tensors(case.in_float64(model, bags))
        plain = tensors(case.call(model, bags))
        found = tensors(case.call(compiled, bags, "torch.compile"))
    for name, value in plain.items():
        case.close(found[name], value, truth[name], f"{name} with and without torch.compile")
