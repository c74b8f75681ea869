"""PackMIL with the original's weights and draws: labels, losses, downsampler and whole steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.objectives.objective import build_objective
from bagscope.mil.objectives.spec import ObjectiveSpec
from bagscope.mil.originals.mapping import Original
from bagscope.mil.originals.packmil import DOWNSAMPLER, ORIGINALS, REGIME
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes import hyperslides, packmil
from bagscope.mil.regimes.downsampler import Downsampler
from bagscope.mil.regimes.packing import next_fit
from bagscope.mil.regimes.registry import build_model
from bagscope.mil.targets import TargetSpec
from tests.kernels.packed import DATA, assert_close_to_float64, vectors
from tests.mil.parity.recorded import RELATIVE, ZERO

FIXES: dict[str, hyperslides.Benign] = {
    "faithful": "published",
    "fixed_benign00": "zero",
    "fixed_allbenign": "alone",
}


def recorded(kind: str) -> list[str]:
    """Return the files of a kind, however many there are."""
    return sorted(path.stem for path in (DATA / "vectors").glob(f"{kind}*.safetensors")) or [
        f"{kind}_A"
    ]


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    assert_close_to_float64(
        found.reshape(wanted.shape), wanted, rtol=RELATIVE, atol=ZERO, what=what
    )


def own(tensors: dict[str, Tensor], prefix: str, source: Original, model: torch.nn.Module) -> Any:
    theirs = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and name != "grad/x"
    }
    return source.renamed("packmil", theirs, model.state_dict())


def compare_gradients(
    tensors: dict[str, Tensor], source: Original, model: torch.nn.Module, loss: Tensor
) -> None:
    torch.autograd.backward(loss)
    for name, wanted in own(tensors, "grad/", source, model).items():
        found = model.get_parameter(name).grad
        close(torch.zeros_like(wanted) if found is None else found, wanted, name)


# --- labels and losses --------------------------------------------------------------------------


@pytest.mark.parametrize("file", recorded("packmil_hyperslide-labels"))
@pytest.mark.parametrize("counts", ["", "_counts"])
def test_labels(file: str, counts: str) -> None:
    tensors, meta = vectors(file)
    labels = tensors["input/labels"]
    there = labels >= 0
    pack = there.nonzero()[:, 0]
    weights = tensors["input/counts"][there].float() if counts else torch.ones(len(pack))
    grades = labels[there]
    onehot = functional.one_hot(grades, meta["config"]["n_classes"]).float()
    close(
        hyperslides.merged_classes(onehot, pack, weights),
        tensors[f"output/subtype{counts}"],
        "subtype",
    )
    close(
        hyperslides.merged_classes(onehot, pack, weights, by="sum"),
        tensors[f"output/normalised_sum{counts}"],
        "normalised",
    )
    for name, benign in FIXES.items():
        merged = hyperslides.merged_grades(grades, pack, weights, benign)
        close(merged, tensors[f"output/grade_{name}{counts}"], name)
        assert torch.equal(merged.argmax(1), tensors[f"output/grade_class_{name}{counts}"])


@pytest.mark.parametrize("file", recorded("packmil_hyperslide-labels"))
@pytest.mark.parametrize("counts", ["", "_counts"])
def test_survival_labels(file: str, counts: str) -> None:
    tensors, _ = vectors(file)
    bins = tensors["input/survival_bin"]
    there = bins >= 0
    pack = there.nonzero()[:, 0]
    weights = torch.ones(len(pack))
    if counts:
        weights = tensors["input/survival_counts"][there].float()
    censored = tensors["input/survival_censored"][there] == 1
    found = hyperslides.merged_survival(bins[there], censored, pack, weights)
    close(found.event_bin.float(), tensors[f"output/survival_y{counts}"], "y")
    close(found.censored_bin.float(), tensors[f"output/survival_y_censored{counts}"], "y censored")
    close(found.censored, tensors[f"output/survival_c{counts}"], "c")


@pytest.mark.parametrize("file", recorded("packmil_residual-losses"))
@pytest.mark.parametrize("name", ["focal", "bce", "ce_soft", "asl_single", "survival_nll"])
def test_residual_losses(file: str, name: str) -> None:
    tensors, meta = vectors(file)
    config = meta["config"]
    given = "survival_logits" if name == "survival_nll" else "logits"
    logits = tensors[f"input/{given}"].clone().requires_grad_()
    if name == "survival_nll":
        label = hyperslides.Survived(
            event_bin=tensors["input/survival_y"][:, 0].long(),
            censored_bin=tensors["input/survival_y_censored"][:, 0].long(),
            censored=tensors["input/survival_c"][:, 0],
        )
        found = hyperslides.survival_nll(logits, label, alpha=config["nll_alpha"])
    elif name == "asl_single":
        found = hyperslides.asymmetric(
            logits,
            tensors["input/hard_targets"],
            gamma_positive=config["asl_gamma_pos"],
            gamma_negative=config["asl_gamma_neg"],
            smoothing=config["asl_eps"],
        )
    elif name == "ce_soft":
        found = hyperslides.soft_cross_entropy(logits, tensors["input/normalised_targets"])
    elif name == "focal":
        found = hyperslides.focal(
            logits,
            tensors["input/soft_targets"],
            alpha=config["focal_alpha"],
            gamma=config["focal_gamma"],
        )
    else:
        found = hyperslides.binary(logits, tensors["input/soft_targets"])
    close(found.mean(), tensors[f"output/{name}"], name)
    torch.autograd.backward(found.mean())
    assert logits.grad is not None
    gradient = "survival_logits" if name == "survival_nll" else f"logits_{name}"
    close(logits.grad, tensors[f"grad/{gradient}"], f"gradient of {name}")


# --- downsampler and packing --------------------------------------------------------------------


@pytest.mark.parametrize("file", recorded("ads_"))
def test_downsampler(file: str) -> None:
    tensors, meta = vectors(file)
    config = meta["config"]
    x = tensors["input/x"].clone().requires_grad_()
    model = Downsampler(x.shape[1], config["r"], attention=config["attention_hidden"])
    model.load_state_dict(own(tensors, "weights/", DOWNSAMPLER, model))
    borders = torch.tensor([0, len(x)], dtype=torch.int32)
    if "input/permutation" in tensors:
        kept = tensors.get("input/kept_coordinates")
        found, _ = model.compressed(
            x,
            borders,
            is_long=torch.tensor([True]),
            order=tensors["input/permutation"],
            coordinates=None if kept is None else kept[None],
        )
    else:
        found = model(x, borders)
    close(found, tensors["output/out"], "out")
    compare_gradients(tensors, DOWNSAMPLER, model, (found * tensors["input/cotangent"]).sum())
    assert x.grad is not None
    close(x.grad, tensors["grad/x"], "x")


@pytest.mark.parametrize("file", recorded("packmil_packing-abmil"))
def test_packed_slides_are_isolated(file: str) -> None:
    tensors, meta = vectors(file)
    config = meta["config"]
    model = build_aggregator(
        "abmil",
        config["in_features"],
        config["n_classes"],
        {
            "hidden": config["hidden"],
            "attention": config["attention_hidden"],
            "activation": config["activation"],
        },
    ).eval()
    model.load_state_dict(own(tensors, "weights/", ORIGINALS["packmil-packed"], model))
    lengths = config["lengths"]
    packs = next_fit(lengths, config["pack_capacity"])
    filled = torch.zeros(max(packs) + 1, dtype=torch.int64)
    filled.index_add_(0, torch.tensor(packs), torch.tensor(lengths))
    assert torch.equal(filled, tensors["output/pack_lengths"])
    counts = torch.bincount(torch.tensor(packs))
    assert torch.equal(counts, tensors["output/packs_per_slide_count"])
    bags = Bags.of([tensors[f"input/x{slide}"] for slide in range(len(lengths))])
    logits = model(bags).logits
    for name in ("logits", "logits_separate"):
        close(logits, tensors[f"output/{name}"], name)
    loss = functional.cross_entropy(logits, tensors["input/label"])
    close(loss, tensors["output/loss_total"], "loss")
    compare_gradients(tensors, ORIGINALS["packmil-packed"], model, loss)


# --- whole steps --------------------------------------------------------------------------------


class RecordedDraws:
    """Gives the original's draws, slide by slide, as the numbers that ours are ordered by."""

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        draws = [tensors[name] for name in sorted(tensors) if name.startswith("input/draw")]
        self._left: Iterator[Tensor] = iter(draws)
        self._of: dict[int, list[Tensor]] = {use: [] for use in range(5)}
        r = config["downsample_r"]
        has_downsampler = config["downsampler"] != "none"
        effective = r if has_downsampler else 1
        shortest, rho = config["min_seq_len"] * effective, config["rho"]
        double = int(max(config["lengths"]) * (1 - rho)) // r > config["L"]
        most = (2 if double else 1) * config["L"] * effective
        for length in config["lengths"]:
            is_split = length >= shortest
            order = self._next(length) if is_split else torch.arange(length)
            main = int(length * rho)
            parts = [order[:main], order[main:]] if is_split else [order, order]
            # Parts that are too long are shuffled once more before they are cut.
            cut = [part[self._next(len(part))] if len(part) > most else part for part in parts]
            self._of[packmil.SPLIT].append(_numbers(torch.cat(cut) if is_split else order))
            for which, part in enumerate(cut):
                count = min(len(part), most)
                is_long = count > shortest
                filled = -(-count // r) * r if is_long else count
                again = self._next(filled) if has_downsampler else torch.arange(filled)
                self._of[packmil.COMPRESS + which].append(_numbers(again))
                values = config["in_features"] * r
                drawn = torch.arange(values).double()
                if "random" in config["downsampler"] and is_long:
                    drawn = self._next(values)
                self._of[packmil.KEEP + which].append(drawn)
        assert next(self._left, None) is None, "every recorded draw has its use"

    def _next(self, length: int) -> Tensor:
        draw = next(self._left)
        assert len(draw) == length
        return draw

    def __call__(self, bags: Bags, use: int = 0) -> Tensor:
        found = self._of[use]
        assert bags.lengths.tolist() == [len(numbers) for numbers in found]
        return torch.cat(found)


def _numbers(order: Tensor) -> Tensor:
    """Return numbers (n,) whose order is this one (n,)."""
    return order.argsort().double()


@pytest.mark.parametrize("file", recorded("packmil_step-"))
def test_step(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, meta = vectors(file)
    config = meta["config"]
    monkeypatch.setattr(packmil, "uniforms", RecordedDraws(tensors, config))
    classes = config["n_classes"]
    recipe = TrainSpec.model_validate(
        {
            "aggregator": {
                "name": "abmil",
                "options": {
                    "hidden": config["hidden"],
                    "attention": config["attention_hidden"],
                    "activation": "gelu",
                    "dropout": config["dropout"],
                },
            },
            "regime": {
                "name": "packmil",
                "options": {
                    "share": config["rho"],
                    "capacity": config["L"],
                    "shortest": config["min_seq_len"],
                    "r": config["downsample_r"],
                    "downsampler": config["downsampler"].removeprefix("ads-"),
                    "residual": config["residual_loss"],
                },
            },
        }
    )
    model = build_model(recipe, config["in_features"], classes).train()
    assert isinstance(model, packmil.PackMIL)
    model.load_state_dict(own(tensors, "weights/", REGIME, model))
    target = TargetSpec(column="label", classes=tuple(map(str, range(classes))))
    objective = build_objective([target], ObjectiveSpec(terms={"residual": config["aux_alpha"]}))
    label = tensors["input/label"]
    model.begin(objective.fit({"label": np.arange(classes, dtype=np.float64)[:, None]}))
    bags = Bags.of(
        [tensors[f"input/x{slide}"] for slide in range(len(label))],
        targets={"label": label.double()[:, None]},
    )
    if model.downsampler is None:
        # What is published without one is the aggregator itself.
        plain = own(tensors, "weights/", ORIGINALS["packmil"], model.inner)
        assert all(torch.equal(plain[name], w) for name, w in model.inner.state_dict().items())
    asked: list[Tensor] = []
    model.inner.register_forward_hook(lambda *call: asked.append(call[2].logits))
    merged: list[Tensor] = []
    made = hyperslides.merged_classes

    def kept(*args: Any, **options: Any) -> Tensor:
        merged.append(made(*args, **options))
        return merged[-1]

    monkeypatch.setattr(hyperslides, "merged_classes", kept)
    found = model.losses(
        bags,
        lambda output, targets, lengths=None: objective_of(model)(
            output, targets, progress=0.0, lengths=lengths
        ),
    )
    for name, value in {
        "logits": asked[0],
        "residual_logits": asked[1],
        "residual_targets": merged[0],
        "loss_main": found.mean("bag"),
        "loss_residual": found.mean("residual"),
        "loss_total": found.total,
    }.items():
        close(value, tensors[f"output/{name}"], name)
    compare_gradients(tensors, REGIME, model, found.total)


def objective_of(model: packmil.PackMIL) -> Any:
    assert model._objective is not None
    return model._objective
