"""Published checkpoints of every architecture, converted, say what plain torch makes of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.mil.bags import Bags
from bagscope.mil.originals import PARTS
from bagscope.mil.originals.checkpoint import read_checkpoint
from bagscope.mil.originals.shapes import Fitted, fit, recognise
from bagscope.mil.regimes.registry import build_model
from tests.mil.originals.published import PUBLISHED, Published, random_weights

RELATIVE = 1e-5
"""Of the largest logit."""
LENGTHS = (1, 13, 40)
# Where a model is only what its authors wrote for bags of some size.
LENGTHS_OF = {"transmil": (3, 300), "dtfd": (4, 13, 40)}

Weights = dict[str, Tensor]


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


# As training scripts leave them: alone, among other things, wrapped by DataParallel, Lightning,
# Hugging Face, torch.compile.
FORMS: dict[str, Callable[[Weights], Any]] = {
    "alone.pt": lambda weights: weights,
    "parallel.pth": lambda weights: {"epoch": 7, "state_dict": prefixed(weights, "module.")},
    "lightning.ckpt": lambda weights: {
        "state_dict": prefixed(weights, "model."),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}],
        "callbacks": {},
    },
    "among.pth": lambda weights: {
        "model": weights,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 3,
    },
    "named.tar": lambda weights: {"model_state_dict": weights, "loss": 0.3},
    "twice.pt": lambda weights: {"net": prefixed(weights, "_orig_mod.module.")},
    "half.pt": lambda weights: weights,
    "lab.safetensors": lambda weights: prefixed(weights, "model."),
}


def saved(weights: Weights, form: str, folder: Path) -> Path:
    """Write weights as a script would; return the file."""
    path = folder / form
    content = FORMS[form](weights)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def bags_of(published: Published, lengths: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, published.features, generator=generator) for n in lengths]


def logits_of(fitted: Fitted, bags: list[Tensor]) -> Tensor:
    model = build_model(fitted.recipe, fitted.features, fitted.outputs)
    model.load_state_dict(dict(fitted.weights))
    with torch.inference_mode():
        return model.eval()(Bags.of(bags)).logits


def assert_same_logits(
    fitted: Fitted, published: Published, weights: Weights, lengths: tuple[int, ...] = LENGTHS
) -> None:
    bags = bags_of(published, lengths)
    wanted = torch.stack([published.logits(weights, bag) for bag in bags])
    off = (logits_of(fitted, bags) - wanted).abs().max()
    assert off <= RELATIVE * wanted.abs().max()
    # Bags that said the same would show nothing.
    assert wanted.std(0).min() > 1e-3 * wanted.abs().max()


@pytest.mark.parametrize(("name", "form"), list(zip(PUBLISHED, cycle(FORMS), strict=False)))
def test_converted_weights_say_what_the_formulas_say(name: str, form: str, tmp_path: Path) -> None:
    source, published = PUBLISHED[name]
    weights = random_weights(published.shapes)
    if form == "half.pt":
        weights = {key: tensor.half() for key, tensor in weights.items()}
    read = read_checkpoint(saved(weights, form, tmp_path))
    fitted = recognise(read, published.settings)
    assert fitted.source == source
    assert fitted.features == published.features
    exact = {key: tensor.float() for key, tensor in weights.items()}
    assert_same_logits(fitted, published, exact, LENGTHS_OF.get(name, LENGTHS))


def test_a_model_saved_as_several_state_dicts_is_read_as_one(tmp_path: Path) -> None:
    source, published = PUBLISHED["dtfd"]
    weights = random_weights(published.shapes)
    parts: dict[str, Any] = {"epoch": 7, "test_auc": 0.9}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    torch.save(parts, tmp_path / "model_best.pth")
    fitted = recognise(
        read_checkpoint(tmp_path / "model_best.pth", together=PARTS), published.settings
    )
    assert fitted.source == source
    assert_same_logits(fitted, published, weights, LENGTHS_OF["dtfd"])
    del parts["att_classifier"]
    torch.save(parts, tmp_path / "tier1.pth")
    with pytest.raises(ConfigError, match=r"there are .*dim_reduction.*; name one of them"):
        read_checkpoint(tmp_path / "tier1.pth", together=PARTS)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint_is_read(form: str, tmp_path: Path) -> None:
    source, published = PUBLISHED["dsmil"]
    weights = random_weights(published.shapes)
    fitted = fit(source, read_checkpoint(saved(weights, form, tmp_path)))
    assert_same_logits(fitted, published, weights)


@pytest.mark.parametrize(
    ("name", "told", "assumed"),
    [
        ("clam-mb-big", {"hidden": 512, "attention": 384}, ()),
        (
            "hippo-tanh",
            {"hidden": 512, "attention": 384, "gated": False, "projection_bias": True,
             "attention_bias": True},
            ("activation", "gate"),
        ),
        (
            "acmil-ga",
            {"attention": "gated", "branches": 5, "hidden": 512, "projection_bias": False,
             "attention_width": 128},
            ("activation",),
        ),
        (
            "acmil-mha",
            {"attention": "multihead", "branches": 5, "hidden": 128, "projection_bias": False},
            ("activation", "heads"),
        ),
        ("dsmil-linear", {"query": 128, "q": "linear", "v": "identity"}, ("predict",)),
        (
            "mambamil-plain",
            {"hidden": 512, "attention": 128, "layers": 2, "ways": "plain", "states": 16,
             "expand": 2},
            ("rate", "order"),
        ),
        (
            "mambamil-sr",
            {"hidden": 512, "attention": 128, "layers": 2, "states": 16, "expand": 2},
            ("ways", "rate", "order"),
        ),
        (
            "transmil",
            {"hidden": 512, "heads": 8, "landmarks": 256, "taps": 33, "ppeg_sizes": (7, 5, 3)},
            ("attention", "iterations", "ppeg", "faithful_pads", "faithful_start"),
        ),
    ],
)  # fmt: skip
def test_what_shapes_tell_and_what_they_do_not(
    name: str, told: dict[str, Any], assumed: tuple[str, ...]
) -> None:
    source, published = PUBLISHED[name]
    fitted = fit(source, random_weights(published.shapes))
    assert {option: fitted.options[option] for option in fitted.told} == told
    assert fitted.assumed == assumed


def test_what_no_shape_tells_is_what_the_authors_chose_unless_it_is_set() -> None:
    source, published = PUBLISHED["transmil"]
    weights = random_weights(published.shapes)
    assert fit(source, weights).options["faithful_pads"] is True
    fitted = fit(source, weights, {"faithful_pads": False})
    assert fitted.options["faithful_pads"] is False
    assert "faithful_pads" not in fitted.assumed


def test_two_ways_of_mambamil_are_told_apart_by_the_user_alone() -> None:
    source, published = PUBLISHED["mambamil-bi"]
    weights = random_weights(published.shapes)
    bags = bags_of(published, (13,))
    both = [logits_of(fit(source, weights, {"ways": ways}), bags) for ways in ("bi", "sr")]
    assert not torch.allclose(*both, rtol=1e-3)
