"""Our aggregators with the originals' weights give the originals' outputs, losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.mil.aggregators import acmil
from bagscope.mil.aggregators.instance_loss import chosen_tiles, smooth_svm
from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.bags import BagOutput
from bagscope.mil.originals import from_original
from tests.kernels.packed import assert_close_to_float64, vectors
from tests.mil.parity.recorded import RELATIVE, Recorded

ABMIL: dict[str, Any] = {"hidden": "=hidden", "attention": "=attention_hidden", "dropout": 0.0}
VARIANTS = {
    "hippo-gated": ("hippo-gated", {"gated": True}),
    "hippo-tanh": ("hippo-tanh", {}),
    "millab-gated": ("millab-gated", {"gated": True}),
    "millab-tanh": ("millab-tanh", {}),
    "packmil-tanh-gelu": ("packmil-abmil", {"activation": "gelu"}),
    "mhim-relu-nobias": (
        "mhim-abmil",
        {"activation": "gelu", "gate": "relu", "attention_bias": False},
    ),
}


def attention(output: BagOutput) -> Tensor:
    """Return the weights of a single bag: (K, T)."""
    return output.scores.softmax(0).T


@pytest.mark.parametrize("variant", VARIANTS)
def test_abmil(variant: str) -> None:
    source, options = VARIANTS[variant]
    recorded = Recorded(f"abmil_{variant}_A", source, {**ABMIL, **options})
    output = recorded.output()
    recorded.compare(logits=output.logits, attention=attention(output))
    if "output/embedding" in recorded.tensors:
        recorded.compare(attention_raw=output.scores.T, embedding=output.embedding)
    recorded.compare_gradients(functional.cross_entropy(output.logits, recorded.label))


@pytest.mark.parametrize("variant", ["mnist-gated", "mnist-tanh"])
def test_abmil_on_digits_behind_their_convolutions(variant: str) -> None:
    tensors, _ = vectors(f"abmil_{variant}_A")
    pictures = tensors["input/x"]
    for layer in ("0", "3"):
        name = f"weights/feature_extractor_part1.{layer}"
        pictures = functional.conv2d(pictures, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        pictures = functional.max_pool2d(pictures.relu(), 2)
    options = {**ABMIL, "gated": variant == "mnist-gated"}
    recorded = Recorded(f"abmil_{variant}_A", variant, options, features=pictures.flatten(1))
    output = recorded.output()
    probability = output.logits.sigmoid().clamp(1e-5, 1 - 1e-5)
    loss = functional.binary_cross_entropy(
        probability, recorded.label.expand_as(probability), reduction="none"
    )
    recorded.compare(attention=attention(output), probability=probability)
    recorded.compare_gradients(loss)


def test_aem_is_the_entropy_of_abmil() -> None:
    recorded = Recorded(
        "aem_abmil-lambda01_A", "aem-abmil", {**ABMIL, "gated": True, "projection_bias": False}
    )
    output = recorded.output()
    assert output.entropy is not None
    term = -output.entropy.sum()
    bag = functional.cross_entropy(output.logits, recorded.label)
    recorded.compare(
        logits=output.logits,
        attention_raw=output.scores.T,
        attention=attention(output),
        loss_bag=bag,
        loss_entropy=term,
    )
    recorded.compare_gradients(bag + recorded.config["lambda_"] * term)


@pytest.mark.parametrize("loss", ["ce", "svm"])
@pytest.mark.parametrize("variant", ["plain", "subtyping"])
@pytest.mark.parametrize("branches", ["sb", "mb"])
def test_clam(branches: str, variant: str, loss: str) -> None:
    recorded = Recorded(
        f"clam-{branches}_{variant}-{loss}_A",
        f"clam-{branches}",
        {
            **ABMIL,
            "k": "=k_sample",
            "subtyping": "=subtyping",
            "instance_loss": "=instance_loss",
        },
    )
    output = recorded.output()
    rows, is_there = chosen_tiles(output.scores.detach(), recorded.bags().cu_seqlens, 8)
    assert bool(is_there.all())
    assert torch.equal(rows[0, 0].T, recorded.tensors["output/top_indices"])
    assert torch.equal(rows[0, 1].T, recorded.tensors["output/bottom_indices"])
    bag = functional.cross_entropy(output.logits, recorded.label)
    instance = output.losses["instance"]
    recorded.compare(
        logits=output.logits,
        attention_raw=output.scores.T,
        attention=attention(output),
        embedding=output.embedding,
        loss_bag=bag,
        loss_instance=instance,
    )
    weight = recorded.config["bag_weight"]
    recorded.compare_gradients(weight * bag + (1 - weight) * instance)


@pytest.mark.parametrize(
    "variant",
    [
        *(f"ga_{name}" for name in ("m1", "m2", "m5", "m3-stkim8p5", "m5-stkim10p6")),
        *(f"mha_{name}" for name in ("m5", "m3-stkim8p5")),
    ],
)
def test_acmil(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = variant[: variant.index("_")]
    options: dict[str, Any] = {
        "hidden": "=hidden",
        "branches": "=n_branches",
        "stkim_k": "=stkim_k",
        "stkim_p": "=stkim_p",
    }
    if kind == "ga":
        options["attention_width"] = "=attention_hidden"
    else:
        options |= {"attention": "multihead", "heads": "=heads", "dropout": 0.0}
    recorded = Recorded(f"acmil-{variant}_A", f"acmil-{kind}", options)
    model, config = recorded.model, recorded.config
    monkeypatch.setattr(acmil, "topk_mask", as_recorded(recorded))
    model.train("stkim" in variant)
    output = model(recorded.bags())

    slide = functional.cross_entropy(output.logits, recorded.label)
    semantic, spread = slide.new_zeros(()), slide.new_zeros(())
    if output.branch_logits is not None:
        each = output.branch_logits[0]
        semantic = functional.cross_entropy(each, recorded.label.expand(len(each)))
        spread = output.losses["diversity"].sum()
        recorded.compare(branch_logits=each)
    assert (output.branch_logits is None) == (config["n_branches"] == 1)
    recorded.compare(
        slide_logits=output.logits,
        loss_slide=slide,
        loss_semantic=semantic,
        loss_diversity=spread,
    )
    wanted = recorded.tensors["output/attention"]
    mean = wanted.reshape(-1, wanted.shape[-1]).mean(0)
    assert_close_to_float64(output.scores[:, 0].softmax(0), mean, rtol=RELATIVE)
    recorded.compare_gradients(slide + semantic + spread)


def as_recorded(recorded: Recorded) -> Any:
    """Return what masks the tiles that the original masked, and checks what it is asked for."""

    def mask(scores: Tensor, cu_seqlens: Tensor, k: int, p: float, **keys: Any) -> Tensor:
        masked = recorded.tensors["output/masked_indices"]
        heads = recorded.config.get("heads", 1)
        if heads > 1:
            masked = masked.transpose(0, 1)
        columns = masked.reshape(-1, masked.shape[-1])
        assert (k, p) == (recorded.config["stkim_k"], recorded.config["stkim_p"])
        assert scores.shape[1] == len(columns) == recorded.config["n_branches"] * heads
        assert masked.shape[-1] == int(k * p)
        assert keys["exactly"]
        # Each masked tile is one of the k highest of its column: the columns are in their order.
        best = scores.topk(k, dim=0).indices.T
        assert all(set(a) <= set(b) for a, b in zip(columns.tolist(), best.tolist(), strict=True))
        return torch.zeros_like(scores, dtype=torch.bool).T.scatter(1, columns, True).T

    return mask


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pooling(kind: str) -> None:
    recorded = Recorded(f"pooling_{kind}_A", f"mambamil-{kind}", {"hidden": "=hidden"})
    recorded.model.eval()
    output = recorded.output()
    recorded.compare(logits=output.logits)
    recorded.compare_gradients(functional.cross_entropy(output.logits, recorded.label))


@pytest.mark.parametrize("classes", [2, 4])
def test_smooth_svm(classes: int) -> None:
    tensors, meta = vectors(f"smooth-svm_top1-c{classes}_A")
    compared = 0
    for tau in meta["config"]["taus"]:
        for alpha in meta["config"]["alphas"]:
            name = f"tau{tau}_alpha{alpha}"
            scores = tensors["input/scores"].clone().requires_grad_()
            loss = smooth_svm(scores, tensors["input/targets"], tau=tau, alpha=alpha).mean()
            loss.backward()
            assert scores.grad is not None
            assert_close_to_float64(loss, tensors[f"output/loss_{name}"], rtol=RELATIVE)
            for key in (key for key in tensors if key.startswith("grad/") and name in key):
                assert_close_to_float64(scores.grad, tensors[key], rtol=RELATIVE, what=key)
                compared += 1
    assert compared == 4


def test_weights_that_do_not_fit_are_refused() -> None:
    model = build_aggregator("clam_sb", 32, 2, {"hidden": 64, "attention": 32})
    tensors, _ = vectors("clam-sb_plain-ce_A")
    weights = {
        name.removeprefix("weights/"): value
        for name, value in tensors.items()
        if name.startswith("weights/")
    }
    ours = model.state_dict()
    with pytest.raises(ConfigError, match=r"no original 'clam_sb' .did you mean 'clam-sb'"):
        from_original("clam_sb", weights, ours)
    with pytest.raises(ConfigError, match=r"strange\.weight has no place in aggregator clam_sb"):
        from_original("clam-sb", {**weights, "strange.weight": torch.zeros(1)}, ours)
    with pytest.raises(ConfigError, match=r"unmatched are attention\.projection\.bias"):
        from_original("clam-sb", without(weights, "attention_net.0.bias"), ours)
    wide = build_aggregator("clam_sb", 32, 2, {"hidden": 64, "attention": 16}).state_dict()
    with pytest.raises(ConfigError, match=r"attention.v.bias is \(32,\), and ours is \(16,"):
        from_original("clam-sb", weights, wide)


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize("init", ["faithful", "fixed"])
@pytest.mark.parametrize("ways", ["plain", "bi", "sr"])
def test_mambamil(ways: str, init: str) -> None:
    options = {
        "hidden": "=hidden",
        "attention": "=attention_hidden",
        "layers": "=layers",
        "rate": "=rate",
        "states": "=d_state",
        "expand": "=expand",
        "ways": ways,
    }
    recorded = Recorded(f"mambamil_{ways}-{init}-init_A", "mambamil", options)
    output = recorded.output()
    recorded.compare(
        logits=output.logits,
        attention=attention(output),
        attention_raw=output.scores.T,
        embedding=output.embedding,
    )
    recorded.compare_gradients(functional.cross_entropy(output.logits, recorded.label))
