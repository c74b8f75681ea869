"""Rollout in linear memory is the product of dense matrices, of weights written down anew."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bagscope.mil.aggregators.ilra_layers import GAB, GatedAttentionBlock
from bagscope.mil.aggregators.region_layers import RegionAttention
from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.aggregators.rrt import RRT
from bagscope.mil.aggregators.set_layers import ISAB, MAB, SAB
from bagscope.mil.aggregators.transmil import Attention, TransMIL
from bagscope.mil.aggregators.vit import ViT
from bagscope.mil.bags import Bags
from bagscope.mil.explain.rollout import tile_rollout
from bagscope.mil.regimes.embedded import Embedded, EmbeddingSpec
from tests.kernels.packed import borders, normal

HEADS, LAYERS = 4, 2
LENGTHS = (23, 1, 12, 3)
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "alibi": {"alibi_um": 300.0},
    "neighbours": {"radius": 1},
    "agent": {"agents": 4},
    "linear": {},
    "lightning": {},
    "flow": {},
    "inline": {},
}


def model_of(mixer: str, **options: Any) -> ViT:
    torch.manual_seed(0)
    small = {"hidden": 16, "layers": LAYERS, "heads": HEADS, "mixer": mixer}
    model = build_aggregator("vit", 12, 2, {**small, **options})
    assert isinstance(model, ViT)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.double().eval()


def bags_of(lengths: tuple[int, ...] = LENGTHS) -> Bags:
    features = [normal(n, 12, seed=n, dtype=torch.float64) for n in lengths]
    grid = torch.cat([torch.stack([torch.arange(n) % 5, torch.arange(n) // 5], 1) for n in lengths])
    plain = Bags.of(features)
    return Bags(
        features=plain.features,
        cu_seqlens=plain.cu_seqlens,
        bag_ids=plain.bag_ids,
        grid=grid.int(),
        coords_l0=grid.int() * 256,
        slide_ids=plain.bag_ids,
        tile_slide=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).int(),
        mpp_l0=torch.full((len(lengths),), 0.5, dtype=torch.float64),
    )


def heads_first(x: Tensor) -> Tensor:
    return x.reshape(len(x), HEADS, -1).transpose(0, 1)


def dense(mixer: Any, name: str, x: Tensor, grid: Tensor, token: bool) -> Tensor:
    """Return the weights (N, N) of one bag, rows adding up to 1, the mean over heads."""
    if name in ("lightning", "flow"):
        layers = (
            (mixer.q_proj, mixer.k_proj)
            if name == "lightning"
            else (mixer.query_projection, mixer.key_projection)
        )
        q, k = (heads_first(layer(x)) for layer in layers)
    else:
        q, k = (heads_first(part) for part in mixer.qkv(x).chunk(3, 1)[:2])
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if name == "alibi":
        apart = torch.cdist(grid.double() * 128, grid.double() * 128) / 300
        if token:
            apart = functional.pad(apart, (1, 0, 1, 0))
        slopes = torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(HEADS)])
        scores = scores - slopes[:, None, None] * apart
    if name == "neighbours":
        steps = (grid[:, None] - grid[None]).abs().amax(-1)
        scores = scores.masked_fill(steps > 1, -torch.inf)
    if name in ("softmax", "alibi", "neighbours"):
        weights = torch.softmax(scores, -1)
    elif name == "linear":
        weights = (functional.elu(q) + 1) @ (functional.elu(k) + 1).mT
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    elif name == "agent":
        groups = [part.mean(1) for part in torch.tensor_split(q, 4, 1) if part.shape[1]]
        means, scale = torch.stack(groups, 1), q.shape[-1] ** -0.5
        weights = torch.softmax(scale * q @ means.mT, -1) @ torch.softmax(scale * means @ k.mT, -1)
    elif name == "lightning":
        weights = (functional.silu(q) @ functional.silu(k).mT) ** 2
        weights = weights / weights.sum(-1, keepdim=True)
    elif name == "inline":
        weights = ((scores + 1 - scores.mean(-1, keepdim=True)) / len(x)) ** 2
        weights = weights / weights.sum(-1, keepdim=True)
    else:
        q, k, eps = torch.sigmoid(q), torch.sigmoid(k), 1e-6
        incoming = ((q + eps) @ (k.sum(1)[..., None] + eps)).squeeze(-1)
        sent = (k + eps) @ ((q / incoming[..., None]).sum(1)[..., None] + eps)
        weights = (q @ k.mT) * torch.softmax(sent.squeeze(-1).clamp(-1, 1), -1)[:, None]
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.mean(0)


def inputs_of(model: ViT, bags: Bags) -> list[Tensor]:
    seen: list[Tensor] = []
    hooks = [
        block.mixer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for block in model.blocks
    ]
    model(bags)
    for hook in hooks:
        hook.remove()
    return seen


def dense_rollout(model: ViT, bags: Bags) -> Tensor:
    """Return rollout of a single bag by matrices of all pairs."""
    pooling, name = model.options.pooling, model.options.mixer
    assert bags.grid is not None
    product: Tensor | None = None
    for block, x in zip(model.blocks, inputs_of(model, bags), strict=True):
        weights = dense(block.mixer, name, x, bags.grid, pooling == "class")
        layer = (weights + torch.eye(len(weights), dtype=weights.dtype)) / 2
        product = layer if product is None else layer @ product
    assert product is not None
    if pooling == "class":
        row = product[0, 1:]
        return row / row.sum()
    scores = model(bags).scores[:, 0] if pooling == "attention" else torch.zeros(len(product))
    return torch.softmax(scores.double(), 0) @ product


@pytest.mark.parametrize(
    ("mixer", "pooling"),
    [
        *((name, "attention") for name in KINDS),
        ("linear", "mean"),
        ("softmax", "class"),
        ("alibi", "class"),
    ],
)
def test_it_is_the_dense_product(mixer: str, pooling: str) -> None:
    model, bags = model_of(mixer, pooling=pooling, **KINDS[mixer]), bags_of()
    found = tile_rollout(model, bags)
    assert found is not None
    for bag, (start, stop) in enumerate(pairwise(bags.cu_seqlens.tolist())):
        with torch.no_grad():
            wanted = dense_rollout(model, bags.one(bag))
        np.testing.assert_allclose(found[start:stop], wanted, rtol=1e-9, atol=1e-12)
        assert found[start:stop].sum() == pytest.approx(1, abs=1e-6)


def set_weights(block: nn.Module, x: Tensor) -> Tensor:
    """Return how tiles (N, ·) of a Set Transformer's block weigh each other, (N, N)."""

    def of(mab: MAB, queries: Tensor, keys: Tensor) -> Tensor:
        q, k = heads_first(mab.fc_q(queries)), heads_first(mab.fc_k(keys))
        return torch.softmax(q @ k.mT / mab.fc_q.out_features**0.5, -1).mean(0)

    if isinstance(block, SAB):
        return of(block.mab, x, x)
    assert isinstance(block, ISAB)
    rows = block.mab0.gather(block.inducing, x, borders((len(x),)))[0]
    return of(block.mab1, x, rows) @ of(block.mab0, block.inducing, x)


