"""Statistics against hand computation, brute force and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_pocket import statistics

REWARDS = st.lists(st.floats(0, 1), min_size=1, max_size=5)


def test_mean_is_students_t_over_the_task_means() -> None:
    # Task means 0.2, 0.5 and 0.8: sd 0.3, error 0.3/sqrt(3), t(0.975, 2) = 4.302653.
    values = {"a": [0.1, 0.3], "b": [0.5], "c": [0.6, 1.0, 0.8]}
    estimate = statistics.mean(values, bounds=(-9.0, 9.0))
    assert estimate.value == pytest.approx(0.5)
    assert estimate.error == pytest.approx(0.1732051)
    assert estimate.freedom == 2
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - 0.745241, 0.5 + 0.745241), abs=1e-5)


def test_mean_over_these_tasks_uses_only_the_spread_within_tasks() -> None:
    values = {"a": [0.0, 0.2], "b": [0.8, 1.0]}
    estimate = statistics.mean(values, "these")
    # Each task mean has variance 0.02/2; their mean has (0.01 + 0.01)/4.
    assert estimate.error == pytest.approx(math.sqrt(0.005))
    assert estimate.freedom == pytest.approx(2)
    assert estimate.half < statistics.mean(values).half


def test_equal_task_means_do_not_claim_certainty() -> None:
    perfect = statistics.mean({str(task): [1.0, 1.0] for task in range(19)})
    assert perfect.value == perfect.high == 1.0
    assert perfect.low == pytest.approx(0.05 ** (1 / 19))


def test_one_task_has_a_mean_and_no_interval() -> None:
    estimate = statistics.mean({"a": [0.0, 1.0]})
    assert estimate.value == 0.5
    assert math.isnan(estimate.half)
    assert math.isnan(statistics.smallest_difference(estimate))


def test_no_values_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        statistics.mean({"a": []})


@settings(deadline=None)
@given(st.dictionaries(st.text(), REWARDS, min_size=1))
def test_the_interval_holds_the_mean_and_keeps_to_the_bounds(values: dict[str, list[float]]) -> None:
    estimate = statistics.mean(values)
    assert -1e-9 <= estimate.value <= 1 + 1e-9
    if len(values) > 1:
        assert -1e-9 <= estimate.low <= estimate.value + 1e-9
        assert estimate.value - 1e-9 <= estimate.high <= 1 + 1e-9


def test_the_interval_covers_the_mean_of_tasks_in_general() -> None:
    # Task means from Beta(2, 1), whose mean is 2/3; 6 episodes a task pass or not.
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        chances = random.beta(2, 1, size=19)
        values = {
            str(task): list(random.binomial(1, p, size=6).astype(float)) for task, p in enumerate(chances)
        }
        estimate = statistics.mean(values)
        hits += estimate.low <= 2 / 3 <= estimate.high
    assert 0.93 <= hits / 1000 <= 0.97


def test_a_pair_with_a_missing_side_is_dropped() -> None:
    first: dict[tuple[str, object], float] = {("a", 1): 0.0, ("a", 2): 1.0, ("b", 1): 0.5}
    second: dict[tuple[str, object], float] = {("a", 1): 1.0, ("b", 1): 0.5, ("b", 2): 0.0}
    estimate = statistics.paired(first, second)
    assert estimate is not None
    assert estimate.value == pytest.approx(0.5)  # +1 for a, 0 for b
    assert statistics.paired(first, {}) is None


def test_smallest_difference_at_18_degrees_of_freedom() -> None:
    estimate = statistics.Estimate(0.0, -1.0, 1.0, error=0.1, freedom=18)
    assert statistics.smallest_difference(estimate) == pytest.approx(0.1 * (2.100922 + 0.862049), abs=1e-5)


@settings(deadline=None)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_and_pass_hat_k_equal_the_average_over_all_subsets(counts: tuple[int, int, int]) -> None:
    samples, passes, k = counts
    subsets = list(itertools.combinations([True] * passes + [False] * (samples - passes), k))
    some = sum(map(any, subsets)) / len(subsets)
    every = sum(map(all, subsets)) / len(subsets)
    assert statistics.pass_at_k(samples, passes, k) == pytest.approx(some)
    assert statistics.pass_hat_k(samples, passes, k) == pytest.approx(every)


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(ValueError, match="k=3 needs"):
        statistics.pass_at_k(2, 1, 3)


def test_wilson_interval_of_a_textbook_case() -> None:
    assert statistics.wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)
