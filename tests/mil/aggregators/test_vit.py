"""The slide transformer: what its poolings say of tiles, what places mean, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.aggregators.vit import ViT
from bagscope.mil.bags import Bags
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.training.trainer import Trainer
from tests.kernels.packed import normal
from tests.mil.aggregators.test_mixers import bags_of
from tests.mil.made_bags import TARGET, made_source

SMALL: dict[str, Any] = {"hidden": 16, "layers": 2, "heads": 4}


def model_of(**options: Any) -> ViT:
    torch.manual_seed(0)
    model = build_aggregator("vit", 16, 2, {**SMALL, **options})
    assert isinstance(model, ViT)
    return model.double().eval()


def shuffled(bags: Bags, seed: int = 0) -> tuple[Bags, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [a + torch.randperm(b - a, generator=random) for a, b in pairwise(bags.cu_seqlens.tolist())]
    )
    assert bags.grid is not None and bags.coords_l0 is not None and bags.tile_slide is not None
    moved = replace(
        bags,
        features=bags.features[order],
        grid=bags.grid[order],
        coords_l0=bags.coords_l0[order],
        tile_slide=bags.tile_slide[order],
    )
    return moved, order


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "mean"},
        {"pooling": "class"},
        {"mixer": "alibi"},
        {"mixer": "neighbours"},
        {"mixer": "agent", "agents": 4, "window": 3},
        {"mixer": "linear"},
        {"mixer": "lightning"},
        {"mixer": "flow"},
        {"mixer": "inline", "local": True},
    ],
    ids=str,
)
def test_it_does_not_matter_how_tiles_are_stored(options: dict[str, Any]) -> None:
    model, bags = model_of(**options), bags_of()
    moved, order = shuffled(bags)
    one, other = model(bags), model(moved)
    torch.testing.assert_close(one.logits, other.logits)
    torch.testing.assert_close(one.scores[order], other.scores)


def test_agents_of_runs_and_reading_forward_go_by_the_stored_order() -> None:
    for options in ({"mixer": "agent", "agents": 4}, {"mixer": "lightning", "reads": "forward"}):
        model, bags = model_of(**options), bags_of()
        moved, _ = shuffled(bags)
        assert not torch.allclose(model(bags).logits, model(moved).logits, rtol=1e-6)


def test_a_micrometre_is_one_at_every_pixel_size() -> None:
    model = model_of(mixer="alibi", alibi_um=50.0)
    coarse, fine = bags_of(mpp=0.5), bags_of(mpp=0.25)
    torch.testing.assert_close(model(coarse).logits, model(fine).logits)
    assert coarse.mpp_l0 is not None
    farther = replace(coarse, mpp_l0=2 * coarse.mpp_l0)
    assert not torch.allclose(model(coarse).logits, model(farther).logits, rtol=1e-4)


def test_the_class_token_s_row_of_attention_is_the_tiles_score() -> None:
    model, bags = model_of(pooling="class", mixer="alibi"), bags_of((11, 4))
    seen: list[torch.Tensor] = []
    mixer: Any = model.blocks[-1].mixer
    mixer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    weights = model(bags).scores[:, 0]
    for first, (a, b) in zip((0, 12), pairwise(bags.cu_seqlens.tolist()), strict=True):
        x = seen[0][first : first + 1 + b - a]
        q, k, _ = (part.reshape(len(x), 4, -1) for part in mixer.qkv(x).chunk(3, 1))
        row = torch.softmax(torch.einsum("hd,jhd->jh", q[0], k) / 2, 0).mean(1)
        torch.testing.assert_close(weights[a:b].softmax(0), row[1:] / row[1:].sum())


def test_of_mean_pooling_a_tile_s_score_is_its_own_logits() -> None:
    model, bags = model_of(pooling="mean"), bags_of()
    found = model(bags)
    assert found.score_kind == "instance_logit"
    for bag, (a, b) in enumerate(pairwise(bags.cu_seqlens.tolist())):
        torch.testing.assert_close(found.scores[a:b].mean(0), found.logits[bag])


def test_the_layers_are_pre_norm() -> None:
    model, bags = model_of(layers=1, heads=1), bags_of((9,))
    block: Any = model.blocks[0]
    projection = model.projection
    h = functional.gelu(functional.linear(bags.features, projection.weight, projection.bias))
    x = functional.layer_norm(h, (16,), block.norm.weight, block.norm.bias)
    q, k, v = block.mixer.qkv(x).chunk(3, 1)
    h = h + block.mixer.proj(torch.softmax(q @ k.T / 4, -1) @ v)
    x = functional.layer_norm(h, (16,), block.mlp_norm.weight, block.mlp_norm.bias)
    h = h + block.down(functional.gelu(block.up(x)))
    h = functional.layer_norm(h, (16,), model.norm.weight, model.norm.bias)
    scores = model.w(torch.tanh(model.v(h)))
    z = (torch.softmax(scores, 0) * h).sum(0)
    found = model(bags)
    torch.testing.assert_close(found.scores, scores)
    torch.testing.assert_close(found.logits[0], model.classifier(z))


def test_dropout_of_a_layer_is_drawn_anew_in_every_layer_and_step() -> None:
    model = model_of(layer_dropout=0.5).float().train()
    bags = replace(bags_of(), features=normal(30, 16))
    first = model(bags).logits
    assert torch.equal(first, model(bags).logits)
    assert not torch.equal(first, model(replace(bags, step=1)).logits)
    block: Any = model.blocks[0]
    ones = torch.ones(30, 16)
    assert not torch.equal(block._dropped(ones, 1), block._dropped(ones, 2))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"mixer": "alibi"}, r"in micrometres, and of c000, .* \(12 of 12 .* are no coordinates"),
        ({"mixer": "neighbours"}, r"places on the lattice, and of c000, .* \(12 of 12 .* are none"),
        ({"mixer": "inline", "local": True}, "there are none"),
        ({"mixer": "agent", "agents": 4, "window": 3}, "there are none"),
    ],
)
def test_training_without_the_places_is_refused_before_it_starts(
    options: dict[str, Any], what: str
) -> None:
    aggregator = {"name": "vit", "options": {**SMALL, **options}}
    recipe = TrainSpec.model_validate({"aggregator": aggregator})
    with pytest.raises(ConfigError, match=what):
        Trainer(recipe, [TARGET], made_source(12), None, seed=0)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"radius": 2}, "radius is no option of mixer softmax; leave it out"),
        ({"mixer": "flow", "decay": True}, "decay is no option of mixer flow"),
        ({"mixer": "linear", "pooling": "class"}, "mixer linear does not tell; choose pooling"),
        ({"mixer": "nystrom"}, "mixer is 'nystrom'"),
        (
            {"pooling": "mean", "attention": 8},
            "attention is of pooling attention, and pooling is mean",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        model_of(**options)
