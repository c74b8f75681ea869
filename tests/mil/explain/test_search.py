"""The greedy search is HIPPO's, and that of whoever asks the model anew for every tile."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.bags import Bags
from bagscope.mil.explain.effects import Subject
from bagscope.mil.explain.pools import PackedPool, Pool, pool_of
from bagscope.mil.explain.question import class_question
from bagscope.mil.explain.search import Optimiser, greedy_search, search_table
from bagscope.mil.originals import from_original
from tests.kernels.packed import vectors
from tests.mil.explain.made_models import CLOSED, GENERIC, QUESTION, asked, bags, model

OPTIMISERS: tuple[Optimiser, ...] = ("minimise", "maximise", "smallest_difference")


def recorded_pool(*, closed: bool) -> tuple[Pool, dict[str, torch.Tensor], int]:
    tensors, meta = vectors("hippo_greedy_A")
    config = meta["config"]
    weights = {
        name.removeprefix("weights/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights/")
    }
    options = {"hidden": config["hidden"], "attention": config["attention_hidden"], "gated": True}
    aggregator = build_aggregator("abmil", config["in_features"], config["n_classes"], options)
    aggregator.load_state_dict(from_original("hippo-gated", weights, aggregator.state_dict()))
    aggregator.eval()
    made = Bags.of([tensors["input/x"], tensors["input/constant"]])
    question = class_question(("normal", "tumour"))
    if closed:
        return pool_of(aggregator, made, question), tensors, config["optimised_class"]
    return PackedPool(aggregator, made, question), tensors, config["optimised_class"]


@pytest.mark.parametrize("closed", [True, False])
def test_as_recorded(closed: bool) -> None:
    pool, tensors, column = recorded_pool(closed=closed)
    names = {
        "minimize": "minimise",
        "maximize": "maximise",
        "smallest_difference": "smallest_difference",
    }
    for theirs, ours in names.items():
        found = greedy_search(pool, np.arange(14), column=column, optimiser=ours)  # type: ignore[arg-type]
        assert found.order.tolist() == tensors[f"output/{theirs}_order"].tolist()
        wanted = tensors[f"output/{theirs}_probabilities"].numpy()
        np.testing.assert_allclose(found.answers, wanted, atol=1e-6)
    single = pool.without_each(np.arange(14))
    np.testing.assert_allclose(
        single, tensors["output/single_removal_probabilities"].numpy(), atol=1e-6
    )


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize(("theirs", "ours"), [("fixed", "kept"), ("faithful", "baseline_only")])
def test_constant_tiles_as_recorded(closed: bool, theirs: str, ours: str) -> None:
    pool, tensors, column = recorded_pool(closed=closed)
    found = greedy_search(
        pool,
        np.arange(14),
        column=column,
        rounds=6,
        constant=np.arange(14, 19),
        constants=ours,  # type: ignore[arg-type]
    )
    assert found.order.tolist() == tensors[f"output/constant_{theirs}_order"].tolist()
    wanted = tensors[f"output/constant_{theirs}_probabilities"].numpy()
    np.testing.assert_allclose(found.answers, wanted, atol=1e-6)
    assert found.tiles == 19


def brute_force(
    kind: str, made: Bags, optimiser: Optimiser
) -> tuple[list[int], NDArray[np.float64]]:
    aggregator = model(kind)
    remaining = list(range(len(made.features)))
    answers, order = [asked(aggregator, made, [np.array(remaining)])[0]], []
    while len(remaining) > 1:
        found = asked(
            aggregator, made, [np.array([r for r in remaining if r != out]) for out in remaining]
        )
        costs = {
            "minimise": found[:, 1],
            "maximise": -found[:, 1],
            "smallest_difference": abs(found[:, 1] - answers[-1][1]),
        }[optimiser]
        place = int(costs.argmin())
        order.append(remaining.pop(place))
        answers.append(found[place])
    return order, np.stack(answers)


@pytest.mark.parametrize(
    ("kind", "optimiser", "tiles"),
    [
        *((kind, optimiser, 8) for kind in CLOSED for optimiser in OPTIMISERS),
        *((kind, "minimise", 5) for kind in GENERIC),
    ],
)
def test_as_brute_force(kind: str, optimiser: Optimiser, tiles: int) -> None:
    made = bags(tiles, seed=3)
    # In float64 throughout, so that rounding decides nothing.
    precise = replace(made, features=made.features.double())
    pool = pool_of(model(kind).double(), precise, QUESTION)
    found = greedy_search(pool, np.arange(tiles), column=1, optimiser=optimiser)
    order, answers = brute_force(kind, made, optimiser)
    np.testing.assert_allclose(found.answers, answers, atol=1e-12)
    if kind != "max":  # of which most tiles change nothing at all
        assert found.order.tolist() == order


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_of_equals_the_first_is_taken(optimiser: Optimiser) -> None:
    pair = bags(2).features
    made = Bags.of([pair[[0, 1, 0, 1, 1, 0, 1]]])
    pool = pool_of(model("gated"), made, QUESTION)
    order = greedy_search(pool, np.arange(7), column=0, optimiser=optimiser).order.tolist()
    for kind in ([0, 2, 5], [1, 3, 4, 6]):
        taken = [row for row in order if row in kind]
        assert taken == sorted(taken)


def test_rounds_have_their_range() -> None:
    pool = pool_of(model("abmil"), bags(5, 2), QUESTION)
    rows = np.arange(5)
    none = greedy_search(pool, rows, column=0, rounds=0)
    assert len(none.order) == 0 and len(none.answers) == 1
    constant = greedy_search(pool, rows, column=0, rounds=5, constant=np.array([5, 6]))
    np.testing.assert_allclose(constant.answers[-1], pool.answers([np.array([5, 6])])[0])
    with pytest.raises(ValueError, match="rounds is 5; of 5 tiles 0 to 4 can be taken out"):
        greedy_search(pool, rows, column=0, rounds=5)
    with pytest.raises(ValueError, match="optimiser is 'least'"):
        greedy_search(pool, rows, column=0, optimiser="least")  # type: ignore[arg-type]


def test_table() -> None:
    made = replace(bags(4), coords_l0=torch.arange(8, dtype=torch.int32).view(4, 2))
    subject = Subject(bags=made, pool=pool_of(model("abmil"), made, QUESTION))
    found = greedy_search(subject.pool, subject.rows, column=2)
    table = search_table(subject, found)
    assert {len(values) for values in table.values()} == {4}
    assert table["removed_share"] == [0, 0.25, 0.5, 0.75]
    assert table["x_l0"] == ["", *(2 * found.order).tolist()]
    assert table["c"] == found.answers[:, 2].tolist()
