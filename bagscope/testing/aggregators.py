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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bagscope.errors import ConfigError, first_line
from bagscope.mil.aggregators.registry import Aggregator, AggregatorEntry, aggregator_entry
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms, ScoreKind
from bagscope.specs import parse_spec

LENGTHS = (40, 1, 7, 130, 2, 3)
TOLERANCE = 1e-5
GRADIENT_FLOOR = 1e-6
"""A gradient that is zero by nature is rounding: this much of the largest is allowed to it."""
NARROW_TOLERANCE = 0.05

Build = Callable[[int, int], Aggregator]


def check_aggregator(
    what: str | AggregatorEntry | Build,
    *,
    features: int = 32,
    outputs: int = 3,
    options: Mapping[str, Any] | None = None,
    is_order_free: bool = True,
    mixes_bags: bool = False,
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

    Raises:
        AssertionError: it does not; one sentence says how.
        ConfigError: no such aggregator, or options that it does not have.
    """
    entry = aggregator_entry(what) if isinstance(what, str) else what
    if isinstance(entry, AggregatorEntry):
        _check_entry(entry)
        build = _builder(entry, options or {}, without_dropout=True)
        case = _Case(entry.name, build, features, outputs)
        is_order_free, mixes_bags = entry.is_order_free, entry.mixes_bags
        dropping = _builder(entry, options or {}, without_dropout=False)
    else:
        case = _Case(getattr(what, "__name__", "it"), entry, features, outputs)
        dropping = entry
    with torch.random.fork_rng(devices=[]):
        model = case.model()
        bags = case.bags()
        case.check_shapes(model, bags)
        case.check_evaluation(model, bags)
        case.check_training_step(replace(case, build=dropping).model(), bags)
        if is_order_free:
            case.check_order(model, bags)
        if not mixes_bags:
            case.check_packing(model.eval(), bags)
            case.check_packing(model.train(), bags)
        model.eval()
        case.check_terms(model, bags)
        case.check_narrow(model, bags)
        case.check_loading(model, bags)
        case.check_compiled(model, bags)


def _check_entry(entry: AggregatorEntry) -> None:
    name = entry.name
    _require(
        bool(entry.summary.strip()), name, "its summary is empty; say in a sentence what it is"
    )
    silent = [key for key, field in entry.options.model_fields.items() if not field.description]
    _require(not silent, name, f"option {silent[:1]} has no description")


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


def _require(holds: bool, name: str, sentence: str) -> None:
    # Not the statement assert: python -O would leave it out.
    if not holds:
        raise AssertionError(f"aggregator {name}: {sentence}")


@dataclass(frozen=True, slots=True)
class _Case:
    """One aggregator, how it is built, and what is asked of it."""

    name: str
    build: Build
    features: int
    outputs: int

    def require(self, holds: bool, sentence: str) -> None:
        _require(holds, self.name, sentence)

    def model(self, seed: int = 0) -> Aggregator:
        """Return a fresh one whose parameters are all different from what they start as."""
        torch.manual_seed(seed)
        model = self.build(self.features, self.outputs)
        self.require(
            isinstance(model, nn.Module),
            f"what was built is {type(model).__name__}, expected a torch.nn.Module",
        )
        for name, parameter in model.named_parameters():
            self.require(
                parameter.dtype == torch.float32,
                f"parameter {name} is {parameter.dtype}, expected float32",
            )
            # Zeros and ones to start with would hide what they are multiplied with.
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        return model.eval()

    def bags(self) -> Bags:
        """Return bags of `LENGTHS` tiles on a lattice, with a class each, one of them missing."""
        random = torch.Generator().manual_seed(1)
        tiles, count = sum(LENGTHS), len(LENGTHS)
        classes = torch.arange(count, dtype=torch.float64) % max(self.outputs, 2)
        classes[-1] = torch.nan
        places = torch.cat([torch.arange(length, dtype=torch.int32) for length in LENGTHS])
        grid = torch.stack([places % 8, places // 8], 1)
        return Bags(
            features=torch.randn(tiles, self.features, generator=random),
            cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32),
            bag_ids=tuple(f"bag {bag}" for bag in range(count)),
            grid=grid,
            coords_l0=grid * 256,
            slide_ids=tuple(f"slide {bag}" for bag in range(count)),
            tile_slide=torch.arange(count, dtype=torch.int32).repeat_interleave(
                torch.tensor(LENGTHS)
            ),
            tile_row=places,
            tile_um=torch.full((count,), 128.0, dtype=torch.float64),
            mpp_l0=torch.full((count,), 0.5, dtype=torch.float64),
            targets={"class": classes[:, None]},
            seed=5,
            step=3,
        )

    def call(self, model: Callable[[Bags], BagOutput], bags: Bags, what: str = "") -> BagOutput:
        """Return its output, or say which bags it can't take."""
        lengths = bags.lengths.tolist()
        what = what or (f"a bag of {lengths[0]} tiles" if len(lengths) == 1 else f"bags {lengths}")
        try:
            found = model(bags)
        except Exception as error:
            raise AssertionError(
                f"aggregator {self.name}: fails for {what} with {type(error).__name__} "
                f"({first_line(error)})"
            ) from error
        self.require(
            isinstance(found, BagOutput),
            f"forward returned {type(found).__name__}, expected a BagOutput",
        )
        return found

    def check_shapes(self, model: Aggregator, bags: Bags) -> None:
        given = bags.features.clone()
        found = self.call(model, bags)
        self.require(torch.equal(given, bags.features), "changed the features of the bags")
        count, tiles = len(bags), len(bags.features)
        expected = (count, self.outputs)
        self.require(
            tuple(found.logits.shape) == expected,
            f"logits are {tuple(found.logits.shape)}, expected {expected}",
        )
        self.require(
            found.scores.ndim == 2 and len(found.scores) == tiles and found.scores.shape[1] >= 1,
            f"scores are {tuple(found.scores.shape)}, expected one or more for each of the "
            f"{tiles} tiles",
        )
        self.require(
            found.score_kind in get_args(ScoreKind),
            f"score_kind is {found.score_kind!r}, expected one of {', '.join(get_args(ScoreKind))}",
        )
        shapes = {"embedding": (2, None), "branch_logits": (3, self.outputs), "entropy": (2, None)}
        for name, (axes, last) in shapes.items():
            value = getattr(found, name)
            if value is not None:
                fits = value.ndim == axes and len(value) == count
                fits = fits and (last is None or value.shape[-1] == last)
                self.require(fits, f"{name} is {tuple(value.shape)}, not as BagOutput says")
        for name, value in found.losses.items():
            self.require(
                tuple(value.shape) == (count,),
                f"loss {name!r} is {tuple(value.shape)}, expected one number per bag, ({count},)",
            )
        for name, value in _tensors(found).items():
            self.require(value.dtype == torch.float32, f"{name} is {value.dtype}, expected float32")
            self.require(bool(value.isfinite().all()), f"{name} holds NaN or infinity")

    def check_evaluation(self, model: Aggregator, bags: Bags) -> None:
        with torch.no_grad():
            first = self.call(model, bags)
            torch.manual_seed(99)
            self._same(first, self.call(model, bags), "a second call in evaluation")
            later = replace(bags, seed=6, step=4)
            self._same(first, self.call(model, later), "another seed and step in evaluation")
            blind = self.call(model, replace(bags, targets=None), "bags without targets")
        self.require(
            torch.equal(first.logits, blind.logits) and torch.equal(first.scores, blind.scores),
            "logits or scores are others when the targets are not there; they may not see them",
        )

    def check_training_step(self, model: Aggregator, bags: Bags) -> None:
        model.train()
        found = self.call(model, bags, "a training step")
        has_gradient = found.logits.requires_grad or not list(model.parameters())
        self.require(has_gradient, "no gradient of the logits reaches a parameter")
        outputs = [value.sum() for value in _tensors(found).values() if value.requires_grad]
        if outputs:
            torch.autograd.backward(outputs)
        bad = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        self.require(not bad, f"the gradient of {bad[:1]} holds NaN or infinity after a step")

    def check_order(self, model: Aggregator, bags: Bags) -> None:
        random = torch.Generator().manual_seed(2)
        order = torch.cat(
            [
                start + torch.randperm(stop - start, generator=random)
                for start, stop in pairwise(bags.cu_seqlens.tolist())
            ]
        )
        with torch.no_grad():
            truth = _tensors(self._in_float64(model, bags))
            before = _tensors(self.call(model, bags))
            after = _tensors(self.call(model, _reordered(bags, order)))
        for name, value in before.items():
            wanted = value[order] if name == "scores" else value
            self._close(
                after[name],
                wanted,
                truth[name],
                f"{name} when a bag's tiles come in another order; register it with "
                "is_order_free=False if that is meant",
            )

    def check_packing(self, model: Aggregator, bags: Bags) -> None:
        mode = "training" if model.training else "evaluation"
        packed, packed_grads = self._with_gradients(model, bags)
        precise = copy.deepcopy(model).double()
        truth, truth_grads = self._with_gradients(
            precise, bags.to("cpu", torch.float64), one_by_one=True
        )
        single, single_grads = self._with_gradients(model, bags, one_by_one=True)
        for name, value in packed.items():
            what = f"{name} of a packed batch and of its bags one by one, in {mode}"
            self._close(value, single[name], truth[name], what)
        largest = max((float(grad.abs().max()) for grad in truth_grads.values()), default=0.0)
        for name, grad in packed_grads.items():
            self.require(
                bool(grad.isfinite().all()), f"the gradient of {name} holds NaN or infinity"
            )
            self._close(
                grad,
                single_grads[name],
                truth_grads[name],
                f"the gradient of {name} from a packed batch and from its bags one by one, "
                f"in {mode}",
                floor=GRADIENT_FLOOR * largest,
            )

    def check_terms(self, model: Aggregator, bags: Bags) -> None:
        with torch.no_grad():
            found = self.call(model, bags)
            terms = model.pooling_terms(bags)
            if terms is None:
                return
            self.require(
                isinstance(terms, PoolingTerms),
                f"pooling_terms returned {type(terms).__name__}, expected PoolingTerms or None",
            )
            truth = self._in_float64(model, bags)
            rebuilt = terms.logits(bags.cu_seqlens)
            self._close(rebuilt, found.logits, truth.logits, "logits and what pooling_terms add to")
        if found.score_kind != "log_weight":
            return
        for start, stop in pairwise(bags.cu_seqlens.tolist()):
            shown = found.scores[start:stop].softmax(0)
            used = terms.scores[start:stop].softmax(0)
            if shown.shape != used.shape:
                shown, used = shown.mean(1), used.mean(1)
            self._close(shown, used, used, "the weights that scores and that pooling_terms tell")
        if found.entropy is not None and found.entropy.shape[1] == found.scores.shape[1]:
            entropy = torch.stack(
                [
                    torch.special.entr(found.scores[start:stop].softmax(0)).sum(0)
                    for start, stop in pairwise(bags.cu_seqlens.tolist())
                ]
            )
            self._close(found.entropy, entropy, entropy, "entropy and that of the scores' softmax")

    def check_narrow(self, model: Aggregator, bags: Bags) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            narrow = bags.to("cpu", dtype)
            with torch.no_grad():
                found = self.call(model, narrow, f"{name} features")
                truth = self._in_float64(model, narrow)
            for key in ("logits", "scores"):
                value = getattr(found, key)
                self.require(
                    value.dtype == torch.float32,
                    f"{key} of {name} features are {value.dtype}, expected float32",
                )
            self._close(
                found.logits,
                truth.logits.float(),
                truth.logits,
                f"logits of {name} features and the same in float64",
                tolerance=NARROW_TOLERANCE,
            )

    def check_loading(self, model: Aggregator, bags: Bags) -> None:
        stored = io.BytesIO()
        torch.save(model.state_dict(), stored)
        stored.seek(0)
        other = self.model(seed=7)
        try:
            other.load_state_dict(torch.load(stored, weights_only=True))
        except Exception as error:
            raise AssertionError(
                f"aggregator {self.name}: its state can't be loaded ({first_line(error)})"
            ) from error
        with torch.no_grad():
            self._same(self.call(model, bags), self.call(other, bags), "saving and loading")

    def check_compiled(self, model: Aggregator, bags: Bags) -> None:
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager")
        with torch.no_grad():
            truth = _tensors(self._in_float64(model, bags))
            plain = _tensors(self.call(model, bags))
            found = _tensors(self.call(compiled, bags, "torch.compile"))
        for name, value in plain.items():
            self._close(found[name], value, truth[name], f"{name} with and without torch.compile")

    def _in_float64(self, model: Aggregator, bags: Bags) -> BagOutput:
        precise = copy.deepcopy(model).double()
        return self.call(precise, bags.to("cpu", torch.float64), "float64 features and parameters")

    def _with_gradients(
        self, model: Aggregator, bags: Bags, *, one_by_one: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return outputs by name, and the gradients of their sum with fixed random weights."""
        features = bags.features.clone().requires_grad_()
        bags = replace(bags, features=features)
        model.zero_grad(set_to_none=True)
        if one_by_one:
            parts = [_tensors(self.call(model, bags.one(bag))) for bag in range(len(bags))]
            found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        else:
            found = _tensors(self.call(model, bags))
        loss = torch.zeros((), dtype=features.dtype)
        for name, value in found.items():
            random = torch.Generator().manual_seed(sum(name.encode()))
            weights = torch.randn(value.shape, generator=random, dtype=torch.float64)
            loss = loss + (value * weights.to(value.dtype)).sum()
        torch.autograd.backward(loss)
        grads = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        }
        if features.grad is not None:
            grads["the features"] = features.grad
        return {name: value.detach() for name, value in found.items()}, grads

    def _same(self, first: BagOutput, second: BagOutput, what: str) -> None:
        others = _tensors(second)
        for name, value in _tensors(first).items():
            self.require(
                name in others and torch.equal(value, others[name]),
                f"{what} gave other {name}; expected the same bits",
            )

    def _close(
        self,
        found: Tensor,
        wanted: Tensor,
        truth: Tensor,
        what: str,
        *,
        tolerance: float = TOLERANCE,
        floor: float = 0.0,
    ) -> None:
        same = found.shape == wanted.shape
        shapes = f"{tuple(found.shape)} and {tuple(wanted.shape)}"
        self.require(same, f"{what} differ in shape: {shapes}")
        worst = float((found.double() - wanted.double()).abs().max())
        allowed = tolerance * float(truth.abs().max()) + floor
        self.require(worst <= allowed, f"{what} differ by {worst:.2g}; {allowed:.2g} is allowed")


def _tensors(output: BagOutput) -> dict[str, Tensor]:
    """Return all that is there, by name; losses as "loss 'name'"."""
    found = {
        field.name: value
        for field in fields(output)
        if isinstance(value := getattr(output, field.name), Tensor)
    }
    return found | {f"loss {name!r}": value for name, value in output.losses.items()}


def _reordered(bags: Bags, order: Tensor) -> Bags:
    parts: dict[str, Any] = {
        name: None if (value := getattr(bags, name)) is None else value[order]
        for name in ("features", "coords_l0", "grid", "tile_slide", "tile_row")
    }
    return replace(bags, **parts)
