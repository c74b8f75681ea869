"""MambaMIL: its orders of the tiles, its Mamba-2 core, its first steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn import functional

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.mamba import Mixer, reordered, reversed_rows, strided
from bagscope.mil.aggregators.registry import Aggregator, build_aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.recipe import OptimiserSpec
from bagscope.mil.training.optimisation import build_optimiser
from tests.kernels.packed import assert_close_to_float64, normal, vectors

SMALL: dict[str, Any] = {"hidden": 16, "attention": 8, "layers": 1}


def model_of(**options: Any) -> Aggregator:
    torch.manual_seed(0)
    return build_aggregator("mambamil", 12, 2, {**SMALL, **options}).eval()


def test_the_interleave_is_the_original_s() -> None:
    tensors, meta = vectors("sr-reorder_table_A")
    for tiles, rate in meta["config"]["pairs"]:
        way = strided(torch.tensor([0, tiles], dtype=torch.int32), rate)
        wanted = tensors[f"output/order_n{tiles}_r{rate}"]
        assert torch.equal(torch.where(way.rows == tiles, -1, way.rows), wanted)
        assert torch.equal(way.rows[way.places], torch.arange(tiles))


def test_every_bag_is_interleaved_by_itself() -> None:
    borders = torch.tensor([0, 13, 13, 14, 51], dtype=torch.int32)
    way = strided(borders, 5)
    assert way.borders.tolist() == [0, 15, 15, 20, 60]
    for start, stop, first, last in [(0, 13, 0, 15), (13, 14, 15, 20), (14, 51, 20, 60)]:
        alone = strided(torch.tensor([0, stop - start], dtype=torch.int32), 5)
        own = torch.where(alone.rows == stop - start, 51, alone.rows + start)
        assert torch.equal(way.rows[first:last], own)
    x = normal(51, 3)
    assert torch.equal(way.along(x)[way.places], x)
    assert not way.along(x)[way.rows == 51].any()


def test_backwards_is_within_each_bag() -> None:
    borders = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    assert reversed_rows(borders, 7).tolist() == [2, 1, 0, 6, 5, 4, 3]
    way = reordered(torch.tensor([2, 0, 1]), torch.tensor([0, 3]))
    assert way.places.tolist() == [1, 2, 0]


def test_the_mamba_2_block_is_the_original_s() -> None:
    tensors, meta = vectors("mamba2-block_simple_A")
    config = meta["config"]
    mixer = Mixer(
        config["d_model"],
        ways="plain",
        core="mamba2",
        states=config["d_state"],
        expand=config["expand"],
        head=config["headdim"],
    )
    names = {name: f"cores.0.{name}" for name in ("A_log", "D", "dt_bias")}
    names |= {f"conv1d.{kind}": f"cores.0.conv1d.{kind}" for kind in ("weight", "bias")}
    names |= {"norm.weight": "cores.0.norm"}
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k[:8] == "weights/"}
    mixer.load_state_dict({names.get(name, name): value for name, value in weights.items()})
    x = tensors["input/x"].clone().requires_grad_()
    out = mixer(x, torch.tensor([0, len(x)], dtype=torch.int32), None)
    assert_close_to_float64(out, tensors["output/out"], rtol=1e-5, atol=1e-6, what="out")
    (out * tensors["input/cotangent"]).sum().backward()
    assert x.grad is not None
    assert_close_to_float64(x.grad, tensors["grad/x"], rtol=1e-5, atol=1e-6, what="x")
    for name in weights:
        grad = mixer.get_parameter(names.get(name, name)).grad
        assert grad is not None
        assert_close_to_float64(grad, tensors[f"grad/{name}"], rtol=1e-5, atol=1e-6, what=name)


def test_first_steps_are_small_unless_the_published_start_is_asked_for() -> None:
    def steps(**options: Any) -> torch.Tensor:
        biases = [
            value
            for name, value in model_of(**options).named_parameters()
            if "dt_proj.bias" in name
        ]
        return functional.softplus(torch.cat(biases))

    assert steps().min() >= 1e-3 * (1 - 1e-5)
    assert steps().max() <= 1e-1 * (1 + 1e-5)
    torch.testing.assert_close(steps(faithful_init=True), torch.full((64,), 2.0).log())


@pytest.mark.parametrize(
    "options",
    [
        {"order": "raster"},
        {"order": "hilbert", "ways": "cross"},
        {"order": "raster", "ways": "cross"},
    ],
    ids=json.dumps,
)
def test_read_by_their_places_it_does_not_matter_how_tiles_are_stored(
    options: dict[str, Any],
) -> None:
    model = model_of(**options)
    features = [normal(17, 12, seed=1), normal(9, 12, seed=2)]
    places = [torch.randperm(60)[:count] for count in (17, 9)]
    grid = [torch.stack([place % 10 + 30, place // 10], 1).int() for place in places]
    orders = [torch.randperm(17), torch.randperm(9)]
    one = model(Bags.of(features, grid=grid))
    other = model(
        Bags.of(
            [x[order] for x, order in zip(features, orders, strict=True)],
            grid=[place[order] for place, order in zip(grid, orders, strict=True)],
        )
    )
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-6)
    moved = torch.cat([one.scores[:17][orders[0]], one.scores[17:][orders[1]]])
    torch.testing.assert_close(moved, other.scores, rtol=1e-5, atol=1e-6)


def test_the_second_way_of_cross_runs_down_the_columns() -> None:
    model = model_of(order="raster", ways="cross")
    seen: list[torch.Tensor] = []
    model.mixers[0].cores[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    seen_first: list[torch.Tensor] = []
    model.mixers[0].cores[0].register_forward_pre_hook(lambda _, given: seen_first.append(given[0]))
    grid = torch.tensor([[0, 0], [1, 0], [2, 0], [0, 1], [2, 1]])
    model(Bags.of([normal(5, 12)], grid=[grid]))
    # By columns: (0, 0), (0, 1), (1, 0), (2, 0), (2, 1).
    assert torch.equal(seen[0], seen_first[0][[0, 3, 1, 2, 4]])


@pytest.mark.parametrize("options", [{"order": "hilbert"}, {"ways": "cross"}])
def test_tiles_without_places_can_not_be_read_by_them(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="those of slide have none; give features with"):
        model_of(**options)(Bags.of([normal(5, 12)], bag_ids=["slide"]))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ways": "bi", "rate": 3}, "rate is of ways sr, and ways is bi"),
        ({"head": 8}, "head is of core mamba2, and core is mamba"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        model_of(**options)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="is 32, which heads of 5 do not divide"):
        model_of(core="mamba2", head=5)


def test_rates_and_skips_do_not_decay() -> None:
    model = model_of(ways="bi")
    optimiser = build_optimiser(model, OptimiserSpec(weight_decay=0.1))
    decays = {
        id(weight): group["weight_decay"]
        for group in optimiser.param_groups
        for weight in group["params"]
    }
    steady = {name for name, weight in model.named_parameters() if not decays[id(weight)]}
    assert steady == {f"mixers.0.cores.{core}.{name}" for core in (0, 1) for name in ("A_log", "D")}
    assert len(decays) == len(list(model.parameters()))
