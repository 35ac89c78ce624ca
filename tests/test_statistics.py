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
    for _ in range(10_000):
        chances = random.beta(2, 1, size=19)
        values = {
            str(task): list(random.binomial(1, p, size=6).astype(float)) for task, p in enumerate(chances)
        }
        estimate = statistics.mean(values)
        hits += estimate.low <= 2 / 3 <= estimate.high
    assert 0.93 <= hits / 10_000 <= 0.97


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


def paired_sides(differences: dict[str, list[float]]) -> tuple[dict[tuple[str, object], float], ...]:
    """Two sides with these differences, instance by instance."""
    first = {(task, index): 0.0 for task, values in differences.items() for index in range(len(values))}
    return first, {(task, index): differences[task][index] for task, index in first}  # type: ignore[index]


def test_the_permutation_test_counts_the_flips_that_are_as_far_out() -> None:
    # Task means 0.1, 0.2, 0.6: of 8 sign flips only +++ and --- reach |0.9|; -++ gives 0.7.
    result = statistics.compare(*paired_sides({"a": [0.1], "b": [0.1, 0.3], "c": [0.6]}))
    assert result is not None
    assert result.p == pytest.approx(2 / 8)
    assert result.pairs == 4
    assert result.difference.value == pytest.approx(0.3)
    assert 0.1 <= result.bootstrap[0] <= 0.3 <= result.bootstrap[1] <= 0.6


@pytest.mark.parametrize(("difference", "p"), [(0.0, 1.0), (0.5, 2 / 2**4)])
def test_equal_differences_have_a_known_p_and_an_interval(difference: float, p: float) -> None:
    result = statistics.compare(*paired_sides({task: [difference] * 2 for task in "abcd"}))
    assert result is not None
    assert result.p == p
    assert result.bootstrap[0] < difference < result.bootstrap[1]


def test_nothing_in_common_is_no_comparison() -> None:
    assert statistics.compare({("a", 1): 1.0}, {("a", 2): 1.0}) is None


def test_the_paired_test_finds_a_difference_where_there_is_none_at_most_6_times_in_100() -> None:
    # Both models pass with the same chance on each of 19 tasks, 3 instances a task.
    random = np.random.default_rng(3)
    wrong = 0
    for _ in range(1000):
        chances = random.beta(2, 1, size=19)
        first, second = (
            {(str(t), i): float(random.random() < p) for t, p in enumerate(chances) for i in range(3)}
            for _ in "12"
        )
        result = statistics.compare(first, second, resamples=499)
        assert result is not None
        wrong += result.p < 0.05
    assert wrong / 1000 <= 0.06


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.sampled_from("abcdefgh"),
        st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=3),
        min_size=1,
    )
)
def test_changing_the_sides_changes_the_sign_alone(differences: dict[str, list[float]]) -> None:
    first, second = paired_sides(differences)
    one, other = statistics.compare(first, second), statistics.compare(second, first)
    assert one is not None
    assert other is not None
    assert one.difference.value == pytest.approx(-other.difference.value)
    assert one.p == pytest.approx(other.p)


def test_holm_by_hand() -> None:
    # Sorted 0.01 0.03 0.04, times 3 2 1: 0.03 0.06 0.04, and none below the one before it.
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_makes_a_p_value_smaller_and_keeps_the_order(values: list[float]) -> None:
    corrected = statistics.holm(values)
    assert all(value <= after <= 1 for value, after in zip(values, corrected, strict=True))
    pairs = sorted(zip(values, corrected, strict=True))
    assert [after for _, after in pairs] == sorted(corrected)
