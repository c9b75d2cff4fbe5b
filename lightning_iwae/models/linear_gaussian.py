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
