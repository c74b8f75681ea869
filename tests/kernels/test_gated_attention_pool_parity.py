"""The pooling inside each method's whole loss, against the numbers of its original implementation.

Compared: raw logits, weights, embeddings, the loss, and the gradients of the features, of the
projection and of the gates.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.kernels.gated_attention_pool import PooledBags, gated_attention_pool
from bagscope.kernels.segment_softmax_pool import attention_weights
from tests.kernels.packed import assert_close_to_float64, borders, vectors


class Names(NamedTuple):
    """What the original calls its layers."""

    projection: str
    v: str
    u: str | None
    w: str
    head: str


CLAM = Names(
    "attention_net.0",
    "attention_net.3.attention_a.0",
    "attention_net.3.attention_b.0",
    "attention_net.3.attention_c",
    "classifiers",
)
ACMIL = Names(
    "dimreduction.fc1",
    "attention.attention_V.0",
    "attention.attention_U.0",
    "attention.attention_weights",
    "Slide_classifier.fc",
)
HIPPO = "attention_weights"
MNIST = "feature_extractor_part2.0"
MHIM = "online_encoder.attention.attention"
ABMIL = {
    "hippo-gated": Names(
        "encoder.0",
        f"{HIPPO}.attention_V.0",
        f"{HIPPO}.attention_U.0",
        f"{HIPPO}.attention_weights",
        "head",
    ),
    "hippo-tanh": Names("encoder.0", f"{HIPPO}.0", None, f"{HIPPO}.2", "head"),
    "millab-gated": Names(
        "patch_embed.0",
        "global_attn.attention_a.0",
        "global_attn.attention_b.0",
        "global_attn.attention_c",
        "classifier",
    ),
    "millab-tanh": Names(
        "patch_embed.0", "global_attn.module.0", None, "global_attn.module.3", "classifier"
    ),
    "mnist-gated": Names(MNIST, "attention_V.0", "attention_U.0", "attention_w", "classifier.0"),
    "mnist-tanh": Names(MNIST, "attention.0", None, "attention.2", "classifier.0"),
    "packmil-tanh-gelu": Names("feature.0", "attention.0", None, "attention.2", "classifier"),
    "mhim-relu-nobias": Names("feature.0", f"{MHIM}.0", None, f"{MHIM}.2", "predictor"),
}


class Recorded:
    """One file's tensors, its parameters as leaves, and our pooling of its bag."""

    def __init__(self, file: str, names: Names) -> None:
        self.tensors, self.meta = vectors(file)
        self.names = names
        self.leaves = {
            key.removeprefix("weights/"): tensor.clone().requires_grad_()
            for key, tensor in self.tensors.items()
            if key.startswith("weights/")
        }
        self.x = self.tensors["input/x"].clone().requires_grad_()
        self.label = self.tensors["input/label"]

    def layer(self, name: str | None) -> tuple[Tensor | None, Tensor | None]:
        if name is None:
            return None, None
        return self.leaves[f"{name}.weight"], self.leaves.get(f"{name}.bias")

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.layer(name)
        assert weight is not None
        return functional.linear(x, weight, bias)

    def pool(self, features: Tensor | None = None, mask: Tensor | None = None) -> PooledBags:
        x = self.x if features is None else features
        config = self.meta["config"]
        (projection, bias), (v, bias_v), (u, bias_u), (w, bias_w) = map(self.layer, self.names[:4])
        assert projection is not None and v is not None and w is not None
        return gated_attention_pool(
            x,
            borders([len(x)]),
            projection=(projection, bias),
            activation=config.get("activation", "relu"),
            gate=config.get("attention_activation", "tanh"),
            weight_v=v,
            bias_v=bias_v,
            weight_u=u,
            bias_u=bias_u,
            weight_w=w,
            bias_w=bias_w,
            mask=mask,
        )

    def weights(self, pooled: PooledBags, mask: Tensor | None = None) -> Tensor:
        found = attention_weights(
            pooled.scores, pooled.lse, borders([len(pooled.scores)]), mask=mask
        )
        return found.T

    def compare(self, loss: Tensor, **outputs: Tensor) -> None:
        """Compare outputs, the loss, and all gradients that pass through the pooling."""
        for name, found in outputs.items():
            wanted = self.tensors.get(f"output/{name}")
            if wanted is not None:
                assert_close_to_float64(found.reshape(wanted.shape), wanted, what=name)
        total = self.tensors["output/loss_total"]
        assert_close_to_float64(loss.reshape(total.shape), total, what="loss")
        loss.sum().backward()
        compared = 0
        for name, leaf in {**self.leaves, "x": self.x}.items():
            if (wanted := self.tensors.get(f"grad/{name}")) is None:
                continue
            assert leaf.grad is not None, name
            assert_close_to_float64(leaf.grad, wanted, atol=1e-6, what=name)
            compared += 1
        assert compared >= 6


