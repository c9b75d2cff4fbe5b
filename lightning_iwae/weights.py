"""Importance weights in log space: normalised weights, log-mean-exp, effective sample size.

Everything here is a pure function of log-weights in nats, exact for values of +-1e4 and with some at -inf.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def normalised(log_w: Tensor, dim: int = 1) -> Tensor:
    """Self-normalised weights w~ = w / sum(w) along `dim`; same shape as `log_w`.

    Where every weight is zero (all -inf) none is preferred and the result is uniform, so that with a single
    particle the weight is 1 whatever its value, as the ELBO's is.
    """
    least = torch.finfo(log_w.dtype).min  # softmax takes no -inf alone; of the least numbers each counts as much
    return torch.softmax(log_w.clamp(min=least), dim)


def log_mean_exp(log_w: Tensor, dim: int = 1) -> Tensor:
    """log (1/K) sum_k w_k along `dim`, which is removed. Nats."""
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])


def ess(log_w: Tensor, dim: int = 1) -> Tensor:
    """Kish's effective sample size (sum w)^2 / sum w^2 along `dim`, between 1 and K.

    Biased upwards at finite K (at K = 1 it is always 1): compare at equal K only.
    """
    return 1.0 / normalised(log_w, dim).square().sum(dim)


def log_sum_others(log_w: Tensor, dim: int = 1) -> Tensor:
    """log sum_{l != k} w_l for each k along `dim`; same shape as `log_w`. Exact where one weight outweighs the rest.

    From sums before and after k, in time linear in K: never by taking w_k off the whole sum.

    Raises:
        ValueError: for a single particle, which has no others.
    """
    check_others(log_w, dim)
    return torch.logaddexp(*_either_side(log_w, torch.logcumsumexp, -math.inf, dim))


def mean_others(values: Tensor, dim: int = 1) -> Tensor:
    """Mean of values_l over l != k, for each k along `dim`; same shape. Finite wherever the others are.

    Raises:
        ValueError: for a single particle, which has no others.
    """
    check_others(values, dim)
    before, after = _either_side(values, torch.cumsum, 0.0, dim)
    return (before + after) / (values.shape[dim] - 1)


def _either_side(
    values: Tensor, accumulate: Callable[[Tensor, int], Tensor], nothing: float, dim: int
) -> tuple[Tensor, Tensor]:
    """What accumulates of the values before each k, and of those after it."""
    none, others = torch.full_like(values.narrow(dim, 0, 1), nothing), values.shape[dim] - 1
    before = torch.cat([none, accumulate(values, dim).narrow(dim, 0, others)], dim)
    after = torch.cat([none, accumulate(values.flip(dim), dim).narrow(dim, 0, others)], dim).flip(dim)
    return before, after


def relative(log_w: Tensor) -> Tensor:
    """log w (M, K, B) less the group's largest; zeros for a group whose weights are all zero."""
    largest = log_w.amax(1, keepdim=True)
    return (log_w - largest).masked_fill(largest == -math.inf, 0.0)


def check_others(log_w: Tensor, dim: int = 1) -> None:
    """Raise ValueError unless there are at least 2 particles along `dim`."""
    if log_w.shape[dim] < 2:
        raise ValueError(f"needs at least 2 particles, as it compares each with the others. Got {log_w.shape[dim]}.")
