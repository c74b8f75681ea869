from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope.cohort.jobs import Failure, Job, RunReport, parse_shard, select_shard
from bagscope.errors import ConfigError


@given(
    count=st.integers(1, 9),
    slide_ids=st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=40),
    order=st.randoms(use_true_random=False),
)
def test_shards_are_a_balanced_partition_whatever_the_order(count, slide_ids, order):
    jobs = [Job(slide_id=slide_id) for slide_id in slide_ids]
    shards = [[j.slide_id for j in select_shard(jobs, (i + 1, count))] for i in range(count)]
    assert Counter(name for shard in shards for name in shard) == Counter(slide_ids)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    order.shuffle(jobs)
    for i, shard in enumerate(shards):
        assert {j.slide_id for j in select_shard(jobs, (i + 1, count))} == set(shard)


def test_a_shard_keeps_the_order_of_the_table():
    jobs = [Job(slide_id=f"s{i}") for i in range(20)]
    chosen = select_shard(jobs, (2, 3))
    assert chosen == [job for job in jobs if job in chosen]
    assert select_shard(jobs, None) == jobs


def test_shard_as_text():
    assert parse_shard(" 2/8 ") == (2, 8)
    for wrong in ("0/8", "9/8", "2", "a/b", "1/0", "-1/3", "1/3/5", ""):
        with pytest.raises(ConfigError, match="shard"):
            parse_shard(wrong)


def test_exit_codes():
    counts = {"done": 1, "skipped": 1, "failed": 0}
    fine = RunReport(stage="t", total=4, counts=counts, elsewhere=1)
    assert (fine.exit_code, fine.remaining) == (0, 1)
    failure = Failure(slide_id="a", error_class="ReadError", message="m")
    assert RunReport(stage="t", total=1, counts=counts, failures=(failure,)).exit_code == 1
    stopped = RunReport(stage="t", total=1, counts=counts, failures=(failure,), interrupted=True)
    assert stopped.exit_code == 130
