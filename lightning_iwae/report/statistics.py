"""Means over seeds, and tests of one group of runs against another. Numbers in, numbers out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit


class Summary(NamedTuple):
    """One figure of one group of runs."""

    mean: float
    sd: float | None  # over seeds, n - 1 in the denominator; None of a single seed
    n: int
    se: float | None  # the evaluation's own standard error, over test data: of a single seed only


class Welch(NamedTuple):
    """Welch's test of a difference of two means; nothing is assumed about the two variances being equal."""

    difference: float
    low: float  # 95 % confidence interval of the difference
    high: float
    t: float
    df: float  # Welch and Satterthwaite's degrees of freedom
    p: float  # two-sided


def summarise(values: Sequence[float], ses: Sequence[float | None] = ()) -> Summary | None:
    """Mean and standard deviation over seeds; None of no values."""
    if not values:
        return None
    if len(values) == 1:
        return Summary(values[0], None, 1, ses[0] if ses else None)
    return Summary(float(np.mean(values)), float(np.std(values, ddof=1)), len(values), None)


def welch(a: Sequence[float], b: Sequence[float]) -> Welch | None:
    """Test mean(a) - mean(b) against 0 (B. L. Welch, Biometrika 34, 1947).

    t = (mean(a) - mean(b)) / sqrt(v_a + v_b), with v_i = s_i^2 / n_i;
    df = (v_a + v_b)^2 / (v_a^2 / (n_a - 1) + v_b^2 / (n_b - 1)).
    None where there is no test: fewer than two values on a side, or none that vary.
    """
    if min(len(a), len(b)) < 2:
        return None
    difference = float(np.mean(a) - np.mean(b))
    va, vb = float(np.var(a, ddof=1)) / len(a), float(np.var(b, ddof=1)) / len(b)
    se = math.sqrt(va + vb)
    if se <= 1e-12 * max(1.0, abs(difference), *map(abs, a), *map(abs, b)):  # equal but for rounding
        return None
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    t, half = difference / se, float(stdtrit(df, 0.975)) * se
    return Welch(difference, difference - half, difference + half, t, df, float(2 * stdtr(df, -abs(t))))


def paired(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of Student's t-test of the differences a_i - b_i; None of fewer than two, or if they do not vary."""
    differences = np.subtract(a, b)
    if len(differences) < 2:
        return None
    se = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    if se <= 1e-12 * max(1.0, *map(abs, a), *map(abs, b)):
        return None
    return float(2 * stdtr(len(differences) - 1, -abs(np.mean(differences)) / se))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Scand. J. Statist. 6, 1979), in the order given.

    Rejecting where they are below alpha keeps the chance of any false rejection among all tests below alpha, however
    the tests depend on each other.
    """
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted.tolist()
