"""CoMEL against a plain transcription of its reconstruction, bag by bag in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.comel import CoMEL, CoMELOptions
from bagscope.mil.aggregators.grouped_attention import GroupedAttention, group_sizes
from bagscope.mil.bags import Bags
from bagscope.mil.targets import TargetSpec
from tests.kernels.packed import normal
from tests.mil.made_bags import DIMENSION, TARGET, made_recipe

LENGTHS, CLASSES = (11, 1, 4, 9, 6), (2.0, 1.0, 0.0, 1.0, float("nan"))
SMALL: dict[str, Any] = {"hidden": 8, "heads": 2, "groups": 4, "attention": 5, "layers": 2}


def model_of(**options: Any) -> CoMEL:
    torch.manual_seed(0)
    return CoMEL(DIMENSION, 3, CoMELOptions.model_validate({**SMALL, **options})).double().train()


def made() -> Bags:
    features = [normal(n, DIMENSION, seed=place).double() for place, n in enumerate(LENGTHS)]
    labels = torch.tensor(CLASSES, dtype=torch.float64)[:, None]
    return Bags.of(features, targets={"label": labels})


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    parts = []
    for one in range(heads):
        width = q.shape[1] // heads
        cut = slice(one * width, (one + 1) * width)
        weights = (q[:, cut] @ k[:, cut].T / width**0.5).softmax(1)
        parts.append(weights @ v[:, cut])
    return torch.cat(parts, 1)


def double_attention(layer: GroupedAttention, x: Tensor) -> Tensor:
    seen = layer.norm(x)
    groups = torch.stack([part.mean(0) for part in torch.tensor_split(seen, min(4, len(x)))])
    told = attention(
        layer.group_query(groups), layer.tile_key(seen), layer.tile_value(seen), layer.heads
    )
    found = attention(
        layer.tile_query(seen), layer.group_key(told), layer.group_value(told), layer.heads
    )
    return x + layer.out(found)


def plain(model: CoMEL, x: Tensor, label: float) -> dict[str, Tensor]:
    h = model.projection(x)
    for layer in model.layers:
        assert isinstance(layer, GroupedAttention)
        h = double_attention(layer, h)
    h = model.norm(h)
    e = model.w(model.v(h).tanh() * model.u(h).sigmoid())[:, 0]
    z = e.softmax(0) @ h
    tiles = model.instance(h)
    like, unlike = z.detach(), ((-e).softmax(0) @ h).detach()
    delta = torch.stack(
        [
            functional.cosine_similarity(row, like, 0)
            - functional.cosine_similarity(row, unlike, 0)
            for row in h.detach()
        ]
    )
    least = model.options.margin * delta.abs().mean()
    losses = []
    for i, row in enumerate(tiles):
        if label == 0 or (label > 0 and delta[i] < -least):
            losses.append(-row.log_softmax(0)[0])
        elif label > 0 and delta[i] > least:
            losses.append(-row.log_softmax(0)[int(label)])
    loss = torch.stack(losses).mean() if losses else torch.zeros((), dtype=x.dtype)
    return {"logits": model.classifier(z), "scores": tiles, "instance": loss, "count": len(losses)}  # type: ignore[dict-item]


@pytest.mark.parametrize("margin", [0.0, 0.8, 1.0])
def test_it_is_what_the_formulas_say(margin: float) -> None:
    model, bags = model_of(margin=margin), made()
    found = model(bags)
    counts = []
    for bag, label in enumerate(CLASSES):
        start, stop = bags.cu_seqlens[bag : bag + 2].tolist()
        wanted = plain(model, bags.features[start:stop], label)
        torch.testing.assert_close(found.logits[bag], wanted["logits"])
        torch.testing.assert_close(found.scores[start:stop], wanted["scores"])
        torch.testing.assert_close(found.losses["instance"][bag], wanted["instance"])
        counts.append(int(wanted["count"]))
    assert counts[2] == 4 and counts[4] == 0, "a negative bag is all negative, an unknown one none"
    assert 0 < counts[0] <= 11 and (margin == 0) == (counts[0] == 11)


def test_groups_are_as_equal_as_they_can_be() -> None:
    sizes = group_sizes(torch.tensor([0, 11, 12, 16], dtype=torch.int32), 4)
    assert sizes.tolist() == [[3, 3, 3, 2], [1, 0, 0, 0], [1, 1, 1, 1]]


def test_pseudo_labels_teach_the_tiles_and_not_the_attention() -> None:
    model, bags = model_of(), made()
    model(bags).losses["instance"].sum().backward()
    assert model.instance.weight.grad is not None and model.projection.weight.grad is not None
    assert model.w.weight.grad is None and model.classifier.weight.grad is None


def test_what_gives_tiles_no_class_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"comel gives its tiles a class.*age \(regression\)"):
        CoMEL.refuse(made_recipe(), [TargetSpec(column="age", task="regression")])
    CoMEL.refuse(made_recipe(), [TARGET])
    with pytest.raises(ConfigError, match="3 heads do not divide"):
        model_of(heads=3)
