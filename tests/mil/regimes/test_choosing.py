from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from bagscope.mil.regimes.choosing import chosen_tiles, clustered, principal, shared_out
from tests.kernels.packed import normal


def borders_of(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9)), min_size=1, max_size=8), st.data())
def test_a_budget_is_given_away_whole_and_nobody_gets_more_than_it_has(
    claims: list[tuple[float, int]], data: st.DataObject
) -> None:
    counts = torch.tensor([count for _, count in claims])
    shares = torch.tensor([share if count else 0.0 for share, count in claims]).double()
    budget = data.draw(st.integers(0, int(counts.sum())))
    quotas = shared_out(shares, counts, budget)
    assert int(quotas.sum()) == budget
    assert bool((quotas <= counts).all()) and bool((quotas >= 0).all())


def test_quotas_go_by_share_with_remainders_to_the_largest_claims() -> None:
    shares = torch.tensor([0.5, 0.3, 0.2]).double()
    room = torch.tensor([100, 100, 100])
    assert shared_out(shares, room, 10).tolist() == [5, 3, 2]
    assert shared_out(shares, room, 12).tolist() == [6, 4, 2]
    # What the first has no tiles for goes to the others, three to two.
    assert shared_out(shares, torch.tensor([2, 100, 100]), 12).tolist() == [2, 6, 4]


def test_principal_components_keep_distances_as_another_library_has_them() -> None:
    for rows, columns in ((40, 12), (9, 30)):
        points = normal(rows, columns).double()
        ours = pdist(principal(points, 5).numpy())
        wanted = pdist(PCA(5, svd_solver="full").fit_transform(points.numpy()))
        np.testing.assert_allclose(ours, wanted, rtol=1e-6)


def test_clusters_that_lie_apart_are_found() -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 5, 300)
    points = 20.0 * generator.normal(size=(5, 8))[truth] + generator.normal(size=(300, 8))
    found = clustered(torch.from_numpy(points), torch.rand(300), 5).numpy()
    wanted = KMeans(5, n_init=10, random_state=0).fit_predict(points)
    same = found[:, None] == found
    assert np.array_equal(same, wanted[:, None] == wanted)


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 6))
def test_every_bag_gets_its_budget_whatever_lies_beside_it(
    length: int, budget: int, clusters: int
) -> None:
    features = torch.cat([normal(length, 6, seed=1), normal(25, 6, seed=2)])
    weights = torch.rand(length + 25, generator=torch.Generator().manual_seed(length))
    options = {"budget": budget, "clusters": clusters, "components": 3}
    found = chosen_tiles(features, weights, borders_of(length, 25), **options)
    assert int(found[:length].sum()) == min(budget, length)
    alone = chosen_tiles(features[:length], weights[:length], borders_of(length), **options)
    assert torch.equal(found[:length], alone)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(3))
    mixed = chosen_tiles(features[order], weights[order], borders_of(length), **options)
    assert torch.equal(mixed, alone[order])


def test_within_a_cluster_the_most_attended_are_chosen_and_every_cluster_has_its_say() -> None:
    # Two kinds of tiles; the first has 90 % of the attention, spread over more of them.
    features = torch.cat([normal(30, 4), 50 + normal(10, 4)])
    weights = torch.cat([torch.linspace(0.04, 0.02, 30), torch.linspace(0.005, 0.015, 10)])
    found = chosen_tiles(
        features, weights, borders_of(40), budget=10, clusters=2, components=4
    ).nonzero()[:, 0]
    assert found.tolist() == [*range(9), 39]
    top = chosen_tiles(features, weights, borders_of(40), budget=10, clusters=1, components=4)
    assert top.nonzero()[:, 0].tolist() == list(range(10))