@pytest.mark.parametrize("variant", [name for name in ABMIL if not name.startswith("mnist")])
def test_abmil(variant: str) -> None:
    recorded = Recorded(f"abmil_{variant}_A", ABMIL[variant])
    pooled = recorded.pool()
    logits = recorded.linear(pooled.pooled[:, 0], recorded.names.head)
    loss = functional.cross_entropy(logits, recorded.label)
    recorded.compare(
        loss,
        attention_raw=pooled.scores.T,
        attention=recorded.weights(pooled),
        embedding=pooled.pooled,
        logits=logits,
    )


@pytest.mark.parametrize("variant", ["mnist-gated", "mnist-tanh"])
def test_abmil_on_digits(variant: str) -> None:
    recorded = Recorded(f"abmil_{variant}_A", ABMIL[variant])
    pictures = recorded.x
    for layer in ("0", "3"):
        weight, bias = recorded.layer(f"feature_extractor_part1.{layer}")
        assert weight is not None
        pictures = functional.max_pool2d(functional.conv2d(pictures, weight, bias).relu(), 2)
    pooled = recorded.pool(pictures.flatten(1))
    logit = recorded.linear(pooled.pooled[:, 0], recorded.names.head)
    probability = logit.sigmoid().clamp(1e-5, 1 - 1e-5)
    label = recorded.label.float().expand_as(probability)
    loss = functional.binary_cross_entropy(probability, label, reduction="none")
    recorded.compare(loss, attention=recorded.weights(pooled), probability=probability)


@pytest.mark.parametrize("branches", ["sb", "mb"])
def test_clam(branches: str) -> None:
    recorded = Recorded(f"clam-{branches}_plain-ce_A", CLAM)
    pooled = recorded.pool()
    label = int(recorded.label)
    if branches == "sb":
        logits = recorded.linear(pooled.pooled[:, 0], "classifiers")
    else:
        each = [recorded.linear(pooled.pooled[:, c], f"classifiers.{c}") for c in range(2)]
        logits = torch.cat(each, 1)
    attention = recorded.weights(pooled)
    column = attention[label if branches == "mb" else 0]
    # CLAM's instance loss: the label's strongest eight tiles against its weakest eight.
    chosen = torch.cat((column.topk(8).indices, (-column).topk(8).indices))
    h = recorded.linear(recorded.x[chosen], "attention_net.0").relu()
    instances = recorded.linear(h, f"instance_classifiers.{label}")
    targets = torch.tensor([1] * 8 + [0] * 8)
    loss = 0.7 * functional.cross_entropy(logits, recorded.label)
    loss = loss + 0.3 * functional.cross_entropy(instances, targets)
    recorded.compare(
        loss,
        attention_raw=pooled.scores.T,
        attention=attention,
        embedding=pooled.pooled,
        logits=logits,
    )


@pytest.mark.parametrize("variant", ["m1", "m2", "m5", "m3-stkim8p5", "m5-stkim10p6"])
def test_acmil(variant: str) -> None:
    recorded = Recorded(f"acmil-ga_{variant}_A", ACMIL)
    tiles, branches = len(recorded.x), recorded.meta["config"]["n_branches"]
    mask = None
    if (masked := recorded.tensors.get("output/masked_indices")) is not None:
        mask = torch.zeros(branches, tiles, dtype=torch.bool).scatter_(1, masked, True).T
    pooled = recorded.pool(mask=mask)
    attention = recorded.weights(pooled, mask)
    slide = recorded.linear(pooled.pooled.mean(1), recorded.names.head)
    loss = functional.cross_entropy(slide, recorded.label)
    if branches > 1:
        each = [recorded.linear(pooled.pooled[:, m], f"classifier.{m}.fc") for m in range(branches)]
        labels = recorded.label.expand(branches)
        loss = loss + functional.cross_entropy(torch.cat(each), labels)
        unit = functional.normalize(attention, dim=1)
        pairs = torch.triu_indices(branches, branches, offset=1)
        loss = loss + (unit @ unit.T)[pairs[0], pairs[1]].mean()
    recorded.compare(loss, attention_mean=attention.mean(0), slide_logits=slide)
    if mask is None:
        assert_close_to_float64(attention, recorded.tensors["output/attention"])
    else:
        assert (attention[mask.T] == 0).all()


def test_aem() -> None:
    recorded = Recorded("aem_abmil-lambda01_A", ACMIL._replace(head="classifier.fc"))
    pooled = recorded.pool()
    logits = recorded.linear(pooled.pooled[:, 0], recorded.names.head)
    loss = functional.cross_entropy(logits, recorded.label) - 0.1 * pooled.entropy.sum()
    recorded.compare(
        loss,
        attention_raw=pooled.scores.T,
        attention=recorded.weights(pooled),
        loss_entropy=-pooled.entropy,
        logits=logits,
    )
