"""Hamiltonian Monte Carlo between q or the prior and the posterior, all chains and data at once."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

Start = Literal["prior", "posterior"]
FARTHEST = 1e6  # a trajectory that leaves this box has diverged: from no later than here everything overflows


class Point(NamedTuple):
    """Where the chains are, z (C, B, ...), and what is known there of both ends of the path."""

    z: Tensor
    log_r: Tensor  # (C, B)
    log_w: Tensor  # (C, B), log p(x, z) - log r(z)
    grad_log_r: Tensor  # by z, (C, B, ...)
    grad_log_w: Tensor

    def log_f(self, beta: float) -> Tensor:
        """log f_beta(z), (C, B), in float64."""
        return self.log_r.double() + beta * self.log_w.double()

    def gradient(self, beta: float) -> Tensor:
        """Of log f_beta by z."""
        return self.grad_log_r + beta * self.grad_log_w


class Bridge:
    """The densities f_beta(z) = r(z)^(1 - beta) p(x, z)^beta of data x (B, ...), r being p(z) or q(z | x).

    From the prior f_beta = p(z) p(x | z)^beta. At a new beta nothing is computed anew: a `Point` holds both ends.

    Args:
        model: follows `models.base.Model`.
        x: batch (B, ...).
        start: what r is.

    Raises:
        ValueError: if z is discrete or bounded, or log p(x, z) has no gradient by z.
    """

    def __init__(self, model: Any, x: Tensor, start: Start) -> None:
        self.model, self.x = model, x
        with torch.no_grad():
            self.prior: Distribution = model.prior()
            self.r: Distribution = self.prior if start == "prior" else model.posterior(x)
        for what, p in (("prior", self.prior), (start, self.r)):
            check_unbounded(p, what)

    def draw(self, chains: int) -> Tensor:
        """z (C, B, ...) ~ r."""
        return self.r.sample(torch.Size([chains] if self.r.batch_shape else [chains, len(self.x)]))

    def at(self, z: Tensor) -> Point:
        """Both ends at z (C, B, ...): one decoder pass forward and back."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_prior, log_px = self.prior.log_prob(z), self.model.likelihood(z).log_prob(self.x)
            if not log_px.requires_grad:
                raise ValueError("annealing moves z along the gradient of log p(x | z), which has none by z.")
            from_prior = self.r is self.prior
            log_r = log_prior if from_prior else self.r.log_prob(z)
            log_w = log_px if from_prior else log_prior + log_px - log_r
            of_r = torch.zeros_like(z)
            if log_r.requires_grad:
                (of_r,) = torch.autograd.grad(log_r.sum(), z, retain_graph=True, materialize_grads=True)
            (of_w,) = torch.autograd.grad(log_w.sum(), z, materialize_grads=True)
        return Point(z.detach(), log_r.detach(), log_w.detach(), of_r, of_w)


def move(bridge: Bridge, point: Point, beta: float, step: Tensor, leapfrog: int) -> tuple[Point, Tensor]:
    """One HMC move of every chain, which leaves f_beta as it is, and its probability of acceptance (C, B).

    Neal, "MCMC using Hamiltonian dynamics" (arXiv 1206.1901), section 5.3.2, with unit masses. Each chain's step is
    `step` times a factor uniform in [0.8, 1.2], so that no trajectory comes back to where it began by a period of its.
    A trajectory that diverges is rejected; as its way back diverges too, this is exact.

    Args:
        point: the chains, (C, B, ...).
        beta: in [0, 1].
        step: of the leapfrog, (B,).
        leapfrog: steps of a trajectory, each one decoder pass forward and back.
    """
    step = step * (0.8 + 0.4 * torch.rand_like(point.log_r))
    step = step.view(*step.shape, *(1 for _ in point.z.shape[2:]))
    start = torch.randn_like(point.z)
    momentum = start + step / 2 * point.gradient(beta)
    end, lost = point, torch.zeros_like(point.log_r, dtype=torch.bool)
    for i in range(leapfrog):
        z = end.z + step * momentum
        lost |= ~(z.abs() <= FARTHEST).flatten(2).all(-1)
        end = bridge.at(where(lost, point.z, z))
        momentum = momentum + (step if i < leapfrog - 1 else step / 2) * end.gradient(beta)
    change = end.log_f(beta) - point.log_f(beta) + kinetic(start) - kinetic(momentum)
    acceptance = change.clamp(max=0).exp().masked_fill(lost | change.isnan(), 0)
    accepted = torch.rand_like(acceptance) < acceptance
    return Point(*(where(accepted, new, old) for new, old in zip(end, point, strict=True))), acceptance


def kinetic(momentum: Tensor) -> Tensor:
    """Half the squared length of momenta (C, B, ...), (C, B), in float64."""
    return momentum.double().square().flatten(2).sum(-1) / 2


def where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """By chains: `condition` (C, B) on (C, B, ...)."""
    return torch.where(condition.view(*condition.shape, *(1 for _ in yes.shape[2:])), yes, no)


def check_unbounded(p: Distribution, what: str) -> None:
    """ValueError unless z ~ p is continuous and may be any real number, as far as p says."""
    try:
        support: Any = p.support
    except (AttributeError, NotImplementedError):
        return
    while hasattr(support, "base_constraint"):  # of Independent, of a mixture
        support = support.base_constraint
    if support is None or support == constraints.real or support == constraints.real_vector:
        return
    kind = "discrete" if support.is_discrete else "bounded"
    raise ValueError(
        f"annealing moves z along the gradient of log p(x, z), for which z must be continuous and unbounded. "
        f"Got a {kind} one: the {what}'s support is {support}."
    )
