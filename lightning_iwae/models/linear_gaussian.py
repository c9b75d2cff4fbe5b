"""Rainforth et al.'s toy (arXiv 1802.04537, section 4), of which everything is known in closed form."""

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from .base import full_precision


class LinearGaussian(nn.Module):
    """z ~ N(mu, I), x | z ~ N(z, I), and q(z | x) = N(A x + b, variance I). theta = mu, phi = (A, b).

    Exact: p(x) = N(mu, 2 I), posterior N((x + mu) / 2, I / 2); the optimum given data is mu = mean x, A = I / 2,
    b = mu / 2.

    Args:
        dim: D, the length of x and of z.
        variance: of q, fixed; the paper's is 2/3.
    """

    def __init__(self, dim: int = 20, variance: float = 2 / 3) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"network.dim must be at least 1. Got {dim}.")
        if variance <= 0:
            raise ValueError(f"network.variance must be positive. Got {variance}.")
        self.dim, self.variance = dim, variance
        self.inference = nn.Linear(dim, dim)
        self.generative = nn.ParameterDict({"mu": torch.zeros(dim)})

    @property
    def mu(self) -> Tensor:
        """The prior's mean, (D,)."""
        return self.generative["mu"]

    def prior(self) -> Distribution:
        """N(mu, I)."""
        return Independent(Normal(self.mu, torch.ones_like(self.mu), validate_args=False), 1)

    def posterior(self, x: Tensor) -> Distribution:
        """N(A x + b, variance I)."""
        mean = full_precision(self.inference(x))
        return Independent(Normal(mean, torch.full_like(mean, math.sqrt(self.variance)), validate_args=False), 1)

    def likelihood(self, z: Tensor) -> Distribution:
        """N(z, I)."""
        return Independent(Normal(z, torch.ones_like(z), validate_args=False), 1)

    def exact_log_px(self, x: Tensor) -> Tensor:
        """log p(x), shape (B,). Nats."""
        return -self.dim / 2 * math.log(4 * math.pi) - (x - self.mu).square().sum(-1) / 4

    def exact_posterior(self, x: Tensor) -> Distribution:
        """p(z | x) = N((x + mu) / 2, I / 2)."""
        mean = (x + self.mu) / 2
        return Independent(Normal(mean, torch.full_like(mean, math.sqrt(0.5)), validate_args=False), 1)

    def exact_kl(self, x: Tensor) -> Tensor:
        """KL(q(z | x) || p(z | x)), shape (B,); log p(x) minus this is the exact ELBO. Nats."""
        distance = (self.inference(x) - (x + self.mu) / 2).square().sum(-1)
        return self.dim * (self.variance - 0.5 - 0.5 * math.log(2 * self.variance)) + distance

    @torch.no_grad()
    def near_optimum(self, x: Tensor, spread: float = 0.01) -> None:
        """Set mu, A and b to the optimum for data x (N, D), plus N(0, spread^2) on every entry: the paper's point."""
        self.mu.copy_(x.mean(0))
        self.inference.weight.copy_(torch.eye(self.dim) / 2)
        self.inference.bias.copy_(self.mu / 2)
        for p in self.parameters():
            p.add_(spread * torch.randn_like(p))

    def relative_variance(self, x: Tensor) -> Tensor:
        """Var[w] / p(x)^2 of one weight, (B,); infinite for a variance of q up to 1/4."""
        delta, wide = self._delta(x), 4 * self.variance - 1
        if wide <= 0:
            return torch.full_like(delta[:, 0], math.inf)
        root = (2 * self.variance) ** self.dim * wide ** (-self.dim / 2)
        return root * torch.exp(2 * delta.square().sum(-1) / wide) - 1

    @torch.no_grad()
    def exact_snr(self, x: Tensor, side: str, estimator: str, M: int, K: int) -> Tensor | None:
        """SNR of the gradient of the mean over data x (N, D), per parameter, (P,): A and b for phi, mu for theta.

        Exact at K = 1, and of the ELBO. For iwae at K > 1 the leading terms in K of Theorem 1 (Rainforth et al., arXiv
        1802.04537) with the constants of this model, good to a few per cent from K = 16 on; they need a variance of q
        above 3/8. None where there is no such theory.
        """
        x, moments = x.double(), self._moments(x.double(), side, estimator, K)
        if moments is None:
            return None
        mean, std = moments
        if side == "phi":  # A's entries have b's gradient times x
            mean, variance = mean.T @ x, std.square().T @ x.square()
            b_mean, b_variance = moments[0].sum(0), std.square().sum(0)
            mean, variance = torch.cat([mean.flatten(), b_mean]), torch.cat([variance.flatten(), b_variance])
        else:
            mean, variance = mean.sum(0), std.square().sum(0)
        return math.sqrt(M) * mean.abs() / variance.sqrt()

    def _delta(self, x: Tensor) -> Tensor:
        """q's mean less the posterior's, (B, D)."""
        A, b, mu = (p.to(x.dtype) for p in (self.inference.weight, self.inference.bias, self.mu))
        return x @ A.T + b - (x + mu) / 2

    def _moments(self, x: Tensor, side: str, estimator: str, K: int) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of a datum's gradient of b or mu, each (N, D), at M = 1."""
        delta, mu, s2 = self._delta(x), self.mu.to(x.dtype), self.variance
        one = torch.ones_like(delta)
        if estimator == "elbo" or K == 1:
            if side == "theta":
                return delta + (x + mu) / 2 - mu, math.sqrt(s2 / K) * one
            if estimator in ("elbo", "iwae", "ciwae", "vr-iwae", "jvi"):
                return -2 * delta, 2 * math.sqrt(s2 / K) * one
            if estimator in ("stl", "dreg", "ciwae-dreg", "vr-iwae-dreg", "jvi-dreg"):
                return -2 * delta, abs(1 / math.sqrt(s2) - 2 * math.sqrt(s2)) * one
            return (0 * one, one / math.sqrt(s2)) if estimator == "wake" else None
        if estimator != "iwae" or s2 <= 3 / 8:
            return None
        wide, E2 = 4 * s2 - 1, 1 + self.relative_variance(x).unsqueeze(-1)
        pull, spread = 2 / wide * E2 * delta / K, (E2 / K * (s2 / wide + delta.square() / wide**2)).sqrt()
        return (-pull, 2 * spread) if side == "phi" else ((x - mu) / 2 + pull / 2, spread)
