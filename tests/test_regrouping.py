"""Requests grouped by the experts they use: topics are found, nothing is lost, and it is never worse than in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import RoutingTrace, regroup, touched, uses
from moe.regrouping import Use
from moe.synthetic import even, skewed

LAYERS, EXPERTS, K = 3, 24, 4


def topical(topics: list[int], *, sure: float = 0.9, seed: int = 0) -> Use:
    """Requests that draw `sure` of their choices from the favourites of their topic, no topic's being another's."""
    rng = np.random.default_rng(seed)
    of = EXPERTS // (max(topics) + 1)
    out = np.zeros((len(topics), LAYERS, EXPERTS))
    for n, topic in enumerate(topics):
        for layer in range(LAYERS):
            mine = rng.dirichlet(np.full(of, 4.0)) * sure
            out[n, layer] = (1 - sure) / EXPERTS
            out[n, layer, topic * of : (topic + 1) * of] += mine
    return np.minimum(out * K, 1.0)


def partitions(left: tuple[int, ...], size: int, batches: int) -> Iterator[list[tuple[int, ...]]]:
    """Every way to put requests into that many batches."""
    if not left:
        yield []
    elif batches:
        for rest in range(min(size, len(left))):
            for others in itertools.combinations(left[1:], rest):
                batch = (left[0], *others)
                for more in partitions(tuple(i for i in left if i not in batch), size, batches - 1):
                    yield [batch, *more]


def in_order(n: int, size: int) -> list[list[int]]:
    return [list(range(i, min(i + size, n))) for i in range(0, n, size)]


@pytest.mark.parametrize(("count", "size"), [(2, 4), (3, 4), (3, 8), (2, 12)])
def test_topics_that_arrive_mixed_are_found(count: int, size: int) -> None:
    topics = np.random.default_rng(count).permutation(np.repeat(np.arange(count), 24)).tolist()
    use = topical(topics)
    got = regroup(use, size)
    assert all(len({topics[i] for i in batch}) == 1 for batch in got)
    assert touched(use, got) < 0.85 * touched(use, in_order(len(topics), size))


def test_a_batch_that_is_not_full_is_used() -> None:
    """Five of one topic and three of another in batches of five: a full one, and one with two places left."""
    got = regroup(topical([0, 1, 0, 1, 0, 1, 0, 0]), 5)
    assert got == [[0, 2, 4, 6, 7], [1, 3, 5]]
    # greedily, a batch of five would begin with the four of a topic and one stranger
    got = regroup(topical([1, 0, 1, 0, 1, 0, 1, 0], sure=0.99), 5)
    assert got == [[0, 2, 4, 6], [1, 3, 5, 7]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 20), size=st.integers(1, 8), sure=st.floats(0, 1))
def test_each_request_is_in_one_batch_and_order_is_never_better(seed: int, n: int, size: int, sure: float) -> None:
    rng = np.random.default_rng(seed)
    use = topical([*rng.integers(0, 3, n).tolist(), 2], sure=sure, seed=seed)[:n]
    before = use.copy()
    got = regroup(use, size)
    assert sorted(i for batch in got for i in batch) == list(range(n))
    assert len(got) == -(-n // size) and all(0 < len(batch) <= size for batch in got)
    assert got == sorted(sorted(batch) for batch in got), "in the order of arrival"
    assert touched(use, got) <= touched(use, in_order(n, size)) + 1e-9
    assert got == regroup(use, size) and np.array_equal(use, before)


def test_near_the_best_there_is() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        use = rng.dirichlet(np.full(8, 0.3), (7, 2))
        best = min(touched(use, batches) for batches in partitions(tuple(range(7)), 3, 3))
        assert best - 1e-9 <= touched(use, regroup(use, 3)) <= 1.05 * best


def test_arrival_order_stays_where_nothing_is_better() -> None:
    same = np.full((7, LAYERS, EXPERTS), K / EXPERTS)
    assert regroup(same, 3) == in_order(7, 3)
    certain = np.zeros((6, 1, 6))
    certain[range(6), 0, [0, 0, 1, 1, 2, 2]] = 1.0
    assert regroup(certain, 2) == in_order(6, 2)


@pytest.mark.parametrize(
    ("n", "size", "batches"),
    [(0, 4, []), (1, 4, [[0]]), (3, 3, [[0, 1, 2]]), (3, 9, [[0, 1, 2]]), (3, 1, [[0], [1], [2]])],
)
def test_where_there_is_nothing_to_choose(n: int, size: int, batches: list[list[int]]) -> None:
    assert regroup(topical([0, 1, 2])[:n], size) == batches


def test_what_is_touched_is_what_is_drawn() -> None:
    """The expectation, against a count."""
    rng = np.random.default_rng(0)
    use = rng.random((4, 2, 5))
    batches = [[0, 3], [1, 2]]
    hits = rng.random((20_000, *use.shape)) < use
    counted = sum(hits[:, b].any(axis=1).sum(axis=(1, 2)).mean() for b in batches)
    assert touched(use, batches) == pytest.approx(counted, rel=0.01)
    assert touched(use, []) == 0
    assert touched(use, [[0], [1], [2], [3]]) == pytest.approx(use.sum())


def test_use_is_counted_from_traces() -> None:
    traces = [skewed(2, 8, 2, 30, seed=s) for s in range(3)]
    use = uses(traces)
    assert use.shape == (3, 2, 8) and np.allclose(use.sum(axis=2), 2)
    chosen = np.concatenate([p[1].index for p in traces[2]])
    assert use[2, 1, 5] == np.mean([(row == 5).any() for row in chosen])
    assert uses([]).shape == (0, 0, 0) and regroup(uses([]), 4) == []
    narrow = RoutingTrace([8, 4], [])
    assert uses([narrow]).shape == (1, 2, 8) and not uses([narrow]).any()
    with pytest.raises(ValueError, match="different models"):
        uses([even(2, 8, 2, 1), even(2, 9, 2, 1)])


@pytest.mark.parametrize("wrong", [np.full((2, 1, 4), 3.0), np.full((2, 1, 4), np.nan), np.full((2, 1, 4), -0.1)])
def test_counts_are_refused(wrong: Use) -> None:
    with pytest.raises(ValueError, match="share of tokens"):
        regroup(wrong, 2)


def test_other_shapes_and_sizes_are_refused() -> None:
    for use, size in ((np.zeros((2, 4)), 2), (np.zeros((2, 1, 4)), 0)):
        with pytest.raises(ValueError, match="above zero"):
            regroup(use, size)
