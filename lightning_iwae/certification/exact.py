"""Expected gradients without sampling: by quadrature over K particles, and by enumeration of a discrete latent."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from .targets import Target, Weights, applicable


class Quadrature:
    """K particles at all nodes of a tensor Gauss-Hermite rule: z ~ N(b, s^2), z ~ N(mu, 1), x | z ~ N(z, 1)."""

    def __init__(self, K: int, nodes: int = 48) -> None:
        self.K, self.x = K, torch.tensor([1.1, -0.6], dtype=torch.float64)
        self.b, self.log_s, self.mu = (
            torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.2, -0.5], [-0.2, -0.1], [0.3, 0.3])
        )
        e, weight = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(nodes))
        grid = torch.cartesian_prod(*[torch.arange(nodes)] * K).reshape(-1, K)
        self.e = e[grid].unsqueeze(-1)  # (G, K, 1)
        self.probability = (weight / weight.sum())[grid].prod(1)  # (G,)

    @cached_property
    def log_w(self) -> Tensor:
        """(G, K, B), with the graph of all three parameters."""
        s = self.log_s.exp()
        z = self.b + s * self.e
        joint = Normal(self.mu, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(self.x)
        return joint - Normal(self.b, s).log_prob(z)

    def expected_gradient(self, bound: Callable[..., Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Of E[bound] with respect to b, log s and mu, each (B,), by autograd through the rule."""
        G, K, B = self.log_w.shape
        value = bound(self.log_w.transpose(0, 1).reshape(1, K, G * B), **options).reshape(G, B)
        expected = (self.probability[:, None] * value).sum()
        b, log_s, mu = torch.autograd.grad(expected, [self.b, self.log_s, self.mu], retain_graph=True)
        return b, log_s, mu

    def mean(self, weights: Tensor, per_sample: Tensor) -> Tensor:
        """E sum_k weights * per_sample, (B,); both (G, K, B), the weights of a group alone."""
        return torch.einsum("g,gkb->b", self.probability, weights * per_sample)

    def of_phi(self, c: Tensor, s: Tensor) -> Tensor:
        """The expected gradient of (b, log s), (2, B), of channels (G, K, B); derivatives by hand."""
        scale = self.log_s.detach().exp()
        z = (self.b + scale * self.e).detach()
        h = (z - self.b.detach()) / scale**2
        g = (self.mu - z + self.x - z).detach() + h  # d log w / dz, phi held in log q
        by_b = self.mean(c, g) + self.mean(s, h)
        by_log_s = self.mean(c, g * scale * self.e) + self.mean(s, h.square() * scale**2 - 1)
        return torch.stack([by_b, by_log_s])

    def of_theta(self, a: Tensor) -> Tensor:
        """The expected gradient of mu, (1, B)."""
        z = (self.b + self.log_s.exp() * self.e).detach()
        return self.mean(a, z - self.mu.detach())[None]

    def of_prior(self, b: Tensor, c: Tensor) -> Tensor:
        """The expected gradient of mu by z = mu + e, (1, B), of `estimators.gdreg`'s channels."""
        scale = self.log_s.detach().exp()
        z = (self.b + scale * self.e).detach()
        of_likelihood = self.x - z
        of_w = of_likelihood + (self.mu - z).detach() + (z - self.b.detach()) / scale**2
        return (self.mean(b, of_likelihood) + self.mean(c, of_w))[None]

    def target(self, target: Target, side: str, options: dict[str, Any]) -> Tensor:
        """What a row claims, (2, B) for phi and (1, B) for theta."""
        zero = torch.zeros(2 if side == "phi" else 1, 2, dtype=torch.float64)
        if target.bound is not None:
            *phi, mu = self.expected_gradient(target.bound, **applicable(target.bound, options))
            zero = torch.stack(phi) if side == "phi" else mu[None]
        if target.wake:
            w = torch.softmax(self.log_w.detach(), 1)
            zero = zero + target.wake * self.of_phi(torch.zeros_like(w), w)
        return zero

    def found(self, side: str, weights: Weights, options: dict[str, Any]) -> Tensor:
        """The expected gradient of an estimator. Groups are its M, which it divides by."""
        log_w = self.log_w.detach()
        channels = weights(log_w, **options)
        return (
            self.of_theta(channels * len(log_w))
            if side == "theta"
            else self.of_phi(*(v * len(log_w) for v in channels))
        )


class Enumeration:
    """K particles of a categorical latent of C states in all C^K ways: q = softmax(phi), log p(x, z) = theta_z."""

    def __init__(self, K: int, states: int = 4) -> None:
        source = torch.Generator().manual_seed(3)
        self.phi, self.theta = (
            torch.randn(states, dtype=torch.float64, generator=source).requires_grad_() for _ in range(2)
        )
        self.z = torch.cartesian_prod(*[torch.arange(states)] * K).reshape(-1, K)  # (G, K)
        log_q = self.phi.log_softmax(0)
        self.probability = log_q[self.z].sum(1).exp()  # a function of phi
        self.log_w = (self.theta - log_q)[self.z].unsqueeze(-1)  # (G, K, 1)

    def target(self, target: Target, side: str, options: dict[str, Any]) -> Tensor:
        """As `Quadrature.target`, (C, 1)."""
        parameter = self.phi if side == "phi" else self.theta
        found = torch.zeros_like(parameter)
        if target.bound is not None:
            value = target.bound(
                self.log_w.transpose(0, 1).reshape(1, self.z.shape[1], -1), **applicable(target.bound, options)
            )
            (found,) = torch.autograd.grad((self.probability * value).sum(), parameter, retain_graph=True)
        if target.wake:
            w = torch.softmax(self.log_w.detach(), 1)
            found = found + target.wake * self._sum(w, centred=True).squeeze(-1)
        return found.unsqueeze(-1).detach()

    def found(self, side: str, weights: Weights, options: dict[str, Any]) -> Tensor:
        """The expected gradient of an estimator, of phi by its score alone."""
        channels = weights(self.log_w.detach(), **options)
        channel = channels if side == "theta" else channels[1]
        return self._sum(channel * len(self.z), centred=side == "phi")

    def _sum(self, weights: Tensor, centred: bool) -> Tensor:
        one_hot = nn.functional.one_hot(self.z, len(self.phi)).double()
        score = one_hot - self.phi.detach().softmax(0) if centred else one_hot
        return torch.einsum("g,gk,gkc->c", self.probability.detach(), weights.squeeze(-1), score).unsqueeze(-1)
