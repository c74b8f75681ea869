"""Whether the tiles that a heatmap shows as hot are those that the prediction rests on.

Deletion takes tiles out from the highest score down, insertion puts them in; the same is done in
random orders. The score is

    ½ · [ mean over shares (p of random deletion − p of deletion)
        + mean over shares (p of insertion − p of random insertion) ]

with p the answer that is explained, as a rule the probability of the predicted class: by how much
further, on average, p moves in the order of the heatmap than in random order. 0 is no better than
chance, 1 the most there can be, below 0 the wrong way round.

The shares lie close together at first and count alike. Weighed by their distance, what happens once
half of the tiles are gone, whatever the heatmap shows, would outweigh the two or three that decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from bagscope.mil.explain.effects import ROUNDING, share_of
from bagscope.mil.explain.pools import Pool, Rows
from bagscope.mil.explain.question import Array

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the tiles, at which curves are read; close together at first, as signals are often small."""
THRESHOLD = 0.1
"""Least score that needs no warning: ten points of probability, on average."""
CHANCE = 0.05
"""Largest share of random orders that may do as well without a warning."""
ORDERS, CLOSED_ORDERS = 20, 99
"""Random orders; more where a closed form makes them cheap, since where few tiles decide, one order
in some dozens happens to begin with them."""
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """Answers along an order of tiles, for one order or several.

    Attributes:
        shares: (points,) of the tiles, taken out or put in.
        answers: (orders, points) of the column that is explained.
    """

    shares: Array
    answers: Array

    @property
    def means(self) -> Array:
        """Return (orders,) the mean of each curve over its shares, the whole bag aside."""
        edited = (self.shares > 0) & (self.shares < 1)
        return np.asarray(self.answers[:, edited].mean(axis=1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Faithfulness:
    """How far a heatmap is one of what drives the prediction.

    Attributes:
        score: see the module; NaN of a bag with a single tile.
        low: lower end of the interval of the score over the random orders that it is held against.
        high: its upper end.
        chance: that a random order does as well: (1 + those that did) / (1 + all).
        movable: most that the answer moved from that of the whole bag, in deletion by any order.
        unit: what an answer counts in: 1 for probabilities.
        deletion: one curve.
        insertion: one curve.
        random_deletion: a curve per random order.
        random_insertion: likewise.
    """

    score: float
    low: float
    high: float
    chance: float
    movable: float
    unit: float
    deletion: Curves | None
    insertion: Curves | None
    random_deletion: Curves | None
    random_insertion: Curves | None

    @property
    def warning(self) -> str:
        """Return what to print on a heatmap of attention; empty where it can be trusted."""
        return self.warning_of("Attention does")

    def warning_of(self, shown: str) -> str:
        """Return what to print on a heatmap; `shown` is what it shows, with a verb: "X does"."""
        if math.isnan(self.score):
            return "A single tile: nothing to compare it with."
        if self.score >= THRESHOLD and self.chance <= CHANCE:
            return ""
        if self.movable < THRESHOLD * self.unit:
            return (
                f"{shown} not drive this prediction: it stays, whether the tiles shown as hot are "
                "taken out or random ones."
            )
        if self.high <= -THRESHOLD:
            return (
                f"{shown} not drive this prediction: the tiles shown as hot speak against it, "
                "which is surer without them."
            )
        if self.score >= THRESHOLD:
            # Its own number, which stands beside the sentence, would contradict "little more".
            return (
                f"{shown} not surely drive this prediction: the tiles shown as hot matter more to "
                "it than random ones do on average, but one random order in "
                f"{round(1 / self.chance)} does as well."
            )
        return (
            f"{shown} not drive this prediction: taking out the tiles shown as hot changes it "
            "little more than taking out random ones."
        )


class Heatmap(NamedTuple):
    """Scores to be judged.

    Attributes:
        scores: (n,) of the tiles, higher is hotter.
        column: of the answers that they explain; the one decided for, or else the highest, if None.
        sign: −1 where they explain why the answer is low.
    """

    scores: npt.ArrayLike
    column: int | None = None
    sign: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far several models' scores of the same tiles agree.

    Attributes:
        rank_correlation: Spearman's, the mean over pairs of models; NaN where none is defined.
        lowest_correlation: of all pairs.
        top_overlap: share of the top tiles that two models have in common, the mean over pairs.
        chance_overlap: what it would be of random scores.
        top_tiles: how many are the top.
    """

    rank_correlation: float
    lowest_correlation: float
    top_overlap: float
    chance_overlap: float
    top_tiles: int


def order_of(scores: npt.ArrayLike) -> Rows:
    """Return the places of scores (n,) from the highest down; equals in order of place.

    Raises:
        ValueError: not one finite number a tile.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(
            f"scores are {values.shape} with {int((~np.isfinite(values)).sum())} that are no "
            "finite numbers; pass one finite score per tile"
        )
    return np.argsort(-values, kind="stable")


def deletion(
    pool: Pool, orders: Sequence[Rows], column: int, shares: Sequence[float] = SHARES
) -> Curves:
    """Return the answers while the first tiles of each order are taken out, the whole bag first."""
    counts = _counts(len(orders[0]), shares)
    whole = pool.answers([np.sort(orders[0])])
    return _deletion(_taken(pool, orders, counts), whole, counts, len(orders[0]), column)


def insertion(
    pool: Pool, orders: Sequence[Rows], column: int, shares: Sequence[float] = SHARES
) -> Curves:
    """Return the answers to bags of the first tiles of each order, the whole bag last."""
    counts = _counts(len(orders[0]), shares)
    whole = pool.answers([np.sort(orders[0])])
    return _insertion(pool.beginnings(orders, counts), whole, counts, len(orders[0]), column)


def faithfulness(
    pool: Pool,
    rows: Rows,
    scores: npt.ArrayLike,
    *,
    column: int | None = None,
    orders: int | None = None,
    seed: int = 0,
    unit: float = 1.0,
    shares: Sequence[float] = SHARES,
) -> Faithfulness:
    """Measure a heatmap.

    Args:
        pool: of the model whose prediction is explained.
        rows: of the bag in the pool.
        scores: (n,) of these tiles, higher is hotter.
        column: of the answers; the one decided for, or else the highest, where not given.
        orders: random ones; `CLOSED_ORDERS` of a pool with a closed form, else `ORDERS`, if None.
        seed: of these.
        unit: what an answer counts in; of a risk, say, its standard deviation over the cohort.
        shares: of the tiles at which curves are read, above 0 and below 1; fewer cost less where
            the model has no closed form.

    Raises:
        ValueError: scores that are not one finite number a tile.
    """
    (found,) = faithfulness_of_each(
        pool, rows, [Heatmap(scores, column)], orders=orders, seed=seed, unit=unit, shares=shares
    )
    return found


def faithfulness_of_each(
    pool: Pool,
    rows: Rows,
    shown: Sequence[Heatmap],
    *,
    orders: int | None = None,
    seed: int = 0,
    unit: float = 1.0,
    shares: Sequence[float] = SHARES,
) -> list[Faithfulness]:
    """Measure several heatmaps of one bag, held against the same random orders.

    Without a closed form, a model is asked about as many tiles as in 1 + len(shares) · (orders +
    len(shown)) passes over the bag.

    Args:
        pool: of the model whose prediction is explained.
        rows: of the bag in the pool.
        shown: the heatmaps.
        orders: random ones; `CLOSED_ORDERS` of a pool with a closed form, else `ORDERS`, if None.
        seed: of these.
        unit: what an answer counts in.
        shares: of the tiles at which curves are read.

    Raises:
        ValueError: scores that are not one finite number a tile.
    """
    if orders is None:
        orders = CLOSED_ORDERS if pool.is_closed_form else ORDERS
    ordered = [order_of(one.scores) for one in shown]
    for order in ordered:
        if len(order) != len(rows):
            raise ValueError(f"{len(order)} scores for {len(rows)} tiles; give one each")
    tiles = len(rows)
    if tiles == 1:
        return [_nothing(unit) for _ in shown]
    whole = pool.answers([rows])
    decided = int(pool.question.decided(whole)[0])
    explained = decided if decided >= 0 else int(whole[0].argmax())
    counts = _counts(tiles, shares)
    generator = np.random.default_rng(seed)
    random = [generator.permutation(rows) for _ in range(orders)]
    every = [*(rows[order] for order in ordered), *random]
    taken, given = _taken(pool, every, counts), pool.beginnings(every, counts)
    found = []
    for place, one in enumerate(shown):
        column = explained if one.column is None else one.column
        own, others = slice(place, place + 1), slice(len(shown), None)
        found.append(
            _judged(
                down=_deletion(taken[own], whole, counts, tiles, column),
                up=_insertion(given[own], whole, counts, tiles, column),
                random_down=_deletion(taken[others], whole, counts, tiles, column),
                random_up=_insertion(given[others], whole, counts, tiles, column),
                unit=unit,
                sign=one.sign,
            )
        )
    return found


def _judged(
    *,
    down: Curves,
    up: Curves,
    random_down: Curves,
    random_up: Curves,
    unit: float,
    sign: float,
) -> Faithfulness:
    moves = (random_down.means - down.means) + (up.means - random_up.means)
    gains = sign * moves / (2 * unit)
    low, high = np.quantile(gains, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    moved = np.abs(np.concatenate([down.answers, random_down.answers]) - down.answers[0, 0])
    return Faithfulness(
        score=float(gains.mean()),
        low=float(low),
        high=float(high),
        chance=float((1 + (gains <= ROUNDING).sum()) / (1 + len(gains))),
        movable=float(moved.max()),
        unit=unit,
        deletion=down,
        insertion=up,
        random_deletion=random_down,
        random_insertion=random_up,
    )


def agreement(scores: Sequence[npt.ArrayLike], *, top_share: float = 0.05) -> Agreement:
    """Compare the scores (n,) that several models, such as those of the folds, give the same tiles.

    Raises:
        ValueError: fewer than two models, or scores of different tiles.
    """
    each = [np.asarray(one, np.float64) for one in scores]
    if len(each) < 2 or len({one.shape for one in each}) > 1:
        raise ValueError("agreement takes the scores of two models or more, of the same tiles")
    tiles = len(each[0])
    top = share_of(tiles, top_share)
    chosen = [order_of(one)[:top] for one in each]
    ranks = [stats.rankdata(one) for one in each]
    correlations, overlaps = [], []
    for first, second in combinations(range(len(each)), 2):
        overlaps.append(len(np.intersect1d(chosen[first], chosen[second])) / top)
        if np.ptp(ranks[first]) and np.ptp(ranks[second]):
            correlations.append(float(np.corrcoef(ranks[first], ranks[second])[0, 1]))
    return Agreement(
        rank_correlation=float(np.mean(correlations)) if correlations else math.nan,
        lowest_correlation=min(correlations, default=math.nan),
        top_overlap=float(np.mean(overlaps)),
        chance_overlap=top / tiles,
        top_tiles=top,
    )


def _counts(tiles: int, shares: Sequence[float]) -> list[int]:
    return sorted({min(share_of(tiles, share), tiles - 1) for share in shares})


def _taken(pool: Pool, orders: Sequence[Rows], counts: Sequence[int]) -> Array:
    """Return what is said when the first tiles of orders are taken out: (orders, counts, A)."""
    tiles = len(orders[0])
    left = [tiles - count for count in reversed(counts)]
    return pool.beginnings([order[::-1] for order in orders], left)[:, ::-1]


def _deletion(taken: Array, whole: Array, counts: Sequence[int], tiles: int, column: int) -> Curves:
    first = np.full((len(taken), 1), whole[0, column])
    return Curves(
        shares=np.array([0, *counts]) / tiles,
        answers=np.concatenate([first, taken[:, :, column]], axis=1),
    )


def _insertion(
    given: Array, whole: Array, counts: Sequence[int], tiles: int, column: int
) -> Curves:
    last = np.full((len(given), 1), whole[0, column])
    return Curves(
        shares=np.array([*counts, tiles]) / tiles,
        answers=np.concatenate([given[:, :, column], last], axis=1),
    )


def _nothing(unit: float) -> Faithfulness:
    return Faithfulness(
        score=math.nan,
        low=math.nan,
        high=math.nan,
        chance=math.nan,
        movable=math.nan,
        unit=unit,
        deletion=None,
        insertion=None,
        random_deletion=None,
        random_insertion=None,
    )
