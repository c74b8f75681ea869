"""Finer tiles have the score that they would have in the slide's own bag, for any aggregator."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy import special, stats

from bagscope.errors import ArtifactError, ConfigError
from bagscope.heatmaps.choices import ScaleName
from bagscope.heatmaps.fine import FineScores, fine_scores, on_the_slide_s_scale
from bagscope.heatmaps.scores import Column, on_scale
from bagscope.mil.aggregators.registry import Aggregator
from bagscope.mil.bags import BagOutput, Bags
from bagscope.mil.cases import Case
from bagscope.mil.member import Member
from bagscope.mil.prediction import Answer, Panel
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.sources import ArraySource, CaseBag
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.trainer import Trainer
from tests.mil.made_bags import DIMENSION, TARGET, made_recipe, made_source

RNG = np.random.default_rng(3)
BAG = RNG.normal(size=(30, DIMENSION)).astype(np.float32)
FINER = RNG.normal(size=(9, DIMENSION)).astype(np.float32)
SMALL: dict[str, dict[str, object]] = {
    "abmil": {"name": "abmil", "options": {"hidden": 8, "attention": 4}},
    "acmil": {"name": "acmil", "options": {"hidden": 8, "attention_width": 4}},
    "clam_mb": {"name": "clam_mb", "options": {"hidden": 8, "attention": 4}},
    "mean": {"name": "mean", "options": {"hidden": 8}},
    "max": {"name": "max", "options": {"hidden": 8}},
}


@lru_cache
def members_of(name: str, count: int = 2) -> tuple[Member, ...]:
    """Return members that have hardly learnt anything, each something else."""
    found = []
    for seed in range(count):
        values = made_recipe(training={"epochs": 1}).model_dump() | {"aggregator": SMALL[name]}
        recipe = TrainSpec.model_validate(values)
        trained = Trainer(recipe, [TARGET], made_source(12), None, seed=seed).run()
        found.append(finish(trained, recipe, None, seed=seed, fields={}))
    return tuple(found)


def source_of(features: np.ndarray) -> ArraySource:
    return ArraySource([features], [Case(case_id="c", patient_id="c", slide_ids=("c",))])


def asked(members: Sequence[Member], features: np.ndarray) -> Answer:
    return Panel(members).ask(source_of(features))


def bag_of(features: np.ndarray) -> CaseBag:
    return source_of(features).read(0)


def finer(name: str, features: np.ndarray, *, wants_contributions: bool = False) -> FineScores:
    members = members_of(name)
    known = asked(members, BAG).scores
    return fine_scores(
        members, bag_of(BAG), bag_of(features), known, wants_contributions=wants_contributions
    )


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_finer_tile_that_is_a_stored_one_has_its_score(name: str) -> None:
    answer = asked(members_of(name), BAG)
    found = finer(name, BAG[[4, 0, 29]])
    assert found.kind == answer.score_kind
    np.testing.assert_allclose(found.scores, answer.scores[[4, 0, 29]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["abmil", "clam_mb"])
def test_the_weight_is_against_the_bag_s_own_normaliser(name: str) -> None:
    """Added to the bag alone, x weighs a = w / (Z + w); so w / Z = a / (1 - a)."""
    members = members_of(name)
    each = []
    for member in members:
        rows = []
        for tile in FINER:
            log_a = asked([member], np.concatenate([BAG, tile[None]])).scores[-1].astype(float)
            rows.append(log_a - np.log1p(-np.exp(log_a)))
        each.append(np.stack(rows))
    expected = special.logsumexp(np.stack(each), axis=0) - np.log(len(members))
    np.testing.assert_allclose(finer(name, FINER).scores, expected, atol=2e-5)


def test_of_branches_each_is_normalised_by_its_own_bag() -> None:
    """ACMIL states the mean weight of its branches; so does this, written out in float64."""
    each = []
    for member in members_of("acmil"):
        model = member.model().double()
        bags = [Bags.of([torch.from_numpy(part).double()]) for part in (BAG, FINER)]
        with torch.inference_mode():
            terms = [model.pooling_terms(bag) for bag in bags]
        stored, fine = (one.scores.numpy() for one in terms if one is not None)
        assert stored.shape[1] == 5
        each.append((np.exp(fine) / np.exp(stored).sum(axis=0)).mean(axis=1))
    expected = np.mean(each, axis=0)
    np.testing.assert_allclose(np.exp(finer("acmil", FINER).scores[:, 0]), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["abmil", "acmil", "max"])
def test_finer_tiles_do_not_change_each_other_s_scores(name: str) -> None:
    together = finer(name, FINER).scores
    alone = np.concatenate([finer(name, tile[None]).scores for tile in FINER])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_every_scale_says_the_same_of_the_same_tile() -> None:
    for name, task in (("abmil", "classes"), ("max", "classes")):
        answer = asked(members_of(name), BAG)
        same, column = finer(name, BAG), Column(name="", index=answer.scores.shape[1] - 1)
        scales: tuple[ScaleName, ...] = ("logit", "percentile")
        for scale in (*scales, "ratio") if name == "abmil" else scales:
            own = on_scale(answer.scores, answer.score_kind, scale, column, task=task)
            values = on_the_slide_s_scale(
                same, scale, column, slide=answer.scores, bag=answer.scores, task=task
            )
            np.testing.assert_allclose(values, own, rtol=1e-4, atol=1e-5)


def test_a_percentile_is_among_the_stored_tiles() -> None:
    scores = RNG.normal(size=(50, 1))
    found = FineScores(kind="logit", scores=RNG.normal(size=(20, 1)), contributions=None)
    values = on_the_slide_s_scale(
        found, "percentile", Column(name="", index=0), slide=scores, bag=scores
    )
    expected = [stats.percentileofscore(scores[:, 0], one, "mean") for one in found.scores[:, 0]]
    np.testing.assert_allclose(values, expected)


@pytest.mark.parametrize("name", ["abmil", "acmil", "clam_mb", "mean"])
def test_contributions_are_those_of_the_stored_bag(name: str) -> None:
    answer = asked(members_of(name), BAG)
    assert answer.contributions is not None
    found = finer(name, BAG[5:9], wants_contributions=True)
    assert found.contributions is not None
    np.testing.assert_allclose(found.contributions, answer.contributions[5:9], atol=1e-6)
    values = on_the_slide_s_scale(
        found, "contribution", Column(name="yes", index=1), slide=answer.scores, bag=answer.scores
    )
    np.testing.assert_allclose(values, answer.contributions[5:9, 1], atol=1e-6)


def test_a_model_whose_logits_are_no_sum_has_no_contribution() -> None:
    with pytest.raises(ConfigError, match=r"--scale contribution: .* no sum of what tiles add"):
        finer("max", FINER, wants_contributions=True)


class Mixing(Aggregator):
    """Scores a tile by what is beside it."""

    def __init__(self, inner: Aggregator) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, bags: Bags) -> BagOutput:
        output = self.inner(bags)
        return dataclasses.replace(output, scores=output.scores * (1 + bags.features.mean()) * 3)


def test_scores_that_depend_on_neighbours_have_no_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    members = members_of("abmil")
    plain = Member.model
    monkeypatch.setattr(Member, "model", lambda self, device="cpu": Mixing(plain(self, device)))
    known = asked(members, BAG).scores
    # By itself it is as it was stored.
    fine_scores(members, bag_of(BAG), bag_of(BAG), known)
    with pytest.raises(ArtifactError, match="depends on the tiles beside it"):
        fine_scores(members, bag_of(BAG), bag_of(FINER + 2), known)


def test_scores_of_other_features_are_refused() -> None:
    members = members_of("abmil")
    known = asked(members, BAG[::-1].copy() * 2).scores
    with pytest.raises(ArtifactError, match="stored scores are not of these features"):
        fine_scores(members, bag_of(BAG), bag_of(FINER), known)
    with pytest.raises(ArtifactError, match="in place of"):
        fine_scores(members, bag_of(BAG), bag_of(FINER), known[:5])
