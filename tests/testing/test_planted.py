from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from bagscope.mil.cases import Case
from bagscope.mil.inference import outputs
from bagscope.mil.sources import ArraySource
from bagscope.mil.training.trainer import Trainer
from bagscope.pipeline.recipes import load_recipe
from bagscope.testing import PlantedBags, planted_bags
from tests.mil.made_bags import TARGET


def test_what_is_stated_is_there() -> None:
    made = planted_bags(400, dimension=8, tiles=(50, 70), share=0.1, shift=3.0, offset=0.5, seed=1)
    assert len(made) == 400 and made.labels.sum() == 200
    sizes = np.array([len(bag) for bag in made.bags])
    assert sizes.min() == 50 and sizes.max() == 70
    for bag, label, truth in zip(made.bags, made.labels, made.truth, strict=True):
        assert bag.dtype == np.float32 and bag.shape[1] == 8
        assert truth.sum() == (max(1, round(0.1 * len(bag))) if label else 0)
    assert np.linalg.norm(made.direction) == pytest.approx(1)
    # Within a bag, shifted tiles lie `shift` further along the direction and nowhere else.
    apart = np.mean(
        [
            b[t].mean(0) - b[~t].mean(0)
            for b, t in zip(made.bags, made.truth, strict=True)
            if t.any()
        ],
        axis=0,
    )
    np.testing.assert_allclose(apart, 3.0 * made.direction, atol=0.15)
    plain = [bag[~truth] for bag, truth in zip(made.bags, made.truth, strict=True)]
    assert np.mean([bag.std(0).mean() for bag in plain]) == pytest.approx(1, abs=0.02)
    spread = np.stack([bag.mean(0) for bag in plain]).std(0).mean()
    assert spread == pytest.approx(np.hypot(0.5, 1 / np.sqrt(60)), rel=0.05)


def test_the_seed_decides_every_bit_and_parts_keep_their_truth() -> None:
    one, same, other = (planted_bags(6, tiles=(5, 9), seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one.bags, same.bags, strict=True))
    assert not np.array_equal(one.direction, other.direction)
    part = one.chosen([4, 1])
    assert part.labels.tolist() == [0, 1] and part.truth[1] is one.truth[1]
    assert len(one.chosen(slice(2, None))) == 4


@pytest.mark.parametrize(
    "options", [{"share": 0.0}, {"tiles": (5, 4)}, {"count": 0}, {"offset": -1.0}]
)
def test_numbers_out_of_range_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        planted_bags(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("share", "tiles"), [(0.01, (300, 500)), (0.001, (800, 1200))])
def test_means_hide_what_the_oracle_finds(share: float, tiles: tuple[int, int]) -> None:
    made = planted_bags(600, dimension=8, share=share, tiles=tiles, seed=3)
    means = np.stack([bag.mean(axis=0) for bag in made.bags])
    model = LogisticRegression().fit(means[:400], made.labels[:400])
    assert roc_auc_score(made.labels[400:], model.decision_function(means[400:])) < 0.65
    # Knowing the direction does not help the means either, and not more than is said.
    known = roc_auc_score(made.labels, means @ made.direction)
    assert known < 0.65 and known == pytest.approx(made.mean_auroc, abs=0.06)
    assert roc_auc_score(made.labels, made.oracle_scores()) > 0.98
    tile_scores = made.oracle_tile_scores()
    of_tiles = [
        roc_auc_score(truth, own)
        for truth, own in zip(made.truth, tile_scores, strict=True)
        if truth.any()
    ]
    assert np.mean(of_tiles) > 0.99


def source_of(made: PlantedBags, name: str) -> ArraySource:
    names = [f"{name}{place}" for place in range(len(made))]
    return ArraySource(
        made.bags,
        [
            Case(case_id=n, patient_id=n, slide_ids=(n,), targets={"label": (float(label),)})
            for n, label in zip(names, made.labels, strict=True)
        ],
    )


def said_of(
    recipe_name: str, learn: PlantedBags, inner: PlantedBags, held: PlantedBags
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    recipe = load_recipe(
        recipe_name,
        {
            "aggregator": {"options": {"hidden": 32, "attention": 16}},
            "optimiser": {"lr": 3e-3},
            "bags": {"bags_per_step": 4},
            "training": {"epochs": 12},
        },
    )
    found = Trainer(recipe, [TARGET], source_of(learn, "t"), source_of(inner, "v"), seed=0).run()
    margins, tiles = [], []
    for bags, output in outputs(found.model, source_of(held, "x"), recipe.bags):
        margins.append((output.logits[:, 1] - output.logits[:, 0]).double().numpy())
        tiles += np.split(output.scores[:, 0].numpy(), bags.cu_seqlens.tolist()[1:-1])
    return np.concatenate(margins), tiles


@pytest.mark.slow
def test_abmil_finds_one_tile_in_a_hundred() -> None:
    made = planted_bags(300, dimension=16, tiles=(100, 200), seed=5)
    held = made.chosen(slice(200, None))
    assert roc_auc_score(held.labels, held.oracle_scores()) >= 0.99
    margins, tiles = said_of(
        "abmil_gated", made.chosen(slice(0, 160)), made.chosen(slice(160, 200)), held
    )
    assert roc_auc_score(held.labels, margins) >= 0.95
    # And it is those tiles that it looks at.
    of_tiles = [
        roc_auc_score(truth, own)
        for truth, own in zip(held.truth, tiles, strict=True)
        if truth.any()
    ]
    assert np.mean(of_tiles) >= 0.95
