"""Statistics: what a run can claim, and how sure of it one may be.

Episodes of one task resemble each other, so 19 tasks at 24 runs are not 456 independent observations.  The
intervals here take the task as the sampling unit.  Two claims are told apart by name:

- ``"tasks"`` (the default): the mean over *tasks in general*, of which ours are a sample.  Student's t over
  the task means, with (tasks - 1) degrees of freedom.
- ``"these"``: the mean over *these* tasks on fresh instances.  The tasks are strata; Welch-Satterthwaite
  degrees of freedom.  Narrower, and a smaller claim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 9999
"""Random flips of the permutation test, and resamples of the bootstrap."""
INVALID_SHARE = 0.02
"""Above this share of invalid episodes no ranking is made."""

Population = Literal["tasks", "these"]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval.  ``low`` and ``high`` are NaN where the data allow none (one task)."""

    value: float
    low: float
    high: float
    error: float
    """The standard error."""
    freedom: float
    """The degrees of freedom."""

    @property
    def half(self) -> float:
        """The larger distance from the value to an end of the interval."""
        return max(self.value - self.low, self.high - self.value)


def mean(
    values: Mapping[str, Sequence[float]],
    population: Population = "tasks",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """The mean of the tasks' means, each task counting the same, from a task's values by its name.

    ``bounds`` are the least and the greatest value possible; the interval is cut to them.  Raises ValueError
    when there is no value.
    """
    groups = [np.asarray(group, dtype=float) for group in values.values() if len(group)]
    if not groups:
        raise ValueError("no values: every episode is invalid, or none was run")
    means = np.array([group.mean() for group in groups])
    value = float(means.mean())
    if population == "these":
        error, freedom = _stratified(groups)
    else:
        error = float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
        freedom = len(means) - 1.0
        if len(means) > 1 and np.ptp(means) < 1e-12:
            return _without_spread(value, len(means), bounds)
    half = float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error if freedom > 0 else math.nan
    # max and min would let a bound hide NaN.
    low, high = (float(end) for end in np.clip([value - half, value + half], *bounds))
    return Estimate(value, low, high, error, freedom)


def _stratified(groups: Sequence[np.ndarray]) -> tuple[float, float]:
    """Standard error and Welch-Satterthwaite degrees of freedom of a mean of independent means."""
    if any(len(group) < 2 for group in groups):
        return math.nan, math.nan
    parts = np.array([group.var(ddof=1) / len(group) for group in groups]) / len(groups) ** 2
    total = float(parts.sum())
    if total == 0:
        return 0.0, float(sum(len(group) - 1 for group in groups))
    weights = np.array([len(group) - 1 for group in groups])
    return math.sqrt(total), total**2 / float((parts**2 / weights).sum())


def unseen_share(count: int) -> float:
    """The greatest share of tasks, in [0, 1], that ``count`` equal results may have missed: 1 - 0.05**(1/count)."""
    return 1 - float((1 - CONFIDENCE) ** (1 / count))


def _without_spread(value: float, count: int, bounds: tuple[float, float]) -> Estimate:
    """The interval when all task means are equal, where Student's t would claim certainty.

    A value that a task takes with probability p is seen ``count`` times out of ``count`` with p**count, so
    p >= 0.05**(1/count) is not refuted; the rest may lie at either bound.
    """
    share = unseen_share(count)
    low, high = (value * (1 - share) + bound * share for bound in bounds)
    return Estimate(value, low, high, 0.0, count - 1.0)


def paired(
    first: Mapping[tuple[str, object], float], second: Mapping[tuple[str, object], float]
) -> Estimate | None:
    """The mean of ``second`` - ``first`` over the pairs that both have, clustered by task.

    Keys are (task, whatever names the instance and the repeat).  None without a pair.
    """
    differences: dict[str, list[float]] = {}
    for key in first.keys() & second.keys():
        differences.setdefault(key[0], []).append(second[key] - first[key])
    return mean(differences, bounds=(-1.0, 1.0)) if differences else None


def smallest_difference(estimate: Estimate) -> float:
    """The smallest true difference that a repeat of a paired comparison would find 4 times in 5.

    (t(0.975) + t(0.8)) standard errors; NaN where the error is unknown.
    """
    if not estimate.freedom > 0:
        return math.nan
    quantiles = special.stdtrit(estimate.freedom, np.array([(1 + CONFIDENCE) / 2, POWER]))
    return float(quantiles.sum()) * estimate.error


@dataclass(frozen=True)
class Comparison:
    """Two models, or two conditions, on the same instances: ``second`` - ``first``.

    ``bootstrap`` is the 95% BCa bootstrap interval over tasks, beside Student's of ``difference``.  ``p`` is
    that of the two-sided permutation test.
    """

    difference: Estimate
    bootstrap: tuple[float, float]
    p: float
    pairs: int

    @property
    def smallest(self) -> float:
        """The smallest true difference that such a comparison finds 4 times in 5."""
        return smallest_difference(self.difference)


def compare(
    first: Mapping[tuple[str, object], float],
    second: Mapping[tuple[str, object], float],
    resamples: int = RESAMPLES,
) -> Comparison | None:
    """Compare over the pairs that both have, clustered by task.  Keys as in :func:`paired`.  None without a pair.

    The permutation test flips the signs of the tasks' mean differences: under the null hypothesis that the two
    are alike on every task, first and second could change places task by task.  Exact up to 13 tasks, else
    ``resamples`` random flips, the same at every call.
    """
    found = paired(first, second)
    if found is None:
        return None
    from scipy import stats

    groups: dict[str, list[float]] = {}
    for key in sorted(first.keys() & second.keys(), key=repr):
        groups.setdefault(key[0], []).append(second[key] - first[key])
    means = np.array([sum(group) / len(group) for group in groups.values()])
    pairs = sum(map(len, groups.values()))
    if np.ptp(means) < 1e-12:
        # A single value has no bootstrap; of n equal signs the test is known: 2 of 2**n flips are as far out.
        p = 1.0 if abs(means[0]) < 1e-12 else 2.0 ** (1 - len(means))
        return Comparison(found, (found.low, found.high), p, pairs)
    random = np.random.default_rng(0)
    test = stats.permutation_test(
        (means,), np.mean, permutation_type="samples", vectorized=True, n_resamples=resamples, rng=random
    )
    ends = stats.bootstrap(
        (means,), np.mean, vectorized=True, n_resamples=resamples, confidence_level=CONFIDENCE, rng=random
    ).confidence_interval
    return Comparison(found, (float(ends.low), float(ends.high)), float(test.pvalue), pairs)


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the order given.  Holm 1979, Scandinavian Journal of Statistics 6."""
    corrected = [1.0] * len(values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, values[index] * (len(values) - place)))
        corrected[index] = largest
    return corrected


def pass_at_k(samples: int, passes: int, k: int) -> float:
    """The chance that at least one of k samples passes: 1 - C(n-c, k) / C(n, k), unbiased.

    Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv:2107.03374, equation 1.
    """
    _check_counts(samples, passes, k)
    return 1.0 - math.comb(samples - passes, k) / math.comb(samples, k)


def pass_hat_k(samples: int, passes: int, k: int) -> float:
    """The chance that all of k samples pass (pass^k): C(c, k) / C(n, k), unbiased.

    Yao et al. 2024, tau-bench, arXiv:2406.12045, section 3.
    """
    _check_counts(samples, passes, k)
    return math.comb(passes, k) / math.comb(samples, k)


def _check_counts(samples: int, passes: int, k: int) -> None:
    if not 0 <= passes <= samples:
        raise ValueError(f"{passes} passes of {samples} samples")
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} needs between 1 and {samples} samples of one instance")


def wilson(passes: int, count: int) -> tuple[float, float]:
    """The 95% Wilson score interval of one task's pass rate: its instances are independent."""
    if not 0 <= passes <= count or count == 0:
        raise ValueError(f"{passes} passes of {count}")
    # scipy.stats takes most of a second to import, and the session's table does not need it.
    from scipy import stats

    interval = stats.binomtest(passes, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)
