"""Paired comparisons over seeds: intervals, t-test, exact sign-flip test, matched accuracy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import product

Point = tuple[float, float]  # accuracy, errors


def t_probability(t: float, freedom: int) -> float:
    """P(|T| >= |t|) of Student's t: I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t^2)."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function, by Lentz's continued fraction (DLMF 8.17.22)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / max(tiny, 1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 500):
        for top in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + top * d or tiny)
            c = 1 + top / c or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """t with P(|T| <= t) = level, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        if 1 - t_probability(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return low


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's interval of it; the interval is NaN for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = t_quantile(len(values) - 1, level) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def paired_t(differences: Sequence[float]) -> tuple[float, float]:
    """t and two-sided p of a mean of 0; NaN for fewer than two or where all are the same."""
    if len(differences) < 2 or statistics.stdev(differences) == 0:
        return math.nan, math.nan
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    t = statistics.fmean(differences) / error
    return t, t_probability(t, len(differences) - 1)


def sign_flip(differences: Sequence[float]) -> float:
    """Exact two-sided p of the mean under random signs: 2^n cases, at least 2^(1-n)."""
    observed = abs(sum(differences)) * (1 - 1e-12)  # the observed signs count, whatever rounding
    flips = product((1, -1), repeat=len(differences))
    sums = (sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in flips)
    return sum(abs(total) >= observed for total in sums) / 2 ** len(differences)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def matched_difference(first: Sequence[Point], second: Sequence[Point]) -> float | None:
    """Errors of `first` less errors of `second` at the highest accuracy that both reach.

    Each is a trajectory M0, M1, ... of (accuracy, errors). The accuracy is the lower one of the two
    trajectories' highest; there the errors of each are interpolated linearly between the
    points around it, where it first gets there. None where a trajectory begins above it.
    """
    accuracy = min(max(a for a, _ in first), max(a for a, _ in second))
    found = [errors_at(points, accuracy) for points in (first, second)]
    if found[0] is None or found[1] is None:
        return None
    return found[0] - found[1]


def errors_at(points: Sequence[Point], accuracy: float) -> float | None:
    """Errors where the trajectory first reaches an accuracy; None where it never does."""
    if points[0][0] > accuracy:
        return None
    if points[0][0] == accuracy:
        return points[0][1]
    for (a, errors), (next_a, next_errors) in zip(points, points[1:], strict=False):
        if a < accuracy <= next_a:
            return errors + (next_errors - errors) * (accuracy - a) / (next_a - a)
    return None
