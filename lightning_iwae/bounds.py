"""Values of the bounds on log p(x): log-weights (M, K, B) in nats -> nats per datum (B,).

M groups are averaged outside the logarithm, K particles inside it. These are what is logged; gradients come
from `estimators`, which never see a bound.
"""

from torch import Tensor

from .weights import log_mean_exp


def check_log_w(log_w: Tensor) -> None:
    """Raise ValueError unless `log_w` has shape (M, K, B) with M, K >= 1."""
    if log_w.ndim != 3 or 0 in log_w.shape[:2]:
        raise ValueError(f"log_w must have shape (M, K, B) with M, K >= 1. Got {tuple(log_w.shape)}.")


def check_beta(beta: float, name: str = "beta") -> None:
    """Raise ValueError, of the key `name`, unless 0 <= beta <= 1."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1]. Got {beta}.")


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
