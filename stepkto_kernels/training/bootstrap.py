"""Bootstrap intervals of shares, with problems as clusters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepkto_kernels import checks

AT_ONCE = 2**24  # numbers of drawn problems in memory


@dataclass(frozen=True)
class Estimate:
    """A share and its interval; all three NaN for a share of nothing."""

    value: float
    low: float
    high: float


def ratio_estimates(
    parts: NDArray[np.float64],
    wholes: NDArray[np.float64],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> list[Estimate]:
    """Ratios of sums over problems, with percentile intervals of the bootstrap (Efron 1979).

    Whole problems are drawn with replacement, as many as there are: the solutions of one problem
    are not independent of each other. All shares are computed on the same draws. A draw in which
    a share is one of nothing says nothing of it and is left out of its interval.

    Args:
        parts, wholes: (P, M), what each of P problems adds to each of M ratios.
        resamples: draws, >= 1.
        level: of the interval, in (0, 1).
        seed: of the draws.
    Raises:
        ValueError: an argument outside of the above, or of another shape.
    """
    parts, wholes = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    checks.require(parts.ndim == 2, "parts", "2 dimensions", f"shape {parts.shape}")
    checks.require(wholes.shape == parts.shape, "wholes", f"shape {parts.shape}", wholes.shape)
    checks.integer("resamples", resamples, low=1)
    checks.number("level", level, low=0, high=1, low_open=True, high_open=True)
    problems = len(parts)
    if problems == 0:
        return [Estimate(math.nan, math.nan, math.nan)] * parts.shape[1]
    values = _ratios(parts.sum(0), wholes.sum(0))
    rng = np.random.default_rng(seed)
    drawn = []
    chunk = max(1, AT_ONCE // problems)
    for first in range(0, resamples, chunk):
        count = min(chunk, resamples - first)
        # how often each problem is drawn: as good as the draws, and a matrix product sums them
        times = rng.multinomial(problems, np.full(problems, 1 / problems), size=count)
        drawn.append(_ratios(times @ parts, times @ wholes))
    shares = np.concatenate(drawn)  # (resamples, M)
    estimates = []
    for value, column in zip(values, shares.T, strict=True):
        known = column[~np.isnan(column)]
        low = high = math.nan
        if len(known) and not math.isnan(value):
            low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
        estimates.append(Estimate(float(value), float(low), float(high)))
    return estimates


def _ratios(parts: NDArray[np.float64], wholes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(parts, wholes, out=np.full(wholes.shape, np.nan), where=wholes > 0)