def low_rank_weights(block: nn.Module, x: Tensor) -> Tensor:
    """Return how tiles (N, ·) of a block of ILRA weigh each other, (N, N)."""

    def of(attention: GatedAttentionBlock, queries: Tensor, keys: Tensor) -> Tensor:
        inner = nn.MultiheadAttention(attention.inner_out.in_features, attention.heads).double()
        with torch.no_grad():
            inner.in_proj_weight.copy_(attention.inner.weight)
            inner.in_proj_bias.copy_(attention.inner.bias)
        k = attention.key(keys)
        return inner(attention.query(queries), k, k)[1]

    assert isinstance(block, GAB)
    rows = block.forth.gather(block.latent, x, borders((len(x),))).rows[0]
    return of(block.back, x, rows) @ of(block.forth, block.latent, x)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("set_transformer", {"inducing": 5, "blocks": 2}),
        ("set_transformer", {"inducing": 3, "blocks": 3, "seeds": 2, "layer_norm": True}),
        ("set_transformer", {"attention": "full"}),
        ("ilra", {"rank": 1}),
        ("ilra", {"rank": 3, "seeds": 2, "layers": 3}),
    ],
    ids=str,
)
def test_it_is_the_dense_product_through_few_rows(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build_aggregator(name, 12, 2, {"hidden": 16, "heads": HEADS, **options})
    model = model.double().eval()
    layers, weigh = (
        (model.encoder, set_weights)
        if name == "set_transformer"
        else (model.blocks, low_rank_weights)
    )
    assert isinstance(layers, nn.ModuleList)
    bags = bags_of()
    found = tile_rollout(model, bags)
    assert found is not None
    for bag, (start, stop) in enumerate(pairwise(bags.cu_seqlens.tolist())):
        with torch.no_grad():
            one = bags.one(bag)
            wanted = torch.softmax(model(one).scores[:, 0], 0)
            inputs = [one.features]
            for layer in layers:
                inputs.append(layer(inputs[-1], one.cu_seqlens))
            for layer, x in reversed(list(zip(layers, inputs[:-1], strict=True))):
                wanted = (wanted + wanted @ weigh(layer, x)) / 2
        np.testing.assert_allclose(found[start:stop], wanted, rtol=1e-9, atol=1e-12)
        assert found[start:stop].sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"faithful_pads": True}, {"shortcut": True, "layers": 2}, {"representatives": 0}],
    ids=str,
)
def test_it_is_the_dense_product_of_regions(options: dict[str, Any]) -> None:
    """A layer's matrix, from what it makes of tiles whose values are told apart one by one."""
    torch.manual_seed(0)
    small = {"hidden": 16, "heads": HEADS, "cross_heads": 2, "regions": 2, "epeg": 3}
    model = build_aggregator("rrt", 12, 2, {**small, **options}).double().eval()
    assert isinstance(model, RRT)
    bags = bags_of((23, 12))
    found = tile_rollout(model, bags)
    assert found is not None
    for bag, (start, stop) in enumerate(pairwise(bags.cu_seqlens.tolist())):
        with torch.no_grad():
            one = bags.one(bag)
            pooled = torch.softmax(model(one).scores[:, 0], 0)
            wanted = pooled
            for matrix in reversed(region_matrices(model, one)):
                wanted = (wanted + wanted @ matrix) / 2
            if model.options.shortcut:
                wanted = (wanted + pooled) / 2
        np.testing.assert_allclose(found[start:stop], wanted / wanted.sum(), rtol=1e-9, atol=1e-12)


