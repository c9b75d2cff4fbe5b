"""Values of the bounds on log p(x): log-weights (M, K, B) in nats -> nats per datum (B,).

M groups are averaged outside the logarithm, K particles inside it. These are what is logged; gradients come
from `estimators`, which never see a bound.
"""

import math
from collections.abc import Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor

from .weights import log_mean_exp, normalised, relative

Partition = int | Sequence[float]


def check_log_w(log_w: Tensor) -> None:
    """Raise ValueError unless `log_w` has shape (M, K, B) with M, K >= 1."""
    if log_w.ndim != 3 or 0 in log_w.shape[:2]:
        raise ValueError(f"log_w must have shape (M, K, B) with M, K >= 1. Got {tuple(log_w.shape)}.")


def check_beta(beta: float, name: str = "beta") -> None:
    """Raise ValueError, of the key `name`, unless 0 <= beta <= 1."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1]. Got {beta}.")


def check_alpha(alpha: float, name: str = "alpha") -> None:
    """Raise ValueError, of the key `name`, unless 0 <= alpha < 1."""
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"{name} must lie in [0, 1). Got {alpha}.")


def points(partition: Partition, name: str = "partition") -> list[float]:
    """The points 0 = b_0 < ... < b_P = 1 of a partition: given as P, for equal intervals, or as themselves.

    Raises:
        ValueError: of the key `name`, for less than one interval, or points that do not grow from 0 to 1.
    """
    if isinstance(partition, int):
        if partition < 1:
            raise ValueError(f"{name} must have at least 1 interval. Got {partition}.")
        return [i / partition for i in range(partition + 1)]
    b = list(partition) if isinstance(partition, Sequence) else []
    if len(b) < 2 or b[0] != 0.0 or b[-1] != 1.0 or not all(earlier < later for earlier, later in pairwise(b)):
        raise ValueError(f"{name} must be a number of intervals, or points that grow from 0 to 1. Got {partition}.")
    return b


def elbo(log_w: Tensor) -> Tensor:
    """L_1, the evidence lower bound: mean of log w over groups and particles (arXiv 1312.6114)."""
    check_log_w(log_w)
    return log_w.mean((0, 1))


def iwae(log_w: Tensor) -> Tensor:
    """L_MK of the pooled M*K particles, log (1/MK) sum w (Burda et al., arXiv 1509.00519)."""
    check_log_w(log_w)
    return log_mean_exp(log_w.flatten(0, 1), 0)


def miwae(log_w: Tensor) -> Tensor:
    """L_K averaged over M groups (Rainforth et al., arXiv 1802.04537). Its expectation does not depend on M.

    Not Mattei and Frellsen's MIWAE for missing data.
    """
    check_log_w(log_w)
    return log_mean_exp(log_w, 1).mean(0)


def ciwae(log_w: Tensor, *, beta: float) -> Tensor:
    """beta * elbo + (1 - beta) * miwae on the same particles (Rainforth et al., arXiv 1802.04537).

    beta = 1 is the ELBO.
    """
    check_beta(beta)
    if beta in (0.0, 1.0):  # not 0 * -inf
        return elbo(log_w) if beta else miwae(log_w)
    return beta * elbo(log_w) + (1.0 - beta) * miwae(log_w)


def vr_iwae(log_w: Tensor, *, alpha: float) -> Tensor:
    """L_K^(alpha) = 1 / (1 - alpha) log (1/K) sum w^(1 - alpha), averaged over M (Daudel et al., arXiv 2210.06226).

    alpha = 0 is the IWAE, K = 1 the ELBO; its limit in K is Renyi's bound (Li & Turner, arXiv 1602.02311).
    """
    check_log_w(log_w)
    check_alpha(alpha)
    return log_mean_exp((1.0 - alpha) * log_w, 1).mean(0) / (1.0 - alpha)


def tvo(log_w: Tensor, *, partition: Partition) -> Tensor:
    """Left Riemann sum of log p(x) = int_0^1 E_b[log w] db, averaged over M (Masrani et al., arXiv 1907.00031).

    E_b, of the path q^(1-b) p^b, is estimated by self-normalised weights w^b: a lower bound as K grows, consistent
    but biased by O(1/K) at finite K. One interval is the ELBO.

    Args:
        partition: the number of intervals, or the points.
    """
    check_log_w(log_w)
    value = torch.zeros_like(log_w[0, 0])
    finite = log_w.masked_fill(log_w == -math.inf, 0.0)
    for b, following in pairwise(points(partition)):
        mean = (normalised(b * log_w) * finite).sum(1).mean(0) if b else log_w.mean((0, 1))
        value = value + (following - b) * mean
    return value


def jvi(log_w: Tensor, *, order: int = 1) -> Tensor:
    """Jackknife of L_K, whose bias is O(K^-(order + 1)); averaged over M. No bound (Nowozin, ICLR 2018).

    sum_j c_j mean over the subsets of K - j particles of L_(K-j), with c_j = (-1)^j (K-j)^m / ((m-j)! j!), m = order.
    Takes C(K, m) logarithms. Order 0 is the IWAE. Not finite where some of these subsets have no weight.

    Raises:
        ValueError: unless 0 <= order < K.
    """
    check_log_w(log_w)
    K = log_w.shape[1]
    if not 0 <= order < K:
        raise ValueError(f"order must be at least 0 and below the number of particles, {K}. Got {order}.")
    value = log_w.amax(1).mean(0)  # the coefficients sum to 1
    log_w = relative(log_w)
    for j in range(order + 1):
        coefficient = (-1) ** j * (K - j) ** order / (math.factorial(order - j) * math.factorial(j))
        subsets = [miwae(log_w[:, list(kept)]) for kept in combinations(range(K), K - j)]
        value = value + coefficient * torch.stack(subsets).mean(0)
    return value


SUMO_KNEE, SUMO_DECAY = 80, 0.9  # P(N >= k) = 1 / k to the knee, then 0.9 times less with each


def sumo(log_w: Tensor) -> Tensor:
    """Unbiased estimate of log p(x), averaged over M (Luo et al., arXiv 2004.00353): a Russian roulette of L_k.

    L_1 + sum_(k=1)^N (L_(k+1) - L_k) / P(N >= k), of nested sets of the K = N + 1 particles of a group, in their order.
    Unbiased if K was drawn by `sumo_particles`; its variance may be infinite. As P(N >= 1) = 1, L_1 cancels.

    Raises:
        ValueError: for K < 2, as N is at least 1.
    """
    check_log_w(log_w)
    K = log_w.shape[1]
    if K < 2:
        raise ValueError(f"sumo needs at least 2 particles. Got {K}.")
    k = torch.arange(1, K + 1, device=log_w.device, dtype=log_w.dtype)
    nested = (log_w.logcumsumexp(1) - k.log()[:, None])[:, 1:]
    survival = torch.where(k <= SUMO_KNEE, 1 / k, SUMO_DECAY ** (k - SUMO_KNEE) / SUMO_KNEE)[1:-1]
    steps = (nested.diff(dim=1) / survival[:, None]).sum(1)
    return (nested[:, 0] + steps.masked_fill(nested[:, 0] == -math.inf, 0.0)).mean(0)


def sumo_particles(u: float) -> int:
    """K = N + 1 for `sumo` from u, uniform in (0, 1]: N is the largest k with P(N >= k) >= u. About 6 in the mean."""
    if not 0.0 < u <= 1.0:
        raise ValueError(f"u must lie in (0, 1]. Got {u}.")
    if u * SUMO_KNEE >= 1.0:
        return 1 + math.floor(1.0 / u)
    return 1 + SUMO_KNEE + math.floor(math.log(u * SUMO_KNEE) / math.log(SUMO_DECAY))