def region_matrices(model: RRT, bags: Bags) -> list[Tensor]:
    """Return how tiles (N, N) of one bag weigh each other in every layer, region by region."""
    regions, found = model._regions(bags), []
    h = model.projection(bags.features)
    of_place = torch.full((len(regions.rows),), -1)
    of_place[regions.places] = torch.arange(len(h))
    inside = [slice(a, b) for a, b in pairwise(regions.borders.tolist()) if b > a]
    for norm, mixer in zip(model.norms, model.mixers, strict=True):
        assert isinstance(mixer, RegionAttention)
        x = norm(h)
        q, k, _ = mixer.qkv(regions.along(x)).chunk(3, 1)
        whole = torch.zeros(len(q), len(q), dtype=q.dtype)
        for own in inside:
            scores = heads_first(q[own]) @ heads_first(k[own]).mT * (16 // HEADS) ** -0.5
            assert mixer.epeg is not None
            # A convolution along the queries, of every head and key by itself.
            kernel = mixer.epeg[:, None, :, None]
            scores = (
                scores + functional.conv2d(scores[None], kernel, padding=(1, 0), groups=HEADS)[0]
            )
            whole[own, own] = scores.softmax(-1).mean(0)
        found.append(whole[regions.places][:, regions.places])
        h = h + mixer(x, regions)
    if model.cross is None or model.cross_norm is None:
        return found
    x = regions.along(model.cross_norm(h))
    logits = x @ model.cross.phi
    take = torch.stack([torch.zeros(len(x), logits.shape[1]).double()] * len(inside))
    give = take.clone()
    for number, own in enumerate(inside):
        mine = logits[own]
        take[number, own] = mine.softmax(0)
        least, most = mine.amin(0), mine.amax(0)
        give[number, own] = mine.softmax(1) * (mine - least) / (most - least + 1e-8)
    rows = torch.einsum("rpn,pc->rnc", take, x)
    q, k, _ = (part.unflatten(-1, (2, -1)) for part in model.cross.qkv(rows).chunk(3, -1))
    between = torch.einsum("rnhd,snhd->nhrs", q, k).mul(8**-0.5).softmax(-1)
    each = torch.einsum("rpn,nhrs,son->hpo", give, between, take)
    each = each[:, regions.places][..., regions.places]
    sums = each.sum(-1, keepdim=True)
    return [*found, torch.where(sums > 0, each / sums, 0.0).mean(0)]


def nystrom_weights(q: Tensor, k: Tensor, landmarks: int) -> Tensor:
    """Return S₁ Z S₃ (N, N) of each head by whole matrices; the softmax of small bags."""
    scale, n = q.shape[-1] ** -0.5, q.shape[1]
    if n <= landmarks:
        return torch.softmax(scale * q @ k.mT, -1)
    length = -(-n // landmarks)
    pads = -n % length
    runs = [functional.pad(x, (0, 0, pads, 0)).unflatten(1, (-1, length)).sum(2) for x in (q, k)]
    counts = functional.pad(torch.ones(n), (pads, 0)).unflatten(0, (-1, length)).sum(1)
    few_q, few_k = (run / counts[:, None] for run in runs)
    few = torch.softmax(scale * few_q @ few_k.mT, -1)
    rows, columns = few.sum(-1).amax(-1), few.sum(-2).amax(-1)
    inverse = few.mT / (rows * columns)[:, None, None]
    one = torch.eye(few.shape[-1], dtype=few.dtype)
    for _ in range(6):
        both = few @ inverse
        inverse = inverse @ (13 * one - both @ (15 * one - both @ (7 * one - both))) / 4
    first, last = (torch.softmax(scale * a @ b.mT, -1) for a, b in ((q, few_k), (few_q, k)))
    return first @ inverse @ last


@pytest.mark.parametrize("attention", ["exact", "nystrom"])
def test_that_of_transmil_is_the_dense_product(attention: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"hidden": 16, "heads": HEADS, "attention": attention}
    if attention == "nystrom":
        options["landmarks"] = 8
    model = build_aggregator("transmil", 12, 2, options).double().eval()
    assert isinstance(model, TransMIL)
    bags = bags_of((23, 1, 6))
    found = tile_rollout(model, bags)
    assert found is not None
    for bag, (start, stop) in enumerate(pairwise(bags.cu_seqlens.tolist())):
        with torch.no_grad():
            one = bags.one(bag)
            h, rows, _ = model._rows(one)
            product = torch.eye(len(h), dtype=h.dtype)
            for place, layer in enumerate(model.layers):
                assert isinstance(layer, Attention)
                q, k, _ = (heads_first(part) for part in layer.qkv(layer.norm(h)).chunk(3, 1))
                few = 8 if attention == "nystrom" else len(h)
                weights = nystrom_weights(q, k, few).mean(0)
                product = (weights + torch.eye(len(h), dtype=h.dtype)) / 2 @ product
                if not place:
                    added, _ = layer(h, rows, h.dtype, with_weights=False)
                    h = model._between(h + added, rows, one)
        tiles = stop - start
        row = product[0, 1:]
        # Repeated tiles stand behind the others.
        whole = row[:tiles].clone()
        whole[: len(row) - tiles] += row[tiles:]
        whole = whole.clamp(min=0)
        np.testing.assert_allclose(found[start:stop], whole / whole.sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mixer", ["softmax", "flow"])
def test_bags_of_an_inference_are_taken_too(mixer: str) -> None:
    model = model_of(mixer)
    outside = tile_rollout(model, bags_of())
    with torch.inference_mode():
        inside = tile_rollout(model, bags_of())
    assert outside is not None and inside is not None
    assert np.array_equal(outside, inside)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"decay": True}, {"reads": "forward"}])
def test_what_can_not_be_told_in_linear_memory_is_not_told(options: dict[str, Any]) -> None:
    assert tile_rollout(model_of("lightning", **options), bags_of()) is None


def test_an_embedding_before_the_aggregator_changes_nothing_about_it() -> None:
    inner = model_of("linear").float()
    model = Embedded(20, 2, EmbeddingSpec(width=12), lambda width, outputs: inner)
    bags = Bags.of([normal(9, 20), normal(4, 20, seed=1)])
    found, wanted = tile_rollout(model, bags), tile_rollout(inner, model.eval().embedded(bags))
    assert found is not None and wanted is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_pooling_alone_has_no_rollout() -> None:
    model = build_aggregator("abmil", 12, 2, {"hidden": 8})
    assert tile_rollout(model, Bags.of([normal(5, 12)])) is None


def test_tiles_that_see_themselves_alone_keep_their_weight() -> None:
    bags, model = bags_of((12,)), model_of("neighbours", radius=0)
    with torch.no_grad():
        own = torch.softmax(model(bags).scores[:, 0], 0)
    found = tile_rollout(model, bags)
    assert found is not None
    np.testing.assert_allclose(found, own, rtol=1e-9)
